//! Endpoints are found by their place, and by hash where the place is empty or another's: never a wrong one.

use std::net::{IpAddr, Ipv6Addr};

use ebpf_common::{
    addr::{NODE_ENDPOINT, Policy},
    layout::{DIRECT_PLACES, Endpoint},
    reason::Reason,
};
use weft_tests::program::{
    DROPPED, Known, endpoint,
    packet::{ACK, Packet, SYN},
    stage::{
        CLIENT, Family, NODE, PORT, REMOTE_NODE, Stage, TARGET, endpoint_address, vip_address,
    },
};

fn client(family: Family) -> (IpAddr, u16) {
    (endpoint_address(family, NODE, CLIENT), 40_000)
}

fn vip(family: Family, service: u16) -> (IpAddr, u16) {
    (vip_address(family, Policy::Balanced, service), PORT)
}

/// Opens a connection to a service of one local backend; panics where a packet goes anywhere but to its receiver.
fn talk(stage: &mut Stage, family: Family, service: u16, backend: &Endpoint, address: IpAddr) {
    let (client, vip) = (client(family), vip(family, service));
    let (receiver, _) = stage.deliver(CLIENT, &Packet::tcp(client, vip, SYN, 7, 0));
    assert_eq!(receiver, backend.number, "{family:?}");
    let answer = Packet::tcp((address, TARGET), client, SYN | ACK, 9, 8);
    let outcome = stage.node.from_pod(backend, &answer.frame());
    let delivered = Packet::parse(&outcome.bytes[14..]).expect("a right packet");
    assert_eq!((delivered.src, delivered.dst), (vip.0, client.0));
    assert_eq!(weft_tests::program::stage::receiver(&outcome.bytes), CLIENT);
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn an_endpoint_is_found_by_its_place_alone_and_by_hash_alone() {
    for known in [Known::Both, Known::ByHash, Known::ByPlace] {
        let mut stage = Stage::default();
        stage.node.know(known);
        for number in [NODE_ENDPOINT, CLIENT, 3] {
            stage.node.attach(&Stage::endpoint(number));
        }
        stage.service(Policy::Balanced, 5, &[13]);
        for family in Family::BOTH {
            let address = endpoint_address(family, NODE, 3);
            talk(&mut stage, family, 5, &Stage::endpoint(3), address);
        }
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn of_two_endpoints_of_one_place_each_gets_its_own_packets() {
    let half = DIRECT_PLACES / 2;
    // IPv4 blocks are of 32 addresses.
    let twin = |family, number| match family {
        Family::V4 => endpoint_address(family, NODE + half / 32, number),
        Family::V6 => endpoint_address(family, NODE, half + number),
    };
    let second = endpoint(half + 3, twin(Family::V4, 3), twin(Family::V6, 3));
    let first = Stage::endpoint(3);
    assert_eq!(first.addr4.direct(), second.addr4.direct());
    assert_eq!(first.addr6.direct(), second.addr6.direct());
    for last in [&first, &second] {
        let mut stage = Stage::default();
        let backend = ebpf_common::layout::Backend {
            addr4: second.addr4,
            addr6: second.addr6,
            ..Stage::local_backend(3)
        };
        stage.node.backend(40, &backend);
        stage.node.attach(&first);
        stage.node.attach(&second);
        stage.node.attach(last);
        stage.service(Policy::Balanced, 5, &[13]);
        stage.service(Policy::Balanced, 6, &[40]);
        for family in Family::BOTH {
            let address = endpoint_address(family, NODE, 3);
            talk(&mut stage, family, 5, &first, address);
            talk(&mut stage, family, 6, &second, twin(family, 3));
        }
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn an_empty_place_is_nobodys() {
    let mut stage = Stage::default();
    let sender = (endpoint_address(Family::V6, REMOTE_NODE, 2), TARGET);
    let unspecified = (IpAddr::V6(Ipv6Addr::UNSPECIFIED), 40_000);
    let packet = Packet::tcp(sender, unspecified, ACK, 7, 0);
    assert_eq!(stage.node.from_tunnel(&packet.bytes()).action, DROPPED);
    assert_eq!(stage.node.count(Reason::TunnelDestination), 1);
}
