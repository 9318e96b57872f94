//! What the daemon says of itself to those who observe it.

use std::{collections::BTreeMap, path::PathBuf, sync::Arc, time::SystemTime};

use ebpf_common::{addr::NODE_ENDPOINT, layout::Endpoint};
use netmanager_api::observe::{Outcome, Trace, TraceRequest, Way, is_named};

use super::node::Node;
use crate::{
    follow::chain,
    observe::{Ask, NODE, Names, Plan, Traced, pod_name, trace},
};

/// A probe that names no source port takes one from here on: above the ports that stacks take by themselves
/// (Linux' `ip_local_port_range`, 32768 to 60999).
const PROBE_PORTS: std::ops::Range<u16> = 61_000..65_000;

impl Node {
    /// Answers one who observes; who is gone needs no answer.
    pub(super) fn explain(&mut self, ask: Ask) {
        match ask {
            Ask::Names(reply) => {
                let _ = reply.send(self.names());
            }
            Ask::Trace(request, reply) => {
                let _ = reply.send(self.trace(request));
            }
        }
    }

    /// What the numbers stand for, by the last table.
    fn names(&mut self) -> Arc<Names> {
        if let Some(names) = &self.names {
            return names.clone();
        }
        let node = &self.parts.settings.node;
        let names = Arc::new(match &self.table {
            Some(table) => Names::of(node, table, self.planner.have(), &self.attachments),
            None => Names {
                node: node.clone(),
                ..Names::default()
            },
        });
        self.names = Some(names.clone());
        names
    }

    fn trace(&mut self, mut request: TraceRequest) -> Result<Traced, String> {
        let names = self.names();
        let config = self
            .planner
            .have()
            .config
            .ok_or("this node has no table yet: there is nothing to trace")?;
        let (endpoint, netns) = self.endpoint_of(&request.from)?;
        if request.probe {
            if request.protocol == "udp" {
                let why = "a UDP probe would reach the application: probe with --proto tcp or icmp";
                return Err(why.to_owned());
            }
            request.sport.get_or_insert_with(any_port);
        }
        let live = self.parts.datapath.live().map_err(|error| chain(&error))?;
        let asker = trace::Asker {
            config: &config,
            endpoint: &endpoint,
            names: &names,
        };
        let trace = trace::trace(&live, asker, &request)?;
        let probe = request.probe.then(|| Plan {
            netns,
            is_tcp: request.protocol == "tcp",
            from: trace.source,
            to: trace.to,
            elsewhere: elsewhere(&trace),
        });
        Ok(Traced { trace, probe })
    }

    /// The endpoint of a pod, by its name or the last part of it, and its network namespace.
    fn endpoint_of(&self, wanted: &str) -> Result<(Endpoint, Option<PathBuf>), String> {
        let by_number = |number| {
            let mut endpoints = self.planner.have().endpoints.values();
            endpoints
                .find(|endpoint| endpoint.number == number)
                .copied()
        };
        if wanted == NODE {
            let own = by_number(NODE_ENDPOINT).ok_or("this node has no endpoint yet")?;
            return Ok((own, None));
        }
        let named: Vec<_> = self
            .attachments
            .iter()
            .filter(|attachment| is_named(&pod_name(attachment), wanted))
            .collect();
        let [attachment] = named[..] else {
            let all: Vec<String> = self.attachments.iter().map(pod_name).collect();
            let how_many = if named.is_empty() {
                "no"
            } else {
                "more than one"
            };
            return Err(format!(
                "{how_many} pod of this node is named {wanted:?}: it has {} and {NODE}",
                all.join(", ")
            ));
        };
        let endpoint = by_number(attachment.number)
            .ok_or_else(|| format!("{wanted} is reserved, but not attached yet"))?;
        Ok((endpoint, Some(PathBuf::from(&attachment.netns))))
    }

    /// Entries in use, of the maps that user space fills.
    pub(super) fn map_entries(&self) -> BTreeMap<&'static str, u64> {
        let have = self.planner.have();
        let slots = have.runs.values().map(|run| run.len() as u64).sum();
        BTreeMap::from([
            ("ENDPOINTS", have.endpoints.len() as u64),
            ("LOCAL", have.local.len() as u64),
            ("VIPS", have.vips.len() as u64),
            ("SLOTS", slots),
            ("BACKENDS", have.backends.len() as u64),
        ])
    }
}

/// The node of the backend, where it is another.
fn elsewhere(trace: &Trace) -> Option<String> {
    match &trace.outcome {
        Outcome::Opens { backend, .. } | Outcome::Existing { backend, .. } => match backend.way {
            Way::Tunnel { .. } => Some(backend.node.clone()),
            _ => None,
        },
        _ => None,
    }
}

/// A port that the probe before did not have, most likely.
fn any_port() -> u16 {
    let now = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
    let span = u32::from(PROBE_PORTS.end - PROBE_PORTS.start);
    PROBE_PORTS.start + (now.subsec_micros() % span) as u16
}
