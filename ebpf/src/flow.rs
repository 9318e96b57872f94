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

use ebpf_common::{
    addr::NODE_ENDPOINT,
    layout::{
        ACCOUNT_DATAGRAM, ACCOUNT_INBOUND, ACCOUNT_TCP, Addr, Backend, Config, Endpoint,
        FLOW_ESTABLISHED, FLOW_FIN_BACKEND, FLOW_FIN_CLIENT, FLOW_FORWARD, FLOW_HAIRPIN,
        FLOW_INBOUND, FLOW_LAST_ACK, FLOW_QUEUED, FLOW_REVERSE, FLOW_RST, FLOW_SYN_ACK, Flow,
        FlowKey, age_tag,
    },
    reason::Reason,
};

use crate::{
    header::TCP_RST,
    log,
    maps::{self, Entry, Inserted, Table, Tally},
    parse::{Family, Kind, Packet, Part},
    translate::Tuple,
};

/// The entry of `key`.
#[inline(always)]
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
    let reverse = reverse_key(config, key, entry.flow());
    if let Some(other) = table.get(&reverse)
        && belongs_to(other.flow(), key, entry.flow())
    {
        table.remove(&reverse);
    }
    table.remove(key)
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

/// Puts a connection that opens, or is over, behind the others that give way; its client's first number is `isn_be`.
#[inline(always)]
pub(crate) fn age(config: &Config, key: &mut FlowKey, isn_be: u32) {
    // In place, because stack is scarce.
    key.pad = age_tag(isn_be);
    let mut is_queued = maps::age(key);
    if !is_queued {
        give_way(config);
        is_queued = maps::age(key);
    }
    key.pad = 0;
    if !is_queued && let Some(entry) = Table::Connections.get(key) {
        // Another CPU has taken the room: it is put there when it ends, or user space collects it.
        entry.clear(FLOW_QUEUED);
    }
}

/// How many keys are taken out of `AGEING` at once for one connection that gives way: most may be of connections that
/// are forgotten already.
const LOOKS: u32 = 8;

/// Lets a connection give way; false when none is left.
#[inline(always)]
pub(crate) fn make_room() -> bool {
    let Ok(config) = maps::config() else {
        return false;
    };
    for _ in 0..LOOKS {
        match give_way(config) {
            Turn::Gave => return true,
            Turn::Stayed => {}
            Turn::Nobody => return false,
        }
    }
    true
}

/// What became of the oldest key in `AGEING`.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
enum Turn {
    /// Its connection was forgotten.
    Gave,
    /// Its connection is established, or was forgotten before.
    Stayed,
    /// There is no key.
    Nobody,
}

/// Takes the oldest connection that gives way out of `AGEING`, and out of `FLOWS` where it has not become
/// established.
#[inline(never)]
fn give_way(config: &Config) -> Turn {
    let Some(mut key) = maps::oldest() else {
        return Turn::Nobody;
    };
    let tag = key.pad;
    key.pad = 0;
    let Some(entry) = Table::Connections.get(&key) else {
        return Turn::Stayed;
    };
    // Another connection has the tuple by now: it has a place of its own.
    if tag != 0 && tag != age_tag(entry.flow().isn_be) {
        return Turn::Stayed;
    }
    let mut flags = entry.flags();
    if !gives_way(flags) {
        // Who ends it now puts the key back, or has ended it before this and leaves it to us.
        flags = entry.clear(FLOW_QUEUED);
    }
    if !gives_way(flags) {
        return Turn::Stayed;
    }
    forget_connection(config, &key, entry);
    Turn::Gave
}

/// Notes that the client has answered the backend's SYN.
#[inline(never)]
pub(crate) fn establish(config: &Config, key: &FlowKey, forward: Entry) -> Result<(), Reason> {
    match Table::Connections.get(&reverse_key(config, key, forward.flow())) {
        Some(reverse) if belongs_to(reverse.flow(), key, forward.flow()) => {
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

/// Notes the end of the client's direction.
#[inline(never)]
pub(crate) fn close_forward(config: &Config, packet: &mut Packet, forward: Entry) {
    let bits = ending(packet, FLOW_FIN_CLIENT);
    let reverse = Table::Connections
        .get(&reverse_key(config, &packet.key, forward.flow()))
        .filter(|reverse| belongs_to(reverse.flow(), &packet.key, forward.flow()));
    let before = reverse.map_or(bits, |reverse| reverse.set(bits));
    if end(config, &mut packet.key, forward, bits) {
        log::ended(packet, forward.flow().born_s);
    }
    if let Some(reverse) = reverse
        && is_last_fin(packet, bits, before, reverse)
        && maps::local(&forward.flow().addr).is_some()
    {
        reverse.await_number(packet.fin_acknowledged_be());
        reverse.set(FLOW_LAST_ACK);
    }
}

/// Notes the end of the backend's direction.
#[inline(never)]
fn close_reverse(config: &Config, packet: &Packet, reverse: Entry, sender: u32) {
    let fin = ending(packet, FLOW_FIN_BACKEND);
    let before = reverse.set(fin);
    let mut bits = fin;
    if is_last_fin(packet, fin, before, reverse) && sender != 0 {
        reverse.await_number(packet.fin_acknowledged_be());
        bits |= FLOW_LAST_ACK;
    }
    let mut key = forward_key(&packet.key, reverse.flow(), sender);
    if let Some(forward) = Table::Connections.get(&key)
        && answers_to(forward.flow(), &packet.key)
        && end(config, &mut key, forward, bits)
    {
        log::ended(packet, reverse.flow().born_s);
    }
}

/// Whether a forward entry is of the flow whose reverse entry has this key.
#[inline(always)]
fn answers_to(forward: &Flow, reverse: &FlowKey) -> bool {
    forward.addr == reverse.src
        && forward.port_be == reverse.sport_be
        && forward.client_port_be == reverse.dport_be
}

/// Whether a FIN is the second one, and acknowledges the first; of the first it notes what acknowledges it.
/// `before` are the reverse entry's flags before this FIN's.
#[inline(always)]
fn is_last_fin(packet: &Packet, fin: u32, before: u32, reverse: Entry) -> bool {
    if fin == FLOW_RST || before & (FLOW_RST | fin) != 0 || packet.part != Part::Whole {
        return false;
    }
    if before & ENDED == 0 {
        reverse.await_number(packet.fin_acknowledged_be());
        return false;
    }
    packet.acknowledges(reverse.number_be())
}

/// Forgets a connection that is over where the client's segment is its last.
#[inline(never)]
pub(crate) fn finish_forward(config: &Config, packet: &Packet, forward: Entry) {
    let key = reverse_key(config, &packet.key, forward.flow());
    if let Some(reverse) = Table::Connections.get(&key)
        && belongs_to(reverse.flow(), &packet.key, forward.flow())
        && packet.acknowledges(reverse.number_be())
    {
        Table::Connections.remove(&key);
        Table::Connections.remove(&packet.key);
    }
}

/// Forgets a connection that is over where the backend's segment is its last.
#[inline(never)]
fn finish_reverse(packet: &Packet, reverse: Entry, sender: u32) {
    if !packet.acknowledges(reverse.number_be()) {
        return;
    }
    let key = forward_key(&packet.key, reverse.flow(), sender);
    if let Some(forward) = Table::Connections.get(&key)
        && answers_to(forward.flow(), &packet.key)
    {
        Table::Connections.remove(&packet.key);
        Table::Connections.remove(&key);
    }
}

/// Notes an end on the forward entry, which decides when the connection is over: whether it is now.
#[inline(always)]
fn end(config: &Config, key: &mut FlowKey, forward: Entry, bits: u32) -> bool {
    let before = forward.set(bits);
    let ends = !is_over(before) && is_over(before | bits);
    if ends {
        tell_closed(key.endpoint, ACCOUNT_TCP);
        if before & FLOW_QUEUED == 0 {
            age(config, key, forward.flow().isn_be);
        }
    }
    ends
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
        close_reverse(config, packet, entry, sender);
    } else if entry.flags() & FLOW_LAST_ACK != 0 {
        finish_reverse(packet, entry, sender);
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
