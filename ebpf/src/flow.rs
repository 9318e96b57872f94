//! What is remembered of a flow, and the life of a TCP connection.
//!
//! ```text
//!   SYN            FLOWS_LRU: forward + reverse
//!   SYN, ACK       the reverse entry notes it
//!   ACK            both are put into FLOWS (full: refused); the old pair stays behind as a shadow
//!   FIN, FIN | RST both leave FLOWS; the pair in FLOWS_LRU ages out
//! ```
//!
//! `FLOWS` is asked first, so a shadow is never seen while its flow lives. A flow has a forward and a reverse
//! entry; each holds what is needed to make the other's key. UDP and ICMP echo live in `FLOWS_LRU` alone.

use ebpf_common::{
    addr::NODE_ENDPOINT,
    layout::{
        Addr, Backend, Config, FLOW_ESTABLISHED, FLOW_FIN_BACKEND, FLOW_FIN_CLIENT, FLOW_FORWARD,
        FLOW_HAIRPIN, FLOW_INBOUND, FLOW_REVERSE, FLOW_RST, FLOW_SYN_ACK, Flow, FlowKey, PROTO_TCP,
    },
    reason::Reason,
};

use crate::{
    header::TCP_RST,
    log,
    maps::{self, Entry, Table},
    parse::{Family, Kind, Packet},
    translate::Tuple,
};

/// A flow entry and where it was.
#[derive(Clone, Copy)]
pub(crate) struct Found {
    pub(crate) entry: Entry,
    pub(crate) table: Table,
}

/// The entry of `key`, in the table that counts.
#[inline(always)]
pub(crate) fn find(key: &FlowKey) -> Option<Found> {
    if key.proto == PROTO_TCP
        && let Some(entry) = Table::Established.get(key)
    {
        return Some(Found {
            entry,
            table: Table::Established,
        });
    }
    Table::Recent.get(key).map(|entry| Found {
        entry,
        table: Table::Recent,
    })
}

/// Whether both directions have ended, or the connection was reset.
#[inline(always)]
pub(crate) const fn is_over(flags: u32) -> bool {
    const BOTH: u32 = FLOW_FIN_CLIENT | FLOW_FIN_BACKEND;
    flags & FLOW_RST != 0 || flags & BOTH == BOTH
}

/// The backend of a flow, if it is the one that was picked and not dead.
#[inline(always)]
pub(crate) fn live_backend(flow: &Flow) -> Option<&'static Backend> {
    maps::backend(flow.backend)
        .filter(|backend| backend.generation == flow.generation && backend.flags != 0)
}

/// The node endpoint's address of a family.
#[inline(always)]
pub(crate) fn node_address(config: &Config, family: Family) -> Addr {
    match family {
        Family::V4 => config.node4,
        Family::V6 => config.node6,
    }
}

#[inline(always)]
fn family_of(address: &Addr) -> Family {
    if address.is_v4() {
        Family::V4
    } else {
        Family::V6
    }
}

/// The key of the reverse entry of the flow with this forward entry.
#[inline(always)]
pub(crate) fn reverse_key(config: &Config, key: &FlowKey, flow: &Flow) -> FlowKey {
    let hairpin = flow.flags & FLOW_HAIRPIN != 0;
    FlowKey {
        src: flow.addr,
        dst: if hairpin {
            node_address(config, family_of(&key.src))
        } else {
            key.src
        },
        sport_be: flow.port_be,
        dport_be: flow.client_port_be,
        endpoint: if hairpin { NODE_ENDPOINT } else { key.endpoint },
        proto: key.proto,
        direction: FLOW_REVERSE,
        pad: 0,
    }
}

/// The key of the forward entry of the flow with this reverse entry; `sender` is the endpoint that a hairpin came from.
#[inline(always)]
fn forward_key(key: &FlowKey, flow: &Flow, sender: u32) -> FlowKey {
    let hairpin = flow.flags & FLOW_HAIRPIN != 0;
    FlowKey {
        src: if hairpin { key.src } else { key.dst },
        dst: flow.addr,
        sport_be: flow.client_port_be,
        dport_be: flow.port_be,
        endpoint: if hairpin { sender } else { key.endpoint },
        proto: key.proto,
        direction: FLOW_FORWARD,
        pad: 0,
    }
}

/// Removes a flow by its forward entry.
#[inline(never)]
pub(crate) fn forget(config: &Config, key: &FlowKey, flow: &Flow) {
    let reverse = reverse_key(config, key, flow);
    for table in [Table::Established, Table::Recent] {
        table.remove(&reverse);
        table.remove(key);
    }
}

/// Moves a connection into `FLOWS` once the client has answered the backend's SYN.
#[inline(never)]
pub(crate) fn promote(config: &Config, key: &FlowKey, forward: Entry) -> Result<(), Reason> {
    let reverse_key = reverse_key(config, key, forward.flow());
    let Some(reverse) = Table::Recent.get(&reverse_key) else {
        // Its answers would not be recognised any more.
        forget(config, key, forward.flow());
        return Err(Reason::NoFlow);
    };
    if reverse.flags() & FLOW_SYN_ACK == 0 {
        return Ok(());
    }
    reverse.set(FLOW_ESTABLISHED);
    forward.set(FLOW_ESTABLISHED | FLOW_SYN_ACK);
    if Table::Established.put(&reverse_key, reverse.flow())
        && Table::Established.put(key, forward.flow())
    {
        Ok(())
    } else {
        forget(config, key, forward.flow());
        Err(Reason::FlowTableFull)
    }
}

/// Notes a FIN or RST on both entries; a connection that is over leaves `FLOWS`. Whether this one made it so.
#[inline(always)]
fn close(key: &FlowKey, own: Found, partner_key: &FlowKey, bits: u32) -> bool {
    let was_over = is_over(own.entry.flags());
    own.entry.set(bits);
    let ends = !was_over && is_over(own.entry.flags());
    let Some(partner) = find(partner_key) else {
        return ends;
    };
    partner.entry.set(bits);
    if is_over(own.entry.flags()) {
        settle(key, own);
        settle(partner_key, partner);
    }
    ends
}

/// Moves one entry of a connection that is over out of `FLOWS`.
#[inline(always)]
fn settle(key: &FlowKey, found: Found) {
    if found.table == Table::Established {
        match Table::Recent.get(key) {
            Some(shadow) => shadow.set(found.entry.flags()),
            None => {
                Table::Recent.put(key, found.entry.flow());
            }
        }
        Table::Established.remove(key);
    }
}

// What happens once per flow is a function of its own, also in the object: the kernel's 512 bytes of stack are
// counted over the chain of calls, and the path of every packet needs its share.

/// Notes the end of the client's direction.
#[inline(never)]
pub(crate) fn close_forward(config: &Config, packet: &Packet, own: Found) {
    let partner = reverse_key(config, &packet.key, own.entry.flow());
    let born_s = own.entry.flow().born_s;
    if close(&packet.key, own, &partner, ending(packet, FLOW_FIN_CLIENT)) {
        log::ended(packet, born_s);
    }
}

/// Notes the end of the backend's direction.
#[inline(never)]
fn close_reverse(packet: &Packet, own: Found, sender: u32) {
    let partner = forward_key(&packet.key, own.entry.flow(), sender);
    let born_s = own.entry.flow().born_s;
    if close(&packet.key, own, &partner, ending(packet, FLOW_FIN_BACKEND)) {
        log::ended(packet, born_s);
    }
}

#[inline(always)]
const fn ending(packet: &Packet, fin: u32) -> u32 {
    if packet.tcp_flags & TCP_RST != 0 {
        FLOW_RST
    } else {
        fin
    }
}

/// Decides what a backend's packet is to the endpoint `client`; `None` where it belongs to no translated flow.
/// `sender` is the number of the endpoint that it comes from, 0 for the tunnel.
#[inline(always)]
pub(crate) fn undo(packet: &mut Packet, client: u32, sender: u32) -> Option<()> {
    packet.key.direction = FLOW_REVERSE;
    packet.key.endpoint = client;
    let found = find(&packet.key)?;
    let entry = found.entry;
    packet.to = undone(&packet.key, entry.flow());
    packet.belongs_to(entry.flow());
    if packet.kind == Kind::Tcp {
        if packet.accepts() {
            entry.set(FLOW_SYN_ACK);
        }
        if packet.closes() {
            close_reverse(packet, found, sender);
        }
    }
    entry.touch();
    Some(())
}

/// The tuple on the way to the client, for a reverse entry.
#[inline(always)]
pub(crate) fn undone(key: &FlowKey, flow: &Flow) -> Tuple {
    Tuple {
        src: flow.addr,
        dst: if flow.flags & FLOW_HAIRPIN != 0 {
            key.src
        } else {
            key.dst
        },
        sport_be: flow.port_be,
        dport_be: flow.client_port_be,
    }
}

/// The tuple on the way to the backend, for a forward entry.
#[inline(always)]
pub(crate) fn translated(config: &Config, key: &FlowKey, flow: &Flow) -> Tuple {
    Tuple {
        src: if flow.flags & FLOW_HAIRPIN != 0 {
            node_address(config, family_of(&key.src))
        } else {
            key.src
        },
        dst: flow.addr,
        sport_be: flow.client_port_be,
        dport_be: flow.port_be,
    }
}

/// Remembers that a datagram was delivered to the local endpoint `endpoint` untranslated, so that its answer may leave.
#[inline(always)]
pub(crate) fn note_inbound(packet: &Packet, endpoint: u32) {
    let key = FlowKey {
        endpoint,
        direction: FLOW_INBOUND,
        ..packet.key
    };
    match Table::Recent.get(&key) {
        Some(entry) => {
            entry.touch();
        }
        None => {
            let now = maps::now_ns();
            let flow = Flow {
                last_seen_ns: now,
                born_s: maps::seconds(now),
                ..EMPTY
            };
            Table::Recent.put(&key, &flow);
        }
    }
}

/// Whether a datagram of the local endpoint `endpoint` answers one that was delivered to it.
#[inline(always)]
pub(crate) fn answers_inbound(packet: &Packet, endpoint: u32) -> bool {
    let key = FlowKey {
        src: packet.key.dst,
        dst: packet.key.src,
        sport_be: packet.key.dport_be,
        dport_be: packet.key.sport_be,
        endpoint,
        proto: packet.key.proto,
        direction: FLOW_INBOUND,
        pad: 0,
    };
    match Table::Recent.get(&key) {
        Some(entry) => {
            entry.touch();
            true
        }
        None => false,
    }
}

const EMPTY: Flow = Flow {
    last_seen_ns: 0,
    addr: Addr { words: [0; 4] },
    port_be: 0,
    client_port_be: 0,
    flags: 0,
    backend: 0,
    generation: 0,
    isn_be: 0,
    service: 0,
    born_s: 0,
    counter: 0,
};
