//! ICMP errors about translated packets.
//!
//! ```text
//!  IP | ICMP | quoted IP | quoted ports
//!              the packet that somebody sent, as it looks on this side of the translation
//! ```
//!
//! The quote, read backwards, is the key under which packets in the *error's* own direction are found. So an
//! error is translated as such a packet is, and its quote as the mirror image. The quoted transport checksum is
//! left alone: receivers match by addresses and ports, and mostly it is not even quoted. The quoted headers may
//! have options or extension headers, as those of any packet; of a fragmented datagram only the first fragment's
//! quote names a flow.

use ebpf_common::{
    layout::{Addr, Config, FLOW_FORWARD, PROTO_ICMP, PROTO_ICMP6, PROTO_TCP, PROTO_UDP},
    reason::Reason,
};

use crate::{
    csum, flow,
    header::{
        ICMP_LEN, ICMP4_ECHO_REPLY, ICMP4_ECHO_REQUEST, ICMP6_ECHO_REPLY, ICMP6_ECHO_REQUEST,
        IPV4_OFFSET, IPV6_LEN, Icmp, Ipv4, Ipv6,
    },
    parse::{Family, Packet, odd},
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
    let quote = packet.l4() + ICMP_LEN;
    skb.pull(quote + odd::DEEPEST);
    packet.quoted = packet.key;
    // Where the outer transport header is, is known; from here on the walk's place is the quote's.
    packet.l4.set(quote);
    find_transport(skb, packet)?;
    let carried = ports(skb, packet)?;
    let found = match flow::find(&packet.quoted) {
        // An error goes to whom sent what it quotes.
        Some(found) if packet.quoted.dst == packet.key.dst => found,
        _ => return Ok(None),
    };
    let flow = found.flow();
    packet.to = if packet.quoted.direction == FLOW_FORWARD {
        flow::translated(config, &packet.quoted, flow)
    } else {
        flow::undone(&packet.quoted, flow)
    };
    rewrite(skb, l2, quote, packet, carried)?;
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

/// Reads the IP header that is quoted at `packet.l4`, backwards, and goes on to what follows it.
#[inline(always)]
fn find_transport(skb: &Skb, packet: &mut Packet) -> Result<(), Reason> {
    let quote = packet.l4();
    match packet.family {
        Family::V4 => {
            let ip = skb.header::<Ipv4>(quote).ok_or(Reason::Malformed)?;
            packet.quoted.src = Addr::from_v4_be(ip.dst);
            packet.quoted.dst = Addr::from_v4_be(ip.src);
            packet.quoted.proto = ip.proto;
            if u16::from_be(ip.fragment_be) & IPV4_OFFSET != 0 {
                return Err(Reason::Fragment);
            }
            packet.l4.set(quote + odd::header4(ip)?);
        }
        Family::V6 => {
            let ip = skb.header::<Ipv6>(quote).ok_or(Reason::Malformed)?;
            packet.quoted.src.words = ip.dst;
            packet.quoted.dst.words = ip.src;
            packet.l4.set(quote + IPV6_LEN);
            packet.next.set(usize::from(ip.next));
            odd::walk(skb, packet)?;
            if packet.is_later() {
                return Err(Reason::Fragment);
            }
            packet.quoted.proto = packet.next.get() as u8;
        }
    }
    Ok(())
}

/// Reads the quoted ports, backwards.
#[inline(always)]
fn ports(skb: &Skb, packet: &mut Packet) -> Result<Inner, Reason> {
    let l4 = packet.l4();
    let key = &mut packet.quoted;
    match (packet.family, key.proto) {
        (_, PROTO_TCP | PROTO_UDP) => {
            let ports = skb.header::<[u16; 2]>(l4).ok_or(Reason::Malformed)?;
            [key.dport_be, key.sport_be] = *ports;
            Ok(Inner::Ports)
        }
        (Family::V4, PROTO_ICMP) | (Family::V6, PROTO_ICMP6) => {
            let icmp = skb.header::<Icmp>(l4).ok_or(Reason::Malformed)?;
            match (packet.family, icmp.kind) {
                (Family::V4, ICMP4_ECHO_REQUEST) | (Family::V6, ICMP6_ECHO_REQUEST) => {
                    key.dport_be = icmp.rest[0];
                }
                (Family::V4, ICMP4_ECHO_REPLY) | (Family::V6, ICMP6_ECHO_REPLY) => {
                    key.sport_be = icmp.rest[0];
                }
                _ => return Err(Reason::Malformed),
            }
            Ok(Inner::Echo)
        }
        _ => Err(Reason::Malformed),
    }
}

#[inline(always)]
fn rewrite(
    skb: &mut Skb,
    l2: usize,
    quote: usize,
    packet: &Packet,
    carried: Inner,
) -> Result<(), Reason> {
    let (key, tuple) = (&packet.quoted, &packet.to);
    let l4 = quote - ICMP_LEN;
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
            ip.check = csum::updated(ip.check, outer + csum::HOP);
            ip.ttl = ip.ttl.wrapping_sub(1);
            ip.src = src.v4_be();
            ip.dst = dst.v4_be();
            let ip = skb.header_mut::<Ipv4>(quote).ok_or(Reason::Internal)?;
            ip.check = csum::updated(ip.check, inner);
            ip.src = tuple.dst.v4_be();
            ip.dst = tuple.src.v4_be();
        }
        Family::V6 => {
            let ip = skb.header_mut::<Ipv6>(l2).ok_or(Reason::Internal)?;
            ip.hops = ip.hops.wrapping_sub(1);
            ip.src = src.words;
            ip.dst = dst.words;
            let ip = skb.header_mut::<Ipv6>(quote).ok_or(Reason::Internal)?;
            ip.src = tuple.dst.words;
            ip.dst = tuple.src.words;
        }
    }
    let l4 = packet.l4();
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
