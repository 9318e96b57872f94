//! Packets that an endpoint sends: a pod through its veth, the host's processes through the node endpoint.

use ebpf_common::{
    addr::NODE_ENDPOINT,
    layout::{Addr, CONFIG_HOLD_UNKNOWN, Config, Endpoint, FLOW_FORWARD, FLOW_REVERSE},
    reason::Reason,
};

use crate::{
    address::{self, Name},
    count,
    deliver::{self, Way},
    error, flow, fragment,
    header::{ETHERNET_LEN, TCP_LEN},
    hold, log, maps,
    parse::{Family, Kind, Packet, Part},
    skb::Skb,
    translate, vip,
};

/// Decides about one frame; the result is the TC action of a packet on its way.
#[inline(always)]
pub(crate) fn from_endpoint(skb: &mut Skb) -> Result<i32, Reason> {
    let packet = maps::scratch()?;
    packet.begin();
    let config = maps::config()?;
    let endpoint = maps::endpoint(skb.ifindex()).ok_or(Reason::SpoofedSource)?;
    packet.sender = endpoint.number;
    let family = Family::of_frame(skb)?;
    skb.pull(ETHERNET_LEN + family.len() + TCP_LEN);
    packet.read(skb, ETHERNET_LEN, family)?;
    let name = address::name(config, family, &packet.key.dst);
    if name != Name::Foreign && packet.key.src != own_address(endpoint, family) {
        return Err(Reason::SpoofedSource);
    }
    if name == Name::Foreign {
        return Err(Reason::NotMesh);
    }
    if packet.hops <= 1 {
        return Err(Reason::HopLimit);
    }
    if packet.is_later() {
        return later_fragment(skb, config, endpoint, packet);
    }
    packet.stays();
    let action = forward(skb, config, endpoint, packet, name)?;
    if packet.part == Part::First {
        fragment::remember(packet, endpoint.number);
    }
    Ok(action)
}

/// A packet that has a transport header.
#[inline(always)]
fn forward(
    skb: &mut Skb,
    config: &Config,
    endpoint: &Endpoint,
    packet: &mut Packet,
    name: Name,
) -> Result<i32, Reason> {
    let family = packet.family;
    match name {
        Name::Foreign => Err(Reason::NotMesh),
        Name::Vip(_) if packet.kind == Kind::IcmpError => {
            packet.key.direction = FLOW_FORWARD;
            packet.key.endpoint = endpoint.number;
            error::translate(skb, ETHERNET_LEN, config, packet)?.ok_or(Reason::NoFlow)?;
            let way = deliver::way(config, family, &packet.to.dst)?;
            send(skb, config, packet, way)
        }
        Name::Vip(policy) => {
            vip::resolve(config, endpoint, packet, policy)?;
            let way = deliver::way(config, family, &packet.to.dst)?;
            let to = packet.to.dst;
            deliver::fit(skb, config, packet, way, &to)?;
            translate::translate(skb, ETHERNET_LEN, packet)?;
            count::passed(skb, ETHERNET_LEN, packet);
            send(skb, config, packet, way)
        }
        Name::Endpoint { .. } => to_endpoint(skb, config, endpoint, packet),
    }
}

/// A packet straight to an endpoint: a backend's answer, or a probe of the node endpoint.
#[inline(always)]
fn to_endpoint(
    skb: &mut Skb,
    config: &Config,
    endpoint: &Endpoint,
    packet: &mut Packet,
) -> Result<i32, Reason> {
    let way = deliver::way(config, packet.family, &packet.key.dst)?;
    if let (Way::Local(receiver), Kind::IcmpError) = (way, packet.kind) {
        packet.key.direction = FLOW_REVERSE;
        packet.key.endpoint = receiver.number;
        return match error::translate(skb, ETHERNET_LEN, config, packet)? {
            Some(_) => back(skb, config, packet, way),
            None => {
                translate::pass(skb, ETHERNET_LEN, packet.family)?;
                send(skb, config, packet, way)
            }
        };
    }
    if let Way::Local(receiver) = way
        && flow::undo(config, packet, receiver.number, endpoint.number).is_some()
    {
        translate::translate(skb, ETHERNET_LEN, packet)?;
        count::passed(skb, ETHERNET_LEN, packet);
        return back(skb, config, packet, way);
    }
    let is_answer = matches!(way, Way::Local(_)) && endpoint.number != NODE_ENDPOINT;
    if is_answer && hold::is_on(config, CONFIG_HOLD_UNKNOWN) {
        return Err(Reason::Held);
    }
    admit(endpoint, packet, way)?;
    let to = packet.key.dst;
    deliver::fit(skb, config, packet, way, &to)?;
    translate::pass(skb, ETHERNET_LEN, packet.family)?;
    send(skb, config, packet, way)
}

/// A fragment that goes where its first one went.
#[inline(always)]
fn later_fragment(
    skb: &mut Skb,
    config: &Config,
    endpoint: &Endpoint,
    packet: &mut Packet,
) -> Result<i32, Reason> {
    fragment::recall(packet, endpoint.number)?;
    let to = packet.to.dst;
    let way = deliver::way(config, packet.family, &to)?;
    deliver::fit(skb, config, packet, way, &to)?;
    translate::readdress(skb, ETHERNET_LEN, packet)?;
    count::passed(skb, ETHERNET_LEN, packet);
    send(skb, config, packet, way)
}

/// Delivers what was translated back; a hairpin's answer goes to the pod that it came from, not to the node endpoint.
#[inline(always)]
fn back(skb: &mut Skb, config: &Config, packet: &Packet, way: Way) -> Result<i32, Reason> {
    let way = if packet.to.dst == packet.key.dst {
        way
    } else {
        Way::Local(maps::local(&packet.to.dst).ok_or(Reason::NoEndpoint)?)
    };
    send(skb, config, packet, way)
}

/// Only answers go from endpoint to endpoint; the node endpoint's probes go too.
#[inline(always)]
fn admit(endpoint: &Endpoint, packet: &Packet, way: Way) -> Result<(), Reason> {
    if endpoint.number == NODE_ENDPOINT {
        if let (Kind::Udp, Way::Local(receiver)) = (packet.kind, way) {
            flow::note_inbound(packet, receiver)?;
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

/// Sends the frame at hand its way.
#[inline(always)]
fn send(skb: &mut Skb, config: &Config, packet: &Packet, way: Way) -> Result<i32, Reason> {
    log::passed(packet, way);
    deliver::frame(skb, config, way)
}

#[inline(always)]
fn own_address(endpoint: &Endpoint, family: Family) -> Addr {
    match family {
        Family::V4 => endpoint.addr4,
        Family::V6 => endpoint.addr6,
    }
}
