//! Commands about applications.
use super::{KnowledgeBase, Vip};
use crate::{
    command::{Outcome, Refusal},
    goal::Application,
    name::{AppName, ServiceName},
};

impl KnowledgeBase {
    pub(super) fn apply_application(&mut self, _: &Application) -> Outcome {
        Err(Refusal::NoMesh)
    }
    pub(super) fn delete_application(&mut self, _: &AppName) -> Outcome {
        Err(Refusal::NoMesh)
    }
    /// The VIPs of a service, by policy and instance.
    #[must_use]
    pub fn vips(&self, service: &ServiceName) -> Vec<Vip> {
        let _ = service;
        Vec::new()
    }
}
