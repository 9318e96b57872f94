//! How a flow becomes a number, and a number a slot.
//!
//! Deterministic: the same tuple, seed and slot array pick the same slot, in the kernel and in
//! `weft trace`. The hash is one round of multiply-fold per 64 bits (the folded multiply of wyhash and
//! foldhash); it spreads well and costs a few cycles, and it is no defence against someone who chooses
//! tuples, which the per-mesh seed makes harder, not impossible.

use core::borrow::Borrow;

use crate::{
    addr::Policy,
    layout::{Addr, BACKEND_LIVE, Backend, FlowKey, Vip},
    reason::Reason,
};

/// How many slots in a row are tried while the one that was picked names a backend that has just died.
pub const SLOT_TRIES: u32 = 4;

/// A flow's tuple as 64-bit words: source, destination (IPv4 in the low 32 bits of the second word), ports and protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tuple {
    /// Source address, two words.
    pub src: [u64; 2],
    /// Destination address, two words.
    pub dst: [u64; 2],
    /// Protocol, destination port and source port: `proto << 32 | dport << 16 | sport`. What varies most stands lowest,
    /// because a product mixes upwards.
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
    // The high half: a product mixes upwards.
    (h >> 32) as u32
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

/// The number by which `policy` chooses for the flow of `key`.
#[must_use]
#[inline(always)]
pub fn choice(key: &FlowKey, policy: Policy, seed: u64) -> u32 {
    match policy {
        Policy::Sticky => source_hash(&key.src, seed),
        _ => key_hash(key, seed),
    }
}

/// The hash of all of a flow's tuple.
#[must_use]
#[inline(always)]
pub fn key_hash(key: &FlowKey, seed: u64) -> u32 {
    let tuple = Tuple {
        src: halves(&key.src),
        dst: halves(&key.dst),
        ports_proto: (key.proto as u64) << 32
            | (u16::from_be(key.dport_be) as u64) << 16
            | u16::from_be(key.sport_be) as u64,
    };
    flow_hash(&tuple, seed)
}

/// The hash that `sticky` picks by: of the source alone.
#[must_use]
#[inline(always)]
pub fn source_hash(src: &Addr, seed: u64) -> u32 {
    let tuple = Tuple {
        src: halves(src),
        dst: [0; 2],
        ports_proto: 0,
    };
    flow_hash(&tuple, seed)
}

/// The first slot of a VIP's run, from `offset` on and around, whose backend takes new flows of a family; and that
/// backend's index. Gives up after [`SLOT_TRIES`].
///
/// # Errors
/// The reason for which the flow is refused.
#[inline(always)]
pub fn first_live<B: Borrow<Backend>>(
    mut offset: u32,
    vip: &Vip,
    is_v4: bool,
    slot: impl Fn(u32) -> Option<u32>,
    backend: impl Fn(u32) -> Option<B>,
) -> Result<(u32, u32), Reason> {
    for _ in 0..SLOT_TRIES {
        let index = slot(vip.slot_base.wrapping_add(offset)).ok_or(Reason::Internal)?;
        if let Some(backend) = backend(index)
            && takes(backend.borrow(), is_v4)
        {
            return Ok((offset, index));
        }
        offset = if offset + 1 >= vip.slot_count {
            0
        } else {
            offset + 1
        };
    }
    Err(Reason::NoBackend)
}

/// Whether new flows of a family may pick a backend.
#[inline(always)]
const fn takes(backend: &Backend, is_v4: bool) -> bool {
    let address = if is_v4 {
        &backend.addr4
    } else {
        &backend.addr6
    };
    let [a, b, c, d] = address.words;
    backend.flags & BACKEND_LIVE != 0 && a | b | c | d != 0
}

/// An address as [`Tuple`] wants it: two words in host byte order, IPv4 in the low half of the second.
#[inline(always)]
const fn halves(address: &Addr) -> [u64; 2] {
    if address.is_v4() {
        return [0, u32::from_be(address.v4_be()) as u64];
    }
    let bits = address.to_bits();
    [(bits >> 64) as u64, bits as u64]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn tuple(sport: u64) -> Tuple {
        Tuple {
            src: [0, 0x0a10_0003],
            dst: [0, 0x0a18_0001],
            ports_proto: (6 << 32) | (80 << 16) | sport,
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

    /// What one client's connections in a row look like: Linux gives `connect` every other port.
    #[test]
    fn a_few_hundred_connections_in_a_row_share_the_slots_as_by_chance() {
        const CALLS: u64 = 400;
        // The chi-squared value that chance exceeds once in 10,000, for one less than so many slots.
        for (count, bound) in [(2u32, 15.14), (3, 18.42), (4, 21.11), (7, 27.86)] {
            let fair = CALLS as f64 / f64::from(count);
            let uneven = |seed: u64, step: u64| {
                let first = 32_768 + seed * 37 % 20_000;
                let mut hits = vec![0.0; count as usize];
                for call in 0..CALLS {
                    let hash = flow_hash(&tuple(first + call * step), seed.wrapping_mul(K1));
                    hits[slot(hash, count).unwrap() as usize] += 1.0;
                }
                let chi: f64 = hits.iter().map(|h: &f64| (h - fair).powi(2) / fair).sum();
                chi > bound
            };
            for step in [1, 2] {
                let uneven = (0..2_000).filter(|&seed| uneven(seed, step)).count();
                // 0.2 are to be expected.
                assert!(uneven <= 4, "{count} slots, step {step}: {uneven} of 2000");
            }
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
