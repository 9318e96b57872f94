//! The Knowledge Base in the words of the control API.

use std::collections::{BTreeMap, BTreeSet};

use control_api::http::{
    Application, Binding, Cluster, Member, Mesh, Migration, Node, PlacedSlot, Port, Service,
    Status, Vip,
};
use control_core::{
    base::{self, AppState, BindingState, ClusterState, KnowledgeBase},
    goal::{Application as Goal, Protocol},
    migration::State,
    name::{AppName, ServiceName},
    placement::{self, Verdict},
    plan::Failover,
    report::Phase,
};
use serde::Serialize;

use crate::{lead::Lead, leases::failover};

/// A plain variant's name as JSON writes it.
fn word<T: Serialize>(value: T) -> String {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(word)) => word,
        Ok(other) => other.to_string(),
        Err(error) => error.to_string(),
    }
}

pub(super) fn applications(base: &KnowledgeBase) -> Vec<Application> {
    let show = |(name, app): (&AppName, &AppState)| {
        let services: Vec<ServiceName> = app
            .spec
            .services
            .keys()
            .map(|service| app.spec.name.service(service))
            .collect();
        Application {
            name: name.to_string(),
            generation: app.generation,
            wanted: app.spec.services.values().map(|it| it.replicas).sum(),
            ready: services.iter().map(|it| ready(base, it)).sum(),
            services: services.iter().map(ToString::to_string).collect(),
            changed_ms: app.changed_ms,
        }
    };
    base.applications.iter().map(show).collect()
}

/// How many slots of a service have a live binding that is ready.
fn ready(base: &KnowledgeBase, service: &ServiceName) -> u32 {
    let replicas = base.goal(service).map_or(0, |goal| goal.replicas);
    let is_ready = |instance: &u32| {
        base.live(&service.slot(*instance))
            .is_some_and(|(_, binding)| binding.phase == Phase::Ready)
    };
    let count = (0..replicas).filter(is_ready).count();
    u32::try_from(count).unwrap_or(u32::MAX)
}

pub(super) fn services(base: &KnowledgeBase) -> Vec<Service> {
    base.services
        .iter()
        .map(|(name, service)| service_of(base, name, service))
        .collect()
}

fn service_of(base: &KnowledgeBase, name: &ServiceName, service: &base::Service) -> Service {
    let goal = base.goal(name);
    let wanted = goal.map_or(0, |goal| goal.replicas);
    let clusters: BTreeSet<String> = (0..wanted)
        .filter_map(|instance| base.live(&name.slot(instance)))
        .map(|(_, binding)| binding.cluster.to_string())
        .collect();
    let ports = goal.map(|goal| goal.ports.as_slice()).unwrap_or_default();
    Service {
        name: name.to_string(),
        number: service.number6,
        wanted,
        ready: ready(base, name),
        clusters: clusters.into_iter().collect(),
        ports: ports
            .iter()
            .map(|port| Port {
                name: port.name.to_string(),
                protocol: match port.protocol {
                    Protocol::Tcp => "TCP".to_owned(),
                    Protocol::Udp => "UDP".to_owned(),
                },
                port: port.port,
                target_port: port.target_port,
            })
            .collect(),
        vips: base
            .vips(name)
            .into_iter()
            .map(|vip| Vip {
                policy: vip.policy.to_string(),
                instance: vip.instance,
                addr6: vip.addr6,
                addr4: vip.addr4,
            })
            .collect(),
    }
}

pub(super) fn bindings(base: &KnowledgeBase) -> Vec<Binding> {
    base.slots
        .iter()
        .flat_map(|(slot, lives)| lives.iter().map(move |(epoch, life)| (slot, epoch, life)))
        .map(|(slot, epoch, life)| Binding {
            slot: slot.to_string(),
            epoch: *epoch,
            cluster: life.cluster.to_string(),
            node: life.node.clone(),
            state: match life.state {
                BindingState::Active => "active",
                BindingState::Probing => "probing",
                BindingState::Draining { .. } => "draining",
                BindingState::Stopping => "stopping",
            }
            .to_owned(),
            phase: word(life.phase),
            reason: life.reason.clone(),
            generation: life.generation,
            addr6: life.endpoint.as_ref().map(|endpoint| endpoint.addr6),
            addr4: life.endpoint.as_ref().and_then(|endpoint| endpoint.addr4),
            since_ms: life.since_ms,
        })
        .collect()
}

pub(super) fn clusters(base: &KnowledgeBase) -> Vec<Cluster> {
    let mut bound: BTreeMap<_, u32> = BTreeMap::new();
    for life in base.slots.values().flat_map(BTreeMap::values) {
        *bound.entry(&life.cluster).or_default() += 1;
    }
    let count = |nodes: usize| u32::try_from(nodes).unwrap_or(u32::MAX);
    base.clusters
        .iter()
        .map(|(name, cluster)| {
            let (state, lost_since_ms) = match cluster.state {
                ClusterState::Ready => ("ready", None),
                ClusterState::Lost { since_ms } => ("lost", Some(since_ms)),
            };
            let ready = cluster.nodes.values().filter(|node| is_ready(node));
            Cluster {
                name: name.to_string(),
                state: state.to_owned(),
                lost_since_ms,
                drained_since_ms: cluster.drained_since_ms,
                leaving_since_ms: cluster.leaving_since_ms,
                certificate_ends_ms: cluster.certificate_ends_ms,
                tier: cluster.facts.tier,
                region: cluster.facts.region.clone(),
                labels: cluster.facts.labels.clone(),
                session: cluster.session,
                nodes: count(cluster.nodes.len()),
                ready: count(ready.count()),
                bindings: bound.get(name).copied().unwrap_or(0),
                reported_ms: cluster.reported_ms,
                without_ipv4: cluster.without_ipv4.clone(),
            }
        })
        .collect()
}

fn is_ready(node: &base::Node) -> bool {
    node.report.ready && node.absent_since_ms.is_none()
}

pub(super) fn nodes(base: &KnowledgeBase) -> Vec<Node> {
    base.clusters
        .iter()
        .flat_map(|(cluster, it)| {
            it.nodes
                .iter()
                .map(move |(name, node)| (cluster, name, node))
        })
        .map(|(cluster, name, node)| Node {
            cluster: cluster.to_string(),
            name: name.clone(),
            number: node.number,
            ready: is_ready(node),
            cpu_milli: node.report.cpu_milli,
            memory_bytes: node.report.memory_bytes,
            gpus: node.report.gpus,
            tunnel: node.report.tunnel,
            underlay: node.report.underlay.clone(),
            applied: [node.report.applied.0, node.report.applied.1],
            rtt_us: node.report.rtt_us.clone(),
        })
        .collect()
}

pub(super) fn migrations(base: &KnowledgeBase) -> Vec<Migration> {
    base.migrations
        .iter()
        .map(|(slot, migration)| Migration {
            slot: slot.to_string(),
            from: migration.from.to_string(),
            to: migration.to.to_string(),
            source: migration.source,
            target: migration.target,
            state: match migration.state {
                State::Starting => "starting",
                State::Repointing { .. } => "repointing",
                State::Draining { .. } => "draining",
                State::Stopping => "stopping",
                State::Done => "done",
                State::RolledBack => "rolled_back",
            }
            .to_owned(),
            reason: word(migration.reason),
            since_ms: migration.since_ms,
            state_since_ms: migration.state_since_ms,
        })
        .collect()
}

/// Where each slot of a goal runs, or why it does not.
pub(super) fn placed(base: &KnowledgeBase, goal: &Goal, now_ms: u64) -> Vec<PlacedSlot> {
    goal.services
        .keys()
        .map(|service| goal.name.service(service))
        .flat_map(|service| placement::explain(base, &service, now_ms))
        .map(|slot| {
            let pending = if slot.bound.is_some() {
                BTreeMap::new()
            } else {
                slot.now
                    .into_iter()
                    .map(|(cluster, verdict)| (cluster.to_string(), waiting_for(verdict)))
                    .collect()
            };
            PlacedSlot {
                slot: slot.slot.to_string(),
                cluster: slot.bound.map(|cluster| cluster.to_string()),
                decision: slot.decision,
                pending,
            }
        })
        .collect()
}

fn waiting_for(verdict: Verdict) -> Vec<String> {
    match verdict {
        Verdict::Refused(reasons) => reasons,
        Verdict::Eligible(_) => vec!["it is eligible, but not bound yet".to_owned()],
    }
}

pub(super) async fn status(lead: &Lead) -> Status {
    let stale = lead.catch_up_now().await.is_err();
    let age_ms = match stale {
        true => super::Freshness::stale(lead).await.age_ms,
        false => Some(0),
    };
    let leader = lead.leader().map(|(_, member)| member.name);
    let members = lead.members();
    let (term, log_index) = {
        let metrics = lead.raft.metrics();
        let metrics = metrics.borrow();
        (metrics.current_term, metrics.last_log_index.unwrap_or(0))
    };
    let applied_index = lead.replica.applied();
    lead.replica.read(|base| {
        let lease_ms = base.mesh.as_ref().map_or(0, |mesh| mesh.lease_ms);
        Status {
            lead: lead.name.clone(),
            leader,
            term,
            members: members
                .into_iter()
                .map(|member| Member {
                    name: member.name,
                    address: member.address,
                })
                .collect(),
            log_index,
            applied_index,
            mesh: base.mesh.as_ref().map(|mesh| Mesh {
                name: mesh.name.clone(),
                prefix6: mesh.prefix6.to_string(),
                prefix4: mesh.prefix4.map(|prefix| prefix.to_string()),
                incarnation: mesh.incarnation,
                lease_ms,
            }),
            log_time_ms: base.log_time_ms,
            failover: match failover(base, lease_ms) {
                Failover::Run => "run".to_owned(),
                Failover::Paused => "paused".to_owned(),
            },
            stale,
            age_ms,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            level: base.level,
        }
    })
}
