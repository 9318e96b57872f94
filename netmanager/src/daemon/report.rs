//! What is said of the node: flows to draining backends, round-trip times, reached backends, endpoints.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddrV6,
};

use ebpf_common::{addr::Mesh6, layout::Addr};
use netmanager_api::{
    stream::{DrainingFlows, Hello, InstanceRef, Measured},
    table::{Backend, BackendState, Protocol, Service, Table},
};

use super::node::Node;
use crate::{
    follow::{Outbox, chain},
    probe::{Probes, Targets, reach::ReachBy, rtt::Interest},
};

impl Node {
    /// Probes what the table names, from the endpoint that it gives this node. Without probes the node goes on
    /// and takes every peer for reachable.
    pub(super) async fn probe(&mut self, table: &Table) {
        let Some(mesh) = Mesh6::new(table.mesh.prefix6.network().to_bits()) else {
            return; // Such a table was refused with its addresses.
        };
        if self.probes.is_none() {
            let shutdown = self.parts.shutdown.clone();
            match Probes::start(mesh, table.node.number, shutdown).await {
                Ok(probes) => {
                    let observed = probes.observed();
                    self.probes = Some((probes, observed));
                }
                Err(error) => tracing::warn!(error = chain(&error), "no probes"),
            }
        }
        let Some((probes, _)) = &self.probes else {
            return;
        };
        let mut reach = BTreeMap::new();
        for service in &table.services {
            for backend in &service.backends {
                if backend.state == BackendState::Probing {
                    reach.insert(instance_of(service, backend), way_to(service, backend));
                }
            }
        }
        let services = table.services.iter();
        let backends = services.flat_map(|service| &service.backends);
        let in_use: BTreeSet<u32> = backends.map(|backend| backend.node).collect();
        let interest = |number: u32| {
            if in_use.contains(&number) {
                Interest::InUse
            } else {
                Interest::Known
            }
        };
        let peers = table.peers.iter();
        probes.set(Targets {
            nodes: peers
                .map(|peer| (peer.number, interest(peer.number)))
                .collect(),
            reach,
        });
    }

    /// Waits until the probes found something new.
    pub(super) async fn observed(&mut self) {
        if let Some((_, observed)) = &mut self.probes
            && observed.changed().await.is_ok()
        {
            return;
        }
        std::future::pending().await
    }

    /// The draining backends, with their index in the kernel.
    pub(super) fn draining(&self) -> impl Iterator<Item = (InstanceRef, Option<u32>)> + '_ {
        let services = self.table.iter().flat_map(|table| &table.services);
        let backends = services.flat_map(|service| {
            service
                .backends
                .iter()
                .map(move |backend| (service, backend))
        });
        backends
            .filter(|(_, backend)| backend.state == BackendState::Draining)
            .map(|(service, backend)| {
                let addr = Addr::from_v6(backend.addr6.to_bits());
                (instance_of(service, backend), self.planner.index_of(addr))
            })
    }

    /// Tells the agent and the metrics what changed.
    pub(super) fn publish(&self) {
        let draining_flows = match &self.census {
            // Nothing is said before flows were counted: an agent would take silence for zero.
            None => Vec::new(),
            Some(census) => self
                .draining()
                .map(|(instance, index)| {
                    let flows = index.and_then(|index| census.by_backend.get(&index).copied());
                    DrainingFlows {
                        instance,
                        flows: flows.unwrap_or(0),
                    }
                })
                .collect(),
        };
        let measured = Measured {
            rtt_us: self.sight.rtt_us.clone(),
            unreachable: self.sight.unreachable.iter().copied().collect(),
            reached: self.reached.iter().cloned().collect(),
            draining_flows,
            coordinate: self.coordinate,
        };
        let hello = self.hello();
        let endpoints = self.attachments.endpoints();
        let applied = self.parts.outbox.borrow().applied;
        self.parts.gauges.send_modify(|gauges| {
            gauges.endpoints = endpoints.len() as u64;
            gauges.vips = self.planner.have().vips.len() as u64;
            gauges.applied = applied.unwrap_or_default();
            gauges.table_since = self.table_since;
            gauges.has_trouble = self.trouble.is_some();
            gauges.unreachable = self.sight.unreachable.len();
            gauges.rtt_us.clone_from(&self.sight.rtt_us);
            gauges.tunnel_mtu = self.tunnel().map_or(0, |tunnel| tunnel.mtu);
            gauges.map_entries = self.map_entries();
            if gauges.map_sizes.is_empty() {
                gauges.map_sizes = self.parts.datapath.map_sizes();
            }
        });
        self.parts.outbox.send_if_modified(|outbox| {
            let now = Outbox {
                hello,
                endpoints,
                measured,
                applied,
            };
            let is_new = *outbox != now;
            *outbox = now;
            is_new
        });
    }

    fn hello(&self) -> Option<Hello> {
        let device = self.parts.tunnel.announced()?;
        Some(Hello {
            node: self.parts.settings.node.clone(),
            public_key: device.public_key.to_string(),
            tunnel_port: device.port,
            underlay: self.parts.underlay.clone(),
            applied: None,
            version: env!("CARGO_PKG_VERSION").to_owned(),
        })
    }
}

fn instance_of(service: &Service, backend: &Backend) -> InstanceRef {
    InstanceRef {
        service: service.name.clone(),
        instance: backend.instance,
        epoch: backend.epoch,
    }
}

/// By its first TCP port; a service without one must answer an echo.
fn way_to(service: &Service, backend: &Backend) -> ReachBy {
    let tcp = service
        .ports
        .iter()
        .find(|port| port.protocol == Protocol::Tcp);
    match tcp {
        Some(port) => ReachBy::Tcp(SocketAddrV6::new(backend.addr6, port.target_port, 0, 0)),
        None => ReachBy::Echo(backend.addr6),
    }
}
