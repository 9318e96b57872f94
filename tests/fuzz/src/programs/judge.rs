//! What may become of a packet: the mesh's rules (DESIGN section 4), written without looking at the programs.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use ebpf_common::{
    addr::{ECHO_PORT, NODE_ENDPOINT, Name4, Name6},
    layout::PATH_PORT,
};
use weft_tests::program::{
    DROPPED, Outcome, REDIRECTED,
    stage::{
        Family, NODE, REMOTE_NODE, TARGET, TUNNEL_MTU, endpoint_address, mesh4, mesh6, receiver,
        vip_address,
    },
    wire::{self, Layout, TCP, UDP},
};

use super::SERVICES;

/// The MAC addresses of a frame that a pod sends: its gateway's and its own.
const GATEWAY: [u8; 12] = [2, 0, 0, 9, 9, 9, 2, 0, 0, 8, 8, 8];

/// Where a packet comes from or goes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Place {
    Pod(u32),
    Tunnel,
}

/// Ends of a packet, without the ports where there are none.
type Tuple = (IpAddr, IpAddr, u8, [u16; 2]);

/// What all fragments of a datagram have: its sender, both addresses, identification and protocol.
type Datagram = (Place, IpAddr, IpAddr, u32, u8);

/// What is known of a sequence so far.
#[derive(Debug, Default)]
pub(super) struct Judge {
    /// Backends that are dead, by the local endpoint's number, 0 for the other node's.
    dead: BTreeSet<u32>,
    /// What a client asked a VIP, with the client.
    asked: BTreeSet<(Tuple, u32)>,
    /// Datagrams that were delivered as they were sent.
    delivered: BTreeSet<Tuple>,
    /// What became of first fragments: where they went, as whose.
    firsts: BTreeMap<Datagram, (Place, IpAddr, IpAddr)>,
}

/// A packet that went somewhere: who sent it, what it was, where it went, what it is.
struct Moved<'a> {
    from: Place,
    was: &'a Layout,
    sent: &'a [u8],
    to: Place,
    is: &'a Layout,
    seen: &'a [u8],
}

impl Judge {
    pub(super) fn turned(&mut self, backend: u32, flags: u32) {
        if flags == 0 {
            self.dead.insert(backend);
        } else {
            self.dead.remove(&backend);
        }
    }

    /// Judges what became of a packet; where it was delivered to and how it looked there, if somebody can answer it.
    ///
    /// # Panics
    ///
    /// When it broke a rule.
    pub(super) fn judge(
        &mut self,
        from: Place,
        sent: &[u8],
        outcome: &Outcome,
    ) -> Option<(Place, Vec<u8>)> {
        if outcome.action == DROPPED {
            return None;
        }
        assert_eq!(outcome.action, REDIRECTED, "{sent:02x?}");
        let story = || format!("{from:?} sent {sent:02x?}, out came {:02x?}", outcome.bytes);
        let was = wire::walk(sent).unwrap_or_else(|error| panic!("{error}: {}", story()));
        // An answer into the tunnel has no Ethernet header; ours begin with a MAC address that is no IP version.
        let ethernet = match (from, outcome.bytes[0] >> 4) {
            (Place::Tunnel, 4 | 6) => 0,
            _ => 14,
        };
        let (ethernet, seen) = outcome.bytes.split_at(ethernet);
        let is = wire::walk(seen).unwrap_or_else(|error| panic!("{error}: {}", story()));
        if wire::check(sent).is_ok() {
            wire::check(seen).unwrap_or_else(|error| panic!("{error}: {}", story()));
        }
        if let Place::Pod(number) = from {
            assert_eq!(was.src, local(&was, number), "spoofed: {}", story());
        }
        if ethernet.is_empty() {
            assert!(is_expiry(&was, &is, sent, seen), "{}", story());
            return None;
        }
        let turned = [&GATEWAY[6..], &GATEWAY[..6]].concat();
        if ethernet[..12] == turned[..] {
            let Place::Pod(number) = from else {
                panic!("the tunnel was answered: {}", story());
            };
            assert!(is_answer(&was, &is, seen, number), "{}", story());
            return None;
        }
        let to = match receiver(&outcome.bytes) {
            0 => {
                assert_eq!(ethernet[..12], GATEWAY, "{}", story());
                Place::Tunnel
            }
            number => Place::Pod(number),
        };
        let hops = [sent, seen].map(wire::hops);
        assert!(
            hops[0] > 1 && hops[1] == hops[0] - 1,
            "a hop is one less: {}",
            story()
        );
        let moved = Moved {
            from,
            was: &was,
            sent,
            to,
            is: &is,
            seen,
        };
        if let Err(rule) = self.allows(&moved) {
            panic!("{rule}: {}", story());
        }
        Some((to, seen[..is.l4.end].to_vec()))
    }

    /// Whether a packet that was delivered may have been.
    fn allows(&mut self, moved: &Moved<'_>) -> Result<(), &'static str> {
        let Moved {
            from, was, is, to, ..
        } = *moved;
        match to {
            Place::Tunnel if from == Place::Tunnel => return Err("out of a tunnel into a tunnel"),
            Place::Tunnel if !is_remote(is.dst) => return Err("to nobody behind the tunnel"),
            Place::Tunnel if is.l4.end > TUNNEL_MTU as usize => {
                return Err("too big for the tunnel");
            }
            Place::Pod(number) if is.dst != local(is, number) => {
                return Err("to another than its destination");
            }
            _ => {}
        }
        if from == Place::Tunnel && !is_remote(was.src) {
            return Err("the tunnel brought a foreign source");
        }
        if let Some((offset, _)) = was.fragment {
            // Of IPv6, only the first fragment's word on what it carries counts.
            let proto = if was.src.is_ipv4() { was.proto } else { 0 };
            let datagram = (from, was.src, was.dst, was.id, proto);
            let became = (to, is.src, is.dst);
            if offset == 0 {
                self.firsts.insert(datagram, became);
            } else if self.firsts.get(&datagram) != Some(&became) {
                return Err("a fragment went another way than its first one");
            }
        }
        if let Some(backends) = backends(was.dst) {
            return self.allows_to_vip(moved, backends);
        }
        if backends(is.src).is_some() {
            return self.allows_from_vip(moved);
        }
        self.allows_directly(moved)
    }

    /// A client's packet to a VIP, at a backend.
    fn allows_to_vip(&mut self, moved: &Moved<'_>, backends: &[u32]) -> Result<(), &'static str> {
        let Place::Pod(client) = moved.from else {
            return Err("the tunnel brought a packet to a VIP");
        };
        let backend = match moved.to {
            Place::Pod(number) => number,
            Place::Tunnel if moved.is.dst == remote(moved.is, 2) => 0,
            Place::Tunnel => return Err("to no backend"),
        };
        if !backends.contains(&backend) {
            return Err("to a pod that is no backend of the VIP");
        }
        let error = is_error(moved.was, moved.sent);
        // What is left of a datagram goes where its first fragment went.
        let rest = matches!(moved.was.fragment, Some((1.., _)));
        if self.dead.contains(&backend) && !error && !rest {
            return Err("to a dead backend");
        }
        let hairpin = backend == client;
        let own = local(moved.is, if hairpin { NODE_ENDPOINT } else { client });
        if moved.is.src != own {
            return Err("to a backend from another than the client");
        }
        if let Some(tuple) = tuple(moved.was, moved.sent) {
            let target = match moved.was.proto {
                TCP | UDP => TARGET,
                _ => 0,
            };
            let ports = ports(moved.is, moved.seen);
            if !error && ports.is_some_and(|[_, port]| port != target) {
                return Err("to another port than the service's");
            }
            self.asked.insert((tuple, client));
        }
        Ok(())
    }

    /// A backend's packet, as the VIP's, at a client.
    fn allows_from_vip(&self, moved: &Moved<'_>) -> Result<(), &'static str> {
        let Place::Pod(client) = moved.to else {
            return Err("a VIP is a source in the tunnel");
        };
        let backend = match moved.from {
            Place::Pod(number) => number,
            Place::Tunnel => 0,
        };
        if !backends(moved.is.src).is_some_and(|all| all.contains(&backend)) {
            return Err("in the name of a VIP by no backend of it");
        }
        if is_error(moved.was, moved.sent) {
            return Ok(());
        }
        let Some((src, dst, proto, [sport, dport])) = tuple(moved.is, moved.seen) else {
            return Ok(());
        };
        if self
            .asked
            .contains(&((dst, src, proto, [dport, sport]), client))
        {
            Ok(())
        } else {
            Err("an answer of a VIP to what nobody asked")
        }
    }

    /// From endpoint to endpoint, untranslated.
    fn allows_directly(&mut self, moved: &Moved<'_>) -> Result<(), &'static str> {
        let Moved { was, is, .. } = *moved;
        if (was.src, was.dst) != (is.src, is.dst) {
            return Err("translated without a VIP");
        }
        let tuple = tuple(was, moved.sent);
        let is_answer = match (was.proto, tuple) {
            (UDP, Some((src, dst, proto, [sport, dport]))) => {
                self.delivered.contains(&(dst, src, proto, [dport, sport]))
            }
            (TCP, _) if was.fragment.is_none_or(|(offset, _)| offset == 0) => {
                moved.sent[was.l4.start + 13] & 0x12 != 2
            }
            (1 | 58, _) if was.fragment.is_none_or(|(offset, _)| offset == 0) => {
                !matches!(moved.sent[was.l4.start], 8 | 128)
            }
            _ => true,
        };
        let may = match moved.from {
            Place::Tunnel if moved.to == Place::Pod(NODE_ENDPOINT) => {
                is_for_host(was, moved.sent) || is_answer && was.proto != UDP
            }
            Place::Tunnel => true,
            Place::Pod(number) => number == NODE_ENDPOINT || is_answer,
        };
        if !may {
            return Err("called an endpoint directly");
        }
        if let (UDP, Some(tuple)) = (was.proto, tuple) {
            self.delivered.insert(tuple);
        }
        Ok(())
    }
}

fn family(layout: &Layout) -> Family {
    match layout.src {
        IpAddr::V4(_) => Family::V4,
        IpAddr::V6(_) => Family::V6,
    }
}

/// The address of a local endpoint, in a packet's family.
fn local(layout: &Layout, number: u32) -> IpAddr {
    endpoint_address(family(layout), NODE, number)
}

fn remote(layout: &Layout, number: u32) -> IpAddr {
    endpoint_address(family(layout), REMOTE_NODE, number)
}

/// Whether an address is an endpoint's of the mesh and not one of this node's.
fn is_remote(address: IpAddr) -> bool {
    let here = [NODE_ENDPOINT, 2, 3, 4];
    match address {
        IpAddr::V4(v4) => {
            matches!(mesh4().decode(v4.to_bits()), Some(Name4::Endpoint { .. }))
                && here
                    .iter()
                    .all(|&number| endpoint_address(Family::V4, NODE, number) != address)
        }
        IpAddr::V6(v6) => {
            matches!(mesh6().decode(v6.to_bits()), Some(Name6::Endpoint { node, .. }) if node != NODE)
        }
    }
}

/// The backends of a VIP; `None` for what is none, or that this node does not know.
fn backends(address: IpAddr) -> Option<&'static [u32]> {
    let family = match address {
        IpAddr::V4(_) => Family::V4,
        IpAddr::V6(_) => Family::V6,
    };
    SERVICES
        .iter()
        .find(|(service, policy, _)| vip_address(family, *policy, *service) == address)
        .map(|&(_, _, backends)| backends)
}

/// Ports of a packet that carries them, or the identifier of an echo where a port would be.
fn ports(layout: &Layout, packet: &[u8]) -> Option<[u16; 2]> {
    if layout.fragment.is_some_and(|(offset, _)| offset != 0) {
        return None;
    }
    let l4 = packet.get(layout.l4.clone())?;
    let word = |at: usize| Some(u16::from_be_bytes([*l4.get(at)?, *l4.get(at + 1)?]));
    match (layout.proto, *l4.first()?) {
        (TCP | UDP, _) => Some([word(0)?, word(2)?]),
        (1, 8) | (58, 128) => Some([word(4)?, 0]),
        (1, 0) | (58, 129) => Some([0, word(4)?]),
        _ => None,
    }
}

fn tuple(layout: &Layout, packet: &[u8]) -> Option<Tuple> {
    let ports = ports(layout, packet)?;
    Some((layout.src, layout.dst, layout.proto, ports))
}

fn is_error(layout: &Layout, packet: &[u8]) -> bool {
    match (layout.proto, packet.get(layout.l4.start)) {
        (1, Some(kind)) => matches!(kind, 3 | 11 | 12),
        (58, Some(kind)) => matches!(kind, 1..=4),
        _ => false,
    }
}

/// Whether the host behind the node endpoint hears a peer: probes, echoes, and the rest of what began as one.
fn is_for_host(layout: &Layout, packet: &[u8]) -> bool {
    let is_rest = matches!(layout.fragment, Some((1.., _)));
    match ports(layout, packet) {
        _ if is_rest => true,
        Some([_, port]) if layout.proto == UDP => matches!(port, ECHO_PORT | PATH_PORT),
        _ => matches!(layout.proto, 1 | 58),
    }
}

/// Whether a packet tells a remote endpoint that its packet's last hop was used up here.
fn is_expiry(was: &Layout, is: &Layout, sent: &[u8], seen: &[u8]) -> bool {
    let kind = match family(was) {
        Family::V4 => 11,
        Family::V6 => 3,
    };
    let from_here = is.src == local(is, NODE_ENDPOINT);
    wire::hops(sent) <= 1
        && is_remote(was.src)
        && is.dst == was.src
        && from_here
        && seen[is.l4.start] == kind
}

/// Whether a packet is an answer of the node to the pod that sent one: a reset or an ICMP error, to its own address.
fn is_answer(was: &Layout, is: &Layout, seen: &[u8], sender: u32) -> bool {
    let to_sender = is.dst == local(is, sender);
    let from_there = is.src == was.dst || is.src == local(is, NODE_ENDPOINT);
    let reset = is.proto == TCP && seen[is.l4.start + 13] & 4 != 0;
    to_sender && from_there && (reset || is_error(is, seen))
}
