//! The flow log: a bounded sample of what happens to flows, for whoever looks on from user space.
//!
//! A flow is in the sample or not by its hash, so that its opening and its end are both told or both not. A
//! marked packet ([`LOG_MARK`]) is always told of, at every step. A bound per second and CPU keeps a flood
//! from filling the ring, and a full ring loses what comes, counted: nothing ever waits.

use aya_ebpf::{
    macros::map,
    maps::{Array, PerCpuArray, RingBuf},
};
use ebpf_common::{
    layout::{
        Addr, EVENT_DELIVERED, EVENT_ENDED, EVENT_OPENED, EVENT_REFUSED, EVENT_TUNNELLED, Event,
        FLOW_FORWARD, FLOW_REVERSE, LOG_MARKED_PER_SECOND, LogConfig, LogState,
    },
    pick::{self, Tuple},
    reason::Reason,
};

use crate::{deliver::Way, maps, parse::Packet};

#[map]
static LOG: RingBuf = RingBuf::with_byte_size(256 << 10, 0);
#[map]
static LOG_CONFIG: Array<LogConfig> = Array::with_max_entries(1, 0);
#[map]
static LOG_STATE: PerCpuArray<LogState> = PerCpuArray::with_max_entries(1, 0);

/// What the log's window is long, ns.
const SECOND_NS: u64 = 1_000_000_000;

/// Whether a packet may be of the sample at all: what every packet that is none pays.
#[inline(always)]
fn is_wanted(packet: &Packet) -> bool {
    packet.marked != 0
        || LOG_CONFIG
            .get(0)
            .is_some_and(|config| config.sample_every != 0)
}

/// Tells of a flow that was opened.
#[inline(always)]
pub(crate) fn opened(packet: &Packet) {
    if is_wanted(packet) {
        write(packet, EVENT_OPENED, 0);
    }
}

/// Tells of a connection that is over and began at `born_s`, seconds.
#[inline(always)]
pub(crate) fn ended(packet: &Packet, born_s: u32) {
    if is_wanted(packet) {
        let age_s = maps::seconds(maps::now_ns()).wrapping_sub(born_s);
        write(packet, EVENT_ENDED, age_s);
    }
}

/// Tells of the packet at hand, which is refused, where its addresses are known.
#[inline(always)]
pub(crate) fn refused(reason: Reason) {
    if let Ok(packet) = maps::scratch()
        && packet.known != 0
        && is_wanted(packet)
    {
        write(packet, EVENT_REFUSED, reason as u32);
    }
}

/// Tells where a marked packet goes.
#[inline(always)]
pub(crate) fn passed(packet: &Packet, way: Way) {
    if packet.marked != 0 {
        match way {
            Way::Local(endpoint) => write(packet, EVENT_DELIVERED, endpoint.number),
            Way::Tunnel => write(packet, EVENT_TUNNELLED, 0),
        }
    }
}

/// Puts an event into the ring, if it is of the sample and within the bound.
#[inline(never)]
fn write(packet: &Packet, kind: u32, detail: u32) {
    let (Some(config), Some(state)) = (LOG_CONFIG.get(0), LOG_STATE.get_ptr_mut(0)) else {
        return;
    };
    // SAFETY: this CPU's own, and nothing interrupts a program with itself.
    let state = unsafe { &mut *state };
    let is_marked = packet.marked != 0;
    // By the hash's upper bits, as slots are picked: its lowest bits hardly differ between ports.
    if !is_marked && pick::slot(hash_of(packet), config.sample_every) != Some(0) {
        return;
    }
    let now = maps::now_ns();
    if now.wrapping_sub(state.since_ns) >= SECOND_NS {
        state.since_ns = now;
        state.used = 0;
        state.used_marked = 0;
    }
    let (used, bound) = if is_marked {
        (&mut state.used_marked, LOG_MARKED_PER_SECOND)
    } else {
        (&mut state.used, config.per_second)
    };
    if *used >= bound {
        state.limited += 1;
        return;
    }
    *used += 1;
    let Some(mut entry) = LOG.reserve::<Event>(0) else {
        state.lost += 1;
        return;
    };
    state.written += 1;
    let key = &packet.key;
    let is_translated = packet.backend != 0 && kind != EVENT_REFUSED;
    // SAFETY: room for one event, which is plain data; every field is written. In place, because stack is scarce.
    let event = unsafe { &mut *entry.as_mut_ptr() };
    event.time_ns = now;
    event.src = key.src;
    event.dst = key.dst;
    event.sport_be = key.sport_be;
    event.dport_be = key.dport_be;
    if is_translated {
        event.to_src = packet.to.src;
        event.to_dst = packet.to.dst;
        event.to_sport_be = packet.to.sport_be;
        event.to_dport_be = packet.to.dport_be;
        event.direction = key.direction;
    } else {
        event.to_src = NOWHERE;
        event.to_dst = NOWHERE;
        event.to_sport_be = 0;
        event.to_dport_be = 0;
        event.direction = FLOW_FORWARD;
    }
    event.counter = packet.counter;
    event.backend = packet.backend;
    event.sender = packet.sender;
    event.detail = detail;
    event.kind = kind as u8;
    event.proto = key.proto;
    event.marked = is_marked as u8;
    event.pad = 0;
    entry.submit(0);
}

const NOWHERE: Addr = Addr { words: [0; 4] };

/// The hash by which a flow is in the sample: of the client's side of it, whichever direction the packet has.
#[inline(always)]
fn hash_of(packet: &Packet) -> u32 {
    let (key, to) = (&packet.key, &packet.to);
    let is_answer = packet.backend != 0 && key.direction == FLOW_REVERSE;
    let (client, vip, client_port_be, vip_port_be) = if is_answer {
        (&to.dst, &to.src, to.dport_be, to.sport_be)
    } else {
        (&key.src, &key.dst, key.sport_be, key.dport_be)
    };
    let tuple = Tuple {
        src: halves(client),
        dst: halves(vip),
        ports_proto: u64::from(key.proto) << 32
            | u64::from(vip_port_be) << 16
            | u64::from(client_port_be),
    };
    pick::flow_hash(&tuple, 0)
}

#[inline(always)]
fn halves(address: &Addr) -> [u64; 2] {
    let [a, b, c, d] = address.words.map(u64::from);
    [a << 32 | b, c << 32 | d]
}
