//! What the flow tables must hold after any sequence of packets, told from their entries alone.

use std::collections::BTreeMap;

use ebpf_common::{
    addr::NODE_ENDPOINT,
    layout::{
        ACCOUNT_DATAGRAM, ACCOUNT_INBOUND, ACCOUNT_TCP, FLOW_ESTABLISHED, FLOW_FIN_BACKEND,
        FLOW_FIN_CLIENT, FLOW_FORWARD, FLOW_HAIRPIN, FLOW_INBOUND, FLOW_REVERSE, FLOW_RST, Flow,
        FlowKey, PROTO_TCP,
    },
};
use weft_tests::program::{
    addr,
    stage::{CLIENT, Family, NODE, Stage, endpoint_address},
};

use super::AGEING;

/// Looks through both tables.
///
/// # Panics
///
/// When something in them cannot be.
pub(super) fn check(stage: &mut Stage) {
    let connections: BTreeMap<_, _> = stage.node.flows("FLOWS").into_iter().collect();
    let datagrams: BTreeMap<_, _> = stage.node.flows("FLOWS_LRU").into_iter().collect();
    assert!(
        connections.keys().all(|key| key.proto == PROTO_TCP)
            && datagrams.keys().all(|key| key.proto != PROTO_TCP),
        "a flow in the other protocol's table"
    );
    for table in [&connections, &datagrams] {
        pairs(table);
    }
    let shared: BTreeMap<_, _> = stage.node.shared("FLOWS").into_iter().collect();
    let lingering = forward(&shared)
        .filter(|(_, flow)| flow.flags & FLOW_ESTABLISHED == 0 || is_over(flow))
        .count();
    assert!(
        lingering <= AGEING as usize,
        "{lingering} connections open or linger: {connections:?}"
    );
    quota(stage, &connections, &datagrams);
}

/// Every flow that is not over has its own entry for answers: nobody else's flow took it.
fn pairs(table: &BTreeMap<FlowKey, Flow>) {
    for (key, flow) in forward(table).filter(|(_, flow)| !is_over(flow)) {
        let reverse = reverse_key(key, flow);
        let Some(found) = table.get(&reverse) else {
            panic!("{key:?} {flow:?} has no way back: {table:?}");
        };
        let says = (found.addr, found.port_be, found.client_port_be);
        assert_eq!(says, (key.dst, key.dport_be, key.sport_be), "{key:?}");
        assert_eq!(
            (found.flags ^ flow.flags) & FLOW_HAIRPIN,
            0,
            "{key:?} and {reverse:?} are two flows"
        );
    }
}

/// The client has no more than it may, and the programs' count is what the tables hold.
fn quota(
    stage: &mut Stage,
    connections: &BTreeMap<FlowKey, Flow>,
    datagrams: &BTreeMap<FlowKey, Flow>,
) {
    let endpoint = stage.limited(CLIENT);
    let account = stage.node.account(CLIENT);
    let of_client = |(key, _): &(&FlowKey, &Flow)| key.endpoint == CLIENT;
    let open = |(_, flow): &(&FlowKey, &Flow)| !is_over(flow);
    let inbound = datagrams
        .iter()
        .filter(|(key, _)| key.direction == FLOW_INBOUND);
    for (kind, held) in [
        (
            ACCOUNT_TCP,
            forward(connections).filter(of_client).filter(open).count(),
        ),
        (
            ACCOUNT_DATAGRAM,
            forward(datagrams).filter(of_client).count(),
        ),
        (ACCOUNT_INBOUND, inbound.filter(of_client).count()),
    ] {
        let counted = account.opened[kind].wrapping_sub(account.closed[kind]);
        assert_eq!(counted, held as u64, "kind {kind}: {account:?}");
        let most = endpoint.quota_of(kind);
        assert!(
            held <= most as usize,
            "{held} of kind {kind}, {most} at most"
        );
    }
}

fn forward(table: &BTreeMap<FlowKey, Flow>) -> impl Iterator<Item = (&FlowKey, &Flow)> {
    table
        .iter()
        .filter(|(key, _)| key.direction == FLOW_FORWARD)
}

fn is_over(flow: &Flow) -> bool {
    let both = FLOW_FIN_CLIENT | FLOW_FIN_BACKEND;
    flow.flags & FLOW_RST != 0 || flow.flags & both == both
}

/// The key under which a flow's answers are found.
fn reverse_key(key: &FlowKey, flow: &Flow) -> FlowKey {
    let hairpin = flow.flags & FLOW_HAIRPIN != 0;
    let family = if key.src.is_v4() {
        Family::V4
    } else {
        Family::V6
    };
    FlowKey {
        src: flow.addr,
        dst: if hairpin {
            addr(endpoint_address(family, NODE, NODE_ENDPOINT))
        } else {
            key.src
        },
        sport_be: flow.port_be,
        dport_be: flow.client_port_be,
        endpoint: if hairpin { NODE_ENDPOINT } else { key.endpoint },
        direction: FLOW_REVERSE,
        ..*key
    }
}
