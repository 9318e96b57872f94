use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::{
    command::{Bind, Reason, StartMigration},
    goal,
    invitation::Join,
    migration::Event,
    placement::Parts,
    report::{InstanceReport, Report, Tier},
    world::{SHOP, World, check_one_live_binding, facts, mesh, name, service, slot},
};

mod once;
mod restore;

fn batch(log_time_ms: u64, commands: Vec<Command>) -> Batch {
    Batch {
        log_time_ms,
        commands,
    }
}

fn decision(cluster: &str) -> Decision {
    Decision {
        cluster: name(cluster),
        parts: Parts::default(),
        others: BTreeMap::new(),
        objective: 0,
        lower_bound: 0,
    }
}

fn node(used4: Vec<Ipv4Addr>) -> NodeReport {
    NodeReport {
        ready: true,
        cpu_milli: 2000,
        memory_bytes: 1 << 30,
        gpus: 0,
        public_key: "key".to_owned(),
        tunnel: None,
        underlay: Vec::new(),
        used4,
        applied: (0, 0),
        rtt_us: BTreeMap::new(),
        reached: Vec::new(),
        draining_flows: Vec::new(),
    }
}

#[test]
fn nothing_is_done_before_there_is_a_mesh_and_there_is_only_one() {
    let mut kb = KnowledgeBase::default();
    let outcomes = kb.apply(1, &batch(5, vec![Command::Tick, Command::InitMesh(mesh())]));
    assert_eq!(outcomes, [Err(Refusal::NoMesh), Ok(Applied::Changed)]);
    let other = Mesh {
        name: "other".to_owned(),
        ..mesh()
    };
    let outcomes = kb.apply(
        2,
        &batch(5, vec![Command::InitMesh(mesh()), Command::InitMesh(other)]),
    );
    let refused = Err(Refusal::OtherMesh("test".to_owned()));
    assert_eq!(outcomes, [Ok(Applied::Unchanged), refused]);
}

#[test]
fn a_mesh_with_a_wrong_prefix_is_refused_by_its_field() {
    let cases = [
        (
            "name",
            Mesh {
                name: String::new(),
                ..mesh()
            },
        ),
        (
            "prefix6",
            Mesh {
                prefix6: "fd00::/64".parse().unwrap(),
                ..mesh()
            },
        ),
        (
            "prefix6",
            Mesh {
                prefix6: "2001:db8::/48".parse().unwrap(),
                ..mesh()
            },
        ),
        (
            "prefix4",
            Mesh {
                prefix4: Some("10.0.0.0/8".parse().unwrap()),
                ..mesh()
            },
        ),
        (
            "prefix4",
            Mesh {
                prefix4: Some("10.17.0.0/12".parse().unwrap()),
                ..mesh()
            },
        ),
    ];
    for (want, mesh) in cases {
        let outcome = KnowledgeBase::default().apply(1, &batch(0, vec![Command::InitMesh(mesh)]));
        assert!(
            matches!(&outcome[0], Err(Refusal::BadMesh { field, .. }) if field == want),
            "{outcome:?}"
        );
    }
}

#[test]
fn a_time_beyond_all_times_ends_nothing() {
    let mut world = World::new();
    world.apply(SHOP).unwrap();
    world.settle();
    world.now_ms = u64::MAX;
    world.one(Command::Tick).unwrap();
    let store = slot("default/shop/store#0");
    assert!(world.kb.fence_wait(&store, u64::MAX) > 0);
    let planned = crate::plan::plan(&world.kb, &crate::plan::Inputs::default(), u64::MAX);
    assert!(
        planned
            .iter()
            .all(|command| !matches!(command, Command::Bind(_)))
    );
}

#[test]
fn log_time_never_goes_back() {
    let mut kb = KnowledgeBase::default();
    kb.apply(1, &batch(50, vec![]));
    kb.apply(2, &batch(40, vec![Command::Tick]));
    assert_eq!((kb.log_time_ms, kb.index), (50, 2));
}

#[test]
fn what_was_seen_in_another_session_generation_or_epoch_is_refused() {
    let mut world = World::new();
    world.apply(SHOP).unwrap();
    let session = world.agent("cloud").session;
    let bind = Bind {
        slot: slot("default/shop/front#0"),
        cluster: name("cloud"),
        session,
        generation: 1,
        replaces: None,
        decision: decision("cloud"),
    };
    let refusal = |world: &mut World, bind: Bind| world.refusal(Command::Bind(Box::new(bind)));
    let stale = refusal(
        &mut world,
        Bind {
            session: 1,
            ..bind.clone()
        },
    );
    assert!(matches!(stale, Refusal::StaleSession { .. }), "{stale}");
    let stale = refusal(
        &mut world,
        Bind {
            generation: 2,
            ..bind.clone()
        },
    );
    assert!(matches!(stale, Refusal::StaleGeneration { .. }), "{stale}");
    let stale = refusal(
        &mut world,
        Bind {
            replaces: Some(1),
            ..bind.clone()
        },
    );
    assert!(matches!(stale, Refusal::StaleEpoch { .. }), "{stale}");
    let beyond = refusal(
        &mut world,
        Bind {
            slot: slot("default/shop/front#1"),
            ..bind.clone()
        },
    );
    assert!(matches!(beyond, Refusal::UnknownSlot { .. }), "{beyond}");
    world.one(Command::Bind(Box::new(bind.clone()))).unwrap();
    let again = refusal(&mut world, bind.clone());
    assert!(matches!(again, Refusal::StaleEpoch { .. }), "{again}");
    world.run(2);
    let (epoch, _) = world.kb.live(&bind.slot).unwrap();
    let serving = refusal(
        &mut world,
        Bind {
            replaces: Some(epoch),
            ..bind
        },
    );
    assert!(matches!(serving, Refusal::StillServing(_)), "{serving}");
}

#[test]
fn booked_capacity_is_rechecked_and_conflicts_fail_alone() {
    let mut world = World::new();
    // Each asks for 3 of the 8 vCPU of the cloud; a node has 4.
    world
        .apply(
            &SHOP
                .replace("cpu: 500m", "cpu: 3")
                .replace("cpu: 250m", "cpu: 3"),
        )
        .unwrap();
    let session = world.agent("cloud").session;
    let bind = |service: &str| {
        Command::Bind(Box::new(Bind {
            slot: slot(&format!("default/shop/{service}#0")),
            cluster: name("cloud"),
            session,
            generation: 1,
            replaces: None,
            decision: decision("cloud"),
        }))
    };
    let outcomes = world.entry(vec![bind("front"), bind("stock"), bind("store")]);
    assert!(outcomes[0].is_ok() && outcomes[1].is_ok());
    assert_eq!(
        outcomes[2].as_ref().unwrap_err().to_string(),
        "default/shop/store#0 cannot run in cloud: cpu: needs 3000m, 2000m free of 8000m"
    );
}

#[test]
fn a_late_lost_of_an_old_session_is_nothing() {
    let mut world = World::new();
    let old = world.agent("fog").session;
    world.register("fog");
    let lost = Command::Lost {
        cluster: name("fog"),
        session: old,
    };
    assert_eq!(world.one(lost), Ok(Applied::Unchanged));
    assert_eq!(world.kb.clusters[&name("fog")].state, ClusterState::Ready);
}

#[test]
fn a_report_of_a_lost_cluster_is_refused_until_it_registers() {
    let mut world = World::new();
    world.lose("fog");
    let report = Command::Report {
        cluster: name("fog"),
        session: world.agent("fog").session,
        report: Box::default(),
    };
    let refusal = world.refusal(report);
    assert_eq!(refusal, Refusal::ClusterLost(name("fog")));
}

#[test]
fn a_second_agent_waits_until_the_first_is_lost_and_fenced() {
    let mut world = World::new();
    let first = Some(world.agent("fog").session);
    let now = world.kb.log_time_ms;
    let admits = |world: &World, session, now_ms| world.kb.admits(&name("fog"), session, now_ms);
    assert!(world.kb.admits(&name("new"), None, now));
    assert!(admits(&world, first, now));
    assert!(!admits(&world, None, u64::MAX));
    assert!(!admits(&world, Some(1), u64::MAX));
    world.lose("fog");
    let ClusterState::Lost { since_ms } = world.kb.clusters[&name("fog")].state else {
        panic!("it is lost");
    };
    let fenced = since_ms + 10_000 / 10 + STOP_GRACE_MS;
    assert!(admits(&world, first, since_ms));
    assert!(!admits(&world, None, fenced - 1));
    assert!(admits(&world, None, fenced));
}

#[test]
fn a_cluster_that_collides_in_ipv6_cannot_join() {
    let mut world = World::new();
    let mut facts = facts(Tier::Fog, 1);
    facts.prefixes = vec!["fd12:3456:789a:1::/64".parse().unwrap()];
    let refusal = world.refusal(Command::RegisterCluster {
        cluster: name("new"),
        session: 1,
        facts: Box::new(facts),
    });
    assert_eq!(
        refusal.to_string(),
        "cluster new: its prefix fd12:3456:789a:1::/64 overlaps the mesh's fd12:3456:789a::/48"
    );
}

#[test]
fn a_cluster_is_forgotten_only_when_lost_and_empty() {
    let mut world = World::new();
    world.apply(SHOP).unwrap();
    world.settle();
    let forget = |abandon| Command::ForgetCluster {
        cluster: name("cloud"),
        abandon,
    };
    let alive = world.refusal(forget(true));
    assert!(
        alive.to_string().contains("its agent is connected"),
        "{alive}"
    );
    world.lose("cloud");
    let busy = world.refusal(forget(true));
    assert!(busy.to_string().contains("is bound there"), "{busy}");
    world.run(12);
    let owed = world.refusal(forget(false));
    assert_eq!(
        owed.to_string(),
        "cluster cloud cannot be forgotten: it has not said that 3 of its instances have stopped \
         (default/shop/front/0): if its machines are gone for good, add --abandon"
    );
    assert_eq!(world.one(forget(true)), Ok(Applied::Changed));
    assert!(world.kb.owed_stops.is_empty());
}

#[test]
fn a_cluster_whose_writers_may_still_write_is_not_abandoned() {
    let mut world = World::new();
    world.apply(SHOP).unwrap();
    world.settle();
    world.lose("cloud");
    let application = "default/shop".parse().unwrap();
    world.one(Command::Delete { application }).unwrap();
    let forget = Command::ForgetCluster {
        cluster: name("cloud"),
        abandon: true,
    };
    let early = world.refusal(forget.clone());
    assert_eq!(
        early.to_string(),
        "cluster cloud cannot be forgotten: what ran there may write for another 6 s: wait so long"
    );
    world.run(6);
    assert_eq!(world.one(forget), Ok(Applied::Changed));
}

#[test]
fn a_drained_cluster_stays_so_when_its_agent_comes_back() {
    let mut world = World::new();
    let cluster = name("fog");
    let drain = Command::DrainCluster {
        cluster: cluster.clone(),
    };
    assert_eq!(world.one(drain.clone()), Ok(Applied::Changed));
    let since = world.kb.clusters[&cluster].drained_since_ms;
    assert!(since.is_some());
    world.lose("fog");
    world.register("fog");
    assert_eq!(world.one(drain), Ok(Applied::Unchanged));
    assert_eq!(world.kb.clusters[&cluster].drained_since_ms, since);
    let undrain = Command::UndrainCluster { cluster };
    assert_eq!(world.one(undrain.clone()), Ok(Applied::Changed));
    assert_eq!(world.one(undrain), Ok(Applied::Unchanged));
}

#[test]
fn a_leaving_cluster_is_drained_until_it_is_gone_or_used_again() {
    let mut world = World::new();
    let cluster = name("fog");
    let leave = Command::LeaveCluster {
        cluster: cluster.clone(),
    };
    assert_eq!(world.one(leave.clone()), Ok(Applied::Changed));
    let fog = |world: &World| world.kb.clusters[&cluster].clone();
    let since = fog(&world).leaving_since_ms;
    assert!(since.is_some() && fog(&world).drained_since_ms == since);
    world.lose("fog");
    world.register("fog");
    assert_eq!(world.one(leave.clone()), Ok(Applied::Unchanged));
    assert_eq!(fog(&world).leaving_since_ms, since);
    let undrain = Command::UndrainCluster {
        cluster: cluster.clone(),
    };
    assert_eq!(world.one(undrain), Ok(Applied::Changed));
    assert_eq!(
        (fog(&world).leaving_since_ms, fog(&world).drained_since_ms),
        (None, None)
    );
    // One that was drained before leaves, too, and no longer leaves once it has.
    let drain = Command::DrainCluster {
        cluster: cluster.clone(),
    };
    world.one(drain).unwrap();
    assert_eq!(world.one(leave.clone()), Ok(Applied::Changed));
    world.lose("fog");
    let forget = Command::ForgetCluster {
        cluster: cluster.clone(),
        abandon: false,
    };
    assert_eq!(world.one(forget), Ok(Applied::Changed));
    let gone = world.one(leave);
    assert_eq!(gone, Err(Refusal::UnknownCluster(cluster.clone())));
    world.register("fog");
    assert_eq!(fog(&world).leaving_since_ms, None);
}

#[test]
fn a_user_gets_the_address_asked_for_or_is_told_why_not() {
    let mut world = World::new();
    let asking = |policy: &str, address: &str| {
        let vips =
            format!("command: [stock]\n      vips: [{{ policy: {policy}, address: '{address}' }}]");
        SHOP.replace("command: [stock]", &vips)
    };
    let error = |world: &mut World, policy: &str, address: &str| {
        let application = goal::parse(&asking(policy, address)).unwrap().remove(0);
        world
            .refusal(Command::Apply(Box::new(application)))
            .to_string()
    };
    let no = error(&mut world, "balanced", "10.25.1.2");
    assert_eq!(
        no,
        "spec.services[2].vips: address 10.25.1.2 is no VIP of policy balanced in this mesh (10.16.0.0/12)"
    );
    world.apply(&asking("closest", "10.25.1.2")).unwrap();
    let vips = world.kb.vips(&service("default/shop/stock"));
    let addresses: Vec<String> = vips
        .iter()
        .filter_map(|vip| Some(vip.addr4?.to_string()))
        .collect();
    assert_eq!(addresses, ["10.24.1.2", "10.25.1.2"]);
    let fixed = error(&mut world, "balanced", "10.24.7.7");
    assert!(
        fixed.contains("addresses are for a service's life"),
        "{fixed}"
    );
    let other = asking("balanced", "10.24.1.2").replace("name: shop", "name: other");
    let application = goal::parse(&other).unwrap().remove(0);
    let taken = world.refusal(Command::Apply(Box::new(application.clone())));
    assert!(
        taken.to_string().contains("is another service's"),
        "{taken}"
    );
    let delete = Command::Delete {
        application: "default/shop".parse().unwrap(),
    };
    world.one(delete).unwrap();
    let resting = world.refusal(Command::Apply(Box::new(application.clone())));
    assert!(
        resting.to_string().contains("rests for 10 minutes"),
        "{resting}"
    );
    world.now_ms += REST_MS;
    world.one(Command::Tick).unwrap();
    world.one(Command::Apply(Box::new(application))).unwrap();
}

#[test]
fn a_node_has_its_blocks_and_one_spare_and_gives_empty_ones_back() {
    let mut world = World::empty();
    world
        .one(Command::RegisterCluster {
            cluster: name("c"),
            session: 1,
            facts: Box::new(facts(Tier::Edge, 1)),
        })
        .unwrap();
    let report = |world: &mut World, used4: Vec<Ipv4Addr>| {
        let nodes = BTreeMap::from([("n".to_owned(), node(used4))]);
        let instances = Vec::new();
        world.now_ms += 1;
        let report = Box::new(Report { nodes, instances });
        let cluster = name("c");
        world
            .one(Command::Report {
                cluster,
                session: 1,
                report,
            })
            .unwrap();
        let node = &world.kb.clusters[&name("c")].nodes["n"];
        node.blocks4.keys().copied().collect::<Vec<u32>>()
    };
    let first = report(&mut world, vec![]);
    assert_eq!(first, [1, 2]);
    let base = |block: u32| -> Ipv4Addr { mesh().block4(block).unwrap().addr() };
    assert_eq!(report(&mut world, vec![base(1), base(2)]), [1, 2, 3]);
    assert_eq!(
        report(&mut world, vec![base(1), base(2), base(3)]),
        [1, 2, 3, 4]
    );
    assert_eq!(report(&mut world, vec![base(1)]), [1, 2, 3, 4]);
    world.now_ms += 120_000;
    assert_eq!(
        report(&mut world, vec![base(1)]),
        [1, 2],
        "the spares beyond one go back"
    );
    // What goes back rests.
    assert_eq!(report(&mut world, vec![base(1), base(2)]), [1, 2, 5]);
}

#[test]
fn a_node_that_is_gone_for_good_gives_its_blocks_back_and_its_number_never_returns() {
    let mut world = World::new();
    let gone = world.agent("fog").nodes.remove("n2").unwrap();
    world.step();
    let fog = |world: &World| world.kb.clusters[&name("fog")].nodes.clone();
    let before = fog(&world)["n2"].clone();
    assert!(before.absent_since_ms.is_some() && !before.report.ready);
    world.now_ms += REST_MS;
    world.step();
    assert!(!fog(&world).contains_key("n2"));
    world.agent("fog").nodes.insert("n2".to_owned(), gone);
    world.step();
    assert!(fog(&world)["n2"].number > before.number);
}

#[test]
fn a_copy_that_was_ended_while_nobody_looked_is_stopped() {
    let mut world = World::new();
    world.apply(SHOP).unwrap();
    world.settle();
    let old = world.kb.live(&slot("default/shop/front#0")).unwrap().0;
    world
        .apply(&SHOP.replace("[front]", "[front, -v]"))
        .unwrap();
    world.settle();
    let report = InstanceReport {
        id: slot("default/shop/front#0").at(old),
        node: "n1".to_owned(),
        phase: Phase::Ready,
        endpoint: None,
        reason: String::new(),
    };
    let report = Report {
        nodes: BTreeMap::new(),
        instances: vec![report],
    };
    let session = world.agent("fog").session;
    let cluster = name("fog");
    world
        .one(Command::Report {
            cluster,
            session,
            report: Box::new(report),
        })
        .unwrap();
    assert_eq!(world.kb.owed_stops[&name("fog")].len(), 1);
}

/// Any command over a small set of names, so that commands often meet.
fn command() -> impl Strategy<Value = Command> {
    let cluster = || prop::sample::select(vec!["cloud", "fog", "edge"]).prop_map(name);
    let session = || 0u64..3;
    let slots = || {
        let service = prop::sample::select(vec!["client", "front", "stock", "store"]);
        (service, 0u32..3).prop_map(|(s, i)| slot(&format!("default/shop/{s}#{i}")))
    };
    let epoch = || prop_oneof![12 => 0u64..12, 1 => Just(u64::MAX)];
    let phase = prop::sample::select(vec![
        Phase::Starting,
        Phase::Ready,
        Phase::NotReady,
        Phase::Refused,
        Phase::Stopped,
    ]);
    let event = prop::sample::select(vec![
        Event::TargetReady,
        Event::TargetFailed,
        Event::Repointed,
        Event::Drained,
        Event::SourceGone,
        Event::SourceLost,
        Event::Cancel,
    ]);
    let instances = prop::collection::vec((slots(), epoch(), phase), 0..6).prop_map(|list| {
        let one = |(slot, epoch, phase): (Slot, u64, Phase)| InstanceReport {
            id: slot.at(epoch),
            node: "n1".to_owned(),
            phase,
            endpoint: None,
            reason: String::new(),
        };
        list.into_iter().map(one).collect::<Vec<_>>()
    });
    let used4 = prop::collection::vec(any::<u16>(), 0..3).prop_map(|list| {
        let address = |low: u16| Ipv4Addr::from(0x0a10_0000 | u32::from(low & 0x1ff));
        list.into_iter().map(address).collect::<Vec<_>>()
    });
    let report = (cluster(), session(), instances, used4, any::<bool>());
    let apply = (1u32..3, 0u32..4, any::<bool>()).prop_map(|(replicas, cost, stock)| {
        let mut text = SHOP
            .replace(
                "command: [front]",
                &format!("command: [front]\n      replicas: {replicas}"),
            )
            .replace("{ cost: 1 }", &format!("{{ cost: {cost}, latency: 1 }}"));
        if stock {
            text = text.replace("[stock]", "[stock, --other]");
        }
        Command::Apply(Box::new(goal::parse(&text).unwrap().remove(0)))
    });
    prop_oneof![
        1 => Just(Command::InitMesh(mesh())),
        1 => Just(Command::Tick),
        3 => (cluster(), session(), any::<bool>()).prop_map(|(cluster, session, extreme)| {
            let mut facts = facts(Tier::Edge, 1);
            if extreme {
                facts.cpu_price_ueur_h = u64::MAX;
                facts.egress_price_ueur_gib = u64::MAX;
                facts.cpu_power_mw = u64::MAX;
                facts.carbon_g_kwh = u64::MAX;
            }
            Command::RegisterCluster { cluster, session, facts: Box::new(facts) }
        }),
        8 => report.prop_map(|(cluster, session, instances, used4, two)| {
            let mut nodes = BTreeMap::from([("n1".to_owned(), node(used4))]);
            if two {
                let mut huge = node(Vec::new());
                (huge.cpu_milli, huge.memory_bytes) = (u64::MAX, u64::MAX);
                nodes.insert("n2".to_owned(), huge);
            }
            let report = Box::new(Report { nodes, instances });
            Command::Report { cluster, session, report }
        }),
        2 => (cluster(), session()).prop_map(|(cluster, session)| Command::Lost { cluster, session }),
        1 => (cluster(), any::<bool>())
            .prop_map(|(cluster, abandon)| Command::ForgetCluster { cluster, abandon }),
        1 => cluster().prop_map(|cluster| Command::DrainCluster { cluster }),
        1 => cluster().prop_map(|cluster| Command::UndrainCluster { cluster }),
        1 => cluster().prop_map(|cluster| Command::LeaveCluster { cluster }),
        1 => (cluster(), 0u8..2).prop_map(|(cluster, secret)| Command::Invite {
            cluster,
            hash: secret.to_string().repeat(64),
            lasts_ms: 5_000,
        }),
        1 => (cluster(), 0u8..2, 0u8..2, 0u64..9_000).prop_map(
            |(cluster, secret, request, issued_ms)| Command::Join(Box::new(Join {
                cluster,
                hash: secret.to_string().repeat(64),
                request: request.to_string().repeat(64),
                chain: String::new(),
                issued_ms,
            }))
        ),
        3 => apply,
        1 => Just(Command::Delete { application: "default/shop".parse().unwrap() }),
        8 => (slots(), cluster(), session(), 0u64..5, prop::option::of(epoch())).prop_map(
            |(slot, cluster, session, generation, replaces)| Command::Bind(Box::new(Bind {
                slot,
                decision: decision(cluster.as_str()),
                cluster,
                session,
                generation,
                replaces,
            }))
        ),
        8 => (slots(), cluster(), session(), 0u64..5, epoch()).prop_map(
            |(slot, to, session, generation, source)| Command::StartMigration(Box::new(
                StartMigration {
                    slot,
                    source,
                    to,
                    session,
                    generation,
                    reason: Reason::User,
                    decision: None,
                }
            ))
        ),
        8 => (slots(), epoch(), event).prop_map(|(slot, target, event)| {
            Command::AdvanceMigration { slot, target, event }
        }),
        2 => (slots(), epoch()).prop_map(|(slot, epoch)| Command::Unbind { slot, epoch }),
    ]
}

/// Commands that find a mesh, its clusters and an application, and then anything.
fn history() -> impl Strategy<Value = Vec<(u64, Command)>> {
    let start = || {
        let register = |cluster: &str| Command::RegisterCluster {
            cluster: name(cluster),
            session: 1,
            facts: Box::new(facts(Tier::Edge, 1)),
        };
        let report = |cluster: &str| Command::Report {
            cluster: name(cluster),
            session: 1,
            report: Box::new(Report {
                nodes: BTreeMap::from([("n1".to_owned(), node(Vec::new()))]),
                instances: Vec::new(),
            }),
        };
        let shop = goal::parse(SHOP).unwrap().remove(0);
        vec![
            Command::InitMesh(mesh()),
            register("cloud"),
            register("fog"),
            report("cloud"),
            report("fog"),
            Command::Apply(Box::new(shop)),
        ]
    };
    let time = prop_oneof![40 => 0u64..2000, 4 => 0u64..700_000, 1 => Just(u64::MAX)];
    prop::collection::vec((time, command()), 0..80).prop_map(move |rest| {
        let start = start().into_iter().map(|command| (1, command));
        start.chain(rest).collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    #[test]
    fn any_history_is_applied_alike_by_every_replica(history in history()) {
        let mut kb = KnowledgeBase::default();
        let mut replica = KnowledgeBase::default();
        let mut now = 1_000_000;
        // Who has which address, and when it was last seen to.
        let mut owners: BTreeMap<std::net::IpAddr, (ServiceName, u32, u64)> = BTreeMap::new();
        for (i, (later, command)) in history.into_iter().enumerate() {
            now = later.saturating_add(now);
            let entry = batch(now, vec![command]);
            let before = kb.clone();
            let outcomes = kb.apply(i as u64 + 1, &entry);
            prop_assert_eq!(&replica.apply(i as u64 + 1, &entry), &outcomes);
            if i % 8 == 0 {
                let text = serde_json::to_string(&replica).unwrap();
                replica = serde_json::from_str(&text).unwrap();
            }
            prop_assert_eq!(&kb, &replica, "I1");
            check_one_live_binding(&kb);
            prop_assert!(kb.tables_index >= before.tables_index);
            for service in kb.services.keys() {
                let number = kb.services[service].number6;
                for vip in kb.vips(service) {
                    let addresses = [Some(vip.addr6.into()), vip.addr4.map(Into::into)];
                    for address in addresses.into_iter().flatten() {
                        let at = kb.log_time_ms;
                        if let Some((owner, life, seen)) = owners.get(&address) {
                            let same = owner == service && *life == number;
                            prop_assert!(same || at - seen >= REST_MS, "I2: {address}");
                        }
                        owners.insert(address, (service.clone(), number, at));
                    }
                }
            }
            let mut blocks = BTreeSet::new();
            for node in kb.clusters.values().flat_map(|c| c.nodes.values()) {
                for block in node.blocks4.keys() {
                    prop_assert!(blocks.insert(*block), "block {} is given twice", block);
                    prop_assert!(kb.numbers.blocks4.holds(*block));
                }
            }
            let planned = crate::plan::plan(&kb, &crate::plan::Inputs::default(), now);
            prop_assert!(planned.len() <= 64);
        }
    }
}
