//! Assignment projection: what one cluster must run, and what it must stop.
//!
//! An assignment list is complete. Its stops come first, because a cluster stops what was bound elsewhere
//! before it starts anything (I7). An agent that is told to stop an instance which it does not know reports
//! it as [`Phase::Stopped`](crate::report::Phase::Stopped) all the same: only that word ends a stop that is
//! owed. An instance that is in no list and was reported as stopped may be forgotten.

use std::{collections::BTreeMap, net::IpAddr};

use serde::{Deserialize, Serialize};

use crate::{
    base::KnowledgeBase,
    goal::{Port, Requests, Writers},
    name::Name,
    report::InstanceId,
};

/// One thing to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Assignment {
    /// Which instance.
    pub id: InstanceId,
    /// Run it or stop it.
    pub want: Want,
    /// How long it has between SIGTERM and SIGKILL, milliseconds.
    pub grace_ms: u64,
}

/// What to do with an instance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Want {
    /// Stop it and report it as stopped.
    Stop,
    /// Run it.
    Run(Box<Run>),
}

/// How to run an instance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run {
    /// Container image, for drivers that have containers.
    pub image: Option<String>,
    /// Program and arguments; empty means the image's own.
    pub command: Vec<String>,
    /// Its whole environment: the user's and `WEFT_*`.
    pub env: BTreeMap<String, String>,
    /// Lines of its /etc/hosts.
    pub hosts: Vec<HostLine>,
    /// What it needs.
    pub requests: Requests,
    /// The ports on which it answers when it is ready (`target_port`).
    pub ports: Vec<Port>,
    /// Whether it must be fenced when its node's lease ends.
    pub writers: Writers,
}

/// One line of /etc/hosts.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct HostLine {
    /// The address.
    pub address: IpAddr,
    /// Its names.
    pub names: Vec<String>,
}

/// What `cluster` must run and stop, stops first.
#[must_use]
pub fn project(kb: &KnowledgeBase, cluster: &Name) -> Vec<Assignment> {
    let _ = (kb, cluster);
    Vec::new()
}
