//! Who has which element of `BACKENDS`.
//!
//! A backend keeps its index while a service names it; dead, it keeps it until its flows had [`DEAD_REST`] to be
//! collected, and the next holder raises the generation. Index 0 is never given out, so that a zeroed slot
//! names nobody.

use std::{
    collections::{BTreeSet, HashMap},
    time::Duration,
};

use ebpf_common::layout::Addr;

/// How long a dead backend keeps its index: longer than a pass of the flow janitor over the largest map.
pub const DEAD_REST: Duration = Duration::from_secs(120);

/// See the module.
#[derive(Clone, Debug)]
pub(super) struct Indexes {
    /// By index; the first is nobody's.
    slots: Vec<Slot>,
    by_addr: HashMap<Addr, u32>,
    dead: BTreeSet<(Duration, u32)>,
    capacity: u32,
}

#[derive(Clone, Copy, Debug, Default)]
struct Slot {
    addr: Addr,
    /// How many services name it.
    holders: u32,
    /// How many of them say that new flows may pick it.
    ready: u32,
    dead_since: Option<Duration>,
}

impl Indexes {
    pub(super) fn new(capacity: u32) -> Self {
        Self {
            slots: vec![Slot::default()],
            by_addr: HashMap::new(),
            dead: BTreeSet::new(),
            capacity,
        }
    }

    /// Takes over an index that a predecessor gave; it has no holder yet.
    pub(super) fn adopt(&mut self, index: u32, addr: Addr) {
        let length = self.slots.len().max(index as usize + 1);
        self.slots.resize(length, Slot::default());
        self.slots[index as usize].addr = addr;
        if addr != Addr::default() {
            self.by_addr.insert(addr, index);
        }
    }

    /// The index of an address, living or dead.
    pub(super) fn get(&self, addr: Addr) -> Option<u32> {
        self.by_addr.get(&addr).copied()
    }

    /// The index for `addr`: its own, else one that was never used, else the one whose holder is dead for the
    /// longest, if long enough; `None` when there is none. True where it named another before.
    pub(super) fn take(&mut self, addr: Addr, now: Duration) -> Option<(u32, bool)> {
        if let Some(index) = self.get(addr) {
            return Some((index, false));
        }
        let next = self.slots.len() as u32;
        let index = if next < self.capacity {
            self.slots.push(Slot::default());
            next
        } else {
            let (_, index) = *self
                .dead
                .first()
                .filter(|(since, _)| now.saturating_sub(*since) >= DEAD_REST)?;
            self.by_addr.remove(&self.slots[index as usize].addr);
            index
        };
        self.slots[index as usize].addr = addr;
        self.by_addr.insert(addr, index);
        Some((index, true))
    }

    /// One more service names `index`.
    pub(super) fn hold(&mut self, index: u32) {
        let slot = &mut self.slots[index as usize];
        slot.holders += 1;
        if let Some(since) = slot.dead_since.take() {
            self.dead.remove(&(since, index));
        }
    }

    /// A service that said `before` of `index`, whether new flows may pick it, says `now`.
    pub(super) fn say(&mut self, index: u32, before: bool, now: bool) {
        let slot = &mut self.slots[index as usize];
        slot.ready = (slot.ready + u32::from(now)).saturating_sub(u32::from(before));
    }

    /// Whether new flows may pick `index`: a service that names it says so.
    pub(super) fn is_ready(&self, index: u32) -> bool {
        self.slots[index as usize].ready > 0
    }

    /// One service less names `index`; true when it was the last.
    pub(super) fn release(&mut self, index: u32) -> bool {
        let slot = &mut self.slots[index as usize];
        slot.holders = slot.holders.saturating_sub(1);
        slot.holders == 0
    }

    /// Whether a service names `index`.
    pub(super) fn is_held(&self, index: u32) -> bool {
        self.slots[index as usize].holders > 0
    }

    /// `index` is dead from `now` on, unless it was before.
    pub(super) fn bury(&mut self, index: u32, now: Duration) {
        let slot = &mut self.slots[index as usize];
        if slot.dead_since.is_none() {
            slot.dead_since = Some(now);
            self.dead.insert((now, index));
        }
    }
}
