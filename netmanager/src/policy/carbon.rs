//! `greenest`: weights by the carbon of the backend's power, within a latency bound.
//!
//! A backend's weight is `(cleanest / its own) ^ 2` of the carbon intensities: one whose power is twice as
//! dirty gets a quarter, and below a thirty-second nothing. What is farther than [`BOUND_US`] is not
//! looked at; where nothing is within, the nearest band serves, weighed alike. Where no distance but this node's own is
//! known, all are within. Unknown carbon counts as the dirtiest that is known; where none is known all are equal.

use std::collections::BTreeSet;

use super::{Candidate, Chosen, View, near};

/// A node enters the choice at this distance, microseconds: what a person does not notice in an answer ...
pub const BOUND_US: u32 = 50_000;
/// ... and leaves it only here.
pub const LEAVE_US: u32 = 60_000;
/// A weight below this is none.
const LEAST: f64 = 1.0 / 32.0;

/// The backends that get flows, and their weights.
pub(super) fn cleanest(
    usable: &[Candidate],
    view: View<'_>,
    chosen: &mut Chosen,
) -> (Vec<Candidate>, Vec<f64>) {
    let within = within(usable, view, chosen);
    let known: Vec<u32> = within
        .iter()
        .filter_map(|candidate| candidate.carbon_g_kwh)
        .collect();
    let Some((&cleanest, &dirtiest)) = known.iter().min().zip(known.iter().max()) else {
        let equal = vec![1.0; within.len()];
        return (within, equal);
    };
    within
        .into_iter()
        .filter_map(|candidate| {
            let own = candidate.carbon_g_kwh.unwrap_or(dirtiest);
            // Power without any carbon is as good as 1 g: a ratio needs a number.
            let ratio = f64::from(cleanest.max(1)) / f64::from(own.max(1));
            let weight = ratio * ratio;
            (weight >= LEAST).then_some((candidate, weight))
        })
        .unzip()
}

fn within(usable: &[Candidate], view: View<'_>, chosen: &mut Chosen) -> Vec<Candidate> {
    let known = near::distances(usable, view);
    if known.keys().all(|node| *node == view.here) {
        chosen.within.clear();
        return usable.to_vec();
    }
    let nodes: BTreeSet<u32> = known
        .into_iter()
        .filter(|(node, distance)| {
            let edge = if chosen.within.contains(node) {
                LEAVE_US
            } else {
                BOUND_US
            };
            *distance <= edge
        })
        .map(|(node, _)| node)
        .collect();
    chosen.within = nodes;
    if chosen.within.is_empty() {
        return near::closest(usable, view, chosen);
    }
    usable
        .iter()
        .filter(|candidate| chosen.within.contains(&candidate.node))
        .copied()
        .collect()
}
