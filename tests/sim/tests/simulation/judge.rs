//! What must hold between leads and clusters, at every step: one writer (I7), stops before starts, make before break, and
//! in the end what the goal files say.
//!
//! It looks at processes and applied tables, as they are, and at the newest Knowledge Base that a lead has shown.

use std::collections::{BTreeMap, BTreeSet};

use control_core::{
    base::KnowledgeBase,
    goal::Writers,
    migration::State,
    name::{Name, Slot},
    report::InstanceId,
    table::concerned,
};
use netmanager_api::table::{BackendState, Table};

use crate::{
    agent::AgentHost,
    host::{CLUSTERS, cluster_name},
    plant::{Deed, Serving},
};

/// How long after the loss of a cluster its instances are bound elsewhere, at the default lease of 10 s, milliseconds: many
/// writers, one writer.
const BOUND: [u64; 2] = [12_000, 20_000];
/// So long after a cluster is back it has the tables of now, milliseconds.
const SETTLES: u64 = 20_000;

/// How things stand around the clusters, for what is promised only then.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Calm {
    /// Since when the leads are all up and hear each other, and nothing is slow; `None` while they do not.
    pub(crate) leads: Option<u64>,
}

/// What a cluster had when it went away.
#[derive(Debug)]
struct Gone {
    since: u64,
    /// Its slots, each with whether it has one writer and its epoch.
    slots: BTreeMap<Slot, (bool, u64)>,
}

/// What it has seen.
#[derive(Debug, Default)]
pub(crate) struct Judge {
    gone: BTreeMap<usize, Gone>,
    /// The clusters that are not wholly there.
    away: BTreeSet<usize>,
    /// When more than one was last away or lost.
    several: u64,
    /// How far each migration was.
    migrations: BTreeMap<Slot, (u64, State)>,
    /// When each cluster that had been lost was last welcome again.
    back: BTreeMap<usize, u64>,
    serving: Serving,
    /// Those that ever did.
    served: Serving,
    /// Of the Knowledge Base that was looked at last.
    index: Option<u64>,
    /// How often a cluster that had been lost came back.
    pub(crate) returns: u64,
}

impl Judge {
    /// Looks at what runs at `now`.
    ///
    /// # Errors
    /// When something does not hold; what.
    pub(crate) fn look(
        &mut self,
        now: u64,
        agents: &[AgentHost],
        base: Option<&KnowledgeBase>,
        calm: Calm,
    ) -> Result<(), String> {
        self.deeds(agents, calm, now)?;
        let mut has_changed = false;
        for agent in agents {
            has_changed |= agent.plant.has_changed();
        }
        if has_changed {
            self.one_writer(agents)?;
            let running = agents.iter().flat_map(|agent| agent.plant.running());
            self.serving = running.filter(|it| it.serves).map(|it| it.id).collect();
            self.served.extend(self.serving.iter().cloned());
        }
        if let Some(base) = base {
            if self.index.replace(base.index) != Some(base.index) {
                self.make_before_break(now, agents, base)?;
            }
            self.bound_elsewhere(now, base, calm)?;
        }
        Ok(())
    }

    /// The instances that serve somewhere.
    pub(crate) fn serving(&self) -> &Serving {
        &self.serving
    }

    fn one_writer(&self, agents: &[AgentHost]) -> Result<(), String> {
        let mut writers: BTreeMap<(String, u32), (usize, InstanceId)> = BTreeMap::new();
        for agent in agents {
            for running in agent
                .plant
                .running()
                .into_iter()
                .filter(|it| it.has_one_writer)
            {
                let id = running.id;
                let slot = (id.service.clone(), id.instance);
                if let Some((host, other)) = writers.insert(slot, (agent.id, id.clone())) {
                    return Err(format!(
                        "I7: two writers: {}#{}@{} on host {host} and @{} on host {}",
                        id.service, id.instance, other.epoch, id.epoch, agent.id
                    ));
                }
            }
        }
        Ok(())
    }

    fn deeds(&mut self, agents: &[AgentHost], calm: Calm, now: u64) -> Result<(), String> {
        for agent in agents {
            for deed in agent.plant.deeds() {
                match deed {
                    Deed::TooSoon(id, why) => {
                        return Err(format!(
                            "I7: host {} is back and starts {id:?}, but {why}",
                            agent.id
                        ));
                    }
                    Deed::TooLate(id) if calm.leads.is_some_and(|since| since + 4_000 < now) => {
                        return Err(format!(
                            "I7: host {} is back and {id:?} still runs after 2 s",
                            agent.id
                        ));
                    }
                    Deed::Returned => {
                        self.returns += 1;
                        self.back.insert(agent.cluster, now);
                    }
                    Deed::TooLate(_) => {}
                }
            }
        }
        Ok(())
    }

    /// The source of a move stops only when the target has served and every node in reach knows it.
    fn make_before_break(
        &mut self,
        now: u64,
        agents: &[AgentHost],
        base: &KnowledgeBase,
    ) -> Result<(), String> {
        for (slot, migration) in &base.migrations {
            let known = (migration.target, migration.state);
            let before = self.migrations.insert(slot.clone(), known);
            let goes_on = before.is_some_and(|(target, state)| {
                target == migration.target && matches!(state, State::Draining { .. })
            });
            if !goes_on || migration.state != State::Stopping {
                continue;
            }
            let target = slot.at(migration.target);
            if !self.served.contains(&target) {
                return Err(format!(
                    "{slot} left its source, and its target never served"
                ));
            }
            let concerned = concerned(base, &slot.service);
            for agent in agents.iter().filter(|agent| agent.is_on()) {
                let name = cluster_name(agent.cluster);
                // One that was just lost is not waited for, and neither is a node that nobody hears.
                let is_new = self
                    .back
                    .get(&agent.cluster)
                    .is_some_and(|at| now < at + SETTLES);
                if is_new || !is_ready(base, &name) {
                    continue;
                }
                for (node, table) in agent.plant.tables() {
                    let heard = concerned.iter().any(|(cluster, it)| {
                        let known = base
                            .clusters
                            .get(cluster)
                            .and_then(|it| it.nodes.get(&node));
                        (cluster.as_str(), it) == (name.as_str(), &node)
                            && known.is_some_and(|node| node.report.ready)
                    });
                    if heard && is_probed(&table, slot, migration.target) {
                        return Err(format!(
                            "{slot} left its source, and node {node} of {name} does not use its target"
                        ));
                    }
                }
            }
        }
        Ok(())
    }

    /// A cluster is not wholly there at `now`; whether it `is_gone`, so that nobody hears it.
    pub(crate) fn is_away(
        &mut self,
        now: u64,
        cluster: usize,
        is_gone: bool,
        base: Option<&KnowledgeBase>,
    ) {
        self.away.insert(cluster);
        if !is_gone || self.gone.contains_key(&cluster) {
            return;
        }
        let name = cluster_name(cluster);
        let slots = base.into_iter().flat_map(|base| {
            let bound = base.slots.keys().filter_map(|slot| {
                let (epoch, binding) = base.live(slot)?;
                let here = binding.cluster.as_str() == name && base.migrating(slot).is_none();
                let one = binding.template.writers == Writers::One;
                here.then(|| (slot.clone(), (one, epoch)))
            });
            bound.collect::<Vec<_>>()
        });
        let slots = slots.collect();
        self.gone.insert(cluster, Gone { since: now, slots });
    }

    /// It is back.
    pub(crate) fn came(&mut self, cluster: usize) {
        self.gone.remove(&cluster);
        self.away.remove(&cluster);
    }

    /// What a cluster had that is gone is elsewhere in time, if the leads are well and it is the only one.
    fn bound_elsewhere(
        &mut self,
        now: u64,
        base: &KnowledgeBase,
        calm: Calm,
    ) -> Result<(), String> {
        let ready = |cluster: &usize| is_ready(base, &cluster_name(*cluster));
        let others_lost = (0..CLUSTERS).filter(|it| !self.away.contains(it) && !ready(it));
        if self.away.len() + others_lost.count() > 1 {
            self.several = now;
        }
        let well_since = calm.leads.map(|since| since.max(self.several));
        let alone = |gone: &Gone| well_since.is_some_and(|since| since < gone.since);
        for (cluster, gone) in self.gone.iter().filter(|(_, gone)| alone(gone)) {
            let name = cluster_name(*cluster);
            for (slot, (one, epoch)) in &gone.slots {
                let late = now > gone.since + BOUND[usize::from(*one)];
                let Some(service) = base.services.get(&slot.service).filter(|_| late) else {
                    continue;
                };
                let still = base.live(slot).is_some_and(|(live, _)| live == *epoch);
                let is_wanted = base
                    .goal(&slot.service)
                    .is_some_and(|goal| slot.instance < goal.replicas);
                if still && is_wanted && service.refused_by.is_empty() {
                    return Err(format!(
                        "{slot} is still bound to {name}, which is gone since {}",
                        gone.since
                    ));
                }
            }
        }
        Ok(())
    }

    /// Why things are not yet as the goal files say; `None` when they are.
    pub(crate) fn differs(agents: &[AgentHost], base: &KnowledgeBase) -> Option<String> {
        let mut want: BTreeSet<InstanceId> = BTreeSet::new();
        for (app, state) in &base.applications {
            for (service, goal) in &state.spec.services {
                for instance in 0..goal.replicas {
                    let slot = app.service(service).slot(instance);
                    match base.live(&slot) {
                        Some((epoch, _)) => _ = want.insert(slot.at(epoch)),
                        None if is_barred(base, &slot) => {}
                        None => return Some(format!("{slot} is bound nowhere")),
                    }
                }
            }
        }
        for name in base.clusters.keys() {
            if !is_ready(base, name.as_str()) {
                return Some(format!("{name} is lost"));
            }
        }
        if let Some((cluster, owed)) = base.owed_stops.first_key_value() {
            return Some(format!("{cluster} owes stops: {owed:?}"));
        }
        let running = base.migrations.iter().find(|(_, it)| it.state.is_running());
        if let Some((slot, migration)) = running {
            return Some(format!("{slot} is moving: {:?}", migration.state));
        }
        let mut have = BTreeSet::new();
        for agent in agents.iter().filter(|agent| agent.is_on()) {
            for running in agent.plant.running() {
                if !running.serves {
                    return Some(format!("{:?} does not serve", running.id));
                }
                if !have.insert(running.id.clone()) {
                    return Some(format!("{:?} runs twice", running.id));
                }
            }
        }
        if let Some(id) = want.difference(&have).next() {
            return Some(format!("{id:?} does not run"));
        }
        let extra = have.difference(&want).next();
        extra.map(|id| format!("{id:?} runs, and nobody wants it"))
    }
}

/// Whether a table has an instance only to be tried.
fn is_probed(table: &Table, slot: &Slot, epoch: u64) -> bool {
    let service = slot.service.to_string();
    let service = table.services.iter().find(|it| it.name == service);
    service.is_some_and(|service| {
        let mut backends = service.backends.iter();
        backends.any(|it| it.epoch == epoch && it.state == BackendState::Probing)
    })
}

fn is_ready(base: &KnowledgeBase, cluster: &str) -> bool {
    let name: Result<Name, _> = cluster.parse();
    name.is_ok_and(|name| !base.is_lost(&name))
}

/// Whether a slot may be nowhere: some cluster does not take it for a while.
fn is_barred(base: &KnowledgeBase, slot: &Slot) -> bool {
    let service = base.services.get(&slot.service);
    service.is_some_and(|service| !service.refused_by.is_empty())
}
