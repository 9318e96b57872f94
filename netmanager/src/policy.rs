//! Turns a policy into an array of backend slots: the whole difference between two policies.
//!
//! The kernel picks uniformly from the array, so that a share is a count of slots. What is written here is
//! decided from who is ready, which peers answer, how far they are, how loaded, and how clean their power is.
//!
//! | policy | slots |
//! |---|---|
//! | balanced | one per backend |
//! | closest | one per backend of the nodes in the nearest band, and of the next while that is saturated ([`near`]) |
//! | least_loaded | as many as evens out the reported load ([`load`]) |
//! | greenest | by the carbon of the backend's cluster, within a latency bound ([`carbon`]) |
//! | sticky | a Maglev table of 16,381 ([`maglev`]) |
//! | instance | that instance, or none |
//!
//! A new policy is a variant of [`Policy`], an arm in [`slots`] and one in [`follows`]; the kernel's programs and
//! the maps stay as they are. Backends behind a peer that does not answer are left out, unless that would leave
//! none: then a wrong suspicion costs nothing. Pure: no clock and no I/O; what a policy remembers is passed in.

use std::collections::{BTreeMap, BTreeSet};

use ebpf_common::addr::Policy;
use serde::{Deserialize, Serialize};

mod allot;
pub mod carbon;
pub mod load;
pub mod maglev;
pub mod near;

/// A backend that may get new flows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
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
    /// What it uses of what it asked for, percent; `None` while nobody says.
    pub load: Option<u16>,
    /// Carbon intensity of its cluster's power, gCO2e/kWh; `None` where it is unknown.
    pub carbon_g_kwh: Option<u32>,
}

/// How this node sees the others.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Sight {
    /// Smoothed round-trip time by node number, microseconds.
    pub rtt_us: BTreeMap<u32, u32>,
    /// The same as network coordinates have it, for nodes that are not measured.
    #[serde(skip)]
    pub estimated_us: BTreeMap<u32, u32>,
    /// Peers whose probes fail, by node number.
    pub unreachable: BTreeSet<u32>,
    /// Load of backends by IPv6 address, percent; what is too old is not here, and none of it outlives the daemon.
    #[serde(skip)]
    pub load: BTreeMap<u128, u16>,
    /// Counts up when weights may follow the load by one step.
    #[serde(skip)]
    pub round: u64,
}

/// What the policies of one service chose last, so that noise moves nothing.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Chosen {
    near: near::Bands,
    within: BTreeSet<u32>,
    saturated: BTreeSet<u128>,
    weights: load::Weights,
    sticky: maglev::Cached,
}

/// From where the backends are looked at.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    /// This node's number.
    pub here: u32,
    /// How it sees the others.
    pub sight: &'a Sight,
}

/// What a VIP asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// The policy.
    pub policy: Policy,
    /// The instance, for [`Policy::Instance`].
    pub instance: Option<u32>,
}

/// The backend indexes of one VIP's run. `chosen` is what this service's policies chose before, and is replaced
/// by what they choose now.
#[must_use]
pub fn slots(
    wanted: Wanted,
    candidates: &[Candidate],
    view: View<'_>,
    chosen: &mut Chosen,
) -> Vec<u32> {
    let usable = reachable(candidates, view.sight);
    match wanted.policy {
        Policy::Balanced => indexes(&usable),
        Policy::Closest => indexes(&near::closest(&usable, view, chosen)),
        Policy::LeastLoaded => {
            let weights = chosen.weights.follow(&usable, view.sight.round);
            allot::slots(&usable, &weights)
        }
        Policy::Greenest => {
            let (clean, weights) = carbon::cleanest(&usable, view, chosen);
            allot::slots(&clean, &weights)
        }
        Policy::Sticky => chosen.sticky.slots(&usable),
        // Also behind a silent peer: there is no other.
        Policy::Instance => that(candidates, wanted.instance),
    }
}

/// What a policy follows besides who is ready and who answers: a plan is made anew only where that changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Follows {
    /// How far the nodes are.
    pub distance: bool,
    /// How loaded the backends are.
    pub load: bool,
    /// How clean the nodes' power is.
    pub carbon: bool,
}

impl Follows {
    /// What either follows.
    #[must_use]
    pub fn or(self, other: Self) -> Self {
        Self {
            distance: self.distance || other.distance,
            load: self.load || other.load,
            carbon: self.carbon || other.carbon,
        }
    }
}

/// What `policy` follows.
#[must_use]
pub fn follows(policy: Policy) -> Follows {
    let nothing = Follows::default();
    match policy {
        Policy::Balanced | Policy::Sticky | Policy::Instance => nothing,
        Policy::Closest => Follows {
            distance: true,
            load: true,
            ..nothing
        },
        Policy::LeastLoaded => Follows {
            load: true,
            ..nothing
        },
        // Beyond the bound it is as `closest`.
        Policy::Greenest => Follows {
            distance: true,
            load: true,
            carbon: true,
        },
    }
}

fn indexes(candidates: &[Candidate]) -> Vec<u32> {
    candidates.iter().map(|candidate| candidate.index).collect()
}

/// The instance in its newest epoch, or nobody.
fn that(candidates: &[Candidate], instance: Option<u32>) -> Vec<u32> {
    candidates
        .iter()
        .filter(|candidate| Some(candidate.instance) == instance)
        .max_by_key(|candidate| candidate.epoch)
        .map(|candidate| candidate.index)
        .into_iter()
        .collect()
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

#[cfg(test)]
mod tests;
