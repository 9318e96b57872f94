//! The ICMP error that quotes a packet (RFC 792, RFC 4443): its IP header, with options and extension headers, and
//! the eight bytes after them.
//!
//! It comes from the node endpoint, the pod's gateway ([`source`]). It quotes the packet as its sender sent it, because
//! every refusal is decided before anything is translated. The quote is of no fixed length, so it is kept in map
//! memory while the packet gets its new size.

use ebpf_common::layout::{Addr, Config, PROTO_ICMP, PROTO_ICMP6};

use super::{ip4, ip6};
use crate::{
    csum, flow,
    header::{
        ICMP_LEN, ICMP4_TIME_EXCEEDED, ICMP4_UNREACHABLE, ICMP6_TIME_EXCEEDED, ICMP6_TOO_BIG,
        ICMP6_UNREACHABLE, Icmp,
    },
    parse::{Family, Packet, QUOTE_MOST, odd},
    skb::{Skb, sum_of},
};

/// Bytes quoted after the IP header.
const QUOTED: usize = 8;

/// An ICMP message before its quote.
#[derive(Clone, Copy)]
pub(super) struct Error {
    kind: u8,
    code: u8,
    rest: [u16; 2],
}

impl Error {
    /// Nobody listens on that port.
    #[inline(always)]
    pub(super) const fn port(family: Family) -> Self {
        match family {
            Family::V4 => Self::unreachable(ICMP4_UNREACHABLE, 3),
            Family::V6 => Self::unreachable(ICMP6_UNREACHABLE, 4),
        }
    }

    /// Nobody has that address.
    #[inline(always)]
    pub(super) const fn host(family: Family) -> Self {
        match family {
            Family::V4 => Self::unreachable(ICMP4_UNREACHABLE, 1),
            Family::V6 => Self::unreachable(ICMP6_UNREACHABLE, 3),
        }
    }

    /// The time to live or hop limit is used up.
    #[inline(always)]
    pub(super) const fn expired(family: Family) -> Self {
        match family {
            Family::V4 => Self::unreachable(ICMP4_TIME_EXCEEDED, 0),
            Family::V6 => Self::unreachable(ICMP6_TIME_EXCEEDED, 0),
        }
    }

    /// No more than `mtu` bytes fit.
    #[inline(always)]
    pub(super) const fn too_big(family: Family, mtu: u32) -> Self {
        let mtu_be = (mtu as u16).to_be();
        match family {
            Family::V4 => Self {
                rest: [0, mtu_be],
                ..Self::unreachable(ICMP4_UNREACHABLE, 4)
            },
            Family::V6 => Self {
                rest: [0, mtu_be],
                ..Self::unreachable(ICMP6_TOO_BIG, 0)
            },
        }
    }

    #[inline(always)]
    const fn unreachable(kind: u8, code: u8) -> Self {
        Self {
            kind,
            code,
            rest: [0; 2],
        }
    }

    /// The message's header over a quote with this sum.
    #[inline(always)]
    fn header(self, quote: u64) -> Icmp {
        let sum = u64::from(u16::from_ne_bytes([self.kind, self.code]))
            + u64::from(self.rest[0])
            + u64::from(self.rest[1]);
        Icmp {
            kind: self.kind,
            code: self.code,
            check: !csum::fold16(sum + quote),
            rest: self.rest,
        }
    }
}

/// Turns the packet at hand, whose IP header is at `l2`, into the error about it.
#[inline(always)]
pub(super) fn quote(
    skb: &mut Skb,
    l2: usize,
    config: &Config,
    packet: &mut Packet,
    error: Error,
) -> Option<()> {
    let family = packet.family;
    // Masked, the length is a value of its own: verifiers before Linux 6.10 do not take the bound of one register to
    // what the compiler makes of another.
    let headers = packet.l4().wrapping_sub(l2) & odd::FURTHEST;
    if headers > QUOTE_MOST - QUOTED {
        return None;
    }
    let len = headers + QUOTED;
    let quote = packet.quote.get_mut(..len)?;
    skb.load(l2, quote)?;
    let icmp = l2 + family.len();
    skb.resize(icmp + ICMP_LEN + len).ok()?;
    let payload = ICMP_LEN + len;
    let to = packet.key.src;
    let from = source(config, packet);
    let pseudo = match family {
        Family::V4 => {
            *skb.header_mut(l2)? = ip4(from.v4_be(), to.v4_be(), PROTO_ICMP, payload);
            0
        }
        Family::V6 => {
            *skb.header_mut(l2)? = ip6(from.words, to.words, PROTO_ICMP6, payload);
            csum::sum(&from.words)
                + csum::sum(&to.words)
                + u64::from((payload as u16).to_be())
                + u64::from(u16::from(PROTO_ICMP6).to_be())
        }
    };
    let quote = packet.quote.get(..len)?;
    *skb.header_mut(icmp)? = error.header(pseudo + sum_of(quote));
    skb.store(icmp + ICMP_LEN, quote)
}

/// Whom an error comes from. The node endpoint itself hears it from where its packet went: a host takes nothing that
/// says to come from its own address.
#[inline(always)]
fn source(config: &Config, packet: &Packet) -> Addr {
    let node = flow::node_address(config, packet.family);
    if packet.key.src == node {
        packet.key.dst
    } else {
        node
    }
}
