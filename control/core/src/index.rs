//! What would have to be searched for: who calls whom, what runs where, and whose tables and orders may differ.
//!
//! ```text
//!  a command --touch--> Touched --settle--> calls, places (by service and back) --> dirt (by cluster and node)
//! ```
//!
//! A pure function of the rest of the Knowledge Base but for the dirt, which says at which entry something last may have
//! changed: a stream looks only at what changed after it looked last. Too much dirt costs time; too little would leave a
//! node with an old table, so the simulated worlds compare with everything searched for anew. It is never in a snapshot.

use std::collections::{BTreeMap, BTreeSet};

use self::links::Links;
pub use self::look::Changed;
use crate::{
    base::KnowledgeBase,
    name::{AppName, Name, ServiceName},
};

mod links;
mod look;

/// A node; its name is empty for what has no node yet.
pub(crate) type Place = (Name, String);

/// See the module.
#[derive(Debug)]
pub struct Index {
    touched: Touched,
    /// Where each service has bindings.
    places: BTreeMap<ServiceName, BTreeSet<Place>>,
    /// The same by cluster and node.
    hosted: BTreeMap<Name, BTreeMap<String, BTreeSet<ServiceName>>>,
    /// Who may call whom by a link.
    calls: Links,
    /// Whose instances are told whose addresses.
    told: Links,
    /// The applications that grant something.
    granting: BTreeSet<AppName>,
    /// By cluster, the entry at which something last may have changed.
    dirt: BTreeMap<Name, Dirt>,
    /// The same for all clusters.
    everything: u64,
    all_tables: u64,
    /// The entry that last changed what applications are placed by, but for goals.
    facts: u64,
}

#[derive(Debug, Default)]
struct Dirt {
    orders: u64,
    tables: u64,
    nodes: BTreeMap<String, u64>,
}

/// What commands changed since the index was settled.
#[derive(Debug, Default)]
struct Touched {
    everything: bool,
    tables: bool,
    services: BTreeMap<ServiceName, Touch>,
    applications: BTreeSet<AppName>,
    clusters: BTreeSet<Name>,
}

/// What changed of a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Touch {
    /// Where its instances are reached, and whether.
    Backends,
    /// What must run where as well.
    Bindings,
}

impl Default for Index {
    fn default() -> Self {
        let touched = Touched {
            everything: true,
            ..Touched::default()
        };
        Self {
            touched,
            places: BTreeMap::new(),
            hosted: BTreeMap::new(),
            calls: Links::default(),
            told: Links::default(),
            granting: BTreeSet::new(),
            dirt: BTreeMap::new(),
            everything: 0,
            all_tables: 0,
            facts: 0,
        }
    }
}

/// A copy of a Knowledge Base makes its own when it needs one.
impl Clone for Index {
    fn clone(&self) -> Self {
        Self::default()
    }
}

/// It follows from the rest.
impl PartialEq for Index {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for Index {}

impl Index {
    /// Of `kb`, from nothing.
    pub(crate) fn of(kb: &KnowledgeBase) -> Self {
        let mut index = Self::default();
        index.rebuild(kb);
        index.touched = Touched::default();
        index
    }

    pub(crate) fn touch_everything(&mut self) {
        self.touched.everything = true;
    }

    /// What applications are placed by has changed at entry `index`.
    pub(crate) fn touch_facts(&mut self, index: u64) {
        self.facts = index;
    }

    pub(crate) fn facts(&self) -> u64 {
        self.facts
    }

    pub(crate) fn touch_all_tables(&mut self) {
        self.touched.tables = true;
    }

    pub(crate) fn touch_service(&mut self, service: &ServiceName, touch: Touch) {
        match self.touched.services.get_mut(service) {
            Some(known) => *known = touch.max(*known),
            None => _ = self.touched.services.insert(service.clone(), touch),
        }
    }

    pub(crate) fn touch_application(&mut self, application: &AppName) {
        self.touched.applications.insert(application.clone());
    }

    /// What a cluster owes has changed.
    pub(crate) fn touch_cluster(&mut self, cluster: &Name) {
        self.touched.clusters.insert(cluster.clone());
    }

    pub(crate) fn is_settled(&self) -> bool {
        let touched = &self.touched;
        !touched.everything
            && !touched.tables
            && touched.services.is_empty()
            && touched.applications.is_empty()
            && touched.clusters.is_empty()
    }

    /// Brings everything up to date with `kb`.
    pub(crate) fn settle(&mut self, kb: &KnowledgeBase) {
        let touched = std::mem::take(&mut self.touched);
        let grants = |name: &AppName| {
            let state = kb.applications.get(name);
            state.is_some_and(|state| !state.spec.grants.is_empty())
        };
        let regranted = |name: &AppName| self.granting.contains(name) || grants(name);
        if touched.everything || touched.applications.iter().any(regranted) {
            self.rebuild(kb);
            self.everything = kb.index;
            return;
        }
        if touched.tables {
            self.all_tables = kb.index;
        }
        for cluster in touched.clusters {
            self.dirt.entry(cluster).or_default().orders = kb.index;
        }
        for application in &touched.applications {
            self.respecify(kb, application, touched.services.keys());
        }
        for (service, touch) in &touched.services {
            self.replace(kb, service, *touch);
        }
    }

    /// Asserts that it is as if made anew.
    #[cfg(test)]
    pub(crate) fn check(&self, kb: &KnowledgeBase) {
        assert!(self.is_settled());
        let new = Self::of(kb);
        assert_eq!(self.places, new.places);
        assert_eq!(self.hosted, new.hosted);
        assert_eq!(self.calls, new.calls);
        assert_eq!(self.told, new.told);
        assert_eq!(self.granting, new.granting);
    }

    fn rebuild(&mut self, kb: &KnowledgeBase) {
        self.dirt.clear();
        self.places.clear();
        self.hosted.clear();
        (self.calls, self.told) = (Links::default(), Links::default());
        let granting = |(name, state): (&AppName, &crate::base::AppState)| {
            (!state.spec.grants.is_empty()).then(|| name.clone())
        };
        self.granting = kb.applications.iter().filter_map(granting).collect();
        let mut slots = kb.slots.keys().peekable();
        while let Some(slot) = slots.next() {
            if slots.peek().is_none_or(|next| next.service != slot.service) {
                let bound = Bound::of(kb, &slot.service);
                self.put_places(&slot.service, bound.places);
                self.told.put(&slot.service, bound.calls);
            }
        }
        for name in kb.applications.keys() {
            for (caller, called) in links(kb, name) {
                self.calls.put(&caller, called);
            }
        }
    }

    fn put_places(&mut self, service: &ServiceName, places: BTreeSet<Place>) {
        for (cluster, node) in self.places.remove(service).unwrap_or_default() {
            let Some(nodes) = self.hosted.get_mut(&cluster) else {
                continue;
            };
            if let Some(services) = nodes.get_mut(&node) {
                services.remove(service);
                if services.is_empty() {
                    nodes.remove(&node);
                }
            }
            if nodes.is_empty() {
                self.hosted.remove(&cluster);
            }
        }
        for (cluster, node) in &places {
            let nodes = self.hosted.entry(cluster.clone()).or_default();
            let services = nodes.entry(node.clone()).or_default();
            services.insert(service.clone());
        }
        if !places.is_empty() {
            self.places.insert(service.clone(), places);
        }
    }

    /// The links of an application are other ones, its addresses and ports too; `gone` may be its services that are no
    /// more.
    fn respecify<'a>(
        &mut self,
        kb: &KnowledgeBase,
        application: &AppName,
        gone: impl Iterator<Item = &'a ServiceName>,
    ) {
        let of = |name: &&ServiceName| name.app() == *application;
        let mut links = links(kb, application);
        let mut services: BTreeSet<ServiceName> = gone.filter(of).cloned().collect();
        let first = application.service(&Name::least());
        let callers = self.calls.from.range(first.clone()..).map(|(name, _)| name);
        services.extend(callers.take_while(of).cloned());
        let placed = self.places.range(first..).map(|(name, _)| name);
        services.extend(placed.take_while(of).cloned());
        if let Some(state) = kb.applications.get(application) {
            let names = state.spec.services.keys();
            services.extend(names.map(|name| application.service(name)));
        }
        for service in &services {
            self.soil_around(kb, service);
            let called = links.remove(service).unwrap_or_default();
            self.calls.put(service, called);
        }
        for service in &services {
            self.replace(kb, service, Touch::Bindings);
            self.soil_around(kb, service);
            // Its callers are told its addresses.
            let callers: Vec<_> = self.told.callers_of(service).cloned().collect();
            for caller in callers {
                self.soil_orders(kb, &caller);
            }
        }
    }

    /// The bindings of a service are other ones.
    fn replace(&mut self, kb: &KnowledgeBase, service: &ServiceName, touch: Touch) {
        let Bound { places, calls } = Bound::of(kb, service);
        let before = self.places.get(service);
        let moved = before.map_or(!places.is_empty(), |before| *before != places);
        if moved {
            self.soil_around(kb, service);
            self.soil_orders(kb, service);
            self.put_places(service, places);
            self.soil_around(kb, service);
        } else {
            let concerned = self.concerned(kb, service);
            self.soil(kb, concerned);
        }
        if moved || touch == Touch::Bindings {
            self.told.put(service, calls);
            self.soil_orders(kb, service);
        }
    }

    fn soil_orders(&mut self, kb: &KnowledgeBase, service: &ServiceName) {
        for (cluster, _) in self.places.get(service).into_iter().flatten() {
            self.dirt.entry(cluster.clone()).or_default().orders = kb.index;
        }
    }

    /// The service, who calls it and whom it calls: peers of each other, with links between them.
    fn soil_around(&mut self, kb: &KnowledgeBase, service: &ServiceName) {
        let mut places = self.concerned(kb, service);
        let called = self.callable_from(kb, service);
        for service in called.iter().chain([service]) {
            places.extend(self.places.get(service).into_iter().flatten().cloned());
        }
        self.soil(kb, places);
    }

    fn soil(&mut self, kb: &KnowledgeBase, places: BTreeSet<Place>) {
        for (cluster, node) in places {
            let dirt = self.dirt.entry(cluster).or_default();
            dirt.tables = kb.index;
            dirt.nodes.insert(node, kb.index);
        }
    }
}

/// What a service's bindings say.
struct Bound {
    places: BTreeSet<Place>,
    calls: BTreeSet<ServiceName>,
}

impl Bound {
    fn of(kb: &KnowledgeBase, service: &ServiceName) -> Self {
        let slots = kb.slots.range(service.slot(0)..=service.slot(u32::MAX));
        let bindings = slots.flat_map(|(_, bindings)| bindings.values());
        let mut bound = Self {
            places: BTreeSet::new(),
            calls: BTreeSet::new(),
        };
        let mut last = None;
        for binding in bindings {
            let place = (binding.cluster.clone(), binding.node.clone());
            bound.places.insert(place);
            // Instances mostly run the same.
            if last != Some(&binding.template.calls) {
                bound.calls.extend(binding.template.calls.iter().cloned());
                last = Some(&binding.template.calls);
            }
        }
        bound
    }
}

/// The links of an application within its namespace, by caller.
fn links(kb: &KnowledgeBase, name: &AppName) -> BTreeMap<ServiceName, BTreeSet<ServiceName>> {
    let mut links: BTreeMap<_, BTreeSet<_>> = BTreeMap::new();
    let state = kb.applications.get(name);
    for link in state.into_iter().flat_map(|state| &state.spec.links) {
        if link.to.namespace == name.namespace {
            let called = links.entry(name.service(&link.from)).or_default();
            called.insert(link.to.clone());
        }
    }
    links
}
