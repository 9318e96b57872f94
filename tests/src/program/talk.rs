//! What the client pod of a [`Stage`] says to service 5, and what it hears.

use std::net::IpAddr;

use ebpf_common::{
    addr::Policy,
    layout::{FLOW_FORWARD, FLOW_REVERSE, Flow, FlowKey},
};

use super::{
    REDIRECTED,
    packet::{ACK, FIN, Packet, RST, SYN},
    stage::{CLIENT, Family, NODE, PORT, Stage, TARGET, endpoint_address, vip_address},
};

/// One of the client's sockets.
#[must_use]
pub fn client(family: Family, port: u16) -> (IpAddr, u16) {
    (endpoint_address(family, NODE, CLIENT), port)
}

/// A service's balanced VIP.
#[must_use]
pub fn vip(family: Family, service: u16) -> (IpAddr, u16) {
    (vip_address(family, Policy::Balanced, service), PORT)
}

/// A local backend's socket.
#[must_use]
pub fn backend(family: Family, number: u32) -> (IpAddr, u16) {
    (endpoint_address(family, NODE, number), TARGET)
}

/// One segment from the client to service 5.
#[must_use]
pub fn segment(family: Family, port: u16, flags: u8, seq: u32) -> Packet {
    Packet::tcp(client(family, port), vip(family, 5), flags, seq, 1)
}

/// Declares service 5 with all of its flows going to the local endpoint `backend`.
pub fn point_to(stage: &mut Stage, backend: u32) {
    stage.service(Policy::Balanced, 5, &[10 + backend]);
}

/// Takes a connection to service 5 through its handshake; the backend's number.
pub fn connect(stage: &mut Stage, family: Family, port: u16, isn: u32) -> u32 {
    let (backend, seen) = stage.deliver(CLIENT, &segment(family, port, SYN, isn));
    let accept = Packet::tcp(
        (seen.dst, seen.dport),
        (seen.src, seen.sport),
        SYN | ACK,
        9,
        isn + 1,
    );
    stage.deliver(backend, &accept);
    stage.deliver(CLIENT, &segment(family, port, ACK, isn + 1));
    backend
}

/// Ends a connection from both sides; its backend is the local endpoint `number`.
pub fn close(stage: &mut Stage, family: Family, port: u16, number: u32, seq: u32) {
    stage.deliver(CLIENT, &segment(family, port, FIN | ACK, seq));
    let fin = Packet::tcp(
        backend(family, number),
        client(family, port),
        FIN | ACK,
        10,
        seq + 1,
    );
    stage.deliver(number, &fin);
}

/// Whether the client is reset for saying this.
pub fn resets(stage: &mut Stage, packet: &Packet) -> bool {
    let outcome = stage.send(CLIENT, packet);
    outcome.action == REDIRECTED
        && Packet::parse(&outcome.bytes[14..])
            .expect("a right packet")
            .flags()
            & RST
            != 0
}

/// The forward entry of the client's flow from `port`.
pub fn forward(stage: &mut Stage, table: &str, port: u16) -> Option<(FlowKey, Flow)> {
    let flows = stage.node.flows(table);
    flows.into_iter().find(|(key, _)| {
        (key.direction, key.endpoint, key.sport_be) == (FLOW_FORWARD, CLIENT, port.to_be())
    })
}

/// The reverse entry of the client's flow from `port`.
pub fn reverse(stage: &mut Stage, table: &str, port: u16) -> Option<(FlowKey, Flow)> {
    let flows = stage.node.flows(table);
    flows.into_iter().find(|(key, flow)| {
        (key.direction, key.endpoint, flow.client_port_be) == (FLOW_REVERSE, CLIENT, port.to_be())
    })
}
