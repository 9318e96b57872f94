//! The corners of a flow's life: what comes twice, too late, from two sides at once, or with half of it lost.

use std::collections::BTreeSet;

use ebpf_common::{
    addr::{NODE_ENDPOINT, Policy},
    layout::{
        ACCOUNT_DATAGRAM, BACKEND_DRAINING, Backend, FLOW_ESTABLISHED, FLOW_REVERSE, VIP_FOLLOW,
    },
    reason::Reason,
};
use weft_tests::program::{
    packet::{ACK, FIN, PSH, Packet, RST, SYN},
    stage::{CLIENT, Family, NODE, REMOTE_BACKEND, REMOTE_NODE, Stage, endpoint_address},
    talk::{backend, client, close, connect, forward, point_to, resets, reverse, segment, vip},
};

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_repeated_syn_is_the_same_flow_before_and_after_the_answer() {
    for family in Family::BOTH {
        let mut stage = Stage::default();
        stage.service(Policy::Balanced, 5, &[13, 14]);
        let syn = segment(family, 1, SYN, 100);
        let first = stage.deliver(CLIENT, &syn);
        for _ in 0..3 {
            assert_eq!(stage.deliver(CLIENT, &syn), first);
        }
        let (number, seen) = first;
        let accept = Packet::tcp(
            (seen.dst, seen.dport),
            (seen.src, seen.sport),
            SYN | ACK,
            9,
            101,
        );
        stage.deliver(number, &accept);
        assert_eq!(stage.deliver(CLIENT, &syn).0, number, "the answer was lost");
        stage.deliver(number, &accept);
        stage.deliver(CLIENT, &segment(family, 1, ACK, 101));
        assert_eq!(stage.node.flows("FLOWS").len(), 2);
        assert_eq!(stage.node.account(CLIENT).opened[0], 1);
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn two_pods_with_equal_ports_are_told_apart() {
    for family in Family::BOTH {
        let mut stage = Stage::default();
        point_to(&mut stage, 3);
        let other = (endpoint_address(family, NODE, 4), 40_000);
        for (number, from) in [(CLIENT, client(family, 40_000)), (4, other)] {
            let sent = Packet::tcp(from, vip(family, 5), SYN, number, 0);
            let (to, seen) = stage.deliver(number, &sent);
            assert_eq!((to, seen.sport), (3, 40_000), "nobody owns its tuple");
            let answer = Packet::tcp((seen.dst, seen.dport), from, SYN | ACK, 9, number + 1);
            let heard = Packet::tcp(vip(family, 5), from, SYN | ACK, 9, number + 1);
            assert_eq!(stage.deliver(3, &answer), (number, heard));
        }
        assert_eq!(stage.node.flows("FLOWS").len(), 4);
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_pod_that_calls_itself_and_the_host_that_calls_it_are_told_apart_with_equal_ports() {
    for family in Family::BOTH {
        let node = (endpoint_address(family, NODE, NODE_ENDPOINT), 40_000);
        let own = (endpoint_address(family, NODE, 3), 40_000);
        for order in [
            [(3, own), (NODE_ENDPOINT, node)],
            [(NODE_ENDPOINT, node), (3, own)],
        ] {
            let mut stage = Stage::default();
            point_to(&mut stage, 3);
            let seen = order.map(|(number, from)| {
                let to_vip = |flags| Packet::tcp(from, vip(family, 5), flags, number, 1);
                let datagram = Packet::udp(from, vip(family, 5), b"?");
                [to_vip(SYN), datagram].map(|sent| {
                    let (to, seen) = stage.deliver(number, &sent);
                    assert_eq!(
                        (to, seen.src),
                        (3, node.0),
                        "both come from the node endpoint"
                    );
                    (number, sent, seen)
                })
            });
            for (number, sent, seen) in seen.as_flattened() {
                let heard = stage.deliver(3, &seen.mirrored());
                assert_eq!(heard, (*number, sent.mirrored()));
            }
        }
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_client_that_lost_its_connection_gets_a_new_one_on_the_same_port() {
    for family in Family::BOTH {
        let mut stage = Stage::default();
        point_to(&mut stage, 3);
        connect(&mut stage, family, 1, 100);
        // It restarted, and knows nothing of the connection: half-open (RFC 9293, 3.5.1).
        connect(&mut stage, family, 1, 7000);
        let (_, flow) = forward(&mut stage, "FLOWS", 1).expect("a flow");
        assert_eq!(flow.isn_be, 7000_u32.to_be());
        assert!(flow.flags & FLOW_ESTABLISHED != 0);
        assert_eq!(stage.node.flows("FLOWS").len(), 2);
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_backend_that_lost_its_connection_resets_it_for_the_client() {
    for family in Family::BOTH {
        let mut stage = Stage::default();
        point_to(&mut stage, 3);
        connect(&mut stage, family, 1, 100);
        let reset = Packet::tcp(backend(family, 3), client(family, 1), RST, 10, 0);
        let heard = Packet::tcp(vip(family, 5), client(family, 1), RST, 10, 0);
        assert_eq!(stage.deliver(3, &reset), (CLIENT, heard));
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn both_sides_that_end_at_once_end_the_connection_once() {
    for family in Family::BOTH {
        let mut stage = Stage::default();
        point_to(&mut stage, 3);
        connect(&mut stage, family, 1, 100);
        let fin = Packet::tcp(backend(family, 3), client(family, 1), FIN | ACK, 10, 101);
        stage.deliver(3, &fin);
        stage.deliver(CLIENT, &segment(family, 1, FIN | ACK, 101));
        // The last acknowledgements, and a repeated FIN, cross.
        stage.deliver(
            3,
            &Packet::tcp(backend(family, 3), client(family, 1), ACK, 11, 102),
        );
        stage.deliver(CLIENT, &segment(family, 1, ACK, 102));
        stage.deliver(3, &fin);
        assert_eq!(stage.node.account(CLIENT).closed[0], 1);
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_connection_that_was_idle_for_hours_goes_on() {
    for family in Family::BOTH {
        let mut stage = Stage::default();
        point_to(&mut stage, 3);
        connect(&mut stage, family, 1, 100);
        for (key, mut flow) in stage.node.flows("FLOWS") {
            flow.last_seen_ns = 1;
            stage.node.put_flow("FLOWS", &key, &flow);
        }
        assert_eq!(
            stage.deliver(CLIENT, &segment(family, 1, ACK | PSH, 101)).0,
            3
        );
        let said = Packet::tcp(backend(family, 3), client(family, 1), ACK | PSH, 10, 102);
        assert_eq!(stage.deliver(3, &said).0, CLIENT);
        for (_, flow) in stage.node.flows("FLOWS") {
            assert!(flow.last_seen_ns > 1, "both halves are in use");
        }
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_connection_whose_forward_half_is_lost_is_reset_and_can_be_made_again() {
    for family in Family::BOTH {
        let mut stage = Stage::default();
        point_to(&mut stage, 3);
        connect(&mut stage, family, 1, 100);
        let (key, _) = forward(&mut stage, "FLOWS", 1).expect("a flow");
        stage.node.drop_flow("FLOWS", &key);
        assert!(resets(&mut stage, &segment(family, 1, ACK | PSH, 101)));
        assert_eq!(stage.node.count(Reason::NoFlow), 1);
        connect(&mut stage, family, 1, 5000);
        let (_, flow) = forward(&mut stage, "FLOWS", 1).expect("a flow");
        assert_eq!(
            flow.client_port_be,
            1_u16.to_be(),
            "what was left is its own"
        );
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_handshake_whose_reverse_half_is_lost_is_reset() {
    for family in Family::BOTH {
        let mut stage = Stage::default();
        point_to(&mut stage, 3);
        stage.deliver(CLIENT, &segment(family, 1, SYN, 100));
        let (key, _) = reverse(&mut stage, "FLOWS", 1).expect("a flow");
        stage.node.drop_flow("FLOWS", &key);
        assert!(resets(&mut stage, &segment(family, 1, ACK, 101)));
        assert_eq!(stage.node.flows("FLOWS"), []);
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_datagram_flow_whose_reverse_half_is_lost_gets_it_back() {
    for family in Family::BOTH {
        let mut stage = Stage::default();
        point_to(&mut stage, 3);
        let question = Packet::udp(client(family, 1), vip(family, 5), b"?");
        let (_, seen) = stage.deliver(CLIENT, &question);
        let (key, _) = reverse(&mut stage, "FLOWS_LRU", 1).expect("a flow");
        stage.node.drop_flow("FLOWS_LRU", &key);
        // It is looked after once a second: the last time is long ago.
        let (key, mut flow) = forward(&mut stage, "FLOWS_LRU", 1).expect("a flow");
        flow.last_seen_ns = 1;
        stage.node.put_flow("FLOWS_LRU", &key, &flow);
        stage.deliver(CLIENT, &question);
        assert_eq!(
            stage.deliver(3, &seen.mirrored()),
            (CLIENT, question.mirrored())
        );
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn one_socket_talks_to_many_services_of_one_backend() {
    for family in Family::BOTH {
        let mut stage = Stage::default();
        for service in 5..15 {
            stage.service(Policy::Balanced, service, &[13]);
        }
        let from = client(family, 40_000);
        let mut ports = BTreeSet::new();
        let mut answers = Vec::new();
        for service in 5..15 {
            let question = Packet::udp(from, vip(family, service), &[service as u8]);
            let (_, seen) = stage.deliver(CLIENT, &question);
            assert!(ports.insert(seen.sport), "{} is used twice", seen.sport);
            answers.push((seen.mirrored(), question.mirrored()));
        }
        for (answer, heard) in answers {
            assert_eq!(stage.deliver(3, &answer), (CLIENT, heard));
        }
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_port_is_free_for_another_vip_once_its_connection_is_over() {
    for family in Family::BOTH {
        let mut stage = Stage::default();
        point_to(&mut stage, 3);
        stage.service(Policy::Balanced, 6, &[13]);
        connect(&mut stage, family, 1, 100);
        let other = Packet::tcp(client(family, 1), vip(family, 6), SYN, 300, 0);
        assert_ne!(stage.deliver(CLIENT, &other).1.sport, 1, "it is in use");
        stage.deliver(
            CLIENT,
            &Packet::tcp(client(family, 1), vip(family, 6), RST, 301, 0),
        );
        close(&mut stage, family, 1, 3, 101);
        let again = Packet::tcp(client(family, 1), vip(family, 6), SYN, 400, 0);
        assert_eq!(stage.deliver(CLIENT, &again).1.sport, 1);
        // What is left of the first takes nothing with it that is another's by now.
        stage.deliver(CLIENT, &segment(family, 1, SYN, 9000));
        let accept = Packet::tcp(backend(family, 3), client(family, 1), SYN | ACK, 9, 401);
        let heard = Packet::tcp(vip(family, 6), client(family, 1), SYN | ACK, 9, 401);
        assert_eq!(stage.deliver(3, &accept), (CLIENT, heard));
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_flow_that_may_follow_moves_at_once_when_its_backend_drains_or_dies() {
    for family in Family::BOTH {
        for state in [
            Backend {
                flags: BACKEND_DRAINING,
                ..Stage::local_backend(3)
            },
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
            stage.service_with(Policy::Balanced, 5, &[13], VIP_FOLLOW);
            let question = Packet::udp(client(family, 1), vip(family, 5), b"?");
            let (_, old) = stage.deliver(CLIENT, &question);
            stage.service_with(Policy::Balanced, 5, &[14], VIP_FOLLOW);
            assert_eq!(
                stage.deliver(CLIENT, &question).0,
                3,
                "it lives and is kept"
            );
            stage.node.backend(13, &state);
            let (number, seen) = stage.deliver(CLIENT, &question);
            assert_eq!(number, 4);
            assert_eq!(
                stage.deliver(4, &seen.mirrored()),
                (CLIENT, question.mirrored())
            );
            assert_eq!(
                stage.deliver(3, &old.mirrored()),
                (CLIENT, question.mirrored()),
                "what the old one still had to say arrives"
            );
            assert_eq!(stage.node.account(CLIENT).opened[ACCOUNT_DATAGRAM], 1);
        }
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_flow_that_may_follow_stays_where_there_is_no_other_place() {
    for family in Family::BOTH {
        let mut stage = Stage::default();
        stage.service_with(Policy::Balanced, 5, &[13], VIP_FOLLOW);
        let question = Packet::udp(client(family, 1), vip(family, 5), b"?");
        stage.deliver(CLIENT, &question);
        let draining = Backend {
            flags: BACKEND_DRAINING,
            ..Stage::local_backend(3)
        };
        stage.node.backend(13, &draining);
        assert_eq!(stage.deliver(CLIENT, &question).0, 3);
        assert_eq!(stage.node.count(Reason::NoBackend), 0);
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn tcp_never_follows() {
    for family in Family::BOTH {
        let mut stage = Stage::default();
        stage.service_with(Policy::Balanced, 5, &[13], VIP_FOLLOW);
        connect(&mut stage, family, 1, 100);
        stage.service_with(Policy::Balanced, 5, &[14], VIP_FOLLOW);
        let draining = Backend {
            flags: BACKEND_DRAINING,
            ..Stage::local_backend(3)
        };
        stage.node.backend(13, &draining);
        assert_eq!(stage.deliver(CLIENT, &segment(family, 1, ACK, 101)).0, 3);
        stage.node.backend(13, &Backend::default());
        assert!(resets(&mut stage, &segment(family, 1, ACK, 101)));
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_flow_that_follows_crosses_the_tunnel_and_its_old_backends_answers_still_come() {
    for family in Family::BOTH {
        let mut stage = Stage::default();
        stage.service_with(Policy::Balanced, 5, &[REMOTE_BACKEND], VIP_FOLLOW);
        let question = Packet::udp(client(family, 1), vip(family, 5), b"?");
        let (to, old) = stage.deliver(CLIENT, &question);
        assert_eq!(to, 0, "through the tunnel");
        assert_eq!(old.dst, endpoint_address(family, REMOTE_NODE, 2));
        stage.service_with(Policy::Balanced, 5, &[13], VIP_FOLLOW);
        stage.node.backend(REMOTE_BACKEND, &Backend::default());
        assert_eq!(stage.deliver(CLIENT, &question).0, 3);
        let halves = stage.node.flows("FLOWS_LRU");
        let reverse = halves
            .iter()
            .filter(|(key, _)| key.direction == FLOW_REVERSE);
        assert_eq!(reverse.count(), 2, "the old place's and the new one's");
    }
}
