//! What is remembered of a flow, and the life of a TCP connection.
//!
//! ```text
//!            FLOWS, TCP                                    gives way?
//!   SYN      forward + reverse, and the key into AGEING    oldest first
//!   SYN, ACK the reverse entry notes it                    oldest first
//!   ACK      both are established                          never
//!   FIN, FIN | RST   over: the key into AGEING, if it      oldest first
//!                    has left it
//!   ACK of the last  both are forgotten, if both ends
//!   FIN              are on this node
//! ```
//!
//! `AGEING` is a queue of bounded length. Whoever finds it full takes the oldest key out, and if that connection is
//! not established or over, both of its entries go; so do they when `FLOWS` is full. So what opens and what lingers
//! is bounded, without user space, and a flood of either never costs an established connection. What is over still
//! translates the last acknowledgements, but counts for no quota. Between two ends on this node no segment is lost on
//! a way, so nothing is to come after the last of them: what is forgotten then leaves its memory to the next
//! connection while it is in the cache. An end that misses it after all (its queue was full) says FIN again, and is
//! reset.
//!
//! A flow has a forward and a reverse entry; each holds what is needed to make the other's key. UDP and ICMP echo
//! live in `FLOWS_LRU`.

mod ageing;
mod end;
mod place;

pub(crate) use self::{
    ageing::{age, make_room},
    end::{close_forward, finish_forward},
    place::place,
};

use ebpf_common::{
    addr::NODE_ENDPOINT,
    layout::{
        ACCOUNT_DATAGRAM, ACCOUNT_INBOUND, ACCOUNT_TCP, Addr, Backend, Config, Endpoint,
        FLOW_ESTABLISHED, FLOW_FIN_BACKEND, FLOW_FIN_CLIENT, FLOW_FORWARD, FLOW_HAIRPIN,
        FLOW_INBOUND, FLOW_LAST_ACK, FLOW_REVERSE, FLOW_RST, FLOW_SYN_ACK, Flow, FlowKey,
    },
    reason::Reason,
};

use crate::{
    maps::{self, Entry, Inserted, Table, Tally},
    parse::{Family, Kind, Packet},
    translate::Tuple,
};

/// The entry of `key`.
#[inline(never)]
pub(crate) fn find(key: &FlowKey) -> Option<Entry> {
    Table::of(key.proto).get(key)
}

/// Both directions have ended.
const ENDED: u32 = FLOW_FIN_CLIENT | FLOW_FIN_BACKEND;

/// Whether both directions have ended, or the connection was reset.
#[inline(always)]
pub(crate) const fn is_over(flags: u32) -> bool {
    flags & FLOW_RST != 0 || flags & ENDED == ENDED
}

/// Whether a connection with these flags gives way to others.
#[inline(always)]
const fn gives_way(flags: u32) -> bool {
    is_over(flags) || flags & FLOW_ESTABLISHED == 0
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

// The table is a constant where it is known: otherwise the verifier tries both at every step of a flow.

/// Removes a connection by its forward entry.
#[inline(never)]
pub(crate) fn forget_connection(config: &Config, key: &FlowKey, entry: Entry) {
    let was_counted = !is_over(entry.flags());
    if forget(Table::Connections, config, key, entry) && was_counted {
        tell_closed(key.endpoint, ACCOUNT_TCP);
    }
}

/// Removes a datagram's flow by its forward entry.
#[inline(never)]
pub(crate) fn forget_datagrams(config: &Config, key: &FlowKey, entry: Entry) {
    if forget(Table::Datagrams, config, key, entry) {
        tell_closed(key.endpoint, ACCOUNT_DATAGRAM);
    }
}

/// Removes a flow by its forward entry, the reverse one only where it is this flow's; false where it was gone.
#[inline(always)]
fn forget(table: Table, config: &Config, key: &FlowKey, entry: Entry) -> bool {
    if entry.other().is_none() {
        let reverse = reverse_key(config, key, entry.flow());
        if let Some(other) = table.get(&reverse)
            && belongs_to(other.flow(), key, entry.flow())
        {
            table.remove(&reverse);
        }
    }
    table.remove(key)
}

/// The reverse entry of the connection with this forward entry.
#[inline(always)]
fn reverse_of(config: &Config, key: &FlowKey, forward: Entry) -> Option<Entry> {
    forward.other().or_else(|| {
        find(&reverse_key(config, key, forward.flow()))
            .filter(|reverse| belongs_to(reverse.flow(), key, forward.flow()))
    })
}

#[inline(always)]
fn tell_closed(endpoint: u32, kind: usize) {
    if let Some(tally) = Tally::find(endpoint) {
        tally.closed(kind);
    }
}

/// Whether a reverse entry is of the flow with this forward entry. A pod that is its own backend and the host that
/// calls that pod are both answered at the node endpoint: only what the entries say tells them apart.
#[inline(always)]
pub(crate) fn belongs_to(reverse: &Flow, key: &FlowKey, forward: &Flow) -> bool {
    reverse.addr == key.dst
        && reverse.port_be == key.dport_be
        && reverse.client_port_be == key.sport_be
        && (reverse.flags ^ forward.flags) & FLOW_HAIRPIN == 0
}

/// Notes that the client has answered the backend's SYN.
#[inline(never)]
pub(crate) fn establish(config: &Config, key: &FlowKey, forward: Entry) -> Result<(), Reason> {
    match reverse_of(config, key, forward) {
        Some(reverse) => {
            if reverse.flags() & FLOW_SYN_ACK != 0 {
                reverse.set(FLOW_ESTABLISHED);
                forward.set(FLOW_ESTABLISHED | FLOW_SYN_ACK);
            }
            Ok(())
        }
        _ => {
            // Its answers would not be recognised any more.
            forget_connection(config, key, forward);
            Err(Reason::NoFlow)
        }
    }
}

// What happens once per flow is a function of its own, also in the object: the kernel's 512 bytes of stack are
// counted over the chain of calls, and the path of every packet needs its share.

/// Decides what a backend's packet is to the endpoint `client`; `None` where it belongs to no translated flow.
/// `sender` is the number of the endpoint that it comes from, 0 for the tunnel.
#[inline(always)]
pub(crate) fn undo(config: &Config, packet: &mut Packet, client: u32, sender: u32) -> Option<()> {
    packet.key.direction = FLOW_REVERSE;
    packet.key.endpoint = client;
    if packet.kind != Kind::Tcp {
        let entry = Table::Datagrams.get(&packet.key)?;
        packet.to = undone(&packet.key, entry.flow());
        packet.belongs_to(entry.flow());
        entry.touch();
        return Some(());
    }
    let entry = Table::Connections.get(&packet.key)?;
    packet.to = undone(&packet.key, entry.flow());
    packet.belongs_to(entry.flow());
    entry.touch();
    if packet.accepts() {
        entry.set(FLOW_SYN_ACK);
    }
    if packet.closes() {
        end::close_reverse(config, packet, entry, sender);
    } else if entry.flags() & FLOW_LAST_ACK != 0 {
        end::finish_reverse(packet, entry, sender);
    }
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

/// Remembers that a datagram was delivered to a local endpoint untranslated, so that its answer may leave.
#[inline(always)]
pub(crate) fn note_inbound(packet: &Packet, endpoint: &Endpoint) -> Result<(), Reason> {
    let key = FlowKey {
        endpoint: endpoint.number,
        direction: FLOW_INBOUND,
        ..packet.key
    };
    match Table::Datagrams.get(&key) {
        Some(entry) => {
            entry.touch();
            Ok(())
        }
        None => first_inbound(&key, endpoint),
    }
}

#[inline(never)]
fn first_inbound(key: &FlowKey, endpoint: &Endpoint) -> Result<(), Reason> {
    let tally = Tally::of(endpoint.number)
        .ok_or(Reason::Internal)?
        .with_room(endpoint, ACCOUNT_INBOUND)
        .ok_or(Reason::FlowQuota)?;
    let now = maps::now_ns();
    let flow = Flow {
        last_seen_ns: now,
        born_s: maps::seconds(now),
        ..EMPTY
    };
    match Table::Datagrams.insert(key, &flow) {
        Inserted::Yes => tally.opened(ACCOUNT_INBOUND),
        // Another CPU was first.
        Inserted::Exists => {}
        Inserted::Full => return Err(Reason::Internal),
    }
    Ok(())
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
    match Table::Datagrams.get(&key) {
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
