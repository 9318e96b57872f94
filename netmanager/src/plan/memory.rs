//! What the planner must remember from one table to the next: who has which index, run and band.
//!
//! A backend keeps its index while it lives; dead, it keeps it until its flows had [`DEAD_REST`] to be
//! collected, and the next holder raises the generation. A run is written once and never changed: a VIP
//! whose slots change gets another run, and the old one rests [`RUN_REST`], because a packet may be between
//! reading the VIP and reading the slot. Index 0 and an empty run are never given out, so that a zeroed
//! element names nobody.
//!
//! All of it can be told from the kernel's maps ([`Memory::adopt`]), so that a restarted daemon goes on.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use ebpf_common::layout::{self, Addr};

use super::{KernelState, counters::Counters};

/// How long a dead backend keeps its index: longer than a pass of the flow janitor over the largest map.
pub const DEAD_REST: Duration = Duration::from_secs(120);
/// How long a run that no VIP points at stays as it is: longer than any program runs.
pub const RUN_REST: Duration = Duration::from_secs(2);

/// How much the maps hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacity {
    /// Elements of `BACKENDS`.
    pub backends: u32,
    /// Elements of `SLOTS`.
    pub slots: u32,
    /// Elements of `VIP_COUNTS`.
    pub counters: u32,
}

/// A map that is too small for the table.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Shortage {
    /// No free backend index.
    #[error(
        "the table needs more than {capacity} backends: raise --backends (taken into account at the next reboot or layout)"
    )]
    Backends {
        /// Elements of `BACKENDS`.
        capacity: u32,
    },
    /// No free run that is long enough.
    #[error(
        "no {length} free slots in a row of {capacity}: raise --slots (taken into account at the next reboot or layout)"
    )]
    Slots {
        /// Length of the run.
        length: u32,
        /// Elements of `SLOTS`.
        capacity: u32,
    },
}

/// See the module.
#[derive(Clone, Debug)]
pub struct Memory {
    capacity: Capacity,
    backends: BTreeMap<u32, Held>,
    indexes: BTreeMap<Addr, u32>,
    runs: BTreeMap<u32, Run>,
    pub(super) counters: Counters,
    /// Indexes that were given to a backend since somebody asked.
    given: Vec<u32>,
    /// What `closest` chose last, by service number.
    pub(super) near: BTreeMap<u32, BTreeSet<u32>>,
}

/// One backend index.
#[derive(Clone, Copy, Debug)]
struct Held {
    backend: layout::Backend,
    dead_since: Option<Duration>,
}

/// One run of slots.
#[derive(Clone, Debug)]
struct Run {
    slots: Vec<u32>,
    idle_since: Option<Duration>,
}

impl Memory {
    /// A planner for empty maps.
    #[must_use]
    pub fn new(capacity: Capacity) -> Self {
        Self {
            capacity,
            backends: BTreeMap::new(),
            indexes: BTreeMap::new(),
            runs: BTreeMap::new(),
            counters: Counters::new(capacity.counters),
            given: Vec::new(),
            near: BTreeMap::new(),
        }
    }

    /// A planner that goes on from what a predecessor left in the kernel.
    #[must_use]
    pub fn adopt(capacity: Capacity, have: &KernelState, now: Duration) -> Self {
        let mut memory = Self::new(capacity);
        memory.counters = Counters::adopt(capacity.counters, &have.vips);
        for (&index, &backend) in &have.backends {
            let dead_since = (backend.flags == 0).then_some(now);
            memory.backends.insert(
                index,
                Held {
                    backend,
                    dead_since,
                },
            );
            if backend.addr6 != Addr::default() {
                memory.indexes.insert(backend.addr6, index);
            }
        }
        for (&base, slots) in &have.runs {
            let run = Run {
                slots: slots.clone(),
                idle_since: None,
            };
            memory.runs.insert(base, run);
        }
        memory
    }

    /// The index of `backend`, whose generation is filled in. The same address keeps its index.
    pub(super) fn hold(
        &mut self,
        mut backend: layout::Backend,
        now: Duration,
    ) -> Result<u32, Shortage> {
        if let Some(&index) = self.indexes.get(&backend.addr6) {
            let held = self
                .backends
                .get_mut(&index)
                .expect("every index in `indexes` is held");
            backend.generation = held.backend.generation;
            *held = Held {
                backend,
                dead_since: None,
            };
            return Ok(index);
        }
        let index = self.free_index(now)?;
        backend.generation = 1;
        if let Some(old) = self.backends.get(&index) {
            self.indexes.remove(&old.backend.addr6);
            backend.generation = old.backend.generation.wrapping_add(1).max(1);
        }
        self.given.push(index);
        self.indexes.insert(backend.addr6, index);
        self.backends.insert(
            index,
            Held {
                backend,
                dead_since: None,
            },
        );
        Ok(index)
    }

    /// An index that was never used, else the one whose holder is dead for the longest, if long enough.
    fn free_index(&self, now: Duration) -> Result<u32, Shortage> {
        let next = self
            .backends
            .last_key_value()
            .map_or(1, |(last, _)| last + 1);
        if next < self.capacity.backends {
            return Ok(next);
        }
        self.backends
            .iter()
            .filter_map(|(index, held)| held.dead_since.map(|since| (since, *index)))
            .min()
            .filter(|(since, _)| now.saturating_sub(*since) >= DEAD_REST)
            .map(|(_, index)| index)
            .ok_or(Shortage::Backends {
                capacity: self.capacity.backends,
            })
    }

    /// Whoever is not in `live` is dead from `now` on, unless it was before.
    pub(super) fn bury_all_but(&mut self, live: &BTreeSet<u32>, now: Duration) {
        for (index, held) in &mut self.backends {
            if !live.contains(index) {
                held.backend.flags = 0;
                held.dead_since.get_or_insert(now);
            }
        }
    }

    /// The first slot of a run that holds `slots`; equal runs are shared.
    pub(super) fn run(&mut self, slots: &[u32], now: Duration) -> Result<u32, Shortage> {
        if slots.is_empty() {
            return Ok(0);
        }
        let same = self.runs.iter_mut().find(|(_, run)| run.slots == slots);
        if let Some((&base, run)) = same {
            run.idle_since = None;
            return Ok(base);
        }
        let base = self.free_run(slots.len() as u32, now)?;
        self.runs.insert(
            base,
            Run {
                slots: slots.to_vec(),
                idle_since: None,
            },
        );
        Ok(base)
    }

    /// First fit.
    fn free_run(&mut self, length: u32, now: Duration) -> Result<u32, Shortage> {
        self.forget_rested(now);
        let mut base = 0;
        for (&taken, run) in &self.runs {
            if taken - base >= length {
                return Ok(base);
            }
            base = taken + run.slots.len() as u32;
        }
        let capacity = self.capacity.slots;
        if capacity.saturating_sub(base) >= length {
            Ok(base)
        } else {
            Err(Shortage::Slots { length, capacity })
        }
    }

    /// Runs that are not in `used` start to rest at `now`.
    pub(super) fn rest_all_but(&mut self, used: &BTreeSet<u32>, now: Duration) {
        for (base, run) in &mut self.runs {
            if !used.contains(base) {
                run.idle_since.get_or_insert(now);
            }
        }
        self.forget_rested(now);
    }

    fn forget_rested(&mut self, now: Duration) {
        self.runs.retain(|_, run| {
            run.idle_since
                .is_none_or(|since| now.saturating_sub(since) < RUN_REST)
        });
    }

    /// What was given to a new owner since this was asked last, whose counts are to start from zero: elements
    /// of `VIP_COUNTS` and of `BACKEND_COUNTS`.
    pub fn take_given(&mut self) -> (Vec<u32>, Vec<u32>) {
        (self.counters.take_given(), std::mem::take(&mut self.given))
    }

    /// Whether a run rests, so that planning again later would change something.
    #[must_use]
    pub fn is_resting(&self) -> bool {
        self.runs.values().any(|run| run.idle_since.is_some())
    }

    /// Every index and run as it should stand in the kernel.
    pub(super) fn write_into(&self, state: &mut KernelState) {
        state.backends = self
            .backends
            .iter()
            .map(|(index, held)| (*index, held.backend))
            .collect();
        state.runs = self
            .runs
            .iter()
            .map(|(base, run)| (*base, run.slots.clone()))
            .collect();
    }
}
