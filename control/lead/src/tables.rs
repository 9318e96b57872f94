//! What a cluster is sent: its assignments and its nodes' tables, as far as they changed.
//!
//! Only what the Knowledge Base says may have changed since the stream looked last is looked at.
//!
//! control-core's table mirrors `netmanager_api`'s; here the one becomes the other. A table that shows the same
//! as the one before is not sent again, except while a migration waits for its nodes to acknowledge a newer
//! revision.

use std::collections::BTreeMap;

use control_api::stream::{Assignments, ToAgent};
use control_core::{
    assignment,
    base::KnowledgeBase,
    goal::Protocol,
    index::Changed,
    migration::State,
    name::Name,
    table::{self, NodeTable},
};
use netmanager_api::{conditions::Concern, table as wire};

use crate::revoked::Concerning;

/// What one stream was sent last.
#[derive(Debug, Default)]
pub(crate) struct Sent {
    assignments: Option<Assignments>,
    revoked: Concerning,
    tables: BTreeMap<String, wire::Table>,
    /// The entry up to which everything was looked at.
    seen: Option<u64>,
}

impl Sent {
    /// What the cluster's tables name.
    pub(crate) fn concern(&self) -> Concern {
        let mut concern = Concern::default();
        for table in self.tables.values() {
            concern.add(table);
        }
        concern
    }
}

/// What is new for `cluster` since `sent`; `sent` is brought up to date.
pub(crate) fn news(base: &KnowledgeBase, cluster: &Name, sent: &mut Sent) -> Vec<ToAgent> {
    let seen = sent.seen.replace(base.index);
    let assignments = new_assignments(base, cluster, sent, seen).map(ToAgent::Assignments);
    let tables = new_tables(base, cluster, sent, seen);
    let tables = (!tables.is_empty()).then_some(ToAgent::Tables(tables));
    // The tables first: an instance that starts finds its node's services known.
    tables.into_iter().chain(assignments).collect()
}

fn new_assignments(
    base: &KnowledgeBase,
    cluster: &Name,
    sent: &mut Sent,
    seen: Option<u64>,
) -> Option<Assignments> {
    let may_differ = seen.is_none_or(|seen| base.orders_changed(cluster, seen));
    let revoked = sent.revoked.look(base, cluster);
    let last = sent.assignments.as_ref();
    if !may_differ && last.is_some_and(|last| last.revoked == *revoked) {
        return None;
    }
    let list = assignment::project(base, cluster);
    if last.is_some_and(|last| (&last.list, &last.revoked) == (&list, revoked)) {
        return None;
    }
    let incarnation = base.mesh.as_ref().map_or(0, |mesh| mesh.incarnation);
    let assignments = Assignments {
        revision: (incarnation, base.index),
        list,
        revoked: revoked.clone(),
    };
    sent.assignments = Some(assignments.clone());
    Some(assignments)
}

fn new_tables(
    base: &KnowledgeBase,
    cluster: &Name,
    sent: &mut Sent,
    seen: Option<u64>,
) -> BTreeMap<String, wire::Table> {
    let changed = seen.map_or(Changed::All, |seen| base.tables_changed(cluster, seen));
    let nodes = base.clusters.get(cluster).map(|it| &it.nodes);
    let looked_at: Vec<&String> = match &changed {
        Changed::All => {
            let is_there = |node: &str| nodes.is_some_and(|nodes| nodes.contains_key(node));
            sent.tables.retain(|node, _| is_there(node));
            nodes.into_iter().flat_map(BTreeMap::keys).collect()
        }
        Changed::Nodes(nodes) => nodes.iter().collect(),
    };
    if looked_at.is_empty() {
        return BTreeMap::new();
    }
    let awaited = awaited_revision(base);
    let mut new = BTreeMap::new();
    for node in looked_at {
        let Some(table) = table::project(base, cluster, node).map(to_wire) else {
            continue;
        };
        let is_new = sent
            .tables
            .get(node)
            .is_none_or(|last| differs(last, &table) || Some(last.revision) < awaited);
        if is_new {
            sent.tables.insert(node.clone(), table.clone());
            new.insert(node.clone(), table);
        }
    }
    new
}

/// The newest revision that a running migration waits for.
fn awaited_revision(base: &KnowledgeBase) -> Option<wire::Revision> {
    base.migrations
        .values()
        .filter_map(|migration| match migration.state {
            State::Repointing { revision } => Some(revision_to_wire(revision)),
            _ => None,
        })
        .max()
}

/// Whether two tables differ in more than their revision.
fn differs(a: &wire::Table, b: &wire::Table) -> bool {
    (&a.mesh, &a.node, &a.peers, &a.services, &a.spliced)
        != (&b.mesh, &b.node, &b.peers, &b.services, &b.spliced)
}

fn revision_to_wire(revision: table::Revision) -> wire::Revision {
    wire::Revision {
        incarnation: revision.incarnation,
        index: revision.index,
    }
}

/// The table in the words of the NetManager's door.
fn to_wire(table: NodeTable) -> wire::Table {
    wire::Table {
        revision: revision_to_wire(table.revision),
        mesh: wire::Mesh {
            prefix6: table.prefix6,
            prefix4: table.prefix4,
            seed: table.seed,
        },
        node: wire::Node {
            number: table.number,
            blocks4: table.blocks4,
            carbon_g_kwh: Some(table.carbon_g_kwh),
        },
        peers: table.peers.into_iter().map(peer_to_wire).collect(),
        services: table.services.into_iter().map(service_to_wire).collect(),
        spliced: table.spliced.iter().map(ToString::to_string).collect(),
    }
}

fn peer_to_wire(peer: table::Peer) -> wire::Peer {
    wire::Peer {
        number: peer.number,
        name: peer.name,
        public_key: peer.public_key,
        endpoint: peer.endpoint,
        blocks4: peer.blocks4,
        carbon_g_kwh: Some(peer.carbon_g_kwh),
    }
}

fn service_to_wire(service: table::Service) -> wire::Service {
    wire::Service {
        name: service.name.to_string(),
        number: service.number,
        ports: service
            .ports
            .into_iter()
            .map(|port| wire::Port {
                protocol: match port.protocol {
                    Protocol::Tcp => wire::Protocol::Tcp,
                    Protocol::Udp => wire::Protocol::Udp,
                },
                port: port.port,
                target_port: port.target_port,
                follow: port.follow,
            })
            .collect(),
        vips: service
            .vips
            .into_iter()
            .map(|vip| wire::Vip {
                policy: wire::PolicyName(vip.policy.0),
                instance: vip.instance,
                addr6: vip.addr6,
                addr4: vip.addr4,
            })
            .collect(),
        backends: service
            .backends
            .into_iter()
            .map(|backend| wire::Backend {
                instance: backend.instance,
                epoch: backend.epoch,
                node: backend.node,
                addr6: backend.endpoint.addr6,
                addr4: backend.endpoint.addr4,
                state: match backend.state {
                    table::BackendState::Ready => wire::BackendState::Ready,
                    table::BackendState::Draining => wire::BackendState::Draining,
                    table::BackendState::Probing => wire::BackendState::Probing,
                },
            })
            .collect(),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::net::{IpAddr, Ipv4Addr};

    use control_core::{
        base::{Binding, Mesh},
        command::{Batch, Command},
        name::Slot,
        plan::Inputs,
        report::{ClusterFacts, EndpointFact, InstanceReport, NodeReport, Phase, Report, Tier},
    };

    use super::*;

    pub(crate) fn edge() -> Name {
        "edge".parse().unwrap()
    }

    fn apply(base: &mut KnowledgeBase, command: Command) {
        let batch = Batch {
            log_time_ms: 1_000,
            commands: vec![command],
        };
        let outcomes = base.apply(base.index + 1, &batch);
        assert!(outcomes.iter().all(Result::is_ok), "{outcomes:?}");
    }

    pub(crate) fn report(base: &mut KnowledgeBase, nodes: &[&str], rtt_us: u32) {
        let node = |name: &&str| {
            let node = NodeReport {
                ready: true,
                cpu_milli: 1_000,
                memory_bytes: 1 << 30,
                gpus: 0,
                public_key: format!("key of {name}"),
                tunnel: None,
                underlay: vec![IpAddr::V4(Ipv4Addr::LOCALHOST)],
                applied: (0, 0),
                rtt_us: [(9, rtt_us)].into(),
                reached: Vec::new(),
                draining_flows: Vec::new(),
                used4: Vec::new(),
            };
            ((*name).to_owned(), node)
        };
        let report = Report {
            nodes: nodes.iter().map(node).collect(),
            instances: Vec::new(),
        };
        let command = Command::Report {
            cluster: edge(),
            session: 1,
            report: Box::new(report),
        };
        apply(base, command);
    }

    pub(crate) fn base() -> KnowledgeBase {
        let mut base = KnowledgeBase::default();
        let mesh = Mesh {
            name: "demo".to_owned(),
            prefix6: "fd00:1:2::/48".parse().unwrap(),
            prefix4: None,
            seed: 1,
            incarnation: 0,
            lease_ms: 10_000,
        };
        apply(&mut base, Command::InitMesh(mesh));
        let facts = ClusterFacts {
            tier: Tier::Edge,
            region: "de".to_owned(),
            labels: BTreeMap::new(),
            cpu_price_ueur_h: 1,
            memory_price_ueur_h: 1,
            egress_price_ueur_gib: 1,
            cpu_power_mw: 1,
            carbon_g_kwh: 1,
            prefixes: Vec::new(),
        };
        let command = Command::RegisterCluster {
            cluster: edge(),
            session: 1,
            facts: Box::new(facts),
        };
        apply(&mut base, command);
        base
    }

    fn tables(messages: &[ToAgent]) -> Vec<&str> {
        let tables = messages.iter().find_map(|message| match message {
            ToAgent::Tables(tables) => Some(tables.keys().map(String::as_str).collect()),
            _ => None,
        });
        tables.unwrap_or_default()
    }

    /// An application of two services, of which one calls the other, both bound in the cluster and ready on its nodes.
    fn run_shop(base: &mut KnowledgeBase, nodes: &[&str]) {
        let goal = "\
apiVersion: weft.dev/v1alpha1
kind: MeshApplication
metadata: { name: shop }
spec:
  services:
    - { name: front, image: front }
    - { name: stock, image: stock, ports: [{ name: http, port: 80 }] }
  links: [{ from: front, to: stock }]
";
        for goal in control_core::goal::parse(goal).unwrap() {
            apply(base, Command::Apply(Box::new(goal)));
        }
        let now_ms = base.log_time_ms;
        for command in control_core::plan::plan(base, &Inputs::default(), now_ms) {
            apply(base, command);
        }
        say(base, nodes, 2);
    }

    /// The cluster reports every instance at endpoint `endpoint` of a node of its own.
    fn say(base: &mut KnowledgeBase, nodes: &[&str], endpoint: u16) {
        let slots: Vec<_> = base.slots.iter().collect();
        let instance = |(at, (slot, bindings)): (usize, &(&Slot, &BTreeMap<u64, Binding>))| {
            let node = nodes[at % nodes.len()];
            let number = base.clusters[&edge()].nodes[node].number;
            InstanceReport {
                id: slot.at(*bindings.keys().next().unwrap()),
                node: node.to_owned(),
                phase: Phase::Ready,
                endpoint: Some(EndpointFact {
                    addr6: format!("fd00:1:2:0:0:{number:x}:0:{endpoint:x}")
                        .parse()
                        .unwrap(),
                    addr4: None,
                }),
                reason: String::new(),
            }
        };
        let report = Report {
            nodes: base.clusters[&edge()]
                .nodes
                .iter()
                .map(|(name, node)| (name.clone(), node.report.clone()))
                .collect(),
            instances: slots.iter().enumerate().map(instance).collect(),
        };
        let command = Command::Report {
            cluster: edge(),
            session: 1,
            report: Box::new(report),
        };
        apply(base, command);
    }

    #[test]
    fn an_endpoint_s_change_is_told_to_the_caller_s_node_alone_and_orders_nothing() {
        let (mut base, mut sent) = (base(), Sent::default());
        let nodes = ["n1", "n2", "n3"];
        report(&mut base, &nodes, 100);
        run_shop(&mut base, &nodes);
        news(&base, &edge(), &mut sent);
        say(&mut base, &nodes, 3);
        let told = news(&base, &edge(), &mut sent);
        assert_eq!(tables(&told), ["n1"], "{told:?}");
        assert_eq!(told.len(), 1, "{told:?}");
        assert_eq!(news(&base, &edge(), &mut sent), []);
    }

    #[test]
    fn only_what_changed_is_sent_and_a_new_stream_gets_everything() {
        let (mut base, mut sent) = (base(), Sent::default());
        report(&mut base, &["n1"], 100);
        let first = news(&base, &edge(), &mut sent);
        assert_eq!(tables(&first), ["n1"]);
        assert!(matches!(first.last(), Some(ToAgent::Assignments(_))));
        assert_eq!(news(&base, &edge(), &mut sent), []);
        report(&mut base, &["n1"], 200);
        assert_eq!(news(&base, &edge(), &mut sent), []);
        report(&mut base, &["n1", "n2"], 200);
        assert!(tables(&news(&base, &edge(), &mut sent)).contains(&"n2"));
        let again = news(&base, &edge(), &mut Sent::default());
        assert_eq!(tables(&again), ["n1", "n2"]);
    }
}
