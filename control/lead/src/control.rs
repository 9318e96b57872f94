//! The control loop: on the leader, after every change and on every tick, proposes what the plan says.
//!
//! ```text
//!  replica --read--> follow-ups, draft --place--> a part of the plan --> log --apply--> replica
//!     '------------------- the next part, on what came of this one <--------------------'
//! ```
//!
//! It decides nothing itself: who is lost is said by the leases, what follows by control-core's plan. Placing a large
//! mesh takes longer than a lease, so it holds up nothing: it is done beside everything else, on a copy, and in parts.
//! A plan that was refused as a whole waits for the next tick, so that the loop cannot spin.

use std::{mem, sync::Arc, time::Duration};

use control_core::{
    base::Mesh,
    command::Command,
    name::AppName,
    plan::{self, Draft, Failover, Inputs, Part, Tried},
};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep};

use crate::{
    gather::pieces,
    lead::{Answer, Ask, Lead, Planned},
    leases::{failover, ready},
    raft::propose::Done,
    replica::Replica,
};

/// How often the leader looks when nothing changes.
const TICK: Duration = Duration::from_millis(250);
/// How long the loop rests after a round, at least and at the most: as long as the round took, so that planning a large
/// mesh leaves the leader half of its time for changes, and those that come meanwhile are planned for together.
const REST: [Duration; 2] = [Duration::from_millis(1), Duration::from_millis(50)];
/// How long applications are placed before what was found is proposed: it is soon enough for those that wait for it, and
/// long beside what it takes to begin a part.
const PART: Duration = Duration::from_millis(100);

/// What one round came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Round {
    /// There is nothing to do, or not here.
    Quiet,
    /// The rest of the plan comes next.
    Begun,
    /// Something was changed.
    Progress,
    /// Nothing could be changed.
    Stuck,
}

/// A plan that is made in parts.
#[derive(Debug, Default)]
struct Pass {
    /// The last entry that all of it knows.
    seen: u64,
    /// The application with which it goes on.
    next: Option<AppName>,
    /// The last entry that came of it.
    done: u64,
    has_proposed: bool,
    has_changed: bool,
}

/// Runs until the task is dropped. `mesh` is proposed as the first command of a log that has none.
pub(crate) async fn run(lead: Arc<Lead>, mesh: Option<Mesh>) {
    let mut applied = lead.replica.watch();
    let mut tick = interval(TICK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut alarm = Failover::Run;
    let mut begun: Option<Pass> = None;
    let mut tried = Arc::new(Tried::default());
    loop {
        applied.mark_unchanged();
        let seen = lead.replica.applied();
        let mut pass = begun.take().unwrap_or(Pass {
            seen,
            done: seen,
            ..Pass::default()
        });
        let mut took = Duration::ZERO;
        let is_open = lead.rooms.borrow().closed.is_none();
        let round = if lead.leads() && lead.has_majority() && is_open {
            let started = Instant::now();
            let from = (&tried, pass.next.take());
            let part = decide(&lead, mesh.as_ref(), &mut alarm, from).await;
            took = started.elapsed();
            match part {
                Some(mut part) => {
                    let later = mem::take(&mut part.tried);
                    Arc::make_mut(&mut tried).extend(later, lead.clock.now_ms());
                    carry_out(&lead, &mut pass, part).await
                }
                None => Round::Stuck,
            }
        } else {
            Round::Quiet
        };
        let rest = sleep(took.clamp(REST[0], REST[1]));
        match round {
            Round::Begun => begun = Some(pass),
            Round::Stuck => {
                tick.tick().await;
                continue;
            }
            Round::Quiet | Round::Progress => tokio::select! {
                _ = tick.tick() => {}
                changed = applied.changed() => if changed.is_err() { return },
            },
        }
        rest.await;
    }
}

/// What to propose now: the part of the plan that begins with application `from`. Nothing when that was not found out.
async fn decide(
    lead: &Lead,
    mesh: Option<&Mesh>,
    alarm: &mut Failover,
    (tried, from): (&Arc<Tried>, Option<AppName>),
) -> Option<Part> {
    let term = lead.raft.metrics().borrow().current_term;
    let known = lead.replica.read(|base| {
        let lease_ms = base.mesh.as_ref()?.lease_ms;
        Some((lease_ms, ready(base)))
    });
    let Some((lease_ms, ready)) = known else {
        return Some(Part {
            commands: mesh.cloned().map(Command::InitMesh).into_iter().collect(),
            ..Part::default()
        });
    };
    let lease = Duration::from_millis(lease_ms);
    let lost = lead.leases().expired(term, ready, lease, Instant::now());
    let lost = lost.into_iter().map(|(cluster, session)| {
        tracing::warn!(%cluster, "a cluster is lost");
        Command::Lost { cluster, session }
    });
    let lost: Vec<_> = lost.collect();
    if !lost.is_empty() {
        // At once: while the rest is planned, they may be heard again.
        propose(lead, lost).await?;
    }
    let paused = lead.replica.read(|base| failover(base, lease_ms));
    note(alarm, paused);
    let inputs = Inputs {
        failover: paused,
        ..Inputs::default()
    };
    let (replica, now) = (lead.replica.clone(), lead.clock.now_ms());
    let tried = Arc::clone(tried);
    let planned = lead
        .aside
        .work(move || part(&replica, (&inputs, now), &tried, from));
    planned.await
}

/// The part of the plan that begins with application `from`.
fn part(
    replica: &Replica,
    (inputs, now_ms): (&Inputs, u64),
    tried: &Tried,
    from: Option<AppName>,
) -> Part {
    // Who applies the log waits as long as it takes to look at everything, and not while it is placed.
    let (follow_up, draft) = replica.read(|base| {
        let draft = Draft::of((base, inputs, now_ms), tried, from.as_ref());
        (plan::follow_up(base, inputs, now_ms), draft)
    });
    let end = Instant::now() + PART;
    let placed = draft.map(|draft| draft.place(|| Instant::now() >= end));
    let mut part = placed.unwrap_or_default();
    part.commands.splice(0..0, follow_up);
    part
}

/// Proposes a part of a plan, piece by piece.
async fn carry_out(lead: &Lead, pass: &mut Pass, part: Part) -> Round {
    if !part.commands.is_empty() {
        let count = part.commands.len();
        tracing::debug!(count, "proposing what the plan says");
        pass.has_proposed = true;
    }
    // What is decided late is refused where it does not fit any more, and planned anew.
    for commands in pieces(part.commands) {
        let Some(done) = propose(lead, commands).await else {
            return Round::Stuck;
        };
        pass.has_changed |= done.outcomes.iter().any(Result::is_ok);
        pass.done = done.index;
    }
    pass.next = part.next;
    if pass.next.is_some() {
        return Round::Begun;
    }
    lead.planned.send_replace(Planned {
        seen: pass.seen,
        done: pass.done,
    });
    match (pass.has_proposed, pass.has_changed) {
        (false, _) => Round::Quiet,
        (true, true) => Round::Progress,
        (true, false) => Round::Stuck,
    }
}

/// Proposes what was decided here, if this lead still leads.
async fn propose(lead: &Lead, commands: Vec<Command>) -> Option<Done> {
    // A lead that was itself held up heard nobody meanwhile, and may lead all the same.
    lead.hear_majority().await;
    match lead.answer(Ask::Propose(commands.clone())).await {
        Ok(Answer::Done(done)) => {
            for (command, outcome) in commands.iter().zip(&done.outcomes) {
                if let Err(refusal) = outcome {
                    tracing::debug!(%refusal, ?command, "a planned command was refused");
                }
            }
            Some(done)
        }
        Ok(_) => None,
        Err(error) => {
            tracing::warn!(%error, "the plan was not committed");
            None
        }
    }
}

fn note(alarm: &mut Failover, now: Failover) {
    if *alarm == now {
        return;
    }
    *alarm = now;
    match now {
        Failover::Paused => tracing::error!(
            "failover is paused: more than a third of the clusters vanished within one lease; \
             it goes on when they are back, or are forgotten by an operator"
        ),
        Failover::Run => tracing::info!("failover goes on"),
    }
}
