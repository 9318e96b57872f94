//! What a sender hears of a packet that goes nowhere: a TCP reset or an ICMP error at once, so that nobody
//! waits for a timeout. The answer is made of the packet itself and goes back to the link that it came from. How many
//! answers one endpoint causes is bounded ([`maps::spend_answer`]); a later fragment and an ICMP message that is no
//! echo request are never answered (RFC 1122 3.2.2).

mod reset;
mod unreachable;

use ebpf_common::reason::Reason;

use self::unreachable::Error;
use crate::{
    csum,
    header::{ETHERNET_LEN, Ethernet, IPV4_LEN, IPV4_PLAIN, Ipv4, Ipv6},
    maps,
    parse::{Kind, Packet},
    skb::Skb,
};

/// Hop count of packets that a program makes (RFC 1340's recommendation).
const HOPS: u8 = 64;
/// Who is answered through the tunnel, for the bound.
const TUNNEL: u32 = 0;

/// What is said for a reason.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Answer {
    /// Nothing: the sender is not to be trusted, or there is nobody to tell.
    Silence,
    /// There is nothing at that address and port.
    Refused,
    /// The packet is too big for its path.
    TooBig,
    /// It has gone far enough.
    Expired,
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
        Reason::HopLimit => Answer::Expired,
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
    let packet = maps::scratch().ok()?;
    let config = maps::config().ok()?;
    let sender = maps::endpoint(skb.ifindex())?.number;
    let plain = ETHERNET_LEN + packet.family.len();
    if packet.is_later() || !maps::spend_answer(sender) {
        return None;
    }
    // A reset stands where the transport header of a packet with options would have to go on standing.
    if packet.kind == Kind::Tcp && answer == Answer::Refused && packet.l4() == plain {
        reset::reset(skb, packet)?;
    } else {
        let error = error_for(packet, answer)?;
        unreachable::quote(skb, ETHERNET_LEN, config, packet, error)?;
        turn_frame(skb)?;
    }
    Some(skb.redirect(skb.ifindex()))
}

/// Answers the remote endpoint whose packet came out of the tunnel with its last hop used up, so that a trace of its
/// route shows this node.
#[inline(always)]
pub(crate) fn answer_peer(skb: &mut Skb, reason: Reason) -> Option<i32> {
    if answer_to(reason) != Answer::Expired || skb.segment_len() != 0 {
        return None;
    }
    let packet = maps::scratch().ok()?;
    let config = maps::config().ok()?;
    if packet.is_later() || !maps::spend_answer(TUNNEL) {
        return None;
    }
    let error = error_for(packet, Answer::Expired)?;
    unreachable::quote(skb, 0, config, packet, error)?;
    Some(skb.redirect(config.tunnel_ifindex))
}

/// The ICMP error for a packet; `None` for ICMP that is no echo request (RFC 1122 3.2.2, RFC 4443 2.4).
#[inline(always)]
fn error_for(packet: &Packet, answer: Answer) -> Option<Error> {
    let family = packet.family;
    match (answer, packet.kind) {
        (Answer::Silence, _) | (_, Kind::EchoReply | Kind::IcmpError) => None,
        (Answer::TooBig, _) => Some(Error::too_big(family, packet.path_mtu)),
        (Answer::Expired, _) => Some(Error::expired(family)),
        (Answer::Refused, Kind::Tcp | Kind::Udp) => Some(Error::port(family)),
        (Answer::Refused, Kind::EchoRequest) => Some(Error::host(family)),
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
