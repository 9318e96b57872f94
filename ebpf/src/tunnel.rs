//! Packets that come out of the tunnel: from remote endpoints, for local ones, and never into a tunnel again.

use ebpf_common::{
    addr::{ECHO_PORT, NODE_ENDPOINT},
    layout::{CONFIG_HOLD_UNKNOWN, FLOW_REVERSE, PATH_PORT},
    reason::Reason,
};

use crate::{
    address::{self, Name},
    count,
    deliver::{self, Way},
    error, flow, fragment,
    header::TCP_LEN,
    hold, log, maps,
    parse::{Family, Kind, Packet, Part},
    skb::Skb,
    translate,
};

/// Who sends fragments that come out of the tunnel.
const TUNNEL: u32 = 0;

/// Decides about one packet without Ethernet header; the result is the TC action of a packet on its way.
#[inline(always)]
pub(crate) fn from_tunnel(skb: &mut Skb) -> Result<i32, Reason> {
    let packet = maps::scratch()?;
    packet.begin();
    let config = maps::config()?;
    let family = Family::of_packet(skb)?;
    skb.pull(family.len() + TCP_LEN);
    packet.read(skb, 0, family)?;
    if address::name(config, family, &packet.key.src) != (Name::Endpoint { here: false })
        || maps::local(&packet.key.src).is_some()
    {
        return Err(Reason::TunnelSource);
    }
    let endpoint = maps::local(&packet.key.dst).ok_or(Reason::TunnelDestination)?;
    if packet.hops <= 1 {
        return Err(Reason::HopLimit);
    }
    if packet.is_later() {
        fragment::recall(packet, TUNNEL)?;
        translate::readdress(skb, 0, packet)?;
        count::passed(skb, 0, packet);
        log::passed(packet, Way::Local(endpoint));
        return deliver::packet(skb, family, endpoint);
    }
    packet.stays();
    let peer = packet.key.src;
    deliver::clamp(skb, config, packet, &peer)?;
    if packet.kind == Kind::IcmpError {
        packet.key.direction = FLOW_REVERSE;
        packet.key.endpoint = endpoint.number;
        if error::translate(skb, 0, config, packet)?.is_none() {
            translate::pass(skb, 0, family)?;
        }
    } else if flow::undo(config, packet, endpoint.number, 0).is_some() {
        translate::translate(skb, 0, packet)?;
        count::passed(skb, 0, packet);
    } else if hold::is_on(config, CONFIG_HOLD_UNKNOWN) {
        return Err(Reason::Held);
    } else if endpoint.number == NODE_ENDPOINT && !is_for_host(packet) {
        return Err(Reason::TunnelDestination);
    } else {
        if packet.kind == Kind::Udp {
            flow::note_inbound(packet, endpoint)?;
        }
        translate::pass(skb, 0, family)?;
    }
    if packet.part == Part::First {
        fragment::remember(packet, TUNNEL);
    }
    log::passed(packet, Way::Local(endpoint));
    deliver::packet(skb, family, endpoint)
}

/// Whether the node endpoint takes a packet that belongs to no flow of its own. The host behind it is a client and
/// is asked by the probes of its peers; what else it listens to is nothing of the mesh's.
#[inline(always)]
const fn is_for_host(packet: &Packet) -> bool {
    match packet.kind {
        Kind::Tcp => !packet.opens(),
        Kind::Udp => matches!(u16::from_be(packet.key.dport_be), ECHO_PORT | PATH_PORT),
        _ => true,
    }
}
