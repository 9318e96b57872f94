//! What the daemon knows, and the reconciliation of the kernel with it.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
    time::Duration,
};

use ipnet::IpNet;
use netmanager_api::{
    conditions::Coordinate,
    stream::InstanceRef,
    table::{Revision, Table},
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{
    DaemonError, Settings, conditions::Told, monotonic, paths::Paths, prefixes::without_ipv4,
    tunnels::Carrier, wall_ms,
};
use crate::{
    attachments::{AttachError, Attachments},
    datapath::{BpfDatapath, Datapath, DatapathError, FlowAccounts, FlowTable, Hook},
    follow::{Outbox, chain},
    guard,
    janitor::{Census, Janitor, Limits},
    links::{Links, LinksError, NodeWish},
    metrics::Gauges,
    observe::Names,
    plan::{Inputs, KernelState, NodeEndpoint, Op, Planner, Shortage, TunnelDevice},
    policy::Sight,
    probe::{Observed, Probes},
    quota::Books,
    routes::Collision,
    store::{Store, StoreError},
    tickle::Deaths,
    tunnel::mtu_over,
};

const TABLE_FILE: &str = "table.json";
const SIGHT_FILE: &str = "sight.json";
/// The revision of the table that the kernel was made to match last.
const APPLIED_FILE: &str = "applied.json";
pub(super) const ATTACHMENTS_FILE: &str = "attachments.json";
/// Every so many ticks everything is looked at again, changed or not.
const RESYNC_TICKS: u64 = 30;

/// What a node is made of.
pub(super) struct Parts {
    pub(super) datapath: BpfDatapath,
    pub(super) links: Links,
    pub(super) store: Arc<Store>,
    /// Takes the tables that are to be kept on disk.
    pub(super) tables: watch::Sender<Option<Arc<Table>>>,
    pub(super) mtu: u32,
    pub(super) underlay: Vec<IpAddr>,
    pub(super) tunnel: Carrier,
    pub(super) outbox: watch::Sender<Outbox>,
    pub(super) gauges: watch::Sender<Gauges>,
    pub(super) deaths: watch::Sender<Arc<Deaths>>,
    pub(super) ended: watch::Receiver<u64>,
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
    /// Whether that is so.
    is_only6: bool,
    /// Whether the numbers that were given are known; else a table tells the least.
    has_numbers: bool,
    /// Why the table or the attachments are not in the kernel; `None` when they are.
    pub(super) trouble: Option<String>,
    pub(super) planner: Planner,
    /// The node endpoint, while nothing happened that may have changed it.
    endpoint: Option<NodeEndpoint>,
    /// The prefixes whose guards are noted on disk.
    guarded: Vec<IpNet>,
    pub(super) sight: Sight,
    pub(super) reached: BTreeSet<InstanceRef>,
    /// Where this node is in the network.
    pub(super) coordinate: Option<Coordinate>,
    /// What the agent said of the others.
    pub(super) told: Told,
    pub(super) probes: Option<(Probes, watch::Receiver<Observed>)>,
    pub(super) paths: Paths,
    pub(super) janitor: Janitor<FlowTable>,
    pub(super) accounts: FlowAccounts,
    pub(super) books: Books,
    /// Endpoints that are near their quota.
    pub(super) pressed: BTreeSet<u32>,
    /// Whose connections are to be ended, and up to which count they were.
    pub(super) deaths: watch::Sender<Arc<Deaths>>,
    pub(super) ended: watch::Receiver<u64>,
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

/// Whether a write ends the flows of a backend.
fn ends_flows(have: &KernelState, op: &Op) -> bool {
    let Op::Backend(index, now) = op else {
        return false;
    };
    have.backends.get(index).is_some_and(|before| {
        before.flags != 0
            && now.is_none_or(|now| now.flags == 0 || now.generation != before.generation)
    })
}

impl Node {
    /// Takes over what is in the kernel and on disk, and forwards with it.
    pub(super) async fn restore(parts: Parts) -> Result<Self, DaemonError> {
        let have = parts.datapath.state()?;
        let saved: Option<Attachments> = parts.store.load(ATTACHMENTS_FILE)?;
        let is_new = saved.is_none();
        let is_lost = is_new
            && (!have.endpoints.is_empty() || parts.store.has_any(&[TABLE_FILE, SIGHT_FILE]));
        let mut attachments = saved.unwrap_or_default();
        if is_lost {
            tracing::warn!("the attachments are lost: numbers go on after all that were given");
            attachments.begin_anew(wall_ms());
        }
        if is_new {
            parts.store.save(ATTACHMENTS_FILE, &attachments)?;
        }
        for endpoint in have.endpoints.values() {
            attachments.raise_numbers(endpoint.number);
        }
        let has_numbers = !is_new;
        let planner = Planner::adopt(parts.datapath.capacity()?, have, monotonic());
        let received = saved_table(&parts.store, planner.have().config.is_some())?;
        let accounts = parts.datapath.flow_accounts()?;
        let mut node = Self {
            attachments,
            received: received.map(Arc::new),
            table: None,
            is_only6: false,
            has_numbers,
            trouble: None,
            planner,
            endpoint: None,
            guarded: guard::kept(&parts.store)?,
            sight: parts.store.load(SIGHT_FILE)?.unwrap_or_default(),
            reached: BTreeSet::new(),
            coordinate: None,
            told: Told::default(),
            probes: None,
            paths: Paths::new(parts.datapath.peers()?)?,
            books: Books::new(accounts.settled()?),
            pressed: BTreeSet::new(),
            deaths: parts.deaths.clone(),
            ended: parts.ended.clone(),
            accounts,
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
            Some(have) if have.revision == table.revision && **have == table => return,
            _ => {}
        }
        tracing::info!(
            revision = ?table.revision,
            services = table.services.len(),
            peers = table.peers.len(),
            "took a table"
        );
        self.know_numbers(&table);
        let table = Arc::new(table);
        let before = self.received.replace(table.clone());
        let is_moved = before.as_ref().is_some_and(|have| {
            (have.mesh.prefix6, have.node.number) != (table.mesh.prefix6, table.node.number)
        });
        if is_moved {
            // They are sent from an address that is no more.
            self.probes = None;
            self.paths.probes = None;
        }
        if before.is_none_or(|have| (&have.mesh, &have.node) != (&table.mesh, &table.node)) {
            self.endpoint = None;
        }
        self.table = Some(if self.is_only6 {
            Arc::new(without_ipv4(&table))
        } else {
            table.clone()
        });
        self.keep_table(table);
        self.census = None;
        self.table_since = Some(monotonic());
        self.janitor.restart();
        self.reconcile().await;
    }

    /// Has the table written to disk. That takes as long as the table is large, and forwarding by it does not wait:
    /// what is noted at once is only which table that will be.
    fn keep_table(&self, table: Arc<Table>) {
        if let Err(error) = self.parts.store.note(APPLIED_FILE, &table.revision) {
            tracing::error!(error = chain(&error), "failed to note the table's revision");
        }
        self.parts.tables.send_replace(Some(table));
    }

    /// The state on disk was lost: the numbers that the leads still know were given.
    fn know_numbers(&mut self, table: &Table) {
        if std::mem::replace(&mut self.has_numbers, true) {
            return;
        }
        let backends = table.services.iter().flat_map(|service| &service.backends);
        for backend in backends.filter(|backend| backend.node == table.node.number) {
            self.attachments
                .raise_numbers(backend.addr6.to_bits() as u32);
        }
    }

    /// Links or addresses changed: somebody may have gone, the node endpoint may have lost something, or the
    /// underlay may carry larger or smaller packets.
    pub(super) async fn links_changed(&mut self) {
        self.endpoint = None;
        self.follow_mtu().await;
        self.collect_garbage().await;
        self.reconcile().await;
    }

    /// Takes the underlay's MTU as it is now; pods that are attached keep theirs, and are told of what is too big.
    async fn follow_mtu(&mut self) {
        let address = self.parts.settings.underlay.first().copied();
        let found = match self.parts.links.underlay_mtu(address).await {
            Ok(mtu) => u32::from(mtu_over(mtu)),
            Err(error) => {
                tracing::warn!(
                    error = chain(&error),
                    "failed to ask for the underlay's MTU"
                );
                return;
            }
        };
        if found != self.parts.mtu {
            tracing::info!(
                from = self.parts.mtu,
                to = found,
                "the underlay's MTU changed"
            );
            self.parts.mtu = found;
            self.parts.tunnel.set_mtu(found as u16);
        }
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
        self.sight.rtt_us = observed.rtt_us;
        self.sight.unreachable = observed.unreachable;
        self.reached = observed.reached;
        self.coordinate = observed.coordinate;
        self.told
            .show(self.coordinate.as_ref(), &mut self.sight, monotonic());
        self.reconcile().await;
    }

    /// What is due by the clock: flows, rested slots, retries, a look at everything.
    pub(super) async fn tick(&mut self) {
        self.ticks += 1;
        self.sweep();
        self.age().await;
        let is_resync = self.ticks.is_multiple_of(RESYNC_TICKS);
        if is_resync {
            self.endpoint = None;
            self.collect_garbage().await;
            if let Err(error) = self.parts.store.save(SIGHT_FILE, &self.sight) {
                tracing::warn!(error = chain(&error), "failed to keep the round-trip times");
            }
        }
        if is_resync || self.trouble.is_some() || self.planner.is_resting() {
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
        let is_doubtful = matches!(&result, Err(ReconcileError::Datapath(_)));
        let trouble = result.err().map(|error| chain(&error));
        if let Some(error) = trouble.as_ref().filter(|_| trouble != self.trouble) {
            tracing::error!(%error, "the kernel does not match the table");
        } else if trouble.is_none() && self.trouble.is_some() {
            tracing::info!("the kernel matches the table again");
        }
        if is_doubtful {
            // What was written before the error is not known exactly: read it back.
            match self.parts.datapath.state() {
                Ok(state) => self.planner.read_back(state),
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
        let planned = self.planner.plan(&inputs, monotonic());
        let (vips, backends) = self.planner.take_given();
        self.parts.datapath.reset_counts(&vips, &backends)?;
        let writes = self.planner.writes();
        self.parts.datapath.apply(&writes)?;
        let died = writes.iter().any(|op| ends_flows(self.planner.have(), op));
        self.planner.wrote(&writes);
        self.mourn(died);
        planned?;
        let revision = table.revision;
        self.parts.outbox.send_if_modified(|outbox| {
            let is_new = outbox.applied != Some(revision);
            outbox.applied = Some(revision);
            is_new
        });
        self.probe(&table).await;
        self.measure_paths(&table).await?;
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
        self.is_only6 = table.mesh.prefix4 != received.mesh.prefix4;
        self.table = Some(table);
        let endpoint = self.parts.links.ensure_node(&wish).await?;
        let prefixes = wish.prefixes();
        if self.guarded != prefixes {
            guard::keep(&self.parts.store, &prefixes)?;
            self.guarded = prefixes;
        }
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
                .planner
                .have()
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
        let devices = self.parts.tunnel.devices();
        others.extend(devices.map(|ifindex| (ifindex, Hook::Tunnel)));
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

/// The table on disk. Where the kernel forwards by a newer one, whose writing was cut short, there is none: going
/// back would bring dead backends to life; the agent has the newer one.
fn saved_table(store: &Store, is_forwarding: bool) -> Result<Option<Table>, StoreError> {
    let table: Option<Table> = store.load(TABLE_FILE)?;
    let applied: Option<Revision> = store.load(APPLIED_FILE)?;
    let Some(table) = table else {
        return Ok(None);
    };
    if is_forwarding && applied.is_some_and(|applied| applied > table.revision) {
        tracing::warn!(
            ?applied,
            on_disk = ?table.revision,
            "the kernel forwards by a newer table than the one on disk: waiting for the next"
        );
        return Ok(None);
    }
    tracing::info!(revision = ?table.revision, "going on with the last table");
    Ok(Some(table))
}

/// Writes the tables to disk that come in, the newest where they come faster, until nobody sends any.
pub(super) async fn keep_tables(
    store: Arc<Store>,
    mut tables: watch::Receiver<Option<Arc<Table>>>,
) {
    while tables.changed().await.is_ok() {
        let Some(table) = tables.borrow_and_update().clone() else {
            continue;
        };
        let store = store.clone();
        let saved = tokio::task::spawn_blocking(move || store.save(TABLE_FILE, &*table)).await;
        if let Ok(Err(error)) = saved {
            // Forwarding by it matters more; a reboot would start with the one before.
            tracing::error!(error = chain(&error), "failed to keep the table on disk");
        }
    }
}
