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
mod agreement;
mod api;
pub mod authority;
mod board;
mod claims;
mod contact;
mod control;
mod courier;
mod descriptors;
pub mod dial;
mod door;
mod drain;
mod gather;
mod joins;
mod lead;
mod leases;
mod members;
mod once;
mod problem;
mod pulse;
mod raft;
mod replacement;
mod replica;
mod revoked;
mod room;
mod running;
mod tables;
mod world;

use std::{
    collections::BTreeMap, net::SocketAddr, num::NonZeroU32, path::PathBuf, sync::Arc,
    time::Duration,
};

use control_core::base::Mesh;
use netmanager_api::identity::{Credentials, IdentityError, Role};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::{
    authority::{AuthorityError, MeshFile},
    dial::Connections,
    door::{Door, joins::Joins, limits::Limits},
    world::Folder,
};
pub use crate::{
    door::limits::REQUESTS,
    raft::{
        Compaction, Damaged, DiskError, Flaw, Full, Join, RecoverError, Recovery, StartError,
        Survivor, Timers,
    },
    replacement::Replacement,
    room::Space,
    running::{Running, Settings},
    world::{Aside, Boxed, Clock, Storage, Wire, Work, World},
};

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
    /// Where it takes tokens for the control API; `None`: nowhere.
    pub tokens: Option<SocketAddr>,
    /// The mesh file; only used by the first command of the log.
    pub mesh: Option<PathBuf>,
    /// Every lead of the group, this one among them; only used on the first start of a new group.
    pub peers: BTreeMap<String, SocketAddr>,
    /// Leads of a group that this one joins; only used on a first start.
    pub join: BTreeMap<String, SocketAddr>,
    /// How long a cluster may be silent; only used by the first command of the log.
    pub lease: Duration,
    /// How long Raft waits.
    pub timers: Timers,
    /// Bytes of its disk that are not for changes; `None`: 256 MiB, or a twentieth of a smaller one.
    pub reserve: Option<u64>,
    /// How many requests a user, a token or an agent may make in a second, here.
    pub requests_per_second: NonZeroU32,
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
    /// The process may not open enough files.
    #[error(
        "this process may open {limit} files, and a lead needs {needed}, {wanted} to hold every connection: raise the hard limit (LimitNOFILE= of systemd, ulimit -Hn)"
    )]
    Descriptors {
        /// What it may open.
        limit: u64,
        /// The least that serves.
        needed: u64,
        /// What all connections take.
        wanted: u64,
    },
    /// Raft did not start.
    #[error(transparent)]
    Start(#[from] StartError),
    /// Raft cannot go on, mostly because the disk failed.
    #[error("raft stopped: {0}")]
    Stopped(String),
    /// There was no room left for what it had to write.
    #[error(transparent)]
    Full(Full),
    /// Its data are not what it wrote.
    #[error("{damaged}; {replacement}")]
    Damaged {
        /// What is wrong with them.
        damaged: Damaged,
        /// What is to be done.
        replacement: Box<Replacement>,
    },
    /// The others removed or replaced this lead.
    #[error(
        "lead {name} (member {id}) was removed from the group: its data may be deleted; to bring it back, delete them and run weft lead add"
    )]
    Removed {
        /// Its name.
        name: String,
        /// Its id.
        id: u64,
    },
}

impl LeadError {
    /// Says what is to be done where the lead has no use for its data any more.
    fn with(self, replacement: impl FnOnce() -> Replacement) -> Self {
        match self {
            Self::Start(StartError::Damaged(damaged)) => Self::Damaged {
                damaged,
                replacement: Box::new(replacement()),
            },
            other => other,
        }
    }

    /// Whether starting it again can change nothing: another member must take its place.
    #[must_use]
    pub fn is_final(&self) -> bool {
        matches!(self, Self::Damaged { .. })
    }
}

/// Runs a lead until `shutdown`.
///
/// # Errors
/// When something it needs is missing or wrong (nothing runs then), or when the disk fails later.
pub async fn run(options: Options, shutdown: CancellationToken) -> Result<(), LeadError> {
    let door = listen(options.listen).await?;
    let tokens = match options.tokens {
        Some(address) => Some(listen(address).await?),
        None => None,
    };
    serve(options, Listeners { door, tokens }, shutdown).await
}

async fn listen(address: SocketAddr) -> Result<TcpListener, LeadError> {
    let listener = TcpListener::bind(address).await;
    listener.map_err(|source| LeadError::Listen { address, source })
}

/// Sockets that listen already.
#[derive(Debug)]
pub struct Listeners {
    /// For users, agents and leads, by their certificates.
    pub door: TcpListener,
    /// For users by tokens.
    pub tokens: Option<TcpListener>,
}

/// Runs a lead on sockets that listen already.
///
/// # Errors
/// As [`run`].
pub async fn serve(
    options: Options,
    listeners: Listeners,
    shutdown: CancellationToken,
) -> Result<(), LeadError> {
    let connections = descriptors::raise()?;
    let bad_credentials = |source| LeadError::Credentials {
        dir: options.credentials.clone(),
        source,
    };
    let said = options.clone();
    let credentials = Credentials::load(&options.credentials).map_err(bad_credentials)?;
    let mesh = check(&options, &credentials)?;
    let tls = door::tls(&credentials).map_err(bad_credentials)?;
    let tls_for_tokens = door::tls_for_tokens(&credentials).map_err(bad_credentials)?;
    let tls_for_joins = door::joins::tls(&credentials).map_err(bad_credentials)?;
    let (revoked, following) = (credentials.revoked(), credentials.follow());
    let storage = Arc::new(Folder(options.data));
    let world = World {
        storage: storage.clone(),
        wire: Arc::new(Connections::new(Arc::new(credentials))),
        clock: Clock::default(),
        aside: Aside::default(),
    };
    let settings = Settings {
        name: options.name.clone(),
        peers: options.peers,
        join: Join {
            leads: options.join,
            advertised: Some(options.advertise.unwrap_or(options.listen)),
        },
        timers: options.timers,
        compaction: Compaction::default(),
        reserve: options.reserve,
        mesh,
    };
    let running = tokio::select! {
        running = Running::start(settings, world, shutdown.clone()) => running.map_err(|error| {
            LeadError::from(error).with(|| Replacement::new(&said, raft::members_in(storage)))
        })?,
        () = shutdown.cancelled() => return Ok(()),
    };
    tracing::info!(name = options.name, listen = %options.listen, "lead started");
    running.follow_revocations(revoked.clone());
    running.sign_with(options.credentials, revoked.clone());
    let end = shutdown.clone();
    let following = async move { end.run_until_cancelled(following).await };
    running.tasks.spawn(following);
    let limits = Arc::new(Limits::new(options.requests_per_second));
    let door = Door {
        listener: listeners.door,
        tls,
        revoked: Some(revoked),
        routes: running.routes(),
        joins: Some(Joins::new(tls_for_joins, running.join_routes())),
        connections,
        limits: limits.clone(),
    };
    running.tasks.spawn(door.serve(shutdown.clone()));
    if let Some(listener) = listeners.tokens {
        let door = Door {
            listener,
            tls: tls_for_tokens,
            revoked: None,
            routes: running.token_routes(),
            joins: None,
            connections: door::CONNECTIONS_BY_TOKEN,
            limits,
        };
        running.tasks.spawn(door.serve(shutdown));
    }
    let ended = running.run().await;
    ended.map_err(|error| error.with(|| Replacement::new(&said, running.members())))
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
