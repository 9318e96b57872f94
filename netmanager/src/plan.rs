//! What the kernel's maps should hold, what they hold, and the writes between the two.
//!
//! ```text
//!  table, endpoints, sight --Planner--> KernelState --diff(have, want)--> [Op] --Datapath--> maps
//! ```
//!
//! The [`Planner`] plans again only the services that changed and notes which entries it touched, so that the
//! cost of a change does not grow with the table. Nothing here does I/O or reads a clock. The invariant (I4):
//! applying `diff(a, b)` to `a` gives `b`, and then the difference is empty. The order of the writes is part
//! of the result: a VIP never points at a run or a backend that is not there yet, and a backend loses its flows
//! only after the VIPs have left it.

use std::{
    cmp::Ordering,
    collections::{BTreeMap, BTreeSet},
};

use ebpf_common::layout::{self, Addr, VipKey};

mod counters;
mod desired;
mod indexes;
mod planner;
mod room;
mod runs;

pub use desired::{Inputs, NodeEndpoint, PodEndpoint, TunnelDevice};
pub use indexes::DEAD_REST;
pub use planner::Planner;
pub use room::{Capacity, Shortage};
pub use runs::RUN_REST;

/// The content of every map that user space writes; flows and counters belong to the kernel.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KernelState {
    /// `CONFIG`.
    pub config: Option<layout::Config>,
    /// `ENDPOINTS`, by the index of the host-side link.
    pub endpoints: BTreeMap<u32, layout::Endpoint>,
    /// `LOCAL`, by address.
    pub local: BTreeMap<Addr, layout::Endpoint>,
    /// `VIPS`.
    pub vips: BTreeMap<VipKey, layout::Vip>,
    /// `SLOTS`, as runs by their first slot.
    pub runs: BTreeMap<u32, Vec<u32>>,
    /// `BACKENDS`; an index that was ever used keeps its generation.
    pub backends: BTreeMap<u32, layout::Backend>,
}

/// One write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// Writes `CONFIG`; `None` clears it.
    Config(Option<layout::Config>),
    /// Puts or removes an entry of `ENDPOINTS`.
    Endpoint(u32, Option<layout::Endpoint>),
    /// Puts or removes an entry of `LOCAL`.
    Local(Addr, Option<layout::Endpoint>),
    /// Puts or removes an entry of `VIPS`.
    Vip(VipKey, Option<layout::Vip>),
    /// Writes the slots of a run.
    Run(u32, Vec<u32>),
    /// Clears the slots of a run of this length.
    DropRun(u32, u32),
    /// Writes or clears an element of `BACKENDS`.
    Backend(u32, Option<layout::Backend>),
}

impl Op {
    /// The write that makes a run so.
    fn run(base: u32, had: Option<&Vec<u32>>, slots: Option<&Vec<u32>>) -> Self {
        match slots {
            Some(slots) => Self::Run(base, slots.clone()),
            None => Self::DropRun(base, had.map_or(0, |slots| slots.len() as u32)),
        }
    }

    /// When this write may happen, in relation to the others of one difference.
    fn rank(&self) -> u8 {
        match self {
            Self::Config(Some(_)) => 0,
            Self::Backend(_, Some(backend)) if backend.flags & layout::BACKEND_LIVE != 0 => 1,
            Self::Local(_, Some(_)) | Self::Run(..) => 2,
            Self::Endpoint(_, Some(_)) => 3,
            Self::Vip(_, Some(_)) => 4,
            Self::Vip(_, None) => 5,
            Self::Endpoint(_, None) | Self::Local(_, None) => 6,
            Self::Backend(..) => 7,
            Self::DropRun(..) => 8,
            Self::Config(None) => 9,
        }
    }
}

/// The shortest list of writes that turns `have` into `want`, in an order that is safe at every step.
#[must_use]
pub fn diff(have: &KernelState, want: &KernelState) -> Vec<Op> {
    let mut ops = Vec::new();
    if have.config != want.config {
        ops.push(Op::Config(want.config));
    }
    merge(&have.endpoints, &want.endpoints, |key, _, value| {
        ops.push(Op::Endpoint(*key, value.copied()));
    });
    merge(&have.local, &want.local, |key, _, value| {
        ops.push(Op::Local(*key, value.copied()));
    });
    merge(&have.vips, &want.vips, |key, _, value| {
        ops.push(Op::Vip(*key, value.copied()));
    });
    merge(&have.backends, &want.backends, |key, _, value| {
        ops.push(Op::Backend(*key, value.copied()));
    });
    merge(&have.runs, &want.runs, |key, had, value| {
        ops.push(Op::run(*key, had, value));
    });
    ops.sort_by_key(Op::rank);
    ops
}

/// Calls `change` for every key whose value differs, with the value that it has and the one it should have.
fn merge<K: Ord, V: PartialEq>(
    have: &BTreeMap<K, V>,
    want: &BTreeMap<K, V>,
    mut change: impl FnMut(&K, Option<&V>, Option<&V>),
) {
    let (mut have, mut want) = (have.iter().peekable(), want.iter().peekable());
    loop {
        let order = match (have.peek(), want.peek()) {
            (None, None) => return,
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
            (Some((a, _)), Some((b, _))) => a.cmp(b),
        };
        let had = if order.is_le() { have.next() } else { None };
        let wanted = if order.is_ge() { want.next() } else { None };
        let (had_value, value) = (had.map(|(_, v)| v), wanted.map(|(_, v)| v));
        if had_value != value
            && let Some((key, _)) = had.or(wanted)
        {
            change(key, had_value, value);
        }
    }
}

/// Entries that may differ between what is and what should be.
#[derive(Clone, Debug, Default)]
struct Touched {
    endpoints: BTreeSet<u32>,
    local: BTreeSet<Addr>,
    vips: BTreeSet<VipKey>,
    runs: BTreeSet<u32>,
    backends: BTreeSet<u32>,
}

impl Touched {
    /// [`diff`] of two states that are the same but for these entries and `CONFIG`.
    fn diff(&self, have: &KernelState, want: &KernelState) -> Vec<Op> {
        let mut ops = Vec::new();
        if have.config != want.config {
            ops.push(Op::Config(want.config));
        }
        changes(
            &self.endpoints,
            (&have.endpoints, &want.endpoints),
            |key, _, value| {
                ops.push(Op::Endpoint(*key, value.copied()));
            },
        );
        changes(&self.local, (&have.local, &want.local), |key, _, value| {
            ops.push(Op::Local(*key, value.copied()));
        });
        changes(&self.vips, (&have.vips, &want.vips), |key, _, value| {
            ops.push(Op::Vip(*key, value.copied()));
        });
        changes(
            &self.backends,
            (&have.backends, &want.backends),
            |key, _, value| {
                ops.push(Op::Backend(*key, value.copied()));
            },
        );
        changes(&self.runs, (&have.runs, &want.runs), |key, had, value| {
            ops.push(Op::run(*key, had, value));
        });
        ops.sort_by_key(Op::rank);
        ops
    }
}

/// [`merge`] over some keys only.
fn changes<K: Ord, V: PartialEq>(
    keys: &BTreeSet<K>,
    (have, want): (&BTreeMap<K, V>, &BTreeMap<K, V>),
    mut change: impl FnMut(&K, Option<&V>, Option<&V>),
) {
    for key in keys {
        let (had, wanted) = (have.get(key), want.get(key));
        if had != wanted {
            change(key, had, wanted);
        }
    }
}

impl KernelState {
    /// Does to the model what a [`Datapath`](crate::datapath::Datapath) does to the maps.
    pub fn apply(&mut self, op: &Op) {
        fn put<K: Ord + Clone, V: Clone>(map: &mut BTreeMap<K, V>, key: &K, value: Option<&V>) {
            match value {
                Some(value) => drop(map.insert(key.clone(), value.clone())),
                None => drop(map.remove(key)),
            }
        }
        match op {
            Op::Config(config) => self.config = *config,
            Op::Endpoint(key, value) => put(&mut self.endpoints, key, value.as_ref()),
            Op::Local(key, value) => put(&mut self.local, key, value.as_ref()),
            Op::Vip(key, value) => put(&mut self.vips, key, value.as_ref()),
            Op::Run(base, slots) => put(&mut self.runs, base, Some(slots)),
            Op::DropRun(base, _) => put(&mut self.runs, base, None),
            Op::Backend(key, value) => put(&mut self.backends, key, value.as_ref()),
        }
    }
}

#[cfg(test)]
mod tests;
