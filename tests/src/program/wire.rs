//! Packets as bytes, with all that their headers can hold: IPv4 options, IPv6 extension headers, fragments.
//!
//! [`super::packet`] writes and reads what most tests need; properties and fuzzing need the rest. Reading here is
//! written for itself, apart from the programs' own, so that it can judge what they make.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    ops::Range,
};

use super::packet::{check_offset, fold, sum, transport_sum};

/// TCP's number.
pub const TCP: u8 = 6;
/// UDP's number.
pub const UDP: u8 = 17;
/// The IPv6 fragment header's number.
pub const FRAGMENT: u8 = 44;
/// TCP's option kind for the largest segment (RFC 9293 section 3.2).
const MSS: u8 = 2;

/// Where things stand in a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Source address.
    pub src: IpAddr,
    /// Destination address.
    pub dst: IpAddr,
    /// The transport protocol.
    pub proto: u8,
    /// The transport header and what it carries.
    pub l4: Range<usize>,
    /// Offset in bytes and whether more follow, of a packet that is not whole.
    pub fragment: Option<(usize, bool)>,
    /// Identification of the datagram that a fragment is of; 0 for a whole packet.
    pub id: u32,
    /// Whether there are IPv4 options or IPv6 extension headers.
    pub is_long: bool,
}

/// Reads the IP headers.
///
/// # Errors
///
/// A length that contradicts another, or a chain of headers that does not end.
pub fn walk(packet: &[u8]) -> Result<Layout, String> {
    match packet.first().map(|first| first >> 4) {
        Some(4) => walk4(packet),
        Some(6) => walk6(packet),
        _ => Err("neither IPv4 nor IPv6".into()),
    }
}

fn walk4(packet: &[u8]) -> Result<Layout, String> {
    let header = packet.first_chunk::<20>().ok_or("short IPv4 header")?;
    let length = usize::from(header[0] & 15) * 4;
    let total = usize::from(u16::from_be_bytes([header[2], header[3]]));
    if length < 20 || total < length || total > packet.len() {
        return Err(format!(
            "IPv4 header of {length}, packet of {total} in {} bytes",
            packet.len()
        ));
    }
    let word = u16::from_be_bytes([header[6], header[7]]);
    let (offset, more) = (usize::from(word & 0x1fff) * 8, word & 0x2000 != 0);
    let octets = |at: usize| {
        IpAddr::V4(Ipv4Addr::new(
            header[at],
            header[at + 1],
            header[at + 2],
            header[at + 3],
        ))
    };
    Ok(Layout {
        src: octets(12),
        dst: octets(16),
        proto: header[9],
        l4: length..total,
        fragment: (offset != 0 || more).then_some((offset, more)),
        id: if offset != 0 || more {
            u32::from(u16::from_be_bytes([header[4], header[5]]))
        } else {
            0
        },
        is_long: length > 20,
    })
}

fn walk6(packet: &[u8]) -> Result<Layout, String> {
    let header = packet.first_chunk::<40>().ok_or("short IPv6 header")?;
    let end = 40 + usize::from(u16::from_be_bytes([header[4], header[5]]));
    if end > packet.len() {
        return Err(format!("IPv6 packet of {end} in {} bytes", packet.len()));
    }
    let octets = |at: usize| -> IpAddr {
        let octets: [u8; 16] = header[at..at + 16].try_into().expect("sixteen octets");
        Ipv6Addr::from(octets).into()
    };
    let (mut proto, mut at, mut fragment, mut id) = (header[6], 40, None, 0);
    loop {
        let length = match proto {
            0 | 43 | 60 | 135 => {
                let bytes = packet[at..end].first_chunk::<2>();
                8 + 8 * usize::from(bytes.ok_or("short extension header")?[1])
            }
            FRAGMENT => {
                let bytes = packet[at..end].first_chunk::<8>();
                let bytes = bytes.ok_or("short fragment header")?;
                let word = u16::from_be_bytes([bytes[2], bytes[3]]);
                fragment = Some((usize::from(word & 0xfff8), word & 1 != 0));
                id = u32::from_be_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]);
                8
            }
            _ => break,
        };
        if at + length > end {
            return Err("extension header longer than the packet".into());
        }
        proto = packet[at];
        at += length;
        if fragment.is_some_and(|(offset, _)| offset != 0) {
            break;
        }
    }
    Ok(Layout {
        src: octets(8),
        dst: octets(24),
        proto,
        l4: at..end,
        fragment,
        id,
        is_long: at > 40,
    })
}

/// Reads a packet and checks every checksum that it carries whole.
///
/// # Errors
///
/// What is wrong with it.
pub fn check(packet: &[u8]) -> Result<Layout, String> {
    let layout = walk(packet)?;
    if layout.src.is_ipv4() {
        let length = usize::from(packet[0] & 15) * 4;
        if fold(sum(&packet[..length])) != 0xffff {
            return Err("IPv4 header checksum".into());
        }
    }
    let l4 = &packet[layout.l4.clone()];
    if layout.fragment.is_some_and(|part| part != (0, false)) {
        return Ok(layout);
    }
    let header = match (layout.proto, layout.src) {
        (TCP, _) => l4.get(12).map(|offset| usize::from(offset >> 4) * 4),
        (UDP, _) | (1, IpAddr::V4(_)) | (58, IpAddr::V6(_)) => Some(8),
        _ => return Ok(layout),
    };
    let least = if layout.proto == TCP { 20 } else { 8 };
    if header.is_none_or(|header| header < least || header > l4.len()) {
        return Err(format!("protocol {} in {} bytes", layout.proto, l4.len()));
    }
    let mut covered = l4;
    if layout.proto == UDP {
        let length = usize::from(u16::from_be_bytes([l4[4], l4[5]]));
        if length < 8 || length > l4.len() {
            return Err(format!("a datagram of {length} in {} bytes", l4.len()));
        }
        covered = &l4[..length];
        if l4[6..8] == [0, 0] {
            return Ok(layout);
        }
    }
    let sum = fold(transport_sum(layout.src, layout.dst, layout.proto, covered));
    if sum != 0xffff {
        return Err(format!("transport checksum is off by {:#x}", !sum));
    }
    Ok(layout)
}

/// Puts the checksums of a packet right, so far as they are known; a UDP checksum of zero ("none") stays.
///
/// # Panics
///
/// When its headers contradict each other.
pub fn seal(packet: &mut [u8]) {
    if packet[0] >> 4 == 4 {
        let length = usize::from(packet[0] & 15) * 4;
        packet[10..12].fill(0);
        let check = !fold(sum(&packet[..length]));
        packet[10..12].copy_from_slice(&check.to_be_bytes());
    }
    let layout = walk(packet).expect("headers that agree");
    let at = check_offset(layout.proto);
    let l4 = &mut packet[layout.l4.clone()];
    let is_part = layout.fragment.is_some_and(|part| part != (0, false));
    let is_known = matches!(layout.proto, 1 | TCP | UDP | 58) && l4.len() >= at + 2;
    if is_part || !is_known || layout.proto == UDP && l4[at..at + 2] == [0, 0] {
        return;
    }
    l4[at..at + 2].fill(0);
    let check = match (
        !fold(transport_sum(layout.src, layout.dst, layout.proto, l4)),
        layout.proto,
    ) {
        (0, UDP) => 0xffff,
        (check, _) => check,
    };
    l4[at..at + 2].copy_from_slice(&check.to_be_bytes());
}

/// What an exact echo of a packet would be: the same bytes with both ends exchanged, an echo request as the reply.
///
/// # Panics
///
/// When its headers contradict each other.
#[must_use]
pub fn mirrored(packet: &[u8]) -> Vec<u8> {
    let layout = walk(packet).expect("headers that agree");
    let mut out = packet.to_vec();
    let (at, size) = if out[0] >> 4 == 4 { (12, 4) } else { (8, 16) };
    exchange(&mut out[at..at + 2 * size], size);
    if layout.fragment.is_some_and(|(offset, _)| offset != 0) {
        return out;
    }
    let l4 = &mut out[layout.l4];
    match layout.proto {
        TCP | UDP => exchange(&mut l4[..4], 2),
        1 | 58 => {
            let (kind, answer) = match l4[0] {
                8 => (8, 0),
                0 => (0, 8),
                128 => (128, 129),
                129 => (129, 128),
                other => (other, other),
            };
            l4[0] = answer;
            // RFC 1624, equation 3.
            let old = u16::from_be_bytes([l4[2], l4[3]]);
            let [was, is] = [kind, answer].map(|kind| u64::from(kind) << 8);
            let check = !fold(u64::from(!old) + (0xffff - was) + is);
            l4[2..4].copy_from_slice(&check.to_be_bytes());
        }
        _ => {}
    }
    out
}

/// A packet in two fragments, the second with what follows the first `at` bytes of the transport's.
///
/// # Panics
///
/// When its headers contradict each other, or `at` is no place to cut.
#[must_use]
pub fn fragments(packet: &[u8], at: usize, id: u32) -> [Vec<u8>; 2] {
    let layout = walk(packet).expect("headers that agree");
    assert!(at > 0 && at.is_multiple_of(8) && at < layout.l4.len());
    let (headers, l4) = packet[..layout.l4.end].split_at(layout.l4.start);
    [(0, &l4[..at]), (at, &l4[at..])].map(|(offset, part)| {
        let more = u16::from(offset == 0);
        let offset = u16::try_from(offset).expect("a place in a packet");
        let mut out = headers.to_vec();
        if layout.src.is_ipv4() {
            let [_, _, high, low] = id.to_be_bytes();
            out[4..6].copy_from_slice(&[high, low]);
            out[6..8].copy_from_slice(&((offset / 8) | (more << 13)).to_be_bytes());
        } else {
            // Who names the transport, names the fragment header instead.
            let mut naming = 6;
            let mut header = 40;
            while header < out.len() {
                naming = header;
                header += 8 + 8 * usize::from(out[header + 1]);
            }
            out[naming] = FRAGMENT;
            out.extend([layout.proto, 0]);
            out.extend((offset | more).to_be_bytes());
            out.extend(id.to_be_bytes());
        }
        out.extend(part);
        let length = out.len();
        let (place, counted) = if layout.src.is_ipv4() {
            (2, length)
        } else {
            (4, length - 40)
        };
        let counted = u16::try_from(counted).expect("shorter than the packet was");
        out[place..place + 2].copy_from_slice(&counted.to_be_bytes());
        seal(&mut out);
        out
    })
}

fn exchange(bytes: &mut [u8], size: usize) {
    let (first, second) = bytes.split_at_mut(size);
    first.swap_with_slice(second);
}

/// A packet as it is compared: the time to live as 64, the largest segment as 536, checksums anew.
///
/// # Panics
///
/// When its headers contradict each other.
#[must_use]
pub fn apart_from_ttl_and_mss(packet: &[u8]) -> Vec<u8> {
    let layout = check(packet).unwrap_or_else(|error| panic!("{error}: {packet:02x?}"));
    let mut out = packet.to_vec();
    out[hops_at(packet)] = 64;
    if let Some(at) = mss_at(&out, &layout) {
        out[at..at + 2].copy_from_slice(&536_u16.to_be_bytes());
    }
    seal(&mut out);
    out
}

/// The time to live or hop limit.
#[must_use]
pub fn hops(packet: &[u8]) -> u8 {
    packet[hops_at(packet)]
}

fn hops_at(packet: &[u8]) -> usize {
    if packet[0] >> 4 == 4 { 8 } else { 7 }
}

/// Where the value of a segment's MSS option stands.
#[must_use]
pub fn mss_at(packet: &[u8], layout: &Layout) -> Option<usize> {
    if layout.proto != TCP || layout.fragment.is_some_and(|(offset, _)| offset != 0) {
        return None;
    }
    let start = layout.l4.start;
    let end = start + usize::from(packet.get(start + 12)? >> 4) * 4;
    let mut at = start + 20;
    while at < end.min(packet.len()) {
        match (packet[at], packet.get(at + 1)) {
            (0, _) => return None,
            (1, _) => at += 1,
            (MSS, Some(4)) if at + 4 <= end => return Some(at + 2),
            (_, Some(&length)) if length >= 2 => at += usize::from(length),
            _ => return None,
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::program::packet::{Packet, SYN};

    fn ends(family: u8) -> ((IpAddr, u16), (IpAddr, u16)) {
        let [a, b] = match family {
            4 => ["192.0.2.1", "192.0.2.2"],
            _ => ["2001:db8::1", "2001:db8::2"],
        };
        ((a.parse().unwrap(), 1000), (b.parse().unwrap(), 80))
    }

    #[test]
    fn both_writers_of_packets_agree() {
        for family in [4, 6] {
            let (a, b) = ends(family);
            for packet in [
                Packet::tcp(a, b, SYN, 7, 0),
                Packet::udp(a, b, b"payload"),
                Packet::echo(a.0, b.0, 9),
            ] {
                let bytes = packet.bytes();
                let layout = check(&bytes).unwrap();
                assert_eq!((layout.src, layout.dst), (a.0, b.0));
                assert_eq!(mirrored(&bytes), packet.mirrored().bytes());
                let mut sealed = bytes.clone();
                seal(&mut sealed);
                assert_eq!(sealed, bytes);
                let mut wrong = bytes;
                *wrong.last_mut().unwrap() ^= 1;
                assert!(check(&wrong).is_err());
            }
        }
    }

    #[test]
    fn fragments_are_the_packet_again_when_they_are_put_together() {
        for family in [4, 6] {
            let (a, b) = ends(family);
            let packet = Packet::udp(a, b, &[7; 100]).bytes();
            let whole = walk(&packet).unwrap();
            let [first, second] = fragments(&packet, 24, 9);
            let parts = [&first, &second].map(|part| (walk(part).unwrap(), part));
            assert_eq!(parts[0].0.fragment, Some((0, true)));
            assert_eq!(parts[1].0.fragment, Some((24, false)));
            let together = parts
                .map(|(layout, part)| part[layout.l4].to_vec())
                .concat();
            assert_eq!(together, packet[whole.l4]);
            for part in [first, second] {
                assert_eq!(check(&part).map(|layout| layout.proto), Ok(UDP));
            }
        }
    }

    #[test]
    fn extension_headers_are_walked_to_the_transport() {
        let (a, b) = ends(6);
        let mut packet = Packet::udp(a, b, b"payload").bytes();
        let payload = packet.len() - 40 + 16;
        packet[4..6].copy_from_slice(&u16::try_from(payload).unwrap().to_be_bytes());
        packet[6] = 60;
        let options = [FRAGMENT, 0, 1, 4, 0, 0, 0, 0];
        let part = [UDP, 0, 0, 1, 0, 0, 0, 9];
        packet.splice(40..40, options.into_iter().chain(part));
        let layout = walk(&packet).unwrap();
        assert_eq!((layout.proto, layout.l4.start), (UDP, 56));
        assert_eq!(layout.fragment, Some((0, true)));
        packet.truncate(50);
        assert!(walk(&packet).is_err());
    }
}
