//! The places of endpoints follow what the hash maps hold, from one daemon to the next.

use aya::maps::{Array, Map};
use ebpf_common::layout::{Addr, DIRECT_PLACES, Endpoint, direct_link};
use weft_netmanager::{datapath::Datapath, plan::Op};
use weft_tests::{pinned::Pinned, program::bytes::Bytes};

const NOBODY: [u8; 64] = [0; 64];

fn endpoint(number: u32) -> Endpoint {
    Endpoint {
        addr6: Addr::from_v6((0xfd << 120) | u128::from(number)),
        addr4: Addr::from_v4(0x0a10_0000 | number),
        number,
        ifindex: 100 + number,
        ..Endpoint::default()
    }
}

fn puts(endpoint: Endpoint) -> [Op; 3] {
    [
        Op::Local(endpoint.addr6, Some(endpoint)),
        Op::Local(endpoint.addr4, Some(endpoint)),
        Op::Endpoint(endpoint.ifindex, Some(endpoint)),
    ]
}

/// Where an endpoint would stand: the map and the place, three times.
fn places(endpoint: &Endpoint) -> [(&'static str, u32); 3] {
    [
        ("LOCAL_DIRECT", endpoint.addr6.direct()),
        ("LOCAL_DIRECT", endpoint.addr4.direct()),
        ("ENDPOINTS_DIRECT", direct_link(endpoint.ifindex)),
    ]
}

fn array(pinned: &Pinned, name: &str) -> Array<aya::maps::MapData, [u8; 64]> {
    Map::Array(pinned.map(name))
        .try_into()
        .expect("an array of endpoints")
}

fn read(pinned: &Pinned, endpoint: &Endpoint) -> [[u8; 64]; 3] {
    places(endpoint).map(|(name, place)| array(pinned, name).get(&place, 0).expect("a place"))
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_place_follows_its_endpoint_and_is_nobodys_afterwards() {
    let mut pinned = Pinned::open();
    let first = endpoint(3);
    let changed = Endpoint { flags: 2, ..first };
    // It would stand where the first does, in all three.
    let twin = endpoint(3 + DIRECT_PLACES);
    for wanted in [first, changed] {
        pinned.datapath().apply(&puts(wanted)).expect("room");
        assert_eq!(read(&pinned, &first), [wanted.to_array::<64>(); 3]);
    }
    pinned.datapath().apply(&puts(twin)).expect("room");
    assert_eq!(places(&first), places(&twin));
    assert_eq!(read(&pinned, &first), [changed.to_array::<64>(); 3]);
    let gone = |endpoint: &Endpoint| {
        [
            Op::Endpoint(endpoint.ifindex, None),
            Op::Local(endpoint.addr6, None),
            Op::Local(endpoint.addr4, None),
        ]
    };
    pinned
        .datapath()
        .apply(&gone(&twin))
        .expect("they are there");
    assert_eq!(read(&pinned, &first), [changed.to_array::<64>(); 3]);
    pinned
        .datapath()
        .apply(&gone(&first))
        .expect("they are there");
    assert_eq!(read(&pinned, &first), [NOBODY; 3]);
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn the_next_daemon_puts_places_right() {
    let mut pinned = Pinned::open();
    let (there, gone) = (endpoint(3), endpoint(4));
    pinned.datapath().apply(&puts(there)).expect("room");
    for (name, place) in places(&gone) {
        let mut array = array(&pinned, name);
        array.set(place, gone.to_array::<64>(), 0).expect("a place");
    }
    for (name, place) in places(&there) {
        array(&pinned, name).set(place, NOBODY, 0).expect("a place");
    }
    pinned.open_again();
    assert_eq!(read(&pinned, &there), [there.to_array::<64>(); 3]);
    assert_eq!(read(&pinned, &gone), [NOBODY; 3]);
}
