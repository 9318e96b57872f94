//! Connections that have a place of their own, and those that find it taken.

use aya::maps::{Array, HashMap, Map, MapData, Queue};
use ebpf_common::{
    addr::Policy,
    layout::{
        ACCOUNT_TCP, Connection, FLOW_ESTABLISHED, FLOW_FORWARD, FLOW_QUEUED, FLOW_SYN,
        FLOW_SYN_ACK, Flow, FlowKey, PLACE_BITS, PLACE_LIVE, direct_flow,
    },
};
use weft_netmanager::{
    datapath::FlowTable,
    janitor::{FlowSource, Page},
};
use weft_tests::{
    pinned::Pinned,
    program::{
        bytes::Bytes,
        packet::{ACK, FIN, Packet, SYN},
        stage::{CLIENT, Family, Stage},
        talk::{backend, client, close, connect, forward, point_to, resets, reverse, segment, vip},
    },
};

const PLACE: usize = size_of::<Connection>();
const SECOND_NS: u64 = 1_000_000_000;

/// How many connections have places, and how many entries the shared table has.
fn homes(stage: &mut Stage) -> (usize, usize) {
    (stage.node.placed().len(), stage.node.shared("FLOWS").len())
}

/// As if the connection from `port` had been used last so long ago.
fn rest(stage: &mut Stage, port: u16, ns: u64) {
    for found in [forward(stage, "FLOWS", port), reverse(stage, "FLOWS", port)] {
        let (key, flow) = found.expect("a connection");
        let rested = Flow {
            last_seen_ns: flow.last_seen_ns.saturating_sub(ns),
            ..flow
        };
        stage.node.put_flow("FLOWS", &key, &rested);
    }
}

/// The pods of this node whose connections from `port` would stand in the same place as the client's.
fn competes(port: u16) -> (u32, u16) {
    let place = |endpoint, port: u16| {
        direct_flow(&FlowKey {
            sport_be: port.to_be(),
            endpoint,
            direction: FLOW_FORWARD,
            ..FlowKey::default()
        })
    };
    let wanted = place(CLIENT, port);
    let ports = 1024..=u16::MAX;
    let found = ports.into_iter().find(|&other| place(4, other) == wanted);
    (4, found.expect("there are more ports than places"))
}

/// A SYN of another pod to service 5.
fn syn_of(family: Family, (pod, port): (u32, u16), isn: u32) -> Packet {
    let (address, _) = backend(family, pod);
    Packet::tcp((address, port), vip(family, 5), SYN, isn, 0)
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_connection_has_a_place_and_leaves_it_with_its_last_acknowledgement() {
    for family in Family::BOTH {
        let mut stage = Stage::default();
        point_to(&mut stage, 3);
        for isn in [100, 5000] {
            connect(&mut stage, family, 7, isn);
            assert_eq!(homes(&mut stage), (1, 0));
            close(&mut stage, family, 7, 3, isn + 1);
            stage.deliver(CLIENT, &segment(family, 7, ACK, isn + 2));
            assert_eq!(homes(&mut stage), (1, 0), "it does not acknowledge the FIN");
            let mut last = segment(family, 7, ACK, isn + 2);
            if let weft_tests::program::packet::Transport::Tcp { ack, .. } = &mut last.transport {
                *ack = 11;
            }
            stage.deliver(CLIENT, &last);
            assert_eq!(homes(&mut stage), (0, 0));
        }
        let account = stage.node.account(CLIENT);
        assert_eq!(
            (account.opened[ACCOUNT_TCP], account.closed[ACCOUNT_TCP]),
            (2, 2)
        );
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn who_finds_the_place_taken_is_served_from_the_shared_table() {
    for family in Family::BOTH {
        let mut stage = Stage::default();
        point_to(&mut stage, 3);
        connect(&mut stage, family, 7, 100);
        let other = competes(7);
        for isn in [1, 1, 40_000] {
            let (number, seen) = stage.deliver(other.0, &syn_of(family, other, isn));
            let accept = Packet::tcp(
                (seen.dst, seen.dport),
                (seen.src, seen.sport),
                SYN | ACK,
                9,
                isn + 1,
            );
            let (receiver, heard) = stage.deliver(number, &accept);
            assert_eq!((receiver, heard.src), (other.0, vip(family, 5).0));
            assert_eq!(homes(&mut stage), (1, 2));
        }
        assert_eq!(stage.deliver(CLIENT, &segment(family, 7, ACK, 101)).0, 3);
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn an_answer_is_never_anothers_whichever_of_two_connections_has_the_place() {
    for family in Family::BOTH {
        let mut stage = Stage::default();
        point_to(&mut stage, 3);
        stage.service(Policy::Balanced, 6, &[13]);
        stage.service(Policy::Balanced, 7, &[13]);
        let syn = |service, isn| Packet::tcp(client(family, 9), vip(family, service), SYN, isn, 0);
        // The first has the place; the second, from the same port to the same backend, another port on the way.
        let (_, first) = stage.deliver(CLIENT, &syn(5, 1));
        let (_, second) = stage.deliver(CLIENT, &syn(6, 2));
        assert_eq!((first.sport, homes(&mut stage)), (9, (1, 2)));
        assert_ne!(second.sport, 9);
        // The first is ended by its client, so that the third takes its place.
        connect(&mut stage, family, 9, 1);
        close(&mut stage, family, 9, 3, 2);
        let (_, third) = stage.deliver(CLIENT, &syn(7, 3));
        assert_eq!((third.sport, homes(&mut stage)), (9, (1, 2)));
        for (seen, service, isn) in [(second, 6, 2), (third, 7, 3)] {
            let accept = Packet::tcp(
                backend(family, 3),
                (seen.src, seen.sport),
                SYN | ACK,
                9,
                isn + 1,
            );
            let heard = Packet::tcp(
                vip(family, service),
                client(family, 9),
                SYN | ACK,
                9,
                isn + 1,
            );
            assert_eq!(stage.deliver(3, &accept), (CLIENT, heard));
        }
        // One in the shared table has the answers of a port: whoever takes the place takes another port.
        for connection in stage.node.placed() {
            stage.node.unplace(&connection.1);
        }
        let (_, fourth) = stage.deliver(CLIENT, &syn(5, 9000));
        assert_ne!(fourth.sport, 9);
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn what_opens_or_is_over_gives_its_place_up_in_time_and_what_is_established_never() {
    for family in Family::BOTH {
        let mut stage = Stage::default();
        point_to(&mut stage, 3);
        let other = competes(7);
        let takes_the_place = |stage: &mut Stage| {
            stage.deliver(other.0, &syn_of(family, other, 1));
            let placed = stage.node.placed();
            let [(_, connection)] = placed.as_slice() else {
                panic!("one place is wanted by both: {placed:?}");
            };
            connection.key.endpoint == other.0
        };
        // Opening.
        for (rests, gives_way) in [(0, false), (19 * SECOND_NS, false), (21 * SECOND_NS, true)] {
            stage.node.forget_flows();
            stage.deliver(CLIENT, &segment(family, 7, SYN, 100));
            rest(&mut stage, 7, rests);
            assert_eq!(takes_the_place(&mut stage), gives_way, "opening, {rests}");
            let account = stage.node.account(CLIENT);
            assert_eq!(account.closed[ACCOUNT_TCP], u64::from(gives_way));
        }
        // Established.
        stage.node.forget_flows();
        connect(&mut stage, family, 7, 100);
        rest(&mut stage, 7, 3600 * SECOND_NS);
        assert!(!takes_the_place(&mut stage));
        // Over.
        for (rests, gives_way) in [(0, false), (9 * SECOND_NS, false), (11 * SECOND_NS, true)] {
            stage.node.forget_flows();
            connect(&mut stage, family, 7, 100);
            close(&mut stage, family, 7, 3, 101);
            rest(&mut stage, 7, rests);
            assert_eq!(takes_the_place(&mut stage), gives_way, "over, {rests}");
            let account = stage.node.account(CLIENT);
            assert_eq!(account.closed[ACCOUNT_TCP], 1, "it was counted at its end");
        }
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_connection_in_a_place_whose_backend_died_is_reset_and_forgotten() {
    for family in Family::BOTH {
        let mut stage = Stage::default();
        point_to(&mut stage, 3);
        connect(&mut stage, family, 7, 100);
        let mut dead = Stage::local_backend(3);
        dead.flags = 0;
        stage.node.backend(13, &dead);
        assert!(resets(&mut stage, &segment(family, 7, ACK, 101)));
        assert_eq!(homes(&mut stage), (0, 0));
        assert!(resets(&mut stage, &segment(family, 7, FIN | ACK, 101)));
    }
}

/// One walk through a table.
fn walk(table: &mut FlowTable) -> Vec<(&'static str, FlowKey, Flow)> {
    let mut all = Vec::new();
    loop {
        let Page {
            flows,
            map,
            is_last,
        } = table.next_page().expect("the maps are read");
        all.extend(flows.into_iter().map(|(key, flow)| (map, key, flow)));
        if is_last {
            return all;
        }
    }
}

/// How many places a datapath of small sizes has.
const FEW: u32 = 8;

/// Two connections for each of the places of a small datapath, by the place.
fn connections() -> Vec<[Connection; 2]> {
    let mut places = vec![Vec::new(); FEW as usize];
    for port in 1..u16::MAX {
        let connection = connection(port);
        if let Some(place) = places.get_mut(direct_flow(&connection.key) as usize) {
            place.push(connection);
        }
    }
    places
        .into_iter()
        .map(|place| [place[0], place[1]])
        .collect()
}

/// A connection as the programs would have put it into its place.
fn connection(port: u16) -> Connection {
    let key = FlowKey {
        sport_be: port.to_be(),
        endpoint: 3,
        proto: 6,
        direction: FLOW_FORWARD,
        ..FlowKey::default()
    };
    let flow = Flow {
        client_port_be: port.to_be(),
        ..Flow::default()
    };
    Connection {
        state: PLACE_LIVE | 8,
        key,
        spilled_s: 0,
        forward: Flow {
            last_seen_ns: 5,
            flags: 1,
            ..flow
        },
        reverse: Flow {
            last_seen_ns: 9,
            flags: 2,
            ..flow
        },
    }
}

fn places(data: MapData) -> Array<MapData, [u8; PLACE]> {
    Map::Array(data).try_into().expect("an array")
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn user_space_walks_judges_and_removes_both_entries_of_a_place_as_one() {
    let pinned = Pinned::open();
    let mut places = places(pinned.map("FLOWS_DIRECT"));
    assert_eq!(places.len(), FEW);
    let mut put = |connection: &Connection| {
        let place = direct_flow(&connection.key);
        let bytes = connection.to_array::<PLACE>();
        places.set(place, bytes, 0).expect("a place");
        place
    };
    let [[first, gone], [second, _]] = connections()[..2] else {
        panic!("there are more places");
    };
    let at = put(&first);
    put(&second);
    let mut table = FlowTable::connections(&pinned.maps()).expect("it opens");
    let found = walk(&mut table);
    assert_eq!(found.len(), 4);
    for (map, _, flow) in &found {
        assert_eq!(
            (*map, flow.flags, flow.last_seen_ns),
            ("FLOWS_DIRECT", 3, 9)
        );
    }
    assert!(found.iter().any(|(_, key, _)| *key == first.reverse_key()));
    assert!(table.get(&first.reverse_key()).unwrap().is_some());
    // Another connection than the one that the place has.
    let remove = |table: &mut FlowTable, key: &FlowKey, flow: &Flow| {
        table
            .remove("FLOWS_DIRECT", key, flow)
            .expect("it is mapped")
    };
    assert!(!remove(&mut table, &gone.key, &gone.forward));
    assert!(remove(&mut table, &first.reverse_key(), &first.reverse));
    assert!(!remove(&mut table, &first.key, &first.forward));
    // The same ports again, born later than what was judged.
    let again = Connection {
        forward: Flow {
            born_s: 7,
            ..second.forward
        },
        ..second
    };
    put(&again);
    assert!(!remove(&mut table, &second.key, &second.forward));
    let left = Connection::from_slice(&places.get(&at, 0).expect("a place"));
    assert_eq!(left.state & PLACE_BITS, 0);
    assert_eq!(walk(&mut table).len(), 2);
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn the_shared_table_is_spared_again_once_nothing_of_a_place_is_in_it() {
    let mut pinned = Pinned::open();
    let [
        [
            Connection {
                key, forward: flow, ..
            },
            _,
        ],
        [Connection { key: other, .. }, _],
    ] = connections()[..2]
    else {
        panic!("there are more places");
    };
    let mut places = places(pinned.map("FLOWS_DIRECT"));
    for key in [&key, &other] {
        let spilled = Connection {
            spilled_s: 1,
            ..Connection::default()
        };
        let bytes = spilled.to_array::<PLACE>();
        places.set(direct_flow(key), bytes, 0).expect("a place");
    }
    let mut shared: HashMap<MapData, [u8; 44], [u8; 56]> =
        HashMap::try_from(Map::HashMap(pinned.map("FLOWS"))).unwrap();
    shared
        .insert(key.to_array::<44>(), flow.to_array::<56>(), 0)
        .expect("there is room");
    let spilled = |places: &Array<MapData, [u8; PLACE]>, key: &FlowKey| {
        Connection::from_slice(&places.get(&direct_flow(key), 0).expect("a place")).spilled_s
    };
    let mut table = FlowTable::connections(&pinned.maps()).expect("it opens");
    assert_eq!(walk(&mut table).len(), 1);
    assert_eq!((spilled(&places, &key), spilled(&places, &other)), (1, 0));
    assert!(table.remove("FLOWS", &key, &flow).unwrap());
    walk(&mut table);
    assert_eq!(spilled(&places, &key), 0);
    // Somebody is on the way there while a walk sees nothing; and an entry of which no place knows makes itself known.
    let soon = Connection {
        spilled_s: u32::MAX,
        ..Connection::default()
    };
    let bytes = soon.to_array::<PLACE>();
    places.set(direct_flow(&other), bytes, 0).expect("a place");
    shared
        .insert(key.to_array::<44>(), flow.to_array::<56>(), 0)
        .expect("there is room");
    walk(&mut table);
    assert_eq!(spilled(&places, &other), u32::MAX);
    assert_ne!(spilled(&places, &key), 0);

    // A daemon that finds connections of a version that knew no places has the table asked for every place.
    pinned.forget("FLOWS_DIRECT");
    pinned.open_again();
    let fresh = self::places(pinned.map("FLOWS_DIRECT"));
    assert_ne!(spilled(&fresh, &key), 0);
    assert_ne!(spilled(&fresh, &other), 0);
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn connections_in_places_come_along_when_the_table_is_resized_and_give_way_there() {
    const ESTABLISHED: u32 = FLOW_SYN | FLOW_SYN_ACK | FLOW_ESTABLISHED | FLOW_QUEUED;
    let mut pinned = Pinned::open();
    let [[opening, _], [mut established, _]] = connections()[..2] else {
        panic!("there are more places");
    };
    established.forward.flags = ESTABLISHED;
    established.reverse.flags = ESTABLISHED;
    let mut before = places(pinned.map("FLOWS_DIRECT"));
    for connection in [&opening, &established] {
        let bytes = connection.to_array::<PLACE>();
        before
            .set(direct_flow(&connection.key), bytes, 0)
            .expect("a place");
    }
    drop(before);
    pinned.resize(1024);
    let shared: HashMap<MapData, [u8; 44], [u8; 56]> =
        HashMap::try_from(Map::HashMap(pinned.map("FLOWS"))).unwrap();
    for connection in [&opening, &established] {
        for key in [connection.key, connection.reverse_key()] {
            let flow = shared.get(&key.to_array::<44>(), 0).expect("it came along");
            assert_eq!(Flow::from_slice(&flow).flags & FLOW_QUEUED, 0, "{key:?}");
        }
    }
    assert_eq!(shared.iter().count(), 4);
    let mut ageing: Queue<MapData, [u8; 44]> =
        Queue::try_from(Map::Queue(pinned.map("AGEING"))).unwrap();
    let queued = ageing.pop(0).map(|key| FlowKey::from_slice(&key));
    assert_eq!(queued.unwrap(), opening.key);
    assert!(ageing.pop(0).is_err(), "what is established gives no way");
    // Whoever looks for them finds them.
    let after = places(pinned.map("FLOWS_DIRECT"));
    assert_eq!(after.len(), 128);
    let place = after.get(&direct_flow(&opening.key), 0).expect("a place");
    assert_ne!(Connection::from_slice(&place).spilled_s, 0);
}
