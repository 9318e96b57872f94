//! What is remembered of a flow, and what is not believed of it.

use std::collections::BTreeSet;

use ebpf_common::{
    addr::{NODE_ENDPOINT, Policy},
    layout::{
        ACCOUNT_TCP, BACKEND_DRAINING, BACKEND_LIVE, Backend, FLOW_ESTABLISHED, FLOW_FIN_BACKEND,
        FLOW_FIN_CLIENT, FLOW_HAIRPIN, FLOW_RST,
    },
    reason::Reason,
};
use weft_tests::program::{
    REDIRECTED, addr,
    packet::{ACK, FIN, PSH, Packet, RST, SYN},
    stage::{CLIENT, Family, NODE, PORT, Stage, TARGET, endpoint_address, receiver, vip_address},
    talk::{backend, client, close, connect, forward, point_to, resets, segment, vip},
};

/// Whether both sides have ended, or one has reset.
fn is_over(flags: u32) -> bool {
    let both = FLOW_FIN_CLIENT | FLOW_FIN_BACKEND;
    flags & FLOW_RST != 0 || flags & both == both
}

/// What a backend says to a segment that it was given.
fn answer(to: &Packet, flags: u8, seq: u32, ack: u32) -> Packet {
    Packet::tcp((to.dst, to.dport), (to.src, to.sport), flags, seq, ack)
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_connection_is_established_by_the_clients_answer_and_lingers_when_it_is_over() {
    let all = |stage: &mut Stage, is: fn(u32) -> bool| {
        let flows = stage.node.flows("FLOWS");
        assert_eq!(flows.len(), 2, "forward and reverse");
        flows.iter().all(|(_, flow)| is(flow.flags))
    };
    for family in Family::BOTH {
        let mut stage = Stage::default();
        point_to(&mut stage, 3);
        let (_, seen) = stage.deliver(CLIENT, &segment(family, 1, SYN, 100));
        stage.deliver(CLIENT, &segment(family, 1, ACK, 101));
        assert!(
            all(&mut stage, |flags| flags & FLOW_ESTABLISHED == 0),
            "the backend has not accepted"
        );
        stage.deliver(3, &answer(&seen, SYN | ACK, 9, 101));
        assert!(all(&mut stage, |flags| flags & FLOW_ESTABLISHED == 0));
        stage.deliver(CLIENT, &segment(family, 1, ACK, 101));
        assert!(all(&mut stage, |flags| flags & FLOW_ESTABLISHED != 0));
        // The client ends its direction, then the backend its own.
        stage.deliver(CLIENT, &segment(family, 1, FIN | ACK, 101));
        assert!(all(&mut stage, |flags| !is_over(flags)), "half closed");
        assert_eq!(stage.node.account(CLIENT).closed[ACCOUNT_TCP], 0);
        stage.deliver(3, &answer(&seen, FIN | ACK, 10, 102));
        assert!(all(&mut stage, is_over));
        // Repeated, it is over once.
        stage.deliver(3, &answer(&seen, FIN | ACK, 10, 102));
        let account = stage.node.account(CLIENT);
        assert_eq!(
            (account.opened[ACCOUNT_TCP], account.closed[ACCOUNT_TCP]),
            (1, 1)
        );
        // The last acknowledgement still finds its way.
        assert_eq!(stage.deliver(CLIENT, &segment(family, 1, ACK, 102)).0, 3);
        assert!(all(&mut stage, is_over), "and does not bring it back");
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_reset_ends_a_connection_from_either_side() {
    for family in Family::BOTH {
        for from_client in [true, false] {
            let mut stage = Stage::default();
            point_to(&mut stage, 3);
            connect(&mut stage, family, 1, 100);
            if from_client {
                stage.deliver(CLIENT, &segment(family, 1, RST, 101));
            } else {
                stage.deliver(
                    3,
                    &Packet::tcp(backend(family, 3), client(family, 1), RST, 10, 0),
                );
            }
            let flows = stage.node.flows("FLOWS");
            assert!(
                flows.len() == 2 && flows.iter().all(|(_, flow)| is_over(flow.flags)),
                "from the client: {from_client}"
            );
            assert_eq!(stage.node.account(CLIENT).closed[ACCOUNT_TCP], 1);
        }
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_syn_never_trusts_an_old_flow() {
    for family in Family::BOTH {
        let mut stage = Stage::default();
        point_to(&mut stage, 3);
        assert_eq!(connect(&mut stage, family, 1, 100), 3);
        // The service has moved; the client uses its source port again.
        point_to(&mut stage, 4);
        assert_eq!(
            stage.deliver(CLIENT, &segment(family, 1, ACK, 101)).0,
            3,
            "the old flow goes on"
        );
        assert_eq!(
            stage.deliver(CLIENT, &segment(family, 1, SYN, 100)).0,
            3,
            "a repeated SYN keeps it"
        );
        assert_eq!(
            stage.deliver(CLIENT, &segment(family, 1, SYN, 5000)).0,
            4,
            "a new one does not"
        );
        let flows = stage.node.flows("FLOWS");
        assert!(
            flows.len() == 2 && flows.iter().all(|(_, flow)| flow.backend == 14),
            "nothing is left of the old flow"
        );
        let account = stage.node.account(CLIENT);
        assert_eq!(
            (account.opened[ACCOUNT_TCP], account.closed[ACCOUNT_TCP]),
            (2, 1)
        );
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_port_that_is_used_again_after_its_connection_closed_goes_where_new_flows_go() {
    for family in Family::BOTH {
        let mut stage = Stage::default();
        for (isn, number) in [(100, 3), (5000, 3), (9000, 4), (100, 4)] {
            point_to(&mut stage, number);
            assert_eq!(connect(&mut stage, family, 1, isn), number, "{isn}");
            close(&mut stage, family, 1, number, isn + 1);
            let flows = stage.node.flows("FLOWS");
            assert!(flows.len() == 2 && flows.iter().all(|(_, flow)| is_over(flow.flags)));
        }
        let account = stage.node.account(CLIENT);
        assert_eq!(
            (account.opened[ACCOUNT_TCP], account.closed[ACCOUNT_TCP]),
            (4, 4)
        );
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_flow_to_a_removed_backend_is_reset_and_forgotten() {
    for family in Family::BOTH {
        for gone in [
            Backend {
                flags: 0,
                ..Stage::local_backend(3)
            },
            // Its index names another backend now.
            Backend {
                generation: 2,
                ..Stage::local_backend(4)
            },
        ] {
            let mut stage = Stage::default();
            point_to(&mut stage, 3);
            connect(&mut stage, family, 1, 100);
            stage.node.backend(13, &gone);
            assert!(resets(&mut stage, &segment(family, 1, ACK | PSH, 101)));
            assert_eq!(stage.node.count(Reason::BackendGone), 1);
            assert_eq!(stage.node.flows("FLOWS"), []);
            assert_eq!(stage.node.flows("FLOWS_LRU"), []);
        }
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_repeated_syn_does_not_keep_a_removed_backend() {
    for family in Family::BOTH {
        let mut stage = Stage::default();
        stage.service(Policy::Balanced, 5, &[13, 14]);
        let (first, _) = stage.deliver(CLIENT, &segment(family, 1, SYN, 100));
        stage.node.backend(10 + first, &Backend::default());
        let (second, _) = stage.deliver(CLIENT, &segment(family, 1, SYN, 100));
        assert_ne!(first, second);
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_draining_backend_keeps_its_flows_and_gets_no_new_ones() {
    for family in Family::BOTH {
        let mut stage = Stage::default();
        stage.service(Policy::Balanced, 5, &[13, 14]);
        let old = connect(&mut stage, family, 1, 100);
        let draining = Backend {
            flags: BACKEND_DRAINING,
            ..Stage::local_backend(old)
        };
        stage.node.backend(10 + old, &draining);
        for port in 2..60 {
            assert_ne!(stage.deliver(CLIENT, &segment(family, port, SYN, 1)).0, old);
        }
        assert_eq!(stage.deliver(CLIENT, &segment(family, 1, ACK, 101)).0, old);
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_datagram_flow_keeps_its_backend_until_that_is_gone() {
    for family in Family::BOTH {
        let mut stage = Stage::default();
        stage.service(Policy::Balanced, 5, &[13, 14]);
        let datagram = Packet::udp(client(family, 1), vip(family, 5), b"x");
        let (first, _) = stage.deliver(CLIENT, &datagram);
        for _ in 0..8 {
            assert_eq!(stage.deliver(CLIENT, &datagram).0, first);
        }
        stage.node.backend(10 + first, &Backend::default());
        stage.send(CLIENT, &datagram);
        assert_eq!(stage.node.count(Reason::BackendGone), 1);
        assert_ne!(stage.deliver(CLIENT, &datagram).0, first);
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn two_vips_with_one_backend_do_not_share_a_tuple() {
    for family in Family::BOTH {
        let mut stage = Stage::default();
        for service in 5..9 {
            stage.service(Policy::Balanced, service, &[13]);
        }
        let mut ports = BTreeSet::new();
        for service in 5..9 {
            let sent = Packet::tcp(client(family, 40_000), vip(family, service), SYN, 1, 0);
            let (_, seen) = stage.deliver(CLIENT, &sent);
            assert!(ports.insert(seen.sport), "{} is used twice", seen.sport);
            let accept = Packet::tcp(
                (seen.dst, seen.dport),
                (seen.src, seen.sport),
                SYN | ACK,
                9,
                2,
            );
            let (to, heard) = stage.deliver(3, &accept);
            assert_eq!(to, CLIENT);
            assert_eq!(
                heard,
                Packet::tcp(
                    vip(family, service),
                    client(family, 40_000),
                    SYN | ACK,
                    9,
                    2
                )
            );
            // Also once it is established.
            let ack = Packet::tcp(client(family, 40_000), vip(family, service), ACK, 2, 10);
            assert_eq!(stage.deliver(CLIENT, &ack).1.sport, seen.sport);
        }
        assert!(ports.contains(&40_000), "the first keeps its port");
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn echo_requests_with_one_identifier_to_two_vips_are_told_apart() {
    for family in Family::BOTH {
        let mut stage = Stage::default();
        for service in [5, 6] {
            stage.service(Policy::Balanced, service, &[13]);
        }
        for service in [5, 6] {
            let ping = Packet::echo(client(family, 0).0, vip(family, service).0, 77);
            let (_, seen) = stage.deliver(CLIENT, &ping);
            assert_eq!(
                stage.deliver(3, &seen.mirrored()),
                (CLIENT, ping.mirrored())
            );
        }
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_pod_that_is_its_own_backend_talks_to_itself_through_the_node_endpoint() {
    for family in Family::BOTH {
        let mut stage = Stage::default();
        stage.service(Policy::Balanced, 5, &[10 + CLIENT]);
        let node = endpoint_address(family, NODE, NODE_ENDPOINT);
        let own = client(family, 40_000);
        for (flags, back) in [(SYN, SYN | ACK), (ACK, ACK | PSH), (FIN | ACK, FIN | ACK)] {
            let sent = Packet::tcp(own, vip(family, 5), flags, 1, 1);
            let seen = Packet::tcp((node, 40_000), (own.0, TARGET), flags, 1, 1);
            assert_eq!(stage.deliver(CLIENT, &sent), (CLIENT, seen));
            let answer = Packet::tcp((own.0, TARGET), (node, 40_000), back, 9, 2);
            let heard = Packet::tcp(vip(family, 5), own, back, 9, 2);
            assert_eq!(stage.deliver(CLIENT, &answer), (CLIENT, heard));
        }
        let hairpins = stage.node.flows("FLOWS");
        assert!(
            hairpins.len() == 2
                && hairpins
                    .iter()
                    .all(|(_, flow)| flow.flags & FLOW_HAIRPIN != 0 && is_over(flow.flags)),
            "both have closed"
        );
        // The host's own flow to that pod, with the same port, is another.
        let host = Packet::tcp((node, 40_000), vip(family, 5), SYN, 1, 0);
        let (to, _) = stage.deliver(NODE_ENDPOINT, &host);
        assert_eq!(to, CLIENT);
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_flow_entry_says_what_user_space_must_know() {
    for family in Family::BOTH {
        let mut stage = Stage::default();
        point_to(&mut stage, 3);
        stage.deliver(CLIENT, &segment(family, 40_000, SYN, 0x0102_0304));
        let (key, flow) = forward(&mut stage, "FLOWS", 40_000).expect("a forward entry");
        assert_eq!(
            (key.src, key.dst),
            (addr(client(family, 0).0), addr(vip(family, 5).0))
        );
        assert_eq!(
            (key.sport_be, key.dport_be),
            (40_000_u16.to_be(), PORT.to_be())
        );
        assert_eq!((key.endpoint, key.proto), (CLIENT, 6));
        assert_eq!(flow.addr, addr(endpoint_address(family, NODE, 3)));
        assert_eq!((flow.backend, flow.generation, flow.service), (13, 1, 5));
        assert_eq!(flow.isn_be, 0x0102_0304_u32.to_be());
        assert_eq!(u64::from(flow.born_s), flow.last_seen_ns / 1_000_000_000);
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn balanced_uses_every_backend_and_sticky_one_per_source() {
    for family in Family::BOTH {
        let mut stage = Stage::default();
        stage.service(Policy::Balanced, 5, &[13, 14]);
        stage.service(Policy::Sticky, 5, &[13, 14]);
        let backends = |stage: &mut Stage, policy: Policy| -> BTreeSet<u32> {
            (1000..1064)
                .map(|port| {
                    let to = (vip_address(family, policy, 5), PORT);
                    stage
                        .deliver(CLIENT, &Packet::udp(client(family, port), to, b"x"))
                        .0
                })
                .collect()
        };
        assert_eq!(
            backends(&mut stage, Policy::Balanced),
            BTreeSet::from([3, 4])
        );
        assert_eq!(backends(&mut stage, Policy::Sticky).len(), 1);
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_backend_without_an_address_of_the_family_is_passed_over() {
    let mut stage = Stage::default();
    stage.service(Policy::Balanced, 5, &[13, 14]);
    let only6 = Backend {
        addr4: addr("::".parse().expect("an address")),
        flags: BACKEND_LIVE,
        ..Stage::local_backend(3)
    };
    stage.node.backend(13, &only6);
    for port in 1000..1032 {
        let datagram = Packet::udp(client(Family::V4, port), vip(Family::V4, 5), b"x");
        let outcome = stage.send(CLIENT, &datagram);
        assert_eq!((outcome.action, receiver(&outcome.bytes)), (REDIRECTED, 4));
    }
}
