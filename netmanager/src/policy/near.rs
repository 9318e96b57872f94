//! `closest`: bands of nodes by distance.
//!
//! ```text
//!  distance   0 .... nearest ===== nearest + width ----- nearest + 2 * width ........
//!             enters the band here ^                     ^ and leaves it only here
//! ```
//!
//! A band begins at the nearest node that is left and is the larger of 1 ms and 10 % wide; all backends in it
//! share. The next band joins while every backend of those before is saturated. A node that is in a band leaves
//! it only at twice the width: jitter below a fifth of the width moves a node at most once. The distance is what
//! was measured, else what network coordinates say; this node is at 0. Nodes of which neither is known count
//! only where nothing is known of any.

use std::collections::{BTreeMap, BTreeSet};

use super::{Candidate, Chosen, View, load};

/// The narrowest band, microseconds: below it, a difference is noise of the scheduler.
pub const MIN_BAND_US: u32 = 1_000;
/// A band is one in this many of the nearest distance wide.
pub const BAND_RATIO: u32 = 10;

/// The nodes of each band, nearest first.
pub(super) type Bands = Vec<BTreeSet<u32>>;

/// The backends that share.
pub(super) fn closest(usable: &[Candidate], view: View<'_>, chosen: &mut Chosen) -> Vec<Candidate> {
    load::note_saturated(usable, &mut chosen.saturated);
    let known = distances(usable, view);
    if known.is_empty() {
        chosen.near.clear();
        return usable.to_vec();
    }
    let before = std::mem::take(&mut chosen.near);
    let mut left = known;
    let mut taken: BTreeSet<u32> = BTreeSet::new();
    while let Some(band) = nearest(&left, before.get(chosen.near.len())) {
        left.retain(|node, _| !band.contains(node));
        taken.extend(&band);
        let has_room = usable.iter().any(|candidate| {
            band.contains(&candidate.node) && !chosen.saturated.contains(&candidate.identity)
        });
        chosen.near.push(band);
        if has_room {
            break;
        }
    }
    usable
        .iter()
        .filter(|candidate| taken.contains(&candidate.node))
        .copied()
        .collect()
}

/// How far the nodes of `candidates` are, as far as that is known, microseconds.
pub(super) fn distances(candidates: &[Candidate], view: View<'_>) -> BTreeMap<u32, u32> {
    let sight = view.sight;
    candidates
        .iter()
        .filter_map(|candidate| {
            let node = candidate.node;
            let measured = || sight.rtt_us.get(&node).copied();
            let estimated = || sight.estimated_us.get(&node).copied();
            let own = (node == view.here).then_some(0);
            Some((node, own.or_else(measured).or_else(estimated)?))
        })
        .collect()
}

/// The nearest band of `known`; those in `before` leave it late.
fn nearest(known: &BTreeMap<u32, u32>, before: Option<&BTreeSet<u32>>) -> Option<BTreeSet<u32>> {
    let best = *known.values().min()?;
    let width = MIN_BAND_US.max(best / BAND_RATIO);
    let edge = |node| {
        if before.is_some_and(|before| before.contains(node)) {
            2 * width
        } else {
            width
        }
    };
    let band = known
        .iter()
        .filter(|(node, distance)| **distance <= best.saturating_add(edge(node)))
        .map(|(node, _)| *node);
    Some(band.collect())
}
