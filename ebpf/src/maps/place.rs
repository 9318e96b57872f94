//! Connections that have a place of their own, found without a hash.
//!
//! A place is taken, and left, by one word, which is another each time: of two CPUs that want it one gets it, and what was read
//! of one connection never removes the next. Who finds it taken goes to `FLOWS` and leaves the time there, so that whoever
//! finds no connection in a place knows whether `FLOWS` need be asked.

use core::ptr::NonNull;

use aya_ebpf::{macros::map, maps::Array};
use ebpf_common::layout::{
    Addr, Connection, DIRECT_FLOWS, FLOW_FORWARD, FLOW_REVERSE, Flow, FlowKey, PLACE_BITS,
    PLACE_EMPTY, PLACE_LIVE, PLACE_TAKEN, direct_flow,
};

use super::{Entry, seconds};
use crate::atomic;

/// `BPF_F_MMAPABLE` of `linux/bpf.h`: user space takes connections out by the same word.
const MMAPABLE: u32 = 1 << 10;

#[map]
static FLOWS_DIRECT: Array<Connection> = Array::with_max_entries(DIRECT_FLOWS, MMAPABLE);

/// A place in map memory.
#[derive(Clone, Copy)]
pub(crate) struct Place(NonNull<Connection>);

/// Where the entry of a key is.
pub(super) enum Found {
    Here(Entry),
    /// Only `FLOWS` can have it.
    Elsewhere,
    Nowhere,
}

/// Looks for the entry of `key` in its place.
#[inline(always)]
pub(super) fn find(key: &FlowKey) -> Found {
    let Some(place) = Place::of(key) else {
        return Found::Elsewhere;
    };
    match place.entry(key) {
        Some(entry) => Found::Here(entry),
        None if place.is_spilled() => Found::Elsewhere,
        None => Found::Nowhere,
    }
}

/// Notes that the entry of `key` goes to `FLOWS`.
#[inline(always)]
pub(super) fn spill(key: &FlowKey, now_ns: u64) {
    if let Some(place) = Place::of(key) {
        // SAFETY: as in `Place::connection`; an aligned word.
        unsafe { (&raw mut (*place.0.as_ptr()).spilled_s).write_volatile(seconds(now_ns) | 1) }
    }
}

/// Whether the place of `key` has its entry, or is just being given to somebody who may.
#[inline(always)]
pub(super) fn is_contended(key: &FlowKey) -> bool {
    Place::of(key).is_some_and(|place| {
        place.state() & PLACE_BITS == PLACE_TAKEN || place.entry(key).is_some()
    })
}

/// Removes the connection that has this key, of either direction; `None` where its place has another, or none.
#[inline(always)]
pub(super) fn remove(key: &FlowKey) -> Option<bool> {
    let place = Place::of(key)?;
    let state = place.state();
    place.entry(key)?;
    Some(place.exchange(state, state & !PLACE_BITS | PLACE_EMPTY))
}

impl Place {
    /// The place of a key.
    #[inline(always)]
    pub(crate) fn of(key: &FlowKey) -> Option<Self> {
        FLOWS_DIRECT
            .get_ptr_mut(direct_flow(key))
            .and_then(NonNull::new)
            .map(Self)
    }

    #[inline(always)]
    fn state(self) -> u64 {
        // SAFETY: the lookup returned it, so it is map memory, and an aligned word.
        unsafe { (&raw const (*self.0.as_ptr()).state).read_volatile() }
    }

    /// Makes the state another, where it is as it was.
    #[inline(always)]
    fn exchange(self, old: u64, new: u64) -> bool {
        // SAFETY: as in `state`.
        unsafe { atomic::exchange(&raw mut (*self.0.as_ptr()).state, old, new) }
    }

    /// What is here.
    #[inline(always)]
    pub(crate) fn connection(self) -> &'static Connection {
        // SAFETY: the lookup returned it, so it is map memory; torn reads as in the module's text.
        unsafe { self.0.as_ref() }
    }

    /// Whether `FLOWS` may have an entry whose place this is.
    #[inline(always)]
    pub(crate) fn is_spilled(self) -> bool {
        // SAFETY: as in `state`.
        unsafe { (&raw const (*self.0.as_ptr()).spilled_s).read_volatile() != 0 }
    }

    /// The entry of a key, if it is here.
    #[inline(always)]
    fn entry(self, key: &FlowKey) -> Option<Entry> {
        let connection = self.connection();
        if self.state() & PLACE_BITS != PLACE_LIVE || connection.key.proto != key.proto {
            return None;
        }
        // SAFETY: as in `state`.
        let (forward, reverse) = unsafe {
            let connection = self.0.as_ptr();
            (
                NonNull::new_unchecked(&raw mut (*connection).forward),
                NonNull::new_unchecked(&raw mut (*connection).reverse),
            )
        };
        let (flow, other) = match key.direction {
            FLOW_FORWARD if connection.is_asked_by(key) => (forward, reverse),
            FLOW_REVERSE if connection.is_answered_by(key) => (reverse, forward),
            _ => return None,
        };
        Some(Entry {
            flow,
            other: Some(other),
        })
    }

    /// The flags of the connection that is here.
    #[inline(always)]
    pub(crate) fn flags(self) -> u32 {
        // SAFETY: as in `state`; both directions' CPUs set bits, each on the forward entry at last.
        unsafe { (&raw const (*self.0.as_ptr()).forward.flags).read_volatile() }
    }

    /// When the connection that is here was used last, in either direction.
    #[inline(always)]
    pub(crate) fn last_seen_ns(self) -> u64 {
        // SAFETY: as in `state`.
        let (forward, reverse) = unsafe {
            let connection = self.0.as_ptr();
            (
                (&raw const (*connection).forward.last_seen_ns).read_volatile(),
                (&raw const (*connection).reverse.last_seen_ns).read_volatile(),
            )
        };
        if forward > reverse { forward } else { reverse }
    }

    /// Who is here, if anybody, and the word by which the place may be taken; `None` while somebody writes.
    #[inline(always)]
    pub(crate) fn owner(self) -> Option<(u64, Option<Self>)> {
        let state = self.state();
        match state & PLACE_BITS {
            PLACE_EMPTY => Some((state, None)),
            PLACE_LIVE => Some((state, Some(self))),
            _ => None,
        }
    }

    /// Takes the place that [`Place::owner`] told of; `None` where another was first.
    #[inline(always)]
    pub(crate) fn take(self, state: u64) -> Option<Taken> {
        let taken = state & !PLACE_BITS | PLACE_TAKEN;
        self.exchange(state, taken).then_some(Taken {
            place: self,
            before: state,
            taken,
        })
    }
}

/// A place that nobody else takes, leaves or finds anything in.
#[derive(Clone, Copy)]
pub(crate) struct Taken {
    place: Place,
    before: u64,
    taken: u64,
}

impl Taken {
    /// Leaves it as it was.
    #[inline(always)]
    pub(crate) fn give_back(self) {
        self.place.exchange(self.taken, self.before);
    }

    /// Writes the connection with this reverse entry, and with `addr` and `port_be` in its forward one.
    #[inline(always)]
    pub(crate) fn fill(
        self,
        key: &FlowKey,
        reverse: &Flow,
        (addr, port_be): (&Addr, u16),
    ) -> &'static Connection {
        // SAFETY: as in `connection`; nobody else writes it while it is taken.
        unsafe {
            let connection = self.place.0.as_ptr();
            (&raw mut (*connection).key).write(*key);
            (&raw mut (*connection).reverse).write(*reverse);
            (&raw mut (*connection).forward).write(*reverse);
            (&raw mut (*connection).forward.addr).write(*addr);
            (&raw mut (*connection).forward.port_be).write(port_be);
        }
        let number = (self.taken | PLACE_BITS).wrapping_add(1);
        self.place.exchange(self.taken, number | PLACE_LIVE);
        self.place.connection()
    }
}
