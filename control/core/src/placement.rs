//! Placement: where each slot runs.
//!
//! Hard constraints first, each refusal named with its numbers; then one objective in one unit: micro-EUR per
//! hour. Integers only, ties go to the smaller name, so every lead finds the same answer.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{
    base::KnowledgeBase,
    name::{Name, ServiceName, Slot},
};

pub(crate) use self::view::Places;
pub use self::{
    filter::{Held, STALE_MS, Unfit},
    search::{Answer, Task, place},
    view::View,
};

mod filter;
mod objective;
mod search;
#[cfg(test)]
mod tests;
mod view;

/// So many clusters that lost are all named in a decision. Of more only the [`NEAREST`] are: a decision is kept for every
/// slot, and each names what grows with the mesh.
const FEW: usize = 16;
/// How many are named of more than [`FEW`]: those that may run the slot and came next.
const NEAREST: usize = 3;

/// The terms of the objective, each already weighted, micro-EUR per hour.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Parts {
    /// Carbon of the power drawn.
    pub energy: u64,
    /// Processing power, memory, egress.
    pub cost: u64,
    /// Time that calls spend on the way.
    pub latency: u64,
    /// How crowded the cluster is.
    pub performance: u64,
}

impl Parts {
    /// Their sum, micro-EUR per hour.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.energy
            .saturating_add(self.cost)
            .saturating_add(self.latency)
            .saturating_add(self.performance)
    }
}

/// Why a slot is where it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Decision {
    /// The cluster that won.
    pub cluster: Name,
    /// Its parts of the objective.
    pub parts: Parts,
    /// Every other cluster, and why it lost; in a mesh of many clusters those that came next.
    pub others: BTreeMap<Name, Lost>,
    /// The objective of the whole application, micro-EUR per hour.
    pub objective: u64,
    /// No placement of the application can be below this, micro-EUR per hour.
    pub lower_bound: u64,
}

impl Decision {
    /// How far the objective may be from the best one, in thousandths of it: 0 means that it is the best.
    #[must_use]
    pub fn gap_permille(&self) -> u64 {
        let gap = u128::from(self.objective.saturating_sub(self.lower_bound)) * 1000;
        let permille = gap.checked_div(u128::from(self.objective)).unwrap_or(0);
        u64::try_from(permille).unwrap_or(1000)
    }
}

/// Why a cluster lost.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Lost {
    /// Hard constraints, each with its numbers.
    Refused(Vec<String>),
    /// It would have cost more.
    Dearer {
        /// Its parts of the objective.
        parts: Parts,
        /// By how much, micro-EUR per hour.
        by: u64,
    },
}

/// What is known of where a slot runs, or would run, or why it cannot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Explanation {
    /// The slot.
    pub slot: Slot,
    /// Where it is bound now.
    pub bound: Option<Name>,
    /// The decision that put it there, as it was made.
    pub decision: Option<Decision>,
    /// What each cluster would mean now: the terms, or the refusals. Never empty while there are clusters.
    pub now: BTreeMap<Name, Verdict>,
}

/// What a cluster would mean for a slot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// It meets every hard constraint and has this objective.
    Eligible(Parts),
    /// It does not; each reason with its numbers.
    Refused(Vec<String>),
}

/// Explains every slot of a service at `now_ms`; empty when there is no such service.
#[must_use]
pub fn explain(kb: &KnowledgeBase, service: &ServiceName, now_ms: u64) -> Vec<Explanation> {
    let (Some(goal), Some(state)) = (kb.goal(service), kb.services.get(service)) else {
        return Vec::new();
    };
    let view = View::new(kb, now_ms);
    (0..goal.replicas)
        .map(|instance| service.slot(instance))
        .map(|slot| Explanation {
            bound: view.at(&slot).cloned(),
            decision: state.decisions.get(&slot.instance).cloned(),
            now: view.verdicts(&slot),
            slot,
        })
        .collect()
}

/// What a decision says of the clusters that lost: all of them, as long as they are few.
fn nearest(others: BTreeMap<Name, Lost>) -> BTreeMap<Name, Lost> {
    if others.len() <= FEW {
        return others;
    }
    let dearer = others.into_iter().filter_map(|(name, lost)| match lost {
        Lost::Dearer { by, .. } => Some((by, name, lost)),
        Lost::Refused(_) => None,
    });
    let mut dearer: Vec<_> = dearer.collect();
    dearer.sort_by(|a, b| (a.0, &a.1).cmp(&(b.0, &b.1)));
    let nearest = dearer.into_iter().take(NEAREST);
    nearest.map(|(_, name, lost)| (name, lost)).collect()
}
