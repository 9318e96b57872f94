//! Fragments that have no ports: they become what the first one of their datagram became.
//!
//! ```text
//!  first fragment --parsed and translated as any packet--> FRAGMENTS: (src, dst, id, proto, endpoint) -> addresses
//!  later fragment -----------------------------------------> the same addresses, or reason `fragment`
//! ```
//!
//! A datagram whose first fragment was not seen is not reassembled by anybody, so its other fragments go nowhere:
//! that is also what becomes of fragments that overtake their first one. Nothing is kept back and nothing reassembled.
//! A fragment that overlaps the first one is dropped (RFC 1858, RFC 5722): it could write over the ports that were
//! looked at.

use ebpf_common::{
    layout::{Fragment, FragmentKey},
    reason::Reason,
};

use crate::{
    maps,
    parse::{Family, Packet},
};

/// Later fragments leave a sender in one go. After this time the same identification may be another datagram's: 16
/// bits are used up in a second by 65,536 datagrams.
const LIFE_NS: u64 = 1_000_000_000;

/// Remembers what the first fragment at hand became: `packet.to`. `endpoint` sent it, 0 is the tunnel.
#[inline(never)]
pub(crate) fn remember(packet: &Packet, endpoint: u32) {
    let fragment = Fragment {
        seen_ns: maps::now_ns(),
        src: packet.to.src,
        dst: packet.to.dst,
        length: packet.end.wrapping_sub(packet.l4() as u32),
        counter: packet.counter,
        backend: packet.backend,
        direction: u32::from(packet.key.direction),
    };
    maps::put_fragment(&key(packet, endpoint), &fragment);
}

/// Decides what the later fragment at hand becomes: `packet.to`.
#[inline(never)]
pub(crate) fn recall(packet: &mut Packet, endpoint: u32) -> Result<(), Reason> {
    let first = maps::fragment(&key(packet, endpoint)).ok_or(Reason::Fragment)?;
    if maps::now_ns().wrapping_sub(first.seen_ns) > LIFE_NS || packet.offset < first.length {
        return Err(Reason::Fragment);
    }
    packet.to.src = first.src;
    packet.to.dst = first.dst;
    packet.counter = first.counter;
    packet.backend = first.backend;
    packet.key.direction = first.direction as u8;
    Ok(())
}

#[inline(always)]
fn key(packet: &Packet, endpoint: u32) -> FragmentKey {
    FragmentKey {
        src: packet.key.src,
        dst: packet.key.dst,
        id_be: packet.id_be,
        endpoint,
        proto: match packet.family {
            Family::V4 => packet.key.proto,
            // Each fragment says its own next header, and only the first one's counts.
            Family::V6 => 0,
        },
        pad: [0; 3],
    }
}
