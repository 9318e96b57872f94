//! A batch that is held in several places at once (the log's memory, messages to each lead, the state machine) and
//! written as what it is.

use std::{ops::Deref, sync::Arc};

use control_core::command::Batch;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SharedBatch(Arc<Batch>);

impl From<Batch> for SharedBatch {
    fn from(batch: Batch) -> Self {
        Self(Arc::new(batch))
    }
}

impl Deref for SharedBatch {
    type Target = Batch;

    fn deref(&self) -> &Batch {
        &self.0
    }
}

impl Serialize for SharedBatch {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for SharedBatch {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Batch::deserialize(deserializer).map(Self::from)
    }
}
