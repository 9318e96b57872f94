use std::net::IpAddr;

use ebpf_common::layout::{BACKEND_DRAINING, BACKEND_LIVE};

use super::*;
use crate::observe::{BackendName, VipName};

/// Maps in memory.
#[derive(Default)]
struct FakeMaps {
    vips: BTreeMap<VipKey, Vip>,
    slots: Vec<u32>,
    backends: BTreeMap<u32, layout::Backend>,
    places: BTreeMap<Addr, Place>,
    flows: BTreeMap<FlowKey, Flow>,
}

impl Maps for FakeMaps {
    fn vip(&self, key: &VipKey) -> Option<Vip> {
        self.vips.get(key).copied()
    }
    fn slot(&self, index: u32) -> Option<u32> {
        self.slots.get(index as usize).copied()
    }
    fn backend(&self, index: u32) -> Option<layout::Backend> {
        self.backends.get(&index).copied()
    }
    fn place(&self, address: &Addr) -> Place {
        self.places.get(address).copied().unwrap_or_default()
    }
    fn flow(&self, key: &FlowKey) -> Option<Flow> {
        self.flows.get(key).copied()
    }
}

fn v4(a: u8, b: u8, c: u8, d: u8) -> Addr {
    Addr::from_v4(u32::from_be_bytes([a, b, c, d]))
}

/// Service 5, `balanced` and `sticky`, TCP 80: backend 1 here, 2 on node 2, 3 dead, each a slot.
fn maps() -> FakeMaps {
    let mut maps = FakeMaps {
        slots: vec![0, 1, 2, 3],
        ..FakeMaps::default()
    };
    for address in [v4(10, 24, 0, 5), v4(10, 28, 0, 5)] {
        let vip = Vip {
            slot_base: 1,
            slot_count: 3,
            counter: 4,
            ..Vip::default()
        };
        let key = |port: u16, proto| VipKey {
            addr: address,
            port_be: port.to_be(),
            proto,
            pad: 0,
        };
        maps.vips.insert(key(0, PROTO_ICMP), vip);
        let port = Vip {
            target_port_be: 8080u16.to_be(),
            ..vip
        };
        maps.vips.insert(key(80, PROTO_TCP), port);
    }
    for (index, node, flags) in [(1, 1, BACKEND_LIVE), (2, 2, BACKEND_LIVE), (3, 2, 0)] {
        let backend = layout::Backend {
            addr4: v4(10, 16, 0, 30 + index),
            node,
            generation: 1,
            flags,
            ..layout::Backend::default()
        };
        maps.backends.insert(index.into(), backend);
    }
    let here = Place {
        endpoint: Some(9),
        path_mtu: None,
    };
    maps.places.insert(v4(10, 16, 0, 31), here);
    let narrow = Place {
        endpoint: None,
        path_mtu: Some(1_300),
    };
    maps.places.insert(v4(10, 16, 0, 32), narrow);
    maps
}

fn ask(maps: &FakeMaps, change: impl FnOnce(&mut TraceRequest)) -> Result<Trace, String> {
    let config = Config {
        seed: 7,
        mesh4: v4(10, 16, 0, 0),
        mesh4_len: 12,
        node: 1,
        tunnel_ifindex: 3,
        tunnel_mtu: 1_420,
        ..Config::default()
    };
    let endpoint = Endpoint {
        addr4: v4(10, 16, 0, 2),
        number: 2,
        ..Endpoint::default()
    };
    let service: std::sync::Arc<str> = "shop/web/front".into();
    let names = Names {
        node: "n1".into(),
        vips: BTreeMap::from([(
            4,
            VipName {
                service: service.clone(),
                policy: "balanced",
                instance: None,
            },
        )]),
        backends: BTreeMap::from([(
            2,
            BackendName {
                service,
                instance: 6,
                epoch: 1,
                node: 2,
            },
        )]),
        peers: BTreeMap::from([(2, "edge/n2".into())]),
        ..Names::default()
    };
    let mut request = TraceRequest {
        from: "shop/client".into(),
        to: IpAddr::from([10, 24, 0, 5]),
        port: Some(80),
        protocol: "tcp".into(),
        sport: Some(40_000),
        probe: false,
    };
    change(&mut request);
    let asker = Asker {
        config: &config,
        endpoint: &endpoint,
        names: &names,
    };
    trace(maps, asker, &request)
}

fn reason(trace: &Trace) -> &str {
    match &trace.outcome {
        Outcome::Refused { reason, .. } => reason,
        outcome => panic!("{outcome:?} is no refusal"),
    }
}

#[test]
fn what_is_refused_is_told_with_the_programs_reason() {
    let maps = maps();
    let to = |to: [u8; 4]| ask(&maps, |request| request.to = to.into()).unwrap();
    assert_eq!(reason(&to([10, 24, 0, 6])), "not_linked");
    assert_eq!(reason(&to([10, 16, 0, 31])), "direct_endpoint");
    assert_eq!(reason(&to([192, 0, 2, 1])), "not_mesh");
    let port = ask(&maps, |request| request.port = Some(81)).unwrap();
    assert_eq!(reason(&port), "undeclared_port");
    assert_eq!(port.service.as_deref(), Some("shop/web/front"));
    let udp = ask(&maps, |request| request.protocol = "udp".into()).unwrap();
    assert_eq!(reason(&udp), "undeclared_port");
    let mut dead = self::maps();
    dead.backends
        .values_mut()
        .for_each(|backend| backend.flags = BACKEND_DRAINING);
    assert_eq!(reason(&ask(&dead, |_| {}).unwrap()), "no_backend");
    let text = to([10, 24, 0, 6]).to_string();
    assert!(
        text.contains("refused: not_linked") && text.contains("a TCP reset"),
        "{text}"
    );
}

#[test]
fn without_a_source_port_the_shares_are_told_and_the_dead_ones_share_goes_to_the_next() {
    let trace = ask(&maps(), |request| request.sport = None).unwrap();
    let Outcome::Depends { backends } = &trace.outcome else {
        panic!("{trace:?}");
    };
    let shares: Vec<_> = backends.iter().map(|b| (b.index, b.share)).collect();
    assert_eq!(shares, [(1, 666), (2, 333)], "the slot of 3 falls to 1");
    assert_eq!(backends[0].way, Way::Local { endpoint: 9 });
    assert_eq!(backends[1].way, Way::Tunnel { mtu: 1_300 });
    assert_eq!(
        (backends[1].node.as_str(), backends[1].instance),
        ("edge/n2", Some(6))
    );
    assert_eq!(backends[1].address, "10.16.0.32:8080".parse().unwrap());
    // Sticky looks at the source address alone.
    let sticky = ask(&maps(), |request| {
        request.sport = None;
        request.to = [10, 28, 0, 5].into();
    });
    assert!(matches!(sticky.unwrap().outcome, Outcome::Opens { .. }));
}

#[test]
fn a_flow_that_lives_keeps_its_backend_and_a_new_connection_picks_by_itself() {
    let mut maps = maps();
    let Outcome::Opens {
        backend: picked, ..
    } = ask(&maps, |_| {}).unwrap().outcome
    else {
        panic!("a new flow");
    };
    let other = 3 - picked.index;
    let key = FlowKey {
        src: v4(10, 16, 0, 2),
        dst: v4(10, 24, 0, 5),
        sport_be: 40_000u16.to_be(),
        dport_be: 80u16.to_be(),
        endpoint: 2,
        proto: PROTO_TCP,
        direction: FLOW_FORWARD,
        pad: 0,
    };
    let flow = Flow {
        backend: other,
        generation: 1,
        port_be: 8080u16.to_be(),
        ..Flow::default()
    };
    maps.flows.insert(key, flow);
    let Outcome::Existing { backend, anew } = ask(&maps, |_| {}).unwrap().outcome else {
        panic!("the flow is there");
    };
    assert_eq!(
        (backend.index, anew.map(|b| b.index)),
        (other, Some(picked.index))
    );
    for gone in [
        Flow {
            generation: 0,
            ..flow
        },
        Flow {
            flags: FLOW_RST,
            ..flow
        },
        Flow {
            flags: FLOW_FIN_CLIENT | FLOW_FIN_BACKEND,
            ..flow
        },
    ] {
        maps.flows.insert(key, gone);
        let outcome = ask(&maps, |_| {}).unwrap().outcome;
        assert!(
            matches!(outcome, Outcome::Opens { .. }),
            "{gone:?}: {outcome:?}"
        );
    }
}

#[test]
fn a_datagrams_flow_moves_only_where_the_port_says_so_and_there_is_another_place() {
    /// The draining or dead backend of the flow.
    const LEFT: u32 = 3;
    let describe = |maps: &FakeMaps| {
        let trace = ask(maps, |request| {
            request.protocol = "udp".into();
            request.port = Some(53);
        });
        match trace.unwrap().outcome {
            Outcome::Existing { backend, .. } => format!("stays at {}", backend.index),
            Outcome::Opens { backend, .. } if backend.index != LEFT => "moves".to_owned(),
            Outcome::Refused { reason, .. } => reason,
            outcome => panic!("{outcome:?}"),
        }
    };
    for (follow, flags, others, expected) in [
        (0, BACKEND_LIVE, true, "stays at 3"),
        (0, BACKEND_DRAINING, true, "stays at 3"),
        (0, 0, true, "backend_gone"),
        (VIP_FOLLOW, BACKEND_LIVE, true, "stays at 3"),
        (VIP_FOLLOW, BACKEND_DRAINING, true, "moves"),
        (VIP_FOLLOW, BACKEND_DRAINING, false, "stays at 3"),
        (VIP_FOLLOW, 0, true, "moves"),
        (VIP_FOLLOW, 0, false, "no_backend"),
    ] {
        let mut maps = maps();
        let key = |port: u16, proto| VipKey {
            addr: v4(10, 24, 0, 5),
            port_be: port.to_be(),
            proto,
            pad: 0,
        };
        let port = Vip {
            flags: follow,
            ..maps.vips[&key(80, PROTO_TCP)]
        };
        maps.vips.insert(key(53, PROTO_UDP), port);
        for (index, backend) in &mut maps.backends {
            if *index == LEFT {
                backend.flags = flags;
            } else if !others {
                backend.flags = 0;
            }
        }
        let flow = FlowKey {
            src: v4(10, 16, 0, 2),
            dst: v4(10, 24, 0, 5),
            sport_be: 40_000u16.to_be(),
            dport_be: 53u16.to_be(),
            endpoint: 2,
            proto: PROTO_UDP,
            direction: FLOW_FORWARD,
            pad: 0,
        };
        let entry = Flow {
            backend: LEFT,
            generation: 1,
            port_be: 5_353u16.to_be(),
            ..Flow::default()
        };
        maps.flows.insert(flow, entry);
        assert_eq!(describe(&maps), expected, "{follow} {flags} {others}");
    }
}

#[test]
fn a_request_that_contradicts_itself_is_refused_with_the_way_out() {
    for (change, part) in [
        (
            (|r| r.port = None) as fn(&mut TraceRequest),
            "--to 10.24.0.5:80",
        ),
        (|r| r.protocol = "sctp".into(), "tcp, udp or icmp"),
        (|r| r.protocol = "icmp".into(), "leave it out"),
        (|r| r.to = "fd12::1".parse().unwrap(), "no IPv6 address"),
    ] {
        let error = ask(&maps(), change).unwrap_err();
        assert!(error.contains(part), "{error}");
    }
}
