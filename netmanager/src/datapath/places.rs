//! `FLOWS_DIRECT`, in memory that is shared with the kernel programs: what is removed here is removed by the same word by which
//! they take and leave a place, and only if it was born when what was judged was, so that never the next connection goes in
//! its stead.

use std::{
    num::NonZeroUsize,
    os::fd::AsFd,
    path::Path,
    ptr::NonNull,
    sync::atomic::{AtomicU32, AtomicU64, Ordering, fence},
};

use aya::maps::{MapData, MapError};
use ebpf_common::layout::{
    Connection, FLOW_REVERSE, Flow, FlowKey, PLACE_BITS, PLACE_EMPTY, PLACE_LIVE, direct_flow,
};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

use super::{DatapathError, object::map_error};

/// The map's name.
pub(super) const FLOWS_DIRECT: &str = "FLOWS_DIRECT";
/// How often a place is read until no program wrote meanwhile.
const TRIES: usize = 8;

/// The places of connections.
#[derive(Debug)]
pub struct Places {
    memory: NonNull<Connection>,
    count: u32,
    bytes: NonZeroUsize,
}

// SAFETY: the memory is shared with the kernel's CPUs anyway: it is only read volatile and changed by atomic operations.
unsafe impl Send for Places {}
// SAFETY: as above.
unsafe impl Sync for Places {}

impl Places {
    /// Opens the map that is pinned at `path`.
    pub(super) fn open(path: &Path) -> Result<Self, DatapathError> {
        let data =
            MapData::from_pin(path).map_err(|source| map_error(FLOWS_DIRECT, "open", source))?;
        Self::new(&data)
    }

    /// The places in a map; the mapping outlives the descriptor.
    ///
    /// # Errors
    /// When the map's values are not places, or the kernel does not map it.
    pub fn new(data: &MapData) -> Result<Self, DatapathError> {
        let failed = |what| move |source| map_error(FLOWS_DIRECT, what, source);
        let info = data.info().map_err(failed("be asked"))?;
        let (size, count) = (info.value_size() as usize, info.max_entries());
        if size != size_of::<Connection>() {
            let expected = size_of::<Connection>();
            return Err(failed("open")(MapError::InvalidValueSize {
                size,
                expected,
            }));
        }
        let bytes = NonZeroUsize::new(size * count as usize).expect("no map has no elements");
        // SAFETY: a new mapping where the kernel likes; nothing else is touched.
        let memory = unsafe {
            mmap(
                None,
                bytes,
                ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
                MapFlags::MAP_SHARED,
                data.fd().as_fd(),
                0,
            )
        }
        .map_err(|source| DatapathError::Batch {
            map: FLOWS_DIRECT,
            what: "be mapped",
            source: source.into(),
        })?;
        Ok(Self {
            memory: memory.cast(),
            count,
            bytes,
        })
    }

    /// How many places there are.
    pub(super) const fn len(&self) -> u32 {
        self.count
    }

    fn at(&self, place: u32) -> Option<NonNull<Connection>> {
        // SAFETY: within the mapping, which holds `count` elements side by side (their size is a multiple of 8).
        (place < self.count).then(|| unsafe { self.memory.add(place as usize) })
    }

    fn state(&self, place: u32) -> Option<&AtomicU64> {
        let connection = self.at(place)?;
        // SAFETY: an aligned word of the mapping, which lives as long as `self`; programs change it atomically.
        Some(unsafe { AtomicU64::from_ptr(&raw mut (*connection.as_ptr()).state) })
    }

    fn spilled(&self, place: u32) -> Option<&AtomicU32> {
        let connection = self.at(place)?;
        // SAFETY: as in `state`.
        Some(unsafe { AtomicU32::from_ptr(&raw mut (*connection.as_ptr()).spilled_s) })
    }

    /// Every place that is not as it was when the map was made, whatever is in it.
    pub fn used(&self) -> impl Iterator<Item = (u32, Connection)> {
        let read = |place| {
            // SAFETY: as in `read`.
            let connection = self
                .at(place)
                .map(|memory| unsafe { memory.as_ptr().read_volatile() });
            connection.map(|connection| (place, connection))
        };
        (0..self.count)
            .filter_map(read)
            .filter(|(_, connection)| *connection != Connection::default())
    }

    /// The connection in a place, if there is one.
    fn read(&self, place: u32) -> Option<Connection> {
        let (state, memory) = (self.state(place)?, self.at(place)?);
        for _ in 0..TRIES {
            let before = state.load(Ordering::Acquire);
            if before & PLACE_BITS != PLACE_LIVE {
                return None;
            }
            // SAFETY: within the mapping; plain integers, which are whatever the programs have written.
            let connection = unsafe { memory.as_ptr().read_volatile() };
            fence(Ordering::Acquire);
            if state.load(Ordering::Relaxed) == before {
                return Some(Connection {
                    state: before,
                    ..connection
                });
            }
        }
        None
    }

    /// The two entries of the connection in a place. What is noted in one only, and when one was used, both say: they are
    /// judged alike, because they go together.
    pub(super) fn entries(&self, place: u32) -> Option<[(FlowKey, Flow); 2]> {
        self.read(place).map(|connection| entries(&connection))
    }

    /// The entries of all connections.
    pub(super) fn all(&self) -> impl Iterator<Item = (FlowKey, Flow)> {
        (0..self.count)
            .filter_map(|place| self.entries(place))
            .flatten()
    }

    /// Looks for the connection that has this key, of either direction.
    fn find(&self, key: &FlowKey) -> Option<Connection> {
        let connection = self.read(direct_flow(key))?;
        let is_it = match key.direction {
            FLOW_REVERSE => connection.is_answered_by(key),
            _ => connection.is_asked_by(key),
        };
        (is_it && connection.key.proto == key.proto).then_some(connection)
    }

    /// The entry of a key.
    pub(super) fn get(&self, key: &FlowKey) -> Option<Flow> {
        let connection = self.find(key)?;
        let entries = entries(&connection);
        entries
            .iter()
            .find(|(k, _)| k == key)
            .map(|(_, flow)| *flow)
    }

    /// Removes the connection that has this key, of either direction, if it is the one that `flow` was read of; false where it was gone.
    pub(super) fn remove(&self, key: &FlowKey, flow: &Flow) -> bool {
        let is_it = |connection: &Connection| connection.forward.born_s == flow.born_s;
        let Some(connection) = self.find(key).filter(is_it) else {
            return false;
        };
        let left = connection.state & !PLACE_BITS | PLACE_EMPTY;
        self.state(direct_flow(key)).is_some_and(|state| {
            state
                .compare_exchange(connection.state, left, Ordering::AcqRel, Ordering::Relaxed)
                .is_ok()
        })
    }

    /// Removes all connections.
    pub(super) fn clear(&self) {
        for place in 0..self.count {
            if let Some(state) = self.state(place) {
                state.fetch_and(!PLACE_BITS, Ordering::AcqRel);
            }
        }
    }

    /// Says of all places that `FLOWS` must be asked too: it has entries of which no place knows.
    pub(super) fn ask_flows(&self, now_s: u32) {
        for place in 0..self.count {
            if let Some(spilled) = self.spilled(place) {
                spilled.store(now_s.max(1), Ordering::Release);
            }
        }
    }

    /// `FLOWS` need not be asked any more for places that nothing in it `is_needed` for, as a walk saw that began at `since_s`; where
    /// it is, and no place says so, it must be.
    pub(super) fn spare_flows(&self, since_s: u32, is_needed: impl Fn(u32) -> bool) {
        for place in 0..self.count {
            let Some(spilled) = self.spilled(place) else {
                continue;
            };
            let at = spilled.load(Ordering::Acquire);
            let says = match (at, is_needed(place)) {
                (0, true) => since_s.max(1),
                (0, false) | (_, true) => continue,
                // The programs write the time before the entry: what is a whole second older than the walk was there for it to see.
                (at, false) if at.saturating_add(1) >= since_s => continue,
                (_, false) => 0,
            };
            // Whoever goes to `FLOWS` now writes another time.
            let _ = spilled.compare_exchange(at, says, Ordering::AcqRel, Ordering::Relaxed);
        }
    }
}

impl Drop for Places {
    fn drop(&mut self) {
        // SAFETY: this mapping, of which nothing is borrowed any more.
        if let Err(error) = unsafe { munmap(self.memory.cast(), self.bytes.get()) } {
            tracing::warn!(%error, "failed to unmap {FLOWS_DIRECT}");
        }
    }
}

/// See [`Places::entries`].
fn entries(connection: &Connection) -> [(FlowKey, Flow); 2] {
    let Connection {
        forward, reverse, ..
    } = connection;
    let flags = forward.flags | reverse.flags;
    let last_seen_ns = forward.last_seen_ns.max(reverse.last_seen_ns);
    [
        (connection.key, forward),
        (connection.reverse_key(), reverse),
    ]
    .map(|(key, flow)| {
        let flow = Flow {
            flags,
            last_seen_ns,
            ..*flow
        };
        (key, flow)
    })
}
