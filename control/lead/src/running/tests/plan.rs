//! A leader that plans for long.

use std::fmt::Write;

use control_core::{
    command::Command,
    goal,
    name::Name,
    report::{ClusterFacts, NodeReport, Report, Tier},
};
use tokio::{sync::Semaphore, time::timeout};

use super::*;
use crate::lead::Lead;

const CLUSTERS: usize = 10;
/// A debug build places one of these in about a lease.
const APPLICATIONS: usize = 6;
const SERVICES: usize = 20;
const REPLICAS: usize = 5;
/// How often a mesh is placed that a halted machine may disturb.
const MESHES: usize = 3;

fn cluster(number: usize) -> Name {
    format!("c{number}").parse().unwrap()
}

/// A cluster joins, and reports nodes with room for everything.
fn joins(number: usize) -> [Command; 2] {
    let facts = ClusterFacts {
        tier: Tier::Edge,
        region: "de".to_owned(),
        labels: BTreeMap::new(),
        cpu_price_ueur_h: 1,
        memory_price_ueur_h: 1,
        egress_price_ueur_gib: 1,
        cpu_power_mw: 1,
        carbon_g_kwh: 1,
        prefixes: Vec::new(),
    };
    let node = NodeReport {
        ready: true,
        cpu_milli: 1 << 30,
        memory_bytes: 1 << 50,
        gpus: 0,
        public_key: String::new(),
        tunnel: None,
        underlay: Vec::new(),
        used4: Vec::new(),
        applied: (0, 0),
        rtt_us: BTreeMap::new(),
        reached: Vec::new(),
        draining_flows: Vec::new(),
    };
    let nodes = (0..10).map(|node_number| (format!("n{node_number}"), node.clone()));
    let report = Report {
        nodes: nodes.collect(),
        instances: Vec::new(),
    };
    [
        Command::RegisterCluster {
            cluster: cluster(number),
            session: 1,
            facts: facts.into(),
        },
        Command::Report {
            cluster: cluster(number),
            session: 1,
            report: report.into(),
        },
    ]
}

/// A goal file of [`APPLICATIONS`].
fn much() -> String {
    let mut goals = String::new();
    for application in 0..APPLICATIONS {
        let goal = GOAL.replace("NAME", &format!("a{application}"));
        let (begin, _) = goal.split_once("spec:").unwrap();
        write!(goals, "---{begin}spec:\n  services:\n").unwrap();
        for service in 0..SERVICES {
            let what = format!("name: s{service}, command: [/bin/true], replicas: {REPLICAS}");
            writeln!(goals, "    - {{ {what} }}").unwrap();
        }
        goals.push_str("  links:\n");
        for service in 1..SERVICES {
            let caller = (service - 1) / 2;
            writeln!(goals, "    - {{ from: s{caller}, to: s{service} }}").unwrap();
        }
    }
    goals
}

/// Makes a mesh of the clusters, which is to run `goals`.
async fn fill(lead: &Lead, goals: &str) {
    let end = Instant::now() + LIMIT;
    while lead.replica.read(|base| base.mesh.is_none()) {
        assert!(Instant::now() < end, "there is no mesh");
        sleep(LOOK).await;
    }
    let goals = goal::parse(goals).unwrap().into_iter();
    let goals = goals.map(|goal| Command::Apply(Box::new(goal)));
    let commands = (0..CLUSTERS).flat_map(joins).chain(goals);
    let done = lead.propose(commands.collect()).await.unwrap();
    assert!(done.outcomes.iter().all(Result::is_ok), "{done:?}");
}

/// Waits until so many slots are bound; no cluster is lost meanwhile.
async fn await_slots(group: &Group, count: usize) {
    let end = Instant::now() + LIMIT;
    loop {
        for running in &group.running {
            for number in 0..CLUSTERS {
                let mut leases = running.lead.leases();
                leases.renew(cluster(number), 1, Instant::now());
            }
        }
        let bound = group.running[0].read(|base| base.slots.len());
        if bound == count {
            return;
        }
        assert!(Instant::now() < end, "{bound} slots are bound");
        sleep(LOOK).await;
    }
}

/// Changes something again and again; how long that took at the most.
async fn longest_change(lead: &Lead, is_over: &AtomicBool) -> Duration {
    let mut longest = Duration::ZERO;
    while !is_over.load(Ordering::Relaxed) {
        let start = Instant::now();
        lead.propose(vec![Command::Tick]).await.unwrap();
        longest = longest.max(start.elapsed());
        sleep(LOOK).await;
    }
    longest
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_places_a_large_mesh_keeps_its_lead_and_takes_changes() {
    let mut seen = Vec::new();
    while seen.len() < MESHES {
        let group = Group::start(Arc::new(|_: &Way<'_>| Fate::Arrives)).await;
        let lead = &group.running[0].lead;
        let term = || lead.raft.metrics().borrow().current_term;
        fill(lead, &much()).await;
        let (start, before) = (Instant::now(), term());
        let is_over = AtomicBool::new(false);
        let placing = async {
            await_slots(&group, APPLICATIONS * SERVICES * REPLICAS).await;
            is_over.store(true, Ordering::Relaxed);
            start.elapsed()
        };
        let (placed, longest) = tokio::join!(placing, longest_change(lead, &is_over));
        let terms = term() - before;
        group.end().await;
        seen.push((terms, longest, placed));
        // Each part of the plan is much less than the whole, and changes wait for none.
        if terms == 0 && longest < placed / 4 {
            return;
        }
    }
    panic!("terms, the longest change, and all: {seen:?}");
}

/// Where a plan waits until a test lets it go.
#[derive(Debug)]
struct Gate {
    permits: Semaphore,
    came: watch::Sender<usize>,
    went: watch::Sender<usize>,
}

impl Gate {
    fn closed() -> Arc<Self> {
        Arc::new(Self {
            permits: Semaphore::new(0),
            came: watch::Sender::default(),
            went: watch::Sender::default(),
        })
    }

    fn aside(self: &Arc<Self>) -> Aside {
        let gate = self.clone();
        Aside::new(move |work| {
            let gate = gate.clone();
            Box::pin(async move {
                gate.came.send_modify(|it| *it += 1);
                gate.permits.acquire().await.unwrap().forget();
                work();
                gate.went.send_modify(|it| *it += 1);
            })
        })
    }

    async fn await_plan(&self) {
        let mut came = self.came.subscribe();
        let came = timeout(LIMIT, came.wait_for(|it| *it > 0)).await;
        came.expect("a plan comes").unwrap();
    }

    /// Lets those go that wait, and nobody else; returns when they are done.
    async fn open_once(&self) {
        let waiting = *self.came.borrow();
        self.permits.add_permits(waiting);
        let mut went = self.went.subscribe();
        let went = timeout(LIMIT, went.wait_for(|it| *it == waiting)).await;
        went.expect("it is made").unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_plan_is_kept_by_a_leader_that_heard_nobody_while_it_was_made() {
    let is_deaf = Arc::new(AtomicBool::new(false));
    // Its followers hear the leader, and elect no other.
    let rule = {
        let is_deaf = is_deaf.clone();
        move |way: &Way<'_>| match way.path == APPEND && is_deaf.load(Ordering::Relaxed) {
            true => Fate::AnswerIsLost,
            false => Fate::Arrives,
        }
    };
    let gate = Gate::closed();
    let disk: &dyn Fn(&str) -> Arc<dyn Storage> = &|_| Arc::new(Memory);
    let group = Group::with(disk, gate.aside(), NAMES, Arc::new(rule)).await;
    fill(&group.running[0].lead, &GOAL.replace("NAME", "one")).await;
    gate.await_plan().await;

    is_deaf.store(true, Ordering::Relaxed);
    let end = Instant::now() + LIMIT;
    let mut leads = group.running.iter().map(|running| &running.lead);
    let leader = leads.find(|lead| lead.leads()).unwrap();
    while leader.has_majority() {
        assert!(Instant::now() < end, "it hears its followers");
        sleep(LOOK).await;
    }
    gate.open_once().await;
    is_deaf.store(false, Ordering::Relaxed);
    // No other plan is made.
    await_slots(&group, 1).await;
    group.end().await;
}
