//! Assignments: what one cluster must run, and what it must have stopped.
//!
//! A list is complete and every line in it is an order about one life of one slot: run it, or have it gone. An
//! instance that the list does *not* name is nobody's to kill: the agent leaves it alone and reports it, so
//! that after a restore the leads may adopt it. The agent picks the node within its cluster.

use std::{collections::BTreeMap, net::IpAddr};

use serde::{Deserialize, Serialize};

use crate::report::InstanceId;

/// All orders for one cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Assignments {
    /// The state of the Knowledge Base that they show: (incarnation, log index).
    pub revision: (u64, u64),
    /// The orders, one per slot and epoch, by id.
    pub list: Vec<Assignment>,
}

/// One order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Assignment {
    /// Which life of which slot.
    pub id: InstanceId,
    /// What is to be done about it.
    pub order: Order,
}

/// What is to be done about an instance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Order {
    /// It must run.
    Run(Box<Workload>),
    /// It must be gone; repeated until the agent reported it as stopped (an owed stop).
    Stop {
        /// From the polite signal to the last one, milliseconds.
        grace_ms: u64,
    },
}

/// How to run an instance; nothing in it needs another look at the Knowledge Base.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Workload {
    /// The container image, for drivers that run containers.
    pub image: Option<String>,
    /// The command and its arguments; empty is the image's own.
    pub command: Vec<String>,
    /// Its environment, the addresses of its peers (`WEFT_..._ADDR`) among it.
    pub env: BTreeMap<String, String>,
    /// Lines for its `/etc/hosts`.
    pub hosts: Vec<HostLine>,
    /// TCP ports that must take a connection before it counts as ready.
    pub ready_tcp: Vec<u16>,
    /// Processing power booked for it, thousandths of a vCPU.
    pub cpu_milli: u64,
    /// Memory booked for it, bytes.
    pub memory_bytes: u64,
    /// GPUs booked for it.
    pub gpus: u32,
    /// How many of it may write at a time.
    pub writers: Writers,
    /// From the polite signal to the last one when it is stopped without an order (a fence), milliseconds.
    pub stop_grace_ms: u64,
}

/// One line of an `/etc/hosts`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostLine {
    /// The address.
    pub addr: IpAddr,
    /// Its names.
    pub names: Vec<String>,
}

/// How many copies of an instance may write at a time.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Serialize,
    Deserialize,
    schemars::JsonSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum Writers {
    /// A copy that was cut off may go on beside its successor.
    #[default]
    Any,
    /// At most one: its cluster stops it when the lease ends.
    One,
}
