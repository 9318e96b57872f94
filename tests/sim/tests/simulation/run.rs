//! One run: three leads, clients, the clusters' agents, and what the seed does to them; then a calm time, and the questions.

use std::{
    collections::BTreeSet,
    fmt,
    sync::{Arc, Mutex, PoisonError, atomic::Ordering},
};

use control_core::base::Mesh;
use weft_history::History;
use weft_lead::{Compaction, Join, Settings, Timers};

use crate::{
    agent::{AgentHost, Seat},
    clients::{Client, Owner, REGISTERS},
    faults::{self, AgentEvent, CALM, Event, Plan, Span},
    host::{CLUSTERS, ClientHost, LeadHost, MESH, agent_host, name, peers},
    judge::{Calm, Judge},
    network::{HOP, Network},
    random::Random,
    trace::Trace,
    watch::Watch,
};

/// How many leads there are.
const LEADS: usize = 3;
/// How long after the last fault everything is put right, milliseconds.
const CALM_AFTER: u64 = 500;
/// How long the leads may take to be as if nothing had happened, milliseconds: with agents entries are so large that one
/// that was lost is waited for as for one on a slow way.
const RECOVERY: [u64; 2] = [8_000, 25_000];
/// How long the clusters may take until everything is as the goal files say, milliseconds: a drain, a lease, a start.
const CONVERGENCE: u64 = 60_000;
/// How often it is looked whether they are, milliseconds.
const LOOK: u64 = 200;
/// How long a lead that ended by itself stays away, milliseconds.
const RESTART: u64 = 700;

/// What a run is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Profile {
    /// The leads by themselves: what goes wrong follows closely.
    Leads,
    /// Leads and agents, with faults of both.
    Mesh,
    /// Clusters are lost and come back, all the time.
    Returns,
    /// Now and then a cluster has a second agent, with the same identity and machines of its own.
    Twins,
}

impl Profile {
    /// What a seed is about where nobody says.
    pub(crate) fn of(seed: u64) -> Self {
        match seed % 10 {
            0 => Self::Mesh,
            5 => Self::Returns,
            _ => Self::Leads,
        }
    }

    /// When something goes wrong, milliseconds.
    fn span(self) -> Span {
        match self {
            Self::Leads => 1_500..7_500,
            Self::Mesh | Self::Twins => 8_000..40_000,
            Self::Returns => 8_000..55_000,
        }
    }

    fn clusters(self) -> usize {
        match self {
            Self::Leads => 0,
            Self::Mesh | Self::Returns | Self::Twins => CLUSTERS,
        }
    }

    /// How many agents: those of the clusters, and second ones behind them.
    fn agents(self) -> usize {
        match self {
            Self::Twins => 2 * CLUSTERS,
            _ => self.clusters(),
        }
    }

    fn plan(self, random: &mut Random) -> Plan {
        let span = self.span();
        let hosts = (LEADS, self.clusters());
        match self {
            Self::Leads => faults::among_leads(random, LEADS, &span, 2_000),
            Self::Mesh => {
                let mut plan = faults::among_leads(random, LEADS, &span, 10_000);
                faults::join(&mut plan, faults::at_agents(random, hosts, &span));
                plan
            }
            Self::Twins => faults::twins(random, CLUSTERS, &span),
            Self::Returns => {
                // Now and then a lead falls meanwhile.
                let leads = random.chance(300);
                let mut plan = faults::returns(random, hosts, &span);
                if leads {
                    let among = faults::among_leads(random, LEADS, &span, 20_000);
                    faults::join(&mut plan, among);
                }
                plan
            }
        }
    }
}

impl std::str::FromStr for Profile {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "leads" => Ok(Self::Leads),
            "mesh" => Ok(Self::Mesh),
            "returns" => Ok(Self::Returns),
            "twins" => Ok(Self::Twins),
            other => Err(format!(
                "{other:?} is no profile: leads, mesh, returns or twins"
            )),
        }
    }
}

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
    /// How often a cluster that had been lost came back.
    pub(crate) returns: u64,
}

/// How a line with a report begins.
const REPORT: &str = "report ";

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            hash,
            answered,
            unanswered,
            returns,
            ..
        } = self;
        let broken = self.broken.as_deref().unwrap_or_default();
        write!(
            f,
            "{REPORT}{hash:016x} {answered} {unanswered} {returns} {broken}"
        )
    }
}

impl Report {
    /// Reads the line that it is shown as.
    pub(crate) fn parse(line: &str) -> Option<Self> {
        let mut parts = line.strip_prefix(REPORT)?.splitn(5, ' ');
        Some(Self {
            hash: u64::from_str_radix(parts.next()?, 16).ok()?,
            answered: parts.next()?.parse().ok()?,
            unanswered: parts.next()?.parse().ok()?,
            returns: parts.next()?.parse().ok()?,
            broken: Some(parts.next()?.to_owned()).filter(|it| !it.is_empty()),
        })
    }
}

struct Simulation {
    profile: Profile,
    now: u64,
    network: Network,
    leads: Vec<LeadHost>,
    agents: Vec<AgentHost>,
    judge: Judge,
    calm: Calm,
    clients: ClientHost,
    plan: Plan,
    history: History,
    watch: Watch,
    trace: Trace,
    random: Random,
}

/// Runs a seed; the calling thread must have run nothing random yet.
pub(crate) fn run(seed: u64, profile: Profile, trace: Trace) -> Report {
    let mut simulation = Simulation::new(seed, profile, trace.clone());
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
        returns: simulation.judge.returns,
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
    fn new(seed: u64, profile: Profile, trace: Trace) -> Self {
        let mut random = Random::new(seed);
        let network = Network::new(random.fork(), trace.clone());
        let plan = profile.plan(&mut random);
        let leads = (0..LEADS)
            .map(|host| {
                let settings = settings(host, &mut random);
                LeadHost::new(host, settings, network.clone(), random.fork())
            })
            .collect();
        let agents = (0..profile.agents())
            .map(|agent| {
                let seat = Seat {
                    host: agent_host(LEADS, agent),
                    cluster: agent % CLUSTERS,
                    leads: LEADS,
                };
                AgentHost::new(seat, network.clone(), random.fork(), trace.clone())
            })
            .collect();
        Self {
            profile,
            now: 0,
            agents,
            judge: Judge::default(),
            calm: Calm { leads: None },
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

    fn owner(&mut self) -> Owner {
        Owner {
            leads: LEADS as u64,
            clusters: self.profile.clusters(),
            wire: self.clients.wire(),
            random: self.random.fork(),
            trace: self.trace.clone(),
        }
    }

    fn live(&mut self) -> Result<(), String> {
        for host in 0..LEADS {
            self.happen(Event::Start(host));
        }
        for agent in 0..self.profile.clusters() {
            self.happen(Event::Agent(agent, AgentEvent::Start));
        }
        let end = self.profile.span().end;
        let (operations, pause) = match self.profile {
            Profile::Leads => (36, 320),
            Profile::Mesh | Profile::Twins => (15, end / 10),
            Profile::Returns => (5, end / 5),
        };
        for number in 0..4 {
            let client = self.client(number);
            self.clients.spawn(client.run(operations, pause));
        }
        if !self.agents.is_empty() {
            let owner = self.owner();
            self.clients.spawn(owner.run(end));
        }
        self.go_on(end + CALM_AFTER)?;
        self.calm();
        self.recover()?;
        self.converge()?;
        self.watch.review()?;
        for register in 0..REGISTERS {
            let operations = self.history.of(register);
            if !weft_history::is_linearizable(&operations) {
                return Err(format!(
                    "register {register} is not linearizable: {operations:?}"
                ));
            }
        }
        Ok(())
    }

    /// Puts everything right.
    fn calm(&mut self) {
        self.plan.clear();
        self.network.mend(None);
        self.happen(Event::Weather(CALM));
        for host in 0..LEADS {
            self.leads[host].sleep(self.now);
            self.leads[host].disk.mend();
            self.happen(Event::Start(host));
        }
        for agent in 0..self.profile.clusters() {
            self.happen(Event::Agent(agent, AgentEvent::Sleep(0)));
            self.happen(Event::Agent(agent, AgentEvent::Start));
            for node in 0..2 {
                self.happen(Event::Agent(agent, AgentEvent::LoseNode(node, 0)));
            }
        }
    }

    /// Everything comes to be as the goal files say.
    fn converge(&mut self) -> Result<(), String> {
        if self.agents.is_empty() {
            return Ok(());
        }
        let end = self.now + CONVERGENCE;
        loop {
            self.go_on(self.now + LOOK)?;
            let base = self.watch.newest();
            let differs = base.map(|base| Judge::differs(&self.agents, base));
            match differs {
                Some(None) => return Ok(()),
                Some(Some(why)) if self.now >= end => {
                    return Err(format!("after {CONVERGENCE} ms of calm: {why}"));
                }
                _ => {}
            }
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
        let recovery = RECOVERY[usize::from(!self.agents.is_empty())];
        let end = self.now + recovery;
        while self.now < end {
            self.go_on(self.now + 100)?;
            let is_done = *done.lock().unwrap_or_else(PoisonError::into_inner);
            let indexes: BTreeSet<_> = (0..LEADS).map(|host| self.watch.index_of(host)).collect();
            // Agents report all the time: a follower may be an entry behind.
            let same = indexes.len() == 1 || !self.agents.is_empty();
            if is_done && same {
                return Ok(());
            }
        }
        let indexes: Vec<_> = (0..LEADS).map(|host| self.watch.index_of(host)).collect();
        Err(format!(
            "the leads did not recover within {recovery} ms: they are at {indexes:?}"
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
            self.step_agents()?;
            self.now += HOP;
        }
        Ok(())
    }

    fn step_agents(&mut self) -> Result<(), String> {
        if self.agents.is_empty() {
            return Ok(());
        }
        for agent in &mut self.agents {
            agent.step(self.now, self.judge.serving());
        }
        let leads_up = self.leads.iter().all(LeadHost::is_well);
        let is_calm = leads_up && self.network.is_calm_among(|host| host <= LEADS);
        self.calm.leads = is_calm.then(|| self.calm.leads.unwrap_or(self.now));
        let base = self.watch.newest();
        let firsts = self.agents.iter().take(self.profile.clusters());
        for (cluster, agent) in firsts.enumerate() {
            // Where only answers are lost the leads hear it still.
            let is_cut = (0..LEADS).all(|lead| self.network.is_cut(agent.id, lead));
            let is_whole = (0..LEADS).all(|lead| {
                !self.network.is_cut(agent.id, lead) && !self.network.is_cut(lead, agent.id)
            });
            match agent.is_on() && is_whole {
                true => self.judge.came(cluster),
                false => self
                    .judge
                    .is_away(self.now, cluster, !agent.is_on() || is_cut, base),
            }
        }
        self.judge.look(self.now, &self.agents, base, self.calm)
    }

    fn happen_at(&mut self, agent: usize, event: &AgentEvent) {
        let now = self.now;
        let agent = &mut self.agents[agent];
        match *event {
            AgentEvent::Start => agent.start(now),
            AgentEvent::Crash => agent.crash(now),
            AgentEvent::CutPower => agent.cut_power(now),
            AgentEvent::Sleep(time) => agent.sleep(now + time),
            AgentEvent::LoseNode(node, time) => agent.lose_node(node, now, time),
            AgentEvent::CrashProcess(process) => agent.plant.crash_process(process),
        }
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
            Event::Cut(ways) => self.network.cut(ways),
            Event::Mend(ways) => self.network.mend(Some(&ways)),
            Event::Agent(agent, event) => self.happen_at(agent, &event),
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
