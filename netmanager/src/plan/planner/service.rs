//! One service: its backends' indexes, its runs of slots, its entries in `VIPS`.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use ebpf_common::layout::{self, Addr, VipKey};
use netmanager_api::table::Service;

use super::{Planned, Planner};
use crate::{
    plan::{
        Inputs, Shortage,
        desired::{self, vip_entries},
    },
    policy::Candidate,
};

impl Planner {
    /// Plans one service anew; tells what found no room.
    pub(super) fn plan_service(
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

    pub(super) fn bury(&mut self, index: u32, now: Duration) {
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

    /// Takes a service out of the maps.
    pub(super) fn forget(&mut self, number: u32, planned: &Planned, now: Duration) {
        self.drop_vips(number, planned.vips.iter(), now);
        for &base in &planned.runs {
            self.runs.release(base, now);
        }
        for (&index, &was_ready) in &planned.backends {
            self.release_backend(index, was_ready, now);
        }
    }
}
