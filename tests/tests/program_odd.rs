//! Odd packets: options, extension headers, fragments. Handled as plain ones, or dropped with a reason.

use std::net::IpAddr;

use ebpf_common::{addr::Policy, reason::Reason};
use proptest::prelude::*;
use weft_tests::program::{
    DROPPED, REDIRECTED,
    odd::{
        AUTHENTICATION, DESTINATION, FRAGMENT, HOP_BY_HOP, ROUTING, fragments, has_right_header,
        padding, piece_of, plain, reassembled, with_headers, with_options,
    },
    packet::{Packet, RST, SYN, Transport, framed},
    stage::{
        CLIENT, Family, NODE, PORT, REMOTE_BACKEND, REMOTE_NODE, Stage, TARGET, endpoint_address,
        receiver, vip_address,
    },
};

fn client(family: Family) -> (IpAddr, u16) {
    (endpoint_address(family, NODE, CLIENT), 40_000)
}

fn vip(family: Family) -> (IpAddr, u16) {
    (vip_address(family, Policy::Balanced, 5), PORT)
}

fn backend(family: Family) -> (IpAddr, u16) {
    (endpoint_address(family, NODE, 3), TARGET)
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

/// Sends bytes of the client; who gets them, and what.
fn deliver(stage: &mut Stage, from: u32, packet: &[u8]) -> (u32, Vec<u8>) {
    let outcome = stage.node.from_pod(&Stage::endpoint(from), &framed(packet));
    let counts = stage.node.counts();
    assert_eq!(outcome.action, REDIRECTED, "{packet:x?}: {counts:?}");
    (receiver(&outcome.bytes), outcome.bytes[14..].to_vec())
}

fn assert_dropped(stage: &mut Stage, packet: &[u8], reason: Reason) {
    let before = stage.node.count(reason);
    let outcome = stage
        .node
        .from_pod(&Stage::endpoint(CLIENT), &framed(packet));
    let counts = stage.node.counts();
    assert_eq!(outcome.action, DROPPED, "{packet:x?}: {counts:?}");
    assert_eq!(outcome.bytes[14..], *packet, "left as it was");
    assert_eq!(
        stage.node.count(reason),
        before + 1,
        "{} in {counts:?}",
        reason.name()
    );
}

/// Options and chains that are walked.
fn walked(packet: &[u8]) -> Vec<Vec<u8>> {
    if packet[0] >> 4 == 4 {
        let full: Vec<u8> = [7, 39, 4].into_iter().chain([0; 36]).chain([0]).collect();
        return [
            // Router alert; nothing and an end; a record of the route that fills the header.
            &[148, 4, 0, 0][..],
            &[1, 1, 1, 1],
            &[1, 0, 9, 9],
            &full,
        ]
        .map(|options| with_options(packet, options))
        .into();
    }
    let spent = {
        let mut header = padding(8);
        (header[2], header[3]) = (4, 0);
        header
    };
    [
        vec![(HOP_BY_HOP, padding(8))],
        vec![(DESTINATION, padding(24))],
        vec![(ROUTING, spent.clone())],
        vec![
            (HOP_BY_HOP, padding(8)),
            (DESTINATION, padding(16)),
            (ROUTING, spent),
            (FRAGMENT, vec![0; 8]),
            (DESTINATION, padding(200)),
        ],
        vec![(DESTINATION, padding(8)); 8],
    ]
    .map(|headers| with_headers(packet, &headers))
    .into()
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn options_and_extension_headers_are_kept_on_the_way_there_and_back() {
    for family in Family::BOTH {
        let mut stage = served(13);
        for sent in questions(family) {
            for odd in walked(&sent.bytes()) {
                let (to, seen) = deliver(&mut stage, CLIENT, &odd);
                assert_eq!(to, 3);
                assert!(has_right_header(&seen), "{seen:x?}");
                let (seen, kept) = plain(&seen);
                assert_eq!(kept, plain(&odd).1, "the headers stay as they were");
                let seen = Packet::parse(&seen)
                    .expect("a right packet")
                    .hop_back(&sent);
                assert_eq!((seen.src, seen.dst), (sent.src, backend(family).0));

                let back = seen.mirrored();
                let answer = walked(&back.bytes()).swap_remove(0);
                let (to, heard) = deliver(&mut stage, 3, &answer);
                assert_eq!(to, CLIENT);
                let heard = Packet::parse(&plain(&heard).0).expect("a right packet");
                assert_eq!(heard.hop_back(&back), sent.mirrored());
            }
        }
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn what_cannot_be_walked_is_dropped_with_its_reason() {
    let [v4, _, _] = questions(Family::V4).map(|packet| packet.bytes());
    let [v6, _, _] = questions(Family::V6).map(|packet| packet.bytes());
    let mut stage = served(13);
    for (options, reason) in [
        // Loose and strict source routes, also behind others.
        (&[131, 7, 4, 10, 24, 0, 5, 0][..], Reason::HeaderChain),
        (&[1, 137, 7, 4, 10, 24, 0, 5], Reason::HeaderChain),
        // Longer than the header, and without a length.
        (&[7, 9, 4, 0, 0, 0, 0, 0], Reason::Malformed),
        (&[7, 1, 4, 0], Reason::Malformed),
        (&[7, 0, 4, 0], Reason::Malformed),
    ] {
        assert_dropped(&mut stage, &with_options(&v4, options), reason);
    }
    let with = |kind: u8, left: u8| {
        let mut header = padding(8);
        (header[2], header[3]) = (kind, left);
        vec![(ROUTING, header)]
    };
    for (headers, reason) in [
        (with(0, 0), Reason::HeaderChain),
        (with(4, 1), Reason::HeaderChain),
        (vec![(DESTINATION, padding(8)); 9], Reason::HeaderChain),
        (vec![(DESTINATION, padding(136)); 2], Reason::HeaderChain),
        (
            vec![(DESTINATION, padding(8)), (HOP_BY_HOP, padding(8))],
            Reason::HeaderChain,
        ),
        (vec![(135, padding(8))], Reason::HeaderChain),
        (vec![(AUTHENTICATION, padding(24))], Reason::Protocol),
        (vec![(50, padding(24))], Reason::Protocol),
        (vec![(59, padding(8))], Reason::Protocol),
        (
            vec![
                (FRAGMENT, vec![0, 0, 0, 1, 0, 0, 0, 9]),
                (FRAGMENT, vec![0; 8]),
            ],
            Reason::Fragment,
        ),
    ] {
        assert_dropped(&mut stage, &with_headers(&v6, &headers), reason);
    }
    for (proto, packet) in [(50, &v4), (51, &v4), (58, &v4)] {
        let mut packet = packet.clone();
        packet[9] = proto;
        assert_dropped(&mut stage, &packet, Reason::Protocol);
    }
    let mut chain = with_headers(&v6, &[(DESTINATION, padding(8))]);
    chain[41] = 30; // 248 bytes, and the packet ends before.
    assert_dropped(&mut stage, &chain, Reason::Malformed);
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn an_odd_packet_that_is_refused_is_quoted_with_all_its_headers() {
    for family in Family::BOTH {
        let mut stage = Stage::default();
        for sent in questions(family) {
            for odd in walked(&sent.bytes()) {
                let frame = framed(&odd);
                let outcome = stage.node.from_pod(&Stage::endpoint(CLIENT), &frame);
                assert_eq!(outcome.action, REDIRECTED);
                assert_eq!(outcome.bytes[..6], frame[6..12], "to the sender's MAC");
                let error = Packet::parse(&outcome.bytes[14..]).expect("a right packet");
                assert_eq!(error.dst, sent.src);
                let quote = &error.payload[4..];
                assert_eq!(quote, &odd[..quote.len()], "as it was sent");
                let header = if family == Family::V4 { 20 } else { 40 };
                assert_eq!(quote.len(), header + plain(&odd).1.len() + 8);
            }
        }
    }
}

/// The client's datagram in pieces through the program; the datagram that the receiver puts together.
fn through(stage: &mut Stage, from: u32, pieces: &[Vec<u8>]) -> (u32, Vec<Vec<u8>>) {
    let mut to = 0;
    let out = pieces
        .iter()
        .map(|piece| {
            let (receiver, seen) = deliver(stage, from, piece);
            assert!(has_right_header(&seen), "{seen:x?}");
            to = receiver;
            seen
        })
        .collect();
    (to, out)
}

fn datagrams(family: Family) -> [Packet; 2] {
    let long: Vec<u8> = (0..3000_u32).map(|byte| byte as u8).collect();
    [
        Packet::udp(client(family), vip(family), &long),
        Packet {
            payload: long,
            ..Packet::echo(client(family).0, vip(family).0, 77)
        },
    ]
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_fragmented_datagram_and_its_fragmented_answer_arrive_whole() {
    for family in Family::BOTH {
        for (index, to) in [(13, 3), (REMOTE_BACKEND, 0)] {
            let mut stage = served(index);
            for sent in datagrams(family) {
                let (got, seen) = through(&mut stage, CLIENT, &fragments(&sent.bytes(), 1232, 9));
                assert_eq!((got, seen.len()), (to, 3));
                let seen = Packet::parse(&reassembled(&seen)).expect("its checksum is right");
                let backend = match index {
                    REMOTE_BACKEND => endpoint_address(family, REMOTE_NODE, 2),
                    _ => backend(family).0,
                };
                assert_eq!((seen.src, seen.dst), (sent.src, backend));

                let back = seen.mirrored();
                let pieces = fragments(&back.bytes(), 1232, 4);
                let heard: Vec<Vec<u8>> = if index == REMOTE_BACKEND {
                    pieces
                        .iter()
                        .map(|piece| {
                            let outcome = stage.node.from_tunnel(piece);
                            assert_eq!(outcome.action, REDIRECTED);
                            assert_eq!(receiver(&outcome.bytes), CLIENT);
                            outcome.bytes[14..].to_vec()
                        })
                        .collect()
                } else {
                    let (got, heard) = through(&mut stage, 3, &pieces);
                    assert_eq!(got, CLIENT);
                    heard
                };
                let heard = Packet::parse(&reassembled(&heard)).expect("its checksum is right");
                let want = Packet {
                    ttl: back.ttl,
                    ..sent.mirrored()
                };
                assert_eq!(heard.hop_back(&back), want);
            }
        }
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_remote_clients_fragments_reach_the_local_backend() {
    for family in Family::BOTH {
        let mut stage = Stage::default();
        let remote = (endpoint_address(family, REMOTE_NODE, 9), 6000);
        let sent = Packet::udp(remote, backend(family), &[5; 2000]);
        let seen: Vec<Vec<u8>> = fragments(&sent.bytes(), 1200, 3)
            .iter()
            .map(|piece| {
                let outcome = stage.node.from_tunnel(piece);
                assert_eq!(outcome.action, REDIRECTED);
                assert_eq!(receiver(&outcome.bytes), 3);
                outcome.bytes[14..].to_vec()
            })
            .collect();
        let seen = Packet::parse(&reassembled(&seen)).expect("its checksum is right");
        assert_eq!(seen.hop_back(&sent), sent);
        // And the answer's, which nobody translates.
        let answer = sent.mirrored();
        let (to, seen) = through(&mut stage, 3, &fragments(&answer.bytes(), 1200, 8));
        assert_eq!(to, 0);
        let seen = Packet::parse(&reassembled(&seen)).expect("its checksum is right");
        assert_eq!(seen.hop_back(&answer), answer);
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_fragment_without_its_first_one_is_dropped() {
    for family in Family::BOTH {
        let mut stage = served(13);
        let [sent, _] = datagrams(family);
        let pieces = fragments(&sent.bytes(), 1232, 9);
        assert_dropped(&mut stage, &pieces[1], Reason::Fragment);
        deliver(&mut stage, CLIENT, &pieces[0]);
        deliver(&mut stage, CLIENT, &pieces[1]);
        // Another datagram's, another sender's, another way's.
        let other = fragments(&sent.bytes(), 1232, 10);
        assert_dropped(&mut stage, &other[1], Reason::Fragment);
        let before = stage.node.count(Reason::TunnelSource);
        assert_eq!(stage.node.from_tunnel(&pieces[1]).action, DROPPED);
        assert_eq!(stage.node.count(Reason::TunnelSource), before + 1);
        let remote = (endpoint_address(family, REMOTE_NODE, 9), 6000);
        let alien = Packet::udp(remote, backend(family), &[5; 2000]).bytes();
        let before = stage.node.count(Reason::Fragment);
        let piece = &fragments(&alien, 1200, 9)[1];
        assert_eq!(stage.node.from_tunnel(piece).action, DROPPED);
        assert_eq!(stage.node.count(Reason::Fragment), before + 1);
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn fragments_of_a_refused_datagram_go_nowhere() {
    for family in Family::BOTH {
        let mut stage = Stage::default();
        let [sent, _] = datagrams(family);
        let pieces = fragments(&sent.bytes(), 1232, 9);
        let outcome = stage
            .node
            .from_pod(&Stage::endpoint(CLIENT), &framed(&pieces[0]));
        let error = Packet::parse(&outcome.bytes[14..]).expect("a right packet");
        let unreachable = match family {
            Family::V4 => Transport::Icmp(3, 3),
            Family::V6 => Transport::Icmp(1, 4),
        };
        assert_eq!(error.transport, unreachable);
        assert_dropped(&mut stage, &pieces[1], Reason::Fragment);
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn tiny_and_overlapping_fragments_are_dropped() {
    for family in Family::BOTH {
        let mut stage = served(13);
        let header = if family == Family::V4 { 20 } else { 40 };
        let tcp = Packet {
            payload: vec![1; 200],
            ..Packet::tcp(client(family), vip(family), SYN, 7, 0)
        }
        .bytes();
        // A first fragment without the flags (RFC 1858), and one that ends in the middle of a UDP header.
        for (packet, size) in [(&tcp, 8), (&tcp, 16)] {
            let first = piece_of(packet, 0, &packet[header..header + size], true, 1);
            assert_dropped(&mut stage, &first, Reason::Fragment);
        }
        // One at offset 8 that would write over the flags.
        let first = piece_of(&tcp, 0, &tcp[header..header + 24], true, 2);
        deliver(&mut stage, CLIENT, &first);
        let forged = [RST; 64];
        for offset in [8, 16] {
            let over = piece_of(&tcp, offset, &forged, false, 2);
            assert_dropped(&mut stage, &over, Reason::Fragment);
        }
        deliver(&mut stage, CLIENT, &piece_of(&tcp, 24, &forged, false, 2));
        // All but the last are of whole eight bytes, and no datagram is larger than 65,535 bytes.
        let uneven = piece_of(&tcp, 24, &forged[..63], true, 2);
        assert_dropped(&mut stage, &uneven, Reason::Fragment);
        let huge = piece_of(&tcp, 65_528, &forged, false, 2);
        assert_dropped(&mut stage, &huge, Reason::Fragment);
    }
    // RFC 7112: the first fragment holds the whole chain.
    let mut stage = served(13);
    let sent = questions(Family::V6)[1].bytes();
    let chain = with_headers(&sent, &[(DESTINATION, padding(64))]);
    let first = piece_of(&chain, 0, &chain[40..40 + 32], true, 3);
    let outcome = stage
        .node
        .from_pod(&Stage::endpoint(CLIENT), &framed(&first));
    assert_eq!(outcome.action, DROPPED);
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn an_error_about_an_odd_packet_is_told_in_its_senders_words() {
    for family in Family::BOTH {
        let mut stage = served(13);
        let sent = Packet::udp(client(family), vip(family), &[9; 400]);
        let mut odds = walked(&sent.bytes());
        odds.push(fragments(&sent.bytes(), 200, 6).swap_remove(0));
        for odd in odds {
            let (_, seen) = deliver(&mut stage, CLIENT, &odd);
            let header = seen.len() - sent.payload.len().min(192) - 8;
            let quoted = if seen.len() < 300 {
                header.min(seen.len()) + 8
            } else {
                seen.len() - 400
            };
            let kind = match family {
                Family::V4 => Transport::Icmp(3, 3),
                Family::V6 => Transport::Icmp(1, 4),
            };
            let error = Packet {
                transport: kind,
                payload: [&[0; 4], &seen[..quoted]].concat(),
                ..Packet::udp((backend(family).0, 0), (client(family).0, 0), b"")
            };
            let (to, heard) = stage.deliver(
                3,
                &Packet {
                    sport: 0,
                    dport: 0,
                    ..error
                },
            );
            assert_eq!(to, CLIENT);
            assert_eq!(heard.src, vip(family).0);
            let (quote, mut want) = (&heard.payload[4..], odd[..quoted].to_vec());
            // The hop that was taken off before is not put back, and the quoted checksums are those of the wire.
            let hop = if family == Family::V4 { 8 } else { 7 };
            want[hop] -= 1;
            if family == Family::V4 {
                want[10..12].copy_from_slice(&quote[10..12]);
                assert!(has_right_header(quote), "{quote:x?}");
            }
            want[quoted - 2..].copy_from_slice(&quote[quoted - 2..]);
            assert_eq!(quote, want);
        }
        // About a later fragment: it names no flow.
        let before = stage.node.count(Reason::Fragment);
        let pieces = fragments(&sent.bytes(), 200, 7);
        let (_, first) = deliver(&mut stage, CLIENT, &pieces[0]);
        let (_, later) = deliver(&mut stage, CLIENT, &pieces[1]);
        drop(first);
        let error = Packet {
            transport: match family {
                Family::V4 => Transport::Icmp(3, 3),
                Family::V6 => Transport::Icmp(1, 4),
            },
            payload: [&[0; 4], &later[..100]].concat(),
            ..Packet::udp((backend(family).0, 0), (client(family).0, 0), b"")
        };
        let frame = Packet {
            sport: 0,
            dport: 0,
            ..error
        }
        .frame();
        let outcome = stage.node.from_pod(&Stage::endpoint(3), &frame);
        assert_eq!(outcome.action, DROPPED);
        assert_eq!(stage.node.count(Reason::Fragment), before + 1);
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_quote_that_is_cut_off_in_its_headers_is_dropped() {
    for family in Family::BOTH {
        let mut stage = served(13);
        let sent = Packet::udp(client(family), vip(family), b"x");
        let odd = walked(&sent.bytes()).swap_remove(0);
        let (_, seen) = deliver(&mut stage, CLIENT, &odd);
        let whole = plain(&seen).1.len() + if family == Family::V4 { 28 } else { 48 };
        for len in 0..whole - 4 {
            let error = Packet {
                transport: match family {
                    Family::V4 => Transport::Icmp(3, 3),
                    Family::V6 => Transport::Icmp(1, 4),
                },
                payload: [&[0; 4], &seen[..len]].concat(),
                sport: 0,
                dport: 0,
                ..Packet::udp((backend(family).0, 0), (client(family).0, 0), b"")
            };
            let outcome = stage.node.from_pod(&Stage::endpoint(3), &error.frame());
            assert_eq!(outcome.action, DROPPED, "{len} bytes of {whole}");
        }
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn odd_bytes_reach_nobody_but_the_backend_and_never_as_a_wrong_packet() {
    let stage = std::cell::RefCell::new(served(13));
    let base = prop_oneof![
        Just(walked(&questions(Family::V4)[1].bytes()).swap_remove(3)),
        Just(walked(&questions(Family::V6)[0].bytes()).swap_remove(3)),
        Just(walked(&questions(Family::V6)[1].bytes()).swap_remove(4)),
        Just(fragments(&datagrams(Family::V4)[0].bytes(), 1200, 5).swap_remove(0)),
        Just(fragments(&datagrams(Family::V6)[0].bytes(), 1200, 5).swap_remove(1)),
    ];
    let changes = proptest::collection::vec((0..96_usize, any::<u8>()), 0..4);
    proptest!(ProptestConfig::with_cases(1024), |(base in base, changes in changes)| {
        let mut packet = base.clone();
        for (at, value) in changes {
            let at = at.min(packet.len() - 1);
            packet[at] = value;
        }
        let mut stage = stage.borrow_mut();
        let outcome = stage.node.from_pod(&Stage::endpoint(CLIENT), &framed(&packet));
        prop_assert!(outcome.action == DROPPED || outcome.action == REDIRECTED);
        if outcome.action == REDIRECTED && has_right_header(&packet) {
            prop_assert!(has_right_header(&outcome.bytes[14..]));
            // To the backend, or back to the sender.
            prop_assert!([3, 0].contains(&receiver(&outcome.bytes)));
        }
    });
}
