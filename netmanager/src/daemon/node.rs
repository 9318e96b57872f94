//! What the daemon knows, and the reconciliation of the kernel with it.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddrV6},
    time::Duration,
};

use ebpf_common::{addr::Mesh6, layout::Addr};
use ipnet::IpNet;
use netmanager_api::{
    stream::{DrainingFlows, Hello, InstanceRef, Measured},
    table::{Backend, BackendState, Protocol, Service, Table},
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{DaemonError, Settings, monotonic, wall_ms};
use crate::{
    attachments::{AttachError, Attachments},
    datapath::{BpfDatapath, Datapath, DatapathError, FlowTable, Hook},
    follow::{Outbox, chain},
    janitor::{Census, Janitor, Limits},
    links::{Links, LinksError, NodeWish},
    metrics::Gauges,
    plan::{self, Inputs, KernelState, Memory, NodeEndpoint, Shortage, TunnelDevice},
    policy::Sight,
    probe::{Observed, ProbeError, Probes, Targets, reach::ReachBy},
    routes::{Collision, collision},
    store::{Store, StoreError},
    wireguard::Device,
};

const TABLE_FILE: &str = "table.json";
pub(super) const ATTACHMENTS_FILE: &str = "attachments.json";
/// Pages of flows judged in a tick: a bounded share of one CPU. A pass over full maps takes some twelve ticks,
/// and one tick where somebody waits for a drain and the maps hold at most 64,000 flows.
const PAGES: usize = 16;
const PAGES_WHILE_DRAINING: usize = 64;
/// Every so many ticks everything is looked at again, changed or not.
const RESYNC_TICKS: u64 = 30;

/// What a node is made of.
pub(super) struct Parts {
    pub(super) datapath: BpfDatapath,
    pub(super) links: Links,
    pub(super) store: Store,
    pub(super) mtu: u32,
    pub(super) underlay: Vec<IpAddr>,
    pub(super) wanted: watch::Sender<Option<Table>>,
    pub(super) device: watch::Receiver<Option<Device>>,
    pub(super) outbox: watch::Sender<Outbox>,
    pub(super) gauges: watch::Sender<Gauges>,
    pub(super) shutdown: CancellationToken,
    pub(super) settings: Settings,
}

/// See the module.
pub(super) struct Node {
    pub(super) parts: Parts,
    pub(super) attachments: Attachments,
    /// The table as it is forwarded by.
    pub(super) table: Option<Table>,
    /// Why the last table or state is not in the kernel; empty when it is.
    pub(super) trouble: Option<String>,
    memory: Memory,
    have: KernelState,
    endpoint: Option<NodeEndpoint>,
    sight: Sight,
    reached: BTreeSet<InstanceRef>,
    probes: Option<(Probes, watch::Receiver<Observed>)>,
    janitor: Janitor<FlowTable>,
    census: Option<Census>,
    ticks: u64,
}

/// Why the kernel does not match the table.
#[derive(Debug, thiserror::Error)]
enum ReconcileError {
    #[error(transparent)]
    Links(#[from] LinksError),
    #[error(transparent)]
    Attach(#[from] AttachError),
    #[error(transparent)]
    Datapath(#[from] DatapathError),
    #[error(transparent)]
    Shortage(#[from] Shortage),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Probe(#[from] ProbeError),
    #[error(transparent)]
    Collision(#[from] Collision),
}

impl Node {
    /// Takes over what is in the kernel and on disk, and forwards with it.
    pub(super) async fn restore(parts: Parts) -> Result<Self, DaemonError> {
        let have = parts.datapath.state()?;
        let memory = Memory::adopt(parts.datapath.capacity(), &have, monotonic());
        let mut attachments: Attachments = parts.store.load(ATTACHMENTS_FILE)?.unwrap_or_default();
        for endpoint in have.endpoints.values() {
            attachments.raise_numbers(endpoint.number);
        }
        let tables = parts.datapath.flow_tables()?;
        let janitor = Janitor::new(tables.into(), Limits::default());
        let mut node = Self {
            attachments,
            table: None,
            trouble: None,
            memory,
            have,
            endpoint: None,
            sight: Sight::default(),
            reached: BTreeSet::new(),
            probes: None,
            janitor,
            census: None,
            ticks: 0,
            parts,
        };
        if let Some(table) = node.parts.store.load::<Table>(TABLE_FILE)? {
            tracing::info!(revision = ?table.revision, "going on with the last table");
            node.table = Some(table);
        }
        node.collect_garbage().await;
        node.reconcile().await;
        Ok(node)
    }

    /// A table came: from the agent or from a file.
    pub(super) async fn take_table(&mut self, table: Table) {
        if self
            .table
            .as_ref()
            .is_some_and(|have| table.revision < have.revision)
        {
            tracing::debug!(revision = ?table.revision, "ignored an older table");
            return;
        }
        if self.table.as_ref() == Some(&table) {
            return;
        }
        tracing::info!(
            revision = ?table.revision,
            services = table.services.len(),
            peers = table.peers.len(),
            "took a table"
        );
        if let Err(error) = self.parts.store.save(TABLE_FILE, &table) {
            // Forwarding by it matters more; a reboot would start with the one before.
            tracing::error!(error = chain(&error), "failed to keep the table on disk");
        }
        self.table = Some(table);
        self.census = None;
        self.janitor.restart();
        self.reconcile().await;
    }

    /// Links or addresses changed: somebody may have gone, or the node endpoint may have lost something.
    pub(super) async fn links_changed(&mut self) {
        self.endpoint = None;
        self.collect_garbage().await;
        self.reconcile().await;
    }

    /// The tunnel device is there, or another.
    pub(super) async fn tunnel_changed(&mut self) {
        self.reconcile().await;
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

    /// Takes what the probes found.
    pub(super) async fn take_sight(&mut self) {
        let Some((_, observed)) = &mut self.probes else {
            return;
        };
        let observed = observed.borrow_and_update().clone();
        for node in observed
            .unreachable
            .symmetric_difference(&self.sight.unreachable)
        {
            let answers = !observed.unreachable.contains(node);
            tracing::info!(node, answers, "a peer changed");
        }
        self.sight = Sight {
            rtt_us: observed.rtt_us,
            unreachable: observed.unreachable,
        };
        self.reached = observed.reached;
        self.reconcile().await;
    }

    /// What is due by the clock: flows, rested slots, retries.
    pub(super) async fn tick(&mut self) {
        self.ticks += 1;
        self.sweep();
        if self.ticks.is_multiple_of(RESYNC_TICKS) {
            self.endpoint = None;
            self.collect_garbage().await;
        }
        let is_due = self.trouble.is_some()
            || self.memory.is_resting()
            || self.ticks.is_multiple_of(RESYNC_TICKS);
        if is_due {
            self.reconcile().await;
        } else {
            self.publish();
        }
    }

    fn sweep(&mut self) {
        let is_waited_for = self.draining().next().is_some();
        let pages = if is_waited_for {
            PAGES_WHILE_DRAINING
        } else {
            PAGES
        };
        for _ in 0..pages {
            match self.janitor.step(&self.have.backends, monotonic()) {
                Ok(None) => {}
                Ok(Some(census)) => {
                    self.parts.gauges.send_modify(|gauges| {
                        gauges.flows = ["FLOWS", "FLOWS_LRU"]
                            .into_iter()
                            .zip(census.kept.clone())
                            .collect();
                        gauges.flows_removed += census.removed;
                    });
                    self.census = Some(census);
                    return;
                }
                Err(error) => {
                    tracing::warn!(error = chain(&error), "failed to look at the flows");
                    return;
                }
            }
        }
    }

    /// Makes the kernel match what is known, and tells who follows.
    pub(super) async fn reconcile(&mut self) {
        let result = match self.table.clone() {
            Some(table) => self.reconcile_with(table).await,
            None => Ok(()),
        };
        let trouble = result.err().map(|error| chain(&error));
        if let Some(error) = trouble.as_ref().filter(|_| trouble != self.trouble) {
            tracing::error!(%error, "the kernel does not match the table");
            // What was written before the error is not known exactly: read it back.
            match self.parts.datapath.state() {
                Ok(state) => self.have = state,
                Err(error) => tracing::error!(error = chain(&error), "failed to read the maps"),
            }
        } else if trouble.is_none() && self.trouble.is_some() {
            tracing::info!("the kernel matches the table again");
        }
        self.trouble = trouble;
        self.publish();
    }

    async fn reconcile_with(&mut self, mut table: Table) -> Result<(), ReconcileError> {
        if self.endpoint.is_none() {
            self.check_prefixes(&mut table).await?;
            let before = self.attachments.clone();
            let (addr6, addr4) = self.attachments.node_addresses(&table, wall_ms())?;
            if before != self.attachments {
                self.parts.store.save(ATTACHMENTS_FILE, &self.attachments)?;
            }
            let (name, peer) = self.parts.settings.endpoint_names.clone();
            let wish = NodeWish {
                name,
                peer,
                mtu: self.parts.mtu,
                mesh6: table.mesh.prefix6,
                mesh4: table.mesh.prefix4,
                addr6,
                addr4,
            };
            self.endpoint = Some(self.parts.links.ensure_node(&wish).await?);
        }
        let endpoint = self.endpoint.clone().expect("it was just made");
        self.attach_programs(&endpoint)?;
        let tunnel = self.tunnel();
        let inputs = Inputs {
            table: &table,
            node: &endpoint,
            pods: &self.attachments.pods(),
            sight: &self.sight,
            tunnel,
            quota: self.parts.settings.quota,
        };
        let want = plan::desired(&inputs, &mut self.memory, monotonic())?;
        for op in plan::diff(&self.have, &want) {
            self.parts.datapath.apply(&op)?;
            self.have.apply(&op);
        }
        self.parts.wanted.send_if_modified(|known| {
            let is_new = known.as_ref() != Some(&table);
            *known = Some(table.clone());
            is_new
        });
        let revision = table.revision;
        self.parts.outbox.send_if_modified(|outbox| {
            let is_new = outbox.applied != Some(revision);
            outbox.applied = Some(revision);
            is_new
        });
        self.probe(&table).await
    }

    /// Refuses an IPv6 prefix that collides; goes on without an IPv4 one that does.
    async fn check_prefixes(&self, table: &mut Table) -> Result<(), ReconcileError> {
        let mut own: Vec<u32> = self.have.endpoints.keys().copied().collect();
        own.extend(
            self.parts
                .device
                .borrow()
                .as_ref()
                .map(|device| device.ifindex),
        );
        let (name, peer) = &self.parts.settings.endpoint_names;
        for link in [name, peer] {
            own.extend(
                self.parts
                    .links
                    .by_name(link)
                    .await?
                    .map(|link| link.ifindex),
            );
        }
        let foreign = self.parts.links.foreign_routes(&own).await?;
        if let Some(collision) = collision(IpNet::V6(table.mesh.prefix6), &foreign) {
            return Err(collision.into());
        }
        let found = table
            .mesh
            .prefix4
            .and_then(|prefix| collision(IpNet::V4(prefix), &foreign));
        if let Some(collision) = found {
            tracing::error!(%collision, "this node goes on without IPv4");
            without_ipv4(table);
        }
        Ok(())
    }

    /// The tunnel device; a predecessor's until the own keeper has looked at it, so that a restart is no gap.
    fn tunnel(&self) -> Option<TunnelDevice> {
        match self.parts.device.borrow().as_ref() {
            Some(device) => Some(TunnelDevice {
                ifindex: device.ifindex,
                mtu: device.mtu,
            }),
            None => self
                .have
                .config
                .filter(|config| config.tunnel_ifindex != 0)
                .map(|config| TunnelDevice {
                    ifindex: config.tunnel_ifindex,
                    mtu: config.tunnel_mtu,
                }),
        }
    }

    fn attach_programs(&mut self, endpoint: &NodeEndpoint) -> Result<(), DatapathError> {
        let datapath = &mut self.parts.datapath;
        datapath.attach(endpoint.ifindex, Hook::Pod)?;
        if let Some(device) = self.parts.device.borrow().as_ref() {
            datapath.attach(device.ifindex, Hook::Tunnel)?;
        }
        for pod in self.attachments.pods() {
            match datapath.attach(pod.ifindex, Hook::Pod) {
                // It went this instant; its event follows.
                Err(DatapathError::NoLink { .. }) => {}
                result => result?,
            }
        }
        Ok(())
    }

    async fn probe(&mut self, table: &Table) -> Result<(), ReconcileError> {
        let prefix = table.mesh.prefix6.network().to_bits();
        let Some(mesh) = Mesh6::new(prefix) else {
            return Ok(()); // `node_addresses` refused it already.
        };
        if self.probes.is_none() {
            let shutdown = self.parts.shutdown.clone();
            let probes = Probes::start(mesh, table.node.number, shutdown).await?;
            let observed = probes.observed();
            self.probes = Some((probes, observed));
        }
        let Some((probes, _)) = &self.probes else {
            return Ok(());
        };
        let reach = table.services.iter().flat_map(|service| {
            let probing = |backend: &&Backend| backend.state == BackendState::Probing;
            service
                .backends
                .iter()
                .filter(probing)
                .map(|b| (instance_of(service, b), way_to(service, b)))
        });
        probes.set(Targets {
            nodes: table.peers.iter().map(|peer| peer.number).collect(),
            reach: reach.collect(),
        });
        Ok(())
    }

    /// The draining backends, with their index in the kernel.
    fn draining(&self) -> impl Iterator<Item = (InstanceRef, Option<u32>)> + '_ {
        let indexes: BTreeMap<Addr, u32> = self
            .have
            .backends
            .iter()
            .map(|(index, backend)| (backend.addr6, *index))
            .collect();
        let services = self.table.iter().flat_map(|table| &table.services);
        services.flat_map(move |service| {
            let draining: Vec<_> = service
                .backends
                .iter()
                .filter(|backend| backend.state == BackendState::Draining)
                .map(|backend| {
                    let addr = Addr::from_v6(backend.addr6.to_bits());
                    (instance_of(service, backend), indexes.get(&addr).copied())
                })
                .collect();
            draining
        })
    }

    /// Tells the agent and the metrics what changed.
    pub(super) fn publish(&self) {
        let draining_flows = match &self.census {
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
        };
        let hello = self.hello();
        let endpoints = self.attachments.endpoints();
        self.parts.gauges.send_modify(|gauges| {
            gauges.endpoints = endpoints.len() as u64;
            gauges.vips = self.have.vips.len() as u64;
            gauges.applied_index = self
                .parts
                .outbox
                .borrow()
                .applied
                .map_or(0, |revision| revision.index);
            if gauges.map_sizes.is_empty() {
                gauges.map_sizes = self.parts.datapath.map_sizes();
            }
        });
        self.parts.outbox.send_if_modified(|outbox| {
            let now = Outbox {
                hello,
                endpoints,
                measured,
                applied: outbox.applied,
            };
            let is_new = *outbox != now;
            *outbox = now;
            is_new
        });
    }

    fn hello(&self) -> Option<Hello> {
        let device = self.parts.device.borrow();
        let device = device.as_ref()?;
        Some(Hello {
            node: self.parts.settings.node.clone(),
            public_key: device.public_key.to_string(),
            tunnel_port: device.port,
            underlay: self.parts.underlay.clone(),
            applied: None,
            version: env!("CARGO_PKG_VERSION").to_owned(),
        })
    }

    /// How long a reservation may take to be activated.
    pub(super) const RESERVATION: Duration = Duration::from_secs(60);
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

/// The table as a node without IPv4 has it.
fn without_ipv4(table: &mut Table) {
    table.mesh.prefix4 = None;
    for service in &mut table.services {
        for vip in &mut service.vips {
            vip.addr4 = None;
        }
        for backend in &mut service.backends {
            backend.addr4 = None;
        }
    }
}
