//! Who calls whom, to be asked from both ends.

use std::collections::{BTreeMap, BTreeSet};

use crate::name::ServiceName;

/// Links, by both ends.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Links {
    pub(super) from: BTreeMap<ServiceName, BTreeSet<ServiceName>>,
    to: BTreeMap<ServiceName, BTreeSet<ServiceName>>,
}

impl Links {
    /// Makes `called` all that `caller` calls.
    pub(super) fn put(&mut self, caller: &ServiceName, called: BTreeSet<ServiceName>) {
        if self
            .from
            .get(caller)
            .map_or(called.is_empty(), |it| *it == called)
        {
            return;
        }
        for service in self.from.remove(caller).unwrap_or_default() {
            if let Some(callers) = self.to.get_mut(&service) {
                callers.remove(caller);
                if callers.is_empty() {
                    self.to.remove(&service);
                }
            }
        }
        for service in &called {
            let callers = self.to.entry(service.clone()).or_default();
            callers.insert(caller.clone());
        }
        if !called.is_empty() {
            self.from.insert(caller.clone(), called);
        }
    }

    pub(super) fn called_by(&self, caller: &ServiceName) -> impl Iterator<Item = &ServiceName> {
        self.from.get(caller).into_iter().flatten()
    }

    pub(super) fn callers_of(&self, called: &ServiceName) -> impl Iterator<Item = &ServiceName> {
        self.to.get(called).into_iter().flatten()
    }
}
