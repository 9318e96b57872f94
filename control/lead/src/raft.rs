//! The Raft group: everything that knows openraft.
//!
//! ```text
//!  propose --> Proposer --Batch--> openraft --> LogStore (redb, fsync)
//!                                     |    `--> Network --TLS, h2--> the other leads' /raft/v1/...
//!                                     v
//!                                  Machine --> Replica (the Knowledge Base and its watchers)
//! ```
//!
//! The log, the vote and the snapshots are on disk before they are acknowledged (I6). What a [`Batch`] means is
//! control-core's; this module only orders it.

mod codec;
mod disk;
mod log;
mod machine;
pub(crate) mod network;
pub(crate) mod propose;
#[cfg(test)]
mod tests;

use std::{collections::BTreeMap, io::Cursor, net::SocketAddr, path::Path, sync::Arc};

use control_core::command::{Batch, Outcome};
use openraft::{Config, SnapshotPolicy};
use serde::{Deserialize, Serialize};

pub(crate) use self::codec::{decode, encode};
use self::{disk::Disk, log::LogStore, machine::Machine, network::Network};
use crate::replica::Replica;

openraft::declare_raft_types!(
    /// The types of our Raft group.
    pub(crate) Types:
        D = Batch,
        R = Vec<Outcome>,
        NodeId = u64,
        Node = Member,
        SnapshotData = Cursor<Vec<u8>>,
);

pub(crate) type Raft = openraft::Raft<Types>;

/// A lead as the group knows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Member {
    /// The name in its certificate.
    pub(crate) name: String,
    /// Where the other leads reach it.
    pub(crate) address: SocketAddr,
}

impl Default for Member {
    fn default() -> Self {
        Self {
            name: String::new(),
            address: SocketAddr::from(([0, 0, 0, 0], 0)),
        }
    }
}

/// How long the group waits before it thinks that something is wrong.
///
/// A lead grants the leader a lease of `election_max_ms` with every message, and stands for election when it heard
/// nothing for that and a random time between `election_min_ms` and `election_max_ms` more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timers {
    /// Between two heartbeats, and the limit of one AppendEntries, milliseconds.
    pub heartbeat_ms: u64,
    /// The shortest time beyond the lease, milliseconds.
    pub election_min_ms: u64,
    /// The lease, and the longest time beyond it, milliseconds.
    pub election_max_ms: u64,
}

impl Timers {
    /// The soonest that another leader can be elected after a majority heard the last one.
    pub(crate) fn reign_ms(&self) -> u64 {
        self.election_max_ms + self.election_min_ms
    }
}

impl Default for Timers {
    /// For leads a LAN apart: a lost leader is replaced within 1.25 to 1.5 s.
    fn default() -> Self {
        Self {
            heartbeat_ms: 250,
            election_min_ms: 500,
            election_max_ms: 750,
        }
    }
}

/// Entries between two snapshots.
const SNAPSHOT_EVERY: u64 = 5_000;
/// Entries that stay in the log behind a snapshot, for leads that were away for a moment.
const KEEP_BEHIND_SNAPSHOT: u64 = 1_000;

/// The members by id: a member's id is the rank of its name, from 1.
pub(crate) fn members(peers: &BTreeMap<String, SocketAddr>) -> BTreeMap<u64, Member> {
    peers
        .iter()
        .zip(1..)
        .map(|((name, address), id)| {
            let member = Member {
                name: name.clone(),
                address: *address,
            };
            (id, member)
        })
        .collect()
}

/// Why the Raft group did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The database cannot be opened.
    #[error("failed to open the log in {dir}")]
    Disk {
        /// The data folder.
        dir: String,
        /// Why.
        #[source]
        source: disk::DiskError,
    },
    /// The timers contradict each other.
    #[error("the raft timers do not serve")]
    Timers(#[source] Box<openraft::ConfigError>),
    /// The data is of another lead.
    #[error(
        "{dir} holds the data of lead {found:?}, not of {name:?}: start with the right --data, or with --name {found}"
    )]
    OtherLead {
        /// The data folder.
        dir: String,
        /// Whose data it is.
        found: String,
        /// Who was started.
        name: String,
    },
    /// A first start without its group.
    #[error(
        "{dir} holds no data: a first start needs --mesh FILE and one --peer NAME=IP:PORT per lead, this one ({name}) among them"
    )]
    NoGroup {
        /// The data folder.
        dir: String,
        /// Who was started.
        name: String,
    },
    /// Raft itself refused.
    #[error("raft did not start: {0}")]
    Raft(String),
}

/// What a lead brings into the group.
pub(crate) struct Start<'a> {
    pub(crate) name: &'a str,
    pub(crate) data: &'a Path,
    pub(crate) timers: Timers,
    /// Every lead of the group; only read on a first start.
    pub(crate) peers: &'a BTreeMap<String, SocketAddr>,
}

/// Starts this lead's part of the group; the smallest name forms it.
pub(crate) async fn start(
    start: Start<'_>,
    network: Network,
    replica: Arc<Replica>,
) -> Result<(Raft, u64), StartError> {
    let dir = start.data.display().to_string();
    let disk = Disk::open(start.data).map_err(|source| StartError::Disk {
        dir: dir.clone(),
        source,
    })?;
    let members = members(start.peers);
    let id = own_id(&disk, &start, &members, &dir)?;
    let config = config(start.timers).map_err(StartError::Timers)?;
    let failed = |error: &dyn std::fmt::Display| StartError::Raft(error.to_string());
    let log = LogStore::new(disk.clone());
    let machine = Machine::load(disk, replica).map_err(|error| failed(&error))?;
    let raft = Raft::new(id, Arc::new(config), network, log, machine)
        .await
        .map_err(|error| failed(&error))?;
    let fresh = !raft
        .is_initialized()
        .await
        .map_err(|error| failed(&error))?;
    if fresh && members.keys().next() == Some(&id) {
        tracing::info!(members = members.len(), "forming the group");
        raft.initialize(members)
            .await
            .map_err(|error| failed(&error))?;
    }
    Ok((raft, id))
}

/// The id on disk, or on a first start the one that the list of peers gives.
fn own_id(
    disk: &Disk,
    start: &Start<'_>,
    members: &BTreeMap<u64, Member>,
    dir: &str,
) -> Result<u64, StartError> {
    let failed = |source| StartError::Disk {
        dir: dir.to_owned(),
        source,
    };
    if let Some((id, found)) = disk.read_identity().map_err(failed)? {
        if found != start.name {
            return Err(StartError::OtherLead {
                dir: dir.to_owned(),
                found,
                name: start.name.to_owned(),
            });
        }
        return Ok(id);
    }
    let own = members.iter().find(|(_, member)| member.name == start.name);
    let (id, _) = own.ok_or_else(|| StartError::NoGroup {
        dir: dir.to_owned(),
        name: start.name.to_owned(),
    })?;
    disk.write_identity(*id, start.name).map_err(failed)?;
    Ok(*id)
}

fn config(timers: Timers) -> Result<Config, Box<openraft::ConfigError>> {
    Config {
        cluster_name: "weft".to_owned(),
        heartbeat_interval: timers.heartbeat_ms,
        election_timeout_min: timers.election_min_ms,
        election_timeout_max: timers.election_max_ms,
        install_snapshot_timeout: 10_000,
        snapshot_policy: SnapshotPolicy::LogsSinceLast(SNAPSHOT_EVERY),
        max_in_snapshot_log_to_keep: KEEP_BEHIND_SNAPSHOT,
        ..Config::default()
    }
    .validate()
    .map_err(Box::new)
}
