//! The control loop: on the leader, after every change and on every tick, proposes what the plan says.
//!
//! It decides nothing itself: who is lost is said by the leases, what follows by control-core's plan. A plan that
//! was refused as a whole waits for the next tick, so that the loop cannot spin.

use std::{sync::Arc, time::Duration};

use control_core::{
    base::{KnowledgeBase, Mesh},
    command::Command,
    plan::{Failover, Inputs, plan},
};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep};

use crate::{
    gather::pieces,
    lead::{Answer, Ask, Lead, Planned},
    leases::{failover, ready},
};

/// How often the leader looks when nothing changes.
const TICK: Duration = Duration::from_millis(250);
/// How long the loop rests after a round, at least and at the most: as long as the round took, so that planning a large
/// mesh leaves the leader half of its time for changes, and those that come meanwhile are planned for together.
const REST: [Duration; 2] = [Duration::from_millis(4), Duration::from_millis(50)];

/// What one round came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Round {
    /// There is nothing to do, or not here.
    Quiet,
    /// Something was changed.
    Progress,
    /// Nothing could be changed.
    Stuck,
}

/// Runs until the task is dropped. `mesh` is proposed as the first command of a log that has none.
pub(crate) async fn run(lead: Arc<Lead>, mesh: Option<Mesh>) {
    let mut applied = lead.replica.watch();
    let mut tick = interval(TICK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut alarm = Failover::Run;
    loop {
        applied.mark_unchanged();
        let seen = lead.replica.applied();
        let mut took = Duration::ZERO;
        let is_open = lead.rooms.borrow().closed.is_none();
        let round = if lead.leads() && lead.has_majority() && is_open {
            let started = Instant::now();
            let commands = decide(&lead, mesh.as_ref(), &mut alarm);
            took = started.elapsed();
            carry_out(&lead, seen, commands).await
        } else {
            Round::Quiet
        };
        if round == Round::Stuck {
            tick.tick().await;
            continue;
        }
        let rest = sleep(took.clamp(REST[0], REST[1]));
        tokio::select! {
            _ = tick.tick() => {}
            changed = applied.changed() => if changed.is_err() { return },
        }
        rest.await;
    }
}

/// What to propose now.
fn decide(lead: &Lead, mesh: Option<&Mesh>, alarm: &mut Failover) -> Vec<Command> {
    let term = lead.raft.metrics().borrow().current_term;
    let known = lead.replica.read(|base| {
        let lease_ms = base.mesh.as_ref()?.lease_ms;
        Some((lease_ms, ready(base), failover(base, lease_ms)))
    });
    let Some((lease_ms, ready, paused)) = known else {
        return mesh.cloned().map(Command::InitMesh).into_iter().collect();
    };
    note(alarm, paused);
    let lease = Duration::from_millis(lease_ms);
    let lost = lead.leases().expired(term, ready, lease, Instant::now());
    let lost = lost.into_iter().map(|(cluster, session)| {
        tracing::warn!(%cluster, "a cluster is lost");
        Command::Lost { cluster, session }
    });
    let now = lead.clock.now_ms();
    let planned = lead.replica.read(|base| planned(base, paused, now));
    lost.chain(planned).collect()
}

/// Proposes, piece by piece, what was decided when everything up to entry `applied` was known.
async fn carry_out(lead: &Lead, applied: u64, commands: Vec<Command>) -> Round {
    if commands.is_empty() {
        lead.planned.send_replace(Planned {
            seen: applied,
            done: applied,
        });
        return Round::Quiet;
    }
    tracing::debug!(count = commands.len(), "proposing what the plan says");
    let mut is_any_done = false;
    let mut last = applied;
    // What is decided late is refused where it does not fit any more, and planned anew.
    for commands in pieces(commands) {
        match lead.answer(Ask::Propose(commands.clone())).await {
            Ok(Answer::Done(done)) => {
                for (command, outcome) in commands.iter().zip(&done.outcomes) {
                    if let Err(refusal) = outcome {
                        tracing::debug!(%refusal, ?command, "a planned command was refused");
                    }
                }
                is_any_done |= done.outcomes.iter().any(Result::is_ok);
                last = done.index;
            }
            Ok(_) => return Round::Stuck,
            Err(error) => {
                tracing::warn!(%error, "the plan was not committed");
                return Round::Stuck;
            }
        }
    }
    lead.planned.send_replace(Planned {
        seen: applied,
        done: last,
    });
    match is_any_done {
        true => Round::Progress,
        false => Round::Stuck,
    }
}

fn planned(base: &KnowledgeBase, failover: Failover, now_ms: u64) -> Vec<Command> {
    let inputs = Inputs {
        failover,
        ..Inputs::default()
    };
    plan(base, &inputs, now_ms.max(base.log_time_ms))
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
