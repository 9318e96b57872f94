//! For which applications nothing was found: they are placed again when something has changed that they are placed by.
//!
//! Without this, one that finds no cluster would be placed anew after every change of every other one. What is kept
//! here is the leader's own and decides nothing: to forget it costs time, and what it has wrong costs a second.

use std::collections::BTreeMap;

use super::Wants;
use crate::name::AppName;

/// So long nothing is tried again although nothing has changed, milliseconds: what follows from time alone, and from a
/// change that [`KnowledgeBase::facts_index`](crate::base::KnowledgeBase::facts_index) does not tell, waits for it.
const AGAIN_MS: u64 = 1_000;

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tried {
    attempts: BTreeMap<AppName, Attempt>,
    lasts_ms: u64,
}

/// For what nothing was found, and when.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Attempt {
    /// The entry at which something else than goals last changed.
    pub(super) facts: u64,
    pub(super) at_ms: u64,
    pub(super) generation: u64,
    pub(super) wants: Wants,
}

impl Default for Tried {
    fn default() -> Self {
        Self::for_ms(AGAIN_MS)
    }
}

impl Tried {
    /// An attempt is worth so long.
    pub(crate) fn for_ms(lasts_ms: u64) -> Self {
        Self {
            attempts: BTreeMap::new(),
            lasts_ms,
        }
    }

    /// Notes what was tried later, and forgets what is worth nothing any more at `now_ms`.
    pub fn extend(&mut self, later: Self, now_ms: u64) {
        self.attempts.extend(later.attempts);
        let lasts_ms = self.lasts_ms;
        self.attempts.retain(|_, it| it.is_recent(now_ms, lasts_ms));
    }

    pub(super) fn note(&mut self, app: AppName, attempt: Attempt) {
        self.attempts.insert(app, attempt);
    }

    /// Whether to place an application would be the same attempt as the last.
    pub(super) fn holds(
        &self,
        app: &AppName,
        when: (u64, u64),
        (generation, wants): (u64, &Wants),
    ) -> bool {
        let last = self.last(app, when, generation);
        last.is_some_and(|it| it.wants == *wants)
    }

    /// The same, known without a look at what it wants: where nothing of it runs, that is what it was.
    pub(super) fn knows(&self, app: &AppName, when: (u64, u64), generation: u64) -> bool {
        let last = self.last(app, when, generation);
        last.is_some_and(|it| !it.wants.ages)
    }

    /// The last attempt, if nothing that it went by has changed.
    fn last(
        &self,
        app: &AppName,
        (facts, now_ms): (u64, u64),
        generation: u64,
    ) -> Option<&Attempt> {
        self.attempts.get(app).filter(|it| {
            it.facts == facts && it.generation == generation && it.is_recent(now_ms, self.lasts_ms)
        })
    }
}

impl Attempt {
    fn is_recent(&self, now_ms: u64, lasts_ms: u64) -> bool {
        now_ms.saturating_sub(self.at_ms) < lasts_ms
    }
}
