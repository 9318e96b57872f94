//! The log and the vote, as openraft wants them, on [`Disk`].

use std::{
    fmt::Debug,
    io,
    ops::RangeBounds,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use openraft::{
    Entry, LogId, LogState, OptionalSend, RaftLogReader, StorageError, StorageIOError, Vote,
    storage::{LogFlushed, RaftLogStorage},
};
use tokio::sync::watch;

use super::{
    Types,
    disk::{Disk, DiskError, Write, put},
    encode,
    machine::{Machine, Stored},
    recent::{Recent, Room},
};

/// How many bytes of entries go to another lead in one message, but for an entry that is larger: a few milliseconds of a
/// LAN, and of one processor that reads them.
const MESSAGE: usize = 1 << 20;

type Result<T> = std::result::Result<T, StorageError<u64>>;

/// The log and the vote.
#[derive(Clone, Debug)]
pub(crate) struct LogStore {
    disk: Disk,
    /// What is on disk as well.
    recent: Arc<Mutex<Recent>>,
    /// What is committed, and goes to disk with the next entries: it may be lost, and a write of its own for each entry would
    /// be as much work as the entry.
    committed: Arc<Mutex<Option<LogId<u64>>>>,
    stored: watch::Receiver<Stored>,
}

impl LogStore {
    pub(crate) fn new(disk: Disk, machine: &Machine) -> Self {
        let stored = machine.watch_stored();
        Self {
            disk,
            recent: Arc::default(),
            committed: Arc::default(),
            stored,
        }
    }

    fn committed(&self) -> MutexGuard<'_, Option<LogId<u64>>> {
        self.committed
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn recent(&self) -> MutexGuard<'_, Recent> {
        self.recent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read(
        &self,
        range: impl RangeBounds<u64>,
        room: Room,
    ) -> std::result::Result<Vec<Entry<Types>>, DiskError> {
        let recent = self.recent().range(&range, room);
        match recent {
            Some(entries) => Ok(entries),
            None => self.disk.entries_within(range, room),
        }
    }

    /// Waits until the snapshot that takes the place of the entries up to `last` is on disk: openraft 0.9 purges them while
    /// another lead's snapshot is still being installed, and a crash between the two would leave neither. Raft answers nobody
    /// for as long.
    async fn is_replaceable(&mut self, last: LogId<u64>) -> std::result::Result<(), DiskError> {
        let known =
            |it: &Stored| !it.is_incoming || it.has_failed || it.last.is_some_and(|at| at >= last);
        let stored = self.stored.wait_for(known).await;
        match stored.is_ok_and(|it| !it.has_failed) {
            true => Ok(()),
            false => Err(DiskError::Task),
        }
    }

    /// Whether what was applied up to `committed` can be applied again: its last entry is there, or a snapshot with it. It
    /// may have been saved for a snapshot that then was not.
    fn is_at_hand(&self, committed: LogId<u64>) -> std::result::Result<bool, DiskError> {
        let at = committed.index;
        let entry: Vec<Entry<Types>> = self.disk.entries(at..=at)?;
        let is_snapshot = self.stored.borrow().last >= Some(committed);
        Ok(is_snapshot || entry.iter().any(|entry| entry.log_id == committed))
    }
}

fn read_failed(error: DiskError) -> StorageError<u64> {
    StorageIOError::read_logs(&error).into()
}

fn write_failed(error: DiskError) -> StorageError<u64> {
    StorageIOError::write_logs(&error).into()
}

fn vote_failed(error: DiskError) -> StorageError<u64> {
    StorageIOError::write_vote(&error).into()
}

impl RaftLogReader<Types> for LogStore {
    async fn try_get_log_entries<R: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: R,
    ) -> Result<Vec<Entry<Types>>> {
        let entries = self.read(range, Room::unlimited());
        entries.map_err(read_failed)
    }

    async fn limited_get_log_entries(&mut self, start: u64, end: u64) -> Result<Vec<Entry<Types>>> {
        let entries = self.read(start..end, Room::new(MESSAGE));
        entries.map_err(read_failed)
    }
}

impl RaftLogStorage<Types> for LogStore {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> Result<LogState<Types>> {
        let purged: Option<LogId<u64>> = self.disk.get("purged").map_err(read_failed)?;
        let last: Option<Entry<Types>> = self.disk.last_entry().map_err(read_failed)?;
        Ok(LogState {
            last_purged_log_id: purged,
            last_log_id: last.map(|entry| entry.log_id).or(purged),
        })
    }

    async fn get_log_reader(&mut self) -> Self {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote<u64>) -> Result<()> {
        let vote = put("vote", vote).map_err(vote_failed)?;
        self.disk.write(vec![vote]).await.map_err(vote_failed)
    }

    async fn read_vote(&mut self) -> Result<Option<Vote<u64>>> {
        self.disk
            .get("vote")
            .map_err(|error| StorageIOError::read_vote(&error).into())
    }

    async fn save_committed(&mut self, committed: Option<LogId<u64>>) -> Result<()> {
        *self.committed() = committed;
        Ok(())
    }

    async fn read_committed(&mut self) -> Result<Option<LogId<u64>>> {
        let on_disk: Option<Option<LogId<u64>>> =
            self.disk.get("committed").map_err(read_failed)?;
        let waits = *self.committed();
        match waits.or(on_disk.flatten()) {
            Some(committed) if self.is_at_hand(committed).map_err(read_failed)? => {
                Ok(Some(committed))
            }
            // The leader says it again.
            _ => Ok(None),
        }
    }

    async fn append<I>(&mut self, entries: I, callback: LogFlushed<Types>) -> Result<()>
    where
        I: IntoIterator<Item = Entry<Types>> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let entries: Vec<_> = entries.into_iter().collect();
        let rows: std::result::Result<Vec<_>, _> = entries
            .iter()
            .map(|entry| Ok((entry.log_id.index, encode(entry)?)))
            .collect();
        let rows = rows.map_err(write_failed)?;
        let sizes: Vec<_> = rows.iter().map(|(_, row)| row.len()).collect();
        let mut writes = vec![Write::Append(rows)];
        let committed = *self.committed();
        if committed.is_some() {
            writes.push(put("committed", &committed).map_err(write_failed)?);
        }
        let written = self.disk.write(writes).await;
        if written.is_ok() {
            let mut recent = self.recent();
            for (entry, size) in entries.into_iter().zip(sizes) {
                recent.push(entry, size);
            }
        }
        callback.log_io_completed(written.map_err(io::Error::other));
        Ok(())
    }

    async fn truncate(&mut self, log_id: LogId<u64>) -> Result<()> {
        self.recent().truncate_from(log_id.index);
        self.disk
            .write(vec![Write::TruncateFrom(log_id.index)])
            .await
            .map_err(write_failed)
    }

    async fn purge(&mut self, log_id: LogId<u64>) -> Result<()> {
        self.is_replaceable(log_id).await.map_err(write_failed)?;
        self.recent().purge_to(log_id.index);
        let purged = put("purged", &log_id).map_err(write_failed)?;
        self.disk
            .write(vec![purged, Write::PurgeTo(log_id.index)])
            .await
            .map_err(write_failed)
    }
}
