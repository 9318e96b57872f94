use std::collections::BTreeSet;

use control_core::goal::{Bytes, Cpu};
use netmanager_api::{stream::Hello, table::Revision};
use proptest::prelude::*;

use super::*;
use crate::nodes::{Known, Node};

/// A cluster in the middle of things, told by what differs from a quiet one.
#[derive(Debug)]
pub(crate) struct Scene {
    pub(crate) orders: Orders,
    pub(crate) statuses: Statuses,
    pub(crate) nodes: Nodes,
    pub(crate) ledger: Ledger,
    pub(crate) seen: BTreeMap<InstanceId, u64>,
    pub(crate) lease_ends: Option<Instant>,
    pub(crate) contact: Contact,
    pub(crate) cut_off: bool,
    pub(crate) hurried: BTreeSet<InstanceId>,
    pub(crate) start: Instant,
    pub(crate) now: Instant,
}

impl Scene {
    /// Nodes n1 and n2 of 1000m each, both ready, with a lease of a minute.
    pub(crate) fn new() -> Self {
        let start = Instant::now();
        let mut scene = Self {
            orders: Orders::new(),
            statuses: Statuses::new(),
            nodes: Nodes::new(),
            ledger: Ledger::default(),
            seen: BTreeMap::new(),
            lease_ends: Some(start + Duration::from_secs(60)),
            contact: Contact::Settled,
            cut_off: false,
            hurried: BTreeSet::new(),
            start,
            now: start,
        };
        for name in ["n1", "n2"] {
            let mut node = Node::new(needs(1000), Known::default(), start);
            node.connected(1, hello(name), start);
            scene.nodes.insert(name.to_owned(), node);
        }
        scene
    }

    pub(crate) fn view(&self) -> View<'_> {
        View {
            orders: Some(&self.orders),
            statuses: &self.statuses,
            nodes: &self.nodes,
            ledger: &self.ledger,
            seen: &self.seen,
            lease_ends: self.lease_ends,
            lease: Some(Duration::from_secs(10)),
            contact: self.contact,
            cut_off: self.cut_off,
            hurried: &self.hurried,
            started: self.start,
            now: self.now,
        }
    }

    pub(crate) fn order(&mut self, id: &InstanceId, want: Want) {
        let order = Assignment {
            id: id.clone(),
            want,
            grace_ms: 5000,
        };
        self.orders.insert(id.clone(), order);
    }

    pub(crate) fn has(&mut self, id: &InstanceId, node: &str, state: State) {
        let status = Status {
            node: node.to_owned(),
            state,
            life: 1,
            reason: "why".to_owned(),
        };
        self.statuses.insert(id.clone(), status);
    }

    /// Time passes; the nodes that are here speak.
    pub(crate) fn after(&mut self, time: Duration) {
        self.now += time;
        for node in self.nodes.values_mut() {
            let measured = netmanager_api::stream::Measured::default();
            node.said(
                1,
                netmanager_api::stream::FromNode::Measured(measured),
                self.now,
            );
        }
    }

    fn does(&self) -> Vec<Action> {
        reconcile(&self.view())
    }
}

pub(crate) fn hello(node: &str) -> Hello {
    Hello {
        node: node.to_owned(),
        public_key: "key".to_owned(),
        tunnel_port: 51_900,
        underlay: vec!["192.0.2.1".parse().unwrap()],
        applied: Some(Revision::default()),
        version: "0".to_owned(),
    }
}

pub(crate) fn needs(cpu: u64) -> Requests {
    Requests {
        cpu: Cpu::milli(cpu),
        memory: Bytes::new(0),
        gpus: 0,
    }
}

pub(crate) fn id(service: &str, epoch: u64) -> InstanceId {
    InstanceId {
        service: service.to_owned(),
        instance: 0,
        epoch,
    }
}

pub(crate) fn run(cpu: u64, writers: Writers) -> Want {
    Want::Run(Box::new(Run {
        image: None,
        command: vec!["true".to_owned()],
        env: BTreeMap::new(),
        hosts: Vec::new(),
        requests: needs(cpu),
        ports: Vec::new(),
        writers,
    }))
}

fn starts(id: &InstanceId, node: &str) -> Action {
    Action::Run {
        id: id.clone(),
        node: node.to_owned(),
    }
}

fn stops(id: &InstanceId, grace_ms: u64) -> Action {
    Action::Stop {
        id: id.clone(),
        grace: Duration::from_millis(grace_ms),
    }
}

#[test]
fn orders_to_run_are_spread_over_the_ready_nodes() {
    let mut scene = Scene::new();
    let (a, b) = (id("s", 1), id("t", 1));
    scene.order(&a, run(600, Writers::Many));
    scene.order(&b, run(600, Writers::Many));
    assert_eq!(scene.does(), [starts(&a, "n1"), starts(&b, "n2")]);
}

#[test]
fn after_a_contact_nothing_starts_before_the_stops_are_done() {
    let mut scene = Scene::new();
    let (old, new) = (id("s", 1), id("t", 2));
    scene.order(&old, Want::Stop);
    scene.order(&new, run(1, Writers::Many));
    scene.has(&old, "n1", State::Serving);
    scene.contact = Contact::AwaitsOrders;
    assert_eq!(scene.does(), [stops(&old, 5000)]);
    scene.contact = Contact::StopsFirst;
    assert_eq!(scene.does(), [stops(&old, 5000)]);
    scene.has(&old, "n1", State::Stopping);
    assert_eq!(scene.does(), []);
    scene.has(&old, "n1", State::Gone);
    assert_eq!(scene.does(), [starts(&new, "n1")]);
}

#[test]
fn a_copy_that_was_cut_off_is_stopped_within_two_seconds() {
    let mut scene = Scene::new();
    let old = id("s", 1);
    scene.order(&old, Want::Stop);
    scene.has(&old, "n1", State::Serving);
    scene.contact = Contact::StopsFirst;
    scene.cut_off = true;
    assert_eq!(scene.does(), [stops(&old, 1500)]);
}

#[test]
fn what_was_stopping_already_when_the_contact_came_back_is_given_no_longer_than_the_rest() {
    let mut scene = Scene::new();
    let old = id("s", 1);
    scene.order(&old, Want::Stop);
    scene.has(&old, "n1", State::Stopping);
    scene.contact = Contact::StopsFirst;
    assert_eq!(scene.does(), []);
    scene.cut_off = true;
    assert_eq!(scene.does(), [stops(&old, 1500)]);
    scene.hurried.insert(old);
    assert_eq!(scene.does(), [], "it is told once");
}

#[test]
fn a_stop_of_what_the_driver_does_not_know_is_carried_out_all_the_same() {
    let mut scene = Scene::new();
    let old = id("s", 1);
    scene.order(&old, Want::Stop);
    assert_eq!(scene.does(), [stops(&old, 5000)]);
}

#[test]
fn a_dead_instance_of_a_lost_node_moves_when_nothing_of_it_is_left() {
    let mut scene = Scene::new();
    let a = id("s", 1);
    scene.order(&a, run(1, Writers::Many));
    scene.has(&a, "n1", State::Restarting);
    scene.nodes.get_mut("n1").unwrap().broke(1, scene.now);
    scene.after(Duration::from_millis(1999));
    assert_eq!(scene.does(), []);
    scene.after(Duration::from_millis(1));
    assert_eq!(scene.does(), [stops(&a, 0)]);
    scene.has(&a, "n1", State::Stopping);
    assert_eq!(scene.does(), []);
    scene.has(&a, "n1", State::Gone);
    assert_eq!(scene.does(), [starts(&a, "n2")]);
}

#[test]
fn a_process_that_serves_on_survives_its_netmanager_but_a_new_one_does_not() {
    let mut scene = Scene::new();
    let a = id("s", 1);
    scene.order(&a, run(1, Writers::Many));
    scene.has(&a, "n1", State::Serving);
    scene.seen.insert(a.clone(), 1);
    scene.nodes.get_mut("n1").unwrap().broke(1, scene.now);
    scene.after(Duration::from_secs(29));
    assert_eq!(scene.does(), []);
    assert!(scene.view().serves(&a, &scene.statuses[&a]));
    scene.seen.insert(a.clone(), 0);
    assert!(!scene.view().serves(&a, &scene.statuses[&a]));
    assert_eq!(scene.does(), [stops(&a, 0)]);
    scene.seen.insert(a.clone(), 1);
    scene.after(Duration::from_secs(1));
    assert_eq!(scene.does(), [stops(&a, 5000)]);
}

#[test]
fn an_instance_of_a_lost_node_stays_where_no_other_node_has_room() {
    let mut scene = Scene::new();
    let (a, b) = (id("s", 1), id("t", 1));
    scene.order(&a, run(600, Writers::Many));
    scene.order(&b, run(600, Writers::Many));
    for (id, node) in [(&a, "n1"), (&b, "n2")] {
        scene.ledger.booked.insert(id.clone(), needs(600));
        scene.has(id, node, State::Serving);
    }
    scene.nodes.get_mut("n1").unwrap().broke(1, scene.now);
    scene.after(Duration::from_secs(60));
    assert_eq!(scene.does(), []);
}

#[test]
fn an_instance_with_one_writer_ends_with_the_lease_and_never_comes_back() {
    let mut scene = Scene::new();
    let (one, many) = (id("s", 1), id("t", 1));
    scene.order(&one, run(1, Writers::One));
    scene.order(&many, run(1, Writers::Many));
    scene.has(&one, "n1", State::Serving);
    scene.has(&many, "n2", State::Serving);
    scene.after(Duration::from_millis(59_999));
    assert_eq!(scene.does(), []);
    assert!(scene.view().wakes() <= scene.lease_ends);
    scene.after(Duration::from_millis(1));
    let fenced = Action::GiveUp {
        id: one.clone(),
        verdict: Verdict::Fenced,
    };
    assert_eq!(scene.does(), [fenced]);
    scene.ledger.verdicts.insert(one.clone(), Verdict::Fenced);
    assert_eq!(scene.does(), [stops(&one, 5000)]);
    scene.has(&one, "n1", State::Gone);
    scene.lease_ends = Some(scene.now + Duration::from_secs(60));
    assert_eq!(scene.does(), []);
}

#[test]
fn an_instance_with_one_writer_is_fenced_when_its_node_was_away_for_a_lease() {
    let mut scene = Scene::new();
    let one = id("s", 1);
    scene.order(&one, run(1, Writers::One));
    scene.has(&one, "n1", State::Serving);
    scene.seen.insert(one.clone(), 1);
    let lost = scene.now;
    scene.nodes.get_mut("n1").unwrap().broke(1, lost);
    scene.after(Duration::from_millis(9999));
    assert_eq!(scene.does(), []);
    assert_eq!(scene.view().wakes(), Some(lost + Duration::from_secs(10)));
    scene.after(Duration::from_millis(1));
    let fenced = Action::GiveUp {
        id: one,
        verdict: Verdict::Fenced,
    };
    assert_eq!(scene.does(), [fenced]);
}

#[test]
fn without_a_lease_an_instance_with_one_writer_does_not_start() {
    let mut scene = Scene::new();
    scene.order(&id("s", 1), run(1, Writers::One));
    scene.lease_ends = None;
    assert_eq!(scene.does(), []);
}

#[test]
fn a_full_cluster_refuses_with_its_numbers_and_a_driver_with_its_reason() {
    let mut scene = Scene::new();
    let (large, bad) = (id("s", 1), id("t", 1));
    scene.order(&large, run(1001, Writers::Many));
    scene.order(&bad, run(1, Writers::Many));
    scene.has(&bad, "n1", State::Refused);
    let refusals: Vec<(InstanceId, String)> = scene
        .does()
        .into_iter()
        .map(|action| match action {
            Action::GiveUp {
                id,
                verdict: Verdict::Refused(reason),
            } => (id, reason),
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(refusals[0], (bad, "why".to_owned()));
    assert_eq!(refusals[1].0, large);
    assert!(refusals[1].1.contains("1001m cpu"), "{}", refusals[1].1);
    assert!(
        refusals[1].1.contains("n2 has 1000m cpu"),
        "{}",
        refusals[1].1
    );
}

#[test]
fn what_no_order_names_is_left_alone_and_forgotten_when_it_is_gone() {
    let mut scene = Scene::new();
    let (stranger, gone) = (id("s", 1), id("t", 1));
    scene.has(&stranger, "n1", State::Serving);
    scene.has(&gone, "n1", State::Gone);
    assert_eq!(scene.does(), [Action::Forget { id: gone }]);
}

#[test]
fn a_ledger_survives_its_file() {
    let mut ledger = Ledger::default();
    ledger.verdicts.insert(id("s", 1), Verdict::Fenced);
    let refused = Verdict::Refused("why".to_owned());
    ledger.verdicts.insert(id("t", 1), refused);
    ledger.booked.insert(id("s", 1), needs(5));
    let text = serde_json::to_string(&ledger).unwrap();
    assert_eq!(serde_json::from_str::<Ledger>(&text).unwrap(), ledger);
}

/// A state by its number.
fn state(number: u8) -> Option<State> {
    let states = [
        State::Starting,
        State::Serving,
        State::Silent,
        State::Restarting,
        State::Refused,
        State::Stopping,
        State::Gone,
    ];
    states.get(usize::from(number)).copied()
}

/// Any cluster of up to eight instances.
fn scenes() -> impl Strategy<Value = Scene> {
    let instance = (0u8..3, 0u8..9, any::<bool>(), 1u64..700, any::<bool>());
    let instances = prop::collection::vec(instance, 0..8);
    let times = (0u64..90, 0u64..90, any::<(bool, bool)>());
    (instances, times, 0u8..3).prop_map(|(instances, (lost, passed, (breaks, lease)), contact)| {
        let mut scene = Scene::new();
        for (index, (want, found, first, cpu, one)) in instances.into_iter().enumerate() {
            let id = id(&format!("s{}", index % 3), index as u64);
            let writers = if one { Writers::One } else { Writers::Many };
            match want {
                0 => scene.order(&id, Want::Stop),
                1 => scene.order(&id, run(cpu, writers)),
                _ => {}
            }
            if let Some(state) = state(found) {
                let node = if first { "n1" } else { "n2" };
                scene.has(&id, node, state);
                scene.ledger.booked.insert(id, needs(cpu));
            }
        }
        scene.after(Duration::from_secs(lost));
        if breaks {
            scene.nodes.get_mut("n1").unwrap().broke(1, scene.now);
        }
        scene.after(Duration::from_secs(passed));
        scene.lease_ends = lease.then(|| scene.now + Duration::from_secs(1));
        scene.contact =
            [Contact::Settled, Contact::AwaitsOrders, Contact::StopsFirst][usize::from(contact)];
        scene
    })
}

/// What a perfect driver and the ledger make of an action.
fn carry_out(scene: &mut Scene, action: &Action) {
    match action {
        Action::Stop { id, .. } => scene.has(id, "n1", State::Gone),
        Action::Forget { id } => {
            scene.statuses.remove(id);
        }
        Action::GiveUp { id, verdict } => {
            scene.ledger.verdicts.insert(id.clone(), verdict.clone());
        }
        Action::Run { id, node } => {
            scene.has(id, node, State::Serving);
            if let Want::Run(run) = &scene.orders[id].want {
                scene.ledger.booked.insert(id.clone(), run.requests);
            }
        }
    }
}

fn booked(scene: &Scene, node: &str) -> u64 {
    let held = scene.statuses.iter().filter(|(_, status)| {
        status.node == node && !matches!(status.state, State::Gone | State::Refused)
    });
    held.map(|(id, _)| scene.ledger.booked[id].cpu.as_milli())
        .sum()
}

proptest! {
    #[test]
    fn no_instance_runs_twice_and_no_node_is_overbooked(mut scene in scenes()) {
        let before = ["n1", "n2"].map(|node| booked(&scene, node));
        let actions = scene.does();
        let owed: Vec<InstanceId> = scene
            .orders
            .values()
            .filter(|order| order.want == Want::Stop)
            .map(|order| order.id.clone())
            .collect();
        let mut named = BTreeSet::new();
        for action in &actions {
            let (Action::Stop { id, .. } | Action::Forget { id } | Action::GiveUp { id, .. }
                | Action::Run { id, .. }) = action;
            prop_assert!(named.insert(id.clone()), "one action per instance");
            if let Action::Run { id, node } = action {
                let left = scene.statuses.get(id).map(|status| status.state);
                prop_assert!(matches!(left, None | Some(State::Gone)), "{left:?}");
                prop_assert!(!owed.contains(id));
                prop_assert!(scene.contact != Contact::AwaitsOrders);
                if scene.contact == Contact::StopsFirst {
                    for id in &owed {
                        let state = scene.statuses.get(id).map(|status| status.state);
                        prop_assert!(matches!(state, Some(State::Gone | State::Refused)));
                    }
                }
                prop_assert_eq!(scene.nodes[node].standing(scene.now), Standing::Ready);
            }
            if let Action::Stop { id, .. } = action {
                prop_assert!(scene.orders.contains_key(id), "a stranger is left alone");
            }
        }
        for action in &actions {
            carry_out(&mut scene, action);
        }
        for (node, before) in ["n1", "n2"].iter().zip(before) {
            prop_assert!(booked(&scene, node) <= before.max(1000));
        }
    }

    #[test]
    fn a_perfect_driver_brings_it_to_rest(mut scene in scenes()) {
        scene.contact = Contact::Settled;
        for _ in 0..6 {
            for action in scene.does() {
                carry_out(&mut scene, &action);
            }
        }
        // What was stopping before is all that is still under way.
        let actions = scene.does();
        prop_assert!(actions.is_empty(), "{actions:?}");
    }
}
