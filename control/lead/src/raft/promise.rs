//! A leader's lease, and the voters' promises that it is made of.
//!
//! ```text
//!  leader                                     voter
//!  sends, at s, "for L" --------------------> takes it, at r: votes for nobody else until r + L
//!  is granted s + L by it  <----------------- answers
//! ```
//!
//! A leader may think that it leads until a majority's grants are over. No other lead can have been elected before: it
//! needs a majority, too, so a voter that is in both, and that one votes for it only after r + L, which is not before s + L.
//! This holds whatever either measured, and however the timers follow the network meanwhile, because how long it is comes
//! with the message that asks for it:
//!
//! - a promise is never taken back: a shorter one that comes later does not end it sooner ([`Promise::give`]);
//! - nor is it forgotten: how long the longest may last is on disk before it is given, and a voter that was started
//!   again votes for nobody so long ([`Promise::must_write`], [`Promise::again`]);
//! - who makes no promises, an older lead, grants only what every lead waits anyway ([`super::pace::Pace::granted`]);
//! - clocks may show what they like, as long as they run alike.
//!
//! A leader that gives way ends its lease itself: it takes no changes from then on, and its own voice elects the heir at
//! once; other voters keep what they promised.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use openraft::Vote;
use tokio::time::Instant;

/// What a voter has promised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Promise {
    /// It votes for nobody before.
    until: Option<Instant>,
    /// On disk: no promise lasts longer.
    stored: Duration,
}

impl Promise {
    /// Of a lead that never ran.
    pub(super) fn first(least: Duration) -> Self {
        Self {
            until: None,
            stored: least,
        }
    }

    /// Of a lead that is started again at `now`: it may have made one just before it stopped.
    pub(super) fn again(stored: Duration, now: Instant) -> Self {
        Self {
            until: Some(now + stored),
            stored,
        }
    }

    /// Whether `lease` has to be on disk before it is promised: it is longer than what is there, or what is there keeps
    /// this lead waiting for nothing when it is started again.
    pub(super) fn must_write(&self, lease: Duration, now: Instant) -> bool {
        let is_over = self.until.is_none_or(|until| until <= now + lease);
        lease > self.stored || (lease < self.stored && is_over)
    }

    /// `lease` is on disk.
    pub(super) fn written(&mut self, lease: Duration) {
        self.stored = lease;
    }

    /// Promises to vote for nobody for `lease`.
    pub(super) fn give(&mut self, lease: Duration, now: Instant) {
        self.until = self.until.max(Some(now + lease));
    }

    /// For how long it votes for nobody.
    pub(super) fn left(&self, now: Instant) -> Duration {
        let until = self.until.unwrap_or(now);
        until.saturating_duration_since(now)
    }
}

#[derive(Debug, Default)]
struct Granted {
    /// The leader that it was granted to.
    vote: Vote<u64>,
    /// Until when, by whom.
    until: BTreeMap<u64, Instant>,
}

/// What the voters have granted this lead as a leader.
#[derive(Clone, Debug, Default)]
pub(crate) struct Grants(Arc<Mutex<Granted>>);

impl Grants {
    fn granted(&self) -> MutexGuard<'_, Granted> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The voter `by` has promised it until then to the leader of `vote`.
    pub(super) fn note(&self, vote: Vote<u64>, by: u64, until: Instant) {
        let mut granted = self.granted();
        if vote > granted.vote {
            *granted = Granted {
                vote,
                until: BTreeMap::new(),
            };
        }
        if vote == granted.vote {
            let known = granted.until.entry(by).or_insert(until);
            *known = until.max(*known);
        }
    }

    /// Whether the leader `own` of `vote` holds its lease: a majority of each of these sets of voters grants it.
    pub(crate) fn are_held(
        &self,
        vote: Vote<u64>,
        own: u64,
        voters: &[BTreeSet<u64>],
        now: Instant,
    ) -> bool {
        let granted = self.granted();
        let by = |id: &u64| granted.vote == vote && granted.until.get(id) > Some(&now);
        voters.iter().all(|voters| {
            let grant = voters.iter().filter(|id| **id == own || by(id));
            2 * grant.count() > voters.len()
        })
    }
}

#[cfg(test)]
mod tests;
