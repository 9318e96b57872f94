//! The leader's control loop as one pure function: what to propose now.
//!
//! Proposing again what is already in flight changes nothing: every command names the session, generation or
//! epoch that was seen, and the Knowledge Base refuses it when that has passed.

use crate::{
    base::KnowledgeBase,
    command::{Command, Refusal},
    name::{Name, Slot},
};

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

/// What to propose at `now_ms` (the proposer's time, as in [`crate::command::Batch`]).
#[must_use]
pub fn plan(kb: &KnowledgeBase, inputs: &Inputs, now_ms: u64) -> Vec<Command> {
    let _ = (kb, inputs, now_ms);
    Vec::new()
}

/// The command by which a user moves a slot to `to`; refused where that cluster cannot take it.
pub fn request_move(
    kb: &KnowledgeBase,
    slot: &Slot,
    to: &Name,
    now_ms: u64,
) -> Result<Command, Refusal> {
    let _ = (kb, to, now_ms);
    Err(Refusal::UnknownService(slot.service.clone()))
}
