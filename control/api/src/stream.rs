//! The agent stream: what an agent and the leads say to each other.
//!
//! ```text
//!  agent -> lead   Hello                      once, first
//!                  Report                     when it changed, and at least every REPORT_AT_LEAST
//!                  Alive{sequence}            every third of the lease
//!                  Conditions                 load and coordinates: when they changed, and every few seconds
//!  lead -> agent   Welcome{session, lease}    once, first, when the leader registered the cluster
//!                  Renewed{sequence}          the leader counted this Alive
//!                  Assignments, Tables        at once after Welcome, then whenever they changed
//!                  Conditions                 of the mesh, the answer to the agent's
//! ```
//!
//! The agent dials any lead. Reports and assignments are complete and every message may come again, so a
//! stream needs no history: another lead goes on where the last one broke off. Revisions order what comes from
//! leads that are not equally far; the agent never goes back to an older one.

use std::{collections::BTreeMap, time::Duration};

use control_core::{
    assignment::Assignment,
    report::{ClusterFacts, Report},
};
use netmanager_api::{conditions::Conditions, identity::Revoked, table::Table};
use serde::{Deserialize, Serialize};

/// The largest message that either side takes, bytes: some 20,000 table rows.
pub const MESSAGE_LIMIT: usize = 16 * 1024 * 1024;

/// The longest that an agent is silent about its state.
pub const REPORT_AT_LEAST: Duration = Duration::from_secs(10);

/// What an agent says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FromAgent {
    /// The first message.
    Hello(Hello),
    /// The state of the cluster.
    Report(Report),
    /// Renews the lease; the lead hands it on to the leader.
    Alive {
        /// Counts up within the stream; comes back in [`ToAgent::Renewed`].
        sequence: u64,
    },
    /// Where the cluster's nodes are and how loaded its instances; never in the log.
    Conditions(Conditions),
}

/// Who an agent is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// The cluster's name; must be the one in the agent's certificate.
    pub cluster: String,
    /// What the cluster's operator says of it.
    pub facts: ClusterFacts,
    /// The session that the agent last had, to be continued unless it was lost meanwhile.
    pub session: Option<u64>,
    /// The newest assignments that the agent has, (incarnation, log index).
    pub revision: Option<(u64, u64)>,
    /// Version of the agent.
    pub version: String,
}

/// What a lead says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ToAgent {
    /// The leader registered the cluster.
    Welcome(Welcome),
    /// The leader counted the renewal of this number.
    Renewed {
        /// Of the [`FromAgent::Alive`] that it answers.
        sequence: u64,
    },
    /// What the cluster must run, complete.
    Assignments(Assignments),
    /// The tables that changed, by node name; a node that is not named keeps its own.
    Tables(BTreeMap<String, Table>),
    /// The same of the mesh, as far as this cluster's tables name it; complete.
    Conditions(Conditions),
}

/// What a cluster must run, and what it must have stopped.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Assignments {
    /// The state of the Knowledge Base that they show, (incarnation, log index).
    pub revision: (u64, u64),
    /// Every order for the cluster; an instance that none names is left alone and reported.
    pub list: Vec<Assignment>,
    /// The certificates of its nodes and of leads that count no more.
    #[serde(default, skip_serializing_if = "Revoked::is_empty")]
    pub revoked: Revoked,
}

/// What an agent works under.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Welcome {
    /// The cluster's session: another one means that the cluster was lost in between.
    pub session: u64,
    /// How long the leader waits for a renewal, milliseconds.
    pub lease_ms: u64,
}

impl Welcome {
    /// How long the leader waits for a renewal.
    #[must_use]
    pub fn lease(&self) -> Duration {
        Duration::from_millis(self.lease_ms)
    }
}

#[allow(
    clippy::all,
    clippy::allow_attributes,
    clippy::allow_attributes_without_reason,
    unreachable_pub,
    unused_qualifications,
    reason = "generated"
)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/weft.agent.v1.LeadDoor.rs"));
}
pub use generated::{lead_door_client::LeadDoorClient, lead_door_server};
