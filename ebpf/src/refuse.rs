//! What a caller hears when its packet goes nowhere: a TCP reset at once, so that nobody waits for a timeout.

use ebpf_common::{layout::PROTO_TCP, reason::Reason};

use crate::{
    csum,
    header::{
        ETH_P_IP, ETH_P_IPV6, ETHERNET_LEN, Ethernet, IPV4_LEN, IPV4_PLAIN, Ipv4, Ipv6, TCP_ACK,
        TCP_FIN, TCP_LEN, TCP_RST, TCP_SYN, Tcp,
    },
    parse::Family,
    skb::{Covers, Skb},
};

/// Hop count of packets that a program makes (RFC 1340's recommendation).
const HOPS: u8 = 64;

/// Whether the sender is told.
#[inline(always)]
const fn is_answered(reason: Reason) -> bool {
    matches!(
        reason,
        Reason::NotLinked
            | Reason::UndeclaredPort
            | Reason::NoBackend
            | Reason::FlowTableFull
            | Reason::FlowQuota
            | Reason::NoSourcePort
            | Reason::BackendGone
            | Reason::NoFlow
            | Reason::DirectEndpoint
            | Reason::NoEndpoint
    )
}

/// Answers the endpoint that sent the frame at hand; the TC action of the answer, or `None` for silence.
#[inline(always)]
pub(crate) fn answer(skb: &mut Skb, reason: Reason) -> Option<i32> {
    if !is_answered(reason) {
        return None;
    }
    let family = Family::of_frame(skb).ok()?;
    match family {
        Family::V4 if skb.header::<Ipv4>(ETHERNET_LEN)?.proto == PROTO_TCP => {}
        Family::V6 if skb.header::<Ipv6>(ETHERNET_LEN)?.next == PROTO_TCP => {}
        _ => return None,
    }
    reset(skb, family)?;
    Some(skb.redirect(skb.ifindex()))
}

/// Turns the segment at hand into the reset that answers it (RFC 9293, 3.10.7.1).
#[inline(always)]
fn reset(skb: &mut Skb, family: Family) -> Option<()> {
    let l4 = ETHERNET_LEN + family.len();
    let payload = payload_len(skb, family)?;
    let old = *skb.header::<Tcp>(l4)?;
    if old.flags & TCP_RST != 0 {
        return None;
    }
    let (seq_be, ack_be, flags) = if old.flags & TCP_ACK != 0 {
        (old.ack_be, 0, TCP_RST)
    } else {
        let header = u32::from(old.offset >> 4) * 4;
        let ends = u32::from(old.flags & TCP_SYN != 0) + u32::from(old.flags & TCP_FIN != 0);
        let ack = u32::from_be(old.seq_be)
            .wrapping_add(payload.wrapping_sub(header))
            .wrapping_add(ends);
        (0, ack.to_be(), TCP_RST | TCP_ACK)
    };
    skb.resize(l4 + TCP_LEN).ok()?;
    turn_frame(skb, family)?;
    let pseudo = turn_ip(skb, family, TCP_LEN as u16)?;
    let tcp = Tcp {
        sport_be: old.dport_be,
        dport_be: old.sport_be,
        seq_be,
        ack_be,
        offset: ((TCP_LEN / 4) << 4) as u8,
        flags,
        window_be: 0,
        check: 0,
        urgent_be: 0,
    };
    *skb.header_mut::<Tcp>(l4)? = tcp;
    let check = if is_offloaded(skb, l4)? {
        csum::fold16(pseudo)
    } else {
        !csum::fold16(pseudo + tcp_sum(&tcp))
    };
    skb.header_mut::<Tcp>(l4)?.check = check;
    Some(())
}

/// Bytes after the IP header.
#[inline(always)]
fn payload_len(skb: &Skb, family: Family) -> Option<u32> {
    Some(match family {
        Family::V4 => u32::from(u16::from_be(skb.header::<Ipv4>(ETHERNET_LEN)?.total_be))
            .wrapping_sub(IPV4_LEN as u32),
        Family::V6 => u32::from(u16::from_be(skb.header::<Ipv6>(ETHERNET_LEN)?.payload_be)),
    })
}

/// Swaps the frame's addresses.
#[inline(always)]
fn turn_frame(skb: &mut Skb, family: Family) -> Option<()> {
    let ethernet = skb.header_mut::<Ethernet>(0)?;
    *ethernet = Ethernet {
        dst: ethernet.src,
        src: ethernet.dst,
        kind_be: match family {
            Family::V4 => ETH_P_IP.to_be(),
            Family::V6 => ETH_P_IPV6.to_be(),
        },
    };
    Some(())
}

/// Swaps the IP header's addresses over `payload` bytes of TCP; the sum of the pseudo header.
#[inline(always)]
fn turn_ip(skb: &mut Skb, family: Family, payload: u16) -> Option<u64> {
    let tail = u64::from(payload.to_be()) + u64::from(u16::from(PROTO_TCP).to_be());
    match family {
        Family::V4 => {
            let ip = skb.header_mut::<Ipv4>(ETHERNET_LEN)?;
            *ip = Ipv4 {
                version_ihl: IPV4_PLAIN,
                tos: 0,
                total_be: (payload + IPV4_LEN as u16).to_be(),
                id_be: 0,
                // Do not fragment.
                fragment_be: 0x4000_u16.to_be(),
                ttl: HOPS,
                proto: PROTO_TCP,
                check: 0,
                src: ip.dst,
                dst: ip.src,
            };
            ip.check = !csum::fold16(ipv4_sum(ip));
            Some(u64::from(ip.src) + u64::from(ip.dst) + tail)
        }
        Family::V6 => {
            let ip = skb.header_mut::<Ipv6>(ETHERNET_LEN)?;
            *ip = Ipv6 {
                version_be: (6_u32 << 28).to_be(),
                payload_be: payload.to_be(),
                next: PROTO_TCP,
                hops: HOPS,
                src: ip.dst,
                dst: ip.src,
            };
            Some(csum::sum(&ip.src) + csum::sum(&ip.dst) + tail)
        }
    }
}

#[inline(always)]
fn ipv4_sum(ip: &Ipv4) -> u64 {
    u64::from(u16::from_ne_bytes([ip.version_ihl, ip.tos]))
        + u64::from(ip.total_be)
        + u64::from(ip.id_be)
        + u64::from(ip.fragment_be)
        + u64::from(u16::from_ne_bytes([ip.ttl, ip.proto]))
        + u64::from(ip.src)
        + u64::from(ip.dst)
}

#[inline(always)]
fn tcp_sum(tcp: &Tcp) -> u64 {
    u64::from(tcp.sport_be)
        + u64::from(tcp.dport_be)
        + u64::from(tcp.seq_be)
        + u64::from(tcp.ack_be)
        + u64::from(u16::from_ne_bytes([tcp.offset, tcp.flags]))
        + u64::from(tcp.window_be)
        + u64::from(tcp.urgent_be)
}

/// Whether a device still has to finish the checksum (`CHECKSUM_PARTIAL`). Programs cannot read that, but the
/// helper leaves such a field alone when a word outside the pseudo header changes.
#[inline(always)]
fn is_offloaded(skb: &mut Skb, l4: usize) -> Option<bool> {
    const CHECK: usize = 16;
    skb.add_to_checksum(l4 + CHECK, 1, Covers::Payload, 0)
        .ok()?;
    Some(skb.header::<Tcp>(l4)?.check == 0)
}
