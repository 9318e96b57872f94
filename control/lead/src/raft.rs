//! The Raft group: everything that knows openraft.
//!
//! ```text
//!  propose --> Proposer --Batch--> openraft --> LogStore (redb, fsync)
//!                                     |    `--> Link --> Network --TLS, h2--> the other leads' /raft/v1/...
//!                                     v
//!                                  Machine --> Replica (the Knowledge Base and its watchers)
//! ```
//!
//! The log, the vote and the snapshots are on disk before they are acknowledged (I6). What a batch of commands means is
//! control-core's; this module only orders it.

mod audit;
pub(crate) mod checkpoint;
mod codec;
mod disk;
pub(crate) mod election;
mod handover;
mod join;
mod layout;
mod link;
mod log;
mod machine;
pub(crate) mod members;
pub(crate) mod network;
mod pace;
mod promise;
pub(crate) mod propose;
mod recent;
mod recover;
mod seal;
mod shared;
#[cfg(test)]
mod tests;
mod timers;
mod transfer;
mod trouble;
mod voter;
mod ways;

use std::{collections::BTreeMap, io::Cursor, net::SocketAddr, sync::Arc};

use control_core::command::Outcome;
use openraft::{
    Config, Entry, EntryPayload, LogId, Membership, SnapshotMeta, SnapshotPolicy,
    storage::RaftLogStorage,
};
use serde::{Deserialize, Serialize};

pub(crate) use self::codec::{decode, encode, size};
pub use self::disk::DiskError;
pub(crate) use self::disk::header::examine;
pub(crate) use self::handover::{HandOver, PATH as STAND, Stand};
pub use self::join::Join;
pub(crate) use self::join::PATH as SEAT;
pub(crate) use self::link::APPEND;
pub(crate) use self::pace::{PULSE, Pace, Paced, Pulse};
pub(crate) use self::promise::Grants;
pub use self::recover::{RecoverError, Recovery, Survivor};
pub use self::timers::Timers;
pub(crate) use self::transfer::Incoming;
pub(crate) use self::trouble::Condemned;
pub(crate) use self::trouble::{Cause, Trouble};
pub use self::trouble::{Damaged, Flaw, Full};
use self::{
    audit::audit, checkpoint::Checks, disk::Disk, election::Election, log::LogStore,
    machine::Machine, network::Network, shared::SharedBatch, voter::Voter,
};
use crate::{replica::Replica, world::Storage};

openraft::declare_raft_types!(
    /// The types of our Raft group.
    pub(crate) Types:
        D = SharedBatch,
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
    /// The member that leaves once this one is a voter.
    #[serde(default)]
    pub(crate) replaces: Option<u64>,
}

impl Member {
    /// A lead that takes nobody's place.
    pub(crate) fn new(name: &str, address: SocketAddr) -> Self {
        Self {
            name: name.to_owned(),
            address,
            replaces: None,
        }
    }
}

impl Default for Member {
    fn default() -> Self {
        Self::new("", SocketAddr::from(([0, 0, 0, 0], 0)))
    }
}

/// When the log is compacted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Compaction {
    /// Entries between two snapshots.
    pub every: u64,
    /// Entries that stay in the log behind a snapshot, for leads that were away for a moment.
    pub keep: u64,
}

impl Default for Compaction {
    fn default() -> Self {
        Self {
            every: 5_000,
            keep: 1_000,
        }
    }
}

/// A part of a snapshot, bytes; with its encoding it gets there within the limit where entries do, too ([`link`]).
const CHUNK: u64 = 96 << 10;

/// The members by id: a member's id is the rank of its name, from 1.
pub(crate) fn members(peers: &BTreeMap<String, SocketAddr>) -> BTreeMap<u64, Member> {
    peers
        .iter()
        .zip(1..)
        .map(|((name, address), id)| (id, Member::new(name, *address)))
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
        source: DiskError,
    },
    /// One lost heartbeat must not cost an election.
    #[error(
        "--election is {lease_ms} ms, less than three times --heartbeat ({heartbeat_ms} ms): raise it to {} ms or more",
        3 * heartbeat_ms
    )]
    Timers {
        /// `--heartbeat`.
        heartbeat_ms: u64,
        /// `--election`.
        lease_ms: u64,
    },
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
        "{dir} holds no data: a lead that joins needs --join NAME=IP:PORT of a lead of the group, the first leads --mesh FILE and one --peer NAME=IP:PORT per lead, this one ({name}) among them"
    )]
    NoGroup {
        /// The data folder.
        dir: String,
        /// Who was started.
        name: String,
    },
    /// The group waits for this lead somewhere else.
    #[error(
        "the group knows lead {name} at {known}, not at {advertised}: start it with --advertise {known}, or weft lead remove {name} and add it again"
    )]
    OtherSeat {
        /// This lead.
        name: String,
        /// Where the group looks for it.
        known: SocketAddr,
        /// Where it says that it is.
        advertised: SocketAddr,
    },
    /// There was no room left for what it had to write.
    #[error(transparent)]
    Full(Full),
    /// What is on its disk is not what it wrote.
    #[error(transparent)]
    Damaged(Damaged),
    /// Raft itself refused.
    #[error("raft did not start: {0}")]
    Raft(String),
}

impl From<Cause> for StartError {
    fn from(cause: Cause) -> Self {
        match cause {
            Cause::Full(full) => Self::Full(full),
            Cause::Damaged(damaged) => Self::Damaged(damaged),
        }
    }
}

/// What a lead brings into the group.
pub(crate) struct Start<'a> {
    pub(crate) name: &'a str,
    pub(crate) storage: Arc<dyn Storage>,
    pub(crate) pace: Pace,
    pub(crate) compaction: Compaction,
    /// Every lead of the group; only read on a first start.
    pub(crate) peers: &'a BTreeMap<String, SocketAddr>,
    /// How it gets into a group that there is; only used on a first start.
    pub(crate) join: &'a Join,
}

/// A lead's part in the group.
pub(crate) struct Started {
    pub(crate) raft: Raft,
    pub(crate) id: u64,
    pub(crate) election: Election,
    /// Whether its disk is full, or damaged.
    pub(crate) trouble: Trouble,
    /// What its state is at entries that every lead comes by.
    pub(crate) checks: Checks,
    /// Where it is written that this is not what the group agreed on.
    pub(crate) condemned: Condemned,
    /// The end of the log.
    pub(crate) began_at: Option<LogId<u64>>,
}

/// Starts this lead's part of the group; the smallest name forms it.
pub(crate) async fn start(
    start: Start<'_>,
    network: Network,
    replica: Arc<Replica>,
) -> Result<Started, StartError> {
    let dir = start.storage.to_string();
    let unusable = |source| match Cause::of(&source, &*start.storage, 0) {
        Some(cause) => cause.into(),
        None => StartError::Disk {
            dir: dir.clone(),
            source,
        },
    };
    let disk = Disk::open(start.storage.clone()).map_err(unusable)?;
    audit(&disk).map_err(unusable)?;
    let trouble = disk.trouble();
    let members = members(start.peers);
    let id = match own_id(&disk, &start, &members, &dir) {
        Err(StartError::NoGroup { .. }) if start.join.is_wanted() => {
            let id = start.join.seat(start.name, &network).await?;
            let written = disk.write_identity(id, start.name);
            written.map_err(|source| StartError::Disk {
                dir: dir.clone(),
                source,
            })?;
            id
        }
        known => known?,
    };
    let config = config(start.pace.base(), start.compaction)?;
    let failed = |error: &dyn std::fmt::Display| match trouble.cause() {
        Some(cause) => cause.into(),
        None => StartError::Raft(error.to_string()),
    };
    let checks = Checks::new(start.compaction.every);
    let machine = Machine::checked(disk.clone(), replica, checks.clone());
    let machine = machine.map_err(|error| failed(&error))?;
    let condemned = Condemned::new(disk.clone());
    let mut log = LogStore::new(disk.clone(), &machine);
    let state = log.get_log_state().await;
    let began_at = state.map_err(|error| failed(&error))?.last_log_id;
    let raft = Raft::new(id, Arc::new(config), network.clone(), log.clone(), machine)
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
    let least = start.pace.base().lease();
    let voter = Voter::new(raft.clone(), disk, least, fresh);
    let voter = voter.map_err(|source| StartError::Disk { dir, source })?;
    let election = Election {
        raft: raft.clone(),
        network,
        log,
        voter,
        pace: start.pace,
        id,
    };
    Ok(Started {
        raft,
        id,
        election,
        trouble,
        checks,
        condemned,
        began_at,
    })
}

/// The members, as far as damaged data say.
pub(crate) fn members_in(storage: Arc<dyn Storage>) -> BTreeMap<String, SocketAddr> {
    let Ok(disk) = Disk::open(storage) else {
        return BTreeMap::new();
    };
    let meta: Option<SnapshotMeta<u64, Member>> = disk.get("snapshot_meta").ok().flatten();
    let mut last = meta.map(|meta| meta.last_membership.membership().clone());
    // Up to where it is damaged.
    let _ = disk.each_entry(.., |_, entry| {
        let entry: Entry<Types> = decode(entry)?;
        if let EntryPayload::Membership(membership) = entry.payload {
            last = Some(membership);
        }
        Ok(true)
    });
    let nodes = last.iter().flat_map(Membership::nodes);
    nodes.map(|(_, it)| (it.name.clone(), it.address)).collect()
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

fn config(timers: Timers, compaction: Compaction) -> Result<Config, StartError> {
    let Timers {
        heartbeat_ms,
        lease_ms,
    } = timers;
    if heartbeat_ms == 0 || lease_ms < 3 * heartbeat_ms {
        return Err(StartError::Timers {
            heartbeat_ms,
            lease_ms,
        });
    }
    let longest = timers.longest_heartbeat().as_millis();
    let config = Config {
        cluster_name: "weft".to_owned(),
        // Its own heartbeats are off, so that this is only the most that a message may take; less is up to the link.
        heartbeat_interval: u64::try_from(longest).unwrap_or(u64::MAX),
        enable_heartbeat: false,
        // openraft's vote lease is its longest timeout, the least that a voter waits; its own elections are off.
        election_timeout_min: lease_ms - 1,
        election_timeout_max: lease_ms,
        enable_elect: false,
        snapshot_max_chunk_size: CHUNK,
        install_snapshot_timeout: 10_000,
        snapshot_policy: SnapshotPolicy::LogsSinceLast(compaction.every),
        max_in_snapshot_log_to_keep: compaction.keep,
        ..Config::default()
    };
    // Not validated: it wants timeouts above the heartbeat, neither of which it times here.
    Ok(config)
}
