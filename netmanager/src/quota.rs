//! Keeps the accounts of flows true where the programs cannot: they do not see what user space collects, nor what
//! `FLOWS_LRU` evicts.
//!
//! ```text
//!  flows of an endpoint = opened - closed  (ACCOUNTS, written by the programs alone)
//!                       - gone             (SETTLED, written here alone)
//! ```
//!
//! Each word has one writer, so that nothing is lost between two. What the janitor removes is added to `gone`
//! exactly. What vanished is found by a whole walk of the flow maps: of the flows that there were when the walk
//! began, those that neither were found, nor were closed or collected meanwhile, are gone. The walk counts every
//! flow that may have been there, and every close as one of them, so it never takes a living flow for gone: an
//! account is too high for one walk at most by what vanished, plus what was closed during the walk, and never too
//! low. Flows that a take-over brought were not opened here: what a walk finds beyond what was counted is added.
//! Pure: who reads and writes the maps is the daemon.

use std::collections::{BTreeMap, BTreeSet};

use ebpf_common::layout::{ACCOUNT_KINDS, Account, Settled};

/// Flows by endpoint number and kind.
pub type Counts = BTreeMap<(u32, usize), u64>;

/// See the module.
#[derive(Clone, Debug, Default)]
pub struct Books {
    settled: BTreeMap<u32, Settled>,
    /// As the walk began.
    before: BTreeMap<u32, Account>,
    /// Flows that each account had then.
    had: Counts,
    /// What the janitor removed since.
    collected: Counts,
}

impl Books {
    /// Goes on with the corrections that are in the kernel.
    #[must_use]
    pub fn new(settled: BTreeMap<u32, Settled>) -> Self {
        Self {
            settled,
            ..Self::default()
        }
    }

    /// A walk begins; `counted` is of now.
    pub fn begin(&mut self, counted: BTreeMap<u32, Account>) {
        self.had.clear();
        self.collected.clear();
        for number in counted.keys() {
            for kind in 0..ACCOUNT_KINDS {
                self.had
                    .insert((*number, kind), self.used(&counted, *number, kind));
            }
        }
        self.before = counted;
    }

    /// The janitor removed these; the accounts that changed.
    pub fn collect(&mut self, removed: &Counts) -> BTreeMap<u32, Settled> {
        for (account, count) in removed {
            *self.collected.entry(*account).or_default() += count;
        }
        self.add(removed)
    }

    /// The walk is through and found these; `counted` is of now. The accounts that changed.
    pub fn end(
        &mut self,
        counted: &BTreeMap<u32, Account>,
        found: &Counts,
    ) -> BTreeMap<u32, Settled> {
        let mut vanished = Counts::new();
        for (&(number, kind), had) in &self.had {
            let count = |counts: &Counts| counts.get(&(number, kind)).copied().unwrap_or(0);
            let closed = |accounts: &BTreeMap<u32, Account>| {
                accounts
                    .get(&number)
                    .map_or(0, |account| account.closed[kind])
            };
            let meanwhile = closed(counted).saturating_sub(closed(&self.before));
            let seen = count(found) + count(&self.collected) + meanwhile;
            if *had > seen {
                vanished.insert((number, kind), had - seen);
            }
        }
        // More than there can have been: flows that came with a take-over were never counted as opened.
        for (&(number, kind), found) in found {
            let opened = |accounts: &BTreeMap<u32, Account>| {
                accounts
                    .get(&number)
                    .map_or(0, |account| account.opened[kind])
            };
            let meanwhile = opened(counted).saturating_sub(opened(&self.before));
            let known = self.had.get(&(number, kind)).copied().unwrap_or(0) + meanwhile;
            if *found > known {
                let surplus = found - known;
                let account = vanished.entry((number, kind)).or_default();
                *account = account.wrapping_sub(surplus);
            }
        }
        self.add(&vanished)
    }

    /// Forgets accounts of endpoints that are not in `present` and have no flow left; which these are.
    pub fn close(&mut self, counted: &BTreeMap<u32, Account>, present: &BTreeSet<u32>) -> Vec<u32> {
        let gone: Vec<u32> = counted
            .keys()
            .chain(self.settled.keys())
            .copied()
            .filter(|number| !present.contains(number))
            .filter(|number| (0..ACCOUNT_KINDS).all(|kind| self.used(counted, *number, kind) == 0))
            .collect::<BTreeSet<_>>()
            .into_iter()
            .collect();
        for number in &gone {
            self.settled.remove(number);
        }
        gone
    }

    /// The endpoints that have half of what they may in any kind but connections, by `quota`.
    #[must_use]
    pub fn pressed(&self, counted: &BTreeMap<u32, Account>, quota: u32) -> BTreeSet<u32> {
        if quota == 0 {
            return BTreeSet::new();
        }
        let half = u64::from(quota.div_ceil(2)).div_ceil(2);
        let is_pressed = |number: &u32| {
            (ebpf_common::layout::ACCOUNT_TCP + 1..ACCOUNT_KINDS)
                .any(|kind| self.used(counted, *number, kind) >= half)
        };
        counted.keys().copied().filter(is_pressed).collect()
    }

    fn used(&self, counted: &BTreeMap<u32, Account>, number: u32, kind: usize) -> u64 {
        let gone = self
            .settled
            .get(&number)
            .map_or(0, |settled| settled.gone[kind]);
        counted.get(&number).map_or(0, |account| {
            Account::used(account.opened[kind], account.closed[kind], gone)
        })
    }

    fn add(&mut self, gone: &Counts) -> BTreeMap<u32, Settled> {
        let mut changed = BTreeMap::new();
        for (&(number, kind), count) in gone {
            let settled = self.settled.entry(number).or_default();
            settled.gone[kind] = settled.gone[kind].wrapping_add(*count);
            changed.insert(number, *settled);
        }
        changed
    }
}

#[cfg(test)]
mod tests;
