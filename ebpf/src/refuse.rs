//! What a sender hears of a packet that goes nowhere: a TCP reset or an ICMP error at once, so that nobody
//! waits for a timeout. The answer is made of the packet itself and goes back to the link that it came from.

mod reset;
mod unreachable;

use ebpf_common::{
    layout::{Config, PROTO_ICMP, PROTO_ICMP6, PROTO_TCP, PROTO_UDP},
    reason::Reason,
};

use self::unreachable::Error;
use crate::{
    csum,
    header::{
        ETHERNET_LEN, Ethernet, ICMP4_ECHO_REQUEST, ICMP6_ECHO_REQUEST, IPV4_LEN, IPV4_PLAIN, Icmp,
        Ipv4, Ipv6,
    },
    maps,
    parse::Family,
    skb::Skb,
};

/// Hop count of packets that a program makes (RFC 1340's recommendation).
const HOPS: u8 = 64;

/// What is said for a reason.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Answer {
    /// Nothing: the sender is not to be trusted, or there is nobody to tell.
    Silence,
    /// There is nothing at that address and port.
    Refused,
    /// The packet is too big for its path.
    TooBig,
}

#[inline(always)]
const fn answer_to(reason: Reason) -> Answer {
    match reason {
        Reason::NotLinked
        | Reason::UndeclaredPort
        | Reason::NoBackend
        | Reason::FlowTableFull
        | Reason::FlowQuota
        | Reason::NoSourcePort
        | Reason::BackendGone
        | Reason::NoFlow
        | Reason::DirectEndpoint
        | Reason::NoEndpoint => Answer::Refused,
        Reason::TooBig => Answer::TooBig,
        _ => Answer::Silence,
    }
}

/// Answers the endpoint that sent the frame at hand; the TC action of the answer, or `None` for silence.
#[inline(always)]
pub(crate) fn answer(skb: &mut Skb, reason: Reason) -> Option<i32> {
    let answer = answer_to(reason);
    if answer == Answer::Silence {
        return None;
    }
    let config = maps::config().ok()?;
    let family = Family::of_frame(skb).ok()?;
    let proto = match family {
        Family::V4 => skb.header::<Ipv4>(ETHERNET_LEN)?.proto,
        Family::V6 => skb.header::<Ipv6>(ETHERNET_LEN)?.next,
    };
    if proto == PROTO_TCP && answer == Answer::Refused {
        reset::reset(skb, family)?;
    } else {
        let error = error_for(skb, config, family, proto, answer)?;
        unreachable::quote(skb, config, family, error)?;
    }
    Some(skb.redirect(skb.ifindex()))
}

/// The ICMP error for a packet; `None` for ICMP that is no echo request (RFC 1122 3.2.2, RFC 4443 2.4).
#[inline(always)]
fn error_for(
    skb: &Skb,
    config: &Config,
    family: Family,
    proto: u8,
    answer: Answer,
) -> Option<Error> {
    let echo = skb
        .header::<Icmp>(ETHERNET_LEN + family.len())
        .is_some_and(|icmp| match family {
            Family::V4 => icmp.kind == ICMP4_ECHO_REQUEST,
            Family::V6 => icmp.kind == ICMP6_ECHO_REQUEST,
        });
    match (family, proto) {
        (Family::V4, PROTO_ICMP) | (Family::V6, PROTO_ICMP6) if !echo => None,
        _ if answer == Answer::TooBig => Some(Error::too_big(family, config.tunnel_mtu)),
        (_, PROTO_UDP) => Some(Error::port(family)),
        _ => Some(Error::host(family)),
    }
}

/// Swaps the frame's addresses.
#[inline(always)]
fn turn_frame(skb: &mut Skb) -> Option<()> {
    let ethernet = skb.header_mut::<Ethernet>(0)?;
    (ethernet.dst, ethernet.src) = (ethernet.src, ethernet.dst);
    Some(())
}

/// A finished IPv4 header before `payload` bytes.
#[inline(always)]
fn ip4(src: u32, dst: u32, proto: u8, payload: usize) -> Ipv4 {
    let mut ip = Ipv4 {
        version_ihl: IPV4_PLAIN,
        tos: 0,
        total_be: ((IPV4_LEN + payload) as u16).to_be(),
        id_be: 0,
        // Do not fragment.
        fragment_be: 0x4000_u16.to_be(),
        ttl: HOPS,
        proto,
        check: 0,
        src,
        dst,
    };
    ip.check = !csum::fold16(
        u64::from(u16::from_ne_bytes([ip.version_ihl, ip.tos]))
            + u64::from(ip.total_be)
            + u64::from(ip.fragment_be)
            + u64::from(u16::from_ne_bytes([ip.ttl, ip.proto]))
            + u64::from(src)
            + u64::from(dst),
    );
    ip
}

/// An IPv6 header before `payload` bytes.
#[inline(always)]
fn ip6(src: [u32; 4], dst: [u32; 4], next: u8, payload: usize) -> Ipv6 {
    Ipv6 {
        version_be: (6_u32 << 28).to_be(),
        payload_be: (payload as u16).to_be(),
        next,
        hops: HOPS,
        src,
        dst,
    }
}
