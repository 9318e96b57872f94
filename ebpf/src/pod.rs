//! Packets that an endpoint sends: a pod through its veth, the host's processes through the node endpoint.

use ebpf_common::{
    addr::NODE_ENDPOINT,
    layout::{Addr, Config, Endpoint},
    reason::Reason,
};

use crate::{
    address::{self, Name},
    deliver::{self, Way},
    flow,
    header::ETHERNET_LEN,
    maps,
    parse::{Family, Kind, Packet},
    skb::Skb,
    translate, vip,
};

/// Decides about one frame; the result is the TC action of a packet on its way.
#[inline(always)]
pub(crate) fn from_endpoint(skb: &mut Skb) -> Result<i32, Reason> {
    let config = maps::config()?;
    let endpoint = maps::endpoint(skb.ifindex()).ok_or(Reason::SpoofedSource)?;
    skb.pull_headers();
    let family = Family::of_frame(skb)?;
    let packet = maps::scratch()?;
    packet.read(skb, ETHERNET_LEN, family)?;
    if packet.key.src != own_address(endpoint, family) {
        return Err(Reason::SpoofedSource);
    }
    match address::name(config, family, &packet.key.dst) {
        Name::Foreign => Err(Reason::NotMesh),
        Name::Vip(policy) => {
            let tuple = vip::resolve(config, endpoint, packet, policy)?;
            let name = address::name(config, family, &tuple.dst);
            let way = deliver::way(config, &tuple.dst, name)?;
            deliver::fits(skb, config, packet, way)?;
            translate::translate(skb, ETHERNET_LEN, packet, &tuple)?;
            deliver::frame(skb, config, way)
        }
        name => to_endpoint(skb, config, endpoint, packet, name),
    }
}

/// A packet straight to an endpoint: a backend's answer, or a probe of the node endpoint.
#[inline(always)]
fn to_endpoint(
    skb: &mut Skb,
    config: &Config,
    endpoint: &Endpoint,
    packet: &mut Packet,
    name: Name,
) -> Result<i32, Reason> {
    let way = deliver::way(config, &packet.key.dst, name)?;
    if let Way::Local(receiver) = way
        && let Some(tuple) = flow::undo(packet, receiver.number, endpoint.number)
    {
        translate::translate(skb, ETHERNET_LEN, packet, &tuple)?;
        // A hairpin's answer goes back to the pod that it came from.
        let way = match maps::local(&tuple.dst) {
            Some(client) if tuple.dst != packet.key.dst => Way::Local(client),
            _ => way,
        };
        return deliver::frame(skb, config, way);
    }
    admit(endpoint, packet, way)?;
    deliver::fits(skb, config, packet, way)?;
    deliver::frame(skb, config, way)
}

/// Only answers go from endpoint to endpoint; the node endpoint's probes go too.
#[inline(always)]
fn admit(endpoint: &Endpoint, packet: &Packet, way: Way) -> Result<(), Reason> {
    if endpoint.number == NODE_ENDPOINT {
        if let (Kind::Udp, Way::Local(receiver)) = (packet.kind, way) {
            flow::note_inbound(packet, receiver.number);
        }
        return Ok(());
    }
    let answer = match packet.kind {
        Kind::Tcp => !packet.opens(),
        Kind::Udp => flow::answers_inbound(packet, endpoint.number),
        Kind::EchoRequest => false,
        Kind::EchoReply | Kind::IcmpError => true,
    };
    if answer {
        Ok(())
    } else {
        Err(Reason::DirectEndpoint)
    }
}

#[inline(always)]
fn own_address(endpoint: &Endpoint, family: Family) -> Addr {
    match family {
        Family::V4 => endpoint.addr4,
        Family::V6 => endpoint.addr6,
    }
}
