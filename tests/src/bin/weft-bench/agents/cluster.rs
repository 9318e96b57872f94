//! A simulated cluster: it takes what it is ordered, and what runs has an endpoint as soon as its node has a number.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use anyhow::{Context, Result};
use control_api::stream::Assignments;
use control_core::{
    assignment::Want,
    report::{
        ClusterFacts, EndpointFact, InstanceId, InstanceReport, NodeReport, Phase, Report, Tier,
    },
};
use ebpf_common::addr::{Mesh6, NODE_ENDPOINT, Name6};
use netmanager_api::table::Table;

use super::shape::cluster_name;

/// What a node has: twice what runs on it.
const CPU_MILLI: u64 = 4_000;
const MEMORY: u64 = 8 << 30;
/// How many nodes of its cluster a node says to have measured.
const MEASURED: usize = 8;

/// One cluster, as its agent knows it.
#[derive(Debug)]
pub(super) struct Cluster {
    number: usize,
    nodes: BTreeMap<String, Node>,
    instances: BTreeMap<InstanceId, Instance>,
    /// Stopped, and not yet forgotten by the leads.
    stopped: BTreeSet<InstanceId>,
    /// Instances that were ever started: the next one's node.
    started: usize,
    space6: Option<Mesh6>,
    /// Of the newest assignments.
    pub(super) revision: Option<(u64, u64)>,
}

#[derive(Debug, Default)]
struct Node {
    /// Given by the leads.
    number: Option<u32>,
    applied: (u64, u64),
    last_endpoint: u32,
}

#[derive(Debug)]
struct Instance {
    node: String,
    addr6: Option<Ipv6Addr>,
}

impl Cluster {
    pub(super) fn new(number: usize, nodes: usize) -> Self {
        let node = |node| (format!("n{node:03}"), Node::default());
        Self {
            number,
            nodes: (0..nodes).map(node).collect(),
            instances: BTreeMap::new(),
            stopped: BTreeSet::new(),
            started: 0,
            space6: None,
            revision: None,
        }
    }

    /// What its operator says of it.
    pub(super) fn facts(number: usize) -> ClusterFacts {
        ClusterFacts {
            tier: Tier::Edge,
            region: "de".to_owned(),
            labels: BTreeMap::from([("cluster".to_owned(), cluster_name(number))]),
            cpu_price_ueur_h: 20_000,
            memory_price_ueur_h: 2_000,
            egress_price_ueur_gib: 10_000,
            cpu_power_mw: 5_000,
            carbon_g_kwh: 300,
            prefixes: Vec::new(),
        }
    }

    /// Makes what runs what is ordered.
    pub(super) fn order(&mut self, orders: &Assignments) {
        if self.revision > Some(orders.revision) {
            return;
        }
        self.revision = Some(orders.revision);
        let named: BTreeSet<&InstanceId> = orders.list.iter().map(|it| &it.id).collect();
        self.stopped.retain(|id| named.contains(id));
        self.instances.retain(|id, _| named.contains(id));
        for order in &orders.list {
            match order.want {
                Want::Stop => {
                    self.instances.remove(&order.id);
                    self.stopped.insert(order.id.clone());
                }
                Want::Run(_) if self.instances.contains_key(&order.id) => {}
                Want::Run(_) => {
                    let node = self.nodes.keys().nth(self.started % self.nodes.len());
                    let node = node.cloned().expect("a cluster has nodes");
                    self.started += 1;
                    let instance = Instance { node, addr6: None };
                    self.instances.insert(order.id.clone(), instance);
                }
            }
        }
        self.attach();
    }

    /// Takes the tables to the nodes.
    pub(super) fn tabled(&mut self, tables: &BTreeMap<String, Table>) {
        for (name, table) in tables {
            let Some(node) = self.nodes.get_mut(name) else {
                continue;
            };
            let revision = (table.revision.incarnation, table.revision.index);
            node.applied = node.applied.max(revision);
            node.number = Some(table.node.number);
            self.space6 = Mesh6::new(table.mesh.prefix6.network().to_bits());
        }
        self.attach();
    }

    /// Every instance has an endpoint, if its node has a number.
    fn attach(&mut self) {
        let Some(space6) = self.space6 else {
            return;
        };
        for instance in self.instances.values_mut() {
            if instance.addr6.is_none()
                && let Some(node) = self.nodes.get_mut(&instance.node)
            {
                instance.addr6 = node.endpoint(space6);
            }
        }
    }

    /// Gives an instance another endpoint on its node.
    pub(super) fn attach_anew(&mut self, service: &str, number: u32) -> Result<Ipv6Addr> {
        let found = self
            .instances
            .iter_mut()
            .find(|(id, _)| id.service == service && id.instance == number);
        let (_, instance) = found.with_context(|| format!("{service}#{number} does not run"))?;
        let node = self.nodes.get_mut(&instance.node);
        instance.addr6 = self
            .space6
            .zip(node)
            .and_then(|(space6, node)| node.endpoint(space6));
        instance.addr6.context("the node has no number")
    }

    /// How many instances have an endpoint.
    pub(super) fn attached(&self) -> usize {
        let all = self.instances.values();
        all.filter(|instance| instance.addr6.is_some()).count()
    }

    /// The nodes on which a service has instances.
    pub(super) fn nodes_of(&self, service: &str) -> BTreeSet<String> {
        self.instances
            .iter()
            .filter(|(id, _)| id.service == service)
            .map(|(_, instance)| instance.node.clone())
            .collect()
    }

    /// What the agent says.
    pub(super) fn report(&self) -> Report {
        let running = self.instances.iter().map(|(id, instance)| InstanceReport {
            id: id.clone(),
            node: instance.node.clone(),
            phase: if instance.addr6.is_some() {
                Phase::Ready
            } else {
                Phase::Starting
            },
            endpoint: instance
                .addr6
                .map(|addr6| EndpointFact { addr6, addr4: None }),
            reason: String::new(),
        });
        let stopped = self.stopped.iter().map(|id| InstanceReport {
            id: id.clone(),
            node: String::new(),
            phase: Phase::Stopped,
            endpoint: None,
            reason: String::new(),
        });
        let numbers: Vec<u32> = self.nodes.values().filter_map(|node| node.number).collect();
        let nodes = self.nodes.iter().map(|(name, node)| {
            let report = NodeReport {
                ready: true,
                cpu_milli: CPU_MILLI,
                memory_bytes: MEMORY,
                gpus: 0,
                public_key: format!("{}/{name}", cluster_name(self.number)),
                tunnel: None,
                underlay: vec![IpAddr::V4(Ipv4Addr::LOCALHOST)],
                used4: Vec::new(),
                applied: node.applied,
                rtt_us: numbers.iter().take(MEASURED).map(|it| (*it, 300)).collect(),
                reached: Vec::new(),
                draining_flows: Vec::new(),
            };
            (name.clone(), report)
        });
        Report {
            nodes: nodes.collect(),
            instances: running.chain(stopped).collect(),
        }
    }
}

impl Node {
    /// The next endpoint's address.
    fn endpoint(&mut self, space6: Mesh6) -> Option<Ipv6Addr> {
        let node = self.number?;
        self.last_endpoint = self.last_endpoint.max(NODE_ENDPOINT) + 1;
        let endpoint = Name6::Endpoint {
            node,
            endpoint: self.last_endpoint,
        };
        Some(space6.encode(endpoint).into())
    }
}

#[cfg(test)]
mod tests {
    use control_core::assignment::Assignment;

    use super::*;

    fn id(instance: u32) -> InstanceId {
        InstanceId {
            service: "bench/c000-a0/s1".to_owned(),
            instance,
            epoch: 1,
        }
    }

    #[test]
    fn what_is_not_ordered_any_more_is_gone_and_what_is_to_stop_says_that_it_did() {
        let mut cluster = Cluster::new(0, 2);
        let orders = |index, list: &[u32]| Assignments {
            revision: (0, index),
            list: list
                .iter()
                .map(|instance| Assignment {
                    id: id(*instance),
                    want: Want::Stop,
                    grace_ms: 1,
                })
                .collect(),
            ..Assignments::default()
        };
        cluster.order(&orders(7, &[0, 1]));
        let phases: Vec<_> = cluster
            .report()
            .instances
            .iter()
            .map(|it| it.phase)
            .collect();
        assert_eq!(phases, [Phase::Stopped; 2]);
        cluster.order(&orders(6, &[]));
        assert_eq!(cluster.report().instances.len(), 2, "older orders");
        cluster.order(&orders(8, &[1]));
        assert_eq!(cluster.report().instances.len(), 1);
        assert_eq!(cluster.attached(), 0);
    }
}
