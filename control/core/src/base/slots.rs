//! Commands about slots: binding, migration, stopping.
//!
//! Whatever was proposed is rechecked here against the state at hand: session, generation, the live epoch,
//! booked capacity and every hard constraint. A conflict fails that one command.

use super::{
    BARRED_MS, Binding, BindingState, ClusterState, DRAIN_MS, KnowledgeBase, LAST, RefusedBy,
    STOP_GRACE_MS, Service,
};
use crate::{
    command::{Applied, Bind, Outcome, Reason, Refusal, StartMigration},
    goal::Writers,
    index::Touch,
    migration::{self, Action, At, Event, Migration, State},
    name::{Name, Slot},
    placement::{Held, View},
    report::{InstanceId, Phase},
};

impl KnowledgeBase {
    pub(super) fn bind(&mut self, bind: &Bind) -> Outcome {
        self.settle();
        let slot = &bind.slot;
        self.wanted(slot, bind.generation)?;
        self.session(&bind.cluster, bind.session)?;
        if self.migrating(slot).is_some() {
            return Err(Refusal::Migrating(slot.clone()));
        }
        let live = self.live(slot);
        let current = live.map(|(epoch, _)| epoch);
        if current != bind.replaces {
            return Err(Refusal::StaleEpoch {
                slot: slot.clone(),
                current,
                named: bind.replaces,
            });
        }
        if let Some((_, binding)) = live
            && binding.phase == Phase::Ready
            && !self.is_lost(&binding.cluster)
        {
            return Err(Refusal::StillServing(slot.clone()));
        }
        let wait_ms = self.fence_wait(slot, self.log_time_ms);
        if wait_ms > 0 {
            return Err(Refusal::NotFenced {
                slot: slot.clone(),
                wait_ms,
            });
        }
        self.eligible(slot, &bind.cluster)?;
        if let Some(epoch) = current {
            self.bar_if_not_ready(slot, epoch);
            self.stop_binding(slot, epoch);
        }
        let epoch = self.next_epoch;
        self.next_epoch += 1;
        self.insert_binding(slot, epoch, &bind.cluster, BindingState::Active);
        if let Some(service) = self.services.get_mut(&slot.service) {
            let decision = bind.decision.clone();
            service.decisions.insert(slot.instance, decision);
        }
        Ok(Applied::Bound { epoch })
    }

    /// A slot that leaves a reachable cluster because it did not become ready there does not come back soon:
    /// what fails everywhere visits each cluster once, and not in turns.
    fn bar_if_not_ready(&mut self, slot: &Slot, epoch: u64) {
        let until_ms = Some(self.log_time_ms + BARRED_MS);
        let Some(binding) = self.slots.get(slot).and_then(|b| b.get(&epoch)) else {
            return;
        };
        let cluster = binding.cluster.clone();
        let failed = matches!(binding.phase, Phase::NotReady | Phase::Starting);
        if failed
            && !self.is_lost(&cluster)
            && let Some(service) = self.services.get_mut(&slot.service)
        {
            let reason = "it did not become ready there".to_owned();
            let refused = RefusedBy { reason, until_ms };
            service.refused_by.entry(cluster).or_insert(refused);
        }
    }

    pub(super) fn start_migration(&mut self, start: &StartMigration) -> Outcome {
        self.settle();
        let slot = &start.slot;
        self.wanted(slot, start.generation)?;
        self.session(&start.to, start.session)?;
        if self.migrating(slot).is_some() {
            return Err(Refusal::Migrating(slot.clone()));
        }
        let (source, from, writers) = match self.live(slot) {
            Some((epoch, binding)) if epoch == start.source => {
                (epoch, binding.cluster.clone(), binding.template.writers)
            }
            live => {
                return Err(Refusal::StaleEpoch {
                    slot: slot.clone(),
                    current: live.map(|(epoch, _)| epoch),
                    named: Some(start.source),
                });
            }
        };
        if self.is_lost(&from) {
            return Err(Refusal::ClusterLost(from));
        }
        self.eligible(slot, &start.to)?;
        if start.reason == Reason::NotReady {
            self.bar_if_not_ready(slot, source);
        }
        let target = self.next_epoch;
        self.next_epoch += 1;
        let state = match writers {
            Writers::Many => {
                self.insert_binding(slot, target, &start.to, BindingState::Probing);
                State::Starting
            }
            Writers::One => {
                self.stop_binding(slot, source);
                State::Stopping
            }
        };
        let migration = Migration {
            source,
            target,
            from,
            to: start.to.clone(),
            reason: start.reason,
            state,
            since_ms: self.log_time_ms,
            state_since_ms: self.log_time_ms,
        };
        self.migrations.insert(slot.clone(), migration);
        if let Some(service) = self.services.get_mut(&slot.service) {
            match &start.decision {
                Some(decision) => service.decisions.insert(slot.instance, decision.clone()),
                None => service.decisions.remove(&slot.instance),
            };
        }
        Ok(Applied::Bound { epoch: target })
    }

    pub(super) fn advance_migration(&mut self, slot: &Slot, target: u64, event: Event) -> Outcome {
        let migration = self
            .migrating(slot)
            .filter(|migration| migration.target == target)
            .ok_or_else(|| Refusal::NotMigrating(slot.clone()))?;
        let wrong = |problem: String| {
            Err(Refusal::WrongEvent {
                slot: slot.clone(),
                problem,
            })
        };
        // What people and timers say is taken as said; facts are checked against the reports.
        let said = matches!(event, Event::Cancel | Event::TargetFailed);
        if !said && migration::observe(self, slot, migration, self.log_time_ms) != Some(event) {
            return wrong(format!("{event:?} has not happened"));
        }
        let mut at = At {
            now_ms: self.log_time_ms,
            revision: self.revision(),
        };
        at.revision.index = self.index;
        let (state, action) = migration::step(migration.state, event, at);
        if state == migration.state {
            return wrong(format!(
                "{event:?} does not belong to {:?}",
                migration.state
            ));
        }
        let mut migration = migration.clone();
        migration.state = state;
        migration.state_since_ms = self.log_time_ms;
        if let Some(action) = action {
            self.act(slot, &migration, action);
        }
        self.migrations.insert(slot.clone(), migration);
        Ok(Applied::Changed)
    }

    fn act(&mut self, slot: &Slot, migration: &Migration, action: Action) {
        let deadline_ms = self.log_time_ms + DRAIN_MS;
        match action {
            Action::Repoint => {
                self.set_state(slot, migration.target, BindingState::Active);
                self.set_state(
                    slot,
                    migration.source,
                    BindingState::Draining { deadline_ms },
                );
            }
            Action::Drain => {
                self.set_state(
                    slot,
                    migration.source,
                    BindingState::Draining { deadline_ms },
                );
            }
            Action::StopSource => self.stop_binding(slot, migration.source),
            Action::TakeOver => {
                self.set_state(slot, migration.target, BindingState::Active);
                self.stop_binding(slot, migration.source);
            }
            Action::RollBack => {
                self.set_state(slot, migration.source, BindingState::Active);
                self.stop_binding(slot, migration.target);
            }
            Action::BindTarget => {
                // Where the target cannot take it any more the slot is pending, and bound anew.
                let bound = self.live(slot).is_some();
                if !bound && self.eligible(slot, &migration.to).is_ok() {
                    let (epoch, to) = (migration.target, &migration.to);
                    self.insert_binding(slot, epoch, to, BindingState::Active);
                }
            }
        }
    }

    pub(super) fn unbind(&mut self, slot: &Slot, epoch: u64) -> Outcome {
        let draining = self
            .slots
            .get(slot)
            .and_then(|bindings| bindings.get(&epoch))
            .is_some_and(|binding| matches!(binding.state, BindingState::Draining { .. }));
        if !draining || self.migrating(slot).is_some() {
            return Err(Refusal::WrongEvent {
                slot: slot.clone(),
                problem: format!("epoch {epoch} is not draining outside a migration"),
            });
        }
        self.stop_binding(slot, epoch);
        Ok(Applied::Changed)
    }

    /// The running migration of a slot.
    #[must_use]
    pub fn migrating(&self, slot: &Slot) -> Option<&Migration> {
        self.migrations
            .get(slot)
            .filter(|migration| migration.state.is_running())
    }

    /// Whether a cluster is lost, or not known at all.
    #[must_use]
    pub fn is_lost(&self, cluster: &Name) -> bool {
        self.clusters
            .get(cluster)
            .is_none_or(|cluster| cluster.state != ClusterState::Ready)
    }

    /// How long after its lease has ended a node may need to fence, milliseconds: a tenth of the lease, and the time to
    /// stop.
    pub(super) fn fence_margin_ms(&self) -> u64 {
        let lease_ms = self.mesh.as_ref().map_or(0, |mesh| mesh.lease_ms);
        lease_ms / 10 + STOP_GRACE_MS
    }

    /// How long the copies of a slot with one writer may still run unseen, milliseconds from `now_ms`; 0 for
    /// other services. A cluster that was lost at `t` ended its lease by then; its node fences at the latest
    /// a tenth of the lease and the stop grace later (I7). What is still stopping in a cluster that can be
    /// asked is waited for.
    #[must_use]
    pub fn fence_wait(&self, slot: &Slot, now_ms: u64) -> u64 {
        let now_ms = now_ms.min(LAST);
        let one = |template: &super::Template| template.writers == Writers::One;
        let lease_ms = self.mesh.as_ref().map_or(0, |mesh| mesh.lease_ms);
        let margin = self.fence_margin_ms();
        let until = |cluster: &Name| match self.clusters.get(cluster).map(|c| c.state) {
            Some(ClusterState::Lost { since_ms }) => since_ms + margin,
            Some(ClusterState::Ready) => now_ms + margin,
            None => 0,
        };
        let wanted = self
            .services
            .get(&slot.service)
            .is_some_and(|service| one(&service.template));
        let bindings = self.slots.get(slot).into_iter().flatten().map(|(_, b)| b);
        let bound = bindings
            .filter(|b| wanted || one(&b.template))
            .filter_map(|binding| {
                let node = self
                    .clusters
                    .get(&binding.cluster)
                    .and_then(|cluster| cluster.nodes.get(&binding.node));
                match binding.phase {
                    Phase::Stopped | Phase::Refused => None,
                    // Its node is cut off from its agent and fences by itself.
                    _ if !self.is_lost(&binding.cluster) => node
                        .and_then(|node| node.not_ready_since_ms)
                        .map_or(Some(now_ms + margin), |since| {
                            Some(since + lease_ms + margin)
                        }),
                    _ => Some(until(&binding.cluster)),
                }
            });
        let service = if wanted {
            slot.service.to_string()
        } else {
            String::new()
        };
        let owed = self
            .owed_stops
            .iter()
            .filter(|(_, ids)| {
                wanted
                    && ids
                        .iter()
                        .any(|id| id.service == service && id.instance == slot.instance)
            })
            .map(|(cluster, _)| until(cluster));
        bound
            .chain(owed)
            .max()
            .map_or(0, |until| until.saturating_sub(now_ms))
    }

    /// The service of a slot that the specification has, in that generation.
    fn wanted(&self, slot: &Slot, generation: u64) -> Result<&Service, Refusal> {
        let app = slot.service.app();
        let state = self
            .applications
            .get(&app)
            .ok_or_else(|| Refusal::UnknownApplication(app.clone()))?;
        let unknown = || Refusal::UnknownService(slot.service.clone());
        let goal = state
            .spec
            .services
            .get(&slot.service.service)
            .ok_or_else(unknown)?;
        if slot.instance >= goal.replicas {
            return Err(Refusal::UnknownSlot {
                slot: slot.clone(),
                replicas: goal.replicas,
            });
        }
        if state.generation != generation {
            return Err(Refusal::StaleGeneration {
                application: app,
                current: state.generation,
                named: generation,
            });
        }
        self.services.get(&slot.service).ok_or_else(unknown)
    }

    fn eligible(&self, slot: &Slot, cluster: &Name) -> Result<(), Refusal> {
        let view = View::around(self, self.log_time_ms, slot, cluster);
        let reasons = view.refusals(slot, cluster, Held::New);
        if reasons.is_empty() {
            return Ok(());
        }
        Err(Refusal::Ineligible {
            slot: slot.clone(),
            cluster: cluster.clone(),
            reasons: reasons.iter().map(ToString::to_string).collect(),
        })
    }

    fn insert_binding(&mut self, slot: &Slot, epoch: u64, cluster: &Name, state: BindingState) {
        let (Some(service), Some(app), Some(to)) = (
            self.services.get(&slot.service),
            self.applications.get(&slot.service.app()),
            self.clusters.get(cluster),
        ) else {
            return;
        };
        let binding = Binding {
            cluster: cluster.clone(),
            session: to.session,
            generation: app.generation,
            template: service.template.clone(),
            state,
            since_ms: self.log_time_ms,
            phase: Phase::Starting,
            phase_since_ms: self.log_time_ms,
            reason: String::new(),
            node: String::new(),
            endpoint: None,
        };
        self.slots
            .entry(slot.clone())
            .or_default()
            .insert(epoch, binding);
        // No table shows it before it has an endpoint.
        self.lookup.touch_service(&slot.service, Touch::Bindings);
    }

    fn set_state(&mut self, slot: &Slot, epoch: u64, state: BindingState) {
        if let Some(binding) = self.slots.get_mut(slot).and_then(|b| b.get_mut(&epoch)) {
            binding.state = state;
            self.touch_service(&slot.service, Touch::Bindings);
        }
    }

    /// Whether a binding's cluster cannot be asked to stop it.
    pub(super) fn unreachable(&self, slot: &Slot, epoch: u64) -> bool {
        self.slots
            .get(slot)
            .and_then(|bindings| bindings.get(&epoch))
            .is_some_and(|binding| self.is_lost(&binding.cluster))
    }

    /// Ends a binding: at once if it has stopped, as a debt if its cluster is lost, else when its agent says so.
    pub(super) fn stop_binding(&mut self, slot: &Slot, epoch: u64) {
        let Some(binding) = self.slots.get(slot).and_then(|b| b.get(&epoch)) else {
            return;
        };
        if binding.phase == Phase::Stopped {
            self.remove_binding(slot, epoch);
        } else if self.is_lost(&binding.cluster) {
            let cluster = binding.cluster.clone();
            self.remove_binding(slot, epoch);
            self.owe_stop(&cluster, slot.at(epoch));
        } else {
            self.set_state(slot, epoch, BindingState::Stopping);
        }
    }

    pub(super) fn remove_binding(&mut self, slot: &Slot, epoch: u64) {
        if let Some(bindings) = self.slots.get_mut(slot) {
            bindings.remove(&epoch);
            if bindings.is_empty() {
                self.slots.remove(slot);
            }
        }
        self.touch_service(&slot.service, Touch::Bindings);
    }

    pub(super) fn owe_stop(&mut self, cluster: &Name, id: InstanceId) {
        if self.clusters.contains_key(cluster) {
            self.owed_stops
                .entry(cluster.clone())
                .or_default()
                .insert(id);
            self.lookup.touch_cluster(cluster);
        }
    }

    pub(super) fn bindings_where(
        &self,
        pick: impl Fn(&Slot, &Binding) -> bool,
    ) -> Vec<(Slot, u64)> {
        self.slots
            .iter()
            .flat_map(|(slot, bindings)| bindings.iter().map(move |(epoch, b)| (slot, *epoch, b)))
            .filter(|(slot, _, binding)| pick(slot, binding))
            .map(|(slot, epoch, _)| (slot.clone(), epoch))
            .collect()
    }
}
