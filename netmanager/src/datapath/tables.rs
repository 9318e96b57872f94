//! The maps that user space alone writes.

use std::path::Path;

use ebpf_common::layout::{Addr, Backend, Config, Endpoint, Vip, VipKey};

use super::{DatapathError, batch::Batch, direct::Direct, raw::Raw};
use crate::plan::{Capacity, KernelState, Op};

/// See the module.
pub(super) struct Tables {
    config: Batch<u32, Raw<Config>>,
    endpoints: Batch<u32, Raw<Endpoint>>,
    local: Batch<Raw<Addr>, Raw<Endpoint>>,
    direct: Direct,
    vips: Batch<Raw<VipKey>, Raw<Vip>>,
    slots: Batch<u32, u32>,
    backends: Batch<u32, Raw<Backend>>,
}

impl Tables {
    /// Opens the maps that are pinned in `maps`.
    pub(super) fn open(maps: &Path) -> Result<Self, DatapathError> {
        let path = |name| maps.join(name);
        let tables = Self {
            config: Batch::open("CONFIG", &path("CONFIG"))?,
            endpoints: Batch::open("ENDPOINTS", &path("ENDPOINTS"))?,
            local: Batch::open("LOCAL", &path("LOCAL"))?,
            direct: Direct::open(maps)?,
            vips: Batch::open("VIPS", &path("VIPS"))?,
            slots: Batch::open("SLOTS", &path("SLOTS"))?,
            backends: Batch::open("BACKENDS", &path("BACKENDS"))?,
        };
        tables.direct.rebuild(&tables.endpoints, &tables.local)?;
        Ok(tables)
    }

    /// How much the planner may give out.
    pub(super) fn capacity(&self, counters: u32) -> Result<Capacity, DatapathError> {
        Ok(Capacity {
            backends: self.backends.capacity()?,
            slots: self.slots.capacity()?,
            vips: self.vips.capacity()?,
            counters,
        })
    }

    /// What the maps hold.
    pub(super) fn state(&self) -> Result<KernelState, DatapathError> {
        let mut state = KernelState::default();
        self.config.each(|_, config| {
            state.config = (config.0 != Config::default()).then_some(config.0);
        })?;
        self.endpoints.each(|key, value| {
            state.endpoints.insert(key, value.0);
        })?;
        self.local.each(|key, value| {
            state.local.insert(key.0, value.0);
        })?;
        self.vips.each(|key, value| {
            state.vips.insert(key.0, value.0);
        })?;
        self.backends.each(|index, backend| {
            if backend.0 != Backend::default() {
                state.backends.insert(index, backend.0);
            }
        })?;
        let mut slots = Vec::new();
        self.slots.each(|_, slot| slots.push(slot))?;
        for vip in state.vips.values().filter(|vip| vip.slot_count > 0) {
            let end = vip.slot_base as usize + vip.slot_count as usize;
            // A run that ends outside is nobody's; its VIPs are pointed elsewhere.
            if let Some(run) = slots.get(vip.slot_base as usize..end) {
                state.runs.insert(vip.slot_base, run.to_vec());
            }
        }
        Ok(state)
    }

    /// Does writes in their order; those in a row that go to one map go together.
    pub(super) fn apply(&self, ops: &[Op]) -> Result<(), DatapathError> {
        let kind = |op: &Op| std::mem::discriminant(op);
        for group in ops.chunk_by(|a, b| kind(a) == kind(b)) {
            self.apply_alike(group)?;
        }
        Ok(())
    }

    /// Writes of one kind.
    fn apply_alike(&self, ops: &[Op]) -> Result<(), DatapathError> {
        let mut backends = Entries::default();
        let mut slots = Entries::default();
        let mut endpoints = Entries::default();
        let mut local = Entries::default();
        let mut vips = Entries::default();
        for op in ops {
            match op {
                Op::Config(config) => {
                    let config = Raw(config.unwrap_or_default());
                    self.config.put(&[0], &[config])?;
                }
                Op::Endpoint(key, Some(value)) => endpoints.push(*key, Raw(*value)),
                Op::Endpoint(key, None) => {
                    self.direct.link(*key, None)?;
                    self.endpoints.remove(key)?;
                }
                Op::Local(key, Some(value)) => local.push(Raw(*key), Raw(*value)),
                Op::Local(key, None) => {
                    self.direct.address(key, None)?;
                    self.local.remove(&Raw(*key))?;
                }
                Op::Vip(key, Some(value)) => vips.push(Raw(*key), Raw(*value)),
                Op::Vip(key, None) => {
                    self.vips.remove(&Raw(*key))?;
                }
                Op::Backend(index, value) => backends.push(*index, Raw(value.unwrap_or_default())),
                Op::Run(base, run) => {
                    for (slot, backend) in (*base..).zip(run) {
                        slots.push(slot, *backend);
                    }
                }
                Op::DropRun(base, length) => {
                    for slot in *base..base.saturating_add(*length) {
                        slots.push(slot, 0);
                    }
                }
            }
        }
        backends.put(&self.backends)?;
        slots.put(&self.slots)?;
        endpoints.put(&self.endpoints)?;
        local.put(&self.local)?;
        vips.put(&self.vips)?;
        for op in ops {
            match op {
                Op::Endpoint(key, Some(value)) => self.direct.link(*key, Some(value))?,
                Op::Local(key, Some(value)) => self.direct.address(key, Some(value))?,
                _ => {}
            }
        }
        Ok(())
    }
}

/// What goes to one map together.
struct Entries<K, V> {
    keys: Vec<K>,
    values: Vec<V>,
}

impl<K, V> Default for Entries<K, V> {
    fn default() -> Self {
        Self {
            keys: Vec::new(),
            values: Vec::new(),
        }
    }
}

impl<K: aya::Pod, V: aya::Pod> Entries<K, V> {
    fn push(&mut self, key: K, value: V) {
        self.keys.push(key);
        self.values.push(value);
    }

    fn put(self, map: &Batch<K, V>) -> Result<(), DatapathError> {
        if !self.keys.is_empty() {
            map.put(&self.keys, &self.values)?;
        }
        Ok(())
    }
}
