use proptest::prelude::*;

use super::*;
use crate::{
    report::Tier,
    world::{SHOP, World, facts, name, service, slot},
};

#[test]
fn a_decision_says_what_every_other_cluster_would_have_cost() {
    let mut world = World::new();
    world.apply(SHOP).unwrap();
    world.settle();
    let service = &world.kb.services[&service("default/shop/front")];
    insta::assert_yaml_snapshot!(service.decisions[&0]);
}

#[test]
fn every_hard_constraint_is_refused_by_name_and_numbers() {
    let mut world = World::new();
    let needy = SHOP.replace(
        "requests: { cpu: 250m, memory: 64Mi }",
        "requests: { cpu: 5, memory: 20Gi, gpu: 1 }
      constraints: { tier: [fog, edge], residency: [fr], labels: { disk: ssd } }",
    );
    let needy = needy.replace("rate: 10 }", "rate: 10, maxLatency: 5ms }");
    world.apply(&needy).unwrap();
    world.settle();
    world.lose("fog");
    let view = View::new(&world.kb, world.now_ms + 45_000);
    let store = slot("default/shop/store#0");
    let mut shown = Vec::new();
    for cluster in ["cloud", "edge", "fog", "moon"] {
        for refusal in view.refusals(&store, &name(cluster), Held::New) {
            shown.push(format!("{cluster}: {refusal}"));
        }
    }
    insta::assert_snapshot!(shown.join("\n"));
}

#[test]
fn a_latency_limit_draws_a_service_to_its_caller() {
    let mut world = World::new();
    let near = SHOP.replace(
        "to: front, rate: 200",
        "to: front, rate: 200, maxLatency: 20ms",
    );
    world.apply(&near).unwrap();
    world.settle();
    // The cloud is 40 ms away, the fog 10.
    assert_eq!(world.backends("default/shop/front"), ["fog"]);
    let explained = explain(&world.kb, &service("default/shop/front"), world.now_ms);
    let reason = "latency: link client -> front needs 20ms, RTT edge - cloud is 40ms".to_owned();
    assert_eq!(
        explained[0].now[&name("cloud")],
        Verdict::Refused(vec![reason])
    );
    assert_eq!(explained[0].bound, Some(name("fog")));
}

#[test]
fn a_tightened_limit_moves_what_no_longer_meets_it() {
    let mut world = World::new();
    world.apply(SHOP).unwrap();
    world.settle();
    let near = SHOP.replace(
        "to: front, rate: 200",
        "to: front, rate: 200, maxLatency: 5ms",
    );
    world.apply(&near).unwrap();
    world.settle();
    assert_eq!(world.backends("default/shop/front"), ["edge"]);
    let moved = &world.kb.migrations[&slot("default/shop/front#0")];
    assert_eq!(moved.reason, crate::command::Reason::Constraint);
}

#[test]
fn users_draw_a_service_to_where_they_enter() {
    let mut world = World::new();
    let users = SHOP
        .replace(
            "command: [stock]",
            "command: [stock]\n      ingress: [{ cluster: fog, rate: 1000 }]",
        )
        .replace("{ cost: 1 }", "{ cost: 1, latency: 1 }")
        .replace(
            "from: front, to: stock, rate: 200",
            "from: front, to: stock, rate: 1",
        );
    world.apply(&users).unwrap();
    world.settle();
    assert_eq!(world.backends("default/shop/stock"), ["fog"]);
}

#[test]
fn each_weight_draws_to_where_it_is_served_best() {
    let place = |weights: &str| {
        let mut world = World::empty();
        let mut green = facts(Tier::Cloud, 90_000);
        green.carbon_g_kwh = 10;
        world.join("green", green);
        world.join("cheap", facts(Tier::Cloud, 10_000));
        world.join("edge", facts(Tier::Edge, 90_000));
        world.run(2);
        world.apply(&SHOP.replace("{ cost: 1 }", weights)).unwrap();
        world.settle();
        world.backends("default/shop/front").remove(0)
    };
    assert_eq!(place("{ energy: 1 }"), "green");
    assert_eq!(place("{ cost: 1 }"), "cheap");
    assert_eq!(place("{ latency: 1 }"), "edge");
}

/// Prices and node sizes of cloud, fog and edge, and a goal file.
fn any_problem() -> impl Strategy<Value = (Vec<(u64, u64)>, String)> {
    let weights = (0u32..4, 0u32..4, 0u32..4, 1u32..4);
    let needs = prop::collection::vec(100u64..3000, 2);
    let limit = prop::option::of(1u32..60);
    let clusters = prop::collection::vec((1_000u64..200_000, 0u64..4000), 3);
    (clusters, weights, needs, limit, 1u32..4).prop_map(
        |(clusters, (energy, cost, latency, performance), needs, limit, replicas)| {
            let limit = limit.map_or(String::new(), |ms| format!(", maxLatency: {ms}ms"));
            let weights = format!(
                "{{ energy: {energy}, cost: {cost}, latency: {latency}, performance: {performance} }}"
            );
            let stock = format!("command: [stock]\n      replicas: {replicas}");
            let text = SHOP
                .replace("{ cost: 1 }", &weights)
                .replace("cpu: 500m", &format!("cpu: {}m", needs[0]))
                .replace("cpu: 250m", &format!("cpu: {}m", needs[1]))
                .replace("command: [stock]", &stock)
                .replace("to: stock, rate: 200", &format!("to: stock, rate: 200{limit}"));
            (clusters, text)
        },
    )
}

fn build(clusters: Vec<(u64, u64)>, text: &str) -> World {
    let mut world = World::empty();
    let tiers = [
        ("cloud", Tier::Cloud),
        ("fog", Tier::Fog),
        ("edge", Tier::Edge),
    ];
    for ((cluster, tier), (price, capacity)) in tiers.into_iter().zip(clusters) {
        world.join(cluster, facts(tier, price));
        for node in world.agent(cluster).nodes.values_mut() {
            node.cpu_milli = capacity;
        }
    }
    world.run(2);
    world.apply(text).unwrap();
    world
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 16, ..ProptestConfig::default() })]

    #[test]
    fn every_answer_keeps_every_hard_constraint((clusters, text) in any_problem()) {
        let mut world = build(clusters, &text);
        let app = "default/shop".parse().unwrap();
        let mut task = Task::default();
        for (name, goal) in &world.kb.applications[&app].spec.services {
            let service = app.service(name);
            task.pending.extend((0..goal.replicas).map(|i| service.slot(i)));
        }
        let view = View::new(&world.kb, world.now_ms);
        let answer = place(&view, &app, &task);
        prop_assert_eq!(answer.binds.len() + answer.unplaced.len(), task.pending.len());
        prop_assert_eq!(&place(&view, &app, &task), &answer, "the search has no whims");
        for (_, decision) in &answer.binds {
            prop_assert!(decision.lower_bound <= decision.objective);
        }
        // The Knowledge Base rechecks each command and refuses none; World asserts it. Then nothing moves.
        world.settle();
        let before = placed(&world);
        world.step_ms = 20_000;
        // One move may open the way for the next, and each rests before it goes on; but it comes to an end.
        let mut last = before.clone();
        let comes_to_rest = (0..5).any(|_| {
            world.run(35);
            let now = placed(&world);
            std::mem::replace(&mut last, now.clone()) == now
        });
        prop_assert!(comes_to_rest, "constant input moves nothing: {last:?}");
        prop_assert_eq!(before.len(), answer.binds.len());
        let view = View::new(&world.kb, world.now_ms);
        for (slot, bindings) in &world.kb.slots {
            for binding in bindings.values() {
                let refusals = view.refusals(slot, &binding.cluster, Held::Already);
                prop_assert_eq!(refusals, Vec::new());
            }
        }
        for cluster in world.kb.clusters.keys() {
            let booked: u64 = world.kb.slots.values().flat_map(|b| b.values())
                .filter(|b| b.cluster == *cluster)
                .map(|b| b.template.requests.cpu.as_milli())
                .sum();
            let has: u64 = world.kb.clusters[cluster].nodes.values()
                .map(|n| n.report.cpu_milli)
                .sum();
            prop_assert!(booked <= has, "{cluster}: {booked} of {has}");
        }
    }
}

fn placed(world: &World) -> BTreeMap<Slot, Vec<Name>> {
    world
        .kb
        .slots
        .iter()
        .map(|(slot, bindings)| {
            let clusters = bindings.values().map(|b| b.cluster.clone());
            (slot.clone(), clusters.collect())
        })
        .collect()
}

#[test]
fn of_many_clusters_that_lost_those_are_named_that_came_next() {
    let others = |count: u64| -> BTreeMap<Name, Lost> {
        let lost = |number| match number % 2 {
            0 => Lost::Refused(vec!["tier: needs cloud, is edge".to_owned()]),
            _ => Lost::Dearer {
                parts: Parts::default(),
                by: 1_000 - number,
            },
        };
        let name = |number| format!("c{number:03}").parse().unwrap();
        (0..count)
            .map(|number| (name(number), lost(number)))
            .collect()
    };
    assert_eq!(nearest(others(16)), others(16));
    let named: Vec<String> = nearest(others(100)).keys().map(Name::to_string).collect();
    assert_eq!(named, ["c095", "c097", "c099"]);
}
