//! The reset that answers a TCP segment (RFC 9293, 3.10.7.1).

use ebpf_common::layout::PROTO_TCP;

use super::{ip4, ip6, turn_frame};
use crate::{
    csum,
    header::{ETHERNET_LEN, Ipv4, Ipv6, TCP_ACK, TCP_FIN, TCP_LEN, TCP_RST, TCP_SYN, Tcp},
    parse::{Family, Packet},
    skb::{Covers, Skb},
};

/// Turns the segment at hand into the reset that answers it (RFC 9293, 3.10.7.1).
#[inline(always)]
pub(super) fn reset(skb: &mut Skb, packet: &Packet) -> Option<()> {
    let family = packet.family;
    let l4 = ETHERNET_LEN + family.len();
    let payload = packet.end.wrapping_sub(l4 as u32);
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
    turn_frame(skb)?;
    let pseudo = turn_ip(skb, family)?;
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

/// Swaps the IP header's addresses; the sum of the pseudo header.
#[inline(always)]
fn turn_ip(skb: &mut Skb, family: Family) -> Option<u64> {
    let tail = u64::from((TCP_LEN as u16).to_be()) + u64::from(u16::from(PROTO_TCP).to_be());
    match family {
        Family::V4 => {
            let ip = skb.header_mut::<Ipv4>(ETHERNET_LEN)?;
            *ip = ip4(ip.dst, ip.src, PROTO_TCP, TCP_LEN);
            Some(u64::from(ip.src) + u64::from(ip.dst) + tail)
        }
        Family::V6 => {
            let ip = skb.header_mut::<Ipv6>(ETHERNET_LEN)?;
            *ip = ip6(ip.dst, ip.src, PROTO_TCP, TCP_LEN);
            Some(csum::sum(&ip.src) + csum::sum(&ip.dst) + tail)
        }
    }
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
