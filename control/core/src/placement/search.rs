//! The search: greedy from several starts, then descent by single moves; the best of them wins.
//!
//! One service seldom gains by leaving its neighbours, so descent alone stays where it is. Hence the starts:
//! callers first, called ones first, and each cluster as the place where all would go. Steps are bounded and
//! ties go to the smaller name, so the answer is a function of the view.

use std::collections::{BTreeMap, BTreeSet};

use super::{Decision, Held, Lost, Parts, Verdict, View};
use crate::{
    command::Reason,
    name::{AppName, Name, ServiceName, Slot},
};

/// What a move counts beside the objective (starting, two copies for a while): a typical vCPU for three
/// minutes, micro-EUR.
const MOVE_UEUR: u64 = 2_000;
/// What a move must gain of what the moved slots count now, percent.
const GAIN_PERCENT: u64 = 10;
/// At most this many clusters are tried as the one where all would go.
const STARTS: usize = 16;

/// What to place, and what may move.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Task {
    /// Slots that are to be bound.
    pub pending: BTreeSet<Slot>,
    /// Bound slots that may move.
    pub movable: BTreeSet<Slot>,
    /// Clusters that a slot must not go to.
    pub avoid: BTreeMap<Slot, Name>,
}

/// What to do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Answer {
    /// Pending slots, each with its decision; in the order in which they should be bound.
    pub binds: Vec<(Slot, Decision)>,
    /// Slots to move, each with its decision; callers first.
    pub moves: Vec<(Slot, Reason, Decision)>,
    /// Pending slots that no cluster may take.
    pub unplaced: BTreeSet<Slot>,
}

/// One try: a view with everything placed that could be.
struct Try<'a> {
    view: View<'a>,
    unplaced: BTreeSet<Slot>,
    moves: u64,
    objective: u64,
}

impl Try<'_> {
    fn rank(&self) -> (usize, u64) {
        let moving = self.moves.saturating_mul(MOVE_UEUR);
        (self.unplaced.len(), self.objective.saturating_add(moving))
    }
}

/// Finds where the slots of `app` should be.
#[must_use]
pub fn place(view: &View<'_>, app: &AppName, task: &Task) -> Answer {
    let mut now = view.clone();
    for slot in &task.pending {
        now.forget(slot);
    }
    let only_pending = Task {
        movable: BTreeSet::new(),
        ..task.clone()
    };
    // Pending slots around what stands: nothing has to move for them, if that is possible.
    let stay = search(&now, app, &only_pending);
    let chosen = if task.movable.is_empty() {
        stay
    } else {
        let go = search(&now, app, task);
        if worth_it(&now, task, &stay, &go) {
            go
        } else {
            stay
        }
    };
    answer(&now, app, task, chosen)
}

/// Whether the moves of `go` gain enough over `stay`, or are needed.
fn worth_it(now: &View<'_>, task: &Task, stay: &Try<'_>, go: &Try<'_>) -> bool {
    if go.unplaced.len() != stay.unplaced.len() {
        return go.unplaced.len() < stay.unplaced.len();
    }
    let moved: Vec<&Slot> = moved(task, go).collect();
    let broken = |slot: &&Slot| !now.fits_where_it_is(slot);
    if moved.iter().any(broken) {
        return true;
    }
    let counted = moved
        .iter()
        .map(|slot| stay.view.parts(slot).total())
        .fold(0, u64::saturating_add);
    let needed = (counted / 100)
        .saturating_mul(GAIN_PERCENT)
        .saturating_add(go.moves.saturating_mul(MOVE_UEUR));
    !moved.is_empty() && stay.objective.saturating_sub(go.objective) >= needed.max(1)
}

fn moved<'t>(task: &'t Task, go: &'t Try<'_>) -> impl Iterator<Item = &'t Slot> {
    task.movable
        .iter()
        .filter(|slot| go.view.at(slot) != go.view.bound(slot))
}

fn search<'a>(view: &View<'a>, app: &AppName, task: &Task) -> Try<'a> {
    let slots: BTreeSet<&Slot> = task.pending.iter().chain(&task.movable).collect();
    let down = order(view, app, &slots);
    let up: Vec<&Slot> = down.iter().rev().copied().collect();
    // Where none of them may ever go all cannot go either: that start would be the first one again.
    let is_place = |name: &&Name| slots.iter().any(|slot| view.is_right(slot, name));
    let clusters = view.kb.clusters.keys().take(STARTS).filter(is_place);
    let clusters: Vec<&Name> = clusters.collect();
    let mut starts: Vec<(&[&Slot], Option<&Name>)> = vec![(&down, None), (&up, None)];
    starts.extend(
        clusters
            .into_iter()
            .map(|name| (down.as_slice(), Some(name))),
    );
    let mut best = keep(view, app, task, &down);
    for (order, prefer) in starts {
        let found = attempt(view, app, task, (order, prefer));
        if found.rank() < best.rank() {
            best = found;
        }
    }
    best
}

/// The start that moves nothing but what must: pending slots are placed, then all may improve.
fn keep<'a>(view: &View<'a>, app: &AppName, task: &Task, order: &[&Slot]) -> Try<'a> {
    let mut view = view.clone();
    let mut unplaced = BTreeSet::new();
    for slot in order.iter().filter(|slot| !task.movable.contains(**slot)) {
        match view.best(slot, task, None) {
            Some(cluster) => view.place(slot, &cluster),
            None => _ = unplaced.insert((*slot).clone()),
        }
    }
    finish(view, app, task, (order, unplaced))
}

/// Places all from nothing, in order; a slot for which nothing is left goes first in the next round.
fn attempt<'a>(
    view: &View<'a>,
    app: &AppName,
    task: &Task,
    (order, prefer): (&[&Slot], Option<&Name>),
) -> Try<'a> {
    let mut order = order.to_vec();
    for _ in 0..=order.len().min(8) {
        let mut tried = view.clone();
        for slot in &order {
            tried.unplace(slot);
        }
        let mut unplaced = BTreeSet::new();
        for slot in &order {
            match tried.best(slot, task, prefer) {
                Some(cluster) => tried.place(slot, &cluster),
                None => _ = unplaced.insert((*slot).clone()),
            }
        }
        let stuck = order.iter().position(|slot| unplaced.contains(*slot));
        match stuck {
            Some(i) if i > 0 => order[..=i].rotate_right(1),
            _ => {
                restore(&mut tried, task, &mut unplaced);
                return finish(tried, app, task, (&order, unplaced));
            }
        }
    }
    keep(view, app, task, &order)
}

/// A bound slot that found no other place stays where it is.
fn restore(view: &mut View<'_>, task: &Task, unplaced: &mut BTreeSet<Slot>) {
    unplaced.retain(|slot| {
        let bound = view
            .bound(slot)
            .filter(|_| task.movable.contains(slot))
            .cloned();
        if let Some(cluster) = &bound {
            view.place(slot, cluster);
        }
        bound.is_none()
    });
}

fn finish<'a>(
    mut view: View<'a>,
    app: &AppName,
    task: &Task,
    (order, mut unplaced): (&[&Slot], BTreeSet<Slot>),
) -> Try<'a> {
    // Each pass looks at every slot once; single moves seldom need more than a few passes.
    for _ in 0..8 {
        let mut better = false;
        for slot in order {
            let before = view.at(slot).cloned();
            view.unplace(slot);
            let best = view.best(slot, task, None);
            if let Some(same) = best.as_ref().filter(|best| before.as_ref() == Some(best)) {
                view.place(slot, same);
                continue;
            }
            // It stays where that is allowed and no dearer than the best.
            let before_cost = before
                .as_ref()
                .filter(|name| view.allows(slot, name, task))
                .map(|name| view.cost(slot, name, task));
            let best = best.filter(|name| {
                let cost = view.cost(slot, name, task);
                before_cost.is_none_or(|before| cost < before)
            });
            match best.filter(|name| before.as_ref() != Some(name)) {
                Some(cluster) => {
                    view.place(slot, &cluster);
                    unplaced.remove(*slot);
                    better = true;
                }
                None => {
                    if let Some(cluster) = before {
                        view.place(slot, &cluster);
                    }
                }
            }
        }
        if !better {
            break;
        }
    }
    let moves = task
        .movable
        .iter()
        .filter(|slot| view.at(slot) != view.bound(slot))
        .count();
    let objective = view.objective(app);
    Try {
        view,
        unplaced,
        moves: moves as u64,
        objective,
    }
}

/// Callers before the called, by links from the services that nobody calls; ties by name.
fn order<'s>(view: &View<'_>, app: &AppName, slots: &BTreeSet<&'s Slot>) -> Vec<&'s Slot> {
    let Some(state) = view.kb.applications.get(app) else {
        return slots.iter().copied().collect();
    };
    let links = &state.spec.links;
    let mut depth: BTreeMap<ServiceName, usize> = state
        .spec
        .services
        .keys()
        .map(|name| (app.service(name), 0))
        .collect();
    // A graph with a cycle has no order: the bound on the passes gives it one.
    for _ in 0..depth.len() {
        for link in links {
            let caller = depth.get(&app.service(&link.from)).copied().unwrap_or(0);
            if let Some(called) = depth.get_mut(&link.to) {
                *called = (*called).max(caller + 1);
            }
        }
    }
    let mut order: Vec<&Slot> = slots.iter().copied().collect();
    order.sort_by_key(|slot| (depth.get(&slot.service).copied().unwrap_or(0), *slot));
    order
}

fn answer(now: &View<'_>, app: &AppName, task: &Task, chosen: Try<'_>) -> Answer {
    let slots: BTreeSet<&Slot> = task.pending.iter().chain(&task.movable).collect();
    let lower_bound = chosen.view.lower_bound(app);
    let mut answer = Answer {
        unplaced: chosen.unplaced.clone(),
        ..Answer::default()
    };
    for slot in order(now, app, &slots) {
        let Some(cluster) = chosen.view.at(slot).cloned() else {
            continue;
        };
        let decide = || {
            let (parts, mut others) = chosen.view.compare(slot, &cluster);
            if let Some(left) = task.avoid.get(slot) {
                let why = "it is lost, or did not become ready, there".to_owned();
                others.insert(left.clone(), Lost::Refused(vec![why]));
            }
            Decision {
                cluster: cluster.clone(),
                parts,
                others,
                objective: chosen.objective,
                lower_bound,
            }
        };
        if task.pending.contains(slot) {
            answer.binds.push((slot.clone(), decide()));
        } else if now.at(slot) != Some(&cluster) {
            let reason = if now.fits_where_it_is(slot) {
                Reason::Goal
            } else {
                Reason::Constraint
            };
            answer.moves.push((slot.clone(), reason, decide()));
        }
    }
    let mut alone = now.clone();
    answer.binds = in_turn(&mut alone, answer.binds);
    answer
}

/// The binds in an order in which each may be done as those before it are (a near replica before a far one that
/// relies on it); what has no such order comes last, and waits until it has: a move makes room for it.
fn in_turn(view: &mut View<'_>, mut binds: Vec<(Slot, Decision)>) -> Vec<(Slot, Decision)> {
    let mut turn = Vec::new();
    while let Some(next) = binds.iter().position(|(slot, decision)| {
        let refusals = view.refusals(slot, &decision.cluster, Held::New);
        refusals.is_empty()
    }) {
        let (slot, decision) = binds.remove(next);
        view.place(&slot, &decision.cluster);
        turn.push((slot, decision));
    }
    turn.extend(binds);
    turn
}

impl View<'_> {
    fn held(&self, slot: &Slot, name: &Name) -> Held {
        if self.bound(slot) == Some(name) {
            Held::Already
        } else {
            Held::New
        }
    }

    /// Whether the cluster is of the right kind, whatever else runs there.
    fn is_right(&self, slot: &Slot, name: &Name) -> bool {
        let mut reasons = Vec::new();
        if let Some(goal) = self.goal(slot) {
            self.constraints(goal, name, &mut reasons);
        }
        reasons.is_empty()
    }

    fn allows(&self, slot: &Slot, name: &Name, task: &Task) -> bool {
        let held = self.held(slot, name);
        // In a large mesh most clusters are of the wrong kind: that is seen without counting their nodes.
        task.avoid.get(slot) != Some(name)
            && self.is_right(slot, name)
            && self.refusals(slot, name, held).is_empty()
    }

    /// Whether the slot meets its constraints where it is bound.
    pub(super) fn fits_where_it_is(&self, slot: &Slot) -> bool {
        self.bound(slot)
            .is_none_or(|name| self.refusals(slot, name, Held::Already).is_empty())
    }

    /// What the slot would count in a cluster, with its links, and with the move if it is one. The slot is
    /// not placed.
    fn cost(&mut self, slot: &Slot, name: &Name, task: &Task) -> u64 {
        let moving = task.movable.contains(slot) && self.bound(slot) != Some(name);
        self.would(slot, name)
            .total()
            .saturating_add(if moving { MOVE_UEUR } else { 0 })
    }

    /// The parts of a slot that is not placed, if it were; it is not placed afterwards either.
    fn would(&mut self, slot: &Slot, name: &Name) -> Parts {
        self.place(slot, name);
        let parts = self.parts(slot);
        self.unplace(slot);
        parts
    }

    /// What the slot counts as everything is placed, with its links.
    pub(super) fn parts(&self, slot: &Slot) -> Parts {
        let own = self
            .at(slot)
            .map(|name| self.own(slot, name, Held::Already))
            .unwrap_or_default();
        own.plus(self.links_of(slot))
    }

    /// The cheapest cluster that the slot may go to; `prefer` if it may go there. The slot is not placed.
    fn best(&mut self, slot: &Slot, task: &Task, prefer: Option<&Name>) -> Option<Name> {
        if let Some(prefer) = prefer.filter(|name| self.allows(slot, name, task)) {
            return Some(prefer.clone());
        }
        let kb = self.kb;
        let allowed = kb.clusters.keys();
        let allowed: Vec<&Name> = allowed
            .filter(|name| self.allows(slot, name, task))
            .collect();
        // What the links cost takes long to sum up, and decides nothing where there is no choice.
        if let [only] = allowed[..] {
            return Some(only.clone());
        }
        let costs = allowed.into_iter();
        costs
            .map(|name| (self.cost(slot, name, task), name))
            .min()
            .map(|(_, name)| name.clone())
    }

    /// The slot's parts where it is, and what every other cluster would mean.
    fn compare(&self, slot: &Slot, cluster: &Name) -> (Parts, BTreeMap<Name, Lost>) {
        let here = self.parts(slot);
        let others = self
            .verdicts(slot)
            .into_iter()
            .filter(|(name, _)| name != cluster)
            .map(|(name, verdict)| {
                let lost = match verdict {
                    Verdict::Refused(reasons) => Lost::Refused(reasons),
                    Verdict::Eligible(parts) => Lost::Dearer {
                        parts,
                        by: parts.total().saturating_sub(here.total()),
                    },
                };
                (name, lost)
            })
            .collect();
        (here, super::nearest(others))
    }

    /// What each cluster would mean for the slot, everything else being where it is.
    pub(crate) fn verdicts(&self, slot: &Slot) -> BTreeMap<Name, Verdict> {
        let mut without = self.clone();
        without.unplace(slot);
        self.kb
            .clusters
            .keys()
            .map(|name| {
                let reasons = without.refusals(slot, name, self.held(slot, name));
                let verdict = if reasons.is_empty() {
                    Verdict::Eligible(without.would(slot, name))
                } else {
                    Verdict::Refused(reasons.iter().map(ToString::to_string).collect())
                };
                (name.clone(), verdict)
            })
            .collect()
    }
}
