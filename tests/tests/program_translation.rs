//! A VIP is answered by a backend, and the client never sees that.

use std::net::IpAddr;

use ebpf_common::addr::{NODE_ENDPOINT, Policy};
use proptest::prelude::*;
use weft_tests::program::{
    packet::{ACK, FIN, PSH, Packet, SYN, Transport},
    stage::{CLIENT, Family, NODE, PORT, Stage, TARGET, endpoint_address, vip_address},
};

/// What the stage's only backend sees of `packet`.
fn expected(packet: &Packet, backend: IpAddr) -> Packet {
    Packet {
        dst: backend,
        dport: match packet.transport {
            Transport::EchoRequest => 0,
            _ => TARGET,
        },
        ..packet.clone()
    }
}

fn tcp(family: Family, flags: u8, seq: u32, ack: u32) -> Packet {
    let client = endpoint_address(family, NODE, CLIENT);
    let vip = vip_address(family, Policy::Balanced, 5);
    Packet::tcp((client, 40_000), (vip, PORT), flags, seq, ack)
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_connection_to_a_vip_reaches_the_backend_and_is_answered_by_the_vip() {
    for family in Family::BOTH {
        let mut stage = Stage::default();
        stage.service(Policy::Balanced, 5, &[13]);
        let backend = endpoint_address(family, NODE, 3);
        for (from_client, flags) in [
            (true, SYN),
            (false, SYN | ACK),
            (true, ACK),
            (true, ACK | PSH),
            (false, ACK | PSH),
            (true, ACK | FIN),
            (false, ACK | FIN),
            (true, ACK),
        ] {
            let sent = tcp(family, flags, 100, 200);
            let seen = expected(&sent, backend);
            if from_client {
                assert_eq!(stage.deliver(CLIENT, &sent), (3, seen));
            } else {
                assert_eq!(
                    stage.deliver(3, &seen.mirrored()),
                    (CLIENT, sent.mirrored())
                );
            }
        }
        assert_eq!(stage.node.counts(), [], "nothing was dropped");
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn the_host_is_a_client_through_the_node_endpoint() {
    for family in Family::BOTH {
        let mut stage = Stage::default();
        stage.service(Policy::Balanced, 5, &[13]);
        let host = endpoint_address(family, NODE, NODE_ENDPOINT);
        let vip = vip_address(family, Policy::Balanced, 5);
        let sent = Packet::udp((host, 5353), (vip, PORT), b"from the host");
        let seen = expected(&sent, endpoint_address(family, NODE, 3));
        assert_eq!(stage.deliver(NODE_ENDPOINT, &sent), (3, seen.clone()));
        let answer = stage.deliver(3, &seen.mirrored());
        assert_eq!(answer, (NODE_ENDPOINT, sent.mirrored()));
    }
}

/// A packet of a client to the VIP's declared port: any protocol, ports, payload, DSCP and TTL.
fn packets() -> impl Strategy<Value = Packet> {
    let family = prop_oneof![Just(Family::V4), Just(Family::V6)];
    let kind = 0..3_u8;
    let rest = (any::<u16>(), any::<u8>(), 2..=255_u8, any::<u32>());
    let payload = proptest::collection::vec(any::<u8>(), 0..300);
    (family, kind, rest, payload).prop_map(|(family, kind, (port, tos, ttl, seq), payload)| {
        let client = endpoint_address(family, NODE, CLIENT);
        let vip = vip_address(family, Policy::Balanced, 5);
        let packet = match kind {
            0 => Packet::tcp((client, port), (vip, PORT), SYN, seq, 0),
            1 => Packet::udp((client, port), (vip, PORT), &[]),
            _ => Packet::echo(client, vip, port),
        };
        Packet {
            tos,
            ttl,
            payload,
            ..packet
        }
    })
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn undoing_a_translated_flow_gives_the_packet_that_was_sent() {
    let mut stage = Stage::default();
    stage.service(Policy::Balanced, 5, &[13]);
    let stage = std::cell::RefCell::new(stage);
    proptest!(ProptestConfig::with_cases(256), |(sent in packets())| {
        let mut stage = stage.borrow_mut();
        let family = if sent.src.is_ipv4() { Family::V4 } else { Family::V6 };
        let (receiver, seen) = stage.deliver(CLIENT, &sent);
        prop_assert_eq!(receiver, 3);
        prop_assert_eq!(&seen, &expected(&sent, endpoint_address(family, NODE, 3)));
        let (receiver, answer) = stage.deliver(3, &seen.mirrored());
        prop_assert_eq!(receiver, CLIENT);
        prop_assert_eq!(answer.bytes(), sent.mirrored().bytes());
    });
}
