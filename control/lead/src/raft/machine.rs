//! The state machine: applies the log to the [`Replica`] and keeps its snapshots on [`Disk`].
//!
//! A snapshot is of the last checkpoint that was passed ([`checkpoint`](super::checkpoint)), where one was since the last snapshot.
//! What was applied after the last snapshot is not written again: a restart applies the log once more. Entries leave the
//! log only once a snapshot with them is on disk ([`Stored`]).

use std::{io::Cursor, sync::Arc};

use control_core::{base::KnowledgeBase, command::Outcome};
use openraft::{
    Entry, EntryPayload, LogId, OptionalSend, RaftSnapshotBuilder, Snapshot, SnapshotMeta,
    StorageError, StorageIOError, StoredMembership, storage::RaftStateMachine,
};
use tokio::sync::{Mutex, watch};

use super::{
    Member, Types,
    checkpoint::Checks,
    decode,
    disk::{Disk, DiskError, Write, put},
    encode, transfer,
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
    shelf: Shelf,
    replica: Arc<Replica>,
    applied: Option<LogId<u64>>,
    membership: StoredMembership<u64, Member>,
    checks: Checks,
    /// The state at the last checkpoint, until a snapshot is made of it.
    passed: Option<Passed>,
}

/// The state at a checkpoint.
#[derive(Clone, Debug)]
struct Passed {
    base: KnowledgeBase,
    last: Option<LogId<u64>>,
    membership: StoredMembership<u64, Member>,
}

impl Machine {
    /// The state of the last snapshot on disk; it is not compared with others'.
    pub(crate) fn load(disk: Disk, replica: Arc<Replica>) -> std::result::Result<Self, DiskError> {
        Self::checked(disk, replica, Checks::new(u64::MAX))
    }

    /// The state of the last snapshot on disk, which is compared with others' at checkpoints.
    pub(super) fn checked(
        disk: Disk,
        replica: Arc<Replica>,
        checks: Checks,
    ) -> std::result::Result<Self, DiskError> {
        let mut machine = Self {
            shelf: Shelf::new(disk),
            replica,
            applied: None,
            membership: StoredMembership::default(),
            checks,
            passed: None,
        };
        if let Some((meta, data)) = machine.stored()? {
            machine.become_snapshot(&meta, &data)?;
            let stored = &machine.shelf.stored;
            stored.send_modify(|it| it.last = meta.last_log_id);
        }
        Ok(machine)
    }

    /// Tells of the snapshot on disk; closed with the machine.
    pub(super) fn watch_stored(&self) -> watch::Receiver<Stored> {
        self.shelf.stored.subscribe()
    }

    fn stored(&self) -> std::result::Result<Option<(Meta, Vec<u8>)>, DiskError> {
        let meta: Option<Meta> = self.shelf.disk.get("snapshot_meta")?;
        let data = self.shelf.disk.get_bytes("snapshot_data")?;
        Ok(meta.zip(data))
    }

    fn become_snapshot(&mut self, meta: &Meta, data: &[u8]) -> std::result::Result<(), DiskError> {
        let base: KnowledgeBase = decode(data)?;
        if let Some(last) = meta
            .last_log_id
            .filter(|last| self.checks.is_at(last.index))
        {
            // Another version may have encoded it.
            self.checks.note(last, &encode(&base)?);
        }
        self.passed = None;
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
        let index = entry.log_id.index;
        let outcomes = self.carry_out(entry);
        if self.checks.is_at(index) {
            self.passed = Some(self.now());
        }
        outcomes
    }

    fn now(&self) -> Passed {
        Passed {
            base: self.replica.read(Clone::clone),
            last: self.applied,
            membership: self.membership.clone(),
        }
    }

    fn carry_out(&mut self, entry: Entry<Types>) -> Vec<Outcome> {
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

/// The state machine at its last checkpoint, or as it was when a snapshot was asked for.
#[derive(Debug)]
pub(crate) struct View {
    shelf: Shelf,
    base: KnowledgeBase,
    meta: Meta,
    checks: Checks,
}

/// Where the snapshot is.
#[derive(Clone, Debug)]
struct Shelf {
    disk: Disk,
    stored: watch::Sender<Stored>,
    /// Held by whoever puts one there.
    turn: Arc<Mutex<()>>,
}

impl Shelf {
    fn new(disk: Disk) -> Self {
        Self {
            disk,
            stored: watch::Sender::default(),
            turn: Arc::default(),
        }
    }

    /// Puts a snapshot there, unless a later one is: while one was made here another lead's may have come, and the log begins
    /// behind that one.
    async fn put(&self, meta: &Meta, data: Vec<u8>) -> std::result::Result<(), DiskError> {
        let _turn = self.turn.lock().await;
        if self.stored.borrow().last > meta.last_log_id {
            return Ok(());
        }
        let data = Write::Put {
            key: "snapshot_data",
            value: data,
        };
        let writes = vec![put("snapshot_meta", meta)?, data];
        self.disk.write(writes).await?;
        self.stored.send_modify(|it| it.last = meta.last_log_id);
        Ok(())
    }
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
        if let Some(last) = self.meta.last_log_id {
            self.checks.note(last, &data);
        }
        let meta = Meta {
            snapshot_id: transfer::id(&self.meta.snapshot_id, &data),
            ..self.meta.clone()
        };
        let put = self.shelf.put(&meta, data.clone());
        put.await.map_err(failed)?;
        Ok(snapshot(meta, data))
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
        let passed = self.passed.take();
        let Passed {
            base,
            last,
            membership,
        } = passed.unwrap_or_else(|| self.now());
        View {
            shelf: self.shelf.clone(),
            checks: self.checks.clone(),
            base,
            meta: Meta {
                last_log_id: last,
                last_membership: membership,
                snapshot_id: last.map_or_else(|| "empty".to_owned(), |id| id.to_string()),
            },
        }
    }

    async fn begin_receiving_snapshot(&mut self) -> Result<Box<Cursor<Vec<u8>>>> {
        self.shelf.stored.send_modify(|it| it.is_incoming = true);
        Ok(Box::default())
    }

    async fn install_snapshot(&mut self, meta: &Meta, data: Box<Cursor<Vec<u8>>>) -> Result<()> {
        let data = data.into_inner();
        let installed = match self.become_snapshot(meta, &data) {
            Ok(()) => self.shelf.put(meta, data).await,
            error => error,
        };
        installed.map_err(|error| {
            self.shelf.stored.send_modify(|it| it.has_failed = true);
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
