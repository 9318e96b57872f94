//! From a VIP to a backend: the flow that exists, or a new one.

use ebpf_common::{
    addr::{NODE_ENDPOINT, Policy},
    layout::{
        ACCOUNT_DATAGRAM, ACCOUNT_TCP, Addr, BACKEND_LIVE, Backend, CONFIG_HOLD_NEW,
        CONFIG_HOLD_UNKNOWN, Config, Endpoint, FLOW_ESTABLISHED, FLOW_FORWARD, FLOW_HAIRPIN,
        FLOW_LAST_ACK, FLOW_QUEUED, FLOW_REVERSE, FLOW_SYN, Flow, FlowKey, PROTO_ICMP, PROTO_ICMP6,
        VIP_FOLLOW, VIP_ITSELF_PORT, Vip, VipKey,
    },
    pick,
    reason::Reason,
};

use crate::{
    count, flow, hold, log,
    maps::{self, Entry, Inserted, Table, Tally},
    parse::{Family, Kind, Packet},
};

/// How many source ports are tried for a reverse entry before the flow is refused.
const PORT_TRIES: u32 = 16;

/// Decides what a client's packet to a VIP is to the backend.
#[inline(always)]
pub(crate) fn resolve(
    config: &Config,
    endpoint: &Endpoint,
    packet: &mut Packet,
    policy: Policy,
) -> Result<(), Reason> {
    packet.key.direction = FLOW_FORWARD;
    packet.key.endpoint = endpoint.number;
    match packet.kind {
        Kind::Tcp => {
            let found = Table::Connections.get(&packet.key);
            if packet.opens() {
                syn(config, endpoint, packet, policy, found)
            } else {
                let found =
                    found.ok_or_else(|| hold::or(config, CONFIG_HOLD_UNKNOWN, Reason::NoFlow))?;
                segment(config, packet, found)
            }
        }
        Kind::Udp | Kind::EchoRequest => match Table::Datagrams.get(&packet.key) {
            Some(entry) => datagram(config, packet, policy, entry),
            None => {
                let tally = admit(endpoint, ACCOUNT_DATAGRAM)?;
                open_datagrams(config, packet, policy)?;
                begun(packet, tally, ACCOUNT_DATAGRAM);
                Ok(())
            }
        },
        Kind::EchoReply => Err(Reason::NoFlow),
        Kind::IcmpError => Err(Reason::Protocol),
    }
}

/// A segment that opens a connection, or repeats that it does.
#[inline(always)]
fn syn(
    config: &Config,
    endpoint: &Endpoint,
    packet: &mut Packet,
    policy: Policy,
    found: Option<Entry>,
) -> Result<(), Reason> {
    if let Some(entry) = found {
        // One that is over may be this very SYN's: a client that forgot its connection resets what the backend still
        // has of it, and sends the SYN again.
        if entry.flow().isn_be == packet.seq_be
            && flow::live_backend(entry.flow()).is_some()
            && !flow::is_over(entry.flags())
        {
            translate_to(config, packet, entry);
            return Ok(());
        }
        flow::forget_connection(config, &packet.key, entry);
    }
    let tally = admit(endpoint, ACCOUNT_TCP)?;
    open_connection(config, packet, policy)?;
    begun(packet, tally, ACCOUNT_TCP);
    if packet.placed == 0 {
        let isn_be = packet.seq_be;
        flow::age(config, &mut packet.key, isn_be);
    }
    Ok(())
}

/// Counts a flow that was opened, and tells of it.
#[inline(always)]
fn begun(packet: &Packet, tally: Tally, kind: usize) {
    tally.opened(kind);
    count::opened(packet);
    log::opened(packet);
}

/// The account on which a new flow goes, where the endpoint may have one more.
#[inline(always)]
fn admit(endpoint: &Endpoint, kind: usize) -> Result<Tally, Reason> {
    Tally::of(endpoint.number)
        .ok_or(Reason::Internal)?
        .with_room(endpoint, kind)
        .ok_or(Reason::FlowQuota)
}

/// A segment of a connection that is known.
#[inline(always)]
fn segment(config: &Config, packet: &mut Packet, entry: Entry) -> Result<(), Reason> {
    let flow = entry.flow();
    packet.belongs_to(flow);
    if flow::live_backend(flow).is_none() {
        flow::forget_connection(config, &packet.key, entry);
        return Err(Reason::BackendGone);
    }
    let flags = entry.flags();
    if flags & FLOW_ESTABLISHED == 0 && !flow::is_over(flags) {
        flow::establish(config, &packet.key, entry)?;
    }
    // Read before the connection is closed: its entry may be another's afterwards.
    translate_to(config, packet, entry);
    if packet.closes() {
        flow::close_forward(config, packet, entry);
    } else if flags & FLOW_LAST_ACK != 0 {
        flow::finish_forward(config, packet, entry);
    }
    Ok(())
}

/// A datagram or echo request of a flow that is known.
#[inline(always)]
fn datagram(
    config: &Config,
    packet: &mut Packet,
    policy: Policy,
    entry: Entry,
) -> Result<(), Reason> {
    let flow = entry.flow();
    packet.belongs_to(flow);
    let backend = flow::live_backend(flow);
    if backend.is_none_or(|backend| backend.flags & BACKEND_LIVE == 0) {
        if follows(packet) {
            match open_datagrams(config, packet, policy) {
                // Where there is nowhere else to go, a draining backend serves on.
                Err(Reason::NoBackend) if backend.is_some() => {}
                moved => return moved,
            }
        } else if backend.is_none() {
            flow::forget_datagrams(config, &packet.key, entry);
            return Err(Reason::BackendGone);
        }
    }
    if entry.touch() {
        keep_reverse(config, &packet.key, flow);
    }
    translate_to(config, packet, entry);
    Ok(())
}

/// Puts back the reverse entry where the table has lost it: the flow may be used in one direction only.
#[inline(never)]
fn keep_reverse(config: &Config, key: &FlowKey, flow: &Flow) {
    let reverse_key = flow::reverse_key(config, key, flow);
    // Mostly it is there.
    let _ = Table::Datagrams.insert(&reverse_key, &reverse_of(key, flow));
}

#[inline(always)]
fn translate_to(config: &Config, packet: &mut Packet, entry: Entry) {
    entry.touch();
    packet.belongs_to(entry.flow());
    packet.to = flow::translated(config, &packet.key, entry.flow());
}

/// The value of the reverse entry for a forward entry.
#[inline(always)]
fn reverse_of(key: &FlowKey, flow: &Flow) -> Flow {
    Flow {
        addr: key.dst,
        port_be: key.dport_be,
        client_port_be: key.sport_be,
        ..*flow
    }
}

/// Whether a datagram's flow is to move when its backend drains or dies.
#[inline(never)]
fn follows(packet: &mut Packet) -> bool {
    lookup(packet).is_ok_and(|vip| vip.flags & VIP_FOLLOW != 0)
}

/// Opens a connection.
#[inline(never)]
fn open_connection(config: &Config, packet: &mut Packet, policy: Policy) -> Result<(), Reason> {
    open(Table::Connections, config, packet, policy)
}

/// Opens a datagram's flow, or moves it to another backend.
#[inline(never)]
fn open_datagrams(config: &Config, packet: &mut Packet, policy: Policy) -> Result<(), Reason> {
    open(Table::Datagrams, config, packet, policy)
}

/// Opens a flow: picks a backend, claims the reverse entry, remembers both.
#[inline(always)]
fn open(table: Table, config: &Config, packet: &mut Packet, policy: Policy) -> Result<(), Reason> {
    if hold::is_on(config, CONFIG_HOLD_NEW) {
        return Err(Reason::Held);
    }
    let vip = lookup(packet)?;
    packet.counter = vip.counter;
    let hash = hash_flow(config, packet);
    let choice = match policy {
        Policy::Sticky => hash_source(config, packet),
        _ => hash,
    };
    let index = pick_backend(packet.family, choice, vip)?;
    packet.backend = index;
    let backend = maps::backend(index).ok_or(Reason::Internal)?;
    let address = address_of(backend, packet.family);
    let now = maps::now_ns();
    // One value serves both entries, first the reverse one: stack is scarce.
    let mut flow = Flow {
        last_seen_ns: now,
        addr: packet.key.dst,
        port_be: packet.key.dport_be,
        client_port_be: packet.key.sport_be,
        flags: match table {
            Table::Connections => FLOW_SYN | FLOW_QUEUED,
            Table::Datagrams => FLOW_SYN,
        } | if address == packet.key.src {
            FLOW_HAIRPIN
        } else {
            0
        },
        backend: index,
        generation: backend.generation,
        isn_be: packet.seq_be,
        service: vip.service,
        born_s: maps::seconds(now),
        counter: vip.counter,
    };
    let hairpin = flow.flags & FLOW_HAIRPIN != 0;
    let mut key = FlowKey {
        src: address,
        dst: if hairpin {
            flow::node_address(config, packet.family)
        } else {
            packet.key.src
        },
        sport_be: vip.target_port_be,
        dport_be: packet.key.sport_be,
        endpoint: if hairpin {
            NODE_ENDPOINT
        } else {
            packet.key.endpoint
        },
        proto: packet.key.proto,
        direction: FLOW_REVERSE,
        pad: 0,
    };
    if table == Table::Connections
        && !hairpin
        && let Some(place) = flow::place(&packet.key, &key, now)
    {
        let placed = place.fill(&packet.key, &flow, (&address, vip.target_port_be));
        packet.to = flow::translated(config, &packet.key, &placed.forward);
        packet.placed = 1;
        return Ok(());
    }
    claim_reverse(table, &mut key, &flow, hash)?;
    flow.addr = address;
    flow.port_be = vip.target_port_be;
    flow.client_port_be = key.dport_be;
    if let Err(reason) = write(table, &packet.key, &flow) {
        table.remove(&key);
        return Err(reason);
    }
    packet.to = flow::translated(config, &packet.key, &flow);
    packet.placed = 0;
    Ok(())
}

/// The declared port that a packet asks for, or why there is none.
#[inline(never)]
fn lookup(packet: &mut Packet) -> Result<&'static Vip, Reason> {
    let mut key = VipKey {
        addr: packet.key.dst,
        port_be: packet.key.dport_be,
        proto: packet.key.proto,
        pad: 0,
    };
    if let Some(vip) = maps::vip(&key) {
        return Ok(vip);
    }
    key.port_be = VIP_ITSELF_PORT;
    key.proto = match packet.family {
        Family::V4 => PROTO_ICMP,
        Family::V6 => PROTO_ICMP6,
    };
    match maps::vip(&key) {
        Some(vip) => {
            packet.counter = vip.counter;
            Err(Reason::UndeclaredPort)
        }
        None => Err(Reason::NotLinked),
    }
}

/// The index of a live backend.
#[inline(always)]
fn pick_backend(family: Family, choice: u32, vip: &Vip) -> Result<u32, Reason> {
    let offset = pick::slot(choice, vip.slot_count).ok_or(Reason::NoBackend)?;
    let is_v4 = family == Family::V4;
    pick::first_live(offset, vip, is_v4, maps::slot, maps::backend).map(|(_, index)| index)
}

/// The hash of a flow: of all of its tuple.
#[inline(never)]
fn hash_flow(config: &Config, packet: &Packet) -> u32 {
    pick::key_hash(&packet.key, config.seed)
}

/// The hash that `sticky` picks by: of the source alone.
#[inline(never)]
fn hash_source(config: &Config, packet: &Packet) -> u32 {
    pick::source_hash(&packet.key.src, config.seed)
}

#[inline(always)]
fn address_of(backend: &Backend, family: Family) -> Addr {
    match family {
        Family::V4 => backend.addr4,
        Family::V6 => backend.addr6,
    }
}

/// Claims the reverse entry; where a live flow owns the tuple, under another source port (in `key`).
#[inline(always)]
fn claim_reverse(table: Table, key: &mut FlowKey, reverse: &Flow, hash: u32) -> Result<(), Reason> {
    for attempt in 0..PORT_TRIES {
        match table.insert(key, reverse) {
            Inserted::Yes => return Ok(()),
            Inserted::Exists if displaces(table, key, reverse) => return Ok(()),
            Inserted::Exists => {
                // Ports 32768 to 65535, from a place of the flow's own; an odd step never repeats one.
                let port = 0x8000 | (hash.wrapping_add(attempt.wrapping_mul(7919)) & 0x7fff);
                key.dport_be = (port as u16).to_be();
            }
            Inserted::Full => return Err(Reason::FlowTableFull),
        }
    }
    Err(Reason::NoSourcePort)
}

/// Takes a reverse entry over that belongs to no live flow, or is what is left of the same client flow.
#[inline(always)]
fn displaces(table: Table, key: &FlowKey, reverse: &Flow) -> bool {
    match table.get(key) {
        // What shares a place goes only with its connection.
        Some(owner)
            if is_ours(owner.flow(), reverse)
                || (owner.other().is_none() && flow::is_over(owner.flags())) =>
        {
            owner.replace(reverse);
            true
        }
        _ => false,
    }
}

/// Writes a forward entry, over an old one where there is one.
#[inline(always)]
fn write(table: Table, key: &FlowKey, flow: &Flow) -> Result<(), Reason> {
    match table.insert(key, flow) {
        Inserted::Yes => Ok(()),
        Inserted::Exists => {
            table.get(key).ok_or(Reason::Internal)?.replace(flow);
            Ok(())
        }
        Inserted::Full => Err(Reason::FlowTableFull),
    }
}

/// Whether an entry is what is left of the same client flow.
#[inline(always)]
fn is_ours(owner: &Flow, reverse: &Flow) -> bool {
    owner.addr == reverse.addr
        && owner.port_be == reverse.port_be
        && owner.client_port_be == reverse.client_port_be
        && (owner.flags ^ reverse.flags) & FLOW_HAIRPIN == 0
}
