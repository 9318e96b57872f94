//! What is seen otherwise than at the last plan, and which services that concerns.

use std::collections::BTreeSet;

use netmanager_api::table::Service;

use crate::{
    plan::merge,
    policy::{self, Follows, Sight},
};

/// The nodes and backends that are seen otherwise than before.
#[derive(Debug, Default)]
pub(super) struct Moved {
    /// They began or ceased to answer.
    reach: BTreeSet<u32>,
    /// They are nearer or farther.
    distance: BTreeSet<u32>,
    /// Their power is another.
    pub(super) carbon: BTreeSet<u32>,
    /// Backends that are loaded more or less, and all that have a load when another round began.
    load: BTreeSet<u128>,
}

impl Moved {
    pub(super) fn between(before: &Sight, now: &Sight) -> Self {
        let mut moved = Self {
            reach: before
                .unreachable
                .symmetric_difference(&now.unreachable)
                .copied()
                .collect(),
            ..Self::default()
        };
        for (before, now) in [
            (&before.rtt_us, &now.rtt_us),
            (&before.estimated_us, &now.estimated_us),
        ] {
            merge(before, now, |node, _, _| {
                moved.distance.insert(*node);
            });
        }
        merge(&before.load, &now.load, |identity, _, _| {
            moved.load.insert(*identity);
        });
        if before.round != now.round {
            moved.load.extend(now.load.keys());
        }
        moved
    }

    /// Whether this may change where a service's flows go.
    pub(super) fn concerns(&self, service: &Service) -> bool {
        let follows = service
            .vips
            .iter()
            .map(|vip| policy::follows(vip.policy.0))
            .fold(Follows::default(), Follows::or);
        let is_any = !self.reach.is_empty()
            || follows.distance && !self.distance.is_empty()
            || follows.carbon && !self.carbon.is_empty()
            || follows.load && !self.load.is_empty();
        is_any
            && service.backends.iter().any(|backend| {
                self.reach.contains(&backend.node)
                    || follows.distance && self.distance.contains(&backend.node)
                    || follows.carbon && self.carbon.contains(&backend.node)
                    || follows.load && self.load.contains(&backend.addr6.to_bits())
            })
    }
}
