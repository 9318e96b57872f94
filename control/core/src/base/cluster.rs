//! Commands about clusters and their nodes.
use super::{KnowledgeBase, Mesh};
use crate::{
    command::{Outcome, Refusal},
    name::Name,
    report::{ClusterFacts, Report},
};

impl KnowledgeBase {
    pub(super) fn init_mesh(&mut self, _: &Mesh) -> Outcome {
        Err(Refusal::NoMesh)
    }
    pub(super) fn register_cluster(&mut self, _: &Name, _: u64, _: &ClusterFacts) -> Outcome {
        Err(Refusal::NoMesh)
    }
    pub(super) fn report(&mut self, _: &Name, _: u64, _: &Report) -> Outcome {
        Err(Refusal::NoMesh)
    }
    pub(super) fn lost(&mut self, _: &Name, _: u64) -> Outcome {
        Err(Refusal::NoMesh)
    }
    pub(super) fn forget_cluster(&mut self, _: &Name) -> Outcome {
        Err(Refusal::NoMesh)
    }
    pub(super) fn rest(&mut self) {}
}
