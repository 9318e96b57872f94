//! What the daemon knows, and the reconciliation of the kernel with it.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
    time::Duration,
};

use netmanager_api::{stream::InstanceRef, table::Table};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{DaemonError, Settings, monotonic, tunnels::Carrier, wall_ms};
use crate::{
    attachments::{AttachError, Attachments},
    datapath::{BpfDatapath, Datapath, DatapathError, FlowTable, Hook},
    follow::{Outbox, chain},
    janitor::{Census, Janitor, Limits},
    links::{Links, LinksError, NodeWish},
    metrics::Gauges,
    observe::Names,
    plan::{self, Inputs, KernelState, Memory, NodeEndpoint, Shortage, TunnelDevice},
    policy::Sight,
    probe::{Observed, Probes},
    routes::Collision,
    store::{Store, StoreError},
};

const TABLE_FILE: &str = "table.json";
const SIGHT_FILE: &str = "sight.json";
pub(super) const ATTACHMENTS_FILE: &str = "attachments.json";
/// Every so many ticks everything is looked at again, changed or not.
const RESYNC_TICKS: u64 = 30;

/// What a node is made of.
pub(super) struct Parts {
    pub(super) datapath: BpfDatapath,
    pub(super) links: Links,
    pub(super) store: Store,
    pub(super) mtu: u32,
    pub(super) underlay: Vec<IpAddr>,
    pub(super) tunnel: Carrier,
    pub(super) outbox: watch::Sender<Outbox>,
    pub(super) gauges: watch::Sender<Gauges>,
    pub(super) shutdown: CancellationToken,
    pub(super) settings: Settings,
}

/// See the module.
pub(super) struct Node {
    pub(super) parts: Parts,
    pub(super) attachments: Attachments,
    /// The table as it came.
    received: Option<Arc<Table>>,
    /// The table as this node forwards by it: without IPv4 where that collides here.
    pub(super) table: Option<Arc<Table>>,
    /// Why the table or the attachments are not in the kernel; `None` when they are.
    pub(super) trouble: Option<String>,
    memory: Memory,
    pub(super) have: KernelState,
    /// The node endpoint, while nothing happened that may have changed it.
    endpoint: Option<NodeEndpoint>,
    pub(super) sight: Sight,
    pub(super) reached: BTreeSet<InstanceRef>,
    pub(super) probes: Option<(Probes, watch::Receiver<Observed>)>,
    pub(super) janitor: Janitor<FlowTable>,
    /// Of the last whole pass that began after the table came.
    pub(super) census: Option<Census>,
    pub(super) ticks: u64,
    /// When the last table came, on the kernel's monotonic clock.
    pub(super) table_since: Option<Duration>,
    /// What the numbers stand for, once somebody asked; until something changes.
    pub(super) names: Option<Arc<Names>>,
}

/// Why the kernel does not match the table.
#[derive(Debug, thiserror::Error)]
pub(super) enum ReconcileError {
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
        let received: Option<Table> = parts.store.load(TABLE_FILE)?;
        if let Some(table) = &received {
            tracing::info!(revision = ?table.revision, "going on with the last table");
        }
        let mut node = Self {
            attachments,
            received: received.map(Arc::new),
            table: None,
            trouble: None,
            memory,
            have,
            endpoint: None,
            sight: parts.store.load(SIGHT_FILE)?.unwrap_or_default(),
            reached: BTreeSet::new(),
            probes: None,
            janitor: Janitor::new(parts.datapath.flow_tables()?.into(), Limits::default()),
            census: None,
            ticks: 0,
            table_since: None,
            names: None,
            parts,
        };
        node.table.clone_from(&node.received);
        node.collect_garbage().await;
        node.reconcile().await;
        Ok(node)
    }

    /// A table came: from the agent or from a file.
    pub(super) async fn take_table(&mut self, table: Table) {
        match &self.received {
            Some(have) if table.revision < have.revision => {
                tracing::debug!(revision = ?table.revision, "ignored an older table");
                return;
            }
            Some(have) if **have == table => return,
            _ => {}
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
        let is_moved = self.received.as_ref().is_some_and(|have| {
            (have.mesh.prefix6, have.node.number) != (table.mesh.prefix6, table.node.number)
        });
        if is_moved {
            self.probes = None; // They are sent from an address that is no more.
        }
        self.received = Some(Arc::new(table));
        self.table.clone_from(&self.received);
        self.endpoint = None;
        self.census = None;
        self.table_since = Some(monotonic());
        self.janitor.restart();
        self.reconcile().await;
    }

    /// Links or addresses changed: somebody may have gone, or the node endpoint may have lost something.
    pub(super) async fn links_changed(&mut self) {
        self.endpoint = None;
        self.collect_garbage().await;
        self.reconcile().await;
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

    /// What is due by the clock: flows, rested slots, retries, a look at everything.
    pub(super) async fn tick(&mut self) {
        self.ticks += 1;
        self.sweep();
        let is_resync = self.ticks.is_multiple_of(RESYNC_TICKS);
        if is_resync {
            self.endpoint = None;
            self.collect_garbage().await;
            if let Err(error) = self.parts.store.save(SIGHT_FILE, &self.sight) {
                tracing::warn!(error = chain(&error), "failed to keep the round-trip times");
            }
        }
        if is_resync || self.trouble.is_some() || self.memory.is_resting() {
            self.reconcile().await;
        } else {
            self.publish();
        }
    }

    /// Makes the kernel match what is known, and tells who follows.
    pub(super) async fn reconcile(&mut self) {
        self.names = None;
        let result = match self.received.clone() {
            Some(received) => self.reconcile_with(&received).await,
            None => Ok(()),
        };
        let trouble = result.err().map(|error| chain(&error));
        if let Some(error) = trouble.as_ref().filter(|_| trouble != self.trouble) {
            tracing::error!(%error, "the kernel does not match the table");
        } else if trouble.is_none() && self.trouble.is_some() {
            tracing::info!("the kernel matches the table again");
        }
        if trouble.is_some() {
            // What was written before the error is not known exactly: read it back.
            match self.parts.datapath.state() {
                Ok(state) => self.have = state,
                Err(error) => tracing::error!(error = chain(&error), "failed to read the maps"),
            }
        }
        self.trouble = trouble;
        self.publish();
    }

    async fn reconcile_with(&mut self, received: &Arc<Table>) -> Result<(), ReconcileError> {
        let endpoint = match self.endpoint.clone() {
            Some(endpoint) => endpoint,
            None => self.make_endpoint(received).await?,
        };
        let table = self.table.clone().unwrap_or_else(|| received.clone());
        self.parts.tunnel.carry(&table).await;
        self.attach_programs(&endpoint)?;
        let inputs = Inputs {
            table: &table,
            node: &endpoint,
            pods: &self.attachments.pods(),
            sight: &self.sight,
            tunnel: self.tunnel(),
            quota: self.parts.settings.quota,
        };
        let want = plan::desired(&inputs, &mut self.memory, monotonic())?;
        let (vips, backends) = self.memory.take_given();
        self.parts.datapath.reset_counts(&vips, &backends)?;
        for op in plan::diff(&self.have, &want) {
            self.parts.datapath.apply(&op)?;
            self.have.apply(&op);
        }
        let revision = table.revision;
        self.parts.outbox.send_if_modified(|outbox| {
            let is_new = outbox.applied != Some(revision);
            outbox.applied = Some(revision);
            is_new
        });
        self.probe(&table).await;
        self.parts.tunnel.settle(&table);
        Ok(())
    }

    /// Makes the node endpoint, its routes and guards, where the mesh's prefixes are free.
    async fn make_endpoint(
        &mut self,
        received: &Arc<Table>,
    ) -> Result<NodeEndpoint, ReconcileError> {
        let table = self.check_prefixes(received).await?;
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
        self.table = Some(table);
        let endpoint = self.parts.links.ensure_node(&wish).await?;
        self.endpoint = Some(endpoint.clone());
        Ok(endpoint)
    }

    /// The tunnel device; a predecessor's until the own keeper has looked at it, so that a restart is no gap.
    pub(super) fn tunnel(&self) -> Option<TunnelDevice> {
        match self.parts.tunnel.device() {
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
        self.parts.datapath.attach(endpoint.ifindex, Hook::Pod)?;
        let mut others: BTreeMap<u32, Hook> = self
            .attachments
            .pods()
            .iter()
            .map(|pod| (pod.ifindex, Hook::Pod))
            .collect();
        let device = self.parts.tunnel.device();
        others.extend(device.map(|device| (device.ifindex, Hook::Tunnel)));
        for (ifindex, hook) in others {
            match self.parts.datapath.attach(ifindex, hook) {
                // It went this instant; its event follows.
                Err(DatapathError::NoLink { .. }) => {}
                result => result?,
            }
        }
        Ok(())
    }
}
