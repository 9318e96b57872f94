//! The last step: into a local endpoint, or into the tunnel.

use ebpf_common::{
    layout::{Addr, Config, ENDPOINT_PLAIN_REDIRECT, Endpoint},
    reason::Reason,
};

use crate::{
    address::{self, Name},
    header::{ETH_P_IP, ETH_P_IPV6, ETHERNET_LEN, Ethernet, TCP_LEN, UDP_LEN},
    maps,
    parse::{Family, Kind, Packet},
    skb::Skb,
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

/// Whether a frame of an endpoint goes that way unfragmented.
#[inline(always)]
pub(crate) fn fits(skb: &Skb, config: &Config, packet: &Packet, way: Way) -> Result<(), Reason> {
    let len = match (way, skb.segment_len()) {
        (Way::Local(_), _) => return Ok(()),
        (Way::Tunnel, 0) => skb.len() - ETHERNET_LEN as u32,
        // TCP options make it up to 40 more; the segment size that a stack chooses leaves room for its own.
        (Way::Tunnel, segment) => {
            segment
                + packet.family.len() as u32
                + match packet.kind {
                    Kind::Tcp => TCP_LEN as u32,
                    _ => UDP_LEN as u32,
                }
        }
    };
    if len <= config.tunnel_mtu {
        Ok(())
    } else {
        Err(Reason::TooBig)
    }
}

/// Sends an Ethernet frame its way.
#[inline(always)]
pub(crate) fn frame(skb: &mut Skb, config: &Config, way: Way) -> Result<i32, Reason> {
    match way {
        // The device has no Ethernet; the kernel strips the header.
        Way::Tunnel => Ok(skb.redirect(config.tunnel_ifindex)),
        Way::Local(endpoint) => {
            let ethernet = skb.header_mut::<Ethernet>(0).ok_or(Reason::Internal)?;
            ethernet.dst = endpoint.mac;
            ethernet.src = endpoint.host_mac;
            Ok(hand_over(skb, endpoint))
        }
    }
}

/// Gives a packet without Ethernet header one, and hands it to a local endpoint.
#[inline(always)]
pub(crate) fn packet(skb: &mut Skb, family: Family, endpoint: &Endpoint) -> Result<i32, Reason> {
    skb.grow_head(ETHERNET_LEN)?;
    let ethernet = skb.header_mut::<Ethernet>(0).ok_or(Reason::Internal)?;
    *ethernet = Ethernet {
        dst: endpoint.mac,
        src: endpoint.host_mac,
        kind_be: match family {
            Family::V4 => ETH_P_IP.to_be(),
            Family::V6 => ETH_P_IPV6.to_be(),
        },
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
