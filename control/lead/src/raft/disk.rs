//! The lead's database: one redb file, `lead.redb`.
//!
//! | table | key | value |
//! |---|---|---|
//! | `log` | index | entry |
//! | `meta` | `vote`, `purged`, `committed`, `identity`, `snapshot_meta`, `snapshot_data` | itself |
//!
//! A write returns when it is on disk; only `committed` may be lost (it is found again from the leader). A database that is not
//! sound is refused, and left as it is ([`header`]).

pub(crate) mod header;

use std::{
    io,
    ops::RangeBounds,
    sync::{Arc, OnceLock},
};

use redb::{Builder, Database, Durability, ReadableDatabase, ReadableTable, TableDefinition};
use serde::{Serialize, de::DeserializeOwned};
use tokio::sync::oneshot;

use super::{decode, encode, recent::Room};
use crate::{room::rounded, world::Storage};

const LOG: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("log");
const META: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("meta");

/// Pages that redb keeps in memory, bytes: the log is read backwards only by leads that were away.
const CACHE: usize = 4 << 20;

/// Why the database failed.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The folder cannot be made.
    #[error("failed to make the folder")]
    Folder(#[source] io::Error),
    /// redb failed.
    #[error("the database failed")]
    Database(#[source] Box<redb::Error>),
    /// A value cannot be written.
    #[error("a value cannot be encoded")]
    Encode(#[from] rmp_serde::encode::Error),
    /// A value cannot be read.
    #[error("a value cannot be decoded")]
    Decode(#[from] rmp_serde::decode::Error),
    /// The writing task died.
    #[error("the writing task ended")]
    Task,
}

macro_rules! from_redb {
    ($($error:ty),*) => {$(
        impl From<$error> for DiskError {
            fn from(error: $error) -> Self {
                Self::Database(Box::new(error.into()))
            }
        }
    )*};
}
from_redb!(
    redb::CommitError,
    redb::DatabaseError,
    redb::SetDurabilityError,
    redb::StorageError,
    redb::TableError,
    redb::TransactionError
);

/// The disk is full.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the disk is full: {dir} had {} left when {} were to be written; make room on its file system, or move the folder to a larger one \
     (--data), and start the lead again: it goes on where it stopped",
    rounded(*.free),
    rounded(*.bytes)
)]
pub struct Full {
    /// The data folder.
    pub dir: String,
    /// What could not be written, bytes.
    pub bytes: u64,
    /// What was left, bytes.
    pub free: u64,
}

impl Full {
    /// What `error` says of the room in `storage`, where `bytes` were to be written; `None` where it is about something else.
    pub(super) fn of(error: &DiskError, storage: &dyn Storage, bytes: usize) -> Option<Self> {
        let error = match error {
            DiskError::Folder(error) => error,
            DiskError::Database(error) => match &**error {
                redb::Error::Io(error) => error,
                _ => return None,
            },
            _ => return None,
        };
        let kinds = [io::ErrorKind::StorageFull, io::ErrorKind::QuotaExceeded];
        kinds.contains(&error.kind()).then(|| Self {
            dir: storage.to_string(),
            bytes: u64::try_from(bytes).unwrap_or(u64::MAX),
            free: storage.space().map_or(0, |space| space.free),
        })
    }
}

/// The first write that found no room, if one did: openraft keeps of an error only its text.
#[derive(Clone, Debug, Default)]
pub(crate) struct Fullness(Arc<OnceLock<Full>>);

impl Fullness {
    /// What it was.
    pub(crate) fn full(&self) -> Option<Full> {
        self.0.get().cloned()
    }
}

/// The database, shared by the log, its readers and the state machine.
#[derive(Clone, Debug)]
pub(crate) struct Disk {
    database: Arc<Database>,
    storage: Arc<dyn Storage>,
    fullness: Fullness,
}

/// One change of the database.
pub(crate) enum Write {
    Put {
        key: &'static str,
        value: Vec<u8>,
    },
    Append(Vec<(u64, Vec<u8>)>),
    /// Removes this entry and all after it.
    TruncateFrom(u64),
    /// Removes this entry and all before it.
    PurgeTo(u64),
}

impl Write {
    /// Bytes.
    fn size(&self) -> usize {
        match self {
            Self::Put { value, .. } => value.len(),
            Self::Append(entries) => entries.iter().map(|(_, entry)| entry.len()).sum(),
            Self::TruncateFrom(_) | Self::PurgeTo(_) => 0,
        }
    }
}

impl Disk {
    /// Opens the database in `storage`, making it where it is missing.
    pub(crate) fn open(storage: Arc<dyn Storage>) -> Result<Self, DiskError> {
        // redb takes what a clean end left behind on trust otherwise.
        let mut builder = Builder::new();
        builder
            .set_cache_size(CACHE)
            .set_check_integrity_on_open(true);
        let database = storage.open(&builder)?;
        let transaction = database.begin_write()?;
        transaction.open_table(LOG)?;
        transaction.open_table(META)?;
        transaction.commit()?;
        Ok(Self {
            database: Arc::new(database),
            storage,
            fullness: Fullness::default(),
        })
    }

    /// Tells whether a write found no room.
    pub(super) fn fullness(&self) -> Fullness {
        self.fullness.clone()
    }

    /// Carries out `writes` in one transaction; on disk when it returns.
    pub(crate) async fn write(&self, writes: Vec<Write>) -> Result<(), DiskError> {
        self.blocking(writes, Durability::Immediate).await
    }

    /// Carries out `writes` without waiting for the disk.
    pub(crate) async fn write_soon(&self, writes: Vec<Write>) -> Result<(), DiskError> {
        self.blocking(writes, Durability::None).await
    }

    async fn blocking(&self, writes: Vec<Write>, durability: Durability) -> Result<(), DiskError> {
        let disk = self.clone();
        let (done, written) = oneshot::channel();
        let work = move || {
            // Who asked may be gone.
            let _ = done.send(disk.write_now(writes, durability));
        };
        self.storage.run(Box::new(work)).await;
        written.await.map_err(|_| DiskError::Task)?
    }

    /// Like [`Disk::write`], for what runs alone.
    pub(super) fn write_once(&self, writes: Vec<Write>) -> Result<(), DiskError> {
        self.write_now(writes, Durability::Immediate)
    }

    fn write_now(&self, writes: Vec<Write>, durability: Durability) -> Result<(), DiskError> {
        let bytes = writes.iter().map(Write::size).sum();
        let written = self.transact(writes, durability);
        if let Err(error) = &written {
            let full = Full::of(error, &*self.storage, bytes);
            full.map(|full| self.fullness.0.get_or_init(|| full));
        }
        written
    }

    fn transact(&self, writes: Vec<Write>, durability: Durability) -> Result<(), DiskError> {
        let mut transaction = self.database.begin_write()?;
        transaction.set_durability(durability)?;
        // With one phase redb takes a commit that fails its checksums for one that a crash cut short, and goes back to the
        // one before it: a damaged page would take a vote or an entry that was acknowledged.
        transaction.set_two_phase_commit(true);
        {
            let mut log = transaction.open_table(LOG)?;
            let mut meta = transaction.open_table(META)?;
            for write in writes {
                match write {
                    Write::Put { key, value } => {
                        meta.insert(key, value.as_slice())?;
                    }
                    Write::Append(entries) => {
                        for (index, entry) in entries {
                            log.insert(index, entry.as_slice())?;
                        }
                    }
                    Write::TruncateFrom(index) => log.retain_in(index.., |_, _| false)?,
                    Write::PurgeTo(index) => log.retain_in(..=index, |_, _| false)?,
                }
            }
        }
        transaction.commit()?;
        Ok(())
    }

    /// The value at `key`.
    pub(crate) fn get<T: DeserializeOwned>(&self, key: &str) -> Result<Option<T>, DiskError> {
        let table = self.database.begin_read()?.open_table(META)?;
        table
            .get(key)?
            .map(|value| decode(value.value()).map_err(DiskError::from))
            .transpose()
    }

    /// The bytes at `key`.
    pub(crate) fn get_bytes(&self, key: &str) -> Result<Option<Vec<u8>>, DiskError> {
        let table = self.database.begin_read()?.open_table(META)?;
        Ok(table.get(key)?.map(|value| value.value().to_vec()))
    }

    /// The entries in `range`.
    pub(crate) fn entries<T: DeserializeOwned>(
        &self,
        range: impl RangeBounds<u64>,
    ) -> Result<Vec<T>, DiskError> {
        self.entries_within(range, Room::unlimited())
    }

    /// The entries in `range`, as far as `room` goes.
    pub(super) fn entries_within<T: DeserializeOwned>(
        &self,
        range: impl RangeBounds<u64>,
        mut room: Room,
    ) -> Result<Vec<T>, DiskError> {
        let table = self.database.begin_read()?.open_table(LOG)?;
        let range = (range.start_bound().cloned(), range.end_bound().cloned());
        let mut entries = Vec::new();
        for row in table.range(range)? {
            let (_, entry) = row?;
            if !room.takes(entry.value().len()) {
                break;
            }
            entries.push(decode(entry.value())?);
        }
        Ok(entries)
    }

    /// The last entry of the log.
    pub(crate) fn last_entry<T: DeserializeOwned>(&self) -> Result<Option<T>, DiskError> {
        let table = self.database.begin_read()?.open_table(LOG)?;
        let last = table.last()?;
        last.map(|(_, value)| Ok(decode(value.value())?))
            .transpose()
    }

    /// Whose data this is.
    pub(crate) fn read_identity(&self) -> Result<Option<(u64, String)>, DiskError> {
        self.get("identity")
    }

    /// Marks the data as this lead's.
    pub(crate) fn write_identity(&self, id: u64, name: &str) -> Result<(), DiskError> {
        let put = put("identity", &(id, name))?;
        self.write_now(vec![put], Durability::Immediate)
    }
}

/// A write of `value` at `key`.
pub(crate) fn put<T: Serialize>(key: &'static str, value: &T) -> Result<Write, DiskError> {
    Ok(Write::Put {
        key,
        value: encode(value)?,
    })
}

#[cfg(test)]
mod tests;
