//! What placement looks at: the Knowledge Base at one moment, with what is tried on top.

use std::collections::BTreeMap;

use crate::{
    base::KnowledgeBase,
    goal::{self, Requests},
    name::{Name, ServiceName, Slot},
};

/// A Knowledge Base, and where the slots are or would be.
#[derive(Clone)]
pub struct View<'a> {
    pub(super) kb: &'a KnowledgeBase,
    pub(super) now_ms: u64,
    /// Smallest measured round-trip time between two clusters, both ways round, microseconds.
    rtt: Rtt,
    booked: BTreeMap<Name, Booked>,
    placed: BTreeMap<ServiceName, BTreeMap<u32, Name>>,
    bound: BTreeMap<Slot, Name>,
}

/// What is promised in one cluster.
#[derive(Clone, Default)]
struct Booked {
    total: Load,
    nodes: BTreeMap<String, Load>,
}

/// A sum of requests.
#[derive(Clone, Copy, Default)]
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
        let mut view = Self {
            kb,
            now_ms,
            rtt: rtt(kb),
            booked: BTreeMap::new(),
            placed: BTreeMap::new(),
            bound: BTreeMap::new(),
        };
        for (slot, bindings) in &kb.slots {
            for binding in bindings.values() {
                let booked = view.booked.entry(binding.cluster.clone()).or_default();
                let load = Load::of(&binding.template.requests);
                booked.total = booked.total.plus(load);
                if !binding.node.is_empty() {
                    let node = booked.nodes.entry(binding.node.clone()).or_default();
                    *node = node.plus(load);
                }
            }
            let at = match kb.migrating(slot) {
                Some(migration) => Some(&migration.to),
                None => kb.live(slot).map(|(_, binding)| &binding.cluster),
            };
            if let Some(cluster) = at {
                let placed = view.placed.entry(slot.service.clone()).or_default();
                placed.insert(slot.instance, cluster.clone());
                view.bound.insert(slot.clone(), cluster.clone());
            }
        }
        view
    }

    /// Where the slot is, or is tried.
    #[must_use]
    pub fn at(&self, slot: &Slot) -> Option<&Name> {
        self.placed.get(&slot.service)?.get(&slot.instance)
    }

    /// Where the slot is bound in the Knowledge Base.
    pub(super) fn bound(&self, slot: &Slot) -> Option<&Name> {
        self.bound.get(slot)
    }

    /// The clusters in which a service's slots are or are tried, one entry per slot.
    pub(super) fn clusters_of(&self, service: &ServiceName) -> impl Iterator<Item = &Name> {
        self.placed
            .get(service)
            .into_iter()
            .flat_map(BTreeMap::values)
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
        let booked = self.booked.entry(cluster.clone()).or_default();
        booked.total = booked.total.plus(load);
        let placed = self.placed.entry(slot.service.clone()).or_default();
        placed.insert(slot.instance, cluster.clone());
    }

    /// Takes the slot out, and its booking. The room on its node, if it has one, stays taken: what is tried
    /// next may be somewhere else on the node.
    pub(super) fn unplace(&mut self, slot: &Slot) {
        let load = self.load(slot);
        let placed = self.placed.get_mut(&slot.service);
        let Some(cluster) = placed.and_then(|placed| placed.remove(&slot.instance)) else {
            return;
        };
        if let Some(booked) = self.booked.get_mut(&cluster) {
            booked.total = booked.total.minus(load);
        }
    }

    /// Puts a slot elsewhere that keeps its room where it is until it has moved.
    pub(crate) fn move_to(&mut self, slot: &Slot, to: &Name) {
        let from = self.at(slot).cloned();
        self.place(slot, to);
        let load = self.load(slot);
        if let Some(booked) = from.and_then(|from| self.booked.get_mut(&from)) {
            booked.total = booked.total.plus(load);
        }
    }

    /// Takes a slot out that is to be bound anew, wherever it was.
    pub(super) fn forget(&mut self, slot: &Slot) {
        self.unplace(slot);
        self.bound.remove(slot);
    }

    pub(super) fn room(&self, name: &Name) -> Room {
        let Some(cluster) = self.kb.clusters.get(name) else {
            return Room::default();
        };
        let booked = self.booked.get(name);
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
        let measured = self.rtt.get(a).and_then(|row| row.get(b)).copied();
        measured.or((a == b).then_some(0))
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
