//! What ends a lead: its disk is full, or does not hold what was written there.

use std::{fmt, io, sync::Arc};

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::disk::{Disk, DiskError, ODD, put};
use crate::{
    room::rounded,
    world::{FILE, Storage},
};

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

/// A record that is not what was written there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{record}: expected {expected}, found {found}")]
pub struct Flaw {
    /// Which.
    pub record: String,
    /// What was written, as far as that is known.
    pub expected: String,
    /// What is there.
    pub found: String,
}

impl Flaw {
    pub(super) fn new(
        record: impl fmt::Display,
        expected: impl fmt::Display,
        found: impl fmt::Display,
    ) -> Self {
        Self {
            record: record.to_string(),
            expected: expected.to_string(),
            found: found.to_string(),
        }
    }

    /// The database as a whole.
    pub(crate) fn database(found: impl fmt::Display) -> Self {
        Self::new("the database", "what was written", found)
    }
}

/// The data are not what the lead wrote.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{dir}/{FILE} is damaged: {flaw}; it is left as it is")]
pub struct Damaged {
    /// The data folder.
    pub dir: String,
    /// What is wrong.
    pub flaw: Flaw,
}

/// Why a lead cannot go on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Cause {
    Full(Full),
    Damaged(Damaged),
}

impl Cause {
    /// What `error` means for the lead on `storage`, where `bytes` were to be written; `None` where it is about something else.
    pub(super) fn of(error: &DiskError, storage: &dyn Storage, bytes: usize) -> Option<Self> {
        match error {
            DiskError::Damaged(flaw) => Some(Self::Damaged(Damaged {
                dir: storage.to_string(),
                flaw: flaw.clone(),
            })),
            error => Full::of(error, storage, bytes).map(Self::Full),
        }
    }
}

/// The first thing that went wrong, if one did: openraft keeps of an error only its text.
#[derive(Clone, Debug, Default)]
pub(crate) struct Trouble(Arc<watch::Sender<Option<Cause>>>);

impl Trouble {
    /// What it was.
    pub(crate) fn cause(&self) -> Option<Cause> {
        self.0.borrow().clone()
    }

    /// Returns with it when it happens.
    pub(crate) async fn comes(&self) -> Cause {
        let mut cause = self.0.subscribe();
        let came = cause.wait_for(Option::is_some).await;
        let came = came.map(|cause| cause.clone());
        came.ok().flatten().expect("its sender is held here")
    }

    pub(super) fn note(&self, cause: Cause) {
        self.0.send_if_modified(|known| {
            let is_first = known.is_none();
            known.get_or_insert(cause);
            is_first
        });
    }
}

/// A lead's data, as what must not be used any more.
#[derive(Clone, Debug)]
pub(crate) struct Condemned(Disk);

impl Condemned {
    pub(super) fn new(disk: Disk) -> Self {
        Self(disk)
    }

    /// Ends this lead, which does not start again with these data.
    pub(crate) async fn note(&self, flaw: Flaw) {
        let written = match put(ODD, &flaw) {
            Ok(flaw) => self.0.write(vec![flaw]).await,
            Err(error) => Err(error),
        };
        if let Err(error) = written {
            tracing::error!(%error, "what is wrong with the data is not written down");
        }
        // This ends it, written down or not.
        let _ = self.0.check(|| Err(flaw.into()));
    }
}
