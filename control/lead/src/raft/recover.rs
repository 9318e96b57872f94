//! Recovery from the permanent loss of a majority: one lead's data become a group of their own.
//!
//! It is offline and cannot be undone. All that is in this lead's log is taken for committed (what was acknowledged
//! is there, if this lead was in the majority that acknowledged it), the membership becomes this lead alone, and the
//! incarnation is raised, so that agents and nodes take what it says for newer than anything before.

use std::{path::PathBuf, sync::Arc};

use openraft::{Entry, LogId, Membership, SnapshotMeta, StoredMembership};

use super::{
    Member, Types,
    audit::audit,
    disk::{Disk, DiskError, Write, put},
    encode,
    machine::Machine,
    trouble::{Cause, Damaged},
};
use crate::{
    replica::Replica,
    world::{FILE, Folder},
};

/// What a lead's data hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Survivor {
    /// The lead.
    pub name: String,
    /// Its number in the group.
    pub id: u64,
    /// The term of the last entry in its log.
    pub term: u64,
    /// The index of that entry.
    pub index: u64,
    /// The mesh's incarnation.
    pub incarnation: u64,
    /// The leads that were members.
    pub members: Vec<String>,
}

/// Why a lead's data do not serve.
#[derive(Debug, thiserror::Error)]
pub enum RecoverError {
    /// The database cannot be read or written.
    #[error("failed to open the data in {}: stop the lead first", dir.display())]
    Disk {
        /// The folder.
        dir: PathBuf,
        /// Why.
        #[source]
        source: DiskError,
    },
    /// They are not what the lead wrote.
    #[error(transparent)]
    Damaged(Damaged),
    /// There is nothing to recover.
    #[error("{} holds no data of a lead that was in a group", dir.display())]
    Nothing {
        /// The folder.
        dir: PathBuf,
    },
}

/// A stopped lead's data, read up to the end of its log.
pub struct Recovery {
    dir: PathBuf,
    disk: Disk,
    replica: Arc<Replica>,
    survivor: Survivor,
    last: LogId<u64>,
    own: Member,
}

impl std::fmt::Debug for Recovery {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.survivor.fmt(f)
    }
}

impl Recovery {
    /// Reads the data in `dir`; nothing is changed but the layout of an older version's.
    ///
    /// # Errors
    /// When the lead runs, or the data are not a lead's.
    pub fn open(dir: PathBuf) -> Result<Self, RecoverError> {
        let nothing = || RecoverError::Nothing { dir: dir.clone() };
        if !dir.join(FILE).exists() {
            return Err(nothing());
        }
        let folder = Folder(dir.clone());
        let failed = |source| match Cause::of(&source, &folder, 0) {
            Some(Cause::Damaged(damaged)) => RecoverError::Damaged(damaged),
            _ => RecoverError::Disk {
                dir: dir.clone(),
                source,
            },
        };
        let disk = Disk::open(Arc::new(folder.clone())).map_err(failed)?;
        audit(&disk).map_err(failed)?;
        let (id, name) = disk.read_identity().map_err(failed)?.ok_or_else(nothing)?;
        let replica = Arc::new(Replica::default());
        let mut machine = Machine::load(disk.clone(), replica.clone()).map_err(failed)?;
        let next = machine.applied().map_or(0, |applied| applied.index + 1);
        let entries: Vec<Entry<Types>> = disk.entries(next..).map_err(failed)?;
        for entry in entries {
            machine.apply_one(entry);
        }
        let last = machine.applied().ok_or_else(nothing)?;
        let membership = machine.membership().membership().clone();
        let own = membership.get_node(&id).cloned().ok_or_else(nothing)?;
        let incarnation = replica.read(|base| base.mesh.as_ref().map_or(0, |it| it.incarnation));
        let members = membership.nodes().map(|(_, member)| member.name.clone());
        let survivor = Survivor {
            name,
            id,
            term: last.leader_id.term,
            index: last.index,
            incarnation,
            members: members.collect(),
        };
        Ok(Self {
            dir,
            disk,
            replica,
            survivor,
            last,
            own,
        })
    }

    /// What the data hold.
    #[must_use]
    pub fn survivor(&self) -> &Survivor {
        &self.survivor
    }

    /// Makes the lead a group of its own, in a higher incarnation.
    ///
    /// # Errors
    /// When the disk fails; nothing is changed then.
    pub fn run(self) -> Result<Survivor, RecoverError> {
        self.replica.write(|base| base.reincarnate());
        let written = self
            .writes()
            .and_then(|writes| self.disk.write_once(writes));
        written.map_err(|source| RecoverError::Disk {
            dir: self.dir.clone(),
            source,
        })?;
        Ok(Survivor {
            incarnation: self.survivor.incarnation + 1,
            members: vec![self.survivor.name.clone()],
            ..self.survivor
        })
    }

    fn writes(&self) -> Result<Vec<Write>, DiskError> {
        let id = self.survivor.id;
        let nodes = std::collections::BTreeMap::from([(id, self.own.clone())]);
        let membership = Membership::new(vec![[id].into()], nodes);
        let meta = SnapshotMeta {
            last_log_id: Some(self.last),
            last_membership: StoredMembership::new(Some(self.last), membership),
            snapshot_id: format!("recovered-{}", self.last),
        };
        let data = self.replica.read(encode)?;
        Ok(vec![
            put("snapshot_meta", &meta)?,
            Write::Put {
                key: "snapshot_data",
                value: data,
            },
            put("purged", &self.last)?,
            put("committed", &Some(self.last))?,
            Write::PurgeTo(self.last.index),
        ])
    }
}
