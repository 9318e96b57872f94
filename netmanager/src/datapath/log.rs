//! The flow log's ring, its configuration and what it lost.

use std::{
    io,
    os::fd::{AsRawFd, RawFd},
    path::Path,
};

use aya::maps::{Array, MapData, MapError, PerCpuArray, RingBuf};
use aya::util::nr_cpus;
use ebpf_common::layout::{Event, LogConfig, LogState};
use tokio::io::{Interest, unix::AsyncFd};

use super::{
    DatapathError,
    object::{map_error, open_map},
    raw::Raw,
};

const RING: &str = "LOG";
const CONFIG: &str = "LOG_CONFIG";
const STATE: &str = "LOG_STATE";

/// What became of the events, since the maps were made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LogCounts {
    /// Written into the ring.
    pub written: u64,
    /// Left out because the second had its share.
    pub limited: u64,
    /// Left out because the ring was full.
    pub full: u64,
}

/// The counters of the flow log.
pub struct LogCounters(PerCpuArray<MapData, Raw<LogState>>);

/// The reading end of the flow log; its descriptor is readable when there is an event.
pub struct FlowLog {
    ring: RingBuf<MapData>,
    config: Array<MapData, Raw<LogConfig>>,
}

impl LogCounters {
    pub(super) fn open(maps: &Path) -> Result<Self, DatapathError> {
        open_map(&maps.join(STATE), STATE).map(Self)
    }

    /// What became of the events, on all CPUs.
    ///
    /// # Errors
    /// When the map cannot be read.
    pub fn read(&self) -> Result<LogCounts, DatapathError> {
        let each = self.0.get(&0, 0);
        let each = each.map_err(|source| map_error(STATE, "be read", source))?;
        Ok(each
            .iter()
            .fold(LogCounts::default(), |sum, Raw(state)| LogCounts {
                written: sum.written + state.written,
                limited: sum.limited + state.limited,
                full: sum.full + state.lost,
            }))
    }
}

impl FlowLog {
    pub(super) fn open(maps: &Path) -> Result<Self, DatapathError> {
        Ok(Self {
            ring: open_map(&maps.join(RING), RING)?,
            config: open_map(&maps.join(CONFIG), CONFIG)?,
        })
    }

    /// Samples one flow in `sample_every` (0 is none), at most `per_second` events on the whole node: each CPU has
    /// its share, and may always write one.
    ///
    /// # Errors
    /// When the map cannot be written.
    pub fn sample(&mut self, sample_every: u32, per_second: u32) -> Result<(), DatapathError> {
        let failed = |source| map_error(CONFIG, "be written", source);
        let cpus = nr_cpus().map_err(|(_, error)| failed(MapError::IoError(error)))?;
        let config = LogConfig {
            sample_every,
            per_second: (per_second / u32::try_from(cpus).unwrap_or(u32::MAX)).max(1),
        };
        self.config.set(0, Raw(config), 0).map_err(failed)
    }

    /// The log as something to wait for, on the runtime of the caller.
    ///
    /// # Errors
    /// When it cannot be waited for.
    pub fn watched(self) -> io::Result<AsyncFd<Self>> {
        // SAFETY: the descriptor is the ring's own, the same for its whole life, and closed when it is dropped.
        let watched = unsafe { AsyncFd::register_with_interest(self, Interest::READABLE) };
        Ok(watched?)
    }

    /// The next event, if there is one.
    pub fn next_event(&mut self) -> Option<Event> {
        loop {
            let item = self.ring.next()?;
            if item.len() >= size_of::<Event>() {
                // SAFETY: long enough, and every byte pattern is an event: integers without padding (asserted by
                // size in `ebpf_common::layout`). Read unaligned, so that nothing is asked of the ring.
                return Some(unsafe { item.as_ptr().cast::<Event>().read_unaligned() });
            }
        }
    }
}

impl AsRawFd for FlowLog {
    fn as_raw_fd(&self) -> RawFd {
        self.ring.as_raw_fd()
    }
}
