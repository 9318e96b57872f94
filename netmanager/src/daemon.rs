//! The daemon: one loop that takes what happens, and makes the kernel match what should be.
//!
//! Start, in this order: check the machine, take the state directory, put the guards back, load or take over the programs, read
//! back what the maps hold, open the CNI door, forward with the last table on disk, then follow the agent.
//! Every event changes one thing that is known ([`node`]) and ends in the same reconciliation.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime},
};

use netmanager_api::{conditions::Conditions, observe::beside};
use nix::time::{ClockId, clock_gettime};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::{mpsc, watch},
    task::JoinSet,
    time::{Instant, MissedTickBehavior, interval, sleep_until},
};
use tokio_util::sync::CancellationToken;

use crate::{
    datapath::{BpfDatapath, DatapathError, HookMode, Options, Sizes, preflight},
    door::{Door, DoorError},
    follow::{self, Agent, FollowError, Inbox, Outbox},
    guard::{self, GuardError},
    links::{self, Links, LinksError},
    metrics::{self, Gauges},
    observe,
    store::{Store, StoreError},
    table_file, tickle,
    tunnel::mtu_over,
};

mod attach;
mod conditions;
mod explain;
mod node;
mod paths;
mod prefixes;
mod report;
mod sweep;
mod tunnels;

use node::Node;
pub use tunnels::TunnelSettings;

/// How often what needs a clock is looked at.
const TICK: Duration = Duration::from_secs(1);
/// Links come and go in bursts; one look after the burst is enough.
const CALM: Duration = Duration::from_millis(20);

/// Everything that a start chooses.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The node's name within its cluster.
    pub node: String,
    /// The agent; `None` follows nobody.
    pub agent: Option<Agent>,
    /// A table in a file, instead of an agent's.
    pub table: Option<PathBuf>,
    /// The state directory.
    pub state: PathBuf,
    /// The CNI socket; the observe socket is beside it.
    pub socket: PathBuf,
    /// Where pins go.
    pub bpffs: PathBuf,
    /// How links carry programs; `None` asks the kernel.
    pub hook: Option<HookMode>,
    /// Sizes of new maps.
    pub sizes: Sizes,
    /// The cgroup v2 folder whose processes' connections may be spliced.
    pub splice: Option<PathBuf>,
    /// How many TCP connections a pod may have, and half as many UDP flows; 0 is no limit.
    pub quota: u32,
    /// Names of the two ends of the node endpoint: the one with the addresses, the one with the program.
    pub endpoint_names: (String, String),
    /// The tunnel.
    pub tunnel: TunnelSettings,
    /// Addresses by which other nodes reach this one; empty asks the kernel.
    pub underlay: Vec<IpAddr>,
    /// Where to serve metrics.
    pub metrics: Option<SocketAddr>,
}

/// Why the daemon did not start or ended.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// The kernel's side.
    #[error(transparent)]
    Datapath(#[from] DatapathError),
    /// The state directory.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The guards.
    #[error(transparent)]
    Guard(#[from] GuardError),
    /// The CNI door.
    #[error(transparent)]
    Door(#[from] DoorError),
    /// The host's network.
    #[error(transparent)]
    Links(#[from] LinksError),
    /// The credentials.
    #[error(transparent)]
    Follow(#[from] FollowError),
    /// The tunnel.
    #[error(transparent)]
    Tunnels(#[from] crate::wireguard::TunnelsError),
    /// The metrics' address.
    #[error("failed to serve metrics on {address}")]
    Metrics {
        /// The address.
        address: SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A signal cannot be handled.
    #[error("failed to handle signals")]
    Signal(#[source] io::Error),
}

/// Runs until SIGTERM or SIGINT; what forwards in the kernel goes on afterwards.
///
/// # Errors
/// When it cannot start.
pub async fn run(settings: Settings) -> Result<(), DaemonError> {
    let found = preflight()?;
    let store = Arc::new(Store::open(&settings.state)?);
    let links = Links::connect()?;
    guard::raise(&store, &links).await?;
    if let Some(agent) = &settings.agent {
        follow::client_tls(agent)?;
    }
    let default_mode = if found.has_tcx {
        HookMode::Tcx
    } else {
        HookMode::Clsact
    };
    let mode = settings.hook.unwrap_or(default_mode);
    let datapath = BpfDatapath::open(&Options {
        bpffs: settings.bpffs.clone(),
        mode,
        sizes: settings.sizes,
        splice: settings.splice.clone(),
    })?;
    let mtu = u32::from(mtu_over(
        links
            .underlay_mtu(settings.underlay.first().copied())
            .await?,
    ));
    let underlay = match settings.underlay.as_slice() {
        [] => links.underlay_addresses().await?,
        given => given.to_vec(),
    };
    tracing::info!(
        node = settings.node,
        ?mode,
        mtu,
        ?underlay,
        "the NetManager starts"
    );

    let shutdown = CancellationToken::new();
    let mut tasks = JoinSet::new();
    let (outbox, outgoing) = watch::channel(Outbox::default());
    let (asks, mut asked_names) = mpsc::channel(16);
    let (gauges, gauged) = watch::channel(Gauges::default());
    if let Some(address) = settings.metrics {
        let listener = metrics::bind(address)
            .await
            .map_err(|source| DaemonError::Metrics { address, source })?;
        let counters = metrics::Counters {
            reasons: datapath.reasons()?,
            counts: datapath.counts()?,
            log: datapath.log_counters()?,
        };
        tasks.spawn(metrics::serve(listener, counters, asks.clone(), gauged));
    }
    let door = Door::bind(&settings.socket).await?;
    let observers = Door::bind(&beside(&settings.socket)).await?;
    let (log, log_counters) = (datapath.flow_log()?, datapath.log_counters()?);
    let (asked_sender, mut asked) = mpsc::channel(64);
    let (table_sender, mut tables) = mpsc::channel(4);
    let (told, mut conditions) = watch::channel(Conditions::default());
    let tunnel = tunnels::spawn(
        &mut tasks,
        &settings,
        store.clone(),
        mtu as u16,
        shutdown.clone(),
    )?;
    let mut carried = tunnel.watch();
    let (mut links_changed, watching) = links::watch_links()?;

    let (kept, keeping) = watch::channel(None);
    let keeping = tokio::spawn(node::keep_tables(store.clone(), keeping));
    let (deaths, died) = watch::channel(Arc::default());
    let (ending, ended) = watch::channel(0);
    tasks.spawn(tickle::follow(datapath.flow_tables()?, died, ending));

    let mut node = Node::restore(node::Parts {
        datapath,
        links,
        store,
        tables: kept,
        mtu,
        underlay,
        tunnel,
        outbox,
        gauges,
        deaths,
        ended,
        shutdown: shutdown.clone(),
        settings: settings.clone(),
    })
    .await?;
    tasks.spawn(door.serve(asked_sender));
    tasks.spawn(observe::serve(observers, log, log_counters, asks));
    if let Some(agent) = settings.agent {
        let inbox = Inbox {
            tables: table_sender.clone(),
            conditions: told,
        };
        tasks.spawn(follow::follow(agent, outgoing, inbox));
    }
    if let Some(path) = settings.table {
        tasks.spawn(table_file::follow(path, table_sender.clone()));
    }

    let mut terminate = signal(SignalKind::terminate()).map_err(DaemonError::Signal)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(DaemonError::Signal)?;
    let mut ticks = interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut narrowed = node.watch_paths();
    let mut look_at = None;
    loop {
        tokio::select! {
            Some((request, reply)) = asked.recv() => {
                // Who asked may be gone; what was done stays and is found by its key.
                let _ = reply.send(node.answer(request).await);
            }
            Some(ask) = asked_names.recv() => node.explain(ask),
            Some(table) = tables.recv() => node.take_table(table).await,
            Ok(()) = conditions.changed() => {
                let conditions = conditions.borrow_and_update().clone();
                node.take_conditions(conditions).await;
            }
            Ok(()) = links_changed.changed() => {
                look_at.get_or_insert_with(|| Instant::now() + CALM);
            }
            () = sleep_until(look_at.unwrap_or_else(Instant::now)), if look_at.is_some() => {
                look_at = None;
                node.links_changed().await;
            }
            Ok(()) = carried.changed() => node.reconcile().await,
            () = node.observed() => node.take_sight().await,
            Ok(()) = narrowed.changed() => node.reconcile().await,
            _ = ticks.tick() => node.tick().await,
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
        }
    }
    tracing::info!("stopping; what forwards in the kernel goes on");
    shutdown.cancel();
    watching.abort();
    tasks.shutdown().await;
    // The last table may still be on its way to the disk.
    drop(node);
    if let Err(error) = keeping.await {
        tracing::error!(%error, "failed to keep the last table");
    }
    Ok(())
}

/// Kernel monotonic time, the clock of the flows.
pub(crate) fn monotonic() -> Duration {
    clock_gettime(ClockId::CLOCK_MONOTONIC)
        .map(Duration::from)
        .expect("every Linux has a monotonic clock")
}

/// Milliseconds since the epoch.
fn wall_ms() -> u64 {
    SystemTime::UNIX_EPOCH
        .elapsed()
        .map_or(0, |since| since.as_millis() as u64)
}
