//! What the agent tells the leads: a pure function of what it knows.
//!
//! An instance is reported as ready when its process serves *and* its node names its endpoint *and* the node
//! stands (or the process serves on undisturbed while its NetManager is away for a moment). What was told to
//! stop is reported as stopped once nothing of it is left.

use std::net::{Ipv4Addr, SocketAddr};

use control_core::{
    assignment::Want,
    report::{EndpointFact, InstanceId, InstanceReport, NodeReport, Phase, Report},
};

use crate::{
    driver::{State, Status},
    nodes::{Node, Standing, instance_id},
    reconcile::{Verdict, View},
    smooth::flows,
};

/// The complete report of this moment.
#[must_use]
pub fn report(view: &View<'_>) -> Report {
    let nodes = view.nodes.iter();
    let mut instances: Vec<InstanceReport> = Vec::new();
    for (id, order) in view.orders.into_iter().flatten() {
        let status = view.statuses.get(id);
        instances.push(match &order.want {
            Want::Stop => stopping(id, status),
            Want::Run(_) => running(view, id, status),
        });
    }
    let unasked = view.statuses.iter().filter(|(id, _)| !is_asked(view, id));
    instances.extend(unasked.map(|(id, status)| running(view, id, Some(status))));
    instances.sort_by(|a, b| a.id.cmp(&b.id));
    Report {
        nodes: nodes
            .map(|(name, node)| (name.clone(), node_report(view, node)))
            .collect(),
        instances,
    }
}

fn is_asked(view: &View<'_>, id: &InstanceId) -> bool {
    view.orders.is_some_and(|orders| orders.contains_key(id))
}

fn node_report(view: &View<'_>, node: &Node) -> NodeReport {
    let hello = node.known.hello.as_ref();
    let tunnel = hello.and_then(|hello| {
        let address = hello.underlay.first()?;
        Some(SocketAddr::new(*address, hello.tunnel_port))
    });
    let endpoints = node.known.endpoints.iter();
    let mut used4: Vec<Ipv4Addr> = endpoints.filter_map(|endpoint| endpoint.addr4).collect();
    used4.sort();
    let applied = node.known.applied.unwrap_or_default();
    let mut reached: Vec<InstanceId> = node.measured.reached.iter().map(instance_id).collect();
    reached.sort();
    let mut draining: Vec<(InstanceId, u64)> = node
        .measured
        .draining_flows
        .iter()
        .map(|draining| (instance_id(&draining.instance), flows(draining.flows)))
        .collect();
    draining.sort();
    NodeReport {
        ready: node.standing(view.now) == Standing::Ready,
        cpu_milli: node.capacity.cpu.as_milli(),
        memory_bytes: node.capacity.memory.get(),
        gpus: node.capacity.gpus,
        public_key: hello
            .map(|hello| hello.public_key.clone())
            .unwrap_or_default(),
        tunnel,
        underlay: hello
            .map(|hello| hello.underlay.clone())
            .unwrap_or_default(),
        used4,
        applied: (applied.incarnation, applied.index),
        rtt_us: node.rtt.reported(),
        reached,
        draining_flows: draining,
    }
}

fn stopping(id: &InstanceId, status: Option<&Status>) -> InstanceReport {
    let node = status.map(|status| status.node.clone()).unwrap_or_default();
    let done = status.is_some_and(|status| matches!(status.state, State::Gone | State::Refused));
    if done {
        told(id, node, Phase::Stopped, "")
    } else {
        told(id, node, Phase::NotReady, "it is being stopped")
    }
}

fn running(view: &View<'_>, id: &InstanceId, status: Option<&Status>) -> InstanceReport {
    let node = status.map(|status| status.node.clone()).unwrap_or_default();
    let left = status.is_some_and(|status| !matches!(status.state, State::Gone | State::Refused));
    match view.ledger.verdicts.get(id) {
        Some(_) if left => return told(id, node, Phase::NotReady, "it is being stopped"),
        Some(Verdict::Refused(reason)) => return told(id, node, Phase::Refused, reason),
        Some(Verdict::Fenced) => {
            let reason = "the lease ended and it has one writer";
            return told(id, node, Phase::Stopped, reason);
        }
        None => {}
    }
    let Some(status) = status else {
        return told(id, node, Phase::Starting, "it waits for a node");
    };
    let reason = status.reason.as_str();
    match status.state {
        State::Starting => told(id, node, Phase::Starting, reason),
        State::Stopping | State::Gone if is_asked(view, id) => told(
            id,
            String::new(),
            Phase::Starting,
            "it waits for another node",
        ),
        State::Stopping => told(id, node, Phase::NotReady, "it is being stopped"),
        State::Gone => told(id, node, Phase::Stopped, ""),
        State::Refused => told(id, node, Phase::Refused, reason),
        State::Silent | State::Restarting => InstanceReport {
            endpoint: endpoint(view, id, status),
            ..told(id, node, Phase::NotReady, reason)
        },
        State::Serving => match endpoint(view, id, status) {
            None => told(
                id,
                node,
                Phase::Starting,
                "its node does not name its endpoint yet",
            ),
            endpoint if view.serves(id, status) => InstanceReport {
                endpoint,
                ..told(id, node, Phase::Ready, "")
            },
            endpoint => InstanceReport {
                endpoint,
                ..told(id, node, Phase::NotReady, "its node is away")
            },
        },
    }
}

fn endpoint(view: &View<'_>, id: &InstanceId, status: &Status) -> Option<EndpointFact> {
    view.nodes.get(&status.node)?.endpoint(id)
}

fn told(id: &InstanceId, node: String, phase: Phase, reason: &str) -> InstanceReport {
    InstanceReport {
        id: id.clone(),
        node,
        phase,
        endpoint: None,
        reason: reason.to_owned(),
    }
}

#[cfg(test)]
mod tests;
