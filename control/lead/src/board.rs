//! The board: what every cluster said last of load and coordinates. In the leader's memory only.
//!
//! None of it is worth a log entry: it is gone a minute later, and a new leader's board is full again as soon as
//! every agent has repeated itself. A cluster speaks for its own nodes and for what is on them, and for nothing else.

use std::collections::{BTreeMap, BTreeSet};

use control_core::{base::KnowledgeBase, name::Name};
use netmanager_api::conditions::{Conditions, STALE};
use tokio::time::Instant;

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Board {
    clusters: BTreeMap<Name, (Conditions, Instant)>,
}

impl Board {
    /// Puts up what `cluster` says, and takes down what is too old.
    pub(crate) fn put(&mut self, cluster: Name, conditions: Conditions, now: Instant) {
        self.clusters.insert(cluster, (conditions, now));
        self.clusters
            .retain(|_, (_, at)| now.saturating_duration_since(*at) < STALE);
    }

    /// All that stands there.
    pub(crate) fn all(&self) -> Conditions {
        let clusters = self.clusters.values();
        clusters.fold(Conditions::default(), |all, (one, _)| {
            all.joined(one.clone())
        })
    }
}

/// What of `conditions` is about `cluster`'s own nodes.
pub(crate) fn own(base: &KnowledgeBase, cluster: &Name, mut conditions: Conditions) -> Conditions {
    let nodes = base.clusters.get(cluster).map(|it| &it.nodes);
    let numbers: BTreeSet<u32> = nodes
        .into_iter()
        .flat_map(BTreeMap::values)
        .map(|node| node.number)
        .collect();
    conditions
        .nodes
        .retain(|place| numbers.contains(&place.node));
    conditions.loads.retain(|load| {
        let node = base.mesh.as_ref().and_then(|mesh| mesh.node_of(load.addr6));
        node.is_some_and(|node| numbers.contains(&node))
    });
    conditions
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use netmanager_api::conditions::{BackendLoad, Coordinate, NodePlace};

    use super::*;
    use crate::tables::tests::{base, edge, report};

    fn conditions(node: u32, percent: u16) -> Conditions {
        Conditions {
            nodes: vec![NodePlace {
                node,
                coordinate: Coordinate {
                    at_us: [0; 3],
                    height_us: 1,
                    error_permille: 1,
                },
            }],
            loads: vec![BackendLoad {
                addr6: format!("fd00:1:2:0:0:{node:x}:0:2").parse().unwrap(),
                percent,
            }],
        }
    }

    #[test]
    fn the_newest_of_every_cluster_stands_until_it_is_stale() {
        let start = Instant::now();
        let mut board = Board::default();
        board.put(edge(), conditions(1, 10), start);
        board.put("cloud".parse().unwrap(), conditions(2, 20), start);
        let later = start + STALE - Duration::from_secs(1);
        board.put(edge(), conditions(1, 15), later);
        assert_eq!(board.all(), conditions(1, 15).joined(conditions(2, 20)));
        board.put(edge(), conditions(1, 15), start + STALE);
        assert_eq!(board.all(), conditions(1, 15));
    }

    #[test]
    fn a_cluster_speaks_for_its_own_nodes_only() {
        let mut base = base();
        report(&mut base, &["n1"], 100);
        let said = conditions(1, 10).joined(conditions(2, 99));
        assert_eq!(own(&base, &edge(), said), conditions(1, 10));
        let stranger = "cloud".parse().unwrap();
        assert_eq!(
            own(&base, &stranger, conditions(1, 10)),
            Conditions::default()
        );
    }
}
