//! What the programs write into the flow log, and what they leave out.

use std::net::IpAddr;

use ebpf_common::{
    addr::Policy,
    layout::{
        EVENT_DELIVERED, EVENT_ENDED, EVENT_OPENED, EVENT_REFUSED, EVENT_TUNNELLED, Event,
        FLOW_REVERSE, LOG_MARK, LOG_MARKED_PER_SECOND,
    },
    reason::Reason,
};
use weft_tests::program::{
    addr,
    packet::{ACK, FIN, Packet, RST, SYN, Transport},
    stage::{
        CLIENT, Family, NODE, PORT, REMOTE_BACKEND, Stage, TARGET, endpoint_address, vip_address,
    },
};

const SERVICE: u16 = 5;
/// More than any test writes in a second.
const MANY: u32 = 1_000_000;
/// As many events as the ring has room for: 256 KiB, each with 8 bytes of the kernel's.
const ROOM: u64 = (256 << 10) / (size_of::<Event>() as u64 + 8);

fn client(family: Family, port: u16) -> (IpAddr, u16) {
    (endpoint_address(family, NODE, CLIENT), port)
}

fn vip(family: Family, service: u16) -> (IpAddr, u16) {
    (vip_address(family, Policy::Balanced, service), PORT)
}

fn syn(family: Family, port: u16, service: u16, seq: u32) -> Packet {
    Packet::tcp(client(family, port), vip(family, service), SYN, seq, 0)
}

fn kinds(events: &[Event]) -> Vec<u32> {
    events.iter().map(|event| u32::from(event.kind)).collect()
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_flow_is_told_when_it_opens_and_when_it_ends_whoever_ends_it() {
    for family in Family::BOTH {
        for last_is_client in [true, false] {
            let mut stage = Stage::default();
            stage.service(Policy::Balanced, SERVICE, &[13]);
            stage.node.sample(1, MANY);
            let (_, seen) = stage.deliver(CLIENT, &syn(family, 9, SERVICE, 100));
            let (backend, there) = seen.mirrored_ends();
            let answer = |flags, seq| Packet::tcp(backend, there, flags, seq, 101);
            let word =
                |flags, seq| Packet::tcp(client(family, 9), vip(family, SERVICE), flags, seq, 10);
            stage.deliver(3, &answer(SYN | ACK, 9));
            stage.deliver(CLIENT, &word(ACK, 101));
            let opened = stage.node.events();
            assert_eq!(kinds(&opened), [EVENT_OPENED]);
            let ends = [(3, answer(FIN | ACK, 10)), (CLIENT, word(FIN | ACK, 101))];
            let order = if last_is_client { [0, 1] } else { [1, 0] };
            for who in order {
                stage.deliver(ends[who].0, &ends[who].1);
            }
            let ended = stage.node.events();
            assert_eq!(
                kinds(&ended),
                [EVENT_ENDED],
                "last is the client: {last_is_client}"
            );
            let (opened, ended) = (opened[0], ended[0]);
            assert_eq!(opened.src, addr(client(family, 9).0));
            assert_eq!(opened.dst, addr(vip(family, SERVICE).0));
            assert_eq!(opened.to_dst, addr(endpoint_address(family, NODE, 3)));
            assert_eq!(u16::from_be(opened.to_dport_be), TARGET);
            for event in [opened, ended] {
                assert_eq!((event.counter, event.backend), (u32::from(SERVICE), 13));
                assert_eq!(event.marked, 0);
            }
            assert_eq!(opened.sender, CLIENT);
            assert_eq!(ended.direction == FLOW_REVERSE, !last_is_client);
            assert!(ended.detail < 60, "{} s old", ended.detail);
            // A reset of what is over is no second end.
            stage.send(CLIENT, &word(RST, 102));
            assert_eq!(kinds(&stage.node.events()), [0; 0]);
        }
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_refusal_is_told_with_its_reason_and_nothing_where_nobody_looks() {
    for family in Family::BOTH {
        let mut stage = Stage::default();
        stage.send(CLIENT, &syn(family, 9, 6, 1));
        assert_eq!(kinds(&stage.node.events()), [0; 0], "off");
        stage.node.sample(1, MANY);
        stage.send(CLIENT, &syn(family, 9, 6, 1));
        let events = stage.node.events();
        assert_eq!(kinds(&events), [EVENT_REFUSED]);
        let event = events[0];
        assert_eq!(event.detail, Reason::NotLinked as u32);
        assert_eq!((event.sender, event.counter, event.backend), (CLIENT, 0, 0));
        assert_eq!(event.dst, addr(vip(family, 6).0));
        assert_eq!(u16::from_be(event.dport_be), PORT);
        assert_eq!(event.to_dst.words, [0; 4]);
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn the_sample_takes_its_share_and_the_same_flows_again() {
    let mut stage = Stage::default();
    stage.node.sample(8, MANY);
    let round = |stage: &mut Stage| {
        for port in 1..=2_000 {
            stage.send(CLIENT, &syn(Family::V6, port, 6, 1));
        }
        let events = stage.node.events();
        events
            .iter()
            .map(|event| event.sport_be)
            .collect::<Vec<_>>()
    };
    let first = round(&mut stage);
    // Binomial, 2,000 of 1/8: 250 with a standard deviation of 15.
    assert!((160..340).contains(&first.len()), "{}", first.len());
    assert_eq!(round(&mut stage), first);
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_flood_is_bounded_and_a_full_ring_loses_and_counts() {
    let mut stage = Stage::default();
    let send = |stage: &mut Stage, count: u64| {
        for _ in 0..count {
            stage.send(CLIENT, &syn(Family::V4, 9, 6, 1));
        }
    };
    stage.node.sample(1, 10);
    send(&mut stage, 500);
    let [written, limited, lost] = stage.node.logged();
    assert_eq!((written + limited, lost), (500, 0));
    // Ten per second and CPU, of which the test may run on any, for as long as it took.
    assert!(written < 400, "{written} of 500");
    assert_eq!(stage.node.events().len() as u64, written);

    stage.node.sample(1, MANY);
    send(&mut stage, ROOM + 100);
    let [after, _, lost] = stage.node.logged();
    assert_eq!(after - written, ROOM, "as many as there is room for");
    assert_eq!(lost, 100);
    assert_eq!(
        stage.node.count(Reason::NotLinked),
        500 + ROOM + 100,
        "nothing waited"
    );
    assert_eq!(stage.node.events().len() as u64, ROOM);
    send(&mut stage, 1);
    assert_eq!(stage.node.events().len(), 1, "there is room again");
}

/// An ICMP echo of identifier 7 from the first end to the second.
fn echo(ends: (IpAddr, IpAddr), kind: u8, sequence: u16) -> Packet {
    let [high, low] = sequence.to_be_bytes();
    Packet {
        sport: 0,
        transport: Transport::Icmp(kind, 0),
        payload: vec![0, 7, high, low, b'?'],
        ..Packet::echo(ends.0, ends.1, 7)
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_marked_packet_is_told_at_every_step_whatever_is_sampled() {
    let marked = u32::from(LOG_MARK) << 16;
    for family in Family::BOTH {
        let mut stage = Stage::default();
        stage.service(Policy::Balanced, SERVICE, &[13]);
        stage.service(Policy::Balanced, 6, &[REMOTE_BACKEND]);
        let (_, seen) = stage.deliver(CLIENT, &syn(family, 9, SERVICE, marked));
        let (backend, there) = seen.mirrored_ends();
        stage.deliver(3, &Packet::tcp(backend, there, SYN | ACK, 9, marked + 1));
        let events = stage.node.events();
        assert_eq!(
            kinds(&events),
            [EVENT_OPENED, EVENT_DELIVERED, EVENT_DELIVERED]
        );
        assert!(events.iter().all(|event| event.marked == 1));
        assert_eq!((events[1].sender, events[1].detail), (CLIENT, 3));
        assert_eq!((events[2].sender, events[2].detail), (3, CLIENT));
        assert_eq!(events[2].to_src, addr(vip(family, SERVICE).0));

        // Through the tunnel and back, as an echo whose sequence number is the mark.
        let (request, reply) = match family {
            Family::V4 => (8, 0),
            Family::V6 => (128, 129),
        };
        let ends = (client(family, 7).0, vip(family, 6).0);
        stage.deliver(CLIENT, &echo(ends, request, LOG_MARK - 1));
        assert_eq!(kinds(&stage.node.events()), [0; 0]);
        let (_, seen) = stage.deliver(CLIENT, &echo(ends, request, LOG_MARK));
        let answer = echo((seen.dst, seen.src), reply, LOG_MARK);
        stage.node.from_tunnel(&answer.bytes());
        let events = stage.node.events();
        assert_eq!(kinds(&events), [EVENT_TUNNELLED, EVENT_DELIVERED]);
        assert_eq!((events[1].sender, events[1].detail), (0, CLIENT));

        // A pod that marks all of its packets does not drown the log.
        for _ in 0..10 * LOG_MARKED_PER_SECOND {
            stage.send(CLIENT, &syn(family, 9, 7, marked));
        }
        let told = stage.node.events().len() as u32;
        assert!(told < 8 * LOG_MARKED_PER_SECOND, "{told}");
    }
}
