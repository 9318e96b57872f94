//! ICMP errors about translated packets.
//!
//! ```text
//!  IP | ICMP | quoted IP | quoted ports
//!              the packet that somebody sent, as it looks on this side of the translation
//! ```
//!
//! The quote, read backwards, is the key under which packets in the *error's* own direction are found. So an
//! error is translated as such a packet is, and its quote as the mirror image. The quoted transport checksum is
//! left alone: receivers match by addresses and ports, and mostly it is not even quoted.

use ebpf_common::{
    layout::{Addr, Config, FLOW_FORWARD, FlowKey, PROTO_ICMP, PROTO_ICMP6, PROTO_TCP, PROTO_UDP},
    reason::Reason,
};

use crate::{
    csum, flow,
    header::{
        ICMP_LEN, ICMP4_ECHO_REPLY, ICMP4_ECHO_REQUEST, ICMP6_ECHO_REPLY, ICMP6_ECHO_REQUEST,
        IPV4_FRAGMENT, IPV4_PLAIN, Icmp, Ipv4, Ipv6,
    },
    parse::{Family, Packet},
    skb::{Covers, Skb},
};

/// Translates the error at hand, whose `packet.key` has the direction and endpoint of its flow, and notes in
/// `packet.to` what the flow's own packet would be; `None` where it is about no translated packet.
#[inline(never)]
pub(crate) fn translate(
    skb: &mut Skb,
    l2: usize,
    config: &Config,
    packet: &mut Packet,
) -> Result<Option<()>, Reason> {
    let quote = l2 + packet.family.len() + ICMP_LEN;
    skb.pull(quote + packet.family.len() + ICMP_LEN);
    packet.quoted = packet.key;
    let inner = read(skb, quote, packet.family, &mut packet.quoted).ok_or(Reason::Malformed)?;
    let found = match flow::find(&packet.quoted) {
        // An error goes to whom sent what it quotes.
        Some(found) if packet.quoted.dst == packet.key.dst => found,
        _ => return Ok(None),
    };
    let flow = found.entry.flow();
    packet.to = if packet.quoted.direction == FLOW_FORWARD {
        flow::translated(config, &packet.quoted, flow)
    } else {
        flow::undone(&packet.quoted, flow)
    };
    rewrite(skb, l2, packet, inner)?;
    Ok(Some(()))
}

/// What the quoted packet carries.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Inner {
    /// Source and destination port.
    Ports,
    /// An echo, with its identifier.
    Echo,
}

/// Reads the quote backwards into `key`.
#[inline(always)]
fn read(skb: &Skb, quote: usize, family: Family, key: &mut FlowKey) -> Option<Inner> {
    match family {
        Family::V4 => {
            let ip = skb.header::<Ipv4>(quote)?;
            if ip.version_ihl != IPV4_PLAIN || u16::from_be(ip.fragment_be) & IPV4_FRAGMENT != 0 {
                return None;
            }
            key.src = Addr::from_v4_be(ip.dst);
            key.dst = Addr::from_v4_be(ip.src);
            key.proto = ip.proto;
        }
        Family::V6 => {
            let ip = skb.header::<Ipv6>(quote)?;
            key.src = Addr { words: ip.dst };
            key.dst = Addr { words: ip.src };
            key.proto = ip.next;
        }
    }
    let l4 = quote + family.len();
    match (family, key.proto) {
        (_, PROTO_TCP | PROTO_UDP) => {
            [key.dport_be, key.sport_be] = *skb.header::<[u16; 2]>(l4)?;
            Some(Inner::Ports)
        }
        (Family::V4, PROTO_ICMP) | (Family::V6, PROTO_ICMP6) => {
            let icmp = skb.header::<Icmp>(l4)?;
            match (family, icmp.kind) {
                (Family::V4, ICMP4_ECHO_REQUEST) | (Family::V6, ICMP6_ECHO_REQUEST) => {
                    key.dport_be = icmp.rest[0];
                }
                (Family::V4, ICMP4_ECHO_REPLY) | (Family::V6, ICMP6_ECHO_REPLY) => {
                    key.sport_be = icmp.rest[0];
                }
                _ => return None,
            }
            Some(Inner::Echo)
        }
        _ => None,
    }
}

#[inline(always)]
fn rewrite(skb: &mut Skb, l2: usize, packet: &Packet, carried: Inner) -> Result<(), Reason> {
    let (key, tuple) = (&packet.quoted, &packet.to);
    let l4 = l2 + packet.family.len();
    let quote = l4 + ICMP_LEN;
    // Whoever speaks for an end of the flow speaks for it on the other side too; a router keeps its address.
    let src = if packet.key.src == key.src {
        &tuple.src
    } else {
        &packet.key.src
    };
    let dst = &tuple.dst;
    let outer = csum::difference_of(&packet.key.src.words, &src.words)
        + csum::difference_of(&packet.key.dst.words, &dst.words);
    let inner = csum::difference_of(&key.src.words, &tuple.src.words)
        + csum::difference_of(&key.dst.words, &tuple.dst.words);
    let ports = csum::difference(u32::from(key.sport_be), u32::from(tuple.sport_be))
        + csum::difference(u32::from(key.dport_be), u32::from(tuple.dport_be));
    let quoted = match packet.family {
        // The quoted header's own checksum makes up for its addresses.
        Family::V4 => ports,
        Family::V6 => {
            skb.add_to_checksum(l4 + 2, csum::fold32(outer), Covers::Pseudo, 0)?;
            inner + ports
        }
    };
    skb.add_to_checksum(l4 + 2, csum::fold32(quoted), Covers::Payload, 0)?;
    match packet.family {
        Family::V4 => {
            let ip = skb.header_mut::<Ipv4>(l2).ok_or(Reason::Internal)?;
            ip.check = csum::updated(ip.check, outer);
            ip.src = src.v4_be();
            ip.dst = dst.v4_be();
            let ip = skb.header_mut::<Ipv4>(quote).ok_or(Reason::Internal)?;
            ip.check = csum::updated(ip.check, inner);
            ip.src = tuple.dst.v4_be();
            ip.dst = tuple.src.v4_be();
        }
        Family::V6 => {
            let ip = skb.header_mut::<Ipv6>(l2).ok_or(Reason::Internal)?;
            ip.src = src.words;
            ip.dst = dst.words;
            let ip = skb.header_mut::<Ipv6>(quote).ok_or(Reason::Internal)?;
            ip.src = tuple.dst.words;
            ip.dst = tuple.src.words;
        }
    }
    let l4 = quote + packet.family.len();
    match carried {
        Inner::Ports => {
            let ports = skb.header_mut::<[u16; 2]>(l4).ok_or(Reason::Internal)?;
            *ports = [tuple.dport_be, tuple.sport_be];
        }
        Inner::Echo => {
            // One of the two is zero.
            let id = tuple.sport_be | tuple.dport_be;
            skb.header_mut::<Icmp>(l4).ok_or(Reason::Internal)?.rest[0] = id;
        }
    }
    Ok(())
}
