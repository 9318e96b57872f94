//! The invariants of DESIGN section 6, looked after while a simulation runs.

use std::collections::BTreeMap;

use control_core::base::{KnowledgeBase, REST_MS};

use crate::host::LeadHost;

/// Every state that a lead was seen in.
#[derive(Debug, Default)]
pub(crate) struct Watch {
    states: BTreeMap<u64, KnowledgeBase>,
    /// The last state of each lead.
    seen: BTreeMap<usize, u64>,
}

impl Watch {
    /// Looks at a lead.
    ///
    /// # Errors
    /// When two leads, or one before and after a restart, hold different states at one index (I1).
    pub(crate) fn look(&mut self, host: &LeadHost) -> Result<(), String> {
        let seen = self.seen.get(&host.id).copied();
        let state = host.read(|base| (Some(base.index) != seen).then(|| base.clone()));
        let Some(Some(state)) = state else {
            return Ok(());
        };
        let index = state.index;
        self.seen.insert(host.id, index);
        match self.states.get(&index) {
            None => {
                self.states.insert(index, state);
                Ok(())
            }
            Some(known) if *known == state => Ok(()),
            Some(_) => Err(format!(
                "I1: lead {} holds another state at index {index} than was seen there before",
                host.id
            )),
        }
    }

    /// Looks at all states in the order of the log.
    ///
    /// # Errors
    /// When an address names a second service too early (I2).
    pub(crate) fn review(&self) -> Result<(), String> {
        // What each number named last, and the log time when it still did.
        let mut named: BTreeMap<(&str, u32), (String, u64)> = BTreeMap::new();
        for (index, state) in &self.states {
            for (name, service) in &state.services {
                let numbers4 = service.number4.map(|number| ("IPv4", number));
                for number in [Some(("IPv6", service.number6)), numbers4]
                    .into_iter()
                    .flatten()
                {
                    let (name, now) = (name.to_string(), state.log_time_ms);
                    match named.insert(number, (name.clone(), now)) {
                        Some((before, at)) if before != name && now < at + REST_MS => {
                            return Err(format!(
                                "I2: {} number {} names {name} at index {index}, {} ms after {before}",
                                number.0,
                                number.1,
                                now - at
                            ));
                        }
                        _ => {}
                    }
                }
            }
        }
        Ok(())
    }

    /// The newest state that any lead has shown.
    pub(crate) fn newest(&self) -> Option<&KnowledgeBase> {
        self.states.values().next_back()
    }

    /// The index that a lead was last seen at.
    pub(crate) fn index_of(&self, host: usize) -> Option<u64> {
        self.seen.get(&host).copied()
    }
}
