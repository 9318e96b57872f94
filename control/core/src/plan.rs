//! The leader's control loop as one pure function: what to propose now.
//!
//! Proposing again what is already in flight changes nothing: every command names the session, generation or
//! epoch that was seen, and the Knowledge Base refuses it when that has passed.

use crate::{
    base::{AppState, Binding, BindingState, KnowledgeBase, LAST},
    command::{Bind, Command, Reason, Refusal, StartMigration},
    goal::Writers,
    migration::{self, Event, State},
    name::{AppName, Name, Slot},
    placement::{self, Answer, Held, Task, Verdict, View},
    report::Phase,
};

use self::part::restless;
pub use self::{
    part::{Draft, Part},
    tried::Tried,
};

mod part;
#[cfg(test)]
mod tests;
mod tried;

/// What the plan may do beside what the Knowledge Base says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Inputs {
    /// Whether lost clusters' instances are bound elsewhere.
    pub failover: Failover,
    /// How long an instance may be not ready before it is bound elsewhere, milliseconds.
    pub not_ready_ms: u64,
    /// How long an instance may take to start before it is bound elsewhere, milliseconds.
    pub start_ms: u64,
    /// How many slots of one application may be on their way at once.
    pub moves: usize,
}

impl Default for Inputs {
    fn default() -> Self {
        Self {
            failover: Failover::Run,
            not_ready_ms: 10_000,
            start_ms: 60_000,
            moves: 2,
        }
    }
}

/// Whether lost clusters' instances are bound elsewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failover {
    /// They are.
    Run,
    /// Too many clusters vanished at once (DESIGN section 5): nothing is re-placed until an operator or their
    /// return says so.
    Paused,
}

/// A slot that was bound longer ago than this may move because the world changed, milliseconds; after a change
/// of its goals it may move at once.
const COOL_DOWN_MS: u64 = 600_000;

/// What to propose at `now_ms` (the proposer's time, as in [`crate::command::Batch`]).
#[must_use]
pub fn plan(kb: &KnowledgeBase, inputs: &Inputs, now_ms: u64) -> Vec<Command> {
    let now_ms = now_ms.max(kb.log_time_ms).min(LAST);
    let mut commands = follow_up(kb, inputs, now_ms);
    let all = restless((kb, inputs, now_ms), &Tried::default(), (None, usize::MAX));
    // No view while all applications are at rest, because it takes longer to make than to see that.
    if !all.wants.is_empty() {
        commands.extend(
            all.place(View::new(kb, now_ms), (kb, inputs), || false)
                .commands,
        );
    }
    commands
}

/// What follows from what runs already: migrations go on, drains end. It takes no longer than to look at every slot.
#[must_use]
pub fn follow_up(kb: &KnowledgeBase, inputs: &Inputs, now_ms: u64) -> Vec<Command> {
    let now_ms = now_ms.max(kb.log_time_ms).min(LAST);
    let mut commands = advance(kb, inputs, now_ms);
    commands.extend(end_drains(kb, now_ms));
    commands
}

/// What has happened to the running migrations.
fn advance(kb: &KnowledgeBase, inputs: &Inputs, now_ms: u64) -> Vec<Command> {
    let running = kb.migrations.iter().filter(|(_, m)| m.state.is_running());
    running
        .filter_map(|(slot, migration)| {
            let late = migration.state == State::Starting
                && now_ms.saturating_sub(migration.state_since_ms) >= inputs.start_ms;
            let event = migration::observe(kb, slot, migration, now_ms)
                .or(late.then_some(Event::TargetFailed))?;
            Some(Command::AdvanceMigration {
                slot: slot.clone(),
                target: migration.target,
                event,
            })
        })
        .collect()
}

/// Draining bindings outside migrations that may stop.
fn end_drains(kb: &KnowledgeBase, now_ms: u64) -> Vec<Command> {
    let mut commands = Vec::new();
    for (slot, bindings) in &kb.slots {
        if kb.migrating(slot).is_some() {
            continue;
        }
        for (epoch, binding) in bindings {
            if let BindingState::Draining { deadline_ms } = binding.state
                && (now_ms >= deadline_ms || migration::drained(kb, slot, *epoch, now_ms))
            {
                commands.push(Command::Unbind {
                    slot: slot.clone(),
                    epoch: *epoch,
                });
            }
        }
    }
    commands
}

/// Why a live binding has to be made anew.
enum Broken {
    /// Anywhere, the same cluster too.
    Anywhere,
    /// Anywhere but where it is.
    Elsewhere,
}

fn broken(kb: &KnowledgeBase, inputs: &Inputs, binding: &Binding, now_ms: u64) -> Option<Broken> {
    if kb.is_lost(&binding.cluster) {
        return (inputs.failover == Failover::Run).then_some(Broken::Elsewhere);
    }
    let since_ms = now_ms.saturating_sub(binding.phase_since_ms);
    match binding.phase {
        Phase::Ready => None,
        Phase::Stopped => Some(Broken::Anywhere),
        Phase::Refused => Some(Broken::Elsewhere),
        Phase::NotReady => (since_ms >= inputs.not_ready_ms).then_some(Broken::Elsewhere),
        Phase::Starting => (since_ms >= inputs.start_ms).then_some(Broken::Elsewhere),
    }
}

/// Whether a binding's copy ends when its cluster is told so: both its agent and its node are there.
fn stops_when_asked(kb: &KnowledgeBase, binding: &Binding) -> bool {
    let cluster = kb.clusters.get(&binding.cluster);
    let node = cluster.and_then(|cluster| cluster.nodes.get(&binding.node));
    let answers = node.is_some_and(|node| node.not_ready_since_ms.is_none());
    !kb.is_lost(&binding.cluster) && (binding.node.is_empty() || answers)
}

/// What an application's slots ask for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Wants {
    task: Task,
    /// Slots that run an old version.
    outdated: Vec<Slot>,
    /// How many are on their way.
    moving: usize,
    /// Whether it may become another with time: something runs, moves, or waits for what ran.
    ages: bool,
}

impl Wants {
    fn is_at_rest(&self) -> bool {
        self.len() == 0
    }

    /// How many slots are looked at.
    fn len(&self) -> usize {
        self.task.pending.len() + self.task.movable.len() + self.outdated.len()
    }
}

fn wants(
    (kb, inputs, now_ms): (&KnowledgeBase, &Inputs, u64),
    (app, state): (&AppName, &AppState),
) -> Wants {
    let mut task = Task::default();
    let mut outdated = Vec::new();
    let mut moving = 0;
    let mut ages = false;
    for (service, goal) in &state.spec.services {
        let service = app.service(service);
        for slot in (0..goal.replicas).map(|instance| service.slot(instance)) {
            if kb.migrating(&slot).is_some() {
                (moving, ages) = (moving + 1, true);
                continue;
            }
            let fenced = kb.fence_wait(&slot, now_ms) == 0;
            let live = kb.live(&slot);
            ages |= !fenced || live.is_some();
            match live {
                None if fenced => _ = task.pending.insert(slot),
                None => {}
                Some((_, binding)) => match broken(kb, inputs, binding, now_ms) {
                    None => {
                        let service = kb.services.get(&slot.service);
                        if service.is_some_and(|s| s.template != binding.template)
                            && !just_rolled_back(kb, &slot, state, now_ms)
                        {
                            outdated.push(slot.clone());
                        }
                        let rested = now_ms.saturating_sub(binding.since_ms) >= COOL_DOWN_MS;
                        let goal_is_newer = binding.since_ms < state.changed_ms
                            || binding.generation < state.generation;
                        let ready = binding.phase == Phase::Ready
                            && !just_rolled_back(kb, &slot, state, now_ms);
                        let may =
                            binding.template.writers == Writers::Many && (rested || goal_is_newer);
                        if ready && (may || drained_since(kb, &binding.cluster).is_some()) {
                            task.movable.insert(slot);
                        }
                    }
                    // One writer: what can still be asked to stop is stopped first, anything else is waited for.
                    Some(_) if !fenced && !stops_when_asked(kb, binding) => {}
                    Some(Broken::Anywhere) => _ = task.pending.insert(slot),
                    Some(Broken::Elsewhere) => {
                        task.avoid.insert(slot.clone(), binding.cluster.clone());
                        task.pending.insert(slot);
                    }
                },
            }
        }
    }
    if moving >= inputs.moves {
        task.movable.clear();
    }
    Wants {
        task,
        outdated,
        moving,
        ages,
    }
}

fn place_application(
    view: &mut View<'_>,
    (kb, inputs): (&KnowledgeBase, &Inputs),
    (app, state): (&AppName, &AppState),
    wants: Wants,
) -> Vec<Command> {
    let Wants {
        task,
        outdated,
        moving,
        ages: _,
    } = wants;
    let now_ms = view.now_ms();
    let answer = if task.pending.is_empty() && task.movable.is_empty() {
        Answer::default()
    } else {
        placement::place(view, app, &task)
    };
    let session = |name: &Name| kb.clusters.get(name).map_or(0, |cluster| cluster.session);
    let mut commands = Vec::new();
    for (slot, decision) in answer.binds {
        // What a move must make room for waits for it: until then the Knowledge Base refuses it.
        if !view
            .refusals(&slot, &decision.cluster, Held::New)
            .is_empty()
        {
            continue;
        }
        // What it leaves keeps its room until it is known to be gone.
        view.move_to(&slot, &decision.cluster);
        if kb.fence_wait(&slot, now_ms) > 0
            && let Some((source, _)) = kb.live(&slot)
        {
            commands.push(Command::StartMigration(Box::new(StartMigration {
                source,
                to: decision.cluster.clone(),
                session: session(&decision.cluster),
                generation: state.generation,
                reason: Reason::NotReady,
                decision: Some(decision),
                slot,
            })));
            continue;
        }
        commands.push(Command::Bind(Box::new(Bind {
            replaces: kb.live(&slot).map(|(epoch, _)| epoch),
            cluster: decision.cluster.clone(),
            session: session(&decision.cluster),
            generation: state.generation,
            decision,
            slot,
        })));
    }
    let moves = answer.moves.into_iter().map(|(slot, reason, decision)| {
        let to = decision.cluster.clone();
        (slot, reason, to, Some(decision))
    });
    let mut moves: Vec<_> = moves.collect();
    for slot in outdated {
        if let Some(to) = update_target(view, kb, &slot)
            && moves.iter().all(|(moved, ..)| *moved != slot)
        {
            moves.push((slot, Reason::Update, to, None));
        }
    }
    let mut budget = inputs.moves.saturating_sub(moving);
    for (slot, reason, to, decision) in moves {
        // What another move must make room for waits for it.
        let fits = view.refusals(&slot, &to, Held::New).is_empty();
        let Some((source, _)) = kb.live(&slot).filter(|_| fits && budget > 0) else {
            continue;
        };
        budget -= 1;
        view.move_to(&slot, &to);
        commands.push(Command::StartMigration(Box::new(StartMigration {
            source,
            session: session(&to),
            generation: state.generation,
            reason,
            decision,
            slot,
            to,
        })));
    }
    commands
}

/// Since when the operator of a cluster wants it empty.
fn drained_since(kb: &KnowledgeBase, cluster: &Name) -> Option<u64> {
    kb.clusters.get(cluster)?.drained_since_ms
}

/// Whether the slot's last move came to nothing, and neither time nor its owner, nor the operator of the cluster where
/// it is, has changed anything since.
fn just_rolled_back(kb: &KnowledgeBase, slot: &Slot, state: &AppState, now_ms: u64) -> bool {
    let here = kb.live(slot).map(|(_, binding)| &binding.cluster);
    let drained_ms = here.and_then(|here| drained_since(kb, here)).unwrap_or(0);
    kb.migrations.get(slot).is_some_and(|migration| {
        migration.state == State::RolledBack
            && migration.state_since_ms >= state.changed_ms.max(drained_ms)
            && now_ms.saturating_sub(migration.state_since_ms) < COOL_DOWN_MS
    })
}

/// Where the new version of a slot starts: where the old one runs if there is room for both, else in the
/// cheapest cluster that has room.
fn update_target(view: &View<'_>, kb: &KnowledgeBase, slot: &Slot) -> Option<Name> {
    let here = &kb.live(slot)?.1.cluster;
    if view.refusals(slot, here, Held::New).is_empty() {
        return Some(here.clone());
    }
    view.verdicts(slot)
        .into_iter()
        .filter(|(name, _)| name != here)
        .filter_map(|(name, verdict)| match verdict {
            Verdict::Eligible(parts) => Some((parts.total(), name)),
            Verdict::Refused(_) => None,
        })
        .min()
        .map(|(_, name)| name)
}

/// The command by which a user moves a slot to `to`; refused where that cluster cannot take it.
pub fn request_move(
    kb: &KnowledgeBase,
    slot: &Slot,
    to: &Name,
    now_ms: u64,
) -> Result<Command, Refusal> {
    let unknown = || Refusal::UnknownService(slot.service.clone());
    let app = kb
        .applications
        .get(&slot.service.app())
        .ok_or_else(unknown)?;
    let goal = kb.goal(&slot.service).ok_or_else(unknown)?;
    let cluster = kb
        .clusters
        .get(to)
        .ok_or_else(|| Refusal::UnknownCluster(to.clone()))?;
    if slot.instance >= goal.replicas {
        return Err(Refusal::UnknownSlot {
            slot: slot.clone(),
            replicas: goal.replicas,
        });
    }
    if kb.migrating(slot).is_some() {
        return Err(Refusal::Migrating(slot.clone()));
    }
    let Some((source, _)) = kb.live(slot) else {
        return Err(Refusal::WrongEvent {
            slot: slot.clone(),
            problem: "is not bound yet: see weft explain".to_owned(),
        });
    };
    let reasons = View::new(kb, now_ms).refusals(slot, to, Held::New);
    if !reasons.is_empty() {
        return Err(Refusal::Ineligible {
            slot: slot.clone(),
            cluster: to.clone(),
            reasons: reasons.iter().map(ToString::to_string).collect(),
        });
    }
    Ok(Command::StartMigration(Box::new(StartMigration {
        slot: slot.clone(),
        source,
        to: to.clone(),
        session: cluster.session,
        generation: app.generation,
        reason: Reason::User,
        decision: None,
    })))
}
