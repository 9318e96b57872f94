//! Table projection: what one node must know, out of the Knowledge Base.
//!
//! The types mirror `netmanager_api::table` field by field, because this crate may not depend on that one; the
//! lead maps one to the other. A backend is in a table only while it may get packets: ready, draining or
//! probing. A node's table holds the services that its instances link to, or that are granted to it, and no
//! other (DESIGN section 4, who may call).

use std::{collections::BTreeSet, net::SocketAddr};

use ipnet::{Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};

pub use crate::base::Vip;
use crate::{
    base::{BindingState, Cluster, KnowledgeBase, Node},
    goal::{Grantee, Port},
    index::Index,
    name::{Name, ServiceName},
    report::{EndpointFact, Phase},
};

#[cfg(test)]
mod tests;

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
    /// Carbon intensity of its cluster's power, gCO2e/kWh.
    pub carbon_g_kwh: u32,
    /// The nodes that this node's traffic may go to or come from, this one not among them.
    pub peers: Vec<Peer>,
    /// The services that this node's endpoints may call.
    pub services: Vec<Service>,
    /// The services with instances on this node whose connections within the node may be spliced.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub spliced: Vec<ServiceName>,
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
    /// Carbon intensity of its cluster's power, gCO2e/kWh.
    pub carbon_g_kwh: u32,
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

/// Up to this many nodes every node is every other's peer, so that round-trip times are known before anything
/// is placed; in a larger mesh only those between which traffic may flow, and one of each other cluster.
const FULL_MESH_NODES: usize = 64;

/// The table of one node; `None` while it has no number.
#[must_use]
pub fn project(kb: &KnowledgeBase, cluster: &Name, node: &str) -> Option<NodeTable> {
    let mesh = kb.mesh.as_ref()?;
    let here = kb.clusters.get(cluster)?;
    let this = here.nodes.get(node)?;
    let with4 = here.without_ipv4.is_none();
    let index = kb.index();
    let callable = callable(kb, &index, (cluster, node));
    let services: Vec<Service> = callable
        .iter()
        .filter_map(|name| service(kb, name, with4))
        .collect();
    Some(NodeTable {
        revision: kb.revision(),
        prefix6: mesh.prefix6,
        prefix4: mesh.prefix4.filter(|_| with4),
        seed: mesh.seed,
        number: this.number,
        blocks4: blocks4(kb, this),
        carbon_g_kwh: carbon(here),
        peers: peers(kb, &index, (cluster, node), &services),
        services,
        spliced: here_and_spliced(kb, &index, (cluster, node)),
    })
}

/// The services that a node's table holds.
fn callable(
    kb: &KnowledgeBase,
    index: &Index,
    (cluster, node): (&Name, &str),
) -> BTreeSet<ServiceName> {
    let to_hosts = |grantee: &Grantee| *grantee == Grantee::HostsOf(cluster.clone());
    let mut services = index.granted(kb, to_hosts);
    for caller in index.on(cluster, node) {
        services.extend(index.callable_from(kb, caller));
    }
    services
}

/// The services with instances on a node that ask to be spliced.
fn here_and_spliced(
    kb: &KnowledgeBase,
    index: &Index,
    (cluster, node): (&Name, &str),
) -> Vec<ServiceName> {
    let here = index.on(cluster, node);
    here.filter(|name| kb.goal(name).is_some_and(|goal| goal.splice))
        .cloned()
        .collect()
}

/// The nodes whose tables hold `service`, by cluster and name.
#[must_use]
pub fn concerned(kb: &KnowledgeBase, service: &ServiceName) -> BTreeSet<(Name, String)> {
    kb.index().concerned(kb, service)
}

/// A service with its backends; `None` when it is linked to but not there.
fn service(kb: &KnowledgeBase, name: &ServiceName, with4: bool) -> Option<Service> {
    let goal = kb.goal(name)?;
    let number = kb.services.get(name)?.number6;
    let mut vips = kb.vips(name);
    let mut backends = backends(kb, name);
    if !with4 {
        vips.iter_mut().for_each(|vip| vip.addr4 = None);
        backends.iter_mut().for_each(|b| b.endpoint.addr4 = None);
    }
    Some(Service {
        name: name.clone(),
        number,
        ports: goal.ports.clone(),
        vips,
        backends,
    })
}

fn backends(kb: &KnowledgeBase, name: &ServiceName) -> Vec<Backend> {
    let slots = kb
        .slots
        .range(name.slot(0)..)
        .take_while(|(slot, _)| slot.service == *name);
    slots
        .flat_map(|(slot, bindings)| bindings.iter().map(move |(epoch, b)| (slot, *epoch, b)))
        .filter_map(|(slot, epoch, binding)| {
            let state = match binding.state {
                BindingState::Active => BackendState::Ready,
                BindingState::Probing => BackendState::Probing,
                BindingState::Draining { .. } => BackendState::Draining,
                BindingState::Stopping => return None,
            };
            let node = kb
                .clusters
                .get(&binding.cluster)?
                .nodes
                .get(&binding.node)?;
            let ready = binding.phase == Phase::Ready;
            let endpoint = binding.endpoint.clone().filter(|_| ready)?;
            Some(Backend {
                instance: slot.instance,
                epoch,
                node: node.number,
                endpoint,
                state,
            })
        })
        .collect()
}

fn blocks4(kb: &KnowledgeBase, node: &Node) -> Vec<Ipv4Net> {
    let mesh = kb.mesh.as_ref();
    node.blocks4
        .keys()
        .filter_map(|block| mesh?.block4(*block))
        .collect()
}

/// As the operator says it; more than fits is as dirty as any.
fn carbon(cluster: &Cluster) -> u32 {
    u32::try_from(cluster.facts.carbon_g_kwh).unwrap_or(u32::MAX)
}

fn peers(
    kb: &KnowledgeBase,
    index: &Index,
    (cluster, node): (&Name, &str),
    services: &[Service],
) -> Vec<Peer> {
    let total: usize = kb.clusters.values().map(|c| c.nodes.len()).sum();
    let mut wanted: BTreeSet<u32> = BTreeSet::new();
    if total > FULL_MESH_NODES {
        wanted.extend(services.iter().flat_map(|s| &s.backends).map(|b| b.node));
        for service in index.on(cluster, node) {
            let callers = index.concerned(kb, service).into_iter();
            wanted.extend(callers.filter_map(|(cluster, node)| {
                Some(kb.clusters.get(&cluster)?.nodes.get(&node)?.number)
            }));
        }
        wanted.extend(kb.clusters.values().filter_map(|cluster| {
            let mut nodes = cluster.nodes.values();
            Some(nodes.find(|node| node.report.ready)?.number)
        }));
    }
    let mut peers = Vec::new();
    for (name, other) in &kb.clusters {
        for (peer, facts) in &other.nodes {
            let this = name == cluster && peer == node;
            let needed = total <= FULL_MESH_NODES || wanted.contains(&facts.number);
            if this || !needed || facts.report.public_key.is_empty() {
                continue;
            }
            peers.push(Peer {
                number: facts.number,
                name: format!("{name}/{peer}"),
                public_key: facts.report.public_key.clone(),
                endpoint: facts.report.tunnel,
                blocks4: blocks4(kb, facts),
                carbon_g_kwh: carbon(other),
            });
        }
    }
    peers
}
