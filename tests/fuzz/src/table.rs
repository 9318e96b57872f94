//! A table, from its bytes to the maps: whatever it says, the plan holds together (I4).

use std::{net::Ipv6Addr, sync::Arc, time::Duration};

use ebpf_common::layout::BACKEND_LIVE;
use netmanager_api::table::Table;
use weft_netmanager::{
    plan::{Capacity, Inputs, KernelState, NodeEndpoint, Planner, TunnelDevice},
    policy::Sight,
};

const CAPACITY: Capacity = Capacity {
    backends: 64,
    slots: 40_000,
    counters: 256,
    vips: 256,
};

/// One table, or up to three with a zero byte between, each following the one before.
pub(crate) fn run(data: &[u8]) {
    let start = Duration::from_secs(1_000);
    let mut kernel = KernelState::default();
    let mut planner = Planner::adopt(CAPACITY, kernel.clone(), start);
    for (seconds, part) in (0..).zip(data.split(|&byte| byte == 0).take(3)) {
        let Some(table) = crate::survives::<Table>(part) else {
            return;
        };
        let now = start + Duration::from_secs(seconds);
        let has_room = plan(table, &mut planner, now);
        let writes = planner.writes();
        for write in &writes {
            kernel.apply(write);
            check_runs(&kernel);
        }
        check(&kernel, has_room);
        planner.wrote(&writes);
        assert_eq!(*planner.have(), kernel);
        assert_eq!(planner.writes(), [], "all is written");
    }
}

/// A service that finds no room is refused by name; everything else is planned. False where there is one.
fn plan(table: Table, planner: &mut Planner, now: Duration) -> bool {
    let table = Arc::new(table);
    let node = NodeEndpoint {
        ifindex: 2,
        mac: [2, 0, 0, 0, 0, 1],
        host_mac: [2, 0, 0, 0, 0, 2],
        addr6: Ipv6Addr::LOCALHOST,
        addr4: None,
    };
    let inputs = Inputs {
        table: &table,
        node: &node,
        pods: &[],
        sight: &Sight::default(),
        tunnel: Some(TunnelDevice {
            ifindex: 3,
            mtu: 1420,
        }),
        quota: 0,
    };
    let planned = planner.plan(&inputs, now);
    if let Err(shortage) = &planned {
        assert!(!shortage.to_string().is_empty());
    }
    planned.is_ok()
}

/// After each write, a VIP's slots are there.
fn check_runs(state: &KernelState) {
    for vip in state.vips.values().filter(|vip| vip.slot_count > 0) {
        let run = state.runs.get(&vip.slot_base).expect("the run of a VIP");
        assert!(vip.slot_count as usize <= run.len(), "{vip:?}");
    }
}

/// After all, slots name backends that new flows may pick, but for those that a service without room keeps, and nothing
/// is beside its map.
fn check(state: &KernelState, has_room: bool) {
    for (base, run) in &state.runs {
        assert!(*base as usize + run.len() <= CAPACITY.slots as usize);
    }
    for vip in state.vips.values().filter(|vip| vip.slot_count > 0) {
        for backend in &state.runs[&vip.slot_base] {
            let backend = state.backends.get(backend);
            let is_live = backend.is_some_and(|backend| backend.flags & BACKEND_LIVE != 0);
            assert!(
                is_live || !has_room && backend.is_some(),
                "{vip:?} names {backend:?}"
            );
        }
    }
    assert!(state.vips.len() <= CAPACITY.vips as usize);
    let backends = &state.backends;
    assert!(backends.keys().all(|&index| index < CAPACITY.backends));
}
