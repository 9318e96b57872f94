//! What a flood may cost, and whom.

use ebpf_common::{
    addr::Policy,
    layout::{
        ACCOUNT_DATAGRAM, ACCOUNT_INBOUND, ACCOUNT_KINDS, ACCOUNT_TCP, FLOW_ESTABLISHED,
        FLOW_FORWARD, Settled,
    },
    reason::Reason,
};
use weft_tests::program::{
    DROPPED, REDIRECTED, Sizes,
    packet::{ACK, Packet, RST, SYN},
    stage::{CLIENT, Family, NODE, REMOTE_NODE, Stage, endpoint_address},
    talk::{client, close, connect, forward, point_to, resets, segment, vip},
};

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_full_table_refuses_new_connections_and_loses_no_old_one() {
    for family in Family::BOTH {
        let mut stage = Stage::new(Sizes {
            flows: 8,
            places: 1,
            ..Sizes::default()
        });
        point_to(&mut stage, 3);
        for port in 1..=4 {
            connect(&mut stage, family, port, 100);
        }
        assert!(resets(&mut stage, &segment(family, 5, SYN, 100)));
        assert_eq!(stage.node.count(Reason::FlowTableFull), 1);
        for port in 1..=4 {
            assert_eq!(stage.deliver(CLIENT, &segment(family, port, ACK, 101)).0, 3);
        }
        // One closes, and there is room again.
        stage.deliver(CLIENT, &segment(family, 1, RST, 101));
        connect(&mut stage, family, 6, 100);
        assert_eq!(stage.node.flows("FLOWS").len(), 8);
        assert_eq!(forward(&mut stage, "FLOWS", 1), None, "it gave way");
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_flood_of_syns_costs_no_established_connection_and_stays_bounded() {
    for family in Family::BOTH {
        let ageing = 16;
        let mut stage = Stage::new(Sizes {
            flows: 64,
            ageing,
            places: 1,
            ..Sizes::default()
        });
        point_to(&mut stage, 3);
        for port in 1..=4 {
            connect(&mut stage, family, port, 100);
        }
        for port in 1000..1500 {
            stage.deliver(CLIENT, &segment(family, port, SYN, 7));
        }
        let flows = stage.node.flows("FLOWS");
        let embryonic = flows
            .iter()
            .filter(|(_, flow)| flow.flags & FLOW_ESTABLISHED == 0);
        assert_eq!(embryonic.count(), 2 * ageing as usize);
        let account = stage.node.account(CLIENT);
        assert_eq!(
            account.opened[ACCOUNT_TCP] - account.closed[ACCOUNT_TCP],
            4 + u64::from(ageing)
        );
        for port in 1..=4 {
            assert_eq!(stage.deliver(CLIENT, &segment(family, port, ACK, 101)).0, 3);
        }
        // The oldest gave way, the youngest may still become a connection.
        assert!(forward(&mut stage, "FLOWS", 1000).is_none());
        assert!(forward(&mut stage, "FLOWS", 1499).is_some());
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn connections_that_are_over_give_way_oldest_first() {
    for family in Family::BOTH {
        let mut stage = Stage::new(Sizes {
            flows: 64,
            ageing: 8,
            places: 1,
            ..Sizes::default()
        });
        point_to(&mut stage, 3);
        for port in 1..=100 {
            connect(&mut stage, family, port, 100);
            close(&mut stage, family, port, 3, 101);
        }
        assert!(stage.node.flows("FLOWS").len() <= 16);
        assert!(forward(&mut stage, "FLOWS", 90).is_none());
        assert!(forward(&mut stage, "FLOWS", 100).is_some());
        let account = stage.node.account(CLIENT);
        assert_eq!(
            (account.opened[ACCOUNT_TCP], account.closed[ACCOUNT_TCP]),
            (100, 100)
        );
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn an_endpoint_has_no_more_connections_than_its_quota_and_harms_nobody_else() {
    for family in Family::BOTH {
        let mut stage = Stage::default();
        point_to(&mut stage, 3);
        stage.limit(CLIENT, 3);
        for port in 1..=3 {
            connect(&mut stage, family, port, 100);
        }
        for port in 4..20 {
            assert!(resets(&mut stage, &segment(family, port, SYN, 100)));
        }
        assert_eq!(stage.node.count(Reason::FlowQuota), 16);
        assert_eq!(stage.node.flows("FLOWS").len(), 6);
        // What it has goes on, and so does its neighbour.
        assert_eq!(stage.deliver(CLIENT, &segment(family, 2, ACK, 101)).0, 3);
        let neighbour = (endpoint_address(family, NODE, 4), 5);
        stage.deliver(4, &Packet::tcp(neighbour, vip(family, 5), SYN, 1, 0));
        // One closes and lingers: it counts no more.
        close(&mut stage, family, 1, 3, 101);
        connect(&mut stage, family, 20, 100);
        assert!(resets(&mut stage, &segment(family, 21, SYN, 100)));
        // User space collects another.
        let mut gone = [0; ACCOUNT_KINDS];
        gone[ACCOUNT_TCP] = 1;
        stage.node.settle(CLIENT, &Settled { gone });
        connect(&mut stage, family, 21, 100);
        assert!(resets(&mut stage, &segment(family, 22, SYN, 100)));
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_port_spray_of_datagrams_ends_at_the_quota_and_evicts_nobody() {
    for family in Family::BOTH {
        let mut stage = Stage::new(Sizes {
            recent: 512,
            ..Sizes::default()
        });
        point_to(&mut stage, 3);
        stage.limit(CLIENT, 40);
        let neighbour = (endpoint_address(family, NODE, 4), 5);
        let idle = Packet::udp(neighbour, vip(family, 5), b"x");
        stage.deliver(4, &idle);
        let mut refused = 0;
        for port in 1..2000 {
            let outcome = stage.send(
                CLIENT,
                &Packet::udp(client(family, port), vip(family, 5), b"x"),
            );
            assert_eq!(outcome.action, REDIRECTED, "delivered, or answered by ICMP");
            refused += u64::from(port > 20);
        }
        assert_eq!(stage.node.count(Reason::FlowQuota), refused);
        let account = stage.node.account(CLIENT);
        assert_eq!(account.opened[ACCOUNT_DATAGRAM], 20);
        let flows = stage.node.flows("FLOWS_LRU");
        assert!(
            flows
                .iter()
                .any(|(key, _)| (key.endpoint, key.direction) == (4, FLOW_FORWARD)),
            "the neighbour's idle flow is still there"
        );
        // What it has is served on.
        let first = Packet::udp(client(family, 1), vip(family, 5), b"x");
        assert_eq!(stage.deliver(CLIENT, &first).0, 3);
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn datagrams_from_many_strangers_use_up_the_receivers_notes_and_nothing_else() {
    for family in Family::BOTH {
        let mut stage = Stage::default();
        stage.service(Policy::Balanced, 5, &[13]);
        stage.limit(CLIENT, 20);
        let stranger = |port| (endpoint_address(family, REMOTE_NODE, 2), port);
        let to = client(family, 53);
        for port in 1..=30 {
            let packet = Packet::udp(stranger(port), to, b"x");
            let want = if port <= 10 { REDIRECTED } else { DROPPED };
            assert_eq!(
                stage.node.from_tunnel(&packet.bytes()).action,
                want,
                "{port}"
            );
        }
        assert_eq!(stage.node.count(Reason::FlowQuota), 20);
        assert_eq!(stage.node.account(CLIENT).opened[ACCOUNT_INBOUND], 10);
        // Its own flows are another account.
        let own = Packet::udp(client(family, 1), vip(family, 5), b"x");
        assert_eq!(stage.deliver(CLIENT, &own).0, 3);
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn an_endpoint_without_a_quota_is_counted_and_not_limited() {
    let mut stage = Stage::default();
    point_to(&mut stage, 3);
    for port in 1..=100 {
        stage.deliver(CLIENT, &segment(Family::V4, port, SYN, 1));
    }
    assert_eq!(stage.node.account(CLIENT).opened[ACCOUNT_TCP], 100);
}
