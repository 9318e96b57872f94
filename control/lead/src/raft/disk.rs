//! The lead's database: one redb file, `lead.redb`.
//!
//! | table | key | value |
//! |---|---|---|
//! | log | index | entry |
//! | values | `vote`, `promise`, `purged`, `end`, `committed`, `identity`, `snapshot_meta`, `snapshot_data`, `odd` | itself |
//!
//! Every value is sealed ([`seal`](super::seal)), and its seal is looked at whenever it is read; `end` is where the log ends, written
//! with what it ends with.
//! A write returns when it is on disk; only `committed` may be lost (it goes with the next entries, and the leader knows it). A database that is not
//! sound is refused, and left as it is ([`header`]).

pub(crate) mod header;

use std::{io, ops::RangeBounds, sync::Arc};

use redb::{Builder, Database, ReadableDatabase, ReadableTable, Table};
use serde::{Serialize, de::DeserializeOwned};
use tokio::sync::oneshot;

use super::{
    decode, encode,
    layout::{self, LOG, VALUES},
    recent::Room,
    seal::Place,
    trouble::{Cause, Flaw, Trouble},
};
use crate::world::Storage;

/// The index behind the last entry that was written and not taken back.
pub(super) const END: &str = "end";
/// What is wrong with all of it, found out by comparing it with others'.
pub(super) const ODD: &str = "odd";

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
    /// Something is not what was written.
    #[error(transparent)]
    Damaged(#[from] Flaw),
    /// A newer program wrote it.
    #[error("its layout is {found}, which a newer weft wrote: start that one")]
    Newer {
        /// The layout.
        found: u32,
    },
    /// The writing task died.
    #[error("the writing task ended")]
    Task,
}

impl DiskError {
    fn of(error: redb::Error) -> Self {
        use io::ErrorKind::{InvalidData, UnexpectedEof};
        match error {
            redb::Error::Corrupted(found) => Flaw::database(found).into(),
            redb::Error::Io(error) if matches!(error.kind(), InvalidData | UnexpectedEof) => {
                Flaw::database(error).into()
            }
            redb::Error::TableDoesNotExist(_) | redb::Error::TableTypeMismatch { .. } => {
                Flaw::database(error).into()
            }
            error => Self::Database(Box::new(error)),
        }
    }
}

macro_rules! from_redb {
    ($($error:ty),*) => {$(
        impl From<$error> for DiskError {
            fn from(error: $error) -> Self {
                Self::of(error.into())
            }
        }
    )*};
}
from_redb!(
    redb::CommitError,
    redb::DatabaseError,
    redb::StorageError,
    redb::TableError,
    redb::TransactionError
);

/// The database, shared by the log, its readers and the state machine.
#[derive(Clone, Debug)]
pub(crate) struct Disk {
    database: Arc<Database>,
    storage: Arc<dyn Storage>,
    trouble: Trouble,
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
        layout::prepare(&database)?;
        Ok(Self {
            database: Arc::new(database),
            storage,
            trouble: Trouble::default(),
        })
    }

    /// Tells of what ends this lead.
    pub(super) fn trouble(&self) -> Trouble {
        self.trouble.clone()
    }

    /// Notes what went wrong where that ends this lead; `bytes` were to be written.
    fn noted<R>(&self, result: Result<R, DiskError>, bytes: usize) -> Result<R, DiskError> {
        if let Err(error) = &result
            && let Some(cause) = Cause::of(error, &*self.storage, bytes)
        {
            self.trouble.note(cause);
        }
        result
    }

    /// Looks at what is there; what is wrong with it ends this lead.
    pub(super) fn check(
        &self,
        look: impl FnOnce() -> Result<(), DiskError>,
    ) -> Result<(), DiskError> {
        self.noted(look(), 0)
    }

    /// Carries out `writes` in one transaction; on disk when it returns.
    pub(crate) async fn write(&self, writes: Vec<Write>) -> Result<(), DiskError> {
        let disk = self.clone();
        let (done, written) = oneshot::channel();
        let work = move || {
            // Who asked may be gone.
            let _ = done.send(disk.write_once(writes));
        };
        self.storage.run(Box::new(work)).await;
        written.await.map_err(|_| DiskError::Task)?
    }

    /// Like [`Disk::write`], for what runs alone.
    pub(super) fn write_once(&self, writes: Vec<Write>) -> Result<(), DiskError> {
        let bytes = writes.iter().map(Write::size).sum();
        self.noted(self.transact(writes), bytes)
    }

    fn transact(&self, writes: Vec<Write>) -> Result<(), DiskError> {
        let mut transaction = self.database.begin_write()?;
        // With one phase redb takes a commit that fails its checksums for one that a crash cut short, and goes back to the
        // one before it: a damaged page would take a vote or an entry that was acknowledged.
        transaction.set_two_phase_commit(true);
        {
            let mut log = transaction.open_table(LOG)?;
            let mut values = transaction.open_table(VALUES)?;
            let mut end = None;
            for write in writes {
                match write {
                    Write::Put { key, value } => insert(&mut values, key, value)?,
                    Write::Append(entries) => {
                        for (index, entry) in entries {
                            let entry = Place::Entry(index).seal(entry);
                            log.insert(index, entry.as_slice())?;
                            end = Some(index + 1);
                        }
                    }
                    Write::TruncateFrom(index) => {
                        log.retain_in(index.., |_, _| false)?;
                        end = Some(index);
                    }
                    Write::PurgeTo(index) => log.retain_in(..=index, |_, _| false)?,
                }
            }
            if let Some(end) = end {
                insert(&mut values, END, encode(&end)?)?;
            }
        }
        transaction.commit()?;
        Ok(())
    }

    /// The value at `key`.
    pub(crate) fn get<T: DeserializeOwned>(&self, key: &str) -> Result<Option<T>, DiskError> {
        let value = self.get_bytes(key)?;
        value.map(|value| Ok(decode(&value)?)).transpose()
    }

    /// The bytes at `key`.
    pub(crate) fn get_bytes(&self, key: &str) -> Result<Option<Vec<u8>>, DiskError> {
        let read = || {
            let table = self.database.begin_read()?.open_table(VALUES)?;
            let Some(sealed) = table.get(key)? else {
                return Ok(None);
            };
            Ok(Some(Place::Value(key).open(sealed.value())?.to_vec()))
        };
        self.noted(read(), 0)
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
        let mut entries = Vec::new();
        self.each_entry(range, |_, entry| {
            let takes = room.takes(entry.len());
            if takes {
                entries.push(decode(entry)?);
            }
            Ok(takes)
        })?;
        Ok(entries)
    }

    /// Shows the entries in `range`, encoded, for as long as `see` says.
    pub(super) fn each_entry(
        &self,
        range: impl RangeBounds<u64>,
        mut see: impl FnMut(u64, &[u8]) -> Result<bool, DiskError>,
    ) -> Result<(), DiskError> {
        let range = (range.start_bound().cloned(), range.end_bound().cloned());
        let mut read = || {
            let table = self.database.begin_read()?.open_table(LOG)?;
            for row in table.range(range)? {
                let (index, sealed) = row?;
                let index = index.value();
                if !see(index, Place::Entry(index).open(sealed.value())?)? {
                    break;
                }
            }
            Ok(())
        };
        self.noted(read(), 0)
    }

    /// The last entry of the log.
    pub(crate) fn last_entry<T: DeserializeOwned>(&self) -> Result<Option<T>, DiskError> {
        let read = || {
            let table = self.database.begin_read()?.open_table(LOG)?;
            let Some((index, sealed)) = table.last()? else {
                return Ok(None);
            };
            let entry = Place::Entry(index.value()).open(sealed.value())?;
            Ok(Some(decode(entry)?))
        };
        self.noted(read(), 0)
    }

    /// Whose data this is.
    pub(crate) fn read_identity(&self) -> Result<Option<(u64, String)>, DiskError> {
        self.get("identity")
    }

    /// Marks the data as this lead's.
    pub(crate) fn write_identity(&self, id: u64, name: &str) -> Result<(), DiskError> {
        let put = put("identity", &(id, name))?;
        self.write_once(vec![put])
    }
}

fn insert(values: &mut Table<'_, &str, &[u8]>, key: &str, value: Vec<u8>) -> Result<(), DiskError> {
    let value = Place::Value(key).seal(value);
    values.insert(key, value.as_slice())?;
    Ok(())
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
