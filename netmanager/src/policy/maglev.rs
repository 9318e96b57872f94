//! Maglev's lookup table (Eisenbud et al., NSDI 2016, section 3.4): equal shares, and little movement when a
//! backend comes or goes.
//!
//! Each backend walks the table in an order of its own (`offset + i * skip` modulo a prime) and the backends
//! take turns at their next free place; one of half the weight takes every other turn. Deterministic in the set
//! of names: their order does not matter. A table of 100 backends takes about 1 ms to build (optimised).

use super::Candidate;

/// Places in a sticky VIP's table; prime. With 100 backends 1.5 % more than necessary move when one leaves.
pub const SLOTS: usize = 16_381;

/// One backend of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Entry {
    /// Names it for life; no two are alike.
    pub name: u128,
    /// Its share relative to the others'; 0 counts as 1.
    pub weight: u32,
}

/// For each of `places` (a prime) the position in `entries` of the backend that has it; empty without entries.
///
/// At most as many as there are places get any.
#[must_use]
pub fn table(entries: &[Entry], places: usize) -> Vec<u16> {
    let most = entries.iter().map(|entry| entry.weight.max(1)).max();
    let Some(most) = most.map(u64::from) else {
        return Vec::new();
    };
    let mut order: Vec<usize> = (0..entries.len()).collect();
    order.sort_by_key(|&position| entries[position].name);
    let mut walks: Vec<Walk> = order
        .iter()
        .map(|&position| Walk::new(entries[position], places))
        .collect();
    let mut table = vec![u16::MAX; places];
    let mut left = places;
    while left > 0 {
        for (walk, &position) in walks.iter_mut().zip(&order) {
            walk.credit += walk.weight;
            if left == 0 || walk.credit < most {
                continue;
            }
            walk.credit -= most;
            while table[walk.at] != u16::MAX {
                walk.step(places);
            }
            table[walk.at] = position as u16;
            left -= 1;
        }
    }
    table
}

/// One backend's way through the table.
struct Walk {
    at: usize,
    skip: usize,
    weight: u64,
    credit: u64,
}

impl Walk {
    fn new(entry: Entry, places: usize) -> Self {
        let name = entry.name;
        let low = mix(name as u64 ^ mix((name >> 64) as u64));
        let high = mix(low);
        Self {
            at: (low % places as u64) as usize,
            skip: (high % (places as u64 - 1)) as usize + 1,
            weight: entry.weight.max(1).into(),
            credit: 0,
        }
    }

    fn step(&mut self, places: usize) {
        self.at = (self.at + self.skip) % places;
    }
}

/// The last table and what it was built of: most plans change no backend of a sticky VIP.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Cached {
    entries: Vec<Entry>,
    table: Vec<u16>,
}

impl Cached {
    /// The backend indexes of a sticky VIP's places.
    pub(super) fn slots(&mut self, candidates: &[Candidate]) -> Vec<u32> {
        let entries: Vec<Entry> = candidates
            .iter()
            .map(|candidate| Entry {
                name: candidate.identity,
                weight: 1,
            })
            .collect();
        if self.entries != entries {
            self.table = table(&entries, SLOTS);
            self.entries = entries;
        }
        self.table
            .iter()
            .map(|&position| candidates[usize::from(position)].index)
            .collect()
    }
}

/// The finalizer of splitmix64 (Steele, Lea, Flood 2014).
const fn mix(value: u64) -> u64 {
    let z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use proptest::prelude::*;

    use super::*;

    fn entries(count: u128) -> Vec<Entry> {
        (1..=count)
            .map(|number| Entry {
                name: (0xfd12 << 112) | (number << 32) | 2,
                weight: 1,
            })
            .collect()
    }

    fn shares(table: &[u16], backends: usize) -> Vec<usize> {
        let mut shares = vec![0; backends];
        for &position in table {
            shares[usize::from(position)] += 1;
        }
        shares
    }

    /// Who has each place, by name.
    fn owners(entries: &[Entry]) -> Vec<u128> {
        let places = table(entries, SLOTS);
        places
            .into_iter()
            .map(|position| entries[usize::from(position)].name)
            .collect()
    }

    #[test]
    fn shares_differ_by_at_most_one() {
        for count in [1usize, 2, 3, 7, 100] {
            let shares = shares(&table(&entries(count as u128), SLOTS), count);
            let (least, most) = (shares.iter().min().unwrap(), shares.iter().max().unwrap());
            assert!(most - least <= 1, "{count}: {least}..{most}");
        }
    }

    #[test]
    fn the_order_of_the_entries_does_not_matter() {
        let mut backward = entries(5);
        let forward = owners(&backward);
        backward.reverse();
        assert_eq!(owners(&backward), forward);
        assert_eq!(table(&[], 101), Vec::<u16>::new());
    }

    #[test]
    fn a_cached_table_is_the_same_and_a_changed_set_is_noticed() {
        let candidate = |number: u32| Candidate {
            index: 10 + number,
            identity: number.into(),
            ..Candidate::default()
        };
        let (two, three) = ([1, 2].map(candidate), [1, 2, 3].map(candidate));
        let mut cached = Cached::default();
        let first = cached.slots(&two);
        assert_eq!(cached.slots(&two), first);
        assert!(cached.slots(&three).contains(&13));
        assert_eq!(cached.slots(&two), first);
        // A backend keeps its name and gets another index.
        let renumbered = two.map(|it| Candidate {
            index: it.index + 50,
            ..it
        });
        assert!(cached.slots(&renumbered).iter().all(|index| *index > 60));
        assert_eq!(cached.slots(&[]), Vec::<u32>::new());
    }

    /// Prints how long a table takes; the bound is for an unoptimised build on a busy machine, which may halt now and
    /// then.
    #[test]
    fn a_table_is_built_in_milliseconds() {
        for count in [2, 10, 100, 1000] {
            let entries = entries(count);
            let took = (0..5).map(|_| {
                let start = Instant::now();
                let places = table(&entries, SLOTS);
                let took = start.elapsed();
                println!("{count} backends, {} places: {took:?}", places.len());
                took
            });
            let shortest = took.min().unwrap();
            assert!(shortest.as_millis() < 500, "{count}: {shortest:?}");
        }
    }

    proptest! {
        // Each case builds two tables of full size.
        #![proptest_config(ProptestConfig::with_cases(96))]

        #[test]
        fn when_one_of_n_is_lost_or_returns_at_most_its_share_and_two_percent_move(
            count in 2u128..=100,
            which in any::<prop::sample::Index>(),
        ) {
            let all = entries(count);
            let lost = which.index(all.len());
            let mut left = all.clone();
            left.remove(lost);
            let (before, after) = (owners(&all), owners(&left));
            // Read backwards this is its return: the same places move.
            let moved = before.iter().zip(&after).filter(|(before, after)| before != after).count();
            let most = SLOTS as f64 * (1.0 / count as f64 + 0.02);
            prop_assert!((moved as f64) <= most, "{moved} of {SLOTS}, at most {most}");
            prop_assert!(!after.contains(&all[lost].name));
        }

        #[test]
        fn shares_follow_the_weights(weights in prop::collection::vec(1u32..=8, 1..20)) {
            let mut weighed = entries(weights.len() as u128);
            for (entry, weight) in weighed.iter_mut().zip(&weights) {
                entry.weight = *weight;
            }
            let sum: u32 = weights.iter().sum();
            let shares = shares(&table(&weighed, SLOTS), weights.len());
            for (share, weight) in shares.iter().zip(&weights) {
                let fair = SLOTS as f64 * f64::from(*weight) / f64::from(sum);
                prop_assert!((*share as f64 - fair).abs() <= 2.0 + fair * 0.01, "{share} for {fair}");
            }
        }
    }
}
