//! The planner: remembers what it planned, and plans again only what changed.
//!
//! ```text
//!  table ---service by service, against the last one---> changed services ---> want, touched
//!  sight ---node by node, against the last one---------> concerned services ----^
//! ```
//!
//! All that it remembers can be told from the kernel's maps ([`Planner::adopt`]), so that a restarted daemon goes
//! on: which service has which VIPs and runs, who has which index. A service whose run or backends find no room
//! keeps what it had, so far as it is true, and is planned again each time until there is room; the others do not
//! wait for it.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use ebpf_common::layout::{Addr, VipKey};
use netmanager_api::table::Table;

use self::moved::Moved;
use super::{
    Inputs, KernelState, Op, Touched,
    counters::Counters,
    desired, diff,
    indexes::Indexes,
    room::{Capacity, Shortage},
    runs::Runs,
};
use crate::policy::{Chosen, Sight};

mod moved;
mod service;

/// See the module.
#[derive(Clone, Debug)]
pub struct Planner {
    capacity: Capacity,
    indexes: Indexes,
    runs: Runs,
    counters: Counters,
    /// Indexes that were given to a backend since somebody asked.
    given: Vec<u32>,
    /// What the maps hold, as far as this side knows.
    have: KernelState,
    want: KernelState,
    /// Where the two may differ; `None` is everywhere.
    touched: Option<Touched>,
    /// By number.
    services: BTreeMap<u32, Planned>,
    /// What was planned last.
    last: Option<(Arc<Table>, Sight)>,
    /// Carbon intensity of each node's power, gCO2e/kWh, as the last table says.
    carbon: BTreeMap<u32, u32>,
}

/// What a service has in the maps.
#[derive(Clone, Debug, Default)]
struct Planned {
    /// Its position in the last table.
    at: usize,
    vips: BTreeSet<VipKey>,
    runs: BTreeSet<u32>,
    /// The indexes of its backends, and whether it says that new flows may pick them.
    backends: BTreeMap<u32, bool>,
    /// What its policies chose last.
    chosen: Chosen,
    /// Something found no room: it is planned again.
    is_short: bool,
}

impl Planner {
    /// A planner that goes on from what a predecessor left in the kernel.
    #[must_use]
    pub fn adopt(capacity: Capacity, mut have: KernelState, now: Duration) -> Self {
        let mut indexes = Indexes::new(capacity.backends);
        for (&index, backend) in &have.backends {
            indexes.adopt(index, backend.addr6);
            if backend.flags == 0 {
                indexes.bury(index, now);
            }
        }
        let mut services: BTreeMap<u32, Planned> = BTreeMap::new();
        let mut runs = Runs::new(capacity.slots);
        for (key, vip) in &have.vips {
            let planned = services.entry(vip.service).or_default();
            planned.vips.insert(*key);
            let is_new = vip.slot_count > 0 && !planned.runs.contains(&vip.slot_base);
            // What overlaps is nobody's: whoever points there is pointed elsewhere by the next plan.
            if is_new && runs.adopt(vip.slot_base, vip.slot_count) {
                planned.runs.insert(vip.slot_base);
            }
        }
        // What no VIP points at is nobody's.
        let pointed: BTreeSet<u32> = services
            .values()
            .flat_map(|one| &one.runs)
            .copied()
            .collect();
        have.runs.retain(|base, _| pointed.contains(base));
        Self {
            capacity,
            indexes,
            runs,
            counters: Counters::adopt(capacity.counters, &have.vips),
            given: Vec::new(),
            want: have.clone(),
            have,
            touched: Some(Touched::default()),
            services,
            last: None,
            carbon: BTreeMap::new(),
        }
    }

    /// What the maps hold.
    #[must_use]
    pub fn have(&self) -> &KernelState {
        &self.have
    }

    /// The index of the backend with this IPv6 address.
    #[must_use]
    pub fn index_of(&self, addr6: Addr) -> Option<u32> {
        self.indexes.get(addr6)
    }

    /// What was given to a new owner since this was asked last, whose counts are to start from zero: elements
    /// of `VIP_COUNTS` and of `BACKEND_COUNTS`.
    pub fn take_given(&mut self) -> (Vec<u32>, Vec<u32>) {
        (self.counters.take_given(), std::mem::take(&mut self.given))
    }

    /// Whether planning the same again would change something: a run rests, or a service found no room.
    #[must_use]
    pub fn is_resting(&self) -> bool {
        self.runs.is_resting()
    }

    /// Plans `inputs`.
    ///
    /// # Errors
    /// The first of the services that found no room; everything else is planned.
    pub fn plan(&mut self, inputs: &Inputs<'_>, now: Duration) -> Result<(), Shortage> {
        self.collect(now);
        self.want.config = Some(desired::config(inputs));
        self.plan_endpoints(inputs);
        let last = self.last.take();
        let mut moved = match &last {
            Some((_, sight)) => Moved::between(sight, inputs.sight),
            None => Moved::default(),
        };
        let carbon = desired::carbon(inputs.table);
        super::merge(&self.carbon, &carbon, |node, _, _| {
            moved.carbon.insert(*node);
        });
        self.carbon = carbon;
        let is_same_node =
            matches!(&last, Some((table, _)) if table.node.number == inputs.table.node.number);
        let mut before = std::mem::take(&mut self.services);
        let mut shortage = None;
        let mut changed = Vec::new();
        for (at, service) in inputs.table.services.iter().enumerate() {
            let mut planned = before.remove(&service.number).unwrap_or_default();
            let is_known = is_same_node
                && !planned.is_short
                && !moved.concerns(service)
                && last
                    .as_ref()
                    .and_then(|(table, _)| table.services.get(planned.at))
                    .is_some_and(|known| known == service);
            planned.at = at;
            self.services.insert(service.number, planned);
            if !is_known {
                changed.push(service);
            }
        }
        // Those that go make room first.
        for (number, planned) in before {
            self.forget(number, &planned, now);
        }
        for service in changed {
            let mut planned = self.services.remove(&service.number).unwrap_or_default();
            let short = self.plan_service(service, inputs, &mut planned, now);
            planned.is_short = short.is_some();
            shortage = shortage.or(short);
            self.services.insert(service.number, planned);
        }
        if last.is_none() {
            self.bury_unheld(now);
        }
        self.last = Some((inputs.table.clone(), inputs.sight.clone()));
        shortage.map_or(Ok(()), Err)
    }

    /// The writes that make the maps as planned.
    #[must_use]
    pub fn writes(&self) -> Vec<Op> {
        match &self.touched {
            Some(touched) => touched.diff(&self.have, &self.want),
            None => diff(&self.have, &self.want),
        }
    }

    /// The writes were done.
    pub fn wrote(&mut self, ops: &[Op]) {
        for op in ops {
            self.have.apply(op);
        }
        self.touched = Some(Touched::default());
    }

    /// Some of the writes were done, it is not known which: the maps were read back.
    pub fn read_back(&mut self, have: KernelState) {
        self.have = have;
        self.touched = None;
    }

    fn touch(&mut self, note: impl FnOnce(&mut Touched) -> bool) {
        if let Some(touched) = &mut self.touched {
            note(touched);
        }
    }

    fn plan_endpoints(&mut self, inputs: &Inputs<'_>) {
        let mut endpoints = BTreeMap::new();
        let mut local = BTreeMap::new();
        for endpoint in desired::endpoints(inputs) {
            endpoints.insert(endpoint.ifindex, endpoint);
            local.insert(endpoint.addr6, endpoint);
            if endpoint.addr4 != Addr::default() {
                local.insert(endpoint.addr4, endpoint);
            }
        }
        if let Some(touched) = &mut self.touched {
            super::merge(&self.want.endpoints, &endpoints, |key, _, _| {
                touched.endpoints.insert(*key);
            });
            super::merge(&self.want.local, &local, |key, _, _| {
                touched.local.insert(*key);
            });
        }
        self.want.endpoints = endpoints;
        self.want.local = local;
    }

    /// What a predecessor left alive and no service names.
    fn bury_unheld(&mut self, now: Duration) {
        let unheld: Vec<u32> = self
            .want
            .backends
            .keys()
            .copied()
            .filter(|index| !self.indexes.is_held(*index))
            .collect();
        for index in unheld {
            self.bury(index, now);
        }
    }

    /// Frees what has rested.
    fn collect(&mut self, now: Duration) {
        for base in self.runs.collect(now) {
            self.want.runs.remove(&base);
            self.touch(|touched| touched.runs.insert(base));
        }
    }
}
