use std::{
    net::{Ipv4Addr, Ipv6Addr},
    time::Duration,
};

use ebpf_common::{
    addr::Policy,
    layout::{
        BACKEND_DRAINING, BACKEND_LIVE, Backend, Config, ENDPOINT_PLAIN_REDIRECT, Endpoint, Vip,
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
        },
        peers: Vec::new(),
        services: vec![table::Service {
            name: "default/shop/web".into(),
            number: 5,
            ports: vec![table::Port {
                protocol: Protocol::Tcp,
                port: 80,
                target_port: 8080,
            }],
            vips: vec![table::Vip {
                policy: PolicyName(Policy::Balanced),
                instance: None,
                addr6: "fd12:3456:789a:1000:0:5::".parse().unwrap(),
                addr4: Some(Ipv4Addr::new(10, 24, 0, 5)),
            }],
            backends,
        }],
    }
}

fn plan(table: &Table, memory: &mut Memory, now: Duration) -> Result<KernelState, Shortage> {
    let node = node_endpoint();
    let sight = Sight::default();
    let inputs = Inputs {
        table,
        node: &node,
        pods: &[],
        sight: &sight,
        tunnel: None,
        quota: 100,
    };
    desired(&inputs, memory, now)
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
fn a_table_becomes_vips_runs_and_backends() {
    let mut memory = Memory::new(CAPACITY);
    let backends = vec![
        backend(0, BackendState::Ready),
        backend(1, BackendState::Ready),
    ];
    let state = plan(&table(backends), &mut memory, NOW).unwrap();
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
    let mut memory = Memory::new(CAPACITY);
    let ready = vec![
        backend(0, BackendState::Ready),
        backend(1, BackendState::Ready),
    ];
    plan(&table(ready), &mut memory, NOW).unwrap();
    let mixed = vec![
        backend(0, BackendState::Draining),
        backend(1, BackendState::Ready),
        backend(2, BackendState::Probing),
    ];
    let state = plan(&table(mixed), &mut memory, NOW).unwrap();
    assert_eq!(state.backends[&1].flags, BACKEND_DRAINING);
    assert_eq!(state.runs[&vip_of(&state).slot_base], [2]);
    assert!(!state.backends.contains_key(&3));
}

#[test]
fn a_dead_backend_has_no_flags_and_its_index_names_another_only_later_and_with_a_new_generation() {
    let capacity = Capacity {
        backends: 3,
        slots: 16,
        counters: 16,
    };
    let mut memory = Memory::new(capacity);
    let two = vec![
        backend(0, BackendState::Ready),
        backend(1, BackendState::Ready),
    ];
    plan(&table(two), &mut memory, NOW).unwrap();
    let other = vec![backend(1, BackendState::Ready)];
    let state = plan(&table(other.clone()), &mut memory, NOW).unwrap();
    assert_eq!(state.backends[&1].flags, 0);
    assert_eq!(
        state.backends[&1].generation, 1,
        "its flows must still see who they belonged to"
    );

    let replaced = vec![
        backend(1, BackendState::Ready),
        backend(2, BackendState::Ready),
    ];
    let early = plan(&table(replaced.clone()), &mut memory, NOW + DEAD_REST / 2);
    assert_eq!(early, Err(Shortage::Backends { capacity: 3 }));
    let late = plan(&table(replaced), &mut memory, NOW + DEAD_REST).unwrap();
    assert_eq!(late.backends[&1].generation, 2);
    assert_eq!(late.backends[&1].flags, BACKEND_LIVE);
}

#[test]
fn a_run_rests_before_its_slots_are_given_again() {
    let mut memory = Memory::new(CAPACITY);
    let one = table(vec![backend(0, BackendState::Ready)]);
    let two = table(vec![
        backend(0, BackendState::Ready),
        backend(1, BackendState::Ready),
    ]);
    let first = vip_of(&plan(&one, &mut memory, NOW).unwrap()).slot_base;
    let state = plan(&two, &mut memory, NOW).unwrap();
    assert_eq!(state.runs[&first], [1], "the old run is still there");
    assert_ne!(vip_of(&state).slot_base, first);
    assert!(memory.is_resting());
    let rested = plan(&two, &mut memory, NOW + RUN_REST).unwrap();
    assert!(!rested.runs.contains_key(&first));
    assert!(!memory.is_resting());
}

#[test]
fn a_restarted_daemon_gives_the_same_indexes_and_runs() {
    let mut memory = Memory::new(CAPACITY);
    let table = table(vec![
        backend(1, BackendState::Ready),
        backend(0, BackendState::Ready),
    ]);
    let before = plan(&table, &mut memory, NOW).unwrap();
    let mut adopted = Memory::adopt(CAPACITY, &before, NOW);
    let after = plan(&table, &mut adopted, NOW).unwrap();
    assert_eq!(diff(&before, &after), []);
}

#[test]
fn vips_are_pointed_after_their_run_and_backends_are_written_and_die_after_the_vips_left() {
    let mut memory = Memory::new(CAPACITY);
    let empty = KernelState::default();
    let one = plan(
        &table(vec![backend(0, BackendState::Ready)]),
        &mut memory,
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
        &mut memory,
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
    let mut memory = Memory::new(CAPACITY);
    let state = plan(&table(Vec::new()), &mut memory, NOW).unwrap();
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
    #[test]
    fn applying_the_difference_gives_the_wanted_state(have in states(), want in states()) {
        let mut state = have.clone();
        for op in diff(&have, &want) {
            state.apply(&op);
        }
        prop_assert_eq!(&state, &want);
        prop_assert_eq!(diff(&state, &want), vec![]);
    }

    #[test]
    fn no_vip_ever_points_at_slots_of_nobody(
        steps in prop::collection::vec((prop::collection::btree_set(0u32..6, 0..4), 0u64..3_000), 1..12),
    ) {
        let mut memory = Memory::new(Capacity { backends: 64, slots: 64, counters: 64 });
        let mut kernel = KernelState::default();
        let mut now = NOW;
        for (instances, millis) in steps {
            now += Duration::from_millis(millis);
            let backends = instances.iter().map(|i| backend(*i, BackendState::Ready)).collect();
            let want = plan(&table(backends), &mut memory, now).unwrap();
            for op in diff(&kernel, &want) {
                kernel.apply(&op);
                for vip in kernel.vips.values().filter(|vip| vip.slot_count > 0) {
                    let run = &kernel.runs[&vip.slot_base];
                    prop_assert_eq!(run.len() as u32, vip.slot_count);
                    for index in run {
                        prop_assert!(kernel.backends[index].flags & BACKEND_LIVE != 0);
                    }
                }
            }
        }
    }
}
