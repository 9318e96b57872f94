//! One run: three leads, clients, and what the seed does to them; then a calm time, and the questions.

use std::{
    collections::BTreeSet,
    fmt,
    sync::{Arc, Mutex, PoisonError, atomic::Ordering},
};

use control_core::base::Mesh;
use weft_lead::{Compaction, Join, Settings, Timers};

use crate::{
    clients::{Client, History, REGISTERS},
    faults::{self, CALM, Event, Plan},
    host::{ClientHost, LeadHost, MESH, name, peers},
    linear,
    network::{HOP, Network},
    random::Random,
    trace::Trace,
    watch::Watch,
};

/// How many leads there are.
const LEADS: usize = 3;
/// When everything is put right, milliseconds.
const CALM_FROM: u64 = faults::END + 500;
/// How long the leads may take to be as if nothing had happened, milliseconds.
const RECOVERY: u64 = 8_000;
/// How long a lead that ended by itself stays away, milliseconds.
const RESTART: u64 = 700;

/// What came of a run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Report {
    /// The number of the trace.
    pub(crate) hash: u64,
    /// What does not hold, if anything.
    pub(crate) broken: Option<String>,
    /// How many operations were answered.
    pub(crate) answered: u64,
    /// How many were not.
    pub(crate) unanswered: u64,
}

/// How a line with a report begins.
const REPORT: &str = "report ";

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            hash,
            answered,
            unanswered,
            ..
        } = self;
        let broken = self.broken.as_deref().unwrap_or_default();
        write!(f, "{REPORT}{hash:016x} {answered} {unanswered} {broken}")
    }
}

impl Report {
    /// Reads the line that it is shown as.
    pub(crate) fn parse(line: &str) -> Option<Self> {
        let mut parts = line.strip_prefix(REPORT)?.splitn(4, ' ');
        Some(Self {
            hash: u64::from_str_radix(parts.next()?, 16).ok()?,
            answered: parts.next()?.parse().ok()?,
            unanswered: parts.next()?.parse().ok()?,
            broken: Some(parts.next()?.to_owned()).filter(|it| !it.is_empty()),
        })
    }
}

struct Simulation {
    now: u64,
    network: Network,
    leads: Vec<LeadHost>,
    clients: ClientHost,
    plan: Plan,
    history: History,
    watch: Watch,
    trace: Trace,
    random: Random,
}

/// Runs a seed; the calling thread must have run nothing random yet.
pub(crate) fn run(seed: u64, trace: Trace) -> Report {
    let mut simulation = Simulation::new(seed, trace.clone());
    let broken = simulation.live().err();
    if let Some(broken) = &broken {
        trace.note(simulation.now, format_args!("broken: {broken}"));
    }
    let operations: Vec<_> = (0..REGISTERS)
        .flat_map(|it| simulation.history.of(it))
        .collect();
    let count = |answered: bool| {
        let alike = operations
            .iter()
            .filter(|it| it.ended.is_some() == answered);
        alike.count() as u64
    };
    Report {
        hash: trace.hash(),
        broken,
        answered: count(true),
        unanswered: count(false),
    }
}

fn settings(host: usize, random: &mut Random) -> Settings {
    Settings {
        name: name(host),
        peers: peers(LEADS),
        join: Join::default(),
        timers: Timers::default(),
        compaction: Compaction {
            every: *random.pick(&[10, 40, 5_000]),
            keep: *random.pick(&[0, 5]),
        },
        reserve: None,
        mesh: Some(Mesh {
            name: MESH.to_owned(),
            prefix6: "fd00:1:2::/48".parse().expect("it is a prefix"),
            prefix4: Some("10.16.0.0/12".parse().expect("it is a prefix")),
            seed: 1,
            incarnation: 0,
            lease_ms: 10_000,
        }),
    }
}

impl Simulation {
    fn new(seed: u64, trace: Trace) -> Self {
        let mut random = Random::new(seed);
        let network = Network::new(random.fork(), trace.clone());
        let plan = faults::draw(&mut random, LEADS);
        let leads = (0..LEADS)
            .map(|host| {
                let settings = settings(host, &mut random);
                LeadHost::new(host, settings, network.clone(), random.fork())
            })
            .collect();
        Self {
            now: 0,
            clients: ClientHost::new(LEADS, network.clone()),
            network,
            leads,
            plan,
            history: History::default(),
            watch: Watch::default(),
            trace,
            random,
        }
    }

    fn client(&mut self, number: u64) -> Client {
        Client {
            number,
            leads: LEADS as u64,
            wire: self.clients.wire(),
            history: self.history.clone(),
            random: self.random.fork(),
            trace: self.trace.clone(),
        }
    }

    fn live(&mut self) -> Result<(), String> {
        for host in 0..LEADS {
            self.happen(Event::Start(host));
        }
        for number in 0..4 {
            let client = self.client(number);
            self.clients.spawn(client.run(20, 600));
        }
        self.go_on(CALM_FROM)?;
        self.calm();
        self.recover()?;
        self.watch.review()?;
        for register in 0..REGISTERS {
            let operations = self.history.of(register);
            if !linear::is_linearizable(&operations) {
                return Err(format!(
                    "register {register} is not linearizable: {operations:?}"
                ));
            }
        }
        Ok(())
    }

    /// Puts everything right.
    fn calm(&mut self) {
        self.happen(Event::Cut(BTreeSet::new()));
        self.happen(Event::Weather(CALM));
        for host in 0..LEADS {
            self.leads[host].sleep(self.now);
            self.leads[host].disk.mend();
            self.happen(Event::Start(host));
        }
    }

    /// Everything that was acknowledged must be there, and new changes be possible.
    fn recover(&mut self) -> Result<(), String> {
        let last = self.client(9);
        let done = Arc::new(Mutex::new(false));
        let said = done.clone();
        self.clients.spawn(async move {
            for register in 0..REGISTERS {
                for lead in 0..LEADS as u64 {
                    last.read(register, lead).await;
                }
                while !last.write(register, register).await {}
                last.read(register, (register + 1) % LEADS as u64).await;
            }
            *said.lock().unwrap_or_else(PoisonError::into_inner) = true;
        });
        let end = self.now + RECOVERY;
        while self.now < end {
            self.go_on(self.now + 100)?;
            let is_done = *done.lock().unwrap_or_else(PoisonError::into_inner);
            let indexes: BTreeSet<_> = (0..LEADS).map(|host| self.watch.index_of(host)).collect();
            if is_done && indexes.len() == 1 {
                return Ok(());
            }
        }
        let indexes: Vec<_> = (0..LEADS).map(|host| self.watch.index_of(host)).collect();
        Err(format!(
            "the leads did not recover within {RECOVERY} ms: they are at {indexes:?}"
        ))
    }

    /// Runs everything until `until`.
    fn go_on(&mut self, until: u64) -> Result<(), String> {
        while self.now < until {
            self.network.set_turn(self.now);
            while let Some(due) = self.plan.first_entry().filter(|it| *it.key() <= self.now) {
                for event in due.remove() {
                    self.happen(event);
                }
            }
            for host in 0..LEADS {
                self.leads[host].step(self.now);
                self.look_after(host)?;
            }
            self.clients.step(self.now);
            self.now += HOP;
        }
        Ok(())
    }

    /// Restarts a lead that ended by itself, and checks what it holds.
    fn look_after(&mut self, host: usize) -> Result<(), String> {
        let lead = &mut self.leads[host];
        if !lead.is_on() {
            return Ok(());
        }
        if lead.disk.is_dead() {
            let (writes, syncs) = lead.disk.operations();
            self.trace.note(
                self.now,
                format_args!("power of {host} gone after {writes} writes, {syncs} syncs"),
            );
            lead.crash();
        } else if let Some(why) = lead.ended() {
            self.trace
                .note(self.now, format_args!("lead {host} ended: {why}"));
            if why.starts_with("did not start") && !lead.disk.has_failed() {
                return Err(format!("lead {host} {why}, and no disk was damaged"));
            }
            lead.crash();
        } else {
            return self.watch.look(lead);
        }
        let restart = self.plan.entry(self.now + RESTART).or_default();
        restart.push(Event::Start(host));
        Ok(())
    }

    fn happen(&mut self, event: Event) {
        self.trace.note(self.now, format_args!("event {event:?}"));
        match event {
            Event::Cut(cut) => self.network.set_cut(cut),
            Event::Weather(weather) => self.network.set_weather(weather),
            Event::Crash(host) => self.leads[host].crash(),
            Event::Fuse(host, operations) => self.leads[host].disk.light_fuse(operations),
            Event::BreakSync(host) => self.leads[host].disk.break_sync(),
            Event::Start(host) => self.leads[host].start(self.now),
            Event::Sleep(host, time) => self.leads[host].sleep(self.now + time),
            Event::Jump(host, by) => self.leads[host].skew.store(by, Ordering::Relaxed),
        }
    }
}
