//! What agents report: the facts that enter the Knowledge Base by Command.
//!
//! Integers only (placement must decide alike on every replica), each with its unit in the name. A report is
//! complete, and quantised by the agent so that noise does not become log entries.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use serde::{Deserialize, Serialize};

/// Where in the continuum a cluster stands.
#[derive(
    Clone,
    Copy,
    Debug,
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
pub enum Tier {
    /// Large, far.
    Cloud,
    /// In between.
    Fog,
    /// Small, near.
    Edge,
}

/// What a cluster's operator says of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClusterFacts {
    /// Cloud, fog or edge.
    pub tier: Tier,
    /// Where the cluster stands in law, an ISO 3166 code or a name of the operator's, for residency.
    pub region: String,
    /// Free labels for constraints.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// Price of one vCPU for an hour, micro-EUR.
    pub cpu_price_ueur_h: u64,
    /// Price of one GiB of memory for an hour, micro-EUR.
    #[serde(default)]
    pub memory_price_ueur_h: u64,
    /// Price of one GiB that leaves the cluster, micro-EUR.
    #[serde(default)]
    pub egress_price_ueur_gib: u64,
    /// Marginal power of one busy vCPU, milliwatt.
    pub cpu_power_mw: u64,
    /// Carbon intensity of the cluster's power, grams of CO2 equivalent per kWh.
    pub carbon_g_kwh: u64,
    /// The cluster's own prefixes (pod, service, node), checked against the mesh's.
    #[serde(default)]
    pub prefixes: Vec<ipnet::IpNet>,
}

/// What an agent reports of one node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeReport {
    /// Whether its NetManager is connected and its tunnel stands.
    pub ready: bool,
    /// Allocatable processing power, thousandths of a vCPU.
    pub cpu_milli: u64,
    /// Allocatable memory, bytes.
    pub memory_bytes: u64,
    /// Allocatable GPUs.
    pub gpus: u32,
    /// The tunnel's WireGuard public key, base64; empty until it is known.
    pub public_key: String,
    /// Where other nodes reach its tunnel.
    pub tunnel: Option<SocketAddr>,
    /// Its addresses in the underlay.
    pub underlay: Vec<IpAddr>,
    /// The IPv4 addresses of all its attached interfaces, instances or not: they keep their /27 blocks.
    #[serde(default)]
    pub used4: Vec<Ipv4Addr>,
    /// The revision (incarnation, index) that its kernel matches.
    pub applied: (u64, u64),
    /// Smoothed round-trip time to other nodes by number, microseconds, quantised to about 10 %.
    pub rtt_us: BTreeMap<u32, u32>,
    /// Probing backends that this node reached, by slot and epoch.
    pub reached: Vec<InstanceId>,
    /// Established flows from this node to draining backends.
    pub draining_flows: Vec<(InstanceId, u64)>,
}

/// One life of one slot.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct InstanceId {
    /// `namespace/application/service`.
    pub service: String,
    /// The slot's number within its service, from 0.
    pub instance: u32,
    /// The binding's epoch.
    pub epoch: u64,
}

/// What an agent reports of one instance that it runs or stopped.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstanceReport {
    /// Which.
    pub id: InstanceId,
    /// The node it runs on; empty until one is chosen.
    pub node: String,
    /// How far it is.
    pub phase: Phase,
    /// Its endpoint, once attached.
    pub endpoint: Option<EndpointFact>,
    /// Why it is not running, for people; empty when it is.
    pub reason: String,
}

/// How far an instance is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Accepted, not yet running.
    Starting,
    /// Running and it answers on its ports.
    Ready,
    /// Running, but it does not answer, or it is being restarted.
    NotReady,
    /// The cluster cannot run it (no room, bad command): bind it elsewhere.
    Refused,
    /// It ran and is gone for good; the last word about this epoch.
    Stopped,
}

/// An instance's endpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndpointFact {
    /// Its IPv6 address.
    pub addr6: Ipv6Addr,
    /// Its IPv4 address.
    pub addr4: Option<Ipv4Addr>,
}

/// All that an agent reports; complete.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// The nodes by name.
    pub nodes: BTreeMap<String, NodeReport>,
    /// The instances that the agent knows, running or stopped and not yet acknowledged.
    pub instances: Vec<InstanceReport>,
}
