//! A plan in parts: which applications are placed next, on a copy of what that takes.

use std::ops::Bound;

use super::{
    Inputs, Wants, place_application,
    tried::{Attempt, Tried},
    wants,
};
use crate::{
    base::{KnowledgeBase, LAST},
    command::Command,
    name::AppName,
    placement::{Places, View},
};

/// So many slots are enough for one part of a plan: about what one entry of the log holds.
const PART: usize = 256;

/// Where the slots of some applications go.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Part {
    /// What to propose.
    pub commands: Vec<Command>,
    /// The first application that was not looked at.
    pub next: Option<AppName>,
    /// Those for which nothing was found.
    pub tried: Tried,
}

/// What is to be placed in one part of a plan, and all that is looked at for that: the Knowledge Base may go on meanwhile.
/// To make it takes no longer than to look at every slot.
#[derive(Debug)]
pub struct Draft {
    kb: KnowledgeBase,
    places: Places,
    inputs: Inputs,
    now_ms: u64,
    pub(super) restless: Restless,
}

impl Draft {
    /// Of application `from` and those after it, as many as make a part; nothing when they are at rest, as those are
    /// that were tried before.
    #[must_use]
    pub fn of(
        (kb, inputs, now_ms): (&KnowledgeBase, &Inputs, u64),
        tried: &Tried,
        from: Option<&AppName>,
    ) -> Option<Self> {
        let now_ms = now_ms.max(kb.log_time_ms).min(LAST);
        let restless = restless((kb, inputs, now_ms), tried, (from, PART));
        (!restless.wants.is_empty()).then(|| Self {
            kb: kb.excerpt(restless.wants.iter().map(|(app, _)| app)),
            places: Places::of(kb),
            inputs: *inputs,
            now_ms,
            restless,
        })
    }

    /// Places one application after the other, until it is enough; asked whenever one is placed.
    #[must_use]
    pub fn place(self, is_enough: impl FnMut() -> bool) -> Part {
        let view = View::on_top_of(self.places, &self.kb, self.now_ms);
        let kb = (&self.kb, &self.inputs);
        self.restless.place(view, kb, is_enough)
    }
}

/// Applications of which slots are to be placed or may move.
#[derive(Debug)]
pub(super) struct Restless {
    pub(super) wants: Vec<(AppName, Wants)>,
    /// The first that was not looked at.
    pub(super) next: Option<AppName>,
    /// What they are placed by.
    facts: u64,
}

impl Restless {
    pub(super) fn place(
        self,
        mut view: View<'_>,
        (kb, inputs): (&KnowledgeBase, &Inputs),
        mut is_enough: impl FnMut() -> bool,
    ) -> Part {
        let mut commands = Vec::new();
        let mut tried = Tried::default();
        let mut wants = self.wants.into_iter();
        // One view for all of them, so that what one is given is not promised to the next.
        for (app, wanted) in wants.by_ref() {
            if let Some(state) = kb.applications.get(&app) {
                let attempt = Attempt {
                    facts: self.facts,
                    at_ms: view.now_ms(),
                    generation: state.generation,
                    wants: wanted.clone(),
                };
                let placed = place_application(&mut view, (kb, inputs), (&app, state), wanted);
                if placed.is_empty() {
                    tried.note(app, attempt);
                }
                commands.extend(placed);
            }
            if is_enough() {
                break;
            }
        }
        let left = wants.next().map(|(app, _)| app);
        Part {
            commands,
            next: left.or(self.next),
            tried,
        }
    }
}

/// Those of application `from` and after it that were not tried, until they want as many slots as are enough.
pub(super) fn restless(
    (kb, inputs, now_ms): (&KnowledgeBase, &Inputs, u64),
    tried: &Tried,
    (from, enough): (Option<&AppName>, usize),
) -> Restless {
    let facts = kb.facts_index();
    let from = from.map_or(Bound::Unbounded, Bound::Included);
    let mut applications = kb.applications.range((from, Bound::Unbounded));
    let mut all = Vec::new();
    let mut slots = 0;
    while slots < enough {
        let Some((app, state)) = applications.next() else {
            break;
        };
        if tried.knows(app, (facts, now_ms), state.generation) {
            continue;
        }
        let wants = wants((kb, inputs, now_ms), (app, state));
        if !wants.is_at_rest() && !tried.holds(app, (facts, now_ms), (state.generation, &wants)) {
            slots += wants.len();
            all.push((app.clone(), wants));
        }
    }
    let next = applications.next().map(|(app, _)| app.clone());
    Restless {
        wants: all,
        next,
        facts,
    }
}
