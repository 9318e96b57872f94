//! What is looked up in the index.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
};

use super::{Index, Place};
use crate::{
    base::KnowledgeBase,
    goal::Grantee,
    name::{Name, ServiceName},
};

/// Which nodes' tables may differ.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Changed {
    /// Any.
    All,
    /// These.
    Nodes(Vec<String>),
}

impl Index {
    /// The services that `from` may call: those it links to (in another namespace only with a grant), and those
    /// that are granted to its namespace.
    pub(crate) fn callable_from(
        &self,
        kb: &KnowledgeBase,
        from: &ServiceName,
    ) -> BTreeSet<ServiceName> {
        let granted = |to: &Grantee| *to == Grantee::Namespace(from.namespace.clone());
        let mut services = self.granted(kb, granted);
        services.extend(self.calls.called_by(from).cloned());
        services
    }

    /// The services that are granted to whom `to` names.
    pub(crate) fn granted(
        &self,
        kb: &KnowledgeBase,
        to: impl Fn(&Grantee) -> bool,
    ) -> BTreeSet<ServiceName> {
        let mut services = BTreeSet::new();
        for name in &self.granting {
            let Some(state) = kb.applications.get(name) else {
                continue;
            };
            for grant in state.spec.grants.iter().filter(|grant| to(&grant.to)) {
                let of = |service: &Name| name.service(service);
                if grant.services.is_empty() {
                    services.extend(state.spec.services.keys().map(of));
                } else {
                    services.extend(grant.services.iter().map(of));
                }
            }
        }
        services
    }

    /// The nodes whose tables hold `service`.
    pub(crate) fn concerned(&self, kb: &KnowledgeBase, service: &ServiceName) -> BTreeSet<Place> {
        let mut nodes = BTreeSet::new();
        let callers = self.calls.callers_of(service);
        let places = callers.filter_map(|caller| self.places.get(caller));
        nodes.extend(
            places
                .flatten()
                .filter(|(_, node)| !node.is_empty())
                .cloned(),
        );
        if self.granting.is_empty() {
            return nodes;
        }
        for (caller, places) in &self.places {
            let granted = |to: &Grantee| *to == Grantee::Namespace(caller.namespace.clone());
            if self.granted(kb, granted).contains(service) {
                nodes.extend(places.iter().filter(|(_, node)| !node.is_empty()).cloned());
            }
        }
        for (name, cluster) in &kb.clusters {
            let to_hosts = |to: &Grantee| *to == Grantee::HostsOf(name.clone());
            if self.granted(kb, to_hosts).contains(service) {
                let all = cluster.nodes.keys();
                nodes.extend(all.map(|node| (name.clone(), node.clone())));
            }
        }
        nodes
    }

    /// The services with bindings on a node.
    pub(crate) fn on(&self, cluster: &Name, node: &str) -> impl Iterator<Item = &ServiceName> {
        let services = self.hosted.get(cluster).and_then(|nodes| nodes.get(node));
        services.into_iter().flatten()
    }

    /// The services with bindings in a cluster.
    pub(crate) fn within(&self, cluster: &Name) -> BTreeSet<&ServiceName> {
        let nodes = self
            .hosted
            .get(cluster)
            .into_iter()
            .flat_map(BTreeMap::values);
        nodes.flatten().collect()
    }
}

impl KnowledgeBase {
    /// Whether what `cluster` must run may have changed after entry `seen`.
    #[must_use]
    pub fn orders_changed(&self, cluster: &Name, seen: u64) -> bool {
        let dirt = self.lookup.dirt.get(cluster);
        !self.lookup.is_settled()
            || self.lookup.everything > seen
            || dirt.is_some_and(|dirt| dirt.orders > seen)
    }

    /// The nodes of `cluster` whose tables may have changed after entry `seen`.
    #[must_use]
    pub fn tables_changed(&self, cluster: &Name, seen: u64) -> Changed {
        let all = self.lookup.everything.max(self.lookup.all_tables);
        if !self.lookup.is_settled() || all > seen {
            return Changed::All;
        }
        let dirt = self
            .lookup
            .dirt
            .get(cluster)
            .filter(|dirt| dirt.tables > seen);
        let nodes = dirt.into_iter().flat_map(|dirt| &dirt.nodes);
        let newer = nodes.filter(|(_, at)| **at > seen);
        Changed::Nodes(newer.map(|(node, _)| node.clone()).collect())
    }

    /// The index, made anew where something was touched since.
    pub(crate) fn index(&self) -> Cow<'_, Index> {
        if self.lookup.is_settled() {
            Cow::Borrowed(&self.lookup)
        } else {
            Cow::Owned(Index::of(self))
        }
    }

    /// Brings the index up to date.
    pub fn settle(&mut self) {
        if !self.lookup.is_settled() {
            let mut lookup = std::mem::take(&mut self.lookup);
            lookup.settle(self);
            self.lookup = lookup;
        }
    }
}
