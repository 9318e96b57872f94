//! A small mesh for tests: agents that do what their assignments say, nodes that apply their tables.
//!
//! One step is a second, unless a test says otherwise: agents act and report, the leader plans, all of it goes through the log. Two
//! replicas are kept, one of which is stored and loaded again now and then (I1), and after every entry it
//! is checked that no slot has two live bindings (I7) and no address two services (I2).

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use crate::{
    assignment::{self, Assignment, Want},
    base::{BindingState, KnowledgeBase, Mesh},
    command::{Applied, Batch, Command, Outcome, Refusal},
    goal,
    index::Changed,
    name::{Name, ServiceName, Slot},
    placement::{Held, View},
    plan::{Draft, Inputs, Tried, follow_up, plan},
    report::{
        ClusterFacts, EndpointFact, InstanceId, InstanceReport, NodeReport, Phase, Report, Tier,
    },
    table::{self, BackendState, NodeTable, Revision},
};

/// One application with three services in a row; `CLIENT` pins its caller to the edge.
pub(crate) const SHOP: &str = r#"
apiVersion: weft.dev/v1alpha1
kind: MeshApplication
metadata: { name: shop }
spec:
  services:
    - name: client
      command: [client]
      constraints: { tier: [edge] }
    - name: front
      command: [front]
      ports: [{ name: http, port: 80, targetPort: 8080 }]
      requests: { cpu: 500m, memory: 64Mi }
      policies: [balanced, closest, instance]
    - name: stock
      command: [stock]
      ports: [{ name: http, port: 80 }]
      requests: { cpu: 500m, memory: 64Mi }
    - name: store
      command: [store]
      ports: [{ name: sql, port: 5432 }]
      requests: { cpu: 250m, memory: 64Mi }
      writers: one
  links:
    - { from: client, to: front, rate: 200 }
    - { from: front, to: stock, rate: 200 }
    - { from: stock, to: store, rate: 10 }
  weights: { cost: 1 }
"#;

pub(crate) fn name(text: &str) -> Name {
    text.parse().unwrap()
}

pub(crate) fn service(text: &str) -> ServiceName {
    text.parse().unwrap()
}

pub(crate) fn slot(text: &str) -> Slot {
    text.parse().unwrap()
}

pub(crate) fn mesh() -> Mesh {
    Mesh {
        name: "test".to_owned(),
        prefix6: "fd12:3456:789a::/48".parse().unwrap(),
        prefix4: Some("10.16.0.0/12".parse().unwrap()),
        seed: 7,
        incarnation: 0,
        lease_ms: 10_000,
    }
}

/// A mesh and nothing in it, a second after the epoch.
pub(crate) fn founded() -> KnowledgeBase {
    let mut kb = KnowledgeBase::default();
    apply(&mut kb, 1_000, Command::InitMesh(mesh())).unwrap();
    kb
}

/// What comes of one command, proposed at a time of its own.
pub(crate) fn apply(kb: &mut KnowledgeBase, log_time_ms: u64, command: Command) -> Outcome {
    let batch = Batch {
        log_time_ms,
        commands: vec![command],
    };
    kb.apply(kb.index + 1, &batch).remove(0)
}

pub(crate) fn facts(tier: Tier, cpu_price_ueur_h: u64) -> ClusterFacts {
    ClusterFacts {
        tier,
        region: "de".to_owned(),
        labels: BTreeMap::new(),
        cpu_price_ueur_h,
        memory_price_ueur_h: 1000,
        egress_price_ueur_gib: 50_000,
        cpu_power_mw: 10_000,
        carbon_g_kwh: 400,
        prefixes: Vec::new(),
    }
}

/// A node of the test's.
#[derive(Clone)]
pub(crate) struct TestNode {
    pub(crate) cpu_milli: u64,
    pub(crate) alive: bool,
    /// Whether its NetManager is there; without it, its instances run on and its kernel goes on by the last table.
    pub(crate) managed: bool,
}

/// An agent of the test's.
pub(crate) struct Agent {
    pub(crate) facts: ClusterFacts,
    pub(crate) session: u64,
    pub(crate) connected: bool,
    pub(crate) nodes: BTreeMap<String, TestNode>,
    /// Services that the cluster cannot run.
    pub(crate) refuses: BTreeSet<String>,
    /// Services whose instances start and never answer.
    pub(crate) mute: BTreeSet<String>,
    running: BTreeMap<InstanceId, String>,
    stopped: BTreeSet<InstanceId>,
    refused: BTreeSet<InstanceId>,
}

pub(crate) struct World {
    pub(crate) kb: KnowledgeBase,
    replica: KnowledgeBase,
    index: u64,
    pub(crate) now_ms: u64,
    pub(crate) step_ms: u64,
    pub(crate) agents: BTreeMap<Name, Agent>,
    pub(crate) inputs: Inputs,
    /// Flows that every node sees to draining backends.
    pub(crate) flows: u64,
    /// Whether nodes acknowledge their tables.
    pub(crate) acknowledge: bool,
    vips: BTreeMap<IpAddr, (ServiceName, u64)>,
    streams: Streams,
    /// Never forgotten here: nothing but a change may find a place for what found none.
    tried: Tried,
}

/// What is known by who looks only at what may have changed.
#[derive(Default)]
struct Streams {
    seen: BTreeMap<Name, u64>,
    orders: BTreeMap<Name, Vec<Assignment>>,
    tables: BTreeMap<(Name, String), NodeTable>,
}

impl Streams {
    /// Looks at what may have changed, and asserts that it is then as if it had looked at everything.
    fn check(&mut self, kb: &KnowledgeBase) {
        kb.lookup.check(kb);
        for (name, cluster) in &kb.clusters {
            let seen = self.seen.insert(name.clone(), kb.index);
            let orders = assignment::project(kb, name);
            if seen.is_none_or(|seen| kb.orders_changed(name, seen)) {
                self.orders.insert(name.clone(), orders);
            } else {
                assert_eq!(self.orders[name], orders, "orders of {name}");
            }
            let changed = seen.map_or(Changed::All, |seen| kb.tables_changed(name, seen));
            for node in cluster.nodes.keys() {
                let Some(mut table) = table::project(kb, name, node) else {
                    continue;
                };
                table.revision = Revision::default();
                let key = (name.clone(), node.clone());
                let may_differ = match &changed {
                    Changed::All => true,
                    Changed::Nodes(nodes) => nodes.contains(node),
                };
                if may_differ {
                    self.tables.insert(key, table);
                } else {
                    assert_eq!(self.tables[&key], table, "table of {name}/{node}");
                }
            }
        }
    }
}

impl World {
    /// A mesh of cloud (cheap, far), fog and edge (dear, near), two nodes of four vCPU each.
    pub(crate) fn new() -> Self {
        let mut world = Self::empty();
        for (cluster, tier, price) in [
            ("cloud", Tier::Cloud, 20_000),
            ("fog", Tier::Fog, 40_000),
            ("edge", Tier::Edge, 80_000),
        ] {
            world.join(cluster, facts(tier, price));
        }
        world.run(2);
        world
    }

    pub(crate) fn empty() -> Self {
        let mut world = Self {
            kb: KnowledgeBase::default(),
            replica: KnowledgeBase::default(),
            index: 0,
            now_ms: 1_000_000,
            step_ms: 1000,
            agents: BTreeMap::new(),
            inputs: Inputs::default(),
            flows: 0,
            acknowledge: true,
            vips: BTreeMap::new(),
            streams: Streams::default(),
            tried: Tried::for_ms(u64::MAX),
        };
        assert_eq!(world.one(Command::InitMesh(mesh())), Ok(Applied::Changed));
        world
    }

    pub(crate) fn join(&mut self, cluster: &str, facts: ClusterFacts) {
        let node = TestNode {
            cpu_milli: 4000,
            alive: true,
            managed: true,
        };
        let nodes = ["n1", "n2"].map(|name| (name.to_owned(), node.clone()));
        let agent = Agent {
            facts,
            session: 0,
            connected: true,
            nodes: nodes.into(),
            refuses: BTreeSet::new(),
            mute: BTreeSet::new(),
            running: BTreeMap::new(),
            stopped: BTreeSet::new(),
            refused: BTreeSet::new(),
        };
        self.agents.insert(name(cluster), agent);
        self.register(cluster);
    }

    /// The agent says hello with a new session.
    pub(crate) fn register(&mut self, cluster: &str) {
        let session = self.index + 100;
        let agent = self.agents.get_mut(&name(cluster)).unwrap();
        agent.session = session;
        agent.connected = true;
        let command = Command::RegisterCluster {
            cluster: name(cluster),
            session,
            facts: Box::new(agent.facts.clone()),
        };
        self.one(command).unwrap();
    }

    pub(crate) fn agent(&mut self, cluster: &str) -> &mut Agent {
        self.agents.get_mut(&name(cluster)).unwrap()
    }

    /// The cluster is cut off, and the leader finds out.
    pub(crate) fn lose(&mut self, cluster: &str) {
        let agent = self.agent(cluster);
        agent.connected = false;
        let session = agent.session;
        let command = Command::Lost {
            cluster: name(cluster),
            session,
        };
        self.one(command).unwrap();
    }

    pub(crate) fn apply(&mut self, yaml: &str) -> Outcome {
        let application = goal::parse(yaml).unwrap().remove(0);
        self.one(Command::Apply(Box::new(application)))
    }

    pub(crate) fn one(&mut self, command: Command) -> Outcome {
        self.entry(vec![command]).remove(0)
    }

    /// One log entry, with every invariant checked after it.
    pub(crate) fn entry(&mut self, commands: Vec<Command>) -> Vec<Outcome> {
        self.index += 1;
        let batch = Batch {
            log_time_ms: self.now_ms,
            commands,
        };
        for command in &batch.commands {
            self.check_view(command);
        }
        let outcomes = self.kb.apply(self.index, &batch);
        let text = serde_json::to_string(&batch).unwrap();
        let logged: Batch = serde_json::from_str(&text).unwrap();
        assert_eq!(self.replica.apply(self.index, &logged), outcomes);
        if self.index.is_multiple_of(16) {
            let snapshot = serde_json::to_string(&self.replica).unwrap();
            self.replica = serde_json::from_str(&snapshot).unwrap();
        }
        assert_eq!(self.kb, self.replica, "I1");
        check_one_live_binding(&self.kb);
        self.check_vips();
        self.streams.check(&self.kb);
        outcomes
    }

    /// What is looked at for one slot in one cluster says the same as what is looked at for all.
    fn check_view(&self, command: &Command) {
        let (slot, cluster) = match command {
            Command::Bind(bind) => (&bind.slot, &bind.cluster),
            Command::StartMigration(start) => (&start.slot, &start.to),
            _ => return,
        };
        let refusals = |view: View<'_>| view.refusals(slot, cluster, Held::New);
        let whole = refusals(View::new(&self.kb, self.now_ms));
        let around = View::around(&self.kb, self.now_ms, slot, cluster);
        assert_eq!(refusals(around), whole, "{slot} in {cluster}");
    }

    /// I2: an address names another service only after its rest.
    fn check_vips(&mut self) {
        for service in self.kb.services.keys() {
            for vip in self.kb.vips(service) {
                let addresses = [Some(vip.addr6.into()), vip.addr4.map(Into::into)];
                for address in addresses.into_iter().flatten() {
                    let now = self.kb.log_time_ms;
                    if let Some((owner, seen_ms)) = self.vips.get(&address) {
                        let rested = now - seen_ms >= crate::base::REST_MS;
                        assert!(owner == service || rested, "I2: {address} of {owner}");
                    }
                    self.vips.insert(address, (service.clone(), now));
                }
            }
        }
    }

    /// One step: agents act and report, the leader plans.
    pub(crate) fn step(&mut self) -> Vec<Command> {
        self.now_ms += self.step_ms;
        let clusters: Vec<Name> = self.agents.keys().cloned().collect();
        for cluster in &clusters {
            self.act(cluster);
            self.check_writers();
            if let Some(report) = self.report_of(cluster) {
                let session = self.agents[cluster].session;
                let report = Command::Report {
                    cluster: cluster.clone(),
                    session,
                    report: Box::new(report),
                };
                self.one(report).unwrap();
            }
        }
        let commands = plan(&self.kb, &self.inputs, self.now_ms);
        assert_eq!(self.drafted(), commands);
        if !commands.is_empty() {
            let outcomes = self.entry(commands.clone());
            for (command, outcome) in commands.iter().zip(outcomes) {
                assert!(outcome.is_ok(), "{command:?} was refused: {outcome:?}");
            }
            // A plan whose commands are in flight may be made again: nothing of it changes anything then.
            for outcome in self.entry(commands.clone()) {
                assert!(outcome.is_err(), "{outcome:?}");
            }
        }
        commands
    }

    /// What is planned now, from what a draft has copied, without what was tried already.
    fn drafted(&mut self) -> Vec<Command> {
        let (kb, inputs, now_ms) = (&self.kb, &self.inputs, self.now_ms);
        let mut commands = follow_up(kb, inputs, now_ms);
        if let Some(draft) = Draft::of((kb, inputs, now_ms), &self.tried, None) {
            let part = draft.place(|| false);
            assert_eq!(part.next, None);
            self.tried.extend(part.tried, now_ms);
            commands.extend(part.commands);
        }
        commands
    }

    pub(crate) fn run(&mut self, steps: usize) {
        for _ in 0..steps {
            self.step();
        }
    }

    /// Steps until nothing is planned for a while; panics after two minutes.
    pub(crate) fn settle(&mut self) {
        let mut quiet = 0;
        for _ in 0..120 {
            quiet = if self.step().is_empty() { quiet + 1 } else { 0 };
            if quiet == 5 {
                return;
            }
        }
        panic!("still busy: {:?}", self.step());
    }

    /// Carries the assignments out: stops first, at once.
    fn act(&mut self, cluster: &Name) {
        let assignments = assignment::project(&self.kb, cluster);
        let agent = self.agents.get_mut(cluster).unwrap();
        if !agent.connected {
            return;
        }
        let known: BTreeSet<&InstanceId> = assignments.iter().map(|a| &a.id).collect();
        agent.stopped.retain(|id| known.contains(id));
        agent.refused.retain(|id| known.contains(id));
        for (i, assignment) in assignments.iter().enumerate() {
            let id = assignment.id.clone();
            match &assignment.want {
                Want::Stop => {
                    let before = |a: &Assignment| a.want == Want::Stop;
                    assert!(assignments[..i].iter().all(before), "stops come first");
                    agent.running.remove(&id);
                    agent.refused.remove(&id);
                    agent.stopped.insert(id);
                }
                Want::Run(_) if agent.refuses.contains(&id.service) => {
                    agent.refused.insert(id);
                }
                Want::Run(_) => {
                    let alive = agent.nodes.iter().filter(|(_, node)| node.alive);
                    let least =
                        |node: &String| agent.running.values().filter(|n| *n == node).count();
                    let node = alive
                        .map(|(name, _)| name)
                        .min_by_key(|name| (least(name), *name));
                    if let Some(node) = node.cloned() {
                        agent.running.entry(id).or_insert(node);
                    }
                }
            }
        }
    }

    fn report_of(&self, cluster: &Name) -> Option<Report> {
        let agent = &self.agents[cluster];
        if !agent.connected {
            return None;
        }
        let report = |id: &InstanceId, node: &str, phase: Phase, endpoint| InstanceReport {
            id: id.clone(),
            node: node.to_owned(),
            phase,
            endpoint,
            reason: if phase == Phase::Refused {
                "no such program".to_owned()
            } else {
                String::new()
            },
        };
        let mut instances = Vec::new();
        for (id, node) in &agent.running {
            let number = self.kb.clusters[cluster]
                .nodes
                .get(node)
                .map_or(0, |n| n.number);
            let answers = agent.nodes[node].alive && !agent.mute.contains(&id.service);
            let phase = if answers {
                Phase::Ready
            } else {
                Phase::NotReady
            };
            let endpoint = EndpointFact {
                addr6: format!("fd12:3456:789a::{number:x}:0:{:x}", id.epoch + 1)
                    .parse()
                    .unwrap(),
                addr4: None,
            };
            instances.push(report(id, node, phase, Some(endpoint)));
        }
        instances.extend(
            agent
                .stopped
                .iter()
                .map(|id| report(id, "", Phase::Stopped, None)),
        );
        instances.extend(
            agent
                .refused
                .iter()
                .map(|id| report(id, "", Phase::Refused, None)),
        );
        let nodes = agent
            .nodes
            .iter()
            .map(|(name, node)| (name.clone(), self.node_report(cluster, name, node)))
            .collect();
        Some(Report { nodes, instances })
    }

    fn node_report(&self, cluster: &Name, node: &str, facts: &TestNode) -> NodeReport {
        let table = table::project(&self.kb, cluster, node).filter(|_| facts.managed);
        let backends: Vec<(InstanceId, BackendState)> = table
            .iter()
            .flat_map(|table| &table.services)
            .flat_map(|service| service.backends.iter().map(move |b| (service, b)))
            .map(|(service, b)| (service.name.slot(b.instance).at(b.epoch), b.state))
            .collect();
        let of = |state: BackendState| {
            backends
                .iter()
                .filter(move |(_, s)| *s == state)
                .map(|(id, _)| id.clone())
        };
        let applied = table.as_ref().map_or((0, 0), |table| {
            (table.revision.incarnation, table.revision.index)
        });
        let rtt_us = self
            .kb
            .clusters
            .iter()
            .flat_map(|(name, other)| other.nodes.values().map(move |n| (name, n.number)))
            .map(|(other, number)| (number, rtt_us(cluster.as_str(), other.as_str())))
            .collect();
        NodeReport {
            ready: facts.alive && facts.managed,
            cpu_milli: facts.cpu_milli,
            memory_bytes: 8 << 30,
            gpus: 0,
            public_key: format!("{cluster}/{node}"),
            tunnel: None,
            underlay: Vec::new(),
            used4: Vec::new(),
            applied: if self.acknowledge { applied } else { (0, 0) },
            rtt_us,
            reached: of(BackendState::Probing).collect(),
            draining_flows: of(BackendState::Draining)
                .map(|id| (id, self.flows))
                .collect(),
        }
    }

    /// No two copies of a slot with one writer run anywhere, in clusters that are connected or not, unless
    /// its node has fenced it: a lost cluster's copies are dead after lease, a tenth and the grace.
    fn check_writers(&mut self) {
        for agent in self.agents.values_mut().filter(|agent| !agent.connected) {
            let lost_ms = self.kb.clusters.values().filter_map(|c| match c.state {
                crate::base::ClusterState::Lost { since_ms } if c.session == agent.session => {
                    Some(since_ms)
                }
                _ => None,
            });
            if lost_ms
                .max()
                .is_some_and(|since| self.now_ms - since >= 6_000)
            {
                agent
                    .running
                    .retain(|id, _| !id.service.ends_with("/store"));
            }
        }
        let mut seen = BTreeSet::new();
        for id in self.agents.values().flat_map(|agent| agent.running.keys()) {
            if id.service.ends_with("/store") {
                assert!(
                    seen.insert((&id.service, id.instance)),
                    "two writers: {id:?}"
                );
            }
        }
    }

    /// The ready backends of a service as the client's node sees them: cluster by cluster.
    pub(crate) fn backends(&self, name: &str) -> Vec<String> {
        self.kb
            .slots
            .iter()
            .filter(|(slot, _)| slot.service == service(name))
            .flat_map(|(_, bindings)| bindings.values())
            .filter(|b| b.state == BindingState::Active && b.phase == Phase::Ready)
            .filter(|b| self.agents[&b.cluster].connected)
            .map(|b| b.cluster.to_string())
            .collect()
    }

    pub(crate) fn running(&self, cluster: &str) -> usize {
        self.agents[&name(cluster)].running.len()
    }

    pub(crate) fn quiet_migrations(&self) -> bool {
        self.kb.migrations.values().all(|m| !m.state.is_running())
    }

    /// What a command is refused for.
    pub(crate) fn refusal(&mut self, command: Command) -> Refusal {
        let before = self.kb.clone();
        let refusal = self.one(command).unwrap_err();
        let mut after = self.kb.clone();
        (after.index, after.log_time_ms) = (before.index, before.log_time_ms);
        assert_eq!(after, before, "a refusal changes nothing");
        refusal
    }
}

/// I7: a slot has one live binding, and a probing one only while it migrates.
pub(crate) fn check_one_live_binding(kb: &KnowledgeBase) {
    for (slot, bindings) in &kb.slots {
        let count = |state: BindingState| bindings.values().filter(|b| b.state == state).count();
        assert!(!bindings.is_empty(), "{slot} is empty");
        assert!(count(BindingState::Active) <= 1, "I7: {slot} {bindings:?}");
        let probing = count(BindingState::Probing);
        assert!(
            probing <= usize::from(kb.migrating(slot).is_some()),
            "I7: {slot}"
        );
    }
}

fn rtt_us(a: &str, b: &str) -> u32 {
    match (a.min(b), a.max(b)) {
        ("cloud", "edge") => 40_000,
        ("cloud", "fog") => 30_000,
        ("edge", "fog") => 10_000,
        (a, b) if a == b => 300,
        _ => 60_000,
    }
}
