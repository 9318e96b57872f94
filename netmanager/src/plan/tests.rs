use std::{
    net::{Ipv4Addr, Ipv6Addr},
    sync::Arc,
    time::Duration,
};

use ebpf_common::{
    addr::Policy,
    layout::{
        BACKEND_DRAINING, BACKEND_LIVE, Backend, Config, ENDPOINT_PLAIN_REDIRECT, Endpoint,
        VIP_FOLLOW, Vip,
    },
};
use netmanager_api::table::{self, BackendState, PolicyName, Protocol, Revision, Table};
use proptest::prelude::*;

use super::*;
use crate::policy::Sight;

const CAPACITY: Capacity = Capacity {
    backends: 8,
    slots: 16,
    counters: 16,
    vips: 64,
};
const NOW: Duration = Duration::from_secs(1_000);

fn node_endpoint() -> NodeEndpoint {
    NodeEndpoint {
        ifindex: 3,
        mac: [2, 0, 0, 0, 0, 1],
        host_mac: [2, 0, 0, 0, 0, 2],
        addr6: "fd12:3456:789a::1:0:1".parse().unwrap(),
        addr4: Some(Ipv4Addr::new(10, 16, 0, 1)),
    }
}

fn backend(instance: u32, state: BackendState) -> table::Backend {
    table::Backend {
        instance,
        epoch: 1,
        node: 1,
        addr6: Ipv6Addr::from_bits((0xfd12_3456_789a << 80) | (1 << 32) | u128::from(instance + 2)),
        addr4: Some(Ipv4Addr::new(10, 16, 0, 2 + instance as u8)),
        state,
    }
}

fn table(backends: Vec<table::Backend>) -> Table {
    Table {
        revision: Revision {
            incarnation: 1,
            index: 1,
        },
        mesh: table::Mesh {
            prefix6: "fd12:3456:789a::/48".parse().unwrap(),
            prefix4: Some("10.16.0.0/12".parse().unwrap()),
            seed: 7,
        },
        node: table::Node {
            number: 1,
            blocks4: vec!["10.16.0.0/27".parse().unwrap()],
            carbon_g_kwh: None,
        },
        peers: Vec::new(),
        services: vec![table::Service {
            name: "default/shop/web".into(),
            number: 5,
            ports: vec![table::Port {
                protocol: Protocol::Tcp,
                port: 80,
                target_port: 8080,
                follow: false,
            }],
            vips: vec![table::Vip {
                policy: PolicyName(Policy::Balanced),
                instance: None,
                addr6: "fd12:3456:789a:1000:0:5::".parse().unwrap(),
                addr4: Some(Ipv4Addr::new(10, 24, 0, 5)),
            }],
            backends,
        }],
        spliced: Vec::new(),
    }
}

/// A planner for empty maps.
fn planner(capacity: Capacity) -> Planner {
    Planner::adopt(capacity, KernelState::default(), NOW)
}

/// Plans a table and does all its writes.
fn plan(table: &Table, planner: &mut Planner, now: Duration) -> Result<KernelState, Shortage> {
    let planned = plan_seen(table, &Sight::default(), planner, now);
    let writes = planner.writes();
    planner.wrote(&writes);
    planned.map(|()| planner.have().clone())
}

/// Plans a table without writing.
fn plan_seen(
    table: &Table,
    sight: &Sight,
    planner: &mut Planner,
    now: Duration,
) -> Result<(), Shortage> {
    let node = node_endpoint();
    let table = Arc::new(table.clone());
    let inputs = Inputs {
        table: &table,
        node: &node,
        pods: &[],
        sight,
        tunnel: None,
        quota: 100,
    };
    planner.plan(&inputs, now)
}

fn vip_of(state: &KernelState) -> Vip {
    let key = VipKey {
        addr: Addr::from_v4(u32::from_be_bytes([10, 24, 0, 5])),
        port_be: 80u16.to_be(),
        proto: 6,
        pad: 0,
    };
    state.vips[&key]
}

#[test]
fn only_the_datagrams_of_a_port_that_says_so_follow() {
    let mut table = table(vec![backend(0, BackendState::Ready)]);
    let ports = &mut table.services[0].ports;
    let udp = |port, follow| table::Port {
        protocol: Protocol::Udp,
        port,
        target_port: port,
        follow,
    };
    ports[0].follow = true;
    ports.extend([udp(53, true), udp(54, false)]);
    let state = plan(&table, &mut planner(CAPACITY), NOW).unwrap();
    for (key, vip) in &state.vips {
        let follows = (key.port_be, key.proto) == (53_u16.to_be(), 17);
        assert_eq!(vip.flags, if follows { VIP_FOLLOW } else { 0 }, "{key:?}");
    }
}

#[test]
fn a_table_becomes_vips_runs_and_backends() {
    let mut planner = planner(CAPACITY);
    let backends = vec![
        backend(0, BackendState::Ready),
        backend(1, BackendState::Ready),
    ];
    let state = plan(&table(backends), &mut planner, NOW).unwrap();
    assert_eq!(
        state.vips.len(),
        4,
        "two families, the port and the VIP itself"
    );
    let vip = vip_of(&state);
    assert_eq!(
        (vip.slot_count, vip.target_port_be, vip.service, vip.counter),
        (2, 8080u16.to_be(), 5, 1)
    );
    assert_eq!(
        state.runs,
        BTreeMap::from([(vip.slot_base, vec![1, 2])]),
        "both families share"
    );
    assert_eq!(state.backends[&1].flags, BACKEND_LIVE);
    assert_eq!(state.backends[&1].generation, 1);
    assert_eq!(state.local.len(), 2);
    assert_eq!(state.endpoints[&3].flags, ENDPOINT_PLAIN_REDIRECT);
}

#[test]
fn a_draining_backend_keeps_its_index_and_loses_its_slots_and_a_probing_one_has_neither() {
    let mut planner = planner(CAPACITY);
    let ready = vec![
        backend(0, BackendState::Ready),
        backend(1, BackendState::Ready),
    ];
    plan(&table(ready), &mut planner, NOW).unwrap();
    let mixed = vec![
        backend(0, BackendState::Draining),
        backend(1, BackendState::Ready),
        backend(2, BackendState::Probing),
    ];
    let state = plan(&table(mixed), &mut planner, NOW).unwrap();
    assert_eq!(state.backends[&1].flags, BACKEND_DRAINING);
    assert_eq!(state.runs[&vip_of(&state).slot_base], [2]);
    assert!(!state.backends.contains_key(&3));
}

#[test]
fn an_address_that_is_named_ready_and_draining_is_one_backend_and_ready() {
    let draining = table::Backend {
        instance: 1,
        state: BackendState::Draining,
        ..backend(0, BackendState::Ready)
    };
    let mut both = vec![backend(0, BackendState::Ready), draining.clone()];
    for _ in 0..2 {
        let state = plan(&table(both.clone()), &mut planner(CAPACITY), NOW).unwrap();
        assert_eq!(state.runs[&vip_of(&state).slot_base], [1]);
        assert_eq!(state.backends[&1].flags, BACKEND_LIVE, "{both:?}");
        both.reverse();
    }

    // In two services, whichever is planned last.
    let mut planner = planner(CAPACITY);
    let mut shared = table(vec![backend(0, BackendState::Ready)]);
    let mut other = shared.services[0].clone();
    (other.number, other.name) = (6, "default/shop/old".into());
    other.vips = Vec::new();
    other.backends = vec![draining];
    shared.services.push(other);
    let mut flags = |shared: &Table| {
        let state = plan(shared, &mut planner, NOW).unwrap();
        state.backends[&1].flags
    };
    assert_eq!(flags(&shared), BACKEND_LIVE);
    shared.services[0].backends[0].state = BackendState::Draining;
    assert_eq!(flags(&shared), BACKEND_DRAINING);
    shared.services[0].backends[0].state = BackendState::Ready;
    assert_eq!(flags(&shared), BACKEND_LIVE);
    shared.services[0].backends.clear();
    assert_eq!(flags(&shared), BACKEND_DRAINING);
    shared.services[1].backends.clear();
    assert_eq!(flags(&shared), 0);
}

#[test]
fn a_dead_backend_has_no_flags_and_its_index_names_another_only_later_and_with_a_new_generation() {
    let capacity = Capacity {
        backends: 3,
        ..CAPACITY
    };
    let mut planner = planner(capacity);
    let two = vec![
        backend(0, BackendState::Ready),
        backend(1, BackendState::Ready),
    ];
    plan(&table(two), &mut planner, NOW).unwrap();
    let other = vec![backend(1, BackendState::Ready)];
    let state = plan(&table(other.clone()), &mut planner, NOW).unwrap();
    assert_eq!(state.backends[&1].flags, 0);
    assert_eq!(
        state.backends[&1].generation, 1,
        "its flows must still see who they belonged to"
    );

    let replaced = vec![
        backend(1, BackendState::Ready),
        backend(2, BackendState::Ready),
    ];
    let early = plan(&table(replaced.clone()), &mut planner, NOW + DEAD_REST / 2);
    let error = early.unwrap_err().to_string();
    assert!(
        error.contains("default/shop/web") && error.contains("--backends"),
        "{error}"
    );
    assert_eq!(
        planner.have().backends[&2].flags,
        BACKEND_LIVE,
        "who has a place keeps it"
    );
    let late = plan(&table(replaced), &mut planner, NOW + DEAD_REST).unwrap();
    assert_eq!(late.backends[&1].generation, 2);
    assert_eq!(late.backends[&1].flags, BACKEND_LIVE);
}

#[test]
fn a_run_rests_before_its_slots_are_given_again() {
    let mut planner = planner(CAPACITY);
    let one = table(vec![backend(0, BackendState::Ready)]);
    let two = table(vec![
        backend(0, BackendState::Ready),
        backend(1, BackendState::Ready),
    ]);
    let first = vip_of(&plan(&one, &mut planner, NOW).unwrap()).slot_base;
    let state = plan(&two, &mut planner, NOW).unwrap();
    assert_eq!(state.runs[&first], [1], "the old run is still there");
    assert_ne!(vip_of(&state).slot_base, first);
    assert!(planner.is_resting());
    let rested = plan(&two, &mut planner, NOW + RUN_REST).unwrap();
    assert!(!rested.runs.contains_key(&first));
    assert!(!planner.is_resting());
}

#[test]
fn a_restarted_daemon_gives_the_same_indexes_and_runs() {
    let mut planner = planner(CAPACITY);
    let table = table(vec![
        backend(1, BackendState::Ready),
        backend(0, BackendState::Ready),
    ]);
    let before = plan(&table, &mut planner, NOW).unwrap();
    let mut adopted = Planner::adopt(CAPACITY, before, NOW);
    plan_seen(&table, &Sight::default(), &mut adopted, NOW).unwrap();
    assert_eq!(adopted.writes(), []);
}

#[test]
fn vips_are_pointed_after_their_run_and_backends_are_written_and_die_after_the_vips_left() {
    let mut planner = planner(CAPACITY);
    let empty = KernelState::default();
    let one = plan(
        &table(vec![backend(0, BackendState::Ready)]),
        &mut planner,
        NOW,
    )
    .unwrap();
    let position = |ops: &[Op], wanted: &dyn Fn(&Op) -> bool| ops.iter().position(wanted).unwrap();
    let ops = diff(&empty, &one);
    let vip = position(&ops, &|op| matches!(op, Op::Vip(_, Some(_))));
    assert!(position(&ops, &|op| matches!(op, Op::Run(..))) < vip);
    assert!(position(&ops, &|op| matches!(op, Op::Backend(..))) < vip);

    let other = plan(
        &table(vec![backend(1, BackendState::Ready)]),
        &mut planner,
        NOW,
    )
    .unwrap();
    let ops = diff(&one, &other);
    let last_vip = ops
        .iter()
        .rposition(|op| matches!(op, Op::Vip(..)))
        .unwrap();
    let death = position(
        &ops,
        &|op| matches!(op, Op::Backend(1, Some(b)) if b.flags == 0),
    );
    assert!(last_vip < death, "{ops:?}");
}

#[test]
fn a_vip_without_backends_stays_and_says_so() {
    let mut planner = planner(CAPACITY);
    let state = plan(&table(Vec::new()), &mut planner, NOW).unwrap();
    assert_eq!(vip_of(&state).slot_count, 0);
    assert!(state.runs.is_empty());
}

fn addrs() -> impl Strategy<Value = Addr> {
    (0u128..4).prop_map(|low| Addr::from_v6((0xfd << 120) | low))
}

fn endpoints() -> impl Strategy<Value = Endpoint> {
    (0u32..3).prop_map(|number| Endpoint {
        number,
        ..Endpoint::default()
    })
}

prop_compose! {
    fn states()(
        config in prop::option::of((0u64..3).prop_map(|seed| Config { seed, ..Config::default() })),
        endpoints_map in prop::collection::btree_map(0u32..4, endpoints(), 0..4),
        local in prop::collection::btree_map(addrs(), endpoints(), 0..4),
        vips in prop::collection::btree_map(
            addrs().prop_map(|addr| VipKey { addr, ..VipKey::default() }),
            (0u32..3).prop_map(|slot_count| Vip { slot_count, ..Vip::default() }),
            0..4,
        ),
        runs in prop::collection::btree_map(
            (0u32..4).prop_map(|run| run * 8), prop::collection::vec(1u32..5, 1..4), 0..4,
        ),
        backends in prop::collection::btree_map(
            1u32..5,
            (0u32..3, 1u32..3).prop_map(|(flags, generation)| {
                Backend { flags, generation, ..Backend::default() }
            }),
            0..4,
        ),
    ) -> KernelState {
        KernelState { config, endpoints: endpoints_map, local, vips, runs, backends }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(10_000))]

    #[test]
    fn applying_the_difference_gives_the_wanted_state(have in states(), want in states()) {
        let mut state = have.clone();
        for op in diff(&have, &want) {
            state.apply(&op);
        }
        prop_assert_eq!(&state, &want);
        prop_assert_eq!(diff(&state, &want), vec![]);
    }
}

/// What happens to a node between two plans.
#[derive(Clone, Debug)]
struct Step {
    /// Services by number, each with the instances that are there and whether they drain.
    services: BTreeMap<u32, BTreeMap<u32, bool>>,
    policies: Vec<Policy>,
    unreachable: BTreeSet<u32>,
    millis: u64,
    /// The daemon is another one and reads the maps.
    is_restart: bool,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let services = prop::collection::btree_map(
        1u32..4,
        prop::collection::btree_map(0u32..5, prop::bool::weighted(0.2), 0..4),
        0..4,
    );
    let policies = prop::sample::subsequence(
        vec![Policy::Balanced, Policy::Closest, Policy::LeastLoaded],
        1..=3,
    );
    let unreachable = prop::collection::btree_set(1u32..4, 0..2);
    let step = (
        services,
        policies,
        unreachable,
        0u64..3_000,
        prop::bool::weighted(0.2),
    )
        .prop_map(
            |(services, policies, unreachable, millis, is_restart)| Step {
                services,
                policies,
                unreachable,
                millis,
                is_restart,
            },
        );
    prop::collection::vec(step, 1..5)
}

impl Step {
    fn table(&self) -> Table {
        let mut table = table(Vec::new());
        let model = table.services.remove(0);
        for (&number, instances) in &self.services {
            let mut service = model.clone();
            service.number = number;
            service.name = format!("default/shop/s{number}");
            service.vips = self
                .policies
                .iter()
                .map(|policy| table::Vip {
                    policy: PolicyName(*policy),
                    instance: None,
                    addr6: Ipv6Addr::from_bits(
                        (0xfd12_3456_789a << 80)
                            | (1 << 76)
                            | (u128::from(policy.code()) << 72)
                            | (u128::from(number) << 32),
                    ),
                    addr4: Some(Ipv4Addr::new(10, 24 + policy.code(), 0, number as u8)),
                })
                .collect();
            service.backends = instances
                .iter()
                .map(|(instance, drains)| {
                    let state = if *drains {
                        BackendState::Draining
                    } else {
                        BackendState::Ready
                    };
                    table::Backend {
                        node: instance % 3 + 1,
                        ..backend(number * 5 + instance, state)
                    }
                })
                .collect();
            table.services.push(service);
        }
        table
    }
}

/// The VIPs of which a new flow would find a backend.
fn served(state: &KernelState) -> BTreeSet<VipKey> {
    let is_live = |index: &u32| {
        state
            .backends
            .get(index)
            .is_some_and(|backend| backend.flags & BACKEND_LIVE != 0)
    };
    state
        .vips
        .iter()
        .filter(|(_, vip)| {
            let run = state.runs.get(&vip.slot_base);
            vip.slot_count > 0 && run.is_some_and(|run| run.iter().any(is_live))
        })
        .map(|(key, _)| *key)
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(10_000))]

    #[test]
    fn every_prefix_of_the_writes_is_whole_and_serves_every_vip_that_was_and_will_be(
        steps in steps(),
    ) {
        let capacity = Capacity { backends: 64, slots: 256, vips: 64, counters: 64 };
        let mut planner = planner(capacity);
        let mut kernel = KernelState::default();
        let mut now = NOW;
        for step in steps {
            now += Duration::from_millis(step.millis);
            if step.is_restart {
                planner = Planner::adopt(capacity, kernel.clone(), now);
            }
            let sight = Sight { unreachable: step.unreachable.clone(), ..Sight::default() };
            let table = step.table();
            prop_assert_eq!(plan_seen(&table, &sight, &mut planner, now), Ok(()));
            let writes = planner.writes();
            let before = served(&kernel);
            let mut after = kernel.clone();
            writes.iter().for_each(|op| after.apply(op));
            let lasting: Vec<VipKey> = before.intersection(&served(&after)).copied().collect();
            for op in &writes {
                kernel.apply(op);
                let served = served(&kernel);
                prop_assert!(lasting.iter().all(|key| served.contains(key)), "after {op:?}");
                for vip in kernel.vips.values().filter(|vip| vip.slot_count > 0) {
                    let run = &kernel.runs[&vip.slot_base];
                    prop_assert_eq!(run.len() as u32, vip.slot_count);
                    for index in run {
                        prop_assert!(kernel.backends[index].flags & BACKEND_LIVE != 0);
                    }
                }
            }
            planner.wrote(&writes);
            // What was planned piece by piece is what is planned at once.
            let mut fresh = Planner::adopt(capacity, kernel.clone(), now);
            prop_assert_eq!(plan_seen(&table, &sight, &mut fresh, now), Ok(()));
            prop_assert_eq!(fresh.writes(), vec![]);
            let wanted = step.services.values().flatten().count();
            let flagged = kernel.backends.values().filter(|backend| backend.flags != 0).count();
            prop_assert_eq!(flagged, wanted, "who is not named is dead");
        }
    }
}

#[test]
fn a_service_without_room_keeps_what_it_had_and_the_others_do_not_wait() {
    let capacity = Capacity {
        slots: 2,
        ..CAPACITY
    };
    let mut planner = planner(capacity);
    let one = table(vec![backend(0, BackendState::Ready)]);
    let before = plan(&one, &mut planner, NOW).unwrap();
    let mut full = table((0..3).map(|i| backend(i, BackendState::Ready)).collect());
    let mut other = full.services[0].clone();
    other.number = 6;
    other.name = "default/shop/other".into();
    other.vips[0].addr6 = "fd12:3456:789a:1000:0:6::".parse().unwrap();
    other.vips[0].addr4 = Some(Ipv4Addr::new(10, 24, 0, 6));
    other.backends = vec![backend(7, BackendState::Ready)];
    full.services.push(other);
    let error = plan(&full, &mut planner, NOW).unwrap_err().to_string();
    assert!(
        error.contains("default/shop/web") && error.contains("--slots"),
        "{error}"
    );
    assert_eq!(vip_of(planner.have()), vip_of(&before));
    assert_eq!(planner.have().vips.len(), 8, "the other is served");

    full.services[0].backends.truncate(1);
    assert_eq!(
        plan(&full, &mut planner, NOW).map(|state| vip_of(&state)),
        Ok(vip_of(&before))
    );
}

#[test]
fn a_table_with_more_ports_than_there_is_room_for_names_the_option() {
    let capacity = Capacity {
        vips: 3,
        ..CAPACITY
    };
    let full = table(vec![backend(0, BackendState::Ready)]);
    let error = plan(&full, &mut planner(capacity), NOW).unwrap_err();
    assert!(error.to_string().contains("--vips"), "{error}");
}

#[test]
fn only_what_changed_is_written() {
    let mut planner = planner(CAPACITY);
    let two = table(vec![
        backend(0, BackendState::Ready),
        backend(1, BackendState::Ready),
    ]);
    plan(&two, &mut planner, NOW).unwrap();
    let mut same = two.clone();
    same.revision.index += 1;
    plan_seen(&same, &Sight::default(), &mut planner, NOW).unwrap();
    assert_eq!(planner.writes(), []);
    let one = table(vec![backend(0, BackendState::Ready)]);
    plan_seen(&one, &Sight::default(), &mut planner, NOW).unwrap();
    let writes = planner.writes();
    assert_eq!(
        writes.len(),
        6,
        "a run, four entries that point at it, and a death: {writes:?}"
    );
    let mut read = planner.have().clone();
    read.runs.clear();
    planner.read_back(read);
    assert!(
        planner.writes().len() > writes.len(),
        "all of it is looked at"
    );
}

#[test]
fn a_service_is_planned_anew_where_what_its_policy_follows_changed() {
    let on = |node, instance| table::Backend {
        node,
        ..backend(instance, BackendState::Ready)
    };
    let with = |policy, carbon| {
        let mut table = table(vec![on(2, 0), on(3, 1)]);
        table.services[0].vips[0].policy = PolicyName(policy);
        table.peers = [(2, 100), (3, carbon)]
            .map(|(number, carbon)| table::Peer {
                number,
                name: format!("c/n{number}"),
                public_key: String::new(),
                endpoint: None,
                blocks4: Vec::new(),
                carbon_g_kwh: Some(carbon),
            })
            .into();
        table
    };
    let loaded = Sight {
        load: [(on(2, 0).addr6.to_bits(), 90)].into(),
        ..Sight::default()
    };
    let weighed = Sight {
        load: [(on(2, 0), 90), (on(3, 1), 20)]
            .map(|(backend, load)| (backend.addr6.to_bits(), load))
            .into(),
        round: 1,
        ..Sight::default()
    };
    let estimated = Sight {
        estimated_us: [(2, 1_000), (3, 30_000)].into(),
        ..Sight::default()
    };
    let nothing = Sight::default();
    for (policy, follows) in [
        (Policy::Balanced, [false, false, false, false]),
        (Policy::Closest, [false, false, true, false]),
        (Policy::LeastLoaded, [false, true, false, false]),
        (Policy::Greenest, [false, false, false, true]),
    ] {
        let changes = [
            (&loaded, 100),
            (&weighed, 100),
            (&estimated, 100),
            (&nothing, 50),
        ];
        for ((sight, carbon), follows) in changes.into_iter().zip(follows) {
            let mut planner = planner(Capacity {
                slots: 1024,
                ..CAPACITY
            });
            plan(&with(policy, 100), &mut planner, NOW).unwrap();
            plan_seen(&with(policy, carbon), sight, &mut planner, NOW).unwrap();
            let writes = planner.writes();
            assert_eq!(
                !writes.is_empty(),
                follows,
                "{policy:?}: {sight:?} {carbon}"
            );
        }
    }
}
