//! What the daemon says of itself to those who observe it.

use std::{collections::BTreeMap, sync::Arc};

use super::node::Node;
use crate::observe::{Ask, Names};

impl Node {
    /// Answers one who observes; who is gone needs no answer.
    pub(super) fn explain(&mut self, ask: Ask) {
        match ask {
            Ask::Names(reply) => {
                let _ = reply.send(self.names());
            }
        }
    }

    /// What the numbers stand for now.
    fn names(&mut self) -> Arc<Names> {
        if let Some(names) = &self.names {
            return names.clone();
        }
        let node = &self.parts.settings.node;
        let names = Arc::new(match &self.table {
            Some(table) => Names::of(node, table, self.planner.have(), &self.attachments),
            None => Names {
                node: node.clone(),
                ..Names::default()
            },
        });
        self.names = Some(names.clone());
        names
    }

    /// Entries in use, of the maps that user space fills.
    pub(super) fn map_entries(&self) -> BTreeMap<&'static str, u64> {
        let have = self.planner.have();
        let slots = have.runs.values().map(|run| run.len() as u64).sum();
        BTreeMap::from([
            ("ENDPOINTS", have.endpoints.len() as u64),
            ("LOCAL", have.local.len() as u64),
            ("VIPS", have.vips.len() as u64),
            ("SLOTS", slots),
            ("BACKENDS", have.backends.len() as u64),
        ])
    }
}
