//! ICMP errors about translated packets: each side sees the packet that it sent.

use std::net::IpAddr;

use ebpf_common::addr::{NODE_ENDPOINT, Policy};
use weft_tests::program::{
    packet::{Packet, SYN, Transport},
    stage::{
        CLIENT, Family, NODE, PORT, REMOTE_BACKEND, REMOTE_NODE, Stage, TARGET, endpoint_address,
        vip_address,
    },
};

/// An error from `src` to whom sent `quoted`, with `more` bytes of it.
fn error(src: IpAddr, quoted: &Packet, more: usize) -> Packet {
    let (kind, header) = match src {
        IpAddr::V4(_) => (Transport::Icmp(3, 3), 20),
        IpAddr::V6(_) => (Transport::Icmp(1, 4), 40),
    };
    let mut payload = vec![0; 4];
    payload.extend(&quoted.bytes()[..header + 8 + more]);
    Packet {
        transport: kind,
        payload,
        sport: 0,
        dport: 0,
        ..Packet::udp((src, 0), (quoted.src, 0), b"")
    }
}

/// An error without the quoted transport checksum, which translation leaves alone.
fn without_quoted_checksum(error: &Packet) -> Packet {
    let mut error = error.clone();
    let header = if error.src.is_ipv4() { 20 } else { 40 };
    let at = 4 + header + 6;
    error.payload[at..at + 2].fill(0);
    error
}

fn ends(family: Family) -> ((IpAddr, u16), (IpAddr, u16)) {
    (
        (endpoint_address(family, NODE, CLIENT), 40_000),
        (vip_address(family, Policy::Balanced, 5), PORT),
    )
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_client_learns_that_its_backend_does_not_listen() {
    for family in Family::BOTH {
        let mut stage = Stage::default();
        stage.service(Policy::Balanced, 5, &[13]);
        let (client, vip) = ends(family);
        let sent = Packet::udp(client, vip, b"anyone?");
        let (_, seen) = stage.deliver(CLIENT, &sent);
        for more in [0, 7] {
            let (to, heard) = stage.deliver(3, &error(seen.dst, &seen, more));
            assert_eq!(to, CLIENT);
            assert_eq!(
                without_quoted_checksum(&heard),
                without_quoted_checksum(&error(vip.0, &sent, more))
            );
        }
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_client_learns_it_through_the_tunnel_too() {
    for family in Family::BOTH {
        let mut stage = Stage::default();
        stage.service(Policy::Balanced, 5, &[REMOTE_BACKEND]);
        let (client, vip) = ends(family);
        let sent = Packet::tcp(client, vip, SYN, 1, 0);
        let (_, seen) = stage.deliver(CLIENT, &sent);
        // From the backend itself, and from its node, which keeps its own address.
        let node = endpoint_address(family, REMOTE_NODE, NODE_ENDPOINT);
        for (from, appears) in [(seen.dst, vip.0), (node, node)] {
            let (to, heard) = stage.arrive(&error(from, &seen, 0));
            assert_eq!((to, heard), (CLIENT, error(appears, &sent, 0)));
        }
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn an_echo_that_finds_nobody_is_told_to_its_sender() {
    for family in Family::BOTH {
        let mut stage = Stage::default();
        stage.service(Policy::Balanced, 5, &[13]);
        let (client, vip) = ends(family);
        let sent = Packet::echo(client.0, vip.0, 77);
        let (_, seen) = stage.deliver(CLIENT, &sent);
        let (to, heard) = stage.deliver(3, &error(seen.dst, &seen, 0));
        assert_eq!(to, CLIENT);
        match family {
            Family::V4 => assert_eq!(heard, error(vip.0, &sent, 0)),
            // The checksum of ICMPv6 covers the addresses, and stands in what is quoted.
            Family::V6 => assert_eq!(heard.payload[..46], error(vip.0, &sent, 0).payload[..46]),
        }
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_backend_learns_that_its_client_has_stopped_listening() {
    for family in Family::BOTH {
        let mut stage = Stage::default();
        stage.service(Policy::Balanced, 5, &[13]);
        let (client, vip) = ends(family);
        let (_, seen) = stage.deliver(CLIENT, &Packet::udp(client, vip, b"question"));
        let answer = Packet::udp(seen.mirrored_ends().0, seen.mirrored_ends().1, b"answer");
        let (_, heard) = stage.deliver(3, &answer);
        let (to, told) = stage.deliver(CLIENT, &error(client.0, &heard, 0));
        assert_eq!(to, 3);
        assert_eq!(seen.dport, TARGET);
        assert_eq!(
            without_quoted_checksum(&told),
            without_quoted_checksum(&error(client.0, &answer, 0))
        );
    }
}
