//! A lead: one member of the Raft group that holds the Knowledge Base, its doors and its control loop.
//!
//! ```text
//!  user ---- /v1/... ------.                    .--> raft (log, vote, snapshots on disk)
//!  agent --- LeadDoor ------> door --> Lead ----+--> Replica (this lead's Knowledge Base)
//!  lead ---- /raft/v1/... -'                    '--> the leader, when this lead is not it
//!
//!  control (on the leader): Replica --plan--> proposals;  leases --> Lost
//! ```
//!
//! What a change means is control-core's; this crate gets it into the log and its consequences out.
#![forbid(unsafe_code)]

mod agents;
mod api;
pub mod authority;
mod board;
mod control;
pub mod dial;
mod door;
mod lead;
mod leases;
mod problem;
mod raft;
mod replica;
mod tables;

use std::{collections::BTreeMap, net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use control_core::base::Mesh;
use netmanager_api::identity::{Credentials, IdentityError, Role};
use tokio::{net::TcpListener, sync::watch};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

pub use crate::raft::{StartError, Timers};
use crate::{
    agents::AgentDoor,
    authority::{AuthorityError, MeshFile},
    board::Board,
    door::Door,
    lead::{Lead, Planned},
    leases::Leases,
    raft::{Started, network::Network, propose::Proposer},
    replica::Replica,
};

/// How long the parts of a lead may take to end.
const END: Duration = Duration::from_secs(5);

/// How a lead is started.
#[derive(Clone, Debug)]
pub struct Options {
    /// Its name; must be the one in its certificate.
    pub name: String,
    /// Where its database is.
    pub data: PathBuf,
    /// Where its certificate is.
    pub credentials: PathBuf,
    /// Where its door is.
    pub listen: SocketAddr,
    /// Where the others find its door; as `listen` unless it is said.
    pub advertise: Option<SocketAddr>,
    /// The mesh file; only used by the first command of the log.
    pub mesh: Option<PathBuf>,
    /// Every lead of the group, this one among them; only used on a first start.
    pub peers: BTreeMap<String, SocketAddr>,
    /// How long a cluster may be silent; only used by the first command of the log.
    pub lease: Duration,
    /// How long Raft waits.
    pub timers: Timers,
}

/// Why a lead did not start.
#[derive(Debug, thiserror::Error)]
pub enum LeadError {
    /// The credentials do not serve.
    #[error("the credentials in {} do not serve", dir.display())]
    Credentials {
        /// The folder.
        dir: PathBuf,
        /// Why.
        #[source]
        source: IdentityError,
    },
    /// The certificate is of somebody else.
    #[error(
        "the certificate is {found}, not lead {name:?}: issue one with weft cert --role lead --name {name}"
    )]
    OtherRole {
        /// Whose certificate it is.
        found: String,
        /// Who was started.
        name: String,
    },
    /// The mesh file does not serve.
    #[error(transparent)]
    Mesh(#[from] AuthorityError),
    /// The mesh file is of another mesh than the certificate.
    #[error("the mesh file is of mesh {file:?}, the certificate of {certificate:?}")]
    OtherMesh {
        /// In the file.
        file: String,
        /// In the certificate.
        certificate: String,
    },
    /// The address of this lead is not the one that the others are told.
    #[error(
        "--peer {name}={listed} is not --advertise {advertised}: the others would not find this lead"
    )]
    OtherAddress {
        /// This lead.
        name: String,
        /// In the list of peers.
        listed: SocketAddr,
        /// Where it says that it is.
        advertised: SocketAddr,
    },
    /// The door cannot be opened.
    #[error("failed to listen on {address}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Raft did not start.
    #[error(transparent)]
    Start(#[from] StartError),
    /// Raft cannot go on, mostly because the disk failed.
    #[error("raft stopped: {0}")]
    Stopped(String),
}

/// Runs a lead until `shutdown`.
///
/// # Errors
/// When something it needs is missing or wrong (nothing runs then), or when the disk fails later.
pub async fn run(options: Options, shutdown: CancellationToken) -> Result<(), LeadError> {
    let listener = TcpListener::bind(options.listen)
        .await
        .map_err(|source| LeadError::Listen {
            address: options.listen,
            source,
        })?;
    serve(options, listener, shutdown).await
}

/// Runs a lead on a socket that listens already.
///
/// # Errors
/// As [`run`].
pub async fn serve(
    options: Options,
    listener: TcpListener,
    shutdown: CancellationToken,
) -> Result<(), LeadError> {
    let bad_credentials = |source| LeadError::Credentials {
        dir: options.credentials.clone(),
        source,
    };
    let credentials = Credentials::load(&options.credentials).map_err(bad_credentials)?;
    let mesh = check(&options, &credentials)?;
    let tls = door::tls(&credentials).map_err(bad_credentials)?;
    let mesh_name = credentials.identity.mesh.clone();
    let network = Network::new(Arc::new(credentials));
    let replica = Arc::new(Replica::default());
    let start = raft::Start {
        name: &options.name,
        data: &options.data,
        timers: options.timers,
        peers: &options.peers,
    };
    let Started { raft, id, election } =
        raft::start(start, network.clone(), replica.clone()).await?;
    let (proposer, proposing) = Proposer::new(Arc::new(raft.clone()));
    let lead = Arc::new(Lead {
        name: options.name.clone(),
        id,
        raft,
        replica,
        proposer,
        network,
        timers: options.timers,
        election: election.clone(),
        leases: Leases::default().into(),
        board: Board::default().into(),
        planned: watch::Sender::new(Planned::default()),
    });
    tracing::info!(name = options.name, listen = %options.listen, "lead started");
    let tasks = TaskTracker::new();
    let agents = AgentDoor {
        lead: lead.clone(),
        tasks: tasks.clone(),
        shutdown: shutdown.clone(),
    };
    let door = Door {
        listener,
        tls,
        mesh: mesh_name,
        routes: door::routes(&lead, agents),
    };
    tasks.spawn(until(shutdown.clone(), proposing));
    tasks.spawn(until(shutdown.clone(), election.run()));
    tasks.spawn(until(shutdown.clone(), control::run(lead.clone(), mesh)));
    tasks.spawn(door.serve(shutdown.clone()));
    let fatal = tokio::select! {
        () = shutdown.cancelled() => None,
        fatal = watch_raft(&lead) => Some(fatal),
    };
    shutdown.cancel();
    end(&lead, tasks).await;
    fatal.map_or(Ok(()), |fatal| Err(LeadError::Stopped(fatal)))
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

async fn end(lead: &Lead, tasks: TaskTracker) {
    tasks.close();
    if tokio::time::timeout(END, tasks.wait()).await.is_err() {
        tracing::warn!("some tasks did not end in time");
    }
    if let Err(error) = lead.raft.shutdown().await {
        tracing::warn!(%error, "raft did not end well");
    }
    tracing::info!(name = lead.name, "lead stopped");
}

/// Checks what was said against each other; the mesh of a first start.
fn check(options: &Options, credentials: &Credentials) -> Result<Option<Mesh>, LeadError> {
    let identity = &credentials.identity;
    let is_it = matches!(&identity.role, Role::Lead { name } if *name == options.name);
    if !is_it {
        return Err(LeadError::OtherRole {
            found: identity.to_string(),
            name: options.name.clone(),
        });
    }
    let advertised = options.advertise.unwrap_or(options.listen);
    if let Some(listed) = options
        .peers
        .get(&options.name)
        .filter(|it| **it != advertised)
    {
        return Err(LeadError::OtherAddress {
            name: options.name.clone(),
            listed: *listed,
            advertised,
        });
    }
    let Some(path) = &options.mesh else {
        return Ok(None);
    };
    let file = MeshFile::load(path)?;
    if file.name != identity.mesh {
        return Err(LeadError::OtherMesh {
            file: file.name,
            certificate: identity.mesh.clone(),
        });
    }
    Ok(Some(Mesh {
        name: file.name,
        prefix6: file.prefix6,
        prefix4: file.prefix4,
        seed: file.seed,
        incarnation: 0,
        lease_ms: u64::try_from(options.lease.as_millis()).unwrap_or(u64::MAX),
    }))
}
