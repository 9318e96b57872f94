//! This lead's copy of the Knowledge Base, and who waits for it to change.
//!
//! One writer (the state machine) and many readers, none of which holds it across an await.

use std::{
    sync::{PoisonError, RwLock},
    time::Duration,
};

use control_core::base::KnowledgeBase;
use tokio::sync::watch;

/// The Knowledge Base as far as this lead has applied its log.
#[derive(Debug)]
pub(crate) struct Replica {
    base: RwLock<KnowledgeBase>,
    applied: watch::Sender<u64>,
}

impl Default for Replica {
    fn default() -> Self {
        Self {
            base: RwLock::default(),
            applied: watch::Sender::new(0),
        }
    }
}

impl Replica {
    /// Reads the Knowledge Base; writers wait meanwhile, so `read` is short.
    pub(crate) fn read<R>(&self, read: impl FnOnce(&KnowledgeBase) -> R) -> R {
        // `apply` is total, so a poisoned lock can only come from a reader, which changes nothing.
        read(&self.base.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Changes the Knowledge Base; the readers hear of it by [`Replica::advance`].
    pub(crate) fn write<R>(&self, write: impl FnOnce(&mut KnowledgeBase) -> R) -> R {
        let mut base = self.base.write().unwrap_or_else(PoisonError::into_inner);
        let written = write(&mut base);
        base.settle();
        written
    }

    /// Tells the readers that the log is applied up to `index`.
    pub(crate) fn advance(&self, index: u64) {
        self.applied.send_replace(index);
    }

    /// Index of the last entry that is applied.
    pub(crate) fn applied(&self) -> u64 {
        *self.applied.borrow()
    }

    /// Sees each new applied index, the newest only.
    pub(crate) fn watch(&self) -> watch::Receiver<u64> {
        self.applied.subscribe()
    }

    /// Waits until the log is applied up to `index`; false when `limit` passes before.
    pub(crate) async fn reach(&self, index: u64, limit: Duration) -> bool {
        let mut applied = self.applied.subscribe();
        let reached = applied.wait_for(|applied| *applied >= index);
        matches!(tokio::time::timeout(limit, reached).await, Ok(Ok(_)))
    }
}
