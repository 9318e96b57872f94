//! Number spaces.
use serde::{Deserialize, Serialize};

/// The numbers in use and at rest.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Numbers {}
