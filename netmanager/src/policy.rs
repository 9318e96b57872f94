//! Turns a policy into an array of backend slots: the whole difference between two policies.
//!
//! The kernel picks uniformly from the array, so that a share is a count of slots. What is written here is
//! decided from three things: who is ready, which peers answer, and how far they are.
//!
//! | policy | slots |
//! |---|---|
//! | balanced, least_loaded, greenest | one per backend (a table carries no load and no carbon figure) |
//! | closest | one per backend of the nodes in the nearest band |
//! | sticky | a Maglev table of 16,381 ([`maglev`]) |
//! | instance | that instance, or none |
//!
//! Backends behind a peer that does not answer are left out, unless that would leave none: then a wrong
//! suspicion costs nothing. Pure: no clock and no I/O; what `closest` remembers is passed in.

use std::collections::{BTreeMap, BTreeSet};

use ebpf_common::addr::Policy;
use serde::{Deserialize, Serialize};

pub mod maglev;

/// The narrowest band of `closest`, microseconds: below it, a difference is noise of the scheduler.
const MIN_BAND_US: u32 = 1_000;

/// A backend that may get new flows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Its index in the kernel's array.
    pub index: u32,
    /// Its IPv6 address, which names it for life.
    pub identity: u128,
    /// The slot's number within its service.
    pub instance: u32,
    /// The binding's epoch.
    pub epoch: u64,
    /// The number of its node.
    pub node: u32,
}

/// How this node sees the others.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sight {
    /// Smoothed round-trip time by node number, microseconds.
    pub rtt_us: BTreeMap<u32, u32>,
    /// Peers whose probes fail, by node number.
    pub unreachable: BTreeSet<u32>,
}

/// The backend indexes of one VIP's run. `near` is what `closest` chose for this service before, and is
/// replaced by what it chooses now.
#[must_use]
pub fn slots(
    wanted: Wanted,
    candidates: &[Candidate],
    here: u32,
    sight: &Sight,
    near: &mut BTreeSet<u32>,
) -> Vec<u32> {
    let Wanted { policy, instance } = wanted;
    if policy == Policy::Instance {
        return candidates
            .iter()
            .filter(|candidate| Some(candidate.instance) == instance)
            .max_by_key(|candidate| candidate.epoch)
            .map(|candidate| candidate.index)
            .into_iter()
            .collect();
    }
    let reachable = reachable(candidates, sight);
    match policy {
        Policy::Closest => {
            let nodes: BTreeSet<u32> = reachable.iter().map(|candidate| candidate.node).collect();
            *near = nearest(&nodes, here, &sight.rtt_us, near);
            reachable
                .iter()
                .filter(|candidate| near.contains(&candidate.node))
                .map(|candidate| candidate.index)
                .collect()
        }
        Policy::Sticky => {
            let names: Vec<u128> = reachable
                .iter()
                .map(|candidate| candidate.identity)
                .collect();
            maglev::table(&names, maglev::SLOTS)
                .into_iter()
                .map(|position| reachable[position].index)
                .collect()
        }
        Policy::Balanced | Policy::LeastLoaded | Policy::Greenest | Policy::Instance => {
            reachable.iter().map(|candidate| candidate.index).collect()
        }
    }
}

/// What a VIP asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// The policy.
    pub policy: Policy,
    /// The instance, for [`Policy::Instance`].
    pub instance: Option<u32>,
}

/// The candidates behind peers that answer, or all if none does.
fn reachable(candidates: &[Candidate], sight: &Sight) -> Vec<Candidate> {
    let answering: Vec<Candidate> = candidates
        .iter()
        .filter(|candidate| !sight.unreachable.contains(&candidate.node))
        .copied()
        .collect();
    if answering.is_empty() {
        candidates.to_vec()
    } else {
        answering
    }
}

/// The nodes in the nearest band. A node enters the band at `nearest + width` and leaves it at
/// `nearest + 2 * width`, so that jitter at the edge moves nothing; this node is at distance 0, and nodes
/// without a measurement count only where none has one.
fn nearest(
    nodes: &BTreeSet<u32>,
    here: u32,
    rtt_us: &BTreeMap<u32, u32>,
    before: &BTreeSet<u32>,
) -> BTreeSet<u32> {
    let known: BTreeMap<u32, u32> = nodes
        .iter()
        .filter_map(|&node| {
            let rtt = if node == here {
                Some(0)
            } else {
                rtt_us.get(&node).copied()
            };
            rtt.map(|rtt| (node, rtt))
        })
        .collect();
    let Some(&best) = known.values().min() else {
        return nodes.clone();
    };
    let width = MIN_BAND_US.max(best / 10);
    known
        .into_iter()
        .filter(|(node, rtt)| {
            let edge = if before.contains(node) {
                2 * width
            } else {
                width
            };
            *rtt <= best.saturating_add(edge)
        })
        .map(|(node, _)| node)
        .collect()
}

#[cfg(test)]
mod tests;
