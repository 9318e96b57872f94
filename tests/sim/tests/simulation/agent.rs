//! A simulated machine with an agent on it: the product's stream, engine and store, over a simulated network, driver and
//! shelf. Its clock has a rate of its own.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use control_core::{
    goal::{Bytes, Cpu, Requests},
    report::{ClusterFacts, Tier},
};
use futures::future::BoxFuture;
use netmanager_api::{conditions::Conditions, identity::RevokedList};
use tokio::{
    runtime::Runtime,
    sync::{mpsc, watch},
    time::{Instant, advance, sleep_until},
};
use tokio_util::sync::CancellationToken;
use weft_agent::{
    cluster::Cluster,
    engine::Engine,
    event::Event,
    lead::{LeadClient, Line, Outbox},
    store::{Shelf, Store},
};

use crate::{
    host::{cluster_name, runtime},
    line::Lines,
    network::{HOP, HostId, Network, Parcel, address},
    plant::{Plant, Serving},
    random::Random,
    shelf::SimShelf,
    time::HostClock,
    trace::Trace,
};

/// How many events of the streams wait for the engine.
const EVENTS: usize = 256;
/// How many nodes a cluster has.
const NODES: usize = 2;
/// How much faster or slower a machine's clock goes than the others, thousandths.
const DRIFTS: [i64; 5] = [0, -20, 20, -45, 45];
/// How late the machine itself notices that a lease is over, milliseconds of its clock.
const FENCE: u64 = 100;

/// The host of an agent.
pub(crate) struct AgentHost {
    pub(crate) id: HostId,
    pub(crate) cluster: usize,
    network: Network,
    leads: usize,
    runtime: Option<Runtime>,
    /// The simulation's time, as the network counts it.
    clock: HostClock,
    /// The machine's own.
    own: HostClock,
    drift: i64,
    /// Until when it has run.
    ran: u64,
    shelf: SimShelf,
    pub(crate) plant: Plant,
    lines: Lines,
    events: Option<mpsc::Sender<Event>>,
    trace: Trace,
    asleep: Option<u64>,
    has_power: bool,
}

#[derive(Clone, Debug)]
struct ToLeads(Lines);

impl weft_agent::lead::Lines for ToLeads {
    fn dial(&self, lead: SocketAddr) -> BoxFuture<'static, std::io::Result<Box<dyn Line>>> {
        let dialling = self.0.clone().dial(usize::from(lead.port()));
        Box::pin(async { Ok(Box::new(dialling.await?) as Box<dyn Line>) })
    }
}

fn facts() -> ClusterFacts {
    ClusterFacts {
        tier: Tier::Edge,
        region: "de".to_owned(),
        labels: Default::default(),
        cpu_price_ueur_h: 20_000,
        memory_price_ueur_h: 2_000,
        egress_price_ueur_gib: 10_000,
        cpu_power_mw: 5_000,
        carbon_g_kwh: 300,
        prefixes: Vec::new(),
    }
}

fn node_names(host: HostId) -> impl Iterator<Item = String> {
    // A second agent by the same name has machines of its own, which call themselves alike.
    (0..NODES).map(move |node| format!("n{node}-{host}"))
}

fn capacity(host: HostId) -> impl Iterator<Item = (String, Requests)> {
    let requests = Requests {
        cpu: Cpu::milli(4_000),
        memory: Bytes::new(8 << 30),
        gpus: 0,
    };
    node_names(host).map(move |name| (name, requests))
}

/// Where an agent of the simulation is, and whose it is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Seat {
    pub(crate) host: HostId,
    pub(crate) cluster: usize,
    /// How many leads there are.
    pub(crate) leads: usize,
}

impl AgentHost {
    pub(crate) fn new(seat: Seat, network: Network, mut random: Random, trace: Trace) -> Self {
        let Seat {
            host,
            cluster,
            leads,
        } = seat;
        let own = HostClock::default();
        Self {
            id: host,
            cluster,
            leads,
            runtime: None,
            clock: HostClock::default(),
            drift: *random.pick(&DRIFTS),
            ran: 0,
            shelf: SimShelf::new(random.fork(), own.clone()),
            own,
            plant: Plant::new(node_names(host), random.fork()),
            lines: Lines::new(host, HostClock::default(), network.clone()),
            events: None,
            network,
            trace,
            asleep: None,
            has_power: true,
        }
    }

    /// The machine's own time.
    fn own_time(&self, now: u64) -> u64 {
        now * (1_000_u64.saturating_add_signed(self.drift)) / 1_000
    }

    pub(crate) fn is_on(&self) -> bool {
        self.runtime.is_some()
    }

    /// Starts the agent, with what its shelf holds.
    pub(crate) fn start(&mut self, now: u64) {
        if self.runtime.is_some() {
            return;
        }
        self.clock = HostClock::default();
        self.lines = Lines::new(self.id, self.clock.clone(), self.network.clone());
        self.asleep = None;
        self.has_power = true;
        self.ran = now;
        self.plant.take_over();
        let runtime = runtime();
        let (events, heard) = mpsc::channel(EVENTS);
        let within = runtime.enter();
        let instant = Instant::now();
        self.clock.set(now, instant);
        self.own.set(self.own_time(now), instant);
        runtime.spawn(self.live(events.clone(), heard));
        drop(within);
        self.events = Some(events);
        self.runtime = Some(runtime);
    }

    /// The agent's life, as `Agent::serve` leads it.
    fn live(
        &self,
        events: mpsc::Sender<Event>,
        heard: mpsc::Receiver<Event>,
    ) -> impl Future<Output = ()> + Send + 'static {
        let now = Instant::now().into_std();
        let shelf: Arc<dyn Shelf> = Arc::new(self.shelf.clone());
        let name = cluster_name(self.cluster);
        let opened = Store::open(Some(shelf), &name, now);
        let (store, writer, kept) = opened.expect("nothing damages what is replaced whole");
        let (outbox, outgoing) = watch::channel(Outbox::default());
        let (conditions, telling) = watch::channel(Conditions::default());
        let (said, tapped) = mpsc::channel(EVENTS);
        let leads = LeadClient {
            leads: (0..self.leads).map(address).collect(),
            lines: Arc::new(ToLeads(self.lines.clone())),
            cluster: name,
            facts: facts(),
            outbox: outgoing,
            conditions: telling,
            events: said,
        };
        let engine = Engine {
            cluster: Cluster::new(capacity(self.id).collect(), kept, now),
            driver: self.plant.clone(),
            store,
            events: heard,
            outbox,
            conditions,
            revoked: RevokedList::default(),
        };
        let tap = Tap {
            host: self.id,
            clock: self.clock.clone(),
            plant: self.plant.clone(),
            trace: self.trace.clone(),
        };
        async move {
            let end = CancellationToken::new();
            tokio::join!(
                leads.run(end.clone()),
                engine.run(end),
                writer.run(),
                tap.run(tapped, events),
            );
        }
    }

    /// Ends the agent as a kill does: what it runs goes on.
    pub(crate) fn crash(&mut self, now: u64) {
        // Its machine says that its connections are closed.
        self.stop_clocks(now);
        self.runtime = None;
        self.events = None;
        self.plant.leave();
    }

    /// Cuts the power of the whole machine.
    pub(crate) fn cut_power(&mut self, now: u64) {
        self.lines.silence();
        self.stop_clocks(now);
        self.has_power = false;
        self.runtime = None;
        self.events = None;
        self.plant.cut_power();
        self.shelf.cut_power(self.own_time(now));
    }

    /// Keeps a node from the agent for a while.
    pub(crate) fn lose_node(&self, node: usize, now: u64, time: u64) {
        self.plant.lose_node(node, self.own_time(now + time));
    }

    fn stop_clocks(&self, now: u64) {
        self.clock.stop(now);
        self.own.stop(self.own_time(now));
    }

    /// Lets the agent do nothing until `until`.
    pub(crate) fn sleep(&mut self, until: u64) {
        self.asleep = Some(until);
    }

    /// Whether the lease that the agent has kept is over.
    fn is_fenced(&self, now: u64) -> bool {
        let ends = self.shelf.lease_ends();
        ends.is_none_or(|ends| self.own_time(now) >= ends + FENCE)
    }

    /// Runs the machine from `now` for a [`HOP`].
    pub(crate) fn step(&mut self, now: u64, serving: &Serving) {
        if self.is_fenced(now) {
            self.plant.fence();
        }
        self.plant
            .step(self.own_time(now), self.events.as_ref(), serving);
        if self.asleep.is_some_and(|until| until > now) {
            return;
        }
        self.asleep = None;
        let arrivals = self.network.arrivals(self.id, now + HOP);
        let Some(runtime) = &self.runtime else {
            if self.has_power {
                self.clock.stop(now);
                for (_, parcel) in arrivals {
                    if let Parcel::Line { from, line, piece } = parcel {
                        self.lines.take(from, line, piece, false);
                    }
                }
            }
            return;
        };
        let (missed, own) = (self.own_time(self.ran), self.own_time(now));
        let hop = Duration::from_millis(self.own_time(now + HOP) - own);
        self.ran = now + HOP;
        runtime.block_on(async {
            if missed < own {
                advance(Duration::from_millis(own - missed)).await;
            }
            let start = Instant::now();
            self.clock.set(now, start);
            self.own.set(own, start);
            for (at, parcel) in arrivals {
                let due = start + Duration::from_millis(at.saturating_sub(now)).min(hop);
                let Parcel::Line { from, line, piece } = parcel else {
                    continue;
                };
                let lines = self.lines.clone();
                tokio::spawn(async move {
                    sleep_until(due).await;
                    lines.take(from, line, piece, false);
                });
            }
            sleep_until(start + hop).await;
        });
    }
}

/// Hands on what the leads say, and lets the judge know.
struct Tap {
    host: HostId,
    clock: HostClock,
    plant: Plant,
    trace: Trace,
}

impl Tap {
    async fn run(self, mut said: mpsc::Receiver<Event>, events: mpsc::Sender<Event>) {
        while let Some(event) = said.recv().await {
            let (now, host) = (self.clock.now(), self.host);
            match &event {
                Event::Welcomed { welcome, .. } => {
                    let session = welcome.session;
                    self.trace
                        .note(now, format_args!("agent {host} is welcome in {session:x}"));
                    self.plant.welcomed(session);
                }
                Event::Ordered(orders) => {
                    let (revision, count) = (orders.revision.1, orders.list.len());
                    self.trace.note(
                        now,
                        format_args!("agent {host} has {count} orders of {revision}"),
                    );
                    self.plant.ordered(orders);
                }
                Event::Parted => {
                    self.trace.note(now, format_args!("agent {host} parted"));
                    self.plant.parted();
                }
                _ => {}
            }
            if events.send(event).await.is_err() {
                return;
            }
        }
    }
}
