//! The machine of a cluster beneath its agent: what the driver runs, and the nodes.
//!
//! ```text
//!  agent --run, stop, forget--> instances (the product's Life) --> statuses
//!    '--tables--> nodes (attach, apply, measure) --events--> agent
//! ```
//!
//! Processes and nodes go on while the agent is away. What has one writer ends with the lease that the agent has kept,
//! whether the agent is there or not (DESIGN, I7: fenced by their node).

mod node;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use control_api::stream::Assignments;
use control_core::{
    assignment::{Run, Want},
    goal::Writers,
    report::InstanceId,
};
use netmanager_api::table::Table;
use tokio::sync::{mpsc, watch};
use weft_agent::{
    driver::{
        Driver, State, Status, Statuses,
        life::{Event, Life, Todo},
    },
    event,
};

use self::node::{Around, Node};
use crate::random::Random;

/// A process of an instance.
#[derive(Clone, Copy, Debug)]
struct Process {
    /// When it takes connections.
    answers_at: u64,
    /// When it is gone, if it was told to end.
    ends_at: Option<u64>,
}

/// What a keeper is busy with.
#[derive(Clone, Copy, Debug)]
enum Doing {
    Attach,
    Start,
    Detach,
}

#[derive(Debug)]
struct Instance {
    node: String,
    run: Run,
    life: Life,
    /// How often its process was started.
    lives: u64,
    process: Option<Process>,
    doing: Option<(u64, Doing)>,
    /// Orders to stop that the keeper has not read.
    stops: Vec<Duration>,
    stopping: bool,
}

/// How long what a cluster was to have stopped may run once it is back (I7), milliseconds.
const CUT_OFF: u64 = 2_000;

/// Something that a judge looks at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Deed {
    /// The agent wants it to run, although it has just come back and has not stopped what it owes.
    TooSoon(InstanceId, String),
    /// The cluster was lost, is back, and this still runs too long afterwards.
    TooLate(InstanceId),
    /// The cluster had been lost, and is back.
    Returned,
}

/// How it stands between the agent and the leads.
#[derive(Debug, Default)]
struct Contact {
    /// The session that the agent was given last.
    session: Option<u64>,
    /// Since when the leads are there, if they are.
    since: Option<u64>,
    /// The first orders since then came, and wanted these stopped.
    stops: Option<Vec<InstanceId>>,
    /// Whether the cluster was lost before.
    was_lost: bool,
}

/// A process that runs.
#[derive(Clone, Debug)]
pub(crate) struct Running {
    pub(crate) id: InstanceId,
    pub(crate) has_one_writer: bool,
    pub(crate) serves: bool,
}

#[derive(Debug)]
struct Inner {
    /// Of the simulation's own start.
    base: Instant,
    now: u64,
    random: Random,
    statuses: watch::Sender<Statuses>,
    instances: BTreeMap<InstanceId, Instance>,
    nodes: BTreeMap<String, Node>,
    streams: u64,
    deeds: Vec<Deed>,
    contact: Contact,
    /// Whether other processes run, or answer, than when somebody looked last.
    has_changed: bool,
    /// Whether an agent is there, which keeps the instances.
    is_kept: bool,
}

/// See the module.
#[derive(Clone, Debug)]
pub(crate) struct Plant(Arc<Mutex<Inner>>);

/// The instances that answer, wherever they are.
pub(crate) type Serving = BTreeSet<InstanceId>;

impl Plant {
    pub(crate) fn new(nodes: impl Iterator<Item = String>, random: Random) -> Self {
        let inner = Inner {
            base: Instant::now(),
            now: 0,
            random,
            statuses: watch::Sender::default(),
            instances: BTreeMap::new(),
            nodes: nodes.map(|name| (name, Node::default())).collect(),
            streams: 0,
            deeds: Vec::new(),
            contact: Contact::default(),
            has_changed: true,
            is_kept: false,
        };
        Self(Arc::new(Mutex::new(inner)))
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An agent takes over what there is.
    pub(crate) fn take_over(&self) {
        let inner = &mut *self.inner();
        let at = inner.at();
        inner.is_kept = true;
        inner.instances.retain(|_, instance| {
            if matches!(instance.life.state(), State::Gone | State::Refused) {
                return false;
            }
            let served = instance.life.state() == State::Serving;
            instance.life = match instance.process {
                Some(_) => Life::adopted(served, at),
                None => Life::remains(at),
            };
            (instance.doing, instance.stopping) = (None, false);
            instance.stops.clear();
            true
        });
        inner.publish();
    }

    /// A lead welcomed the agent.
    pub(crate) fn welcomed(&self, session: u64) {
        let inner = &mut *self.inner();
        let before = inner.contact.session.replace(session);
        inner.contact.was_lost |= before.is_some_and(|before| before != session);
        (inner.contact.since, inner.contact.stops) = (Some(inner.now), None);
        if inner.contact.was_lost {
            inner.deeds.push(Deed::Returned);
        }
    }

    /// A lead sent orders.
    pub(crate) fn ordered(&self, orders: &Assignments) {
        let contact = &mut self.inner().contact;
        let stops = orders.list.iter().filter(|it| it.want == Want::Stop);
        contact
            .stops
            .get_or_insert_with(|| stops.map(|it| it.id.clone()).collect());
    }

    /// The leads are out of reach.
    pub(crate) fn parted(&self) {
        let contact = &mut self.inner().contact;
        (contact.since, contact.stops) = (None, None);
    }

    /// The agent ends: its keepers with it, and the streams of the nodes.
    pub(crate) fn leave(&self) {
        self.parted();
        let mut inner = self.inner();
        inner.is_kept = false;
        for node in inner.nodes.values_mut() {
            node.part();
        }
    }

    /// The power goes: no process is left.
    pub(crate) fn cut_power(&self) {
        self.leave();
        let mut inner = self.inner();
        inner.has_changed = true;
        for instance in inner.instances.values_mut() {
            instance.process = None;
        }
        for node in inner.nodes.values_mut() {
            node.cut_power();
        }
    }

    /// Keeps a node from its agent until `until`.
    pub(crate) fn lose_node(&self, number: usize, until: u64) {
        let mut inner = self.inner();
        let count = inner.nodes.len();
        if let Some(node) = inner.nodes.values_mut().nth(number % count) {
            node.away_until = until;
        }
    }

    /// Ends a process as a bug of its own would.
    pub(crate) fn crash_process(&self, number: usize) {
        let inner = &mut *self.inner();
        let count = inner.instances.len().max(1);
        let now = inner.now;
        let instance = inner.instances.values_mut().nth(number % count);
        if let Some(process) = instance.and_then(|it| it.process.as_mut()) {
            process.ends_at = Some(now);
        }
    }

    /// Whether other processes run, or answer, than when this was asked last.
    pub(crate) fn has_changed(&self) -> bool {
        std::mem::take(&mut self.inner().has_changed)
    }

    /// The processes that run.
    pub(crate) fn running(&self) -> Vec<Running> {
        let inner = self.inner();
        let running = inner.instances.iter().filter_map(|(id, instance)| {
            let process = instance.process?;
            Some(Running {
                id: id.clone(),
                has_one_writer: instance.run.writers == Writers::One,
                serves: process.answers_at <= inner.now && process.ends_at.is_none(),
            })
        });
        running.collect()
    }

    /// What happened since this was asked last.
    pub(crate) fn deeds(&self) -> Vec<Deed> {
        std::mem::take(&mut self.inner().deeds)
    }

    /// The tables that its nodes have applied, by node.
    pub(crate) fn tables(&self) -> BTreeMap<String, Arc<Table>> {
        let inner = self.inner();
        let nodes = inner.nodes.iter();
        let tables = nodes.filter_map(|(name, node)| Some((name.clone(), node.table.clone()?)));
        tables.collect()
    }

    /// Ends at once what has one writer: its lease is over.
    pub(crate) fn fence(&self) {
        let inner = &mut *self.inner();
        for instance in inner.instances.values_mut() {
            if instance.run.writers == Writers::One && instance.process.is_some() {
                instance.process = None;
                inner.has_changed = true;
            }
        }
    }

    /// Goes on to `now`, by the machine's own clock; `events` is where the agent listens, if there is one.
    pub(crate) fn step(
        &self,
        now: u64,
        events: Option<&mpsc::Sender<event::Event>>,
        serving: &Serving,
    ) {
        let inner = &mut *self.inner();
        let before = std::mem::replace(&mut inner.now, now);
        for instance in inner.instances.values_mut() {
            let Some(process) = instance.process else {
                continue;
            };
            if process.ends_at.is_some_and(|ends| ends <= now) {
                instance.process = None;
                inner.has_changed = true;
            }
            inner.has_changed |= (before + 1..=now).contains(&process.answers_at);
        }
        if inner.is_kept {
            let at = inner.at();
            let mut instances = std::mem::take(&mut inner.instances);
            let mut is_moved = false;
            for (id, instance) in &mut instances {
                is_moved |= inner.keep(id, instance, at);
            }
            inner.instances = instances;
            if is_moved {
                inner.publish();
            }
        }
        inner.step_nodes(events, serving);
        inner.look_after_stops();
    }
}

impl Inner {
    fn at(&self) -> Instant {
        self.base + Duration::from_millis(self.now)
    }

    fn runs(&self, id: &InstanceId) -> bool {
        self.instances
            .get(id)
            .is_some_and(|it| it.process.is_some())
    }

    /// What a cluster that is back was to have stopped is gone in time.
    fn look_after_stops(&mut self) {
        let (true, Some(since)) = (self.contact.was_lost, self.contact.since) else {
            return;
        };
        let Some(stops) = &self.contact.stops else {
            return;
        };
        let left: Vec<_> = stops.iter().filter(|id| self.runs(id)).cloned().collect();
        if left.is_empty() {
            self.contact.was_lost = false;
        } else if self.now > since + CUT_OFF {
            self.contact.was_lost = false;
            self.deeds.extend(left.into_iter().map(Deed::TooLate));
        }
    }

    /// Whether the agent may start things now; why not.
    fn is_too_soon(&self) -> Option<String> {
        self.contact.since?;
        let Some(stops) = &self.contact.stops else {
            return Some("it does not know its orders yet".to_owned());
        };
        let left = stops.iter().find(|id| self.runs(id))?;
        Some(format!("{left:?} still runs"))
    }

    /// Does for an instance what its life says; whether that was anything.
    fn keep(&mut self, id: &InstanceId, instance: &mut Instance, at: Instant) -> bool {
        let mut is_moved = false;
        if instance.life.has_process() && instance.process.is_none() {
            let how = "its process ended".to_owned();
            instance.life.on(Event::Ended(how), at);
            is_moved = true;
        }
        if let Some((done, doing)) = instance.doing {
            if self.now < done {
                return is_moved;
            }
            is_moved = true;
            instance.doing = None;
            let event = self.finish(id, instance, doing);
            instance.life.on(event, at);
        }
        for grace in std::mem::take(&mut instance.stops) {
            is_moved = true;
            instance.life.on(Event::Stop { grace }, at);
        }
        // One thing at a time; a few may take no time at all.
        for _ in 0..4 {
            let (most, doing) = match instance.life.todo(at) {
                Todo::Attach => (60, Doing::Attach),
                Todo::Start => (60, Doing::Start),
                Todo::Detach { .. } => (120, Doing::Detach),
                Todo::Probe => {
                    let process = instance.process;
                    let answers = process.is_some_and(|it| it.answers_at <= self.now);
                    let event = match answers {
                        true => Event::Answered,
                        false => Event::Unanswered("it takes no connection".to_owned()),
                    };
                    instance.life.on(event, at);
                    is_moved = true;
                    continue;
                }
                Todo::Terminate => {
                    // Some end at once, some take their time, some never listen.
                    let takes = *self.random.pick(&[0, 200, 1_000, 3_000, 60_000]);
                    if let Some(process) = &mut instance.process {
                        process.ends_at.get_or_insert(self.now + takes);
                    }
                    instance.life.terminated();
                    self.has_changed = true;
                    is_moved = true;
                    continue;
                }
                Todo::Kill => {
                    instance.process = None;
                    self.has_changed = true;
                    is_moved = true;
                    instance.life.killed(at);
                    let how = "its process was killed".to_owned();
                    instance.life.on(Event::Ended(how), at);
                    continue;
                }
                Todo::Wait(_) | Todo::End => return is_moved,
            };
            instance.doing = Some((self.now + self.random.within(1, most), doing));
            return true;
        }
        is_moved
    }

    fn finish(&mut self, id: &InstanceId, instance: &mut Instance, doing: Doing) -> Event {
        let node = self.nodes.get_mut(&instance.node);
        match doing {
            Doing::Attach => match node.is_some_and(|node| node.attach(id)) {
                true => Event::Attached,
                false => Event::AttachFailed("its node has no table".to_owned()),
            },
            Doing::Start => {
                instance.lives += 1;
                self.has_changed = true;
                let takes = *self.random.pick(&[10, 200, 1_500]);
                instance.process = Some(Process {
                    answers_at: self.now + takes,
                    ends_at: None,
                });
                Event::Started
            }
            Doing::Detach => {
                instance.process = None;
                self.has_changed = true;
                if let Some(node) = node {
                    node.detach(id);
                }
                Event::Detached
            }
        }
    }

    /// Says how the instances are.
    fn publish(&mut self) {
        let instances = &self.instances;
        self.statuses.send_if_modified(|statuses| {
            let before = statuses.clone();
            // What was stopped before it was known stays until it is forgotten.
            statuses.retain(|id, status| {
                instances.contains_key(id) || matches!(status.state, State::Gone)
            });
            for (id, instance) in instances {
                let state = match instance.life.state() {
                    State::Gone => State::Gone,
                    State::Refused => State::Refused,
                    _ if instance.stopping => State::Stopping,
                    state => state,
                };
                let status = Status {
                    node: instance.node.clone(),
                    state,
                    life: instance.lives,
                    reason: instance.life.reason().to_owned(),
                };
                statuses.insert(id.clone(), status);
            }
            *statuses != before
        });
    }

    fn step_nodes(&mut self, events: Option<&mpsc::Sender<event::Event>>, serving: &Serving) {
        let mut around = Around {
            now: self.now,
            streams: &mut self.streams,
            random: &mut self.random,
            events,
            serving,
        };
        for (name, node) in &mut self.nodes {
            node.step(name, &mut around);
        }
    }
}

impl Driver for Plant {
    fn run(&self, id: &InstanceId, node: &str, run: &Run) {
        let inner = &mut *self.inner();
        let known = inner.instances.get(id);
        let is_live = |it: &Instance| !matches!(it.life.state(), State::Gone | State::Refused);
        if known.is_some_and(is_live) {
            return;
        }
        if let Some(why) = inner.is_too_soon() {
            inner.deeds.push(Deed::TooSoon(id.clone(), why));
        }
        let instance = Instance {
            node: node.to_owned(),
            run: run.clone(),
            life: Life::new(inner.at()),
            lives: known.map_or(0, |it| it.lives),
            process: None,
            doing: None,
            stops: Vec::new(),
            stopping: false,
        };
        inner.instances.insert(id.clone(), instance);
        inner.publish();
    }

    fn stop(&self, id: &InstanceId, grace: Duration) {
        let inner = &mut *self.inner();
        if let Some(instance) = inner.instances.get_mut(id) {
            match instance.life.state() {
                State::Gone => {}
                State::Refused => _ = inner.instances.remove(id),
                _ => {
                    instance.stopping = true;
                    instance.stops.push(grace);
                }
            }
        }
        if !inner.instances.contains_key(id) {
            let gone = Status {
                node: String::new(),
                state: State::Gone,
                life: 0,
                reason: String::new(),
            };
            inner.statuses.send_if_modified(|statuses| {
                statuses.insert(id.clone(), gone.clone()).as_ref() != Some(&gone)
            });
        }
        inner.publish();
    }

    fn forget(&self, id: &InstanceId) {
        let inner = &mut *self.inner();
        let known = inner.instances.get(id);
        let is_live = |it: &Instance| !matches!(it.life.state(), State::Gone | State::Refused);
        if !known.is_some_and(is_live) {
            inner.instances.remove(id);
            inner
                .statuses
                .send_if_modified(|statuses| statuses.remove(id).is_some());
        }
    }

    fn used(&self) -> BTreeMap<InstanceId, Duration> {
        BTreeMap::new()
    }

    fn statuses(&self) -> watch::Receiver<Statuses> {
        self.inner().statuses.subscribe()
    }
}
