//! An event of the kernel, told with names.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use ebpf_common::{
    layout::{
        Addr, EVENT_DELIVERED, EVENT_ENDED, EVENT_OPENED, EVENT_REFUSED, Event, FLOW_REVERSE,
        PROTO_ICMP, PROTO_ICMP6, PROTO_TCP, PROTO_UDP,
    },
    reason::Reason,
};
use netmanager_api::observe::{FlowEvent, Place, Verdict};

use super::Names;

/// `event` as people read it. What ended is told from the client's side, whoever ended it.
#[must_use]
pub fn told(event: &Event, names: &Names, time_ms: u64) -> FlowEvent {
    let verdict = match u32::from(event.kind) {
        EVENT_OPENED => Verdict::Opened,
        EVENT_ENDED => Verdict::Ended,
        EVENT_REFUSED => Verdict::Refused,
        EVENT_DELIVERED => Verdict::Delivered,
        _ => Verdict::Tunnelled,
    };
    let is_flow = matches!(verdict, Verdict::Opened | Verdict::Ended);
    let (src, dst) = (
        socket(event.src, event.sport_be),
        socket(event.dst, event.dport_be),
    );
    let (to_src, to_dst) = (
        socket(event.to_src, event.to_sport_be),
        socket(event.to_dst, event.to_dport_be),
    );
    let is_translated = event.to_dst != Addr::default();
    let (from, to, translated_to) = match (is_translated, event.direction) {
        (false, _) => (src, dst, None),
        (true, FLOW_REVERSE) if is_flow => (to_dst, to_src, Some(src)),
        // Of an answer, what matters is where it seems to come from and whom it reaches.
        (true, FLOW_REVERSE) => (to_src, to_dst, None),
        (true, _) => (src, dst, Some(to_dst)),
    };
    let vip = names.vips.get(&event.counter);
    let backend = names.backends.get(&event.backend);
    let place = |address: SocketAddr| Place {
        address,
        pod: names.pods.get(&address.ip()).cloned(),
    };
    FlowEvent {
        time_ms,
        node: names.node.clone(),
        verdict,
        reason: (verdict == Verdict::Refused)
            .then(|| Reason::ALL.get(event.detail as usize))
            .map(|reason| reason.map_or("unknown", |reason| reason.name()).to_owned()),
        protocol: protocol(event.proto),
        from: place(from),
        to: place(to),
        service: vip
            .map(|vip| &vip.service)
            .or(backend.map(|backend| &backend.service))
            .map(|service| service.to_string()),
        policy: vip.map(|vip| vip.policy.to_owned()),
        translated_to,
        instance: backend.map(|backend| backend.instance),
        backend_node: backend.map(|backend| backend.node),
        age_s: (verdict == Verdict::Ended).then_some(event.detail),
        probe: event.marked != 0,
    }
}

fn protocol(number: u8) -> String {
    match number {
        PROTO_TCP => "TCP".to_owned(),
        PROTO_UDP => "UDP".to_owned(),
        PROTO_ICMP | PROTO_ICMP6 => "ICMP".to_owned(),
        other => other.to_string(),
    }
}

fn socket(address: Addr, port_be: u16) -> SocketAddr {
    SocketAddr::new(ip(&address), u16::from_be(port_be))
}

/// An address of the maps as everybody else writes it.
pub(super) fn ip(address: &Addr) -> IpAddr {
    if address.is_v4() {
        Ipv4Addr::from_bits(u32::from_be(address.v4_be())).into()
    } else {
        Ipv6Addr::from_bits(address.to_bits()).into()
    }
}
