//! What the Knowledge Base is at entries that every lead comes by, so that leads can find out whether it is the same.
//!
//! ```text
//!  entries  0 ......... N-1 | N ......... 2N-1 | 2N ...      N: entries between two snapshots
//!                        '-- a checkpoint   '-- another
//! ```
//!
//! A snapshot is always of a checkpoint, whenever it is asked for, so that the state is copied and encoded as often as before;
//! its SHA-256 is the state's. Applying an entry costs nothing more.

use netmanager_api::identity::fingerprint;
use openraft::LogId;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::encode;

/// How many checkpoints a lead remembers: another may be so many behind.
const KEPT: usize = 8;

/// The Knowledge Base at one entry.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Checkpoint {
    /// The entry, the last that is in it.
    pub(crate) index: u64,
    /// SHA-256 of that entry's id and of the state, hexadecimal digits.
    pub(crate) hash: String,
}

/// What a lead says of its last checkpoints.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Checkpoints {
    /// What the state and its encoding follow from: of leads with other sources nothing is compared (`build.rs`).
    pub(crate) shape: String,
    /// The newest last.
    pub(crate) last: Vec<Checkpoint>,
}

impl Checkpoints {
    /// The hash at entry `index`.
    pub(crate) fn at(&self, index: u64) -> Option<&str> {
        let mut found = self.last.iter().filter(|it| it.index == index);
        found.next().map(|it| it.hash.as_str())
    }
}

impl Default for Checkpoints {
    fn default() -> Self {
        Self {
            shape: env!("WEFT_STATE").to_owned(),
            last: Vec::new(),
        }
    }
}

/// Where a lead's checkpoints are, and what they are.
#[derive(Clone, Debug)]
pub(crate) struct Checks {
    /// Entries between two.
    every: u64,
    known: watch::Sender<Checkpoints>,
}

impl Checks {
    /// One after each `every` entries.
    pub(crate) fn new(every: u64) -> Self {
        Self {
            every,
            known: watch::Sender::default(),
        }
    }

    /// Whether the state with entry `index` is one.
    pub(super) fn is_at(&self, index: u64) -> bool {
        (index + 1).is_multiple_of(self.every)
    }

    /// Notes the state with entry `last`, `encoded` by this program.
    pub(super) fn note(&self, last: LogId<u64>, encoded: &[u8]) {
        let Ok(mut bytes) = encode(&last) else {
            return;
        };
        if !self.is_at(last.index) {
            return;
        }
        bytes.extend_from_slice(encoded);
        let hash = fingerprint(&bytes);
        tracing::debug!(index = last.index, hash, "the state at a checkpoint");
        self.known.send_modify(|known| {
            known.last.retain(|it| it.index < last.index);
            known.last.push(Checkpoint {
                index: last.index,
                hash,
            });
            let old = known.last.len().saturating_sub(KEPT);
            known.last.drain(..old);
        });
    }

    /// What is known of them.
    pub(crate) fn known(&self) -> Checkpoints {
        self.known.borrow().clone()
    }

    /// Sees each new one.
    pub(crate) fn watch(&self) -> watch::Receiver<Checkpoints> {
        self.known.subscribe()
    }
}
