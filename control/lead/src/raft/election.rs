//! Elections with a pre-vote round (D. Ongaro, "Consensus: Bridging Theory and Practice", 9.6), which openraft 0.9
//! has not.
//!
//! ```text
//!  silent for a lease + rank * stagger --> Canvass to every voter --majority of yes--> openraft's election
//! ```
//!
//! openraft's own timer is off: whoever raises the term unseats the leader, so a lead that was cut off, or that
//! hears nobody while all hear it, would come back and cost an election. A voter says yes only when it hears no
//! leader itself and the candidate's log is not behind its own. The rank is the place of a lead's id among the
//! voters: candidates stand one after the other instead of against each other, and no random number is needed.

use std::time::Duration;

use futures::{StreamExt, stream::FuturesUnordered};
use openraft::{LogId, ServerState, storage::RaftLogStorage};
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep};

use super::{Member, Pace, Raft, log::LogStore, network::Network, timers::Tempo, voter::Voter};

/// Would you vote for me?
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Canvass {
    /// The end of the candidate's log.
    pub(crate) last: Option<LogId<u64>>,
}

/// Where a lead is canvassed.
pub(crate) const PATH: &str = "/raft/v1/canvass";

/// What a voter knows when it is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Standing {
    /// The end of its log.
    last: Option<LogId<u64>>,
    /// For how long it has heard no leader, or as the leader no majority; `None` is "never since it started".
    silent: Option<Duration>,
}

/// Whether a voter says yes.
fn says_yes(own: Standing, canvass: Canvass, lease: Duration) -> bool {
    own.silent.is_none_or(|silent| silent >= lease) && canvass.last >= own.last
}

/// How many of so many voters decide.
fn majority(voters: usize) -> usize {
    voters / 2 + 1
}

/// The place of lead `own` among the voters that stand when `leader` is not heard any more: that one does not.
fn place(own: u64, leader: Option<u64>, voters: impl Iterator<Item = u64>) -> Option<u32> {
    let mut standing = voters.filter(|id| *id == own || Some(*id) != leader);
    let place = standing.position(|id| id == own)?;
    u32::try_from(place).ok()
}

/// How long a candidate waits from now: the rest of the lease and of what it promised, and its place in the queue.
fn wait(silent: Option<Duration>, bound: Duration, rank: u32, tempo: Tempo) -> Duration {
    let rest = tempo.lease.saturating_sub(silent.unwrap_or(tempo.lease));
    rest.max(bound) + tempo.stagger * rank
}

/// This lead's part in the elections.
#[derive(Clone)]
pub(crate) struct Election {
    pub(super) raft: Raft,
    pub(super) network: Network,
    pub(super) log: LogStore,
    pub(crate) voter: Voter,
    pub(super) pace: Pace,
    pub(super) id: u64,
}

impl Election {
    /// Answers a candidate.
    pub(crate) async fn answer(&self, canvass: Canvass) -> bool {
        match self.standing().await {
            Some(standing) if self.voter.is_bound_for().await.is_zero() => {
                says_yes(standing, canvass, self.pace.lease())
            }
            _ => false,
        }
    }

    /// Stands for election whenever no leader is heard; ends when Raft does.
    pub(crate) async fn run(self) {
        while let Some(standing) = self.standing().await {
            let rank = self.rank();
            let bound = self.voter.is_bound_for().await;
            let place = rank.unwrap_or(0);
            sleep(wait(standing.silent, bound, place, self.pace.tempo())).await;
            if rank.is_none() || !self.is_needed().await {
                sleep(self.pace.stagger()).await;
                continue;
            }
            // Asking took a while.
            match self.voter.elect(self.is_silent()).await {
                // The next attempt waits a lease: asking for votes counts as hearing a candidate.
                Ok(true) => tracing::info!("standing for election"),
                Ok(false) => {}
                Err(_) => return,
            }
        }
    }

    /// Whether no leader is heard here, and a majority would vote for this lead.
    async fn is_needed(&self) -> bool {
        match self.standing().await {
            Some(Standing { last, .. }) => self.is_silent().await && self.is_wanted(last).await,
            None => false,
        }
    }

    /// Whether no leader is heard here.
    async fn is_silent(&self) -> bool {
        let standing = self.standing().await;
        let silent = standing.map(|it| it.silent.unwrap_or(Duration::MAX));
        silent.is_some_and(|silent| silent >= self.pace.lease())
    }

    /// How long this lead votes for nobody else because it was elected a moment ago, or follows what it promised before.
    pub(crate) async fn is_bound_for(&self) -> Duration {
        let elected = self
            .raft
            .with_raft_state(openraft::RaftState::vote_last_modified);
        let now = Instant::now();
        let elected = elected.await.ok().flatten();
        let since = elected.map(|at| now.saturating_duration_since(at));
        let lease = self.pace.base().lease();
        let rest = lease.saturating_sub(since.unwrap_or(lease));
        rest.max(self.voter.is_bound_for().await)
    }

    /// What this lead knows now; `None` when Raft or its disk has ended.
    async fn standing(&self) -> Option<Standing> {
        // What touches the vote: a leader's messages, and a candidate that was voted for.
        let seen = self.raft.with_raft_state(|state| {
            let leads = state.server_state == ServerState::Leader;
            (leads, state.vote_last_modified())
        });
        let (leads, heard) = seen.await.ok()?;
        let silent = if leads {
            let metrics = self.raft.metrics();
            let ms = metrics.borrow().millis_since_quorum_ack;
            Some(Duration::from_millis(ms.unwrap_or(0)))
        } else {
            heard.map(|heard| Instant::now().saturating_duration_since(heard))
        };
        let last = self.log.clone().get_log_state().await.ok()?.last_log_id;
        Some(Standing { last, silent })
    }

    /// This lead's place among the voters that stand; `None` where it is none, there is no group yet, or it leads.
    fn rank(&self) -> Option<u32> {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow();
        if metrics.state == ServerState::Leader {
            return None;
        }
        let voters = metrics.membership_config.voter_ids();
        place(self.id, metrics.current_leader, voters)
    }

    /// Whether a majority of the voters, this one among them, would vote for this lead.
    async fn is_wanted(&self, last: Option<LogId<u64>>) -> bool {
        let (voters, others) = self.voters();
        let others = others.into_iter().map(|(_, member)| member).collect();
        self.canvass(last, others, majority(voters) - 1).await
    }

    /// As [`Election::is_wanted`], when the leader `giver` gives way: its vote is certain, and its answer would not say so.
    pub(super) async fn can_win(&self, giver: Option<u64>) -> bool {
        let (voters, others) = self.voters();
        let (givers, others): (Vec<_>, Vec<_>) =
            others.into_iter().partition(|(id, _)| Some(*id) == giver);
        let missing = majority(voters).saturating_sub(1 + givers.len());
        if missing == 0 {
            return true;
        }
        let Some(Standing { last, .. }) = self.standing().await else {
            return false;
        };
        let others = others.into_iter().map(|(_, member)| member).collect();
        self.canvass(last, others, missing).await
    }

    /// Whether at least `wanted` of these would vote for this lead; known as soon as so many said so.
    async fn canvass(&self, last: Option<LogId<u64>>, others: Vec<Member>, wanted: usize) -> bool {
        let canvass = Canvass { last };
        let limit = self.pace.heartbeat();
        let asked = others.iter().map(|member| async {
            let answer = self.network.post(member, PATH, &canvass, limit);
            matches!(answer.await, Ok(true))
        });
        let mut asked: FuturesUnordered<_> = asked.collect();
        let mut yes = 0;
        while yes < wanted {
            match asked.next().await {
                Some(answer) => yes += usize::from(answer),
                None => return false,
            }
        }
        true
    }

    /// How many voters there are, and those beside this lead.
    fn voters(&self) -> (usize, Vec<(u64, Member)>) {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow();
        let membership = metrics.membership_config.membership();
        let others = membership
            .voter_ids()
            .filter(|id| *id != self.id)
            .filter_map(|id| Some((id, membership.get_node(&id)?.clone())))
            .collect();
        (membership.voter_ids().count(), others)
    }
}

#[cfg(test)]
mod tests {
    use openraft::CommittedLeaderId;

    use super::*;
    use crate::raft::Timers;

    fn log(term: u64, index: u64) -> Option<LogId<u64>> {
        Some(LogId::new(CommittedLeaderId::new(term, 1), index))
    }

    #[test]
    fn a_voter_says_yes_only_without_a_leader_and_to_a_log_as_long_as_its_own() {
        let lease = Duration::from_millis(750);
        let silent = |ms| Some(Duration::from_millis(ms));
        for (last, silent, asked, want) in [
            (log(2, 7), silent(750), log(2, 7), true),
            (log(2, 7), silent(9_000), log(2, 8), true),
            (log(2, 7), silent(749), log(3, 9), false),
            (log(2, 7), silent(0), log(2, 7), false),
            (log(2, 7), silent(750), log(2, 6), false),
            (log(2, 7), silent(750), log(1, 99), false),
            (log(2, 7), silent(750), None, false),
            (None, None, None, true),
            (None, None, log(1, 1), true),
        ] {
            let own = Standing { last, silent };
            let canvass = Canvass { last: asked };
            assert_eq!(says_yes(own, canvass, lease), want, "{own:?} {canvass:?}");
        }
    }

    #[test]
    fn nobody_waits_for_the_leader_that_is_gone() {
        let places = |leader| [1, 2, 3].map(|own| place(own, leader, 1..=3));
        assert_eq!(places(None), [Some(0), Some(1), Some(2)]);
        assert_eq!(places(Some(1)), [Some(0), Some(0), Some(1)]);
        assert_eq!(places(Some(2)), [Some(0), Some(1), Some(1)]);
        assert_eq!(place(4, Some(1), 1..=3), None);
    }

    #[test]
    fn candidates_stand_one_after_the_other_once_the_lease_is_over() {
        let tempo = Timers::default().at(Duration::ZERO);
        let free = Duration::ZERO;
        let silent = Some(Duration::from_millis(100));
        let waits: Vec<_> = (0..3).map(|rank| wait(silent, free, rank, tempo)).collect();
        assert_eq!(waits[0], tempo.lease - Duration::from_millis(100));
        assert_eq!(waits[1] - waits[0], tempo.stagger);
        assert_eq!(waits[2] - waits[1], tempo.stagger);
        assert_eq!(wait(None, free, 0, tempo), free);
        let long = Some(Duration::from_secs(60));
        assert_eq!(wait(long, free, 1, tempo), tempo.stagger);
        let bound = Duration::from_secs(5);
        assert_eq!(wait(long, bound, 0, tempo), bound);
        assert_eq!(wait(silent, bound, 1, tempo), bound + tempo.stagger);
    }
}
