//! The lead's database: one redb file, `lead.redb`.
//!
//! | table | key | value |
//! |---|---|---|
//! | `log` | index | entry |
//! | `meta` | `vote`, `purged`, `committed`, `identity`, `snapshot_meta`, `snapshot_data` | itself |
//!
//! A write returns when it is on disk; only `committed` may be lost (it is found again from the leader).

use std::{ops::RangeBounds, sync::Arc};

use redb::{Builder, Database, Durability, ReadableDatabase, ReadableTable, TableDefinition};
use serde::{Serialize, de::DeserializeOwned};
use tokio::sync::oneshot;

use super::{decode, encode, recent::Room};
use crate::world::Storage;

const LOG: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("log");
const META: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("meta");

/// Pages that redb keeps in memory, bytes: the log is read backwards only by leads that were away.
const CACHE: usize = 4 << 20;

/// Why the database failed.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The folder cannot be made.
    #[error("failed to make the folder")]
    Folder(#[source] std::io::Error),
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

/// The database, shared by the log, its readers and the state machine.
#[derive(Clone, Debug)]
pub(crate) struct Disk {
    database: Arc<Database>,
    storage: Arc<dyn Storage>,
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

impl Disk {
    /// Opens the database in `storage`, making it where it is missing.
    pub(crate) fn open(storage: Arc<dyn Storage>) -> Result<Self, DiskError> {
        let database = storage.open(Builder::new().set_cache_size(CACHE))?;
        let transaction = database.begin_write()?;
        transaction.open_table(LOG)?;
        transaction.open_table(META)?;
        transaction.commit()?;
        Ok(Self {
            database: Arc::new(database),
            storage,
        })
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
        let mut transaction = self.database.begin_write()?;
        transaction.set_durability(durability)?;
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
