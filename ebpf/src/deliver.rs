//! The last step: into a local endpoint, or into the tunnel.

use ebpf_common::{
    layout::{Addr, Config, ENDPOINT_PLAIN_REDIRECT, Endpoint, PATH_FLOOR, PATH_PORT},
    reason::Reason,
};

use crate::{
    address::{self, Name},
    header::{ETH_P_IP, ETH_P_IPV6, ETHERNET_LEN, Ethernet, TCP_SYN},
    maps, mss,
    parse::{Family, Kind, Packet},
    skb::{Skb, copy_mac},
};

/// Where an endpoint address is reached.
#[derive(Clone, Copy)]
pub(crate) enum Way {
    Local(&'static Endpoint),
    Tunnel,
}

/// The way to an endpoint address.
#[inline(always)]
pub(crate) fn way(config: &Config, family: Family, address: &Addr) -> Result<Way, Reason> {
    if let Some(endpoint) = maps::local(address) {
        return Ok(Way::Local(endpoint));
    }
    let here = address::name(config, family, address) == (Name::Endpoint { here: true });
    if here || config.tunnel_ifindex == 0 {
        Err(Reason::NoEndpoint)
    } else {
        Ok(Way::Tunnel)
    }
}

/// Makes a frame of an endpoint fit its way: what is larger than the path carries is refused, with the size in
/// `packet.path_mtu`; what opens or accepts a connection is told the largest segment.
#[inline(always)]
pub(crate) fn fit(
    skb: &mut Skb,
    config: &Config,
    packet: &mut Packet,
    way: Way,
    to: &Addr,
) -> Result<(), Reason> {
    if let Way::Local(_) = way {
        return Ok(());
    }
    let len = match skb.segment_len() {
        0 => skb.len() - ETHERNET_LEN as u32,
        segment => segment + packet.l4() as u32 - ETHERNET_LEN as u32 + packet.l4_len,
    };
    if len > PATH_FLOOR {
        packet.path_mtu = path_mtu(config, to);
        if len > packet.path_mtu && !(len <= config.tunnel_mtu && measures(config, packet)) {
            return Err(Reason::TooBig);
        }
    }
    clamp(skb, config, packet, to)
}

/// Tells a connection with the endpoint `peer` of another node the largest segment that the path carries.
#[inline(always)]
pub(crate) fn clamp(
    skb: &mut Skb,
    config: &Config,
    packet: &mut Packet,
    peer: &Addr,
) -> Result<(), Reason> {
    if packet.tcp_flags & TCP_SYN == 0 {
        return Ok(());
    }
    let most = mss::most(packet.family, path_mtu(config, peer));
    mss::clamp(skb, packet, most)
}

/// The largest packet that reaches an endpoint of another node.
#[inline(always)]
fn path_mtu(config: &Config, address: &Addr) -> u32 {
    match maps::peer(address) {
        Some(peer) if peer.mtu >= PATH_FLOOR && peer.mtu < config.tunnel_mtu => peer.mtu,
        _ => config.tunnel_mtu,
    }
}

/// Whether a packet is the node endpoint's probe, by which paths are measured.
#[inline(always)]
fn measures(config: &Config, packet: &Packet) -> bool {
    packet.kind == Kind::Udp
        && packet.key.dport_be == PATH_PORT.to_be()
        && packet.key.src == config.node6
}

/// Sends an Ethernet frame its way.
#[inline(always)]
pub(crate) fn frame(skb: &mut Skb, config: &Config, way: Way) -> Result<i32, Reason> {
    match way {
        // The device has no Ethernet; the kernel strips the header.
        Way::Tunnel => Ok(skb.redirect(config.tunnel_ifindex)),
        Way::Local(endpoint) => {
            let ethernet = skb.header_mut::<Ethernet>(0).ok_or(Reason::Internal)?;
            copy_mac(&mut ethernet.dst, &endpoint.mac);
            copy_mac(&mut ethernet.src, &endpoint.host_mac);
            Ok(hand_over(skb, endpoint))
        }
    }
}

/// Gives a packet without Ethernet header one, and hands it to a local endpoint.
#[inline(always)]
pub(crate) fn packet(skb: &mut Skb, family: Family, endpoint: &Endpoint) -> Result<i32, Reason> {
    skb.grow_head(ETHERNET_LEN)?;
    let ethernet = skb.header_mut::<Ethernet>(0).ok_or(Reason::Internal)?;
    copy_mac(&mut ethernet.dst, &endpoint.mac);
    copy_mac(&mut ethernet.src, &endpoint.host_mac);
    ethernet.kind_be = match family {
        Family::V4 => ETH_P_IP.to_be(),
        Family::V6 => ETH_P_IPV6.to_be(),
    };
    Ok(hand_over(skb, endpoint))
}

#[inline(always)]
fn hand_over(skb: &mut Skb, endpoint: &Endpoint) -> i32 {
    if endpoint.flags & ENDPOINT_PLAIN_REDIRECT != 0 {
        return skb.redirect(endpoint.ifindex);
    }
    skb.accept();
    skb.redirect_peer(endpoint.ifindex)
}
