//! How a flow becomes a number, and a number a slot.
//!
//! Deterministic: the same tuple, seed and slot array pick the same slot, in the kernel and in
//! `weft trace`. The hash is one round of multiply-fold per 64 bits (the folded multiply of wyhash and
//! foldhash); it spreads well and costs a few cycles, and it is no defence against someone who chooses
//! tuples, which the per-mesh seed makes harder, not impossible.

/// A flow's tuple as 64-bit words: source, destination (IPv4 in the low 32 bits of the second word), ports and protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tuple {
    /// Source address, two words.
    pub src: [u64; 2],
    /// Destination address, two words.
    pub dst: [u64; 2],
    /// Source port, destination port and protocol: `sport << 32 | dport << 16 | proto`.
    pub ports_proto: u64,
}

const K0: u64 = 0x9e37_79b9_7f4a_7c15; // 2^64 / golden ratio, odd
const K1: u64 = 0xd6e8_feb8_6659_fd93; // an odd constant with a balanced bit pattern (rrmxmx, P. Evensen)

/// The hash of one flow under `seed`.
#[must_use]
#[inline(always)]
pub const fn flow_hash(tuple: &Tuple, seed: u64) -> u32 {
    let mut h = seed ^ K0;
    h = fold(h ^ tuple.src[0], K0);
    h = fold(h ^ tuple.src[1], K1);
    h = fold(h ^ tuple.dst[0], K0);
    h = fold(h ^ tuple.dst[1], K1);
    h = fold(h ^ tuple.ports_proto, K0);
    (h ^ (h >> 32)) as u32
}

/// Multiplies and mixes; only 64-bit multiplication, because BPF has no wider one.
#[inline(always)]
const fn fold(value: u64, k: u64) -> u64 {
    let m = value.wrapping_mul(k);
    let m = m ^ (m >> 29);
    let m = m.wrapping_mul(K1);
    m ^ (m >> 32)
}

/// The slot for a hash: `0..count`, in proportion (D. Lemire, 2019), or `None` when there is none.
#[must_use]
#[inline(always)]
pub const fn slot(hash: u32, count: u32) -> Option<u32> {
    if count == 0 {
        None
    } else {
        Some(((hash as u64 * count as u64) >> 32) as u32)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn tuple(sport: u64) -> Tuple {
        Tuple {
            src: [0, 0x0a10_0003],
            dst: [0, 0x0a18_0001],
            ports_proto: (sport << 32) | (80 << 16) | 6,
        }
    }

    #[test]
    fn consecutive_source_ports_share_the_slots_evenly() {
        for count in [2u32, 3, 5, 7, 100] {
            let mut hits = vec![0u32; count as usize];
            for sport in 32_768..61_000 {
                hits[slot(flow_hash(&tuple(sport), 7), count).unwrap() as usize] += 1;
            }
            let fair = f64::from(28_232 / count);
            let worst = hits
                .iter()
                .map(|&h| (f64::from(h) - fair).abs() / fair)
                .fold(0.0, f64::max);
            // Six standard deviations of a fair multinomial, relative to the mean.
            assert!(worst < 6.0 / fair.sqrt() + 0.01, "{count} slots: {worst}");
        }
    }

    #[test]
    fn no_slot_without_backends() {
        assert_eq!(slot(17, 0), None);
    }

    proptest! {
        #[test]
        fn a_slot_is_in_range(hash: u32, count in 1u32..=1_000_000) {
            prop_assert!(slot(hash, count).unwrap() < count);
        }

        #[test]
        fn the_same_flow_picks_the_same_slot(src: [u64; 2], dst: [u64; 2], ports_proto: u64, seed: u64) {
            let tuple = Tuple { src, dst, ports_proto };
            prop_assert_eq!(flow_hash(&tuple, seed), flow_hash(&tuple, seed));
        }
    }
}
