//! How a connection ends, and when it is forgotten.

use ebpf_common::layout::{
    ACCOUNT_TCP, Config, FLOW_FIN_BACKEND, FLOW_FIN_CLIENT, FLOW_LAST_ACK, FLOW_QUEUED, FLOW_RST,
    Flow, FlowKey,
};

use super::{ENDED, ageing::age, find, forward_key, is_over, reverse_key, reverse_of, tell_closed};
use crate::{
    header::TCP_RST,
    log,
    maps::{self, Entry, Table},
    parse::{Packet, Part},
};

/// Notes the end of the client's direction.
#[inline(never)]
pub(crate) fn close_forward(config: &Config, packet: &mut Packet, forward: Entry) {
    let bits = ending(packet, FLOW_FIN_CLIENT);
    let reverse = reverse_of(config, &packet.key, forward);
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
pub(super) fn close_reverse(config: &Config, packet: &Packet, reverse: Entry, sender: u32) {
    let fin = ending(packet, FLOW_FIN_BACKEND);
    let before = reverse.set(fin);
    let mut bits = fin;
    if is_last_fin(packet, fin, before, reverse) && sender != 0 {
        reverse.await_number(packet.fin_acknowledged_be());
        bits |= FLOW_LAST_ACK;
    }
    let mut key = forward_key(&packet.key, reverse.flow(), sender);
    if let Some(forward) = forward_of(&key, &packet.key, reverse)
        && end(config, &mut key, forward, bits)
    {
        log::ended(packet, reverse.flow().born_s);
    }
}

/// The forward entry, with this key, of the connection with this reverse entry.
#[inline(always)]
fn forward_of(key: &FlowKey, reverse_key: &FlowKey, reverse: Entry) -> Option<Entry> {
    reverse
        .other()
        .or_else(|| find(key).filter(|forward| answers_to(forward.flow(), reverse_key)))
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
    if let Some(reverse) = reverse_of(config, &packet.key, forward)
        && packet.acknowledges(reverse.number_be())
    {
        if forward.other().is_none() {
            Table::Connections.remove(&reverse_key(config, &packet.key, forward.flow()));
        }
        Table::Connections.remove(&packet.key);
    }
}

/// Forgets a connection that is over where the backend's segment is its last.
#[inline(never)]
pub(super) fn finish_reverse(packet: &Packet, reverse: Entry, sender: u32) {
    if !packet.acknowledges(reverse.number_be()) {
        return;
    }
    let key = forward_key(&packet.key, reverse.flow(), sender);
    if forward_of(&key, &packet.key, reverse).is_some() {
        Table::Connections.remove(&packet.key);
        if reverse.other().is_none() {
            Table::Connections.remove(&key);
        }
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
