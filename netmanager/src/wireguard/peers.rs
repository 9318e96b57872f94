//! Which peers a device should have, and the shortest way there.
//!
//! A peer's endpoint in the table is where its node *says* it listens. A device knows better: it answers to
//! the address that the last authenticated packet came from, which behind a NAT is another. So the table's
//! endpoint is only used for a peer that is new or dead; that of a live one is never overwritten.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use ebpf_common::addr::Mesh6;
use ipnet::{IpNet, Ipv6Net};
use netmanager_api::table::Table;

use super::key::{BadKey, PublicKey};

/// A session older than this carries nothing (`REJECT_AFTER_TIME`, WireGuard whitepaper section 6.1): the
/// peer is dead until a new handshake.
pub const ALIVE: Duration = Duration::from_secs(180);

/// A peer as it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WantedPeer {
    /// Where its node says that it listens.
    pub endpoint: Option<SocketAddr>,
    /// The addresses of its endpoints: its IPv4 blocks and its /96.
    pub allowed: BTreeSet<IpNet>,
}

/// A peer as the device has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PresentPeer {
    /// Where its packets go.
    pub endpoint: Option<SocketAddr>,
    /// The addresses that are routed to it and accepted from it.
    pub allowed: BTreeSet<IpNet>,
    /// How long ago the last handshake was; `None` before the first.
    pub handshake_age: Option<Duration>,
}

impl PresentPeer {
    /// Whether its session can still carry packets.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        self.handshake_age.is_some_and(|age| age < ALIVE)
    }
}

/// One change of a device's peers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PeerOp {
    /// Forgets a peer and its session.
    Remove(PublicKey),
    /// Makes or changes a peer; its session stays.
    Put {
        /// The peer.
        key: PublicKey,
        /// A new endpoint; `None` leaves the one it has.
        endpoint: Option<SocketAddr>,
        /// The whole new set; `None` leaves the one it has.
        allowed: Option<BTreeSet<IpNet>>,
    },
}

/// Why a table's peer cannot be one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadPeer {
    /// Its key is none.
    #[error("peer {name} (node {number})")]
    Key {
        /// `cluster/node`.
        name: String,
        /// Its number.
        number: u32,
        /// What is wrong.
        #[source]
        source: BadKey,
    },
    /// Two peers have one key.
    #[error("peers {first} and {second} have the same public key {key}")]
    SharedKey {
        /// The one that is kept.
        first: String,
        /// The one that is left out.
        second: String,
        /// The key.
        key: PublicKey,
    },
    /// The mesh's prefix is no ULA /48.
    #[error("mesh prefix {0} is not a /48 of fd00::/8")]
    Mesh(Ipv6Net),
}

/// The peers that `table` wants, and those it names that cannot be peers (they are left out, the rest stays).
#[must_use]
pub fn wanted(table: &Table) -> (BTreeMap<PublicKey, WantedPeer>, Vec<BadPeer>) {
    let mut peers = BTreeMap::new();
    let mut bad = Vec::new();
    let mut names: BTreeMap<PublicKey, &str> = BTreeMap::new();
    let prefix = table.mesh.prefix6;
    let Some(mesh) =
        Mesh6::new(prefix.network().to_bits()).filter(|_| prefix.prefix_len() == Mesh6::LEN)
    else {
        return (peers, vec![BadPeer::Mesh(prefix)]);
    };
    for peer in &table.peers {
        let key: PublicKey = match peer.public_key.parse() {
            Ok(key) => key,
            Err(source) => {
                bad.push(BadPeer::Key {
                    name: peer.name.clone(),
                    number: peer.number,
                    source,
                });
                continue;
            }
        };
        if let Some(first) = names.insert(key, &peer.name) {
            names.insert(key, first);
            bad.push(BadPeer::SharedKey {
                first: first.to_owned(),
                second: peer.name.clone(),
                key,
            });
            continue;
        }
        peers.insert(
            key,
            WantedPeer {
                endpoint: peer.endpoint,
                allowed: peer
                    .blocks4
                    .iter()
                    .map(|block| IpNet::V4(*block))
                    .chain([IpNet::V6(node_prefix(mesh, peer.number))])
                    .collect(),
            },
        );
    }
    (peers, bad)
}

/// The /96 of a node's endpoints.
fn node_prefix(mesh: Mesh6, node: u32) -> Ipv6Net {
    Ipv6Net::new_assert(Ipv6Addr::from_bits(mesh.node_base(node)), Mesh6::NODE_LEN)
}

/// The changes that turn `have` into `want`: removals first, so that an address block that moves to another
/// peer is free before that peer asks for it.
#[must_use]
pub fn diff(
    have: &BTreeMap<PublicKey, PresentPeer>,
    want: &BTreeMap<PublicKey, WantedPeer>,
) -> Vec<PeerOp> {
    let gone = have
        .keys()
        .filter(|key| !want.contains_key(key))
        .map(|key| PeerOp::Remove(*key));
    let put = want.iter().filter_map(|(key, want)| {
        let have = have.get(key);
        let endpoint = want.endpoint.filter(|endpoint| {
            have.is_none_or(|have| !have.is_alive() && have.endpoint != Some(*endpoint))
        });
        let allowed = have
            .is_none_or(|have| have.allowed != want.allowed)
            .then(|| want.allowed.clone());
        (have.is_none() || endpoint.is_some() || allowed.is_some()).then_some(PeerOp::Put {
            key: *key,
            endpoint,
            allowed,
        })
    });
    gone.chain(put).collect()
}

/// An endpoint as a device may tell it: an IPv4 address in IPv6 form is the IPv4 address.
#[must_use]
pub(super) fn canonical(endpoint: SocketAddr) -> SocketAddr {
    match endpoint.ip() {
        IpAddr::V6(address) => match address.to_ipv4_mapped() {
            Some(address) => SocketAddr::from((address, endpoint.port())),
            None => endpoint,
        },
        IpAddr::V4(_) => endpoint,
    }
}

#[cfg(test)]
mod tests;
