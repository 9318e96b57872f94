//! What is refused, dropped, and what the sender hears of it.

use std::net::IpAddr;

use ebpf_common::{
    addr::{NODE_ENDPOINT, Policy},
    reason::Reason,
};
use proptest::prelude::*;
use weft_tests::program::{
    DROPPED, Outcome, REDIRECTED,
    packet::{ACK, FIN, PSH, Packet, RST, SYN, Transport, framed},
    stage::{
        CLIENT, Family, NODE, PORT, REMOTE_NODE, Stage, TARGET, endpoint_address, vip_address,
    },
};

fn client(family: Family) -> (IpAddr, u16) {
    (endpoint_address(family, NODE, CLIENT), 40_000)
}

fn vip(family: Family, port: u16) -> (IpAddr, u16) {
    (vip_address(family, Policy::Balanced, 5), port)
}

fn syn(family: Family, to: (IpAddr, u16)) -> Packet {
    Packet::tcp(client(family), to, SYN, 1000, 0)
}

/// Reads the answer to `packet`, which went back to the link that it came from.
fn answer(outcome: &Outcome, packet: &Packet) -> Packet {
    assert_eq!(outcome.action, REDIRECTED, "{packet:?} is answered");
    let frame = packet.frame();
    assert_eq!(outcome.bytes[..6], frame[6..12], "to the sender's MAC");
    assert_eq!(outcome.bytes[6..12], frame[..6], "from the receiver's");
    Packet::parse(&outcome.bytes[14..]).expect("a right packet")
}

/// Sends a SYN that must be refused for `reason`, by a reset that acknowledges it.
fn assert_refused(stage: &mut Stage, packet: &Packet, reason: Reason) {
    let before = stage.node.count(reason);
    let reset = answer(&stage.send(CLIENT, packet), packet);
    let seen = (reset.src, reset.sport, reset.dst, reset.dport);
    assert_eq!(seen, (packet.dst, packet.dport, packet.src, packet.sport));
    assert_eq!(reset.flags(), RST | ACK);
    let expected = Packet::tcp(
        (reset.src, reset.sport),
        (reset.dst, reset.dport),
        RST | ACK,
        0,
        1001,
    );
    assert_eq!(reset, expected);
    assert_eq!(stage.node.count(reason), before + 1, "{}", reason.name());
}

/// Sends a packet that must be refused for `reason` by an ICMP error of the node endpoint; the error.
fn assert_unreachable(stage: &mut Stage, packet: &Packet, reason: Reason) -> Packet {
    let before = stage.node.count(reason);
    let error = answer(&stage.send(CLIENT, packet), packet);
    let family = if packet.src.is_ipv4() {
        Family::V4
    } else {
        Family::V6
    };
    let node = endpoint_address(family, NODE, NODE_ENDPOINT);
    assert_eq!((error.src, error.dst), (node, packet.src));
    let quoted = &error.payload[4..];
    assert_eq!(quoted, &packet.bytes()[..quoted.len()], "as it was sent");
    assert_eq!(quoted.len(), if packet.src.is_ipv4() { 28 } else { 48 });
    assert_eq!(stage.node.count(reason), before + 1, "{}", reason.name());
    error
}

fn assert_dropped(stage: &mut Stage, from: u32, frame: &[u8], reason: Reason) {
    let before = stage.node.count(reason);
    let outcome = stage.node.from_pod(&Stage::endpoint(from), frame);
    assert_eq!(outcome.action, DROPPED, "{}", reason.name());
    let counts = stage.node.counts();
    assert_eq!(
        stage.node.count(reason),
        before + 1,
        "{} in {counts:?}",
        reason.name()
    );
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_vip_without_a_link_is_refused_at_once() {
    for family in Family::BOTH {
        let mut stage = Stage::default();
        assert_refused(
            &mut stage,
            &syn(family, vip(family, PORT)),
            Reason::NotLinked,
        );
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn an_undeclared_port_is_refused_at_once() {
    for family in Family::BOTH {
        let mut stage = Stage::default();
        stage.service(Policy::Balanced, 5, &[13]);
        assert_refused(
            &mut stage,
            &syn(family, vip(family, 81)),
            Reason::UndeclaredPort,
        );
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_service_without_backends_refuses_at_once() {
    for family in Family::BOTH {
        let mut stage = Stage::default();
        stage.service(Policy::Balanced, 5, &[]);
        assert_refused(
            &mut stage,
            &syn(family, vip(family, PORT)),
            Reason::NoBackend,
        );
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_refused_datagram_is_answered_with_port_unreachable() {
    for family in Family::BOTH {
        let mut stage = Stage::default();
        let unreachable = match family {
            Family::V4 => Transport::Icmp(3, 3),
            Family::V6 => Transport::Icmp(1, 4),
        };
        for payload in [&b""[..], b"x", &[7; 600]] {
            let datagram = Packet::udp(client(family), vip(family, PORT), payload);
            let error = assert_unreachable(&mut stage, &datagram, Reason::NotLinked);
            assert_eq!(error.transport, unreachable);
        }
        stage.service(Policy::Balanced, 5, &[13]);
        let datagram = Packet::udp(client(family), vip(family, 81), b"x");
        assert_unreachable(&mut stage, &datagram, Reason::UndeclaredPort);
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_pod_reaches_no_endpoint_directly() {
    for family in Family::BOTH {
        let mut stage = Stage::default();
        for target in [(NODE, 3), (REMOTE_NODE, 2)] {
            let target = endpoint_address(family, target.0, target.1);
            assert_refused(
                &mut stage,
                &syn(family, (target, TARGET)),
                Reason::DirectEndpoint,
            );
            let ping = Packet::echo(client(family).0, target, 7);
            assert_unreachable(&mut stage, &ping, Reason::DirectEndpoint);
        }
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn the_node_endpoint_probes_endpoints_and_is_answered() {
    for family in Family::BOTH {
        let mut stage = Stage::default();
        let host = (endpoint_address(family, NODE, NODE_ENDPOINT), 50_000);
        let pod = (endpoint_address(family, NODE, 3), TARGET);
        for probe in [
            Packet::tcp(host, pod, SYN, 1, 0),
            Packet::udp(host, pod, b"probe"),
            Packet::echo(host.0, pod.0, 9),
        ] {
            assert_eq!(stage.deliver(NODE_ENDPOINT, &probe), (3, probe.clone()));
            let mut back = probe.mirrored();
            if back.transport == Packet::tcp(pod, host, SYN, 1, 0).transport {
                back = Packet::tcp(pod, host, SYN | ACK, 9, 2);
            }
            assert_eq!(stage.deliver(3, &back), (NODE_ENDPOINT, back.clone()));
        }
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_datagram_to_an_endpoint_passes_only_as_an_answer() {
    for family in Family::BOTH {
        let mut stage = Stage::default();
        let pod = (endpoint_address(family, NODE, 3), TARGET);
        let other = (endpoint_address(family, REMOTE_NODE, 2), 6000);
        let datagram = Packet::udp(pod, other, b"unasked");
        let before = stage.node.count(Reason::DirectEndpoint);
        stage.send(3, &datagram);
        assert_eq!(stage.node.count(Reason::DirectEndpoint), before + 1);
        let question = datagram.mirrored();
        assert_eq!(stage.node.from_tunnel(&question.bytes()).action, REDIRECTED);
        assert_eq!(stage.deliver(3, &datagram), (0, datagram.clone()));
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_segment_without_a_flow_is_reset_where_its_sender_expects_it() {
    for family in Family::BOTH {
        let mut stage = Stage::default();
        stage.service(Policy::Balanced, 5, &[13]);
        let mut segment = Packet::tcp(client(family), vip(family, PORT), ACK | PSH, 500, 777);
        segment.payload = b"after a reboot".to_vec();
        let reset = answer(&stage.send(CLIENT, &segment), &segment);
        assert_eq!(
            reset,
            Packet::tcp(vip(family, PORT), client(family), RST, 777, 0)
        );
        // Without an acknowledgement: everything that it occupies is acknowledged.
        let fin = Packet {
            payload: b"abc".to_vec(),
            ..Packet::tcp(client(family), vip(family, PORT), FIN, 500, 0)
        };
        let reset = answer(&stage.send(CLIENT, &fin), &fin);
        assert_eq!(
            reset,
            Packet::tcp(vip(family, PORT), client(family), RST | ACK, 0, 504)
        );
        assert_eq!(stage.node.count(Reason::NoFlow), 2);
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_reset_is_never_answered() {
    for family in Family::BOTH {
        let mut stage = Stage::default();
        for flags in [RST, RST | ACK] {
            let reset = Packet::tcp(client(family), vip(family, PORT), flags, 1, 1);
            assert_dropped(&mut stage, CLIENT, &reset.frame(), Reason::NoFlow);
        }
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_pod_sends_only_from_its_own_addresses() {
    for family in Family::BOTH {
        let mut stage = Stage::default();
        stage.service(Policy::Balanced, 5, &[13]);
        for source in [
            endpoint_address(family, NODE, 3),
            endpoint_address(family, REMOTE_NODE, 2),
            vip(family, PORT).0,
        ] {
            let forged = Packet::tcp((source, 1), vip(family, PORT), SYN, 1, 0);
            assert_dropped(&mut stage, CLIENT, &forged.frame(), Reason::SpoofedSource);
        }
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn nothing_but_the_mesh_is_reached_from_a_weft_link() {
    let mut stage = Stage::default();
    for (family, outside) in [
        (Family::V4, "192.0.2.1"),
        (Family::V4, "255.255.255.255"),
        // In the mesh, but of a policy code that is not in use.
        (Family::V4, "10.29.0.5"),
        (Family::V6, "2001:db8::1"),
        (Family::V6, "ff02::1"),
        (Family::V6, "fd12:3456:789b::1"),
        (Family::V6, "fd12:3456:789a:2000::1"),
    ] {
        let outside: IpAddr = outside.parse().expect("an address");
        let packet = syn(family, (outside, 80));
        assert_dropped(&mut stage, CLIENT, &packet.frame(), Reason::NotMesh);
    }
    // What an IPv6 link says of itself: listener reports have a hop-by-hop header and a source of their own.
    let group = "ff02::16".parse().expect("an address");
    let own = "fe80::1".parse().expect("an address");
    let mut report = Packet::udp((own, 1), (group, 1), b"report").frame();
    report[20] = 0;
    assert_dropped(&mut stage, CLIENT, &report, Reason::NotMesh);
    let mut arp = syn(Family::V4, vip(Family::V4, PORT)).frame();
    arp[12..14].copy_from_slice(&[0x08, 0x06]);
    assert_dropped(&mut stage, CLIENT, &arp, Reason::NotMesh);
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn headers_that_are_not_what_they_say_are_dropped_with_their_reason() {
    let mut stage = Stage::default();
    stage.service(Policy::Balanced, 5, &[13]);
    let v4 = syn(Family::V4, vip(Family::V4, PORT)).frame();
    let v6 = syn(Family::V6, vip(Family::V6, PORT)).frame();
    let with = |frame: &[u8], at: usize, bytes: &[u8]| {
        let mut frame = frame.to_vec();
        frame[at..at + bytes.len()].copy_from_slice(bytes);
        frame
    };
    for (frame, reason) in [
        (with(&v4, 20, &[0x20, 0]), Reason::Fragment),
        (with(&v4, 20, &[0, 1]), Reason::Fragment),
        (with(&v4, 14, &[0x46]), Reason::Malformed),
        (with(&v4, 14, &[0x44]), Reason::Malformed),
        (with(&v4, 14, &[0x65]), Reason::Malformed),
        (with(&v4, 23, &[132]), Reason::Protocol),
        (with(&v6, 14, &[0x40]), Reason::Malformed),
        (with(&v6, 20, &[44]), Reason::Fragment),
        (with(&v6, 20, &[0]), Reason::HeaderChain),
        (with(&v6, 20, &[60]), Reason::HeaderChain),
        (with(&v6, 20, &[59]), Reason::Protocol),
        // ICMP of the other family is no protocol of this one.
        (with(&v4, 23, &[58]), Reason::Protocol),
        (with(&v6, 20, &[1]), Reason::Protocol),
    ] {
        assert_dropped(&mut stage, CLIENT, &frame, reason);
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_packet_shorter_than_it_says_is_dropped() {
    let mut stage = Stage::default();
    stage.service(Policy::Balanced, 5, &[13]);
    for family in Family::BOTH {
        for packet in [
            syn(family, vip(family, PORT)),
            Packet::udp(client(family), vip(family, PORT), b"datagram"),
            Packet::echo(client(family).0, vip(family, PORT).0, 7),
        ] {
            let frame = packet.frame();
            // A test run takes no less than the headers of what the frame says it is.
            let least = 14 + if packet.src.is_ipv4() { 20 } else { 40 };
            for len in least..frame.len() {
                assert_dropped(&mut stage, CLIENT, &frame[..len], Reason::Malformed);
            }
            assert_eq!(stage.deliver(CLIENT, &packet).0, 3);
        }
    }
    // A TCP header that claims to be longer than its packet, or shorter than a header.
    for offset in [0xf0, 0x40] {
        let mut frame = syn(Family::V4, vip(Family::V4, PORT)).frame();
        frame[14 + 20 + 12] = offset;
        assert_dropped(&mut stage, CLIENT, &frame, Reason::Malformed);
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn what_is_larger_than_the_tunnel_takes_is_answered_with_its_size() {
    use weft_tests::program::stage::{REMOTE_BACKEND, TUNNEL_MTU};
    for family in Family::BOTH {
        let header = match family {
            Family::V4 => 28,
            Family::V6 => 48,
        };
        let mut stage = Stage::default();
        stage.service(Policy::Balanced, 5, &[REMOTE_BACKEND]);
        let fits = vec![1; TUNNEL_MTU as usize - header];
        let datagram = Packet::udp(client(family), vip(family, PORT), &fits);
        assert_eq!(stage.deliver(CLIENT, &datagram).0, 0);
        let larger = Packet::udp(client(family), vip(family, PORT), &[fits, vec![1]].concat());
        let error = assert_unreachable(&mut stage, &larger, Reason::TooBig);
        let mtu = u32::from_be_bytes(*error.payload.first_chunk().expect("four bytes"));
        assert_eq!(mtu, TUNNEL_MTU);
        let kind = match family {
            Family::V4 => Transport::Icmp(3, 4),
            Family::V6 => Transport::Icmp(2, 0),
        };
        assert_eq!(error.transport, kind);
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn no_bytes_reach_anyone_but_as_a_right_packet_of_their_sender() {
    let mut stage = Stage::default();
    stage.service(Policy::Balanced, 5, &[13]);
    let stage = std::cell::RefCell::new(stage);
    let base = prop_oneof![
        Just(syn(Family::V4, vip(Family::V4, PORT)).bytes()),
        Just(syn(Family::V6, vip(Family::V6, PORT)).bytes()),
        Just(Packet::udp(client(Family::V6), vip(Family::V6, PORT), b"x").bytes()),
        Just(Packet::echo(client(Family::V4).0, vip(Family::V4, PORT).0, 1).bytes()),
    ];
    let changes = proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4);
    proptest!(ProptestConfig::with_cases(512), |(base in base, changes in changes)| {
        let mut frame = framed(&base);
        for (at, value) in &changes {
            let at = 14 + at.index(base.len());
            frame[at] = *value;
        }
        let mut stage = stage.borrow_mut();
        let outcome = stage.node.from_pod(&Stage::endpoint(CLIENT), &frame);
        prop_assert!(outcome.action == DROPPED || outcome.action == REDIRECTED);
        // What was right before is right after; what was wrong is not put right.
        if outcome.action == REDIRECTED && Packet::parse(&frame[14..]).is_ok() {
            let out = Packet::parse(&outcome.bytes[14..]);
            prop_assert!(out.is_ok(), "{:?}", out);
        }
    });
}
