//! The table: what one node must know to forward.
//!
//! A table is complete: a node makes its kernel match it and forgets what it does not name. User space on
//! the node turns policies into slots; the table carries facts of the log only (who is ready, where, on what power);
//! what changes all the time is in the [`conditions`](crate::conditions).

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

use ipnet::{Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};

/// Which state of the Knowledge Base a table shows: ordered by incarnation, then log index.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct Revision {
    /// Raised by restore and recovery.
    pub incarnation: u64,
    /// Index in the Raft log.
    pub index: u64,
}

/// The mesh's address space and hash seed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mesh {
    /// The ULA /48.
    pub prefix6: Ipv6Net,
    /// The IPv4 space, /12 to /16; `None` where it is off or collides on this cluster.
    pub prefix4: Option<Ipv4Net>,
    /// Seed of the flow hash.
    pub seed: u64,
}

/// What one node must know.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Table {
    /// The state it shows.
    pub revision: Revision,
    /// The mesh.
    pub mesh: Mesh,
    /// This node.
    pub node: Node,
    /// The nodes that this node's traffic may go to or come from, this one not among them.
    pub peers: Vec<Peer>,
    /// The services that this node's endpoints may call.
    pub services: Vec<Service>,
    /// The services with instances on this node whose connections within the node may be spliced.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub spliced: Vec<String>,
}

/// This node, as the leads know it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    /// Its number, in its endpoints' addresses.
    pub number: u32,
    /// Its IPv4 blocks, each a /27; the node gives addresses out of them.
    pub blocks4: Vec<Ipv4Net>,
    /// Carbon intensity of its cluster's power, gCO2e/kWh; `None` where it is unknown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub carbon_g_kwh: Option<u32>,
}

/// Another node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Peer {
    /// Its number.
    pub number: u32,
    /// `cluster/node`, for people.
    pub name: String,
    /// Its WireGuard public key, base64.
    pub public_key: String,
    /// Where its tunnel listens; `None` while it is not known.
    pub endpoint: Option<SocketAddr>,
    /// Its IPv4 blocks.
    pub blocks4: Vec<Ipv4Net>,
    /// Carbon intensity of its cluster's power, gCO2e/kWh; `None` where it is unknown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub carbon_g_kwh: Option<u32>,
}

/// A service that may be called from this node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Service {
    /// `namespace/application/service`.
    pub name: String,
    /// Its number.
    pub number: u32,
    /// The ports its VIPs answer.
    pub ports: Vec<Port>,
    /// Its VIPs.
    pub vips: Vec<Vip>,
    /// Its instances that are ready or draining.
    pub backends: Vec<Backend>,
}

/// Transport protocol of a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// A declared port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Port {
    /// TCP or UDP.
    pub protocol: Protocol,
    /// The VIP's port.
    pub port: u16,
    /// The backends' port.
    pub target_port: u16,
    /// Whether its UDP flows move to another backend at once when theirs drains or dies.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub follow: bool,
}

/// A semantic service IP; its addresses say its policy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vip {
    /// The policy's name, as in the address.
    pub policy: PolicyName,
    /// The instance's number for policy `instance`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instance: Option<u32>,
    /// Its IPv6 address.
    pub addr6: Ipv6Addr,
    /// Its IPv4 address; `None` where the mesh or the number space has none.
    pub addr4: Option<Ipv4Addr>,
}

/// A policy in the table: [`ebpf_common::addr::Policy`] by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "&'static str")]
pub struct PolicyName(pub ebpf_common::addr::Policy);

impl TryFrom<String> for PolicyName {
    type Error = String;

    fn try_from(name: String) -> Result<Self, String> {
        ebpf_common::addr::Policy::from_name(&name)
            .map(Self)
            .ok_or_else(|| format!("unknown policy {name:?}"))
    }
}

impl From<PolicyName> for &'static str {
    fn from(policy: PolicyName) -> Self {
        policy.0.name()
    }
}

/// An instance that takes traffic.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Backend {
    /// The slot's number within its service.
    pub instance: u32,
    /// The binding's epoch: another epoch of the same slot is another backend.
    pub epoch: u64,
    /// The number of its node.
    pub node: u32,
    /// Its endpoint's IPv6 address.
    pub addr6: Ipv6Addr,
    /// Its endpoint's IPv4 address.
    pub addr4: Option<Ipv4Addr>,
    /// Whether new flows may pick it.
    pub state: BackendState,
}

/// Whether new flows may pick a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BackendState {
    /// New flows may pick it.
    Ready,
    /// It keeps its flows and gets no new ones.
    Draining,
    /// It takes no traffic yet: nodes only try to reach it and report that they did (`Measured::reached`).
    Probing,
}
