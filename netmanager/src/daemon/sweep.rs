//! The walks over the flows: what is garbage goes, the accounts are kept true, drains are counted.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use ebpf_common::layout::{PROTO_UDP, Settled, VIP_FOLLOW, Vip, VipKey};

use super::{monotonic, node::Node};
use crate::{
    datapath::DatapathError,
    follow::chain,
    janitor::{Census, Facts},
    tickle::Deaths,
};

/// Pages of 1,024 flows judged in a tick: a bounded share of one CPU. Full maps of the usual size are through
/// after fourteen passes, and after four where somebody waits.
const PAGES: usize = 16;
const PAGES_WHILE_AWAITED: usize = 64;
/// Where nobody waits, flows are looked at every so many ticks.
const SWEEP_TICKS: u64 = 5;

impl Node {
    /// Judges the next flows.
    pub(super) fn sweep(&mut self) {
        if let Err(error) = self.try_sweep() {
            tracing::warn!(error = chain(&error), "failed to look at the flows");
        }
    }

    fn try_sweep(&mut self) -> Result<(), DatapathError> {
        let is_awaited = !self.pressed.is_empty() || self.draining().next().is_some();
        if !is_awaited && !self.ticks.is_multiple_of(SWEEP_TICKS) {
            return Ok(());
        }
        let pages = if is_awaited {
            PAGES_WHILE_AWAITED
        } else {
            PAGES
        };
        for _ in 0..pages {
            if self.janitor.is_at_start() {
                self.books.begin(self.accounts.counted()?);
            }
            let step = self.janitor.step(Facts {
                backends: &self.planner.have().backends,
                pressed: &self.pressed,
                is_ending: self.deaths.borrow().count > *self.ended.borrow(),
                now: monotonic(),
            });
            let collected = self.books.collect(&self.janitor.take_removed());
            self.settle(collected)?;
            if let Some(census) = step? {
                return self.close_walk(census);
            }
        }
        Ok(())
    }

    fn close_walk(&mut self, census: Census) -> Result<(), DatapathError> {
        let counted = self.accounts.counted()?;
        let vanished = self.books.end(&counted, &census.found);
        self.settle(vanished)?;
        let endpoints = self.planner.have().endpoints.values();
        let present: BTreeSet<u32> = endpoints.map(|endpoint| endpoint.number).collect();
        for number in self.books.close(&counted, &present) {
            self.accounts.close(number)?;
        }
        self.pressed = self.books.pressed(&counted, self.parts.settings.quota);
        self.parts.gauges.send_modify(|gauges| {
            gauges.flows = census.kept.clone();
            gauges.flows_removed += census.removed;
        });
        self.census = Some(census);
        Ok(())
    }

    /// Has the flows ended whose backends died since the last time.
    pub(super) fn mourn(&mut self, died: bool) {
        let before = self.deaths.borrow().count;
        // After a start nobody knows what the predecessor has told.
        if !died && before > 0 {
            return;
        }
        let have = self.planner.have();
        let endpoints = have.endpoints.values();
        let follows = |key: &VipKey, vip: &Vip| {
            (key.proto == PROTO_UDP && vip.flags & VIP_FOLLOW != 0)
                .then_some((key.addr, key.port_be))
        };
        self.deaths.send_replace(Arc::new(Deaths {
            count: before + 1,
            following: have
                .vips
                .iter()
                .filter_map(|(key, vip)| follows(key, vip))
                .collect(),
            backends: have.backends.clone(),
            endpoints: endpoints
                .map(|endpoint| (endpoint.number, *endpoint))
                .collect(),
        }));
    }

    fn settle(&mut self, changed: BTreeMap<u32, Settled>) -> Result<(), DatapathError> {
        changed
            .into_iter()
            .try_for_each(|(number, settled)| self.accounts.settle(number, settled))
    }
}
