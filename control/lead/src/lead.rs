//! One lead: what its doors and its control loop share.
//!
//! Whatever only the leader may do is an [`Ask`]: a lead that is not the leader hands it on, so that any lead
//! serves any client. An ask that failed is asked again until a leader is found or the limit passes, except where
//! that could change something twice.

use std::{
    fmt,
    net::SocketAddr,
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use control_core::{base::ClusterState, command::Command, name::Name};
use netmanager_api::{conditions::Conditions, identity::RevokedList};
use openraft::{LogId, RaftMetrics, ServerState};
use serde::{Deserialize, Serialize};
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, timeout},
};

use crate::{
    authority::issuer::Issuer,
    board::{self, Board},
    courier::Courier,
    drain,
    leases::Leases,
    members::ABOUT_LEASES,
    once::{Keys, is_note},
    raft::{
        Grants, Incoming, Member, Pace, Raft,
        checkpoint::Checks,
        election::Election,
        members::{MemberError, Seat},
        network::{Network, PostError},
        propose::{Done, ProposeError, Proposer},
    },
    replica::Replica,
    room::watch::Rooms,
    world::{Aside, Clock},
};

/// How long an ask looks for a leader that can serve it.
const PATIENCE: Duration = Duration::from_secs(6);
/// How long one lead may take to answer what waits for no lease; longer than an entry may take to be committed.
pub(crate) const ANSWER: Duration = Duration::from_secs(4);
/// Where a lead is asked what only the leader may do.
pub(crate) const ASK: &str = "/raft/v1/ask";
/// How long the leader may take to make sure that it still leads.
const CONFIRM: Duration = Duration::from_secs(2);
/// How long to wait before the next attempt, unless the leader changes before.
const AGAIN: Duration = Duration::from_millis(100);
/// How long this lead's own log may lag behind the leader's.
const CATCH_UP: Duration = Duration::from_secs(3);
/// How long the control loop may take over a change.
const PLAN: Duration = Duration::from_secs(3);

/// What any lead asks of the leader.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Ask {
    /// Propose these, in one entry.
    Propose(Vec<Command>),
    /// Which entry must be applied for a read to be consistent?
    ReadIndex,
    /// A cluster's agent is alive.
    Renew { cluster: Name, session: u64 },
    /// How do things stand in the mesh? With what the cluster says of itself.
    Exchange {
        cluster: Name,
        session: u64,
        conditions: Conditions,
    },
    /// Which entry must be applied to see what the control loop made of this one?
    Planned { index: u64 },
    /// Who is a member, and how far.
    Seats,
    /// Which member has this name or this id?
    Seat(SeatOf),
    /// A lead is to become a member, in the place of another where one is named.
    Admit {
        name: String,
        address: SocketAddr,
        replaces: Option<String>,
    },
    /// A lead is to leave.
    Dismiss { name: String },
    /// Another lead is to lead, if this one does, or if none is named.
    HandOver { name: Option<String> },
}

impl Ask {
    /// Whether it may change something once more when it comes again.
    fn counts_twice(&self) -> bool {
        let is_keyed = |command: &Command| matches!(command, Command::Once(_));
        matches!(self, Self::Propose(commands) if !commands.iter().all(is_keyed))
    }

    /// How long the leader may take to answer.
    fn limit(&self, lease: Duration) -> Duration {
        let leases = match self {
            Self::HandOver { .. } => drain::LEASES,
            Self::Dismiss { .. } => ABOUT_LEASES + drain::LEASES,
            _ => 0,
        };
        ANSWER + leases * lease
    }
}

/// How a member is asked for.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum SeatOf {
    /// By a lead that joins, and has no id yet.
    Name(String),
    Id(u64),
}

/// What the leader answers.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Answer {
    Done(Done),
    Index(u64),
    Renewed,
    Conditions(Conditions),
    Seats(Vec<Seat>),
    Seat(Option<(u64, Member)>),
    /// The name of the leader after a hand-over.
    Leader(String),
}

/// Why an ask was not served.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub(crate) enum AskError {
    /// The proposer or Raft says so.
    #[error(transparent)]
    Propose(#[from] ProposeError),
    /// No lead that leads was reached.
    #[error("no leader was reached: a majority of the leads ({0}) must be up and connected")]
    NoLeader(String),
    /// The cluster has another session, or is lost.
    #[error("session {session:x} of cluster {cluster} is over")]
    SessionOver { cluster: Name, session: u64 },
    /// The group stays as it is.
    #[error(transparent)]
    Member(#[from] MemberError),
    /// The control loop is late.
    #[error("the control loop is late")]
    Late,
    /// This lead's log lags behind.
    #[error("this lead lags behind the leader")]
    Lagging,
}

impl AskError {
    /// Whether another attempt may help.
    fn is_passing(&self) -> bool {
        matches!(
            self,
            Self::Propose(ProposeError::NotLeader | ProposeError::NoMajority)
        )
    }
}

/// How far the control loop is.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Planned {
    /// Everything up to this entry was planned for.
    pub(crate) seen: u64,
    /// What came of it is applied with this entry.
    pub(crate) done: u64,
}

/// One lead.
pub(crate) struct Lead {
    pub(crate) name: String,
    pub(crate) id: u64,
    pub(crate) raft: Raft,
    pub(crate) replica: Arc<Replica>,
    pub(crate) proposer: Proposer,
    pub(crate) network: Network,
    /// What goes to the leader together with others.
    pub(crate) courier: Courier,
    pub(crate) pace: Pace,
    pub(crate) clock: Clock,
    pub(crate) aside: Aside,
    pub(crate) election: Election,
    pub(crate) leases: Mutex<Leases>,
    pub(crate) board: Mutex<Board>,
    pub(crate) planned: watch::Sender<Planned>,
    /// How much room there is on the disks.
    pub(crate) rooms: watch::Sender<Rooms>,
    /// What its state is at entries that every lead comes by.
    pub(crate) checks: Checks,
    /// The snapshot that another lead sends.
    pub(crate) incoming: Incoming,
    /// Whether this lead is handing over, and takes no more changes.
    pub(crate) gives_way: AtomicBool,
    /// Who wants another lead to lead.
    pub(crate) drain: mpsc::Sender<drain::Asker>,
    /// Shared by who proposes, from before that look on; held alone by a leader that waits for what was proposed.
    pub(crate) proposing: tokio::sync::RwLock<()>,
    /// Keys for requests that come without one.
    pub(crate) keys: Keys,
    /// Whether this lead is in touch with its group.
    pub(crate) in_touch: watch::Sender<bool>,
    /// Held by whoever changes the membership.
    pub(crate) changing: tokio::sync::Mutex<()>,
    /// What its doors take for revoked, and by which authorities they know anybody; nothing without a socket.
    pub(crate) revoked: OnceLock<RevokedList>,
    /// What it signs certificates of agents with; nothing without a socket.
    pub(crate) issuer: OnceLock<Issuer>,
    /// The end of its log when it started.
    pub(crate) began_at: Option<LogId<u64>>,
}

impl fmt::Debug for Lead {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lead")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

impl Lead {
    /// Asks the leader, wherever it is.
    pub(crate) async fn ask(&self, ask: Ask) -> Result<Answer, AskError> {
        let give_up = Instant::now() + PATIENCE;
        let mut metrics = self.raft.metrics();
        loop {
            let last = match self.leader() {
                None => None,
                Some((id, _)) if id == self.id => match self.answer(ask.clone()).await {
                    Err(error) if error.is_passing() => Some(error),
                    answer => return answer,
                },
                Some((_, member)) => match self.deliver(&member, &ask).await {
                    Ok(Err(error)) if error.is_passing() => Some(error),
                    Ok(answer) => return answer,
                    Err(error) => {
                        tracing::debug!(%error, leader = member.name, "the leader did not answer");
                        if ask.counts_twice() && !error.never_arrived() {
                            // A second time it could undo what others changed meanwhile.
                            return Err(ProposeError::Unknown.into());
                        }
                        None
                    }
                },
            };
            if Instant::now() >= give_up {
                let none = || AskError::NoLeader(self.member_list());
                return Err(match last {
                    Some(AskError::Propose(ProposeError::NoMajority)) | None => none(),
                    Some(error) => error,
                });
            }
            metrics.mark_unchanged();
            if let Ok(Err(_)) = timeout(AGAIN, metrics.changed()).await {
                // Raft has ended here: nothing will ever change.
                return Err(ProposeError::Stopped.into());
            }
        }
    }

    /// Hands an ask on, with others where it may go with others.
    async fn deliver(
        &self,
        leader: &Member,
        ask: &Ask,
    ) -> Result<Result<Answer, AskError>, PostError> {
        match ask {
            Ask::Propose(commands) if !ask.counts_twice() => {
                Ok(self.courier.propose(leader, commands.clone()).await)
            }
            Ask::Planned { index } => Ok(self.courier.planned(leader, *index).await),
            _ => self.hand_on(leader, ask).await,
        }
    }

    pub(crate) async fn hand_on(
        &self,
        leader: &Member,
        ask: &Ask,
    ) -> Result<Result<Answer, AskError>, PostError> {
        let limit = ask.limit(self.pace.lease());
        self.network.post(leader, ASK, ask, limit).await
    }

    /// Serves an ask as the leader.
    pub(crate) async fn answer(&self, ask: Ask) -> Result<Answer, AskError> {
        let _proposing = match &ask {
            Ask::Propose(_) => Some(self.proposing.read().await),
            _ => None,
        };
        if !self.leads() || self.gives_way.load(Ordering::Relaxed) {
            return Err(ProposeError::NotLeader.into());
        }
        if !self.has_majority() {
            return Err(ProposeError::NoMajority.into());
        }
        if let Ask::Propose(commands) = &ask
            && !commands.iter().all(is_note)
            && let Some(why) = self.rooms.borrow().closed.clone()
        {
            return Err(ProposeError::NoRoom(why).into());
        }
        match ask {
            Ask::Propose(commands) => Ok(Answer::Done(self.proposer.propose(commands).await?)),
            Ask::ReadIndex => self.read_index().await.map(Answer::Index),
            Ask::Renew { cluster, session } => {
                self.renew(cluster, session).map(|()| Answer::Renewed)
            }
            Ask::Exchange {
                cluster,
                session,
                conditions,
            } => self
                .exchange(cluster, session, conditions)
                .map(Answer::Conditions),
            Ask::Planned { index } => {
                let mut planned = self.planned.subscribe();
                let seen = async {
                    let seen = planned.wait_for(|planned| planned.seen >= index).await;
                    seen.map(|planned| planned.done)
                };
                let mut metrics = self.raft.metrics();
                let deposed = async {
                    let deposed = metrics.wait_for(|it| it.state != ServerState::Leader);
                    let _ = deposed.await;
                };
                tokio::select! {
                    seen = timeout(PLAN, seen) => match seen {
                        Ok(Ok(done)) => Ok(Answer::Index(done)),
                        _ => Err(AskError::Late),
                    },
                    // Its loop plans no more: the next leader's does.
                    () = deposed => Err(ProposeError::NotLeader.into()),
                }
            }
            Ask::Seats => {
                self.confirm().await?;
                Ok(Answer::Seats(self.seats().await))
            }
            Ask::Seat(of) => self.seat(&of).await.map(Answer::Seat),
            Ask::Admit {
                name,
                address,
                replaces,
            } => self.admit(name, address, replaces).await,
            Ask::Dismiss { name } => self.dismiss(&name).await,
            Ask::HandOver { name } => self.hand_over(name).await.map(Answer::Leader),
        }
    }

    /// Makes sure that this lead still leads.
    pub(crate) async fn confirm(&self) -> Result<(), AskError> {
        self.read_index().await.map(|_| ())
    }

    async fn read_index(&self) -> Result<u64, AskError> {
        match timeout(CONFIRM, self.raft.ensure_linearizable()).await {
            Ok(Ok(log_id)) => Ok(log_id.map_or(0, |id| id.index)),
            Ok(Err(error)) => {
                tracing::debug!(%error, "leadership was not confirmed");
                Err(ProposeError::NoMajority.into())
            }
            Err(_) => Err(ProposeError::NoMajority.into()),
        }
    }

    fn renew(&self, cluster: Name, session: u64) -> Result<(), AskError> {
        self.check_session(&cluster, session)?;
        self.leases().renew(cluster, session, Instant::now());
        Ok(())
    }

    fn exchange(
        &self,
        cluster: Name,
        session: u64,
        conditions: Conditions,
    ) -> Result<Conditions, AskError> {
        self.check_session(&cluster, session)?;
        let own = self
            .replica
            .read(|base| board::own(base, &cluster, conditions));
        let mut board = self.board.lock().unwrap_or_else(PoisonError::into_inner);
        board.put(cluster, own, Instant::now());
        Ok(board.all())
    }

    fn check_session(&self, cluster: &Name, session: u64) -> Result<(), AskError> {
        let is_current = self.replica.read(|base| {
            base.clusters
                .get(cluster)
                .is_some_and(|it| it.session == session && it.state == ClusterState::Ready)
        });
        if is_current {
            Ok(())
        } else {
            let cluster = cluster.clone();
            Err(AskError::SessionOver { cluster, session })
        }
    }

    /// Proposes, wherever the leader is.
    pub(crate) async fn propose(&self, commands: Vec<Command>) -> Result<Done, AskError> {
        match self.ask(Ask::Propose(commands)).await? {
            Answer::Done(done) => Ok(done),
            _ => Err(ProposeError::Stopped.into()),
        }
    }

    /// Waits until this lead's replica shows every change that was acknowledged before.
    pub(crate) async fn catch_up(&self) -> Result<(), AskError> {
        self.follow_to(Ask::ReadIndex).await
    }

    /// Like [`Lead::catch_up`], with a single attempt.
    pub(crate) async fn catch_up_now(&self) -> Result<(), AskError> {
        let answer = match self.leader() {
            None => return Err(AskError::NoLeader(self.member_list())),
            Some((id, _)) if id == self.id => self.answer(Ask::ReadIndex).await,
            Some((_, leader)) => {
                let none = |_| AskError::NoLeader(self.member_list());
                let answer = self.hand_on(&leader, &Ask::ReadIndex).await;
                answer.map_err(none)?
            }
        };
        self.reach(answer?).await
    }

    /// Waits until this lead's replica shows what the control loop made of entry `index`.
    pub(crate) async fn await_plan(&self, index: u64) -> Result<(), AskError> {
        self.follow_to(Ask::Planned { index }).await
    }

    async fn follow_to(&self, ask: Ask) -> Result<(), AskError> {
        let answer = self.ask(ask).await?;
        self.reach(answer).await
    }

    async fn reach(&self, answer: Answer) -> Result<(), AskError> {
        let Answer::Index(index) = answer else {
            return Err(ProposeError::Stopped.into());
        };
        if self.replica.reach(index, CATCH_UP).await {
            Ok(())
        } else {
            Err(AskError::Lagging)
        }
    }

    /// Whether this lead thinks that it leads, and has applied all that was acknowledged before.
    pub(crate) fn leads(&self) -> bool {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow();
        metrics.state == ServerState::Leader
            && is_up_to_date(metrics.last_applied, metrics.current_term, self.began_at)
    }

    /// Whether a majority promised this leader so lately to elect no other that no other can have been elected.
    pub(crate) fn has_majority(&self) -> bool {
        holds_lease(&self.raft.metrics().borrow(), &self.network.grants)
    }

    /// Waits until [`Lead::has_majority`], this lead leads no more, or it took too long: who was itself held up hears
    /// its majority with the next heartbeat.
    pub(crate) async fn hear_majority(&self) {
        let mut metrics = self.raft.metrics();
        let heard = metrics.wait_for(|metrics| {
            metrics.state != ServerState::Leader || holds_lease(metrics, &self.network.grants)
        });
        // Who proposes looks at what came of it.
        let _ = timeout(CONFIRM, heard).await;
    }

    /// The leader, as far as this lead knows.
    pub(crate) fn leader(&self) -> Option<(u64, Member)> {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow();
        let id = metrics.current_leader?;
        let member = metrics.membership_config.membership().get_node(&id)?;
        Some((id, member.clone()))
    }

    /// Every lead of the group.
    pub(crate) fn members(&self) -> Vec<Member> {
        let members = self.members_by_id().into_iter();
        members.map(|(_, member)| member).collect()
    }

    /// Every lead of the group with its id.
    pub(crate) fn members_by_id(&self) -> Vec<(u64, Member)> {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow();
        let nodes = metrics.membership_config.nodes();
        nodes.map(|(id, member)| (*id, member.clone())).collect()
    }

    fn member_list(&self) -> String {
        let members = self.members();
        let names = members
            .iter()
            .map(|member| format!("{} at {}", member.name, member.address));
        names.collect::<Vec<_>>().join(", ")
    }

    /// The leases of the clusters; only the leader's mean anything.
    pub(crate) fn leases(&self) -> std::sync::MutexGuard<'_, Leases> {
        self.leases.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether the leader that `metrics` are of holds its lease.
fn holds_lease(metrics: &RaftMetrics<u64, Member>, grants: &Grants) -> bool {
    let membership = metrics.membership_config.membership();
    let voters = membership.get_joint_config();
    grants.are_held(metrics.vote, metrics.id, voters, Instant::now())
}

/// Whether a leader of `term` that has applied `applied` knows all that was acknowledged before: an entry of its
/// own term is behind all of earlier ones, and a leader that restarted within its term (openraft lets it go on)
/// may have acknowledged whatever its log held then.
fn is_up_to_date(applied: Option<LogId<u64>>, term: u64, began_at: Option<LogId<u64>>) -> bool {
    applied.is_some_and(|applied| applied.leader_id.term == term) && applied >= began_at
}

#[cfg(test)]
mod tests {
    use openraft::CommittedLeaderId;

    use super::*;

    #[test]
    fn a_leader_that_restarted_within_its_term_first_applies_what_it_may_have_acknowledged() {
        let log = |term, index| Some(LogId::new(CommittedLeaderId::new(term, 1), index));
        for (applied, term, began_at, want) in [
            (None, 1, None, false),
            (log(1, 1), 1, None, true),
            (log(1, 9), 2, log(1, 9), false),
            (log(2, 10), 2, log(1, 9), true),
            (log(2, 10), 2, log(2, 12), false),
            (log(2, 12), 2, log(2, 12), true),
            // What it held was replaced by another leader's.
            (log(3, 11), 3, log(2, 12), true),
        ] {
            let is = is_up_to_date(applied, term, began_at);
            assert_eq!(is, want, "{applied:?} in term {term} from {began_at:?}");
        }
    }
}
