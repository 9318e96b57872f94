//! From one tunnel device to the next without losing a packet.
//!
//! ```text
//!  node A   old device, key, port <==========> old device of B      both accept on both, all the time
//!           next device, key, port <---------> next device of B     each sends on the next once all answer there
//! ```
//!
//! A generation is a device with a key and a port of its own, beside the one before. A node that begins one tells
//! its key to the leads as ever; a peer in whose table that key arrives, while the old one still lives, begins a
//! generation too. So no session is ever replaced: the old device keeps the peers that it has ([`held`]), the
//! next one has those of the table, and the old one is removed when nothing comes in by it any more.
//!
//! What is here decides; the keeper in the daemon acts.

use std::{collections::BTreeMap, time::Duration};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::{
    PeerReport,
    key::PublicKey,
    peers::{PresentPeer, WantedPeer},
};

type Present = BTreeMap<PublicKey, PeerReport>;
type Wanted = BTreeMap<PublicKey, WantedPeer>;

/// Which devices a node has; kept on disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Generations {
    /// The number of the device that all peers know.
    pub current: u32,
    /// Whether there is a next one.
    pub is_moving: bool,
    /// Whether the next one sends.
    pub is_switched: bool,
}

/// What names a peer for all its keys: its IPv6 prefix.
fn node_of<'a>(allowed: impl IntoIterator<Item = &'a IpNet>) -> Option<IpNet> {
    allowed
        .into_iter()
        .find(|net| matches!(net, IpNet::V6(_)))
        .copied()
}

fn by_node(present: &Present) -> BTreeMap<IpNet, (&PublicKey, &PeerReport)> {
    present
        .iter()
        .filter_map(|(key, peer)| Some((node_of(&peer.allowed)?, (key, peer))))
        .collect()
}

fn is_alive(peer: &PeerReport) -> bool {
    PresentPeer::from(peer.clone()).is_alive()
}

/// Whether a living peer of a device is wanted under another key: it has begun a generation.
#[must_use]
pub fn has_moved(present: &Present, wanted: &Wanted) -> bool {
    let nodes = by_node(present);
    wanted.iter().any(|(key, peer)| {
        node_of(&peer.allowed)
            .and_then(|node| nodes.get(&node))
            .is_some_and(|(known, peer)| *known != key && is_alive(peer))
    })
}

/// The peers of a device that a next one is beside: who is there stays under the key that it has, who is new comes,
/// and who is wanted no more goes.
#[must_use]
pub fn held(present: &Present, wanted: &Wanted) -> Wanted {
    let nodes = by_node(present);
    wanted
        .iter()
        .map(|(key, peer)| {
            let known = node_of(&peer.allowed).and_then(|node| nodes.get(&node));
            match known {
                Some((old, _)) if *old != key => {
                    let stays = WantedPeer {
                        endpoint: None,
                        allowed: peer.allowed.clone(),
                    };
                    (**old, stays)
                }
                _ => (*key, peer.clone()),
            }
        })
        .collect()
}

/// How old a handshake must be before anything is sent over it: both sides have then heard each other by it, more
/// than once. The side that answered a handshake knows only by the first packet that the other has its keys
/// (WireGuard whitepaper section 5.1).
const SETTLED: Duration = Duration::from_millis(2_500);

/// Whether the next device may send: every peer that lives on the old one has answered there, and not just now.
#[must_use]
pub fn is_ready(old: &Present, next: &Present) -> bool {
    let there = by_node(next);
    by_node(old)
        .into_iter()
        .filter(|(_, (_, peer))| is_alive(peer))
        .all(|(node, _)| {
            there.get(&node).is_some_and(|(_, peer)| {
                is_alive(peer) && peer.handshake_age.is_some_and(|age| age >= SETTLED)
            })
        })
}

/// Bytes that came in by a device.
#[must_use]
pub fn received(present: &Present) -> u64 {
    present.values().map(|peer| peer.rx_bytes).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    const YOUNG: Option<Duration> = Some(Duration::from_secs(9));

    fn net(node: u32) -> IpNet {
        format!("fd12:3456:789a:0:0:{node}::/96").parse().unwrap()
    }

    fn present(peers: &[(u8, u32, Option<Duration>)]) -> Present {
        peers
            .iter()
            .map(|&(key, node, handshake_age)| {
                let peer = PeerReport {
                    endpoint: None,
                    allowed: ["10.16.0.0/27".parse().unwrap(), net(node)].into(),
                    handshake_age,
                    rx_bytes: 5,
                    tx_bytes: 7,
                };
                (PublicKey([key; 32]), peer)
            })
            .collect()
    }

    fn wanted(peers: &[(u8, u32)]) -> Wanted {
        peers
            .iter()
            .map(|&(key, node)| {
                let peer = WantedPeer {
                    endpoint: Some("192.0.2.1:1".parse().unwrap()),
                    allowed: [net(node)].into(),
                };
                (PublicKey([key; 32]), peer)
            })
            .collect()
    }

    #[test]
    fn a_living_peer_with_another_key_has_moved_and_a_dead_one_is_only_replaced() {
        let table = wanted(&[(9, 1), (2, 2)]);
        for (age, want) in [
            (YOUNG, true),
            (None, false),
            (Some(Duration::from_hours(1)), false),
        ] {
            let device = present(&[(1, 1, age), (2, 2, YOUNG)]);
            assert_eq!(has_moved(&device, &table), want, "{age:?}");
        }
        assert!(!has_moved(&present(&[(9, 1, YOUNG)]), &table));
        assert!(!has_moved(&Present::new(), &table));
    }

    #[test]
    fn the_old_device_keeps_keys_takes_new_nodes_and_lets_go_of_who_is_wanted_no_more() {
        let device = present(&[(1, 1, YOUNG), (2, 2, YOUNG), (3, 3, YOUNG)]);
        let held = held(&device, &wanted(&[(9, 1), (2, 2), (4, 4)]));
        let keys: Vec<u8> = held.keys().map(|key| key.0[0]).collect();
        assert_eq!(keys, [1, 2, 4]);
        assert_eq!(
            held[&PublicKey([1; 32])].endpoint,
            None,
            "it stays where it is"
        );
    }

    #[test]
    fn the_next_device_sends_once_every_living_peer_has_answered_there() {
        let old = present(&[(1, 1, YOUNG), (2, 2, None)]);
        assert!(!is_ready(&old, &present(&[])));
        assert!(!is_ready(&old, &present(&[(9, 1, None)])));
        let now = Some(Duration::from_secs(1));
        assert!(
            !is_ready(&old, &present(&[(9, 1, now)])),
            "it may not have the keys yet"
        );
        assert!(
            is_ready(&old, &present(&[(9, 1, YOUNG)])),
            "2 is dead on both"
        );
        assert!(
            is_ready(&present(&[]), &present(&[])),
            "a node without peers"
        );
    }
}
