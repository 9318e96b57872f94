//! A lead without its socket: Raft, the control loop and the routes of its door.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    path::PathBuf,
    sync::{Arc, OnceLock, atomic::AtomicBool},
    time::Duration,
};

use axum::{Extension, Router};
use control_core::base::{KnowledgeBase, Mesh};
use netmanager_api::identity::{Identity, RevokedList};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::{mpsc, watch},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    LeadError, StartError,
    agents::AgentDoor,
    agreement,
    authority::issuer::Issuer,
    board::Board,
    contact, control,
    courier::Courier,
    door, drain,
    gather::QUEUE,
    lead::{Lead, Planned},
    leases::Leases,
    members,
    once::Keys,
    pulse,
    raft::{
        self, Cause, Compaction, Incoming, Join, Member, Pace, Started, Timers, Trouble,
        network::Network, propose::Proposer,
    },
    replica::Replica,
    revoked, room,
    world::World,
};

/// How long the parts of a lead may take to end.
const END: Duration = Duration::from_secs(5);

/// What a lead is, wherever it runs.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Its name.
    pub name: String,
    /// Every lead of the group, this one among them; only used on a first start.
    pub peers: BTreeMap<String, SocketAddr>,
    /// How it gets into a group that there is; only used on a first start.
    pub join: Join,
    /// How long Raft waits.
    pub timers: Timers,
    /// When the log is compacted.
    pub compaction: Compaction,
    /// Bytes of the disk that are not for changes; `None`: 256 MiB, or a twentieth of a smaller one.
    pub reserve: Option<u64>,
    /// The mesh; only used by the first command of the log.
    pub mesh: Option<Mesh>,
}

/// A lead that runs.
#[derive(Debug)]
pub struct Running {
    lead: Arc<Lead>,
    trouble: Trouble,
    /// The leads that it was started with.
    introduced: Vec<Member>,
    shutdown: CancellationToken,
    pub(crate) tasks: TaskTracker,
}

impl Running {
    /// Starts a lead; it ends with `shutdown`.
    ///
    /// # Errors
    /// When the disk does not serve, or what was said contradicts what is on it.
    pub async fn start(
        settings: Settings,
        world: World,
        shutdown: CancellationToken,
    ) -> Result<Self, StartError> {
        let (storage, reserve) = (world.storage.clone(), settings.reserve);
        room::watch::await_room(&storage, reserve).await;
        let pace = Pace::new(settings.timers);
        let network = Network::new(world.wire, pace.clone());
        let replica = Arc::new(Replica::default());
        let start = raft::Start {
            name: &settings.name,
            storage: world.storage,
            pace: pace.clone(),
            compaction: settings.compaction,
            peers: &settings.peers,
            join: &settings.join,
        };
        let Started {
            raft,
            id,
            election,
            trouble,
            checks,
            condemned,
            began_at,
        } = raft::start(start, network.clone(), replica.clone()).await?;
        let (proposer, proposing) = Proposer::new(Arc::new(raft.clone()), world.clock.clone());
        let (courier, carrying) = Courier::new(network.clone());
        let (draining, drained) = mpsc::channel(QUEUE);
        let lead = Arc::new(Lead {
            name: settings.name,
            id,
            raft,
            replica,
            proposer,
            network,
            courier,
            pace: pace.clone(),
            keys: Keys::new(world.clock.now_ms()),
            clock: world.clock,
            aside: world.aside,
            election: election.clone(),
            leases: Leases::default().into(),
            board: Board::default().into(),
            planned: watch::Sender::new(Planned::default()),
            rooms: watch::Sender::default(),
            checks,
            incoming: Incoming::default(),
            gives_way: AtomicBool::new(false),
            drain: draining,
            proposing: tokio::sync::RwLock::default(),
            in_touch: watch::Sender::new(false),
            changing: tokio::sync::Mutex::default(),
            revoked: OnceLock::new(),
            issuer: OnceLock::new(),
            began_at,
        });
        let introduced = settings.peers.iter().chain(&settings.join.leads);
        let introduced: Vec<_> = introduced
            .filter(|(name, _)| **name != lead.name)
            .map(|(name, address)| Member::new(name, *address))
            .collect();
        let tasks = TaskTracker::new();
        let measuring = pulse::run(lead.clone(), introduced.clone());
        tasks.spawn(until(shutdown.clone(), measuring));
        tasks.spawn(until(shutdown.clone(), proposing));
        tasks.spawn(until(shutdown.clone(), carrying));
        tasks.spawn(until(shutdown.clone(), pace.beat(lead.raft.clone())));
        tasks.spawn(until(shutdown.clone(), election.run()));
        tasks.spawn(until(shutdown.clone(), members::steward(lead.clone())));
        tasks.spawn(until(shutdown.clone(), members::upgrade(lead.clone())));
        let agreeing = agreement::watch(lead.clone(), condemned);
        tasks.spawn(until(shutdown.clone(), agreeing));
        tasks.spawn(until(shutdown.clone(), contact::watch(lead.clone())));
        tasks.spawn(until(shutdown.clone(), drain::run(lead.clone(), drained)));
        let looking = room::watch::run(lead.clone(), storage, reserve);
        tasks.spawn(until(shutdown.clone(), looking));
        let control = control::run(lead.clone(), settings.mesh);
        tasks.spawn(until(shutdown.clone(), control));
        Ok(Self {
            lead,
            trouble,
            introduced,
            shutdown,
            tasks,
        })
    }

    /// Everything that can be asked of it; a request carries the identity of who asks as an extension.
    pub fn routes(&self) -> Router {
        let agents = AgentDoor {
            lead: self.lead.clone(),
            tasks: self.tasks.clone(),
            shutdown: self.shutdown.clone(),
        };
        door::routes(&self.lead, agents)
    }

    /// Serves who is known as `identity` on a connection of theirs, as its door does behind the handshake, until it ends.
    pub fn serve(
        &self,
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
        identity: Identity,
    ) -> impl Future<Output = ()> + Send + 'static {
        let peer = SocketAddr::from(([0; 4], 0));
        door::speak(stream, peer, self.routes().layer(Extension(identity)))
    }

    /// What can be asked of it by who shows a token.
    pub(crate) fn token_routes(&self) -> Router {
        door::tokens::routes(&self.lead)
    }

    /// What can be asked of it by who has no certificate and joins.
    pub(crate) fn join_routes(&self) -> Router {
        door::joins::routes(&self.lead)
    }

    /// Lets it sign certificates of agents with what is in `dir`, if its doors go by what they signed.
    pub(crate) fn sign_with(&self, dir: PathBuf, doors: RevokedList) {
        let issuer = Issuer {
            dir,
            name: self.lead.name.clone(),
            doors,
        };
        self.lead.issuer.get_or_init(|| issuer);
    }

    /// Keeps `list` what the leads have revoked.
    pub(crate) fn follow_revocations(&self, list: RevokedList) {
        revoked::show(&self.lead.replica, &list);
        self.lead.revoked.get_or_init(|| list.clone());
        let following = revoked::follow(self.lead.clone(), list);
        self.tasks.spawn(until(self.shutdown.clone(), following));
    }

    /// Reads its Knowledge Base as far as it has applied the log.
    pub fn read<R>(&self, read: impl FnOnce(&KnowledgeBase) -> R) -> R {
        self.lead.replica.read(read)
    }

    /// Every lead of the group, as far as it knows.
    pub(crate) fn members(&self) -> BTreeMap<String, SocketAddr> {
        let members = self.lead.members().into_iter();
        members.map(|it| (it.name, it.address)).collect()
    }

    /// Waits until it is shut down, or cannot go on.
    ///
    /// # Errors
    /// When Raft stopped by itself, mostly because the disk failed, or the group removed this lead.
    pub async fn run(&self) -> Result<(), LeadError> {
        let fatal = tokio::select! {
            () = self.shutdown.cancelled() => None,
            cause = self.trouble.comes() => Some(cause.into()),
            fatal = watch_raft(&self.lead) => Some(match self.trouble.cause() {
                Some(cause) => cause.into(),
                None => LeadError::Stopped(fatal),
            }),
            () = contact::removed(&self.lead, &self.introduced) => Some(LeadError::Removed {
                name: self.lead.name.clone(),
                id: self.lead.id,
            }),
        };
        self.shutdown.cancel();
        end(&self.lead, &self.tasks).await;
        fatal.map_or(Ok(()), Err)
    }
}

impl From<Cause> for LeadError {
    fn from(cause: Cause) -> Self {
        match cause {
            Cause::Full(full) => Self::Full(full),
            cause @ Cause::Damaged(_) => Self::Start(cause.into()),
        }
    }
}

/// Says who leads, whenever that changes; returns why Raft stopped, when it did.
async fn watch_raft(lead: &Lead) -> String {
    let mut metrics = lead.raft.metrics();
    let mut known = None;
    loop {
        let (leader, term, state) = {
            let metrics = metrics.borrow_and_update();
            let state = metrics.running_state.clone();
            (metrics.current_leader, metrics.current_term, state)
        };
        if let Err(fatal) = state {
            return fatal.to_string();
        }
        if leader.is_some() && known != Some((leader, term)) {
            known = Some((leader, term));
            let leader = lead.leader().map(|(_, member)| member.name);
            tracing::info!(leader, term, "a leader is elected");
        }
        if metrics.changed().await.is_err() {
            return "its core ended".to_owned();
        }
    }
}

async fn until(shutdown: CancellationToken, work: impl Future<Output = ()>) {
    tokio::select! {
        () = work => {}
        () = shutdown.cancelled() => {}
    }
}

async fn end(lead: &Lead, tasks: &TaskTracker) {
    tasks.close();
    if tokio::time::timeout(END, tasks.wait()).await.is_err() {
        tracing::warn!("some tasks did not end in time");
    }
    if let Err(error) = lead.raft.shutdown().await {
        tracing::warn!(%error, "raft did not end well");
    }
    tracing::info!(name = lead.name, "lead stopped");
}

#[cfg(test)]
mod tests;
