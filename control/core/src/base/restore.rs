//! Another life of the Knowledge Base: what a backup brings back, and what is left of the present one.
//!
//! ```text
//!  wishes  (mesh, applications, services and their numbers)    from the backup
//!  reality (clusters, nodes, bindings, owed stops)             from the present, where there is one
//! ```
//!
//! A restored state knows less than the clusters do. So its incarnation is higher (agents and nodes take it for
//! newer, whatever the index), its next numbers lie beyond any that can have been given since, numbers that are given
//! now and were not then rest first, and an instance that it does not know is adopted where its slot is free, and
//! left alone elsewhere: it is never stopped for being unknown.

use super::{Binding, BindingState, Cluster, ClusterState, KnowledgeBase, LAST, REST_MS};
use crate::{
    command::{Applied, Outcome, Refusal},
    index::Touch,
    name::{Name, Slot},
    quota,
    report::{InstanceReport, Phase},
};

/// So many epochs may have been given since a backup was taken.
const EPOCHS: u64 = 1 << 24;
/// So many nodes may have joined since a backup was taken.
const NODES: u32 = 1 << 16;
/// How long unknown instances are adopted, milliseconds: agents report within seconds of seeing a lead.
const ADOPT_MS: u64 = REST_MS;

impl KnowledgeBase {
    /// Begins another incarnation of what is here.
    pub fn reincarnate(&mut self) {
        if let Some(mesh) = &mut self.mesh {
            mesh.incarnation = mesh.incarnation.saturating_add(1);
        }
        self.next_epoch = self.next_epoch.saturating_add(EPOCHS).min(LAST);
        self.numbers.last_node = self.numbers.last_node.saturating_add(NODES);
        self.adopt_until_ms = self.log_time_ms.saturating_add(ADOPT_MS);
        self.touch_everything();
    }

    pub(super) fn restore(&mut self, backup: &Self) -> Outcome {
        self.may_restore(backup)?;
        let mut new = backup.sketch();
        new.index = self.index;
        new.log_time_ms = self.log_time_ms.max(backup.log_time_ms.min(LAST));
        new.next_epoch = self.next_epoch.max(backup.next_epoch.min(LAST));
        new.level = self.level;
        new.memory = std::mem::take(&mut self.memory);
        // A lead of an older version reads none.
        if self.level < quota::LEVEL {
            new.quotas.clear();
        }
        new.security = std::mem::take(&mut self.security).after(&backup.security);
        let incarnation = |kb: &Self| kb.mesh.as_ref().map_or(0, |mesh| mesh.incarnation);
        let (now, then) = (incarnation(self), incarnation(backup));
        if let Some(mesh) = &mut new.mesh {
            mesh.incarnation = now.max(then);
        }
        if self.clusters.is_empty() {
            new.believe();
        } else {
            new.face(self);
        }
        new.reincarnate();
        *self = new;
        Ok(Applied::Changed)
    }

    fn may_restore(&self, backup: &Self) -> Result<(), Refusal> {
        let (Some(own), Some(theirs)) = (&self.mesh, &backup.mesh) else {
            return Err(Refusal::OtherBackup("it holds no mesh".to_owned()));
        };
        let same = |mesh: &super::Mesh| (mesh.name.clone(), mesh.prefix6, mesh.prefix4, mesh.seed);
        if same(own) != same(theirs) {
            return Err(Refusal::OtherBackup(format!(
                "it is of mesh {:?} with {}, this is {:?} with {}",
                theirs.name, theirs.prefix6, own.name, own.prefix6
            )));
        }
        Ok(())
    }

    /// Nothing is here but the backup: believed until the agents say otherwise. Their sessions are over.
    fn believe(&mut self) {
        for cluster in self.clusters.values_mut() {
            cluster.session = 0;
            cluster.reported_ms = 0;
            cluster.state = ClusterState::Ready;
        }
        self.migrations.clear();
        for bindings in self.slots.values_mut() {
            bindings.retain(|_, binding| binding.state != BindingState::Probing);
            for binding in bindings.values_mut() {
                if matches!(binding.state, BindingState::Draining { .. }) {
                    binding.state = BindingState::Stopping;
                }
            }
        }
        self.slots.retain(|_, bindings| !bindings.is_empty());
    }

    /// The clusters run what `present` says: that stays, as far as anybody still wants it.
    fn face(&mut self, present: &Self) {
        self.clusters = present.clusters.clone();
        self.migrations = present.migrations.clone();
        self.owed_stops = present.owed_stops.clone();
        self.slots = present.slots.clone();
        let wanted = |kb: &Self, slot: &Slot| {
            let goal = kb.goal(&slot.service);
            goal.is_some_and(|goal| slot.instance < goal.replicas)
        };
        let mut slots = std::mem::take(&mut self.slots);
        slots.retain(|slot, _| wanted(self, slot));
        self.slots = slots;
        let slots = &self.slots;
        self.migrations.retain(|slot, _| slots.contains_key(slot));
        let until = self.log_time_ms.saturating_add(REST_MS);
        let numbers = &mut self.numbers;
        numbers.last_node = numbers.last_node.max(present.numbers.last_node);
        numbers.blocks4 = present.numbers.blocks4.clone();
        for (own, theirs) in [
            (&mut numbers.services6, &present.numbers.services6),
            (&mut numbers.services4, &present.numbers.services4),
            (&mut numbers.instances4, &present.numbers.instances4),
        ] {
            own.quarantine(theirs, until);
        }
        for (name, service) in &mut self.services {
            service.refused_by = present
                .services
                .get(name)
                .map(|service| service.refused_by.clone())
                .unwrap_or_default();
        }
    }

    /// Makes an instance that nobody bound its slot's binding, if this state was restored lately and the slot has
    /// none that works; whether it did.
    pub(super) fn adopt(&mut self, cluster: &Name, slot: &Slot, report: &InstanceReport) -> bool {
        if self.log_time_ms >= self.adopt_until_ms || report.id.epoch >= LAST {
            return false;
        }
        let serves = self.live(slot).is_some_and(|(epoch, binding)| {
            epoch > report.id.epoch || matches!(binding.phase, Phase::Ready | Phase::NotReady)
        });
        let wanted = self
            .goal(&slot.service)
            .is_some_and(|goal| slot.instance < goal.replicas);
        let runs = matches!(
            report.phase,
            Phase::Ready | Phase::NotReady | Phase::Starting
        );
        if serves || !wanted || !runs || self.migrating(slot).is_some() {
            return false;
        }
        let Some(Cluster { session, .. }) = self.clusters.get(cluster) else {
            return false;
        };
        let (session, now) = (*session, self.log_time_ms);
        let generation = self
            .applications
            .get(&slot.service.app())
            .map_or(0, |app| app.generation);
        let Some(template) = self
            .services
            .get(&slot.service)
            .map(|it| it.template.clone())
        else {
            return false;
        };
        if let Some((epoch, _)) = self.live(slot) {
            self.stop_binding(slot, epoch);
        }
        let binding = Binding {
            cluster: cluster.clone(),
            session,
            generation,
            template,
            state: BindingState::Active,
            since_ms: now,
            phase: report.phase,
            phase_since_ms: now,
            reason: report.reason.clone(),
            node: report.node.clone(),
            endpoint: report.endpoint.clone(),
        };
        let bindings = self.slots.entry(slot.clone()).or_default();
        bindings.insert(report.id.epoch, binding);
        self.touch_service(&slot.service, Touch::Bindings);
        true
    }
}
