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

use ebpf_common::layout::{self, Addr, VipKey};
use netmanager_api::table::{Service, Table};

use super::{
    Inputs, KernelState, Op, Touched,
    counters::Counters,
    desired::{self, vip_entries},
    diff,
    indexes::Indexes,
    runs::Runs,
};
use crate::policy::{self, Candidate, Chosen, Follows, Sight};

/// How much the maps hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacity {
    /// Elements of `BACKENDS`.
    pub backends: u32,
    /// Elements of `SLOTS`.
    pub slots: u32,
    /// Entries of `VIPS`.
    pub vips: u32,
    /// Elements of `VIP_COUNTS`.
    pub counters: u32,
}

/// A map that is too small for the table.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Shortage {
    /// No free backend index.
    #[error(
        "service {service} has backends that find no room among {capacity}: raise --backends and start again (dead backends keep their place for 120 s)"
    )]
    Backends {
        /// The service.
        service: String,
        /// Elements of `BACKENDS`.
        capacity: u32,
    },
    /// No free run that is long enough.
    #[error(
        "service {service} finds no {length} free slots in a row among {capacity}: raise --slots and start again"
    )]
    Slots {
        /// The service.
        service: String,
        /// Length of the run.
        length: u32,
        /// Elements of `SLOTS`.
        capacity: u32,
    },
    /// No room for another declared port.
    #[error(
        "service {service} has ports that find no room among {capacity}: raise --vips and start again"
    )]
    Vips {
        /// The service.
        service: String,
        /// Entries of `VIPS`.
        capacity: u32,
    },
}

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

    /// Plans one service anew; tells what found no room.
    fn plan_service(
        &mut self,
        service: &Service,
        inputs: &Inputs<'_>,
        planned: &mut Planned,
        now: Duration,
    ) -> Option<Shortage> {
        let (mut candidates, mut shortage) = self.hold_backends(service, planned, now);
        for (candidate, _) in &mut candidates {
            candidate.load = inputs.sight.load.get(&candidate.identity).copied();
            candidate.carbon_g_kwh = self.carbon.get(&candidate.node).copied();
        }
        let mut vips = BTreeSet::new();
        let mut runs = BTreeSet::new();
        for vip in &service.vips {
            let counter = self.counters.hold(desired::addr(vip.addr6));
            for (address, slots) in desired::families(vip, &candidates, inputs, &mut planned.chosen)
            {
                let (slot_count, length) = (slots.len() as u32, slots.len() as u32);
                let base = self.run(slots, &planned.runs, &runs);
                let Some(slot_base) = base else {
                    shortage.get_or_insert(Shortage::Slots {
                        service: service.name.clone(),
                        length,
                        capacity: self.capacity.slots,
                    });
                    self.keep(address, planned, &mut vips, &mut runs);
                    continue;
                };
                if slot_count > 0 {
                    runs.insert(slot_base);
                }
                let entry = layout::Vip {
                    slot_base,
                    slot_count,
                    service: service.number,
                    target_port_be: 0,
                    policy: vip.policy.0.code(),
                    flags: 0,
                    counter,
                };
                for (key, entry) in vip_entries(address, entry, &service.ports) {
                    if self.put_vip(key, entry) {
                        vips.insert(key);
                    } else {
                        shortage.get_or_insert(Shortage::Vips {
                            service: service.name.clone(),
                            capacity: self.capacity.vips,
                        });
                    }
                }
            }
        }
        self.drop_vips(service.number, planned.vips.difference(&vips), now);
        for &base in planned.runs.difference(&runs) {
            self.runs.release(base, now);
        }
        planned.vips = vips;
        planned.runs = runs;
        shortage
    }

    /// Gives every backend of a service its index; those that new flows may pick are returned, with whether they
    /// have an IPv4 address.
    fn hold_backends(
        &mut self,
        service: &Service,
        planned: &mut Planned,
        now: Duration,
    ) -> (Vec<(Candidate, bool)>, Option<Shortage>) {
        let mut held: BTreeMap<u32, layout::Backend> = BTreeMap::new();
        let mut candidates = BTreeMap::new();
        let mut shortage = None;
        for backend in &service.backends {
            let Some(mut entry) = desired::backend(backend) else {
                continue;
            };
            let Some((index, is_new)) = self.indexes.take(entry.addr6, now) else {
                shortage.get_or_insert_with(|| Shortage::Backends {
                    service: service.name.clone(),
                    capacity: self.capacity.backends,
                });
                continue;
            };
            if is_new {
                self.given.push(index);
            }
            if !held.contains_key(&index) && !planned.backends.contains_key(&index) {
                self.indexes.hold(index);
            }
            entry.generation = match (held.get(&index), self.want.backends.get(&index)) {
                (Some(same), _) => same.generation,
                (None, Some(old)) if is_new => old.generation.wrapping_add(1).max(1),
                (None, Some(same)) => same.generation,
                (None, None) => 1,
            };
            let is_ready = entry.flags & layout::BACKEND_LIVE != 0;
            if is_ready || !held.contains_key(&index) {
                held.insert(index, entry);
            }
            if is_ready {
                let candidate = Candidate {
                    index,
                    identity: backend.addr6.to_bits(),
                    instance: backend.instance,
                    epoch: backend.epoch,
                    node: backend.node,
                    ..Candidate::default()
                };
                candidates.insert(candidate.identity, (candidate, backend.addr4.is_some()));
            }
        }
        let before = std::mem::take(&mut planned.backends);
        for (&index, entry) in &held {
            let is_ready = entry.flags & layout::BACKEND_LIVE != 0;
            let was_ready = before.get(&index).is_some_and(|ready| *ready);
            self.indexes.say(index, was_ready, is_ready);
            planned.backends.insert(index, is_ready);
            self.put_backend(index, self.stated(index, *entry));
        }
        for (&index, &was_ready) in before.iter().filter(|(index, _)| !held.contains_key(index)) {
            self.release_backend(index, was_ready, now);
        }
        (candidates.into_values().collect(), shortage)
    }

    /// A run that holds `slots`: one that the service has, else a new one; `None` where there is no room. Equal
    /// runs of a service are shared.
    fn run(&mut self, slots: Vec<u32>, old: &BTreeSet<u32>, new: &BTreeSet<u32>) -> Option<u32> {
        if slots.is_empty() {
            return Some(0);
        }
        let is_same = |base: &&u32| self.want.runs.get(base) == Some(&slots);
        if let Some(&base) = new.iter().chain(old).find(is_same) {
            return Some(base);
        }
        let base = self.runs.take(slots.len() as u32)?;
        self.want.runs.insert(base, slots);
        self.touch(|touched| touched.runs.insert(base));
        Some(base)
    }

    /// Leaves the entries of one VIP address as they are.
    fn keep(
        &self,
        address: Addr,
        planned: &Planned,
        vips: &mut BTreeSet<VipKey>,
        runs: &mut BTreeSet<u32>,
    ) {
        for key in planned.vips.iter().filter(|key| key.addr == address) {
            vips.insert(*key);
            if let Some(vip) = self.want.vips.get(key).filter(|vip| vip.slot_count > 0) {
                runs.insert(vip.slot_base);
            }
        }
    }

    /// False where there is no room.
    fn put_vip(&mut self, key: VipKey, vip: layout::Vip) -> bool {
        let known = self.want.vips.get(&key);
        if known.is_none() && self.want.vips.len() as u32 >= self.capacity.vips {
            return false;
        }
        if known != Some(&vip) {
            self.want.vips.insert(key, vip);
            self.touch(|touched| touched.vips.insert(key));
        }
        true
    }

    /// Removes entries, but for those that another service has taken meanwhile.
    fn drop_vips<'a>(
        &mut self,
        service: u32,
        keys: impl Iterator<Item = &'a VipKey>,
        now: Duration,
    ) {
        for key in keys {
            if self
                .want
                .vips
                .get(key)
                .is_some_and(|vip| vip.service == service)
            {
                self.want.vips.remove(key);
                self.counters.rest(key, now);
                self.touch(|touched| touched.vips.insert(*key));
            }
        }
    }

    fn put_backend(&mut self, index: u32, backend: layout::Backend) {
        if self.want.backends.get(&index) != Some(&backend) {
            self.want.backends.insert(index, backend);
            self.touch(|touched| touched.backends.insert(index));
        }
    }

    /// A backend in the state that the services give it that name it: one address is one backend, and ready where one
    /// of them says so.
    fn stated(&self, index: u32, backend: layout::Backend) -> layout::Backend {
        let flags = if self.indexes.is_ready(index) {
            layout::BACKEND_LIVE
        } else {
            layout::BACKEND_DRAINING
        };
        layout::Backend { flags, ..backend }
    }

    /// A service that said `was_ready` of a backend names it no more.
    fn release_backend(&mut self, index: u32, was_ready: bool, now: Duration) {
        self.indexes.say(index, was_ready, false);
        if self.indexes.release(index) {
            self.bury(index, now);
        } else if let Some(&backend) = self.want.backends.get(&index) {
            self.put_backend(index, self.stated(index, backend));
        }
    }

    fn bury(&mut self, index: u32, now: Duration) {
        self.indexes.bury(index, now);
        if let Some(&backend) = self.want.backends.get(&index) {
            self.put_backend(
                index,
                layout::Backend {
                    flags: 0,
                    ..backend
                },
            );
        }
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

    /// Takes a service out of the maps.
    fn forget(&mut self, number: u32, planned: &Planned, now: Duration) {
        self.drop_vips(number, planned.vips.iter(), now);
        for &base in &planned.runs {
            self.runs.release(base, now);
        }
        for (&index, &was_ready) in &planned.backends {
            self.release_backend(index, was_ready, now);
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

/// The nodes and backends that are seen otherwise than before.
#[derive(Debug, Default)]
struct Moved {
    /// They began or ceased to answer.
    reach: BTreeSet<u32>,
    /// They are nearer or farther.
    distance: BTreeSet<u32>,
    /// Their power is another.
    carbon: BTreeSet<u32>,
    /// Backends that are loaded more or less, and all that have a load when another round began.
    load: BTreeSet<u128>,
}

impl Moved {
    fn between(before: &Sight, now: &Sight) -> Self {
        let mut moved = Self {
            reach: before
                .unreachable
                .symmetric_difference(&now.unreachable)
                .copied()
                .collect(),
            ..Self::default()
        };
        for (before, now) in [
            (&before.rtt_us, &now.rtt_us),
            (&before.estimated_us, &now.estimated_us),
        ] {
            super::merge(before, now, |node, _, _| {
                moved.distance.insert(*node);
            });
        }
        super::merge(&before.load, &now.load, |identity, _, _| {
            moved.load.insert(*identity);
        });
        if before.round != now.round {
            moved.load.extend(now.load.keys());
        }
        moved
    }

    /// Whether this may change where a service's flows go.
    fn concerns(&self, service: &Service) -> bool {
        let follows = service
            .vips
            .iter()
            .map(|vip| policy::follows(vip.policy.0))
            .fold(Follows::default(), Follows::or);
        let is_any = !self.reach.is_empty()
            || follows.distance && !self.distance.is_empty()
            || follows.carbon && !self.carbon.is_empty()
            || follows.load && !self.load.is_empty();
        is_any
            && service.backends.iter().any(|backend| {
                self.reach.contains(&backend.node)
                    || follows.distance && self.distance.contains(&backend.node)
                    || follows.carbon && self.carbon.contains(&backend.node)
                    || follows.load && self.load.contains(&backend.addr6.to_bits())
            })
    }
}
