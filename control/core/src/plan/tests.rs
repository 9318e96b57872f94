use super::*;
use crate::{
    command::Applied,
    migration::AWAY_MS,
    placement::Verdict,
    report::Tier,
    world::{SHOP, World, facts, name, service, slot},
};

fn shop() -> World {
    let mut world = World::new();
    assert_eq!(world.apply(SHOP), Ok(Applied::Generation(1)));
    world.settle();
    world
}

#[test]
fn a_goal_file_becomes_running_instances_where_they_cost_least() {
    let world = shop();
    assert_eq!(world.backends("default/shop/client"), ["edge"]);
    for cheap in ["front", "stock", "store"] {
        assert_eq!(world.backends(&format!("default/shop/{cheap}")), ["cloud"]);
    }
}

#[test]
fn the_same_goal_file_again_and_constant_input_change_nothing() {
    let mut world = shop();
    assert_eq!(world.apply(SHOP), Ok(Applied::Unchanged));
    world.step_ms = 10_000;
    for _ in 0..90 {
        assert_eq!(world.step(), Vec::new());
    }
}

#[test]
fn a_plan_in_parts_goes_on_behind_what_can_be_placed_nowhere() {
    let mut world = World::new();
    world.settle();
    let nowhere = SHOP.replace("tier: [edge]", "labels: { no: where }");
    for (app, goal) in [("one", SHOP), ("three", SHOP), ("two", &nowhere)] {
        let goal = goal.replace("name: shop", &format!("name: {app}"));
        world.apply(&goal).unwrap();
    }
    let mut counts = Vec::new();
    let mut next = None;
    let tried = Tried::default();
    // What is in flight is planned once more, and changes nothing.
    while counts.len() < 4 {
        let (kb, inputs) = (&world.kb, &world.inputs);
        let draft = Draft::of((kb, inputs, world.now_ms), &tried, next.as_ref());
        let part = draft.map(|draft| draft.place(|| true));
        let part = part.unwrap_or_default();
        let outcomes = world.entry(part.commands);
        assert!(outcomes.iter().all(Result::is_ok), "{outcomes:?}");
        counts.push(outcomes.len());
        next = part.next;
    }
    // The fourth begins anew: only what has no place is looked at again.
    assert_eq!((counts, next), (vec![4, 4, 3, 0], None));
}

/// What is placed now, and what is known of it afterwards.
fn place(world: &World, now_ms: u64, tried: &mut Tried) -> Option<usize> {
    let draft = Draft::of((&world.kb, &world.inputs, now_ms), tried, None)?;
    let looked_at = draft.restless.wants.len();
    tried.extend(draft.place(|| false).tried, now_ms);
    Some(looked_at)
}

#[test]
fn what_found_no_place_is_tried_again_when_it_or_what_is_there_has_changed_or_after_a_second() {
    let mut world = World::new();
    world.settle();
    let nowhere = |app: &str, label: &str| {
        let label = format!("labels: {{ {label}: where }}");
        let goal = SHOP.replace("tier: [edge]", &label);
        goal.replace("tier: [cloud]", &label)
            .replace("name: shop", &format!("name: {app}"))
    };
    for app in ["one", "two"] {
        world.apply(&nowhere(app, "no")).unwrap();
    }
    world.settle();
    let mut tried = Tried::default();
    let now_ms = world.kb.log_time_ms;
    let mut counts = vec![place(&world, now_ms, &mut tried)];
    counts.push(place(&world, now_ms, &mut tried));
    // Another goal of one of them.
    world.apply(&nowhere("two", "any")).unwrap();
    counts.push(place(&world, now_ms, &mut tried));
    counts.push(place(&world, now_ms + 999, &mut tried));
    // A second after it, and after the other's.
    counts.push(place(&world, now_ms + 1_000, &mut tried));
    counts.push(place(&world, now_ms + 1_000, &mut tried));
    // A report.
    let facts = world.kb.facts_index();
    world.step();
    assert!(world.kb.facts_index() > facts);
    counts.push(place(&world, now_ms + 1_000, &mut tried));
    let want = [Some(2), None, Some(1), None, Some(2), None, Some(2)];
    assert_eq!(counts, want);
}

#[test]
fn what_a_draft_looks_at_is_what_its_applications_link_to_and_no_others() {
    let mut world = World::new();
    for (app, to) in [
        ("one", "stock"),
        ("three", "stock"),
        ("two", "default/one/front"),
    ] {
        let goal = SHOP.replace("name: shop", &format!("name: {app}"));
        let goal = goal.replace("to: stock", &format!("to: {to}"));
        world.apply(&goal).unwrap();
    }
    world.settle();
    let two = service("default/two/front").app();
    let excerpt = world.kb.excerpt([&two].into_iter());
    for (name, is_known, runs) in [("one", true, 0), ("three", false, 0), ("two", true, 4)] {
        let front = service(&format!("default/{name}/front"));
        let known = is_known.then(|| world.kb.goal(&front).unwrap());
        assert_eq!(excerpt.goal(&front), known, "{name}");
        let slots = excerpt
            .slots
            .keys()
            .filter(|it| it.service.is_of(&front.app()));
        assert_eq!(slots.count(), runs, "{name}");
    }
}

#[test]
fn a_part_of_a_plan_is_as_large_as_an_entry() {
    let mut world = World::new();
    world.settle();
    let many = SHOP.replace("ports: [{ name: http, port: 80 }]", "replicas: 100");
    for app in ["a", "b", "c", "d"] {
        let goal = many.replace("name: shop", &format!("name: {app}"));
        world.apply(&goal).unwrap();
    }
    let (kb, inputs) = (&world.kb, &world.inputs);
    let draft = Draft::of((kb, inputs, world.now_ms), &Tried::default(), None).unwrap();
    let wanted: Vec<_> = draft
        .restless
        .wants
        .iter()
        .map(|(_, it)| it.len())
        .collect();
    assert_eq!(wanted, [103, 103, 103]);
    assert_eq!(draft.restless.next.unwrap().name, name("d"));
}

#[test]
fn a_goal_change_moves_services_make_before_break() {
    let mut world = shop();
    world.flows = 3;
    world
        .apply(&SHOP.replace("{ cost: 1 }", "{ latency: 1 }"))
        .unwrap();
    let mut steps = 0;
    while world.backends("default/shop/stock") != ["edge"] || !world.quiet_migrations() {
        world.step();
        steps += 1;
        assert!(steps < 60, "{:#?}", world.kb.migrations);
        for service in ["front", "stock"] {
            let backends = world.backends(&format!("default/shop/{service}"));
            assert_eq!(backends.len(), 1, "{service} after {steps} s: {backends:?}");
        }
    }
    assert_eq!(world.backends("default/shop/front"), ["edge"]);
    // One writer does not move by itself: it would have to stop first.
    assert_eq!(world.backends("default/shop/store"), ["cloud"]);
    assert_eq!(world.running("cloud"), 1);
    world.settle();
    assert!(steps >= 10, "flows are drained until the deadline");
}

/// The example of the book shop in clusters of its lab's prices.
#[test]
fn the_book_shop_moves_to_its_users_without_a_gap() {
    let file = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../examples/bookinfo/bookinfo.yaml"
    );
    let yaml = std::fs::read_to_string(file).unwrap();
    let mut world = World::empty();
    for (cluster, tier, price, carbon) in [
        ("cloud", Tier::Cloud, 20_000, 320),
        ("fog", Tier::Fog, 45_000, 210),
        ("edge", Tier::Edge, 90_000, 110),
    ] {
        let mut facts = facts(tier, price);
        (facts.cpu_power_mw, facts.carbon_g_kwh) = (5_000, carbon);
        world.join(cluster, facts);
    }
    world.run(2);
    world.apply(&yaml).unwrap();
    world.settle();
    let page = "shop/bookinfo/productpage";
    assert_eq!(world.backends(page), ["cloud", "cloud"]);
    let nearer = yaml.replace("cost: 8, latency: 1", "cost: 1, latency: 8");
    assert_ne!(nearer, yaml);
    world.apply(&nearer).unwrap();
    let services: Vec<_> = world.kb.services.keys().cloned().collect();
    for _ in 0..60 {
        world.step();
        for service in &services {
            assert!(
                !world.backends(&service.to_string()).is_empty(),
                "{service}"
            );
        }
    }
    world.settle();
    assert!(!world.backends(page).contains(&"cloud".to_owned()));
}

#[test]
fn a_drained_cluster_is_emptied_make_before_break_and_stays_empty_until_it_is_used_again() {
    let mut world = shop();
    let cluster = name("cloud");
    let drain = Command::DrainCluster {
        cluster: cluster.clone(),
    };
    world.one(drain).unwrap();
    let mut steps = 0;
    while world.running("cloud") > 0 {
        world.step();
        steps += 1;
        assert!(steps < 60, "{:#?}", world.kb.migrations);
        for service in ["front", "stock"] {
            let backends = world.backends(&format!("default/shop/{service}"));
            assert_eq!(backends.len(), 1, "{service} after {steps} s: {backends:?}");
        }
    }
    world.settle();
    // One writer, too: its operator asked for it.
    assert_ne!(world.backends("default/shop/store"), ["cloud"]);
    assert_eq!(world.backends("default/shop/store").len(), 1);
    let more = SHOP.replace("command: [stock]", "command: [stock]\n      replicas: 3");
    world.apply(&more).unwrap();
    world.settle();
    assert_eq!(world.backends("default/shop/stock").len(), 3);
    assert_eq!(world.running("cloud"), 0);
    world.one(Command::UndrainCluster { cluster }).unwrap();
    world.apply(SHOP).unwrap();
    world.settle();
    assert_eq!(world.backends("default/shop/front"), ["cloud"]);
}

#[test]
fn what_may_run_nowhere_else_stays_in_a_drained_cluster_and_its_explanation_says_so() {
    let mut world = shop();
    let cluster = name("edge");
    world.one(Command::DrainCluster { cluster }).unwrap();
    world.run(60);
    assert_eq!(world.backends("default/shop/client"), ["edge"]);
    let client = service("default/shop/client");
    let explained = placement::explain(&world.kb, &client, world.now_ms);
    let Verdict::Refused(reasons) = &explained[0].now[&name("edge")] else {
        panic!("{explained:?}");
    };
    assert_eq!(reasons[..], ["cluster: drained by its operator"]);
}

#[test]
fn the_move_budget_bounds_what_is_on_its_way() {
    let mut world = shop();
    world.inputs.moves = 1;
    world
        .apply(&SHOP.replace("{ cost: 1 }", "{ latency: 1 }"))
        .unwrap();
    for _ in 0..40 {
        world.step();
        let running = world
            .kb
            .migrations
            .values()
            .filter(|m| m.state.is_running());
        assert!(running.count() <= 1);
    }
    assert_eq!(world.backends("default/shop/front"), ["edge"]);
}

#[test]
fn a_small_gain_moves_nothing() {
    let mut world = shop();
    // A twentieth cheaper than the cloud, after the cool-down: less than a tenth.
    let mut facts = world.agent("fog").facts.clone();
    facts.cpu_price_ueur_h = 19_000;
    world.agent("fog").facts = facts;
    world.register("fog");
    world.step_ms = 10_000;
    for _ in 0..90 {
        assert_eq!(world.step(), Vec::new());
    }
}

#[test]
fn a_lost_cluster_is_replaced_and_stops_its_copies_when_it_returns() {
    let mut world = shop();
    world.lose("cloud");
    world.run(4);
    assert_eq!(world.backends("default/shop/front"), ["fog"]);
    assert_eq!(
        world.backends("default/shop/store"),
        Vec::<String>::new(),
        "one writer waits"
    );
    world.run(6);
    assert_eq!(world.backends("default/shop/store"), ["fog"]);
    assert_eq!(world.kb.owed_stops[&name("cloud")].len(), 3);
    world.register("cloud");
    world.step();
    assert_eq!(world.running("cloud"), 0);
    world.run(2);
    assert!(world.kb.owed_stops.is_empty());
}

#[test]
fn paused_failover_replaces_nothing() {
    let mut world = shop();
    world.inputs.failover = Failover::Paused;
    world.lose("cloud");
    world.run(30);
    assert!(world.kb.owed_stops.is_empty());
    world.register("cloud");
    world.settle();
    assert_eq!(world.backends("default/shop/front"), ["cloud"]);
}

#[test]
fn what_a_cluster_refuses_is_bound_elsewhere_until_the_next_generation() {
    let mut world = World::new();
    world
        .agent("cloud")
        .refuses
        .insert("default/shop/front".to_owned());
    world.apply(SHOP).unwrap();
    world.settle();
    assert_eq!(world.backends("default/shop/front"), ["fog"]);
    let explained = placement::explain(&world.kb, &service("default/shop/front"), world.now_ms);
    let reason = vec!["refused here: no such program".to_owned()];
    assert_eq!(explained[0].now[&name("cloud")], Verdict::Refused(reason));
    world.agent("cloud").refuses.clear();
    world
        .apply(&SHOP.replace("rate: 10 ", "rate: 11 "))
        .unwrap();
    world.settle();
    assert_eq!(world.backends("default/shop/front"), ["cloud"]);
}

#[test]
fn an_instance_that_does_not_answer_is_bound_elsewhere() {
    let mut world = shop();
    world
        .agent("cloud")
        .mute
        .insert("default/shop/front".to_owned());
    world.run(9);
    assert_eq!(world.backends("default/shop/front"), Vec::<String>::new());
    world.run(5);
    assert_eq!(world.backends("default/shop/front"), ["fog"]);
    assert_eq!(world.backends("default/shop/stock"), ["cloud"]);
}

#[test]
fn one_writer_that_does_not_answer_is_stopped_and_then_bound_elsewhere() {
    let mut world = shop();
    let store = "default/shop/store".to_owned();
    world.agent("cloud").mute.insert(store);
    // World checks in each step that there are never two of it.
    world.run(25);
    assert_eq!(world.backends("default/shop/store"), ["fog"]);
    assert_eq!(world.running("cloud"), 2);
    let migration = &world.kb.migrations[&slot("default/shop/store#0")];
    assert_eq!(
        (migration.state, migration.reason),
        (State::Done, Reason::NotReady)
    );
}

#[test]
fn what_cannot_be_placed_is_pending_with_reasons_and_the_rest_runs() {
    let mut world = World::new();
    world
        .apply(&SHOP.replace("cpu: 250m", "cpu: 5, gpu: 1"))
        .unwrap();
    world.settle();
    assert_eq!(world.backends("default/shop/front"), ["cloud"]);
    assert_eq!(world.backends("default/shop/store"), Vec::<String>::new());
    let explained = placement::explain(&world.kb, &service("default/shop/store"), world.now_ms);
    insta::assert_yaml_snapshot!(explained);
}

#[test]
fn scaling_down_drains_and_then_stops() {
    let mut world = World::new();
    let two = SHOP.replacen("command: [front]", "command: [front]\n      replicas: 2", 1);
    world.apply(&two).unwrap();
    world.settle();
    assert_eq!(world.backends("default/shop/front").len(), 2);
    world.flows = 1;
    world.apply(SHOP).unwrap();
    world.run(5);
    let draining = slot("default/shop/front#1");
    assert!(world.kb.slots.contains_key(&draining), "flows are left");
    world.flows = 0;
    world.run(3);
    assert!(!world.kb.slots.contains_key(&draining));
}

#[test]
fn a_deleted_application_leaves_nothing_behind() {
    let mut world = shop();
    let application = "default/shop".parse().unwrap();
    let delete = Command::Delete { application };
    assert_eq!(world.one(delete.clone()), Ok(Applied::Changed));
    world.settle();
    assert!(world.kb.slots.is_empty() && world.kb.services.is_empty());
    assert_eq!(world.running("cloud") + world.running("edge"), 0);
    assert!(matches!(
        world.one(delete),
        Err(Refusal::UnknownApplication(_))
    ));
    // The old addresses rest; check_vips has seen each.
    world.apply(SHOP).unwrap();
    world.settle();
    assert_eq!(world.backends("default/shop/front"), ["cloud"]);
}

#[test]
fn a_new_version_takes_over_where_the_old_one_runs() {
    let mut world = shop();
    let before = world.kb.live(&slot("default/shop/front#0")).unwrap().0;
    world
        .apply(&SHOP.replace("[front]", "[front, --new]"))
        .unwrap();
    for _ in 0..20 {
        world.step();
        assert_eq!(world.backends("default/shop/front").len(), 1);
    }
    let (epoch, binding) = world.kb.live(&slot("default/shop/front#0")).unwrap();
    assert!(epoch > before);
    assert_eq!(binding.cluster, name("cloud"));
    assert_eq!(binding.template.command, ["front", "--new"]);
    // The one writer too, but it stops first: World checks that there are never two.
    world
        .apply(&SHOP.replace("[store]", "[store, --new]"))
        .unwrap();
    world.settle();
    let (_, binding) = world.kb.live(&slot("default/shop/store#0")).unwrap();
    assert_eq!(binding.template.command, ["store", "--new"]);
}

#[test]
fn a_user_moves_a_slot_and_is_told_why_not() {
    let mut world = shop();
    let moves = |world: &World, slot_name: &str, to: &str| {
        request_move(&world.kb, &slot(slot_name), &name(to), world.now_ms)
    };
    let no = moves(&world, "default/shop/client#0", "cloud").unwrap_err();
    assert_eq!(
        no.to_string(),
        "default/shop/client#0 cannot run in cloud: tier: needs edge, is cloud"
    );
    for moved in ["default/shop/front#0", "default/shop/store#0"] {
        let command = moves(&world, moved, "fog").unwrap();
        world.one(command).unwrap();
        let again = moves(&world, moved, "fog").unwrap_err();
        assert!(matches!(again, Refusal::Migrating(_)), "{again}");
    }
    world.run(20);
    assert_eq!(world.backends("default/shop/front"), ["fog"]);
    assert_eq!(world.backends("default/shop/store"), ["fog"]);
    assert!(world.quiet_migrations());
}

#[test]
fn a_target_that_fails_rolls_the_migration_back() {
    let mut world = shop();
    world
        .agent("fog")
        .mute
        .insert("default/shop/front".to_owned());
    let command = request_move(
        &world.kb,
        &slot("default/shop/front#0"),
        &name("fog"),
        world.now_ms,
    );
    world.one(command.unwrap()).unwrap();
    for _ in 0..70 {
        world.step();
        assert_eq!(world.backends("default/shop/front"), ["cloud"]);
    }
    let state = world.kb.migrations[&slot("default/shop/front#0")].state;
    assert_eq!(state, State::RolledBack);
    assert_eq!(world.running("fog"), 0);
}

#[test]
fn a_source_that_is_lost_hands_over_at_once() {
    let mut world = shop();
    world.acknowledge = false;
    let command = request_move(
        &world.kb,
        &slot("default/shop/front#0"),
        &name("fog"),
        world.now_ms,
    );
    world.one(command.unwrap()).unwrap();
    world.run(5);
    let state = world.kb.migrations[&slot("default/shop/front#0")].state;
    assert!(
        matches!(state, State::Repointing { .. }),
        "nobody acknowledges: {state:?}"
    );
    world.lose("cloud");
    world.run(2);
    let state = world.kb.migrations[&slot("default/shop/front#0")].state;
    assert_eq!(state, State::Done);
    assert_eq!(world.backends("default/shop/front"), ["fog"]);
    assert!(!world.kb.owed_stops[&name("cloud")].is_empty());
}

#[test]
fn a_node_without_its_netmanager_is_waited_for_as_long_as_a_restart_takes() {
    for back in [true, false] {
        let mut world = shop();
        let command = request_move(
            &world.kb,
            &slot("default/shop/front#0"),
            &name("fog"),
            world.now_ms,
        );
        // Only the client's node is concerned with front.
        let client = |world: &mut World, managed: bool| {
            for node in world.agent("edge").nodes.values_mut() {
                node.managed = managed;
            }
        };
        client(&mut world, false);
        world.one(command.unwrap()).unwrap();
        let gone = world.now_ms;
        let state = |world: &World| world.kb.migrations[&slot("default/shop/front#0")].state;
        while world.now_ms < gone + AWAY_MS - 2 * world.step_ms {
            world.step();
            let state = state(&world);
            assert!(
                matches!(state, State::Starting | State::Repointing { .. }),
                "its kernel still sends to the source: {state:?}"
            );
        }
        assert!(matches!(state(&world), State::Repointing { .. }));
        client(&mut world, back);
        world.run(5);
        let state = state(&world);
        assert!(!matches!(state, State::Repointing { .. }), "{state:?}");
    }
}

#[test]
fn what_is_ready_nowhere_visits_each_cluster_once_and_not_in_turns() {
    let mut world = shop();
    for cluster in ["cloud", "fog", "edge"] {
        let front = "default/shop/front".to_owned();
        world.agent(cluster).mute.insert(front);
    }
    world.run(60);
    let epoch = world.kb.live(&slot("default/shop/front#0")).unwrap().0;
    world.run(200);
    let (after, binding) = world.kb.live(&slot("default/shop/front#0")).unwrap();
    assert_eq!(
        after, epoch,
        "it stays, and is restarted, where it was tried last"
    );
    assert_eq!(binding.phase, Phase::NotReady);
}

#[test]
fn a_move_that_was_rolled_back_is_not_tried_again_at_once() {
    let mut world = shop();
    world
        .agent("edge")
        .mute
        .insert("default/shop/front".to_owned());
    world
        .apply(&SHOP.replace("{ cost: 1 }", "{ latency: 1 }"))
        .unwrap();
    world.run(75);
    let moved = slot("default/shop/front#0");
    let first = world.kb.migrations[&moved].clone();
    assert_eq!(first.state, State::RolledBack);
    world.run(100);
    assert_eq!(world.kb.migrations[&moved], first);
    assert_eq!(world.backends("default/shop/front"), ["cloud"]);
}
