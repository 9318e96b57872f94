//! Maglev's lookup table (Eisenbud et al., NSDI 2016, section 3.4): equal shares, and little movement when a
//! backend comes or goes.
//!
//! Each backend walks the table in an order of its own (`offset + i * skip` modulo a prime) and the backends
//! take turns at their next free place. Deterministic in the set of names: their order does not matter.

/// Places in a sticky VIP's table; prime. With 100 backends 1.5 % more than necessary move when one leaves.
pub const SLOTS: usize = 16_381;

/// For each of `places` (a prime) the position in `names` of the backend that has it; empty without names.
///
/// Names must differ from each other; at most as many as there are places get any.
#[must_use]
pub fn table(names: &[u128], places: usize) -> Vec<usize> {
    if names.is_empty() {
        return Vec::new();
    }
    let mut order: Vec<usize> = (0..names.len()).collect();
    order.sort_by_key(|&position| names[position]);
    let mut walks: Vec<Walk> = order
        .iter()
        .map(|&position| Walk::new(names[position], places))
        .collect();
    let mut table = vec![usize::MAX; places];
    let mut left = places;
    while left > 0 {
        for (walk, &position) in walks.iter_mut().zip(&order) {
            if left == 0 {
                break;
            }
            while table[walk.at] != usize::MAX {
                walk.step(places);
            }
            table[walk.at] = position;
            left -= 1;
        }
    }
    table
}

/// One backend's way through the table.
struct Walk {
    at: usize,
    skip: usize,
}

impl Walk {
    fn new(name: u128, places: usize) -> Self {
        let low = mix(name as u64 ^ mix((name >> 64) as u64));
        let high = mix(low);
        Self {
            at: (low % places as u64) as usize,
            skip: (high % (places as u64 - 1)) as usize + 1,
        }
    }

    fn step(&mut self, places: usize) {
        self.at = (self.at + self.skip) % places;
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
    use super::*;

    fn names(count: u128) -> Vec<u128> {
        (1..=count)
            .map(|number| (0xfd12 << 112) | (number << 32) | 2)
            .collect()
    }

    fn shares(table: &[usize], backends: usize) -> Vec<usize> {
        let mut shares = vec![0; backends];
        for &position in table {
            shares[position] += 1;
        }
        shares
    }

    #[test]
    fn shares_differ_by_at_most_one() {
        for count in [1usize, 2, 3, 7, 100] {
            let shares = shares(&table(&names(count as u128), SLOTS), count);
            let (least, most) = (shares.iter().min().unwrap(), shares.iter().max().unwrap());
            assert!(most - least <= 1, "{count}: {least}..{most}");
        }
    }

    #[test]
    fn when_one_of_ten_leaves_few_others_move() {
        let ten = names(10);
        let before = table(&ten, SLOTS);
        let after = table(&ten[..9], SLOTS);
        let moved = before
            .iter()
            .zip(&after)
            .filter(|(before, after)| **before != 9 && before != after)
            .count();
        assert!(moved * 100 < SLOTS * 3, "{moved} of {SLOTS} moved");
    }

    #[test]
    fn the_order_of_the_names_does_not_matter() {
        let forward = names(5);
        let backward: Vec<u128> = forward.iter().rev().copied().collect();
        let a: Vec<u128> = table(&forward, 101)
            .into_iter()
            .map(|p| forward[p])
            .collect();
        let b: Vec<u128> = table(&backward, 101)
            .into_iter()
            .map(|p| backward[p])
            .collect();
        assert_eq!(a, b);
        assert_eq!(table(&[], 101), Vec::<usize>::new());
    }
}
