//! Writes another tuple into a packet, with the checksums that follow from it.
//!
//! Undoing a translation gives the packet that was sent, bit for bit (I3): nothing but addresses, ports (or the
//! echo identifier) and their checksums is touched, so DSCP, ECN and payload stay. The exception is the time to live:
//! each program is a router on the way and takes one hop off, translated or not.
//!
//! Only the first fragment of a datagram has its checksum, over all of it: the difference is added there, and the
//! later ones have other addresses only.

use ebpf_common::{layout::Addr, reason::Reason};

use crate::{
    csum,
    header::{Icmp, Ipv4, Ipv6},
    parse::{Family, Kind, Packet},
    skb::{Covers, Skb, UDP_CHECKSUM, copy_address},
};

/// Addresses and ports; for ICMP echo the identifier stands in `sport_be` (request) or `dport_be` (reply).
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Tuple {
    pub(crate) src: Addr,
    pub(crate) dst: Addr,
    pub(crate) sport_be: u16,
    pub(crate) dport_be: u16,
}

/// Makes `packet`, whose IP header is at `l2`, what it is to be (`packet.to`).
#[inline(always)]
pub(crate) fn translate(skb: &mut Skb, l2: usize, packet: &Packet) -> Result<(), Reason> {
    let tuple = &packet.to;
    let addresses = csum::difference_of(&packet.key.src.words, &tuple.src.words)
        + csum::difference_of(&packet.key.dst.words, &tuple.dst.words);
    let ports = ports_difference(packet, tuple);
    let l4 = packet.l4();
    let (check, udp) = match packet.kind {
        Kind::Tcp => (16, 0),
        Kind::Udp => (6, UDP_CHECKSUM),
        Kind::EchoRequest | Kind::EchoReply | Kind::IcmpError => (2, 0),
    };
    let pseudo = matches!(packet.kind, Kind::Tcp | Kind::Udp) || packet.family == Family::V6;
    if pseudo {
        skb.add_to_checksum(l4 + check, csum::fold32(addresses), Covers::Pseudo, udp)?;
    }
    if ports != 0 {
        skb.add_to_checksum(l4 + check, csum::fold32(ports), Covers::Payload, udp)?;
    }
    write_addresses(skb, l2, packet.family, tuple, addresses)?;
    if ports != 0 {
        write_ports(skb, l4, packet.kind, tuple)?;
    }
    Ok(())
}

/// Gives a later fragment the addresses that its first one got.
#[inline(always)]
pub(crate) fn readdress(skb: &mut Skb, l2: usize, packet: &Packet) -> Result<(), Reason> {
    let tuple = &packet.to;
    let addresses = csum::difference_of(&packet.key.src.words, &tuple.src.words)
        + csum::difference_of(&packet.key.dst.words, &tuple.dst.words);
    write_addresses(skb, l2, packet.family, tuple, addresses)
}

/// Takes a hop off a packet that goes on as it is.
#[inline(always)]
pub(crate) fn pass(skb: &mut Skb, l2: usize, family: Family) -> Result<(), Reason> {
    match family {
        Family::V4 => {
            let ip = skb.header_mut::<Ipv4>(l2).ok_or(Reason::Internal)?;
            ip.check = csum::updated(ip.check, csum::HOP);
            ip.ttl = ip.ttl.wrapping_sub(1);
        }
        Family::V6 => {
            let ip = skb.header_mut::<Ipv6>(l2).ok_or(Reason::Internal)?;
            ip.hops = ip.hops.wrapping_sub(1);
        }
    }
    Ok(())
}

/// The checksum difference of the ports; 0 where they stay as they are.
#[inline(always)]
fn ports_difference(packet: &Packet, tuple: &Tuple) -> u64 {
    let key = &packet.key;
    if key.sport_be == tuple.sport_be && key.dport_be == tuple.dport_be {
        return 0;
    }
    csum::difference(u32::from(key.sport_be), u32::from(tuple.sport_be))
        + csum::difference(u32::from(key.dport_be), u32::from(tuple.dport_be))
}

#[inline(always)]
fn write_addresses(
    skb: &mut Skb,
    l2: usize,
    family: Family,
    tuple: &Tuple,
    difference: u64,
) -> Result<(), Reason> {
    match family {
        Family::V4 => {
            let ip = skb.header_mut::<Ipv4>(l2).ok_or(Reason::Internal)?;
            ip.check = csum::updated(ip.check, difference + csum::HOP);
            ip.ttl = ip.ttl.wrapping_sub(1);
            ip.src = tuple.src.v4_be();
            ip.dst = tuple.dst.v4_be();
        }
        Family::V6 => {
            let ip = skb.header_mut::<Ipv6>(l2).ok_or(Reason::Internal)?;
            ip.hops = ip.hops.wrapping_sub(1);
            copy_address(&mut ip.src, &tuple.src.words);
            copy_address(&mut ip.dst, &tuple.dst.words);
        }
    }
    Ok(())
}

#[inline(always)]
fn write_ports(skb: &mut Skb, l4: usize, kind: Kind, tuple: &Tuple) -> Result<(), Reason> {
    match kind {
        Kind::Tcp | Kind::Udp => {
            let ports = skb.header_mut::<[u16; 2]>(l4).ok_or(Reason::Internal)?;
            *ports = [tuple.sport_be, tuple.dport_be];
        }
        Kind::EchoRequest => {
            skb.header_mut::<Icmp>(l4).ok_or(Reason::Internal)?.rest[0] = tuple.sport_be;
        }
        Kind::EchoReply => {
            skb.header_mut::<Icmp>(l4).ok_or(Reason::Internal)?.rest[0] = tuple.dport_be;
        }
        Kind::IcmpError => {}
    }
    Ok(())
}
