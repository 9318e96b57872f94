//! Assignment projection: what one cluster must run, and what it must stop.
//!
//! An assignment list is complete. Its stops come first, because a cluster stops what was bound elsewhere
//! before it starts anything (I7). An agent that is told to stop an instance which it does not know reports
//! it as [`Phase::Stopped`](crate::report::Phase::Stopped) all the same: only that word ends a stop that is
//! owed. An instance that is in no list and was reported as stopped may be forgotten.

use std::{collections::BTreeMap, net::IpAddr};

use serde::{Deserialize, Serialize};

use crate::{
    base::{Binding, BindingState, KnowledgeBase, STOP_GRACE_MS},
    goal::{Port, Requests, Writers},
    name::{Name, ServiceName, Slot},
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
    let stop = |id: InstanceId| Assignment {
        id,
        want: Want::Stop,
        grace_ms: STOP_GRACE_MS,
    };
    let owed = kb.owed_stops.get(cluster).into_iter().flatten().cloned();
    let mut stops: Vec<Assignment> = owed.map(stop).collect();
    let mut runs = Vec::new();
    let index = kb.index();
    let slots = index
        .within(cluster)
        .into_iter()
        .flat_map(|service| kb.slots.range(service.slot(0)..=service.slot(u32::MAX)));
    for (slot, bindings) in slots {
        for (epoch, binding) in bindings.iter().filter(|(_, b)| b.cluster == *cluster) {
            let id = slot.at(*epoch);
            if binding.state == BindingState::Stopping {
                stops.push(stop(id));
            } else {
                runs.push(Assignment {
                    want: Want::Run(Box::new(run(kb, slot, *epoch, binding))),
                    id,
                    grace_ms: STOP_GRACE_MS,
                });
            }
        }
    }
    stops.extend(runs);
    stops
}

fn run(kb: &KnowledgeBase, slot: &Slot, epoch: u64, binding: &Binding) -> Run {
    let template = &binding.template;
    let mut env = template.env.clone();
    let mut hosts = Vec::new();
    for callee in &template.calls {
        addresses(kb, &slot.service, callee, &mut env, &mut hosts);
    }
    env.insert("WEFT_SERVICE".to_owned(), slot.service.to_string());
    env.insert("WEFT_INSTANCE".to_owned(), slot.instance.to_string());
    env.insert("WEFT_EPOCH".to_owned(), epoch.to_string());
    env.insert("WEFT_CLUSTER".to_owned(), binding.cluster.to_string());
    Run {
        image: template.image.clone(),
        command: template.command.clone(),
        env,
        hosts,
        requests: template.requests,
        ports: template.ports.clone(),
        writers: template.writers,
    }
}

/// Tells a caller how to reach `callee`: `WEFT_<SERVICE>_<POLICY>_ADDR` (IPv4 where there is one, for programs
/// that know no better; `_ADDR4` and `_ADDR6` say which), and names for /etc/hosts: `<policy>.<service>`, and
/// `<service>` for its first policy. A service of another application is `<service>.<application>`, one of
/// another namespace `<service>.<application>.<namespace>`.
fn addresses(
    kb: &KnowledgeBase,
    caller: &ServiceName,
    callee: &ServiceName,
    env: &mut BTreeMap<String, String>,
    hosts: &mut Vec<HostLine>,
) {
    let mut name = callee.service.to_string();
    if callee.app() != caller.app() {
        name = format!("{name}.{}", callee.application);
    }
    if callee.namespace != caller.namespace {
        name = format!("{name}.{}", callee.namespace);
    }
    for (i, vip) in kb.vips(callee).into_iter().enumerate() {
        let policy = vip.policy.to_string();
        let (key, host) = match vip.instance {
            Some(instance) => (
                format!("{name}_{policy}_{instance}"),
                format!("{instance}.{policy}.{name}"),
            ),
            None => (format!("{name}_{policy}"), format!("{policy}.{name}")),
        };
        let key = format!("WEFT_{}_ADDR", key.to_uppercase().replace(['-', '.'], "_"));
        let addr6 = IpAddr::V6(vip.addr6);
        let addr4 = vip.addr4.map(IpAddr::V4);
        env.insert(key.clone(), addr4.unwrap_or(addr6).to_string());
        env.insert(format!("{key}6"), addr6.to_string());
        if let Some(addr4) = addr4 {
            env.insert(format!("{key}4"), addr4.to_string());
        }
        for address in addr4.into_iter().chain([addr6]) {
            let mut names = vec![host.clone()];
            if i == 0 {
                names.push(name.clone());
            }
            hosts.push(HostLine { address, names });
        }
    }
}
