//! What goes into the tunnel, and what may come out of it.

use std::net::IpAddr;

use ebpf_common::{
    addr::{ECHO_PORT, NODE_ENDPOINT, Policy},
    layout::ACCOUNT_TCP,
    reason::Reason,
};
use weft_tests::program::{
    DROPPED, REDIRECTED,
    packet::{ACK, FIN, PSH, Packet, SYN},
    stage::{
        CLIENT, Family, NODE, PORT, REMOTE_BACKEND, REMOTE_NODE, Stage, TARGET, endpoint_address,
        vip_address,
    },
};

fn assert_dropped(stage: &mut Stage, packet: &Packet, reason: Reason) {
    let before = stage.node.count(reason);
    let outcome = stage.node.from_tunnel(&packet.bytes());
    assert_eq!(outcome.action, DROPPED, "{packet:?}");
    assert_eq!(outcome.bytes, packet.bytes(), "left as it was");
    assert_eq!(stage.node.count(reason), before + 1, "{}", reason.name());
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_remote_backend_answers_through_the_tunnel() {
    for family in Family::BOTH {
        let mut stage = Stage::default();
        stage.service(Policy::Balanced, 5, &[REMOTE_BACKEND]);
        let client = endpoint_address(family, NODE, CLIENT);
        let vip = vip_address(family, Policy::Balanced, 5);
        let backend = endpoint_address(family, REMOTE_NODE, 2);
        for (flags, back) in [(SYN, SYN | ACK), (ACK, ACK | PSH), (FIN | ACK, FIN | ACK)] {
            let sent = Packet::tcp((client, 40_000), (vip, PORT), flags, 1, 2);
            let seen = Packet::tcp((client, 40_000), (backend, TARGET), flags, 1, 2);
            assert_eq!(stage.deliver(CLIENT, &sent), (0, seen));
            let answer = Packet::tcp((backend, TARGET), (client, 40_000), back, 9, 2);
            let heard = Packet::tcp((vip, PORT), (client, 40_000), back, 9, 2);
            assert_eq!(stage.arrive(&answer), (CLIENT, heard));
        }
        assert_eq!(
            stage.node.account(CLIENT).closed[ACCOUNT_TCP],
            1,
            "both have closed"
        );
        for sent in [
            Packet::udp((client, 40_000), (vip, PORT), b"question"),
            Packet::echo(client, vip, 77),
        ] {
            let (_, seen) = stage.deliver(CLIENT, &sent);
            assert_eq!(stage.arrive(&seen.mirrored()), (CLIENT, sent.mirrored()));
        }
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_remote_client_reaches_a_local_backend_and_is_answered() {
    for family in Family::BOTH {
        let mut stage = Stage::default();
        let client = endpoint_address(family, REMOTE_NODE, 9);
        let backend = endpoint_address(family, NODE, 3);
        let open = Packet::tcp((client, 40_000), (backend, TARGET), SYN, 1, 0);
        let accept = Packet::tcp((backend, TARGET), (client, 40_000), SYN | ACK, 9, 2);
        for (question, answer) in [
            (open, accept),
            {
                let question = Packet::udp((client, 1), (backend, TARGET), b"question");
                (question.clone(), question.mirrored())
            },
            {
                let question = Packet::echo(client, backend, 7);
                (question.clone(), question.mirrored())
            },
        ] {
            assert_eq!(stage.arrive(&question), (3, question.clone()));
            assert_eq!(stage.deliver(3, &answer), (0, answer.clone()));
        }
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn probes_of_other_nodes_reach_the_node_endpoint() {
    for family in Family::BOTH {
        let mut stage = Stage::default();
        let prober = (
            endpoint_address(family, REMOTE_NODE, NODE_ENDPOINT),
            ECHO_PORT,
        );
        let node = (endpoint_address(family, NODE, NODE_ENDPOINT), ECHO_PORT);
        let probe = Packet::udp(prober, node, b"probe");
        assert_eq!(stage.arrive(&probe), (NODE_ENDPOINT, probe.clone()));
        let answer = probe.mirrored();
        assert_eq!(stage.deliver(NODE_ENDPOINT, &answer), (0, answer.clone()));
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn what_the_host_listens_to_besides_is_not_reached_through_the_tunnel() {
    for family in Family::BOTH {
        let mut stage = Stage::default();
        let peer = (
            endpoint_address(family, REMOTE_NODE, NODE_ENDPOINT),
            ECHO_PORT,
        );
        let host = endpoint_address(family, NODE, NODE_ENDPOINT);
        for packet in [
            Packet::udp(peer, (host, 7_777), b"question"),
            Packet::tcp(peer, (host, 22), SYN, 1, 0),
            Packet::tcp(peer, (host, ECHO_PORT), SYN, 1, 0),
        ] {
            assert_dropped(&mut stage, &packet, Reason::TunnelDestination);
        }
        let answer = Packet::tcp(peer, (host, 40_000), SYN | ACK, 1, 2);
        assert_eq!(stage.arrive(&answer), (NODE_ENDPOINT, answer));
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn the_tunnel_brings_only_packets_of_remote_endpoints() {
    for family in Family::BOTH {
        let mut stage = Stage::default();
        let backend = (endpoint_address(family, NODE, 3), TARGET);
        let outside: IpAddr = match family {
            Family::V4 => "192.0.2.1".parse().expect("an address"),
            Family::V6 => "2001:db8::1".parse().expect("an address"),
        };
        for source in [
            outside,
            vip_address(family, Policy::Balanced, 5),
            endpoint_address(family, NODE, CLIENT),
            endpoint_address(family, NODE, NODE_ENDPOINT),
        ] {
            let packet = Packet::tcp((source, 1), backend, SYN, 1, 0);
            assert_dropped(&mut stage, &packet, Reason::TunnelSource);
        }
    }
    // IPv6 says which node an endpoint is of, also where nobody has the address.
    let mut stage = Stage::default();
    let nobody = endpoint_address(Family::V6, NODE, 30);
    let backend = endpoint_address(Family::V6, NODE, 3);
    let packet = Packet::tcp((nobody, 1), (backend, TARGET), SYN, 1, 0);
    assert_dropped(&mut stage, &packet, Reason::TunnelSource);
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn what_comes_out_of_a_tunnel_never_goes_into_one() {
    for family in Family::BOTH {
        let mut stage = Stage::default();
        stage.service(Policy::Balanced, 5, &[REMOTE_BACKEND]);
        let source = (endpoint_address(family, REMOTE_NODE, 9), 1);
        for target in [
            endpoint_address(family, REMOTE_NODE, 2),
            endpoint_address(family, NODE, 30),
            vip_address(family, Policy::Balanced, 5),
        ] {
            let packet = Packet::tcp(source, (target, PORT), SYN, 1, 0);
            assert_dropped(&mut stage, &packet, Reason::TunnelDestination);
        }
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_short_packet_of_the_tunnel_is_dropped() {
    for family in Family::BOTH {
        let mut stage = Stage::default();
        let source = (endpoint_address(family, REMOTE_NODE, 9), 1);
        let target = (endpoint_address(family, NODE, 3), TARGET);
        let packet = Packet::tcp(source, target, SYN, 1, 0).bytes();
        for len in 14..packet.len() {
            assert_eq!(
                stage.node.from_tunnel(&packet[..len]).action,
                DROPPED,
                "{len} bytes"
            );
        }
        assert_eq!(stage.node.from_tunnel(&packet).action, REDIRECTED);
    }
}
