//! Migration: how a slot moves, make-before-break, as a state machine.
//!
//! ```text
//!            TargetReady          Repointed            Drained | deadline        SourceGone
//!  Starting ------------> Repointing ------> Draining ----------------> Stopping ----------> Done
//!     |                       |                 |                           ^
//!     | TargetFailed | Cancel |  TargetFailed   |                           | `writers: one` starts here:
//!     `---------> RolledBack <------------------'                           ' the target is bound when the source is gone
//!
//!  SourceLost, in each state before Stopping: the target takes over at once, the stop is owed.
//! ```
//!
//! The state is in the Knowledge Base and deadlines are in log time, so a new leader goes on where the old one
//! was. Until the source stops the way back is open; after that it only goes forward.

use serde::{Deserialize, Serialize};

use crate::{
    base::{Binding, DRAIN_MS, KnowledgeBase, Node},
    command::Reason,
    name::{Name, Slot},
    report::{InstanceId, Phase},
    table::{self, Revision},
};

#[cfg(test)]
mod tests;

/// How long a migration waits for a node whose NetManager is away, milliseconds of log time: as long as a restart or
/// an upgrade of it takes at the most. Its kernel goes on by its last table and its instances go on calling.
pub const AWAY_MS: u64 = 30_000;

/// The last move of one slot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Migration {
    /// The epoch that it leaves.
    pub source: u64,
    /// The epoch that it goes to; for `writers: one` the one that is reserved for it.
    pub target: u64,
    /// The cluster that it leaves.
    pub from: Name,
    /// The cluster that it goes to.
    pub to: Name,
    /// Why.
    pub reason: Reason,
    /// How far it is.
    pub state: State,
    /// Log time at which it began.
    pub since_ms: u64,
    /// Log time at which it came to this state.
    pub state_since_ms: u64,
}

/// How far a migration is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// The target starts; all traffic goes to the source.
    Starting,
    /// The target takes new flows; not every node knows it.
    Repointing {
        /// The revision that every concerned node must have.
        revision: Revision,
    },
    /// Every node knows; the source keeps its flows.
    Draining {
        /// Log time at which it is stopped all the same.
        deadline_ms: u64,
    },
    /// The source stops; there is no way back.
    Stopping,
    /// It has moved.
    Done,
    /// It is where it was; the target was given up.
    RolledBack,
}

/// What happens to a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Event {
    /// The target is ready and was reached through the network.
    TargetReady,
    /// The target was refused, stopped, lost, or took too long.
    TargetFailed,
    /// Every concerned node acknowledged the revision, or is not there to do so.
    Repointed,
    /// No flow is left, or the deadline has passed.
    Drained,
    /// The source is reported as stopped.
    SourceGone,
    /// The source's cluster is lost or the source stopped by itself: there is nothing to wait for.
    SourceLost,
    /// A user wants it back.
    Cancel,
}

/// What the Knowledge Base does when a migration goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// The target takes new flows, the source none any more.
    Repoint,
    /// The source's deadline begins.
    Drain,
    /// The source stops.
    StopSource,
    /// The target takes over at once; the source's stop is owed.
    TakeOver,
    /// The source takes new flows again; the target stops.
    RollBack,
    /// The target is bound, where it is not yet (`writers: one`).
    BindTarget,
}

/// When an event is applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct At {
    /// Log time, milliseconds.
    pub now_ms: u64,
    /// The revision that a change made now has.
    pub revision: Revision,
}

impl State {
    /// Whether there is something left to do.
    #[must_use]
    pub fn is_running(self) -> bool {
        !matches!(self, Self::Done | Self::RolledBack)
    }
}

/// Advances one migration; the Knowledge Base carries the action out. An event that does not belong to the
/// state changes nothing.
#[must_use]
pub fn step(state: State, event: Event, at: At) -> (State, Option<Action>) {
    match (state, event) {
        (State::Starting, Event::TargetReady) => {
            let revision = at.revision;
            (State::Repointing { revision }, Some(Action::Repoint))
        }
        (State::Repointing { .. }, Event::Repointed) => {
            let deadline_ms = at.now_ms.saturating_add(DRAIN_MS);
            (State::Draining { deadline_ms }, Some(Action::Drain))
        }
        (State::Draining { .. }, Event::Drained) => (State::Stopping, Some(Action::StopSource)),
        (State::Stopping, Event::SourceGone) => (State::Done, Some(Action::BindTarget)),
        (
            State::Starting | State::Repointing { .. } | State::Draining { .. },
            Event::TargetFailed | Event::Cancel,
        ) => (State::RolledBack, Some(Action::RollBack)),
        (
            State::Starting | State::Repointing { .. } | State::Draining { .. },
            Event::SourceLost,
        ) => (State::Done, Some(Action::TakeOver)),
        (state, _) => (state, None),
    }
}

/// What has happened to a running migration, as far as the reports tell; `None` while there is nothing to do.
#[must_use]
pub fn observe(
    kb: &KnowledgeBase,
    slot: &Slot,
    migration: &Migration,
    now_ms: u64,
) -> Option<Event> {
    let binding = |epoch: u64| kb.slots.get(slot).and_then(|bindings| bindings.get(&epoch));
    let there =
        |binding: &&Binding| !kb.is_lost(&binding.cluster) && binding.phase != Phase::Stopped;
    let source = binding(migration.source);
    if migration.state == State::Stopping {
        let gone = source.is_none() && kb.fence_wait(slot, now_ms) == 0;
        return gone.then_some(Event::SourceGone);
    }
    if !migration.state.is_running() {
        return None;
    }
    let source = source.filter(there);
    let target = binding(migration.target)
        .filter(there)
        .filter(|binding| binding.phase != Phase::Refused);
    let (Some(_), Some(target)) = (source, target) else {
        let only_target_failed = source.is_some();
        return Some(if only_target_failed {
            Event::TargetFailed
        } else {
            Event::SourceLost
        });
    };
    let concerned = Concerned::of(kb, slot, now_ms);
    let happened = match migration.state {
        State::Starting => {
            target.phase == Phase::Ready && concerned.reached(&slot.at(migration.target))
        }
        State::Repointing { revision } => concerned.acknowledged(revision),
        State::Draining { deadline_ms } => {
            now_ms >= deadline_ms || concerned.drained(&slot.at(migration.source))
        }
        State::Stopping | State::Done | State::RolledBack => false,
    };
    let event = match migration.state {
        State::Starting => Event::TargetReady,
        State::Repointing { .. } => Event::Repointed,
        _ => Event::Drained,
    };
    happened.then_some(event)
}

/// Whether a draining binding has no flows left, by explicit word of every concerned node.
#[must_use]
pub fn drained(kb: &KnowledgeBase, slot: &Slot, epoch: u64, now_ms: u64) -> bool {
    Concerned::of(kb, slot, now_ms).drained(&slot.at(epoch))
}

/// The nodes whose tables hold a service and that are there to answer, or will soon be again: a node whose cluster
/// lost its lease, or whose NetManager is away for long ([`AWAY_MS`]), is not waited for.
struct Concerned<'a>(Vec<&'a Node>);

impl<'a> Concerned<'a> {
    fn of(kb: &'a KnowledgeBase, slot: &Slot, now_ms: u64) -> Self {
        let nodes = table::concerned(kb, &slot.service);
        let there = nodes.into_iter().filter_map(|(cluster, node)| {
            let node = kb.clusters.get(&cluster)?.nodes.get(&node)?;
            let away = |since: u64| now_ms.saturating_sub(since) >= AWAY_MS;
            let is_away = node.not_ready_since_ms.is_some_and(away);
            (!kb.is_lost(&cluster) && !is_away).then_some(node)
        });
        Self(there.collect())
    }

    /// Whether one of those that are ready reached the instance through the network, or there is none to try.
    fn reached(&self, id: &InstanceId) -> bool {
        let mut ready = self.0.iter().filter(|node| node.report.ready).peekable();
        ready.peek().is_none() || ready.any(|node| node.report.reached.contains(id))
    }

    fn acknowledged(&self, revision: Revision) -> bool {
        let want = (revision.incarnation, revision.index);
        self.0.iter().all(|node| node.report.applied >= want)
    }

    /// No word is not zero: a node that has not measured yet may still have flows.
    fn drained(&self, id: &InstanceId) -> bool {
        self.0
            .iter()
            .all(|node| node.report.draining_flows.contains(&(id.clone(), 0)))
    }
}
