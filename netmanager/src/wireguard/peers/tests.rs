use netmanager_api::table::{Mesh, Node, Peer, Revision};
use proptest::prelude::*;

use super::*;

fn key(n: u8) -> PublicKey {
    PublicKey([n; 32])
}

fn nets(nets: &[&str]) -> BTreeSet<IpNet> {
    nets.iter().map(|net| net.parse().unwrap()).collect()
}

fn at(endpoint: &str) -> Option<SocketAddr> {
    Some(endpoint.parse().unwrap())
}

fn wanted_peer(endpoint: Option<SocketAddr>, allowed: &[&str]) -> WantedPeer {
    WantedPeer {
        endpoint,
        allowed: nets(allowed),
    }
}

fn present(endpoint: Option<SocketAddr>, allowed: &[&str], age_s: Option<u64>) -> PresentPeer {
    PresentPeer {
        endpoint,
        allowed: nets(allowed),
        handshake_age: age_s.map(Duration::from_secs),
    }
}

fn table(peers: Vec<Peer>) -> Table {
    Table {
        revision: Revision::default(),
        mesh: Mesh {
            prefix6: "fd12:3456:789a::/48".parse().unwrap(),
            prefix4: None,
            seed: 0,
        },
        node: Node {
            number: 1,
            blocks4: Vec::new(),
            carbon_g_kwh: None,
        },
        peers,
        services: Vec::new(),
        spliced: Vec::new(),
    }
}

fn table_peer(number: u32, public_key: &str) -> Peer {
    Peer {
        number,
        name: format!("edge/n{number}"),
        public_key: public_key.to_owned(),
        endpoint: at("192.0.2.2:7000"),
        blocks4: vec!["10.16.0.32/27".parse().unwrap()],
        carbon_g_kwh: None,
    }
}

#[test]
fn a_peer_may_send_from_its_blocks_and_its_96_only() {
    let (peers, bad) = wanted(&table(vec![table_peer(9, &key(7).to_string())]));
    assert_eq!(bad, []);
    let want = wanted_peer(
        at("192.0.2.2:7000"),
        &["10.16.0.32/27", "fd12:3456:789a:0:0:9::/96"],
    );
    assert_eq!(peers, BTreeMap::from([(key(7), want)]));
}

#[test]
fn a_peer_without_a_key_is_named_and_the_others_stay() {
    let (peers, bad) = wanted(&table(vec![
        table_peer(2, "nonsense"),
        table_peer(3, &key(3).to_string()),
        table_peer(4, &key(3).to_string()),
    ]));
    assert_eq!(peers.keys().collect::<Vec<_>>(), [&key(3)]);
    let messages: Vec<_> = bad.iter().map(ToString::to_string).collect();
    assert_eq!(messages[0], "peer edge/n2 (node 2)");
    assert!(
        messages[1].starts_with("peers edge/n3 and edge/n4 have the same"),
        "{messages:?}"
    );
}

#[test]
fn the_endpoint_of_a_live_peer_is_never_overwritten() {
    let old = at("198.51.100.1:40000");
    let new = at("192.0.2.2:7000");
    let put = |endpoint| {
        vec![PeerOp::Put {
            key: key(1),
            endpoint,
            allowed: None,
        }]
    };
    let cases = [
        ("alive", present(old, &["10.16.0.0/27"], Some(0)), vec![]),
        (
            "just alive",
            present(old, &["10.16.0.0/27"], Some(179)),
            vec![],
        ),
        ("dead", present(old, &["10.16.0.0/27"], Some(180)), put(new)),
        (
            "never seen",
            present(old, &["10.16.0.0/27"], None),
            put(new),
        ),
        (
            "dead, right place",
            present(new, &["10.16.0.0/27"], None),
            vec![],
        ),
    ];
    for (name, have, ops) in cases {
        let want = BTreeMap::from([(key(1), wanted_peer(new, &["10.16.0.0/27"]))]);
        assert_eq!(
            diff(&BTreeMap::from([(key(1), have)]), &want),
            ops,
            "{name}"
        );
    }
}

#[test]
fn a_live_peer_is_given_new_blocks_without_touching_its_endpoint() {
    let have = BTreeMap::from([(
        key(1),
        present(at("198.51.100.1:1"), &["10.16.0.0/27"], Some(5)),
    )]);
    let want = BTreeMap::from([(
        key(1),
        wanted_peer(at("192.0.2.2:7000"), &["10.16.0.0/27", "10.16.0.32/27"]),
    )]);
    assert_eq!(
        diff(&have, &want),
        [PeerOp::Put {
            key: key(1),
            endpoint: None,
            allowed: Some(nets(&["10.16.0.0/27", "10.16.0.32/27"])),
        }]
    );
}

#[test]
fn a_peer_of_unknown_place_is_made_and_waited_for() {
    let want = BTreeMap::from([(key(1), wanted_peer(None, &["10.16.0.0/27"]))]);
    assert_eq!(
        diff(&BTreeMap::new(), &want),
        [PeerOp::Put {
            key: key(1),
            endpoint: None,
            allowed: Some(nets(&["10.16.0.0/27"])),
        }]
    );
}

/// What a device does with the changes: the reference model of [`diff`].
fn act(have: &mut BTreeMap<PublicKey, PresentPeer>, ops: &[PeerOp]) {
    for op in ops {
        match op {
            PeerOp::Remove(key) => {
                have.remove(key);
            }
            PeerOp::Put {
                key,
                endpoint,
                allowed,
            } => {
                let peer = have.entry(*key).or_insert(PresentPeer {
                    endpoint: None,
                    allowed: BTreeSet::new(),
                    handshake_age: None,
                });
                peer.endpoint = endpoint.or(peer.endpoint);
                if let Some(allowed) = allowed {
                    peer.allowed.clone_from(allowed);
                }
            }
        }
    }
}

fn endpoints() -> impl Strategy<Value = Option<SocketAddr>> {
    prop::option::of((0u8..3).prop_map(|n| SocketAddr::from(([192, 0, 2, n], 7000))))
}

fn allowed() -> impl Strategy<Value = BTreeSet<IpNet>> {
    prop::collection::btree_set(
        (0u8..4).prop_map(|n| format!("10.16.{n}.0/27").parse().unwrap()),
        0..3,
    )
}

proptest! {
    #[test]
    fn the_changes_lead_to_what_is_wanted_and_then_there_are_none(
        have in prop::collection::btree_map(
            (0u8..5).prop_map(key),
            (endpoints(), allowed(), prop::option::of(0u64..400)).prop_map(
                |(endpoint, allowed, age)| PresentPeer {
                    endpoint,
                    allowed,
                    handshake_age: age.map(Duration::from_secs),
                },
            ),
            0..5,
        ),
        want in prop::collection::btree_map(
            (0u8..5).prop_map(key),
            (endpoints(), allowed())
                .prop_map(|(endpoint, allowed)| WantedPeer { endpoint, allowed }),
            0..5,
        ),
    ) {
        let mut after = have.clone();
        act(&mut after, &diff(&have, &want));
        prop_assert_eq!(after.keys().collect::<Vec<_>>(), want.keys().collect::<Vec<_>>());
        for (key, want) in &want {
            prop_assert_eq!(&after[key].allowed, &want.allowed);
            let live = have.get(key).filter(|have| have.is_alive());
            let endpoint = match live {
                Some(live) => live.endpoint,
                None => want.endpoint.or(have.get(key).and_then(|have| have.endpoint)),
            };
            prop_assert_eq!(after[key].endpoint, endpoint);
        }
        prop_assert_eq!(diff(&after, &want), vec![]);
    }
}
