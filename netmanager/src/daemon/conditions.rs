//! What the node was told of load and coordinates, as far as it is still worth something.

use std::{collections::BTreeMap, time::Duration};

use ebpf_common::addr::Policy;
use netmanager_api::{
    conditions::{Conditions, Coordinate, REPEAT, STALE},
    table::Table,
};

use super::{monotonic, node::Node};
use crate::{policy::Sight, probe::coordinate::estimate_us};

/// A step of `least_loaded` follows the one before after this: conditions come when they change and are
/// repeated, and a repetition may be a little early.
const ROUND: Duration = REPEAT.saturating_sub(Duration::from_secs(1));
/// An estimate stays while a newer one is within this many microseconds of it ...
const STICKY_US: u32 = 1_000;
/// ... or within one in this many of it: `closest` must not follow noise.
const STICKY_RATIO: u32 = 8;

/// See the module. Time is any that counts on.
#[derive(Clone, Debug, Default)]
pub(super) struct Told {
    conditions: Conditions,
    heard: Duration,
    stepped: Option<Duration>,
}

impl Told {
    /// Takes what was said at `now`.
    pub(super) fn hear(&mut self, conditions: Conditions, now: Duration) {
        self.conditions = conditions;
        self.heard = now;
    }

    fn is_stale(&self, now: Duration) -> bool {
        now.saturating_sub(self.heard) >= STALE
    }

    /// Whether something is remembered that counts no more at `now`.
    fn is_to_forget(&self, now: Duration) -> bool {
        self.is_stale(now) && self.conditions != Conditions::default()
    }

    /// Puts into `sight` what is known at `now` of nodes and backends, seen from `own`.
    pub(super) fn show(&mut self, own: Option<&Coordinate>, sight: &mut Sight, now: Duration) {
        if self.is_stale(now) {
            self.conditions = Conditions::default();
        }
        let loads = self.conditions.loads.iter();
        sight.load = loads
            .map(|load| (load.addr6.to_bits(), load.percent))
            .collect();
        let before = std::mem::take(&mut sight.estimated_us);
        let places = self.conditions.nodes.iter();
        sight.estimated_us = places
            .filter_map(|place| {
                let new = estimate_us(own?, &place.coordinate)?;
                let old = before.get(&place.node).copied();
                let stays = |old: &u32| new.abs_diff(*old) <= STICKY_US.max(old / STICKY_RATIO);
                Some((place.node, old.filter(stays).unwrap_or(new)))
            })
            .collect::<BTreeMap<u32, u32>>();
    }

    /// Whether weights may follow the load by a step at `now`.
    pub(super) fn step(&mut self, now: Duration) -> bool {
        let is_due = self
            .stepped
            .is_none_or(|last| now.saturating_sub(last) >= ROUND);
        let steps = is_due && !self.conditions.loads.is_empty();
        if steps {
            self.stepped = Some(now);
        }
        steps
    }
}

impl Node {
    /// Conditions came from the agent.
    pub(super) async fn take_conditions(&mut self, conditions: Conditions) {
        let now = monotonic();
        self.told.hear(conditions, now);
        let mut sight = self.sight.clone();
        self.told.show(self.coordinate.as_ref(), &mut sight, now);
        if self.table.as_deref().is_some_and(weighs) && self.told.step(now) {
            sight.round += 1;
        }
        self.see(sight).await;
    }

    /// Forgets what was told too long ago.
    pub(super) async fn age(&mut self) {
        let now = monotonic();
        if self.told.is_to_forget(now) {
            tracing::info!("what was said of load and coordinates is too old");
            let mut sight = self.sight.clone();
            self.told.show(self.coordinate.as_ref(), &mut sight, now);
            self.see(sight).await;
        }
    }

    async fn see(&mut self, sight: Sight) {
        if sight != self.sight {
            self.sight = sight;
            self.reconcile().await;
        }
    }
}

/// Whether a table has a VIP that weighs by load.
fn weighs(table: &Table) -> bool {
    let services = table.services.iter();
    let mut vips = services.flat_map(|service| &service.vips);
    vips.any(|vip| vip.policy.0 == Policy::LeastLoaded)
}

#[cfg(test)]
mod tests {
    use netmanager_api::conditions::{BackendLoad, NodePlace};

    use super::*;

    fn place(far: i32) -> Coordinate {
        Coordinate {
            at_us: [far, 0, 0],
            height_us: 50,
            error_permille: 100,
        }
    }

    fn conditions(far: i32, percent: u16) -> Conditions {
        Conditions {
            nodes: vec![NodePlace {
                node: 7,
                coordinate: place(far),
            }],
            loads: vec![BackendLoad {
                addr6: "::5".parse().unwrap(),
                percent,
            }],
        }
    }

    #[test]
    fn what_was_told_counts_until_it_is_stale() {
        let (mut told, mut sight) = (Told::default(), Sight::default());
        told.hear(conditions(20_000, 40), Duration::from_secs(100));
        told.show(Some(&place(0)), &mut sight, Duration::from_secs(101));
        assert_eq!(sight.load, BTreeMap::from([(5, 40)]));
        assert_eq!(sight.estimated_us, BTreeMap::from([(7, 20_100)]));
        let late = Duration::from_secs(100) + STALE;
        assert!(!told.is_to_forget(Duration::from_secs(101)) && told.is_to_forget(late));
        told.show(Some(&place(0)), &mut sight, late);
        assert!(!told.is_to_forget(late), "only once");
        assert_eq!((sight.load.len(), sight.estimated_us.len()), (0, 0));
    }

    #[test]
    fn an_estimate_needs_two_places_and_does_not_follow_noise() {
        let (mut told, mut sight) = (Told::default(), Sight::default());
        let mut estimate = |own: Option<i32>, far| {
            told.hear(conditions(far, 40), Duration::ZERO);
            let own = own.map(place);
            told.show(own.as_ref(), &mut sight, Duration::ZERO);
            sight.estimated_us.get(&7).copied()
        };
        assert_eq!(estimate(None, 20_000), None);
        assert_eq!(estimate(Some(0), 20_000), Some(20_100));
        assert_eq!(estimate(Some(0), 22_000), Some(20_100));
        assert_eq!(estimate(Some(0), 18_000), Some(20_100));
        assert_eq!(estimate(Some(0), 23_000), Some(23_100));
    }

    #[test]
    fn a_step_needs_a_load_and_a_rest() {
        let mut told = Told::default();
        assert!(!told.step(Duration::ZERO));
        told.hear(conditions(0, 40), Duration::ZERO);
        assert!(told.step(Duration::ZERO));
        assert!(!told.step(ROUND / 2));
        assert!(told.step(ROUND));
    }
}
