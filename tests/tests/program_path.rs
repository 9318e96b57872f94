//! How far a packet goes and how large it may be: hops, path MTU, segment sizes; and the checksums of it all.

use std::{net::IpAddr, time::Instant};

use ebpf_common::{
    addr::{NODE_ENDPOINT, Policy},
    layout::{PATH_FLOOR, PATH_PORT},
    reason::Reason,
};
use weft_tests::program::{
    DROPPED, Outcome, REDIRECTED,
    odd::{fragments, has_right_header},
    packet::{ACK, Packet, SYN, Transport, framed},
    stage::{
        CLIENT, Family, NODE, PORT, REMOTE_BACKEND, REMOTE_NODE, Stage, TARGET, TUNNEL_MTU,
        endpoint_address, vip_address,
    },
};

fn client(family: Family) -> (IpAddr, u16) {
    (endpoint_address(family, NODE, CLIENT), 40_000)
}

fn vip(family: Family) -> (IpAddr, u16) {
    (vip_address(family, Policy::Balanced, 5), PORT)
}

fn remote(family: Family) -> (IpAddr, u16) {
    (endpoint_address(family, REMOTE_NODE, 2), TARGET)
}

fn node(family: Family) -> IpAddr {
    endpoint_address(family, NODE, NODE_ENDPOINT)
}

fn served(backend: u32) -> Stage {
    let mut stage = Stage::default();
    stage.service(Policy::Balanced, 5, &[backend]);
    stage
}

/// One packet of each protocol to the VIP.
fn questions(family: Family) -> [Packet; 3] {
    [
        Packet::tcp(client(family), vip(family), SYN, 7, 0),
        Packet::udp(client(family), vip(family), b"question"),
        Packet::echo(client(family).0, vip(family).0, 77),
    ]
}

fn expired(family: Family) -> Transport {
    match family {
        Family::V4 => Transport::Icmp(11, 0),
        Family::V6 => Transport::Icmp(3, 0),
    }
}

fn headers(family: Family, l4: usize) -> usize {
    l4 + if family == Family::V4 { 20 } else { 40 }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn the_last_hop_is_answered_by_the_node_endpoint() {
    for family in Family::BOTH {
        let mut stage = served(13);
        for sent in questions(family) {
            for ttl in [1, 0] {
                let sent = Packet {
                    ttl,
                    ..sent.clone()
                };
                let outcome = stage.send(CLIENT, &sent);
                assert_eq!(outcome.action, REDIRECTED);
                let error = Packet::parse(&outcome.bytes[14..]).expect("a right packet");
                assert_eq!(error.transport, expired(family));
                assert_eq!((error.src, error.dst), (node(family), sent.src));
                let quote = &error.payload[4..];
                assert_eq!(quote, &sent.bytes()[..quote.len()], "as it was sent");
            }
        }
        assert_eq!(stage.node.count(Reason::HopLimit), 6);
        assert_eq!(stage.node.flows("FLOWS_LRU"), [], "it opened nothing");
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn the_last_hop_out_of_the_tunnel_is_answered_through_it() {
    for family in Family::BOTH {
        let mut stage = Stage::default();
        let from = (endpoint_address(family, REMOTE_NODE, 9), 40_000);
        let to = (endpoint_address(family, NODE, 3), TARGET);
        for sent in [
            Packet::tcp(from, to, SYN, 7, 0),
            Packet::udp(from, to, b"question"),
            Packet::echo(from.0, to.0, 77),
        ] {
            let sent = Packet { ttl: 1, ..sent };
            let outcome = stage.node.from_tunnel(&sent.bytes());
            assert_eq!(outcome.action, REDIRECTED);
            let error = Packet::parse(&outcome.bytes).expect("a right packet without Ethernet");
            assert_eq!(error.transport, expired(family));
            assert_eq!((error.src, error.dst), (node(family), sent.src));
            let quote = &error.payload[4..];
            assert_eq!(quote, &sent.bytes()[..quote.len()], "as it came");
        }
        // Never about an error, nor to somebody who is no peer's endpoint.
        let error = Packet {
            transport: Transport::Icmp(3, 3),
            payload: [&[0; 4], &Packet::udp(to, from, b"x").bytes()[..28]].concat(),
            sport: 0,
            dport: 0,
            ttl: 1,
            ..Packet::udp(from, to, b"")
        };
        if family == Family::V4 {
            assert_eq!(stage.node.from_tunnel(&error.bytes()).action, DROPPED);
        }
        let forged = Packet {
            ttl: 1,
            ..Packet::udp(vip(family), to, b"x")
        };
        assert_eq!(stage.node.from_tunnel(&forged.bytes()).action, DROPPED);
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_remote_nodes_last_hop_is_told_in_the_clients_words() {
    for family in Family::BOTH {
        let mut stage = served(REMOTE_BACKEND);
        for sent in questions(family) {
            let (_, seen) = stage.deliver(CLIENT, &sent);
            let far = endpoint_address(family, REMOTE_NODE, NODE_ENDPOINT);
            let error = Packet {
                transport: expired(family),
                payload: [&[0; 4], &seen.bytes()[..headers(family, 8)]].concat(),
                sport: 0,
                dport: 0,
                ..Packet::udp((far, 0), (sent.src, 0), b"")
            };
            let (to, heard) = stage.arrive(&error);
            assert_eq!((to, heard.src), (CLIENT, far));
            let ip = headers(family, 0);
            assert_eq!(heard.payload[4..4 + ip + 2], sent.bytes()[..ip + 2]);
        }
    }
}

/// The answer to a packet that is too big, and the size in it.
fn size_told(outcome: &Outcome, family: Family) -> u32 {
    assert_eq!(outcome.action, REDIRECTED);
    let error = Packet::parse(&outcome.bytes[14..]).expect("a right packet");
    let kind = match family {
        Family::V4 => Transport::Icmp(3, 4),
        Family::V6 => Transport::Icmp(2, 0),
    };
    assert_eq!(error.transport, kind);
    u32::from_be_bytes(*error.payload.first_chunk().expect("four bytes"))
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_packet_is_as_large_as_its_peers_path_carries_and_another_peers_does_not_count() {
    const PATH: u32 = 1340;
    for family in Family::BOTH {
        let mut stage = served(REMOTE_BACKEND);
        let full = vec![1; PATH as usize - headers(family, 8) + 1];
        let large = Packet::udp(client(family), vip(family), &full);
        stage
            .node
            .peer(endpoint_address(family, REMOTE_NODE + 1, 2), 8, 1300);
        stage.deliver(CLIENT, &large);
        stage
            .node
            .peer(endpoint_address(family, REMOTE_NODE, 1), REMOTE_NODE, PATH);
        assert_eq!(size_told(&stage.send(CLIENT, &large), family), PATH);
        assert_eq!(stage.node.count(Reason::TooBig), 1);
        let fits = Packet::udp(client(family), vip(family), &full[1..]);
        stage.deliver(CLIENT, &fits);
        // A backend's answer to a remote client takes the same path.
        let question = Packet::udp(
            (endpoint_address(family, REMOTE_NODE, 9), 6000),
            (endpoint_address(family, NODE, 3), TARGET),
            b"how large?",
        );
        stage.arrive(&question);
        let answer = Packet {
            payload: full.clone(),
            ..question.mirrored()
        };
        assert_eq!(size_told(&stage.send(3, &answer), family), PATH);
        stage.deliver(
            3,
            &Packet {
                payload: full[1..].to_vec(),
                ..answer
            },
        );
        // What a map says that cannot be is not believed: nobody is told less than every path carries.
        stage
            .node
            .peer(endpoint_address(family, REMOTE_NODE, 1), REMOTE_NODE, 68);
        stage.deliver(CLIENT, &large);
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn only_the_first_of_the_fragments_that_are_too_big_is_answered() {
    for family in Family::BOTH {
        let mut stage = served(REMOTE_BACKEND);
        let sent = Packet::udp(client(family), vip(family), &[1; 4000]).bytes();
        let pieces = fragments(&sent, 1368, 5);
        stage.node.peer(
            endpoint_address(family, REMOTE_NODE, 1),
            REMOTE_NODE,
            PATH_FLOOR,
        );
        let mut send = |piece: &[u8]| {
            stage
                .node
                .from_pod(&Stage::endpoint(CLIENT), &framed(piece))
        };
        assert_eq!(size_told(&send(&pieces[0]), family), PATH_FLOOR);
        assert_eq!(send(&pieces[1]).action, DROPPED);
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn the_node_endpoints_probes_may_be_larger_than_what_is_known_of_the_path() {
    let mut stage = Stage::default();
    let there = endpoint_address(Family::V6, REMOTE_NODE, NODE_ENDPOINT);
    stage.node.peer(there, REMOTE_NODE, PATH_FLOOR);
    let probe = |from: IpAddr, port, size: u32| {
        Packet::udp(
            (from, PATH_PORT),
            (there, port),
            &vec![0; size as usize - headers(Family::V6, 8)],
        )
    };
    let own = node(Family::V6);
    let full = probe(own, PATH_PORT, TUNNEL_MTU);
    assert_eq!(stage.deliver(NODE_ENDPOINT, &full), (0, full.clone()));
    for (packet, told) in [
        (probe(own, PATH_PORT, TUNNEL_MTU + 1), PATH_FLOOR),
        (probe(own, PATH_PORT + 1, TUNNEL_MTU), PATH_FLOOR),
    ] {
        let outcome = stage.send(NODE_ENDPOINT, &packet);
        assert_eq!(size_told(&outcome, Family::V6), told);
    }
}

/// A TCP segment with options, whole with its checksum.
fn with_tcp_options(packet: &Packet, options: &[u8]) -> Vec<u8> {
    let ip = if packet.src.is_ipv4() { 20 } else { 40 };
    let carrier = Packet {
        payload: options.to_vec(),
        ..packet.clone()
    };
    let mut bytes = carrier.bytes();
    let old = bytes[ip + 12];
    let new = u8::try_from((20 + options.len()) / 4).expect("at most 60 bytes") << 4;
    bytes[ip + 12] = new;
    // RFC 1624, equation 3, for the word whose high byte changed.
    let check = u16::from_be_bytes([bytes[ip + 16], bytes[ip + 17]]);
    let mut sum =
        u32::from(!check) + u32::from(!(u16::from(old) << 8)) + u32::from(u16::from(new) << 8);
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    let check = !u16::try_from(sum).expect("folded");
    bytes[ip + 16..ip + 18].copy_from_slice(&check.to_be_bytes());
    bytes
}

/// The options of a segment, whose checksum is right.
fn options_of(packet: &[u8]) -> Vec<u8> {
    Packet::parse(packet).expect("a right packet");
    let ip = if packet[0] >> 4 == 4 { 20 } else { 40 };
    packet[ip + 20..ip + usize::from(packet[ip + 12] >> 4) * 4].to_vec()
}

const SEGMENT_SIZES: [u16; 4] = [536, 1279, 1460, 65_495];

/// Options that say `size`, at an even and at an odd place.
fn options(size: u16) -> [Vec<u8>; 3] {
    let [high, low] = size.to_be_bytes();
    [
        vec![2, 4, high, low],
        vec![1, 2, 4, high, low, 0, 0, 0],
        [
            &[4, 2, 8, 10, 1, 2, 3, 4, 5, 6, 7, 8, 1, 3, 3, 7][..],
            &[2, 4, high, low],
        ]
        .concat(),
    ]
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_connection_through_the_tunnel_is_told_what_the_path_carries() {
    const PATH: u32 = 1340;
    for family in Family::BOTH {
        let most = u16::try_from(PATH).expect("16 bits") - headers(family, 20) as u16;
        let mut stage = served(REMOTE_BACKEND);
        stage
            .node
            .peer(endpoint_address(family, REMOTE_NODE, 1), REMOTE_NODE, PATH);
        let local = (endpoint_address(family, NODE, 3), TARGET);
        let far = (endpoint_address(family, REMOTE_NODE, 9), 40_000);
        for size in SEGMENT_SIZES {
            for (told, want) in options(size).into_iter().zip(options(size.min(most))) {
                // The client's SYN, the local backend's answer to a remote one: into the tunnel.
                for (from, packet) in [
                    (CLIENT, Packet::tcp(client(family), vip(family), SYN, 7, 0)),
                    (3, Packet::tcp(local, far, SYN | ACK, 7, 8)),
                ] {
                    let frame = framed(&with_tcp_options(&packet, &told));
                    let outcome = stage.node.from_pod(&Stage::endpoint(from), &frame);
                    assert_eq!(outcome.action, REDIRECTED);
                    assert_eq!(options_of(&outcome.bytes[14..]), want, "{size}");
                }
                // The remote backend's answer, a remote client's SYN: out of it.
                for packet in [
                    Packet::tcp(remote(family), client(family), SYN | ACK, 9, 8),
                    Packet::tcp(far, local, SYN, 9, 0),
                ] {
                    let outcome = stage.node.from_tunnel(&with_tcp_options(&packet, &told));
                    assert_eq!(outcome.action, REDIRECTED);
                    assert_eq!(options_of(&outcome.bytes[14..]), want, "{size}");
                }
            }
        }
        assert_eq!(stage.node.counts(), []);
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn segment_sizes_stay_where_nothing_needs_them_changed() {
    for family in Family::BOTH {
        let [large, ..] = options(65_495);
        // A local backend; a segment that opens nothing; options without a size, cut off, or without a length.
        let mut near = served(13);
        let syn = Packet::tcp(client(family), vip(family), SYN, 7, 0);
        let frame = framed(&with_tcp_options(&syn, &large));
        let outcome = near.node.from_pod(&Stage::endpoint(CLIENT), &frame);
        assert_eq!(options_of(&outcome.bytes[14..]), large);
        let mut far = served(REMOTE_BACKEND);
        far.deliver(CLIENT, &syn);
        let ack = Packet::tcp(client(family), vip(family), ACK, 8, 9);
        for (packet, options) in [
            (&ack, &large[..]),
            (&syn, &[1, 1, 1, 0]),
            (&syn, &[0, 2, 4, 255]),
            (&syn, &[3, 0, 2, 4]),
            (&syn, &[2, 3, 255, 255]),
            (&syn, &[1, 1, 2, 4]),
            (&syn, &[1, 1, 1, 2]),
            (&syn, &[8, 200, 2, 4]),
        ] {
            let frame = framed(&with_tcp_options(packet, options));
            let outcome = far.node.from_pod(&Stage::endpoint(CLIENT), &frame);
            assert_eq!(outcome.action, REDIRECTED, "{options:?}");
            assert_eq!(options_of(&outcome.bytes[14..]), options);
        }
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn how_many_answers_one_endpoint_causes_is_bounded_and_others_are_answered() {
    let mut stage = Stage::default();
    let flood = Packet::udp(client(Family::V6), vip(Family::V6), b"x");
    let start = Instant::now();
    let answered = (0..20_000)
        .filter(|_| stage.send(CLIENT, &flood).action == REDIRECTED)
        .count();
    // An emulated machine does not even send as many as may be answered.
    let most = 2_100 + start.elapsed().as_millis() * 10;
    assert!(answered >= 2_000, "{answered}");
    assert!(answered as u128 <= most, "{answered} of {most}");
    stage.node.owe_answers(CLIENT);
    assert_eq!(stage.send(CLIENT, &flood).action, DROPPED);
    assert_eq!(
        stage.node.count(Reason::NotLinked),
        20_001,
        "all are counted"
    );
    let own = endpoint_address(Family::V6, NODE, 3);
    let other = Packet::udp((own, 1), vip(Family::V6), b"x");
    assert_eq!(stage.send(3, &other).action, REDIRECTED);
}

/// The UDP checksum of a packet.
fn checksum(packet: &[u8]) -> [u8; 2] {
    let at = if packet[0] >> 4 == 4 { 26 } else { 46 };
    [packet[at], packet[at + 1]]
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_datagram_without_a_checksum_stays_without_one() {
    for family in Family::BOTH {
        let mut stage = served(13);
        let sent = Packet::udp(client(family), vip(family), b"no checksum");
        let mut bytes = sent.bytes();
        let at = headers(family, 6);
        bytes[at..at + 2].fill(0);
        let outcome = stage
            .node
            .from_pod(&Stage::endpoint(CLIENT), &framed(&bytes));
        assert_eq!(outcome.action, REDIRECTED);
        assert!(has_right_header(&outcome.bytes[14..]));
        assert_eq!(checksum(&outcome.bytes[14..]), [0, 0]);
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_checksum_that_comes_to_zero_is_sent_as_all_ones() {
    for family in Family::BOTH {
        let mut stage = served(13);
        // The last word of the payload is chosen so that the backend's copy sums to all ones.
        let probe = |word: u16| Packet::udp(client(family), vip(family), &word.to_be_bytes());
        let (_, seen) = stage.deliver(CLIENT, &probe(0));
        let check = u16::from_be_bytes(checksum(&seen.bytes()));
        let (_, seen) = stage.deliver(CLIENT, &probe(check));
        let outcome = stage.send(CLIENT, &probe(check));
        assert_eq!(checksum(&outcome.bytes[14..]), [0xff, 0xff], "{seen:?}");
        // Back again: from all ones to what it was.
        let (_, heard) = stage.deliver(3, &seen.mirrored());
        assert_eq!(heard, probe(check).mirrored());
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn dscp_and_congestion_marks_go_through_unchanged() {
    for family in Family::BOTH {
        let mut stage = served(REMOTE_BACKEND);
        for tos in [0x00, 0x01, 0x02, 0x03, 0xb8, 0xbb] {
            for sent in questions(family) {
                let sent = Packet { tos, ..sent };
                let (_, seen) = stage.deliver(CLIENT, &sent);
                assert_eq!(seen.tos, tos);
                let (_, heard) = stage.arrive(&Packet {
                    tos,
                    ..seen.mirrored()
                });
                assert_eq!(heard.tos, tos);
            }
        }
    }
}
