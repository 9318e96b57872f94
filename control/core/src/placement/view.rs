//! What placement looks at: the Knowledge Base at one moment, with what is tried on top.

use std::{
    collections::{BTreeMap, BTreeSet},
    rc::Rc,
};

use crate::{
    base::{Binding, KnowledgeBase},
    goal::{self, Requests},
    name::{Name, ServiceName, Slot},
};

/// A Knowledge Base, and where the slots are or would be. A copy costs what was tried on it, not what the mesh holds.
#[derive(Clone)]
pub struct View<'a> {
    pub(super) kb: &'a KnowledgeBase,
    pub(super) now_ms: u64,
    /// As everything is.
    is: Rc<Places>,
    /// On top of it: clusters and services of which something was tried, and slots that were taken out.
    booked: BTreeMap<Name, Booked>,
    placed: BTreeMap<ServiceName, BTreeMap<u32, Name>>,
    forgotten: BTreeSet<Slot>,
}

/// Where everything is.
#[derive(Debug, Default)]
pub(crate) struct Places {
    /// Smallest measured round-trip time between two clusters, both ways round, microseconds.
    rtt: Rtt,
    booked: BTreeMap<Name, Booked>,
    placed: BTreeMap<ServiceName, BTreeMap<u32, Name>>,
}

/// What is promised in one cluster.
#[derive(Clone, Debug, Default)]
struct Booked {
    total: Load,
    nodes: BTreeMap<String, Load>,
}

/// A sum of requests.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Load {
    pub(super) cpu_milli: u64,
    pub(super) memory: u64,
    pub(super) gpus: u64,
}

impl Load {
    fn of(requests: &Requests) -> Self {
        Self {
            cpu_milli: requests.cpu.as_milli(),
            memory: requests.memory.get(),
            gpus: u64::from(requests.gpus),
        }
    }

    fn plus(self, other: Self) -> Self {
        Self {
            cpu_milli: self.cpu_milli.saturating_add(other.cpu_milli),
            memory: self.memory.saturating_add(other.memory),
            gpus: self.gpus.saturating_add(other.gpus),
        }
    }

    fn minus(self, other: Self) -> Self {
        Self {
            cpu_milli: self.cpu_milli.saturating_sub(other.cpu_milli),
            memory: self.memory.saturating_sub(other.memory),
            gpus: self.gpus.saturating_sub(other.gpus),
        }
    }
}

/// What a cluster has, what is free of it, and the freest node's room in each dimension.
#[derive(Clone, Copy, Default)]
pub(super) struct Room {
    pub(super) capacity: Load,
    pub(super) free: Load,
    pub(super) freest: Load,
}

impl<'a> View<'a> {
    /// The Knowledge Base as it is, judged at `now_ms`.
    #[must_use]
    pub fn new(kb: &'a KnowledgeBase, now_ms: u64) -> Self {
        Self::on_top_of(Places::of(kb), kb, now_ms)
    }

    /// Where everything is as `is` says; what is said of clusters, and of what is tried, is said by `kb`.
    pub(crate) fn on_top_of(is: Places, kb: &'a KnowledgeBase, now_ms: u64) -> Self {
        Self {
            kb,
            now_ms,
            is: Rc::new(is),
            booked: BTreeMap::new(),
            placed: BTreeMap::new(),
            forgotten: BTreeSet::new(),
        }
    }

    /// When it is judged, log time.
    pub(crate) fn now_ms(&self) -> u64 {
        self.now_ms
    }

    /// As far as it says whether `slot` may be bound in `cluster`, and no further.
    #[must_use]
    pub(crate) fn around(kb: &'a KnowledgeBase, now_ms: u64, slot: &Slot, cluster: &Name) -> Self {
        let app = slot.service.app();
        let spec = kb.applications.get(&app).map(|state| &state.spec);
        let links = || spec.into_iter().flat_map(|spec| &spec.links);
        let has_limits = links().any(|link| link.max_latency.is_some());
        let mut is = Places {
            rtt: if has_limits { rtt(kb) } else { Rtt::new() },
            ..Places::default()
        };
        let slots =
            |service: &ServiceName| kb.slots.range(service.slot(0)..=service.slot(u32::MAX));
        for service in kb.index().within(cluster) {
            for binding in slots(service).flat_map(|(_, bindings)| bindings.values()) {
                if binding.cluster == *cluster {
                    is.book(binding);
                }
            }
        }
        let own = spec.into_iter().flat_map(|spec| spec.services.keys());
        let mut services: BTreeSet<ServiceName> = own.map(|name| app.service(name)).collect();
        services.extend(links().map(|link| link.to.clone()));
        for service in &services {
            for (slot, _) in slots(service) {
                is.note(kb, slot);
            }
        }
        Self::on_top_of(is, kb, now_ms)
    }

    /// Where a service's slots are, or are tried.
    fn placed(&self, service: &ServiceName) -> Option<&BTreeMap<u32, Name>> {
        let tried = self.placed.get(service);
        tried.or_else(|| self.is.placed.get(service))
    }

    fn placed_mut(&mut self, service: &ServiceName) -> &mut BTreeMap<u32, Name> {
        let is = &self.is;
        self.placed
            .entry(service.clone())
            .or_insert_with(|| is.placed.get(service).cloned().unwrap_or_default())
    }

    fn booked(&self, cluster: &Name) -> Option<&Booked> {
        let tried = self.booked.get(cluster);
        tried.or_else(|| self.is.booked.get(cluster))
    }

    fn booked_mut(&mut self, cluster: &Name) -> &mut Booked {
        let is = &self.is;
        self.booked
            .entry(cluster.clone())
            .or_insert_with(|| is.booked.get(cluster).cloned().unwrap_or_default())
    }

    /// Where the slot is, or is tried.
    #[must_use]
    pub fn at(&self, slot: &Slot) -> Option<&Name> {
        self.placed(&slot.service)?.get(&slot.instance)
    }

    /// Where the slot is bound in the Knowledge Base.
    pub(super) fn bound(&self, slot: &Slot) -> Option<&Name> {
        if self.forgotten.contains(slot) {
            return None;
        }
        self.is.placed.get(&slot.service)?.get(&slot.instance)
    }

    /// The clusters in which a service's slots are or are tried, one entry per slot.
    pub(super) fn clusters_of(&self, service: &ServiceName) -> impl Iterator<Item = &Name> {
        self.placed(service).into_iter().flat_map(BTreeMap::values)
    }

    pub(super) fn goal(&self, slot: &Slot) -> Option<&'a goal::Service> {
        self.kb.goal(&slot.service)
    }

    fn load(&self, slot: &Slot) -> Load {
        self.goal(slot)
            .map(|goal| Load::of(&goal.requests))
            .unwrap_or_default()
    }

    /// Tries the slot in a cluster.
    pub(crate) fn place(&mut self, slot: &Slot, cluster: &Name) {
        self.unplace(slot);
        let load = self.load(slot);
        let booked = self.booked_mut(cluster);
        booked.total = booked.total.plus(load);
        let placed = self.placed_mut(&slot.service);
        placed.insert(slot.instance, cluster.clone());
    }

    /// Takes the slot out, and its booking. The room on its node, if it has one, stays taken: what is tried
    /// next may be somewhere else on the node.
    pub(super) fn unplace(&mut self, slot: &Slot) {
        if self.at(slot).is_none() {
            return;
        }
        let load = self.load(slot);
        let placed = self.placed_mut(&slot.service);
        let Some(cluster) = placed.remove(&slot.instance) else {
            return;
        };
        let booked = self.booked_mut(&cluster);
        booked.total = booked.total.minus(load);
    }

    /// Puts a slot elsewhere that keeps its room where it is until it has moved.
    pub(crate) fn move_to(&mut self, slot: &Slot, to: &Name) {
        let from = self.at(slot).cloned();
        self.place(slot, to);
        let load = self.load(slot);
        if let Some(from) = from {
            let booked = self.booked_mut(&from);
            booked.total = booked.total.plus(load);
        }
    }

    /// Takes a slot out that is to be bound anew, wherever it was.
    pub(super) fn forget(&mut self, slot: &Slot) {
        self.unplace(slot);
        self.forgotten.insert(slot.clone());
    }

    pub(super) fn room(&self, name: &Name) -> Room {
        let Some(cluster) = self.kb.clusters.get(name) else {
            return Room::default();
        };
        let booked = self.booked(name);
        let mut room = Room::default();
        for (name, node) in &cluster.nodes {
            if !node.report.ready {
                continue;
            }
            let has = Load {
                cpu_milli: node.report.cpu_milli,
                memory: node.report.memory_bytes,
                gpus: u64::from(node.report.gpus),
            };
            let taken = booked.and_then(|booked| booked.nodes.get(name)).copied();
            let free = has.minus(taken.unwrap_or_default());
            room.capacity = room.capacity.plus(has);
            room.freest = Load {
                cpu_milli: room.freest.cpu_milli.max(free.cpu_milli),
                memory: room.freest.memory.max(free.memory),
                gpus: room.freest.gpus.max(free.gpus),
            };
        }
        let total = booked.map(|booked| booked.total).unwrap_or_default();
        room.free = room.capacity.minus(total);
        room
    }

    /// The smallest measured round-trip time between two clusters, microseconds; within one cluster 0 where
    /// it was not measured.
    #[must_use]
    pub fn rtt_us(&self, a: &Name, b: &Name) -> Option<u32> {
        let measured = self.is.rtt.get(a).and_then(|row| row.get(b)).copied();
        measured.or((a == b).then_some(0))
    }
}

impl Places {
    /// As the Knowledge Base is.
    pub(crate) fn of(kb: &KnowledgeBase) -> Self {
        let mut is = Self {
            rtt: rtt(kb),
            ..Self::default()
        };
        for (slot, bindings) in &kb.slots {
            for binding in bindings.values() {
                is.book(binding);
            }
            is.note(kb, slot);
        }
        is
    }

    /// Counts what is promised to a binding.
    fn book(&mut self, binding: &Binding) {
        let load = Load::of(&binding.template.requests);
        if !self.booked.contains_key(&binding.cluster) {
            let none = Booked::default();
            self.booked.insert(binding.cluster.clone(), none);
        }
        let Some(booked) = self.booked.get_mut(&binding.cluster) else {
            return;
        };
        booked.total = booked.total.plus(load);
        if !binding.node.is_empty() {
            match booked.nodes.get_mut(&binding.node) {
                Some(node) => *node = node.plus(load),
                None => _ = booked.nodes.insert(binding.node.clone(), load),
            }
        }
    }

    /// Notes where a slot is, or is on its way to.
    fn note(&mut self, kb: &KnowledgeBase, slot: &Slot) {
        let at = match kb.migrating(slot) {
            Some(migration) => Some(&migration.to),
            None => kb.live(slot).map(|(_, binding)| &binding.cluster),
        };
        let Some(cluster) = at.cloned() else {
            return;
        };
        match self.placed.get_mut(&slot.service) {
            Some(placed) => _ = placed.insert(slot.instance, cluster),
            None => {
                let placed = BTreeMap::from([(slot.instance, cluster)]);
                self.placed.insert(slot.service.clone(), placed);
            }
        }
    }
}

type Rtt = BTreeMap<Name, BTreeMap<Name, u32>>;

fn rtt(kb: &KnowledgeBase) -> Rtt {
    let cluster_of: BTreeMap<u32, &Name> = kb
        .clusters
        .iter()
        .flat_map(|(name, cluster)| cluster.nodes.values().map(move |node| (node.number, name)))
        .collect();
    let mut rtt = Rtt::new();
    let mut note = |from: &Name, to: &Name, us: u32| {
        let row = rtt.entry(from.clone()).or_default();
        let least = row.entry(to.clone()).or_insert(us);
        *least = us.min(*least);
    };
    for (from, cluster) in &kb.clusters {
        for (peer, us) in cluster.nodes.values().flat_map(|node| &node.report.rtt_us) {
            if let Some(to) = cluster_of.get(peer) {
                note(from, to, *us);
                note(to, from, *us);
            }
        }
    }
    rtt
}
