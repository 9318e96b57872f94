//! Who has which slots of `SLOTS`.
//!
//! ```text
//!  | run | run |  rests  | run    |      free      |      a run is written once and never changed
//! ```
//!
//! A VIP whose slots change gets another run, and the old one rests [`RUN_REST`], because a packet may be
//! between reading the VIP and reading the slot. Lengths are rounded up to four steps per power of two (at most
//! a quarter too long, a run of 16,381 takes 16,384), and the shortest hole that is long enough is taken: what one
//! run leaves fits another, so that holes nobody can use stay few.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    time::Duration,
};

/// How long a run that no VIP points at stays as it is: longer than any program runs.
pub const RUN_REST: Duration = Duration::from_secs(2);

/// See the module.
#[derive(Clone, Debug)]
pub(super) struct Runs {
    taken: BTreeMap<u32, Taken>,
    /// Free slots: lengths by first slot, and the same by length.
    holes: BTreeMap<u32, u32>,
    by_length: BTreeSet<(u32, u32)>,
    /// Since when which run rests, oldest first.
    resting: VecDeque<(Duration, u32)>,
}

#[derive(Clone, Copy, Debug)]
struct Taken {
    length: u32,
    /// How many services point at it.
    holders: u32,
}

impl Runs {
    pub(super) fn new(capacity: u32) -> Self {
        let mut runs = Self {
            taken: BTreeMap::new(),
            holes: BTreeMap::new(),
            by_length: BTreeSet::new(),
            resting: VecDeque::new(),
        };
        runs.free(0, capacity);
        runs
    }

    /// Takes a run that a predecessor gave, once for each service that points at it; false where it overlaps
    /// another or the end.
    pub(super) fn adopt(&mut self, base: u32, length: u32) -> bool {
        if let Some(taken) = self.taken.get_mut(&base) {
            taken.holders += 1;
            return taken.length == length;
        }
        let hole = self.holes.range(..=base).next_back();
        let Some((&start, &room)) = hole.filter(|(start, room)| *start + *room >= base + length)
        else {
            return false;
        };
        self.fill(start);
        self.free(start, base - start);
        self.free(base + length, start + room - base - length);
        self.taken.insert(base, Taken { length, holders: 1 });
        true
    }

    /// The first of `length` free slots, held once.
    pub(super) fn take(&mut self, length: u32) -> Option<u32> {
        let fitting = |length| self.by_length.range((length, 0)..).next().copied();
        let rounded = rounded(length);
        let ((room, base), length) = match fitting(rounded) {
            Some(hole) => (hole, rounded),
            None => (fitting(length)?, length),
        };
        self.fill(base);
        self.free(base + length, room - length);
        self.taken.insert(base, Taken { length, holders: 1 });
        Some(base)
    }

    /// One service less points at a run; the last one lets it rest from `now` on.
    pub(super) fn release(&mut self, base: u32, now: Duration) {
        if let Some(taken) = self.taken.get_mut(&base) {
            taken.holders = taken.holders.saturating_sub(1);
            if taken.holders == 0 {
                self.resting.push_back((now, base));
            }
        }
    }

    /// Frees the runs that have rested and names them.
    pub(super) fn collect(&mut self, now: Duration) -> Vec<u32> {
        let mut rested = Vec::new();
        while let Some((_, base)) = self
            .resting
            .pop_front_if(|(since, _)| now.saturating_sub(*since) >= RUN_REST)
        {
            if let Some(taken) = self.taken.remove(&base) {
                self.free(base, taken.length);
                rested.push(base);
            }
        }
        rested
    }

    /// Whether a run rests.
    pub(super) fn is_resting(&self) -> bool {
        !self.resting.is_empty()
    }

    /// Makes a hole, one with its neighbours.
    fn free(&mut self, mut base: u32, mut length: u32) {
        if length == 0 {
            return;
        }
        if let Some((&before, &room)) = self.holes.range(..base).next_back()
            && before + room == base
        {
            self.fill(before);
            base = before;
            length += room;
        }
        if let Some(room) = self.holes.get(&(base + length)).copied() {
            self.fill(base + length);
            length += room;
        }
        self.holes.insert(base, length);
        self.by_length.insert((length, base));
    }

    /// Takes a hole away as a whole.
    fn fill(&mut self, base: u32) {
        if let Some(length) = self.holes.remove(&base) {
            self.by_length.remove(&(length, base));
        }
    }
}

/// Four steps per power of two.
fn rounded(length: u32) -> u32 {
    let step = (length.next_power_of_two() / 8).max(1);
    length.next_multiple_of(step)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_length_is_rounded_by_a_quarter_at_most() {
        for (length, want) in [
            (1, 1),
            (7, 7),
            (8, 8),
            (9, 10),
            (17, 20),
            (100, 112),
            (16_381, 16_384),
        ] {
            assert_eq!(rounded(length), want, "{length}");
        }
        for length in 1..5_000 {
            assert!(rounded(length) >= length && rounded(length) * 4 <= length * 5 + 4);
        }
    }

    #[test]
    fn what_a_predecessor_gave_is_not_given_again_before_all_let_it_go() {
        let mut runs = Runs::new(16);
        assert!(runs.adopt(4, 4) && runs.adopt(4, 4));
        assert!(!runs.adopt(6, 4) && !runs.adopt(14, 4));
        assert_eq!(runs.take(8), Some(8));
        assert_eq!(runs.take(4), Some(0));
        assert_eq!(runs.take(1), None);
        runs.release(4, SECOND);
        assert!(!runs.is_resting());
        runs.release(4, SECOND);
        assert_eq!(runs.collect(SECOND), Vec::<u32>::new());
        assert_eq!(runs.collect(SECOND + RUN_REST), [4]);
        assert_eq!(runs.take(4), Some(4));
    }

    /// Lengths as services have them: most short, a few long, a sticky table now and then.
    fn length() -> impl Strategy<Value = u32> {
        prop_oneof![20 => 1u32..24, 4 => 24u32..200, 1 => Just(16_381u32)]
    }

    proptest! {
        #[test]
        fn slots_that_come_and_go_for_long_leave_room_while_two_thirds_are_taken(
            steps in prop::collection::vec((length(), any::<prop::sample::Index>()), 400..800),
        ) {
            const CAPACITY: u32 = 1 << 18;
            let mut runs = Runs::new(CAPACITY);
            let (mut held, mut used): (Vec<(u32, u32)>, u32) = (Vec::new(), 0);
            for (length, victim) in steps {
                while used + rounded(length) > CAPACITY / 3 * 2 {
                    let (base, length) = held.swap_remove(victim.index(held.len()));
                    runs.release(base, SECOND);
                    runs.collect(SECOND + RUN_REST);
                    used -= rounded(length);
                }
                let base = runs.take(length);
                prop_assert!(base.is_some(), "{length} of {used} used");
                let base = base.unwrap();
                for (other, long) in &held {
                    prop_assert!(base + length <= *other || other + long <= base, "{base} overlaps {other}");
                }
                held.push((base, length));
                used += rounded(length);
            }
        }
    }
}
