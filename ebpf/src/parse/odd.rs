//! Headers that few packets have: IPv4 options, IPv6 extension headers, fragments.
//!
//! ```text
//!  IPv4 | options (40 at most) | transport        options are kept; source routes are refused
//!  IPv6 | hop-by-hop | destination options | routing, used up | fragment | transport
//!         8 headers and 256 bytes at most
//! ```
//!
//! The transport header of such a packet stands at an offset of its own ([`Packet::l4`]). The first fragment holds
//! all headers (RFC 7112) and a whole transport header (RFC 1858), else it is refused; the later ones are known by
//! the first ([`crate::fragment`]). Authenticated and encrypted packets (AH, ESP) are another protocol: they cannot
//! be translated. The walks keep their place in map memory ([`crate::maps::Cursor`]), which bounds the verifier's work.

use ebpf_common::reason::Reason;

use super::{Packet, Part};
use crate::{
    header::{ICMP_LEN, IPV4_LEN, IPV6_LEN, Ipv4, TCP_LEN},
    skb::Skb,
};

/// The longest IPv4 header.
const IPV4_MOST: usize = 60;
/// How many IPv6 extension headers are walked, and how many bytes they may have together.
const HEADERS: usize = 8;
const CHAIN: usize = 256;
/// Bytes that are looked at from an IP header on, at most.
pub(crate) const DEEPEST: usize = IPV6_LEN + CHAIN + TCP_LEN;
/// No offset of a header is larger: a chain in the quote of an ICMP error that comes with a chain itself.
pub(crate) const FURTHEST: usize = 0x3ff;
const _: () = assert!(14 + IPV6_LEN + CHAIN + ICMP_LEN + IPV6_LEN + CHAIN <= FURTHEST);

/// IPv4 options (IANA): end of list, no operation, loose and strict source route.
const END: u8 = 0;
const NOTHING: u8 = 1;
const LOOSE_ROUTE: u8 = 131;
const STRICT_ROUTE: u8 = 137;

/// IPv6 extension headers (IANA).
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const DESTINATION: u8 = 60;
const MOBILITY: u8 = 135;
const HIP: u8 = 139;
const SHIM6: u8 = 140;

/// Reads an IPv4 header that is not plain, at `l2`, of a packet that ends at `packet.end`.
#[inline(never)]
pub(super) fn ipv4(skb: &mut Skb, l2: usize, packet: &mut Packet) -> Result<(), Reason> {
    skb.pull(l2 + IPV4_MOST + TCP_LEN);
    let ip = skb.header::<Ipv4>(l2).ok_or(Reason::Malformed)?;
    let (fragment, id_be) = (u16::from_be(ip.fragment_be), ip.id_be);
    let header = header4(ip)?;
    let total = packet.end.wrapping_sub(l2 as u32) as usize;
    if header > total {
        return Err(Reason::Malformed);
    }
    packet.l4.set(l2 + header);
    options(skb, l2, header, packet)?;
    part(
        packet,
        usize::from(fragment & 0x1fff) * 8,
        fragment & 0x2000 != 0,
        u32::from(id_be),
    );
    check_part(packet)
}

/// The length of an IPv4 header.
#[inline(always)]
pub(crate) fn header4(ip: &Ipv4) -> Result<usize, Reason> {
    let header = usize::from(ip.version_ihl & 15) * 4;
    if ip.version_ihl >> 4 == 4 && header >= IPV4_LEN {
        Ok(header)
    } else {
        Err(Reason::Malformed)
    }
}

/// Refuses source routes: they name the real destination, so an address cannot be put in its place (RFC 7126).
#[inline(always)]
fn options(skb: &Skb, l2: usize, header: usize, packet: &mut Packet) -> Result<(), Reason> {
    let at = &mut packet.at;
    at.set(IPV4_LEN);
    for _ in IPV4_LEN..IPV4_MOST {
        let place = at.get() & 0x3f;
        if place >= header {
            return Ok(());
        }
        let kind = skb.octet(l2 + place).ok_or(Reason::Malformed)?;
        match kind {
            END => return Ok(()),
            NOTHING => at.set(place + 1),
            LOOSE_ROUTE | STRICT_ROUTE => return Err(Reason::HeaderChain),
            _ => {
                let len = skb.octet(l2 + place + 1).ok_or(Reason::Malformed)?;
                if len < 2 || place + usize::from(len) > header {
                    return Err(Reason::Malformed);
                }
                at.set(place + usize::from(len));
            }
        }
    }
    Ok(())
}

/// Reads the extension headers of the IPv6 header at `l2`, whose next header stands in `packet.next`.
#[inline(never)]
pub(super) fn ipv6(skb: &mut Skb, l2: usize, packet: &mut Packet) -> Result<(), Reason> {
    skb.pull(l2 + DEEPEST);
    packet.l4.set(l2 + IPV6_LEN);
    walk(skb, packet)?;
    if packet.l4() > packet.end as usize {
        return Err(Reason::Malformed);
    }
    packet.key.proto = packet.next.get() as u8;
    check_part(packet)
}

/// Walks from the header at `packet.l4`, of the kind `packet.next`, to the transport header or a later fragment's
/// data, and leaves both there.
#[inline(never)]
pub(crate) fn walk(skb: &Skb, packet: &mut Packet) -> Result<(), Reason> {
    let first = packet.l4();
    for step in 0..HEADERS {
        let at = packet.l4.get() & FURTHEST;
        let next = packet.next.get() as u8;
        match next {
            HOP_BY_HOP if step > 0 => return Err(Reason::HeaderChain),
            HOP_BY_HOP | DESTINATION | ROUTING => {
                let [after, len, kind, left] =
                    *skb.header::<[u8; 4]>(at).ok_or(Reason::Malformed)?;
                // Type 0 is deprecated (RFC 5095); one that is not used up names the real destination.
                if next == ROUTING && (kind == 0 || left != 0) {
                    return Err(Reason::HeaderChain);
                }
                packet.next.set(usize::from(after));
                packet.l4.set(at + (usize::from(len) + 1) * 8);
            }
            FRAGMENT => {
                let [word, offset_be, high, low] =
                    *skb.header::<[u16; 4]>(at).ok_or(Reason::Malformed)?;
                if packet.part != Part::Whole {
                    return Err(Reason::Fragment);
                }
                let offset = u16::from_be(offset_be);
                packet.next.set(usize::from(word.to_ne_bytes()[0]));
                packet.l4.set(at + 8);
                let [a, b] = high.to_ne_bytes();
                let [c, d] = low.to_ne_bytes();
                part(
                    packet,
                    usize::from(offset & 0xfff8),
                    offset & 1 != 0,
                    u32::from_ne_bytes([a, b, c, d]),
                );
                if packet.is_later() {
                    return Ok(());
                }
            }
            MOBILITY | HIP | SHIM6 => return Err(Reason::HeaderChain),
            _ => return Ok(()),
        }
        if packet.l4.get() > first + CHAIN {
            return Err(Reason::HeaderChain);
        }
    }
    match packet.next.get() as u8 {
        HOP_BY_HOP | ROUTING | FRAGMENT | DESTINATION => Err(Reason::HeaderChain),
        _ => Ok(()),
    }
}

/// Notes which part of a datagram this is.
#[inline(always)]
fn part(packet: &mut Packet, offset: usize, more: bool, id_be: u32) {
    packet.part = match (offset, more) {
        (0, false) => Part::Whole,
        (0, true) => Part::First,
        (_, true) => Part::Later,
        (_, false) => Part::Last,
    };
    packet.offset = offset as u32;
    packet.id_be = id_be;
}

/// Refuses a fragment that cannot be one: all but the last are of whole eight bytes, and no datagram is larger than
/// its length field can say.
#[inline(always)]
fn check_part(packet: &Packet) -> Result<(), Reason> {
    let bytes = packet.end.wrapping_sub(packet.l4.get() as u32);
    let more = matches!(packet.part, Part::First | Part::Later);
    if (more && bytes & 7 != 0) || packet.offset + bytes > 0xffff {
        Err(Reason::Fragment)
    } else {
        Ok(())
    }
}
