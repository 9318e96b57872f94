//! Commands about slots.
use super::KnowledgeBase;
use crate::{
    command::{Bind, Outcome, Refusal, StartMigration},
    migration::Event,
    name::Slot,
};

impl KnowledgeBase {
    pub(super) fn bind(&mut self, _: &Bind) -> Outcome {
        Err(Refusal::NoMesh)
    }
    pub(super) fn start_migration(&mut self, _: &StartMigration) -> Outcome {
        Err(Refusal::NoMesh)
    }
    pub(super) fn advance_migration(&mut self, _: &Slot, _: u64, _: Event) -> Outcome {
        Err(Refusal::NoMesh)
    }
    pub(super) fn unbind(&mut self, _: &Slot, _: u64) -> Outcome {
        Err(Refusal::NoMesh)
    }
}
