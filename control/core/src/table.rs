//! Table projection: what one node must know, out of the Knowledge Base.
//!
//! The types mirror `netmanager_api::table` field by field, because this crate may not depend on that one; the
//! lead maps one to the other. A backend is in a table only while it may get packets: ready, draining or
//! probing. A node's table holds the services that its instances link to, or that are granted to it, and no
//! other (DESIGN section 4, who may call).

use std::net::SocketAddr;

use ipnet::{Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};

pub use crate::base::Vip;
use crate::{
    base::KnowledgeBase,
    goal::Port,
    name::{Name, ServiceName},
    report::EndpointFact,
};

/// Which state of the Knowledge Base a table shows: ordered by incarnation, then log index.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct Revision {
    /// Raised by restore and recovery.
    pub incarnation: u64,
    /// Index in the Raft log of the last change that a table may show.
    pub index: u64,
}

/// What one node must know.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeTable {
    /// The state it shows.
    pub revision: Revision,
    /// The ULA /48 of the mesh.
    pub prefix6: Ipv6Net,
    /// The IPv4 space; `None` where it is off or collides on this cluster.
    pub prefix4: Option<Ipv4Net>,
    /// Seed of the flow hash.
    pub seed: u64,
    /// This node's number.
    pub number: u32,
    /// This node's /27 blocks.
    pub blocks4: Vec<Ipv4Net>,
    /// The nodes that this node's traffic may go to or come from, this one not among them.
    pub peers: Vec<Peer>,
    /// The services that this node's endpoints may call.
    pub services: Vec<Service>,
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
}

/// A service that may be called from this node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Service {
    /// Its name.
    pub name: ServiceName,
    /// Its number.
    pub number: u32,
    /// The ports its VIPs answer.
    pub ports: Vec<Port>,
    /// Its VIPs.
    pub vips: Vec<Vip>,
    /// Its instances that may get packets.
    pub backends: Vec<Backend>,
}

/// An instance that takes traffic.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Backend {
    /// The slot's number within its service.
    pub instance: u32,
    /// The binding's epoch.
    pub epoch: u64,
    /// The number of its node.
    pub node: u32,
    /// Its addresses.
    pub endpoint: EndpointFact,
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
    /// It takes no traffic yet: nodes only try to reach it.
    Probing,
}

/// The table of one node; `None` while it has no number.
#[must_use]
pub fn project(kb: &KnowledgeBase, cluster: &Name, node: &str) -> Option<NodeTable> {
    let mesh = kb.mesh.as_ref()?;
    let here = kb.clusters.get(cluster)?;
    let this = here.nodes.get(node)?;
    let with4 = here.without_ipv4.is_none();
    Some(NodeTable {
        revision: kb.revision(),
        prefix6: mesh.prefix6,
        prefix4: mesh.prefix4.filter(|_| with4),
        seed: mesh.seed,
        number: this.number,
        blocks4: Vec::new(),
        peers: Vec::new(),
        services: Vec::new(),
    })
}
