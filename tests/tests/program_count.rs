//! What the programs count, and for whom.

use std::net::IpAddr;

use ebpf_common::{addr::Policy, layout::Count, reason::Reason};
use weft_tests::program::{
    DROPPED,
    packet::{ACK, PSH, Packet, SYN},
    stage::{
        CLIENT, Family, NODE, PORT, REMOTE_BACKEND, REMOTE_NODE, Stage, endpoint_address,
        vip_address,
    },
};

/// The service under test, and so the counter of its VIP.
const SERVICE: u16 = 5;

fn client(family: Family, port: u16) -> (IpAddr, u16) {
    (endpoint_address(family, NODE, CLIENT), port)
}

fn vip(family: Family, port: u16) -> (IpAddr, u16) {
    (vip_address(family, Policy::Balanced, SERVICE), port)
}

fn header(family: Family) -> u64 {
    match family {
        Family::V4 => 20,
        Family::V6 => 40,
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_flow_is_counted_for_its_vip_and_its_backend_in_both_directions() {
    for family in Family::BOTH {
        let mut stage = Stage::default();
        stage.service(Policy::Balanced, SERVICE, &[13]);
        let syn = Packet::tcp(client(family, 40_000), vip(family, PORT), SYN, 100, 0);
        let (backend, seen) = stage.deliver(CLIENT, &syn);
        assert_eq!(backend, 3);
        let ends = seen.mirrored_ends();
        stage.deliver(3, &Packet::tcp(ends.0, ends.1, SYN | ACK, 9, 101));
        let mut data = Packet::tcp(
            client(family, 40_000),
            vip(family, PORT),
            PSH | ACK,
            101,
            10,
        );
        data.payload = vec![7; 100];
        stage.deliver(CLIENT, &data);
        stage.deliver(
            CLIENT,
            &Packet::udp(client(family, 53), vip(family, PORT), b"?"),
        );

        let tcp = header(family) + 20;
        let want = Count {
            packets: [3, 1],
            bytes: [2 * tcp + 100 + header(family) + 8 + 1, tcp],
            flows: 2,
        };
        assert_eq!(stage.node.counted("VIP_COUNTS", u32::from(SERVICE)), want);
        assert_eq!(stage.node.counted("BACKEND_COUNTS", 13), want);
        let nobody = Count::default();
        assert_eq!(stage.node.counted("VIP_COUNTS", 0), nobody);
        assert_eq!(stage.node.counted("BACKEND_COUNTS", 0), nobody);
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_remote_backends_answer_is_counted_where_it_comes_out_of_the_tunnel() {
    for family in Family::BOTH {
        let mut stage = Stage::default();
        stage.service(Policy::Balanced, SERVICE, &[REMOTE_BACKEND]);
        let ask = Packet::udp(client(family, 40_000), vip(family, PORT), b"question");
        let (_, seen) = stage.deliver(CLIENT, &ask);
        assert_eq!(seen.dst, endpoint_address(family, REMOTE_NODE, 2));
        let ends = seen.mirrored_ends();
        let answer = Packet::udp(ends.0, ends.1, b"four");
        stage.node.from_tunnel(&answer.bytes());
        // What is not of a flow passes, and is nobody's.
        let probe = Packet::udp(ends.0, client(family, 9), b"probe");
        stage.node.from_tunnel(&probe.bytes());
        let want = Count {
            packets: [1, 1],
            bytes: [header(family) + 16, header(family) + 12],
            flows: 1,
        };
        assert_eq!(stage.node.counted("BACKEND_COUNTS", REMOTE_BACKEND), want);
        assert_eq!(stage.node.counted("VIP_COUNTS", u32::from(SERVICE)), want);
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_refusal_is_counted_for_the_vip_that_refuses_and_for_no_other() {
    for family in Family::BOTH {
        let mut stage = Stage::default();
        stage.service(Policy::Balanced, SERVICE, &[]);
        stage.service(Policy::Closest, 6, &[13]);
        let syn = |to| Packet::tcp(client(family, 40_000), to, SYN, 100, 0);
        let closest = vip_address(family, Policy::Closest, 6);
        stage.deliver(CLIENT, &syn((closest, PORT)));
        // Given up before its addresses are read: the packet before it must not be blamed.
        let multicast: IpAddr = match family {
            Family::V4 => [224, 0, 0, 1].into(),
            Family::V6 => "ff02::1".parse().expect("an address"),
        };
        let outcome = stage.send(CLIENT, &syn((multicast, PORT)));
        assert_eq!(outcome.action, DROPPED);
        stage.send(CLIENT, &syn(vip(family, PORT)));
        stage.send(CLIENT, &syn(vip(family, PORT)));
        stage.send(CLIENT, &syn(vip(family, 81)));
        let unlinked = vip_address(family, Policy::Balanced, 7);
        stage.send(CLIENT, &syn((unlinked, PORT)));
        let refused = [
            (u32::from(SERVICE), Reason::UndeclaredPort as u32, 1),
            (u32::from(SERVICE), Reason::NoBackend as u32, 2),
        ];
        assert_eq!(stage.node.refused(), refused);
        assert_eq!(stage.node.count(Reason::NotLinked), 1);
        assert_eq!(
            stage.node.counted("VIP_COUNTS", u32::from(SERVICE)).flows,
            0
        );
    }
}
