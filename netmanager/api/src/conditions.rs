//! Conditions: load and network coordinates, beside the table.
//!
//! ```text
//!  node ---- Measured.coordinate ---.
//!                                   +--> agent --> any lead --> the leader's board, in memory
//!  driver -- load of instances -----'                               |
//!  node <------------ agent <------------ every agent's lead <------'
//! ```
//!
//! A table shows facts of the log and has a revision. Conditions change all the time and are worth nothing a
//! minute later: they never enter the log, are kept nowhere, have no revision and are not acknowledged. Each
//! value is quantised with hysteresis where it arises, so that noise is no message. A message is complete for
//! whom it is sent to; it is repeated every [`REPEAT`], and who hears nothing for [`STALE`] forgets what it heard,
//! so that a load that nobody reports any more is forgotten everywhere within [`FORGOTTEN`].

use std::{collections::BTreeMap, net::Ipv6Addr, time::Duration};

use serde::{Deserialize, Serialize};

/// Conditions that did not change are said again after this.
pub const REPEAT: Duration = Duration::from_secs(5);
/// Conditions that were not repeated for so long are nothing.
pub const STALE: Duration = Duration::from_secs(15);
/// Within this every node has forgotten a load that is reported no more: the leader's board, the agent and the
/// node each wait once at most.
pub const FORGOTTEN: Duration = Duration::from_secs(3 * STALE.as_secs());

/// A node's place in the network (Vivaldi: Dabek et al., SIGCOMM 2004, with a height).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Coordinate {
    /// In a space whose distances are round-trip times, microseconds.
    pub at_us: [i32; 3],
    /// Height above that space: the way to the network, microseconds.
    pub height_us: u32,
    /// How far an estimate by it is usually off, thousandths of the round-trip time.
    pub error_permille: u16,
}

/// How things stand just now.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Conditions {
    /// The nodes' places.
    pub nodes: Vec<NodePlace>,
    /// The backends' loads.
    pub loads: Vec<BackendLoad>,
}

/// Where a node is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodePlace {
    /// Its number.
    pub node: u32,
    /// Its place.
    pub coordinate: Coordinate,
}

/// How loaded a backend is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackendLoad {
    /// Its endpoint's IPv6 address.
    pub addr6: Ipv6Addr,
    /// What it uses of the processing power it asked for, percent.
    pub percent: u16,
}

impl Conditions {
    /// Both; where both name one thing, `other` counts.
    #[must_use]
    pub fn joined(self, other: Self) -> Self {
        let nodes: BTreeMap<u32, NodePlace> = self
            .nodes
            .into_iter()
            .chain(other.nodes)
            .map(|place| (place.node, place))
            .collect();
        let loads: BTreeMap<Ipv6Addr, BackendLoad> = self
            .loads
            .into_iter()
            .chain(other.loads)
            .map(|load| (load.addr6, load))
            .collect();
        Self {
            nodes: nodes.into_values().collect(),
            loads: loads.into_values().collect(),
        }
    }

    /// Only what somebody asks for.
    #[must_use]
    pub fn of(mut self, concern: &Concern) -> Self {
        self.nodes
            .retain(|place| concern.nodes.contains(&place.node));
        self.loads
            .retain(|load| concern.backends.contains(&load.addr6));
        self
    }
}

/// What the tables of somebody name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Concern {
    nodes: std::collections::BTreeSet<u32>,
    backends: std::collections::BTreeSet<Ipv6Addr>,
}

impl Concern {
    /// The peers and backends of a table.
    #[must_use]
    pub fn of(table: &crate::table::Table) -> Self {
        let mut concern = Self::default();
        concern.add(table);
        concern
    }

    /// Adds those of another.
    pub fn add(&mut self, table: &crate::table::Table) {
        self.nodes
            .extend(table.peers.iter().map(|peer| peer.number));
        let services = table.services.iter();
        let backends = services.flat_map(|service| &service.backends);
        self.backends.extend(backends.map(|backend| backend.addr6));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(last: u16, percent: u16) -> BackendLoad {
        BackendLoad {
            addr6: Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, last),
            percent,
        }
    }

    #[test]
    fn joined_conditions_name_each_thing_once_and_the_later_counts() {
        let loads = |loads: &[BackendLoad]| Conditions {
            loads: loads.to_vec(),
            ..Conditions::default()
        };
        let both = loads(&[load(1, 10), load(3, 30)]).joined(loads(&[load(2, 20), load(1, 15)]));
        assert_eq!(both, loads(&[load(1, 15), load(2, 20), load(3, 30)]));
        assert_eq!(both.clone().joined(Conditions::default()), both);
        assert_eq!(both.of(&Concern::default()), Conditions::default());
    }
}
