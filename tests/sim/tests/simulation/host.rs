//! A simulated machine with a lead on it: a runtime of its own with a stopped clock, a disk, a time of day.
//!
//! Hosts run one after the other, each for a [`HOP`]; what one sends arrives at another in a later turn. A crash
//! drops the runtime with all its tasks at whatever await they are.

use std::{
    collections::BTreeMap,
    io,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use axum::{Router, body::Body};
use bytes::Bytes;
use control_core::base::KnowledgeBase;
use http::Request;
use netmanager_api::identity::{Access, Identity, Role};
use tokio::{
    runtime::{Builder, Runtime},
    time::{Instant, advance, sleep_until},
};
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;
use weft_lead::{Aside, Clock, Running, Settings, World};

use crate::{
    disk::Disk,
    line::{Lines, Piece},
    network::{Answer, HOP, HostId, HostWire, Network, Parcel, Waiting, address},
    random::Random,
    time::HostClock,
};

/// The time of day when a simulation begins, milliseconds.
const MORNING: u64 = 1_800_000_000_000;
/// The largest answer that is read, bytes.
const LIMIT: usize = 64 << 20;

/// How many clusters there are at most: a lost one is no third of them.
pub(crate) const CLUSTERS: usize = 4;

/// The name of the mesh.
pub(crate) const MESH: &str = "sim";

/// The lead's name on a host.
pub(crate) fn name(host: HostId) -> String {
    format!("lead{host}")
}

/// A lead that is up.
#[derive(Clone)]
struct Up {
    running: Arc<Running>,
    routes: Router,
}

/// How far a lead's start has come.
#[derive(Clone, Default)]
enum Stage {
    #[default]
    Starting,
    Up(Up),
    /// It ended by itself; why.
    Ended(String),
}

type SharedStage = Arc<Mutex<Stage>>;

fn lock(stage: &SharedStage) -> std::sync::MutexGuard<'_, Stage> {
    stage.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A runtime whose clock only goes on where nothing else can.
pub(crate) fn runtime() -> Runtime {
    Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .expect("a runtime without input and output needs nothing")
}

/// A host of a lead.
pub(crate) struct LeadHost {
    pub(crate) id: HostId,
    network: Network,
    random: Random,
    slowness: u64,
    settings: Settings,
    runtime: Option<Runtime>,
    pub(crate) disk: Disk,
    clock: HostClock,
    lines: Lines,
    /// How far its time of day is from the right one, milliseconds.
    pub(crate) skew: Arc<AtomicI64>,
    stage: SharedStage,
    /// Until when it does nothing.
    asleep: Option<u64>,
}

impl LeadHost {
    pub(crate) fn new(
        id: HostId,
        settings: Settings,
        network: Network,
        mut random: Random,
    ) -> Self {
        let slowness = *random.pick(&[0, 2, 8]);
        Self {
            id,
            lines: Lines::new(id, HostClock::default(), network.clone()),
            network,
            slowness,
            settings,
            runtime: None,
            disk: Disk::new(Vec::new(), 0, random.fork()),
            clock: HostClock::default(),
            skew: Arc::default(),
            stage: Arc::default(),
            asleep: None,
            random,
        }
    }

    /// Switches the machine on, with what its disk holds.
    pub(crate) fn start(&mut self, now: u64) {
        if self.runtime.is_some() {
            return;
        }
        let image = self.disk.cut();
        self.disk = Disk::new(image, self.slowness, self.random.fork());
        self.stage = Arc::default();
        self.clock = HostClock::default();
        self.lines = Lines::new(self.id, self.clock.clone(), self.network.clone());
        self.asleep = None;
        let (clock, skew) = (self.clock.clone(), self.skew.clone());
        let time_of_day = move || {
            let skewed = MORNING + clock.now();
            skewed.saturating_add_signed(skew.load(Ordering::Relaxed))
        };
        let wire = HostWire {
            host: self.id,
            clock: self.clock.clone(),
            network: self.network.clone(),
            disk: Some(self.disk.clone()),
        };
        let world = World {
            storage: Arc::new(self.disk.clone()),
            wire: Arc::new(wire),
            clock: Clock::new(time_of_day),
            aside: Aside::in_turn(),
        };
        let runtime = runtime();
        runtime.block_on(async { self.clock.set(now, Instant::now()) });
        runtime.spawn(live(self.settings.clone(), world, self.stage.clone()));
        self.runtime = Some(runtime);
    }

    /// Cuts the power.
    pub(crate) fn crash(&mut self) {
        self.disk.cut();
        self.lines.silence();
        self.runtime = None;
        *lock(&self.stage) = Stage::Starting;
    }

    /// Lets nothing on the machine run until `until`.
    pub(crate) fn sleep(&mut self, until: u64) {
        self.asleep = Some(until);
    }

    pub(crate) fn is_on(&self) -> bool {
        self.runtime.is_some()
    }

    /// Whether its lead is up and awake.
    pub(crate) fn is_well(&self) -> bool {
        self.runtime.is_some()
            && self.asleep.is_none()
            && matches!(&*lock(&self.stage), Stage::Up(_))
    }

    /// Why its lead ended by itself, if it did.
    pub(crate) fn ended(&self) -> Option<String> {
        match &*lock(&self.stage) {
            Stage::Ended(why) => Some(why.clone()),
            _ => None,
        }
    }

    /// Reads the lead's Knowledge Base, if it is up.
    pub(crate) fn read<R>(&self, read: impl FnOnce(&KnowledgeBase) -> R) -> Option<R> {
        self.runtime.as_ref()?;
        match &*lock(&self.stage) {
            Stage::Up(up) => Some(up.running.read(read)),
            _ => None,
        }
    }

    /// Runs the machine from `now` for a [`HOP`].
    pub(crate) fn step(&mut self, now: u64) {
        if self.asleep.is_some_and(|until| until > now) {
            return;
        }
        let arrivals = self.network.arrivals(self.id, now + HOP);
        let Some(runtime) = &self.runtime else {
            for (at, parcel) in arrivals {
                match parcel {
                    Parcel::Request { from, waiting, .. } => {
                        let refused = Err(io::Error::from(io::ErrorKind::ConnectionRefused).into());
                        self.network.answer(at, (self.id, from), refused, waiting);
                    }
                    Parcel::Line { from, line, piece } => {
                        if matches!(piece, Piece::Open) {
                            let way = (self.id, from);
                            self.network.send_piece(at, way, line, Piece::Reset);
                        }
                    }
                    Parcel::Answer { .. } => {}
                }
            }
            return;
        };
        let slept = self.asleep.take().is_some();
        runtime.block_on(async {
            if slept {
                advance(Duration::from_millis(now - self.clock.now())).await;
            }
            let start = Instant::now();
            self.clock.set(now, start);
            for (at, parcel) in arrivals {
                let due = start + Duration::from_millis(at.saturating_sub(now));
                let receive = Receive {
                    host: self.id,
                    leads: self.settings.peers.len(),
                    stage: self.stage.clone(),
                    clock: self.clock.clone(),
                    network: self.network.clone(),
                    disk: self.disk.clone(),
                    lines: self.lines.clone(),
                };
                tokio::spawn(async move {
                    sleep_until(due).await;
                    receive.parcel(parcel).await;
                });
            }
            sleep_until(start + Duration::from_millis(HOP)).await;
        });
    }
}

/// A lead's life.
async fn live(settings: Settings, world: World, stage: SharedStage) {
    let ended = match Running::start(settings, world, CancellationToken::new()).await {
        Ok(running) => {
            let running = Arc::new(running);
            let routes = running.routes();
            *lock(&stage) = Stage::Up(Up {
                running: running.clone(),
                routes,
            });
            let ended = running.run().await;
            ended.map_err(|error| error.to_string())
        }
        Err(error) => Err(format!("did not start: {}", chain(&error))),
    };
    *lock(&stage) = Stage::Ended(ended.err().unwrap_or_default());
}

/// An error with its causes.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

/// What a host does with what arrives.
struct Receive {
    host: HostId,
    leads: usize,
    stage: SharedStage,
    clock: HostClock,
    network: Network,
    disk: Disk,
    lines: Lines,
}

impl Receive {
    async fn parcel(self, parcel: Parcel) {
        match parcel {
            Parcel::Line { from, line, piece } => {
                let up = match &*lock(&self.stage) {
                    Stage::Up(up) => Some(up.clone()),
                    _ => None,
                };
                let end = self.lines.take(from, line, piece, up.is_some());
                if let Some((up, end)) = up.zip(end) {
                    up.running.serve(end, self.identity(from)).await;
                }
            }
            Parcel::Answer { answer, waiting } => give(waiting, answer),
            Parcel::Request {
                from,
                request,
                waiting,
            } => {
                let mut connection = Connection {
                    network: self.network.clone(),
                    way: (self.host, from),
                    waiting: Some(waiting),
                };
                let answer = self.serve(from, *request).await;
                if let Some(waiting) = connection.waiting.take().filter(|_| !self.disk.is_dead()) {
                    let now = self.clock.now();
                    self.network.answer(now, connection.way, answer, waiting);
                }
            }
        }
    }

    /// Who a host's certificate says that it is.
    fn identity(&self, from: HostId) -> Identity {
        let role = if from < self.leads {
            Role::Lead { name: name(from) }
        } else if from == self.leads {
            Role::User {
                name: "user".to_owned(),
                access: Access::Admin,
            }
        } else {
            let cluster = (from - agent_host(self.leads, 0)) % CLUSTERS;
            Role::Agent {
                cluster: cluster_name(cluster),
            }
        };
        Identity {
            mesh: MESH.to_owned(),
            role,
        }
    }

    async fn serve(&self, from: HostId, request: Request<Bytes>) -> Answer {
        let up = match &*lock(&self.stage) {
            Stage::Up(up) => up.clone(),
            _ => return Err(io::Error::from(io::ErrorKind::ConnectionRefused).into()),
        };
        let mut request = request.map(Body::from);
        request.extensions_mut().insert(self.identity(from));
        let answer = up.routes.oneshot(request).await?;
        let status = answer.status();
        let body = axum::body::to_bytes(answer.into_body(), LIMIT).await?;
        Ok((status, body))
    }
}

/// The name of a cluster.
pub(crate) fn cluster_name(cluster: usize) -> String {
    format!("cluster{cluster}")
}

/// The host of a cluster's agent, behind the leads and the clients; that of a second agent by the same name follows
/// all of them.
pub(crate) fn agent_host(leads: usize, cluster: usize) -> HostId {
    leads + 1 + cluster
}

/// Where a request came from; broken when its host ends.
struct Connection {
    network: Network,
    way: (HostId, HostId),
    waiting: Option<Waiting>,
}

impl Drop for Connection {
    fn drop(&mut self) {
        if let Some(waiting) = self.waiting.take() {
            self.network.reset(self.way, waiting);
        }
    }
}

/// Gives an answer to who waits for it, if nobody has yet.
fn give(waiting: Waiting, answer: Answer) {
    let waiting = waiting
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .take();
    if let Some(waiting) = waiting {
        // Who asked may be gone.
        let _ = waiting.send(answer);
    }
}

/// The machine of the clients; nothing happens to it.
pub(crate) struct ClientHost {
    id: HostId,
    network: Network,
    runtime: Runtime,
    clock: HostClock,
}

impl ClientHost {
    pub(crate) fn new(id: HostId, network: Network) -> Self {
        let (runtime, clock) = (runtime(), HostClock::default());
        runtime.block_on(async { clock.set(0, Instant::now()) });
        Self {
            id,
            network,
            runtime,
            clock,
        }
    }

    /// Its way to the leads.
    pub(crate) fn wire(&self) -> Arc<HostWire> {
        Arc::new(HostWire {
            host: self.id,
            clock: self.clock.clone(),
            network: self.network.clone(),
            disk: None,
        })
    }

    /// Starts a client.
    pub(crate) fn spawn(&self, client: impl Future<Output = ()> + Send + 'static) {
        self.runtime.spawn(client);
    }

    /// Runs the machine from `now` for a [`HOP`].
    pub(crate) fn step(&self, now: u64) {
        let arrivals = self.network.arrivals(self.id, now + HOP);
        self.runtime.block_on(async {
            let start = Instant::now();
            self.clock.set(now, start);
            for (at, parcel) in arrivals {
                let due = start + Duration::from_millis(at.saturating_sub(now));
                if let Parcel::Answer { answer, waiting } = parcel {
                    tokio::spawn(async move {
                        sleep_until(due).await;
                        give(waiting, answer);
                    });
                }
            }
            sleep_until(start + Duration::from_millis(HOP)).await;
        });
    }
}

/// Every lead by name, as it is told to each of them.
pub(crate) fn peers(leads: usize) -> BTreeMap<String, std::net::SocketAddr> {
    (0..leads).map(|host| (name(host), address(host))).collect()
}
