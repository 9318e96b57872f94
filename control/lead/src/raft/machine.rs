//! The state machine: applies the log to the [`Replica`] and keeps its snapshots on [`Disk`].
//!
//! What was applied after the last snapshot is not written again: a restart applies the log once more. Entries leave the
//! log only once a snapshot with them is on disk ([`Stored`]).

use std::{io::Cursor, sync::Arc};

use control_core::{base::KnowledgeBase, command::Outcome};
use openraft::{
    Entry, EntryPayload, LogId, OptionalSend, RaftSnapshotBuilder, Snapshot, SnapshotMeta,
    StorageError, StorageIOError, StoredMembership, storage::RaftStateMachine,
};
use tokio::sync::watch;

use super::{
    Member, Types, decode,
    disk::{Disk, DiskError, Write, put},
    encode,
};
use crate::replica::Replica;

/// The snapshot on disk, as far as others must know it.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Stored {
    /// The last entry in it.
    pub(super) last: Option<LogId<u64>>,
    /// Whether another lead's was ever on its way here.
    pub(super) is_incoming: bool,
    /// Whether one could not be installed.
    pub(super) has_failed: bool,
}

type Result<T> = std::result::Result<T, StorageError<u64>>;
type Meta = SnapshotMeta<u64, Member>;

/// Applies entries, one after the other.
#[derive(Clone, Debug)]
pub(crate) struct Machine {
    disk: Disk,
    replica: Arc<Replica>,
    applied: Option<LogId<u64>>,
    membership: StoredMembership<u64, Member>,
    stored: watch::Sender<Stored>,
}

impl Machine {
    /// The state of the last snapshot on disk.
    pub(crate) fn load(disk: Disk, replica: Arc<Replica>) -> std::result::Result<Self, DiskError> {
        let mut machine = Self {
            disk,
            replica,
            applied: None,
            membership: StoredMembership::default(),
            stored: watch::Sender::default(),
        };
        if let Some((meta, data)) = machine.stored()? {
            machine.become_snapshot(&meta, &data)?;
            machine.stored.send_modify(|it| it.last = meta.last_log_id);
        }
        Ok(machine)
    }

    /// Tells of the snapshot on disk; closed with the machine.
    pub(super) fn watch_stored(&self) -> watch::Receiver<Stored> {
        self.stored.subscribe()
    }

    fn stored(&self) -> std::result::Result<Option<(Meta, Vec<u8>)>, DiskError> {
        let meta: Option<Meta> = self.disk.get("snapshot_meta")?;
        let data = self.disk.get_bytes("snapshot_data")?;
        Ok(meta.zip(data))
    }

    fn become_snapshot(&mut self, meta: &Meta, data: &[u8]) -> std::result::Result<(), DiskError> {
        let base: KnowledgeBase = decode(data)?;
        self.applied = meta.last_log_id;
        self.membership = meta.last_membership.clone();
        self.replica.write(|current| *current = base);
        self.replica
            .advance(meta.last_log_id.map_or(0, |id| id.index));
        Ok(())
    }

    /// The last entry that is applied.
    pub(super) fn applied(&self) -> Option<LogId<u64>> {
        self.applied
    }

    /// Who the members were then.
    pub(super) fn membership(&self) -> &StoredMembership<u64, Member> {
        &self.membership
    }

    pub(super) fn apply_one(&mut self, entry: Entry<Types>) -> Vec<Outcome> {
        self.applied = Some(entry.log_id);
        match entry.payload {
            EntryPayload::Blank => Vec::new(),
            EntryPayload::Normal(batch) => self
                .replica
                .write(|base| base.apply(entry.log_id.index, &batch)),
            EntryPayload::Membership(membership) => {
                self.membership = StoredMembership::new(Some(entry.log_id), membership);
                Vec::new()
            }
        }
    }
}

/// The state machine as it was when a snapshot was asked for.
#[derive(Debug)]
pub(crate) struct View {
    disk: Disk,
    base: KnowledgeBase,
    meta: Meta,
    stored: watch::Sender<Stored>,
}

async fn store(
    disk: &Disk,
    meta: &Meta,
    data: Vec<u8>,
    stored: &watch::Sender<Stored>,
) -> std::result::Result<(), DiskError> {
    let data = Write::Put {
        key: "snapshot_data",
        value: data,
    };
    disk.write(vec![put("snapshot_meta", meta)?, data]).await?;
    stored.send_modify(|it| it.last = it.last.max(meta.last_log_id));
    Ok(())
}

fn snapshot(meta: Meta, data: Vec<u8>) -> Snapshot<Types> {
    Snapshot {
        meta,
        snapshot: Box::new(Cursor::new(data)),
    }
}

impl RaftSnapshotBuilder<Types> for View {
    async fn build_snapshot(&mut self) -> Result<Snapshot<Types>> {
        let failed =
            |error: DiskError| StorageIOError::write_snapshot(Some(self.meta.signature()), &error);
        let data = encode(&self.base).map_err(|error| failed(error.into()))?;
        store(&self.disk, &self.meta, data.clone(), &self.stored)
            .await
            .map_err(failed)?;
        Ok(snapshot(self.meta.clone(), data))
    }
}

impl RaftStateMachine<Types> for Machine {
    type SnapshotBuilder = View;

    async fn applied_state(
        &mut self,
    ) -> Result<(Option<LogId<u64>>, StoredMembership<u64, Member>)> {
        Ok((self.applied, self.membership.clone()))
    }

    async fn apply<I>(&mut self, entries: I) -> Result<Vec<Vec<Outcome>>>
    where
        I: IntoIterator<Item = Entry<Types>> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let outcomes = entries
            .into_iter()
            .map(|entry| self.apply_one(entry))
            .collect();
        self.replica.advance(self.applied.map_or(0, |id| id.index));
        Ok(outcomes)
    }

    async fn get_snapshot_builder(&mut self) -> View {
        let last = self.applied;
        View {
            disk: self.disk.clone(),
            stored: self.stored.clone(),
            base: self.replica.read(Clone::clone),
            meta: Meta {
                last_log_id: last,
                last_membership: self.membership.clone(),
                snapshot_id: last.map_or_else(|| "empty".to_owned(), |id| id.to_string()),
            },
        }
    }

    async fn begin_receiving_snapshot(&mut self) -> Result<Box<Cursor<Vec<u8>>>> {
        self.stored.send_modify(|it| it.is_incoming = true);
        Ok(Box::default())
    }

    async fn install_snapshot(&mut self, meta: &Meta, data: Box<Cursor<Vec<u8>>>) -> Result<()> {
        let data = data.into_inner();
        let installed = match self.become_snapshot(meta, &data) {
            Ok(()) => store(&self.disk, meta, data, &self.stored).await,
            error => error,
        };
        installed.map_err(|error| {
            self.stored.send_modify(|it| it.has_failed = true);
            StorageIOError::write_snapshot(Some(meta.signature()), &error).into()
        })
    }

    async fn get_current_snapshot(&mut self) -> Result<Option<Snapshot<Types>>> {
        let stored = self
            .stored()
            .map_err(|error| StorageIOError::read_snapshot(None, &error))?;
        Ok(stored.map(|(meta, data)| snapshot(meta, data)))
    }
}
