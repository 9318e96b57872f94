//! Migration: how a slot moves, make-before-break, as a state machine.
//!
//! ```text
//!            TargetReady          Repointed            Drained | deadline        SourceGone
//!  Starting ------------> Repointing ------> Draining ----------------> Stopping ----------> Done
//!     |                       |                 |                           ^
//!     | TargetFailed | Cancel |  TargetFailed   |                           | `writers: one` starts here:
//!     `---------> RolledBack <------------------'                           ' the target is bound when the source is gone
//!
//!  SourceLost, in each state before Stopping: the target takes over at once, the stop is owed.
//! ```
//!
//! The state is in the Knowledge Base and deadlines are in log time, so a new leader goes on where the old one
//! was. Until the source stops the way back is open; after that it only goes forward.

use serde::{Deserialize, Serialize};

use crate::{command::Reason, name::Name, table::Revision};

/// The last move of one slot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Migration {
    /// The epoch that it leaves.
    pub source: u64,
    /// The epoch that it goes to; for `writers: one` the one that is reserved for it.
    pub target: u64,
    /// The cluster that it leaves.
    pub from: Name,
    /// The cluster that it goes to.
    pub to: Name,
    /// Why.
    pub reason: Reason,
    /// How far it is.
    pub state: State,
    /// Log time at which it began.
    pub since_ms: u64,
    /// Log time at which it came to this state.
    pub state_since_ms: u64,
}

/// How far a migration is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// The target starts; all traffic goes to the source.
    Starting,
    /// The target takes new flows; not every node knows it.
    Repointing {
        /// The revision that every concerned node must have.
        revision: Revision,
    },
    /// Every node knows; the source keeps its flows.
    Draining {
        /// Log time at which it is stopped all the same.
        deadline_ms: u64,
    },
    /// The source stops; there is no way back.
    Stopping,
    /// It has moved.
    Done,
    /// It is where it was; the target was given up.
    RolledBack,
}

/// What happens to a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Event {
    /// The target is ready and was reached through the network.
    TargetReady,
    /// The target was refused, stopped, lost, or took too long.
    TargetFailed,
    /// Every concerned node acknowledged the revision, or is not there to do so.
    Repointed,
    /// No flow is left, or the deadline has passed.
    Drained,
    /// The source is reported as stopped.
    SourceGone,
    /// The source's cluster is lost or the source stopped by itself: there is nothing to wait for.
    SourceLost,
    /// A user wants it back.
    Cancel,
}
