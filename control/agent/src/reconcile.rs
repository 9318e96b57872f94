//! What to do next so that the cluster runs what it must: a pure function.
//!
//! ```text
//!  orders (leads) + statuses (driver) + nodes + ledger --reconcile--> [Stop.., Forget.., GiveUp.., Run..]
//! ```
//!
//! Rules: stops come first, and after a contact that was broken nothing starts before they are done (I7). An
//! instance whose node is away is placed on another node of the cluster with the same epoch only after the
//! driver says that nothing of it is left. An instance that has one writer ends with the lease, or when its node
//! was away for one. What no order names is left alone.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use control_core::{
    assignment::{Assignment, Run, Want},
    goal::{Requests, Writers},
    report::InstanceId,
};
use serde::{Deserialize, Serialize};

use crate::{
    driver::{State, Status, Statuses},
    nodes::{Nodes, Standing},
    room::{Booking, Found, Room, Usable},
};

/// How long an instance whose process died stays on a node that is away.
pub const NODE_GRACE: Duration = Duration::from_secs(2);
/// How long an instance whose process serves on stays on a node whose NetManager is away: the kernel forwards
/// without it, and it is usually back in a second.
pub const DETACHED_GRACE: Duration = Duration::from_secs(30);
/// How long an instance that needs a node waits for one that went away.
pub const START_PATIENCE: Duration = Duration::from_secs(10);
/// A copy that was cut off is gone within two seconds of contact (I7); this leaves time to see it.
pub const CUT_OFF_GRACE: Duration = Duration::from_millis(1500);

/// The orders by instance.
pub type Orders = BTreeMap<InstanceId, Assignment>;

/// What the agent decided for good and must remember over restarts.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ledger {
    /// Instances that do not run any more in this epoch, whatever the orders say.
    #[serde(with = "pairs")]
    pub verdicts: BTreeMap<InstanceId, Verdict>,
    /// What each instance books on its node.
    #[serde(with = "pairs")]
    pub booked: BTreeMap<InstanceId, Requests>,
}

/// Why an instance does not run any more in its epoch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// The cluster cannot run it; why.
    Refused(String),
    /// It has one writer and the lease ended.
    Fenced,
}

/// Whether the cluster may start things now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Contact {
    /// Nothing stands in the way.
    Settled,
    /// A stream has just come up: the orders are not here yet.
    AwaitsOrders,
    /// The first orders after a contact: their stops are carried out first.
    StopsFirst,
}

/// All that decides.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    /// The orders; `None` before the first.
    pub orders: Option<&'a Orders>,
    /// What the driver has.
    pub statuses: &'a Statuses,
    /// The nodes.
    pub nodes: &'a Nodes,
    /// What was decided before.
    pub ledger: &'a Ledger,
    /// The life in which each instance was last seen serving on a ready node.
    pub seen: &'a BTreeMap<InstanceId, u64>,
    /// When the agent started.
    pub started: Instant,
    /// When the lease ends; `None` when there is none.
    pub lease_ends: Option<Instant>,
    /// How long a lease is; `None` before the first.
    pub lease: Option<Duration>,
    /// Whether things may start.
    pub contact: Contact,
    /// The leads gave the cluster up before this contact: what is to be stopped is a copy that was cut off.
    pub cut_off: bool,
    /// What has been told since that contact to stop soon.
    pub hurried: &'a BTreeSet<InstanceId>,
    /// Now.
    pub now: Instant,
}

/// One thing to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Stop it.
    Stop {
        /// Which.
        id: InstanceId,
        /// From the polite signal to the last one.
        grace: Duration,
    },
    /// Nobody asks for it any more.
    Forget {
        /// Which.
        id: InstanceId,
    },
    /// It does not run in this epoch any more.
    GiveUp {
        /// Which.
        id: InstanceId,
        /// Why.
        verdict: Verdict,
    },
    /// Run it.
    Run {
        /// Which.
        id: InstanceId,
        /// Where.
        node: String,
    },
}

impl View<'_> {
    /// Whether an instance serves on as if its node were ready: the node is, or it went away a moment ago and
    /// the very process that served then serves now.
    #[must_use]
    pub fn serves(&self, id: &InstanceId, status: &Status) -> bool {
        if status.state != State::Serving {
            return false;
        }
        match self.standing(&status.node) {
            Standing::Ready => true,
            Standing::Away(since) => {
                self.is_undisturbed(id, status) && self.now < since + DETACHED_GRACE
            }
        }
    }

    /// Whether one-writer instances may run.
    #[must_use]
    pub fn holds_lease(&self) -> bool {
        self.lease_ends.is_some_and(|end| self.now < end)
    }

    /// When an instance with one writer is fenced: with the lease, or when its node was away for one, because
    /// the leads count on both.
    fn fence_at(&self, node: &str) -> Option<Instant> {
        let cut_off = match self.standing(node) {
            Standing::Ready => self.lease_ends,
            Standing::Away(since) => Some(since + self.lease?),
        };
        self.lease_ends.min(cut_off)
    }

    fn standing(&self, node: &str) -> Standing {
        self.nodes
            .get(node)
            .map_or(Standing::Away(self.started), |node| node.standing(self.now))
    }

    fn is_undisturbed(&self, id: &InstanceId, status: &Status) -> bool {
        status.state == State::Serving && self.seen.get(id) == Some(&status.life)
    }

    /// When the instance is taken from its node; `None` when its node is ready.
    #[must_use]
    pub fn patience_ends(&self, id: &InstanceId, status: &Status) -> Option<Instant> {
        match self.standing(&status.node) {
            Standing::Ready => None,
            Standing::Away(since) if self.is_undisturbed(id, status) => {
                Some(since + DETACHED_GRACE)
            }
            Standing::Away(since) => Some(since + NODE_GRACE),
        }
    }

    /// When this view alone, by time passing, may lead to other actions or another report.
    #[must_use]
    pub fn wakes(&self) -> Option<Instant> {
        let nodes = self.nodes.values().flat_map(|node| {
            let (back, fence) = match node.standing(self.now) {
                Standing::Ready => (None, None),
                Standing::Away(since) => {
                    let fence = self.lease.map(|lease| since + lease);
                    (Some(since + START_PATIENCE), fence)
                }
            };
            [node.deadline(), back, fence]
        });
        let instances = self
            .statuses
            .iter()
            .map(|(id, status)| self.patience_ends(id, status));
        nodes
            .chain(instances)
            .chain([self.lease_ends])
            .flatten()
            .filter(|at| *at > self.now)
            .min()
    }

    fn room(&self) -> Room {
        let mut room = Room::default();
        for (name, node) in self.nodes {
            let usable = match node.standing(self.now) {
                Standing::Ready => Usable::Ready,
                Standing::Away(since) if self.now < since + START_PATIENCE => Usable::Soon,
                Standing::Away(_) => Usable::Away,
            };
            room.add(name, usable, node.capacity);
        }
        for (id, status) in self.statuses {
            let booking = match status.state {
                State::Gone | State::Refused => continue,
                State::Stopping => Booking::Leaving,
                State::Starting | State::Serving | State::Silent | State::Restarting => {
                    Booking::Held
                }
            };
            let requests = self.ledger.booked.get(id).copied().unwrap_or_default();
            room.book(&status.node, id, requests, booking);
        }
        room
    }
}

/// What to do now; carried out in this order, and asked again when anything changes.
#[must_use]
pub fn reconcile(view: &View<'_>) -> Vec<Action> {
    let Some(orders) = view.orders else {
        return Vec::new(); // Without orders nothing is known to be wrong.
    };
    let mut actions = Vec::new();
    let mut starts = Vec::new();
    for (id, order) in orders {
        let status = view.statuses.get(id);
        match &order.want {
            Want::Stop => actions.extend(stop_ordered(view, id, status, order)),
            Want::Run(run) => match keep(view, id, order, run) {
                Keep::Start => starts.push((id, order, run.as_ref())),
                Keep::Do(action) => actions.push(action),
                Keep::Nothing => {}
            },
        }
    }
    let unasked = view.statuses.iter().filter(|(id, status)| {
        !orders.contains_key(*id) && matches!(status.state, State::Gone | State::Refused)
    });
    actions.extend(unasked.map(|(id, _)| Action::Forget { id: id.clone() }));
    if may_start(view, orders) {
        place(view, starts, &mut actions);
    }
    actions
}

/// Whether every stop that comes before a start is done.
#[must_use]
pub fn may_start(view: &View<'_>, orders: &Orders) -> bool {
    match view.contact {
        Contact::Settled => true,
        Contact::AwaitsOrders => false,
        Contact::StopsFirst => orders
            .iter()
            .filter(|(_, order)| order.want == Want::Stop)
            .all(|(id, _)| {
                view.statuses
                    .get(id)
                    .is_some_and(|status| matches!(status.state, State::Gone | State::Refused))
            }),
    }
}

fn stop_ordered(
    view: &View<'_>,
    id: &InstanceId,
    status: Option<&Status>,
    order: &Assignment,
) -> Option<Action> {
    let grace = Duration::from_millis(order.grace_ms);
    if !view.cut_off {
        return stop(id, status, grace);
    }
    let grace = grace.min(CUT_OFF_GRACE);
    let stops = status.is_some_and(|status| status.state == State::Stopping);
    if stops && !view.hurried.contains(id) {
        // It was told before, and given longer.
        let id = id.clone();
        return Some(Action::Stop { id, grace });
    }
    stop(id, status, grace)
}

fn stop(id: &InstanceId, status: Option<&Status>, grace: Duration) -> Option<Action> {
    let done = status.is_some_and(|status| {
        matches!(status.state, State::Stopping | State::Gone | State::Refused)
    });
    (!done).then(|| Action::Stop {
        id: id.clone(),
        grace,
    })
}

/// What becomes of an instance that is to run.
enum Keep {
    /// Nothing is to be done.
    Nothing,
    /// It needs a node, another one if it has one.
    Start,
    /// This.
    Do(Action),
}

fn keep(view: &View<'_>, id: &InstanceId, order: &Assignment, run: &Run) -> Keep {
    let status = view.statuses.get(id);
    let grace = Duration::from_millis(order.grace_ms);
    if view.ledger.verdicts.contains_key(id) {
        let stop = status.and_then(|status| stop(id, Some(status), grace));
        return stop.map_or(Keep::Nothing, Keep::Do);
    }
    let one = run.writers == Writers::One;
    let fenced = one && !view.holds_lease();
    let Some(status) = status else {
        return if fenced { Keep::Nothing } else { Keep::Start };
    };
    match status.state {
        State::Stopping => Keep::Nothing,
        State::Refused => Keep::Do(Action::GiveUp {
            id: id.clone(),
            verdict: Verdict::Refused(status.reason.clone()),
        }),
        State::Gone if fenced => Keep::Nothing,
        State::Gone => Keep::Start,
        _ if one
            && view
                .fence_at(&status.node)
                .is_none_or(|end| view.now >= end) =>
        {
            Keep::Do(Action::GiveUp {
                id: id.clone(),
                verdict: Verdict::Fenced,
            })
        }
        _ => match view.patience_ends(id, status) {
            Some(end) if view.now >= end => Keep::Start,
            _ => Keep::Nothing,
        },
    }
}

fn place(
    view: &View<'_>,
    starts: Vec<(&InstanceId, &Assignment, &Run)>,
    actions: &mut Vec<Action>,
) {
    let mut room = view.room();
    for (id, order, run) in starts {
        let status = view.statuses.get(id);
        let live = status.filter(|status| status.state != State::Gone);
        let found = room.find(id, run.requests, live.map(|status| status.node.as_str()));
        let id = id.clone();
        match (live, found) {
            // It leaves its node first; only when nothing of it is left does it start on the other one.
            (Some(status), Found::Node(_)) => {
                let grace = if view.is_undisturbed(&id, status) {
                    Duration::from_millis(order.grace_ms)
                } else {
                    Duration::ZERO
                };
                actions.push(Action::Stop { id, grace });
            }
            // Reported as not ready: the leads may bind it elsewhere, or its node comes back.
            (Some(_), Found::Wait(_) | Found::Full(_)) => {}
            (None, Found::Node(node)) => {
                room.book(&node, &id, run.requests, Booking::Held);
                actions.push(Action::Run { id, node });
            }
            (None, Found::Wait(_)) => {}
            (None, Found::Full(reason)) => actions.push(Action::GiveUp {
                id,
                verdict: Verdict::Refused(reason),
            }),
        }
    }
}

/// Maps whose keys are structs, as lists of pairs.
mod pairs {
    use std::collections::BTreeMap;

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub(super) fn serialize<K, V, S>(map: &BTreeMap<K, V>, serializer: S) -> Result<S::Ok, S::Error>
    where
        K: Serialize,
        V: Serialize,
        S: Serializer,
    {
        serializer.collect_seq(map)
    }

    pub(super) fn deserialize<'de, K, V, D>(deserializer: D) -> Result<BTreeMap<K, V>, D::Error>
    where
        K: Deserialize<'de> + Ord,
        V: Deserialize<'de>,
        D: Deserializer<'de>,
    {
        Vec::<(K, V)>::deserialize(deserializer).map(BTreeMap::from_iter)
    }
}

#[cfg(test)]
pub(crate) mod tests;
