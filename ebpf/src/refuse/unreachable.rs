//! The ICMP error that quotes a packet (RFC 792, RFC 4443): its IP header and the eight bytes after it.
//!
//! It comes from the node endpoint, the pod's gateway. It quotes the packet as its sender sent it, because
//! every refusal is decided before anything is translated.

use ebpf_common::layout::{Config, PROTO_ICMP, PROTO_ICMP6};

use super::{ip4, ip6, turn_frame};
use crate::{
    csum,
    header::{
        ETHERNET_LEN, ICMP_LEN, ICMP4_UNREACHABLE, ICMP6_TOO_BIG, ICMP6_UNREACHABLE, IPV4_LEN,
        IPV6_LEN, Icmp, Ipv4, Ipv6,
    },
    parse::Family,
    skb::Skb,
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

/// Turns the frame at hand into the error about it.
#[inline(always)]
pub(super) fn quote(skb: &mut Skb, config: &Config, family: Family, error: Error) -> Option<()> {
    match family {
        Family::V4 => quote4(skb, config, error),
        Family::V6 => quote6(skb, config, error),
    }
}

#[inline(always)]
fn quote4(skb: &mut Skb, config: &Config, error: Error) -> Option<()> {
    const ICMP: usize = ETHERNET_LEN + IPV4_LEN;
    const QUOTE: usize = ICMP + ICMP_LEN;
    let ip = *skb.header::<Ipv4>(ETHERNET_LEN)?;
    let start = *skb.header::<[u32; QUOTED / 4]>(ICMP)?;
    skb.resize(QUOTE + IPV4_LEN + QUOTED).ok()?;
    turn_frame(skb)?;
    let payload = ICMP_LEN + IPV4_LEN + QUOTED;
    *skb.header_mut(ETHERNET_LEN)? = ip4(config.node4.v4_be(), ip.src, PROTO_ICMP, payload);
    // A right header sums to zero, and adds nothing.
    *skb.header_mut(ICMP)? = error.header(u64::from(start[0]) + u64::from(start[1]));
    *skb.header_mut(QUOTE)? = ip;
    *skb.header_mut(QUOTE + IPV4_LEN)? = start;
    Some(())
}

#[inline(always)]
fn quote6(skb: &mut Skb, config: &Config, error: Error) -> Option<()> {
    const ICMP: usize = ETHERNET_LEN + IPV6_LEN;
    const QUOTE: usize = ICMP + ICMP_LEN;
    let ip = *skb.header::<Ipv6>(ETHERNET_LEN)?;
    let start = *skb.header::<[u32; QUOTED / 4]>(ICMP)?;
    skb.resize(QUOTE + IPV6_LEN + QUOTED).ok()?;
    turn_frame(skb)?;
    let payload = ICMP_LEN + IPV6_LEN + QUOTED;
    *skb.header_mut(ETHERNET_LEN)? = ip6(config.node6.words, ip.src, PROTO_ICMP6, payload);
    let pseudo = csum::sum(&config.node6.words)
        + csum::sum(&ip.src)
        + u64::from((payload as u16).to_be())
        + u64::from(u16::from(PROTO_ICMP6).to_be());
    let quote = u64::from(ip.version_be)
        + u64::from(ip.payload_be)
        + u64::from(u16::from_ne_bytes([ip.next, ip.hops]))
        + csum::sum(&ip.src)
        + csum::sum(&ip.dst)
        + u64::from(start[0])
        + u64::from(start[1]);
    *skb.header_mut(ICMP)? = error.header(pseudo + quote);
    *skb.header_mut(QUOTE)? = ip;
    *skb.header_mut(QUOTE + IPV6_LEN)? = start;
    Some(())
}
