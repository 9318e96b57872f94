//! Reads a flow map in bounded steps, one system call per step (`BPF_MAP_LOOKUP_BATCH`, since Linux 5.6).
//!
//! A walk that goes key by key costs two system calls per flow and starts over when its key is deleted; the
//! batch goes by hash bucket and does not mind. Flows that come or go meanwhile may be missed or seen twice.

use std::{
    io,
    os::fd::{AsFd, AsRawFd},
    path::Path,
};

use aya::maps::{HashMap, Map, MapData, MapError};
use ebpf_common::layout::{Flow, FlowKey};

use super::{DatapathError, raw::Raw};
use crate::janitor::{FlowSource, Page};

/// `enum bpf_cmd` in `linux/bpf.h`.
const BPF_MAP_LOOKUP_BATCH: libc::c_long = 24;
/// Flows per step; a bucket's chain must fit.
const STEP: usize = 1_024;

/// `union bpf_attr`, the part for batches.
#[repr(C)]
struct BatchAttr {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

/// One of the two flow maps.
pub struct FlowTable {
    name: &'static str,
    map: HashMap<MapData, Raw<FlowKey>, Raw<Flow>>,
    /// The same map again: a typed map does not lend its file descriptor.
    data: MapData,
    /// Where the walk goes on; `None` is at the start.
    at: Option<u32>,
}

impl FlowTable {
    pub(super) fn open(name: &'static str, path: &Path) -> Result<Self, DatapathError> {
        let failed = |source| DatapathError::Map {
            map: name,
            what: "open",
            source,
        };
        let data = MapData::from_pin(path).map_err(failed)?;
        let map = MapData::from_pin(path)
            .and_then(Map::from_map_data)
            .and_then(HashMap::try_from)
            .map_err(failed)?;
        Ok(Self {
            name,
            map,
            data,
            at: None,
        })
    }

    fn lookup(&mut self) -> io::Result<Page> {
        let mut keys = vec![FlowKey::default(); STEP];
        let mut values = vec![Flow::default(); STEP];
        let from = self.at.unwrap_or(0);
        let mut next = 0u32;
        let fd = self.data.fd().as_fd().as_raw_fd();
        let mut attr = BatchAttr {
            in_batch: if self.at.is_some() {
                (&raw const from) as u64
            } else {
                0
            },
            out_batch: (&raw mut next) as u64,
            keys: keys.as_mut_ptr() as u64,
            values: values.as_mut_ptr() as u64,
            count: STEP as u32,
            map_fd: fd as u32,
            elem_flags: 0,
            flags: 0,
        };
        // SAFETY: `attr` is laid out as the kernel reads it and lives through the call; the four pointers are to
        // buffers of this frame, of at least `count` keys and values of the map's own sizes (checked when it
        // was opened) and of one u32 token each, which is what hash maps use; the fd is open.
        let result = unsafe {
            libc::syscall(
                libc::SYS_bpf,
                BPF_MAP_LOOKUP_BATCH,
                &raw mut attr,
                size_of::<BatchAttr>(),
            )
        };
        let error = (result < 0).then(io::Error::last_os_error);
        let is_last = match error {
            None => false,
            Some(error) if error.raw_os_error() == Some(libc::ENOENT) => true,
            Some(error) => {
                self.at = None;
                return Err(error);
            }
        };
        self.at = (!is_last).then_some(next);
        let count = (attr.count as usize).min(STEP);
        keys.truncate(count);
        values.truncate(count);
        Ok(Page {
            flows: keys.into_iter().zip(values).collect(),
            is_last,
        })
    }
}

impl FlowSource for FlowTable {
    fn next_page(&mut self) -> Result<Page, DatapathError> {
        self.lookup().map_err(|source| DatapathError::Batch {
            map: self.name,
            source,
        })
    }

    fn remove(&mut self, key: &FlowKey) -> Result<(), DatapathError> {
        match self.map.remove(&Raw(*key)) {
            Ok(()) | Err(MapError::KeyNotFound) => Ok(()),
            Err(MapError::SyscallError(error))
                if error.io_error.raw_os_error() == Some(libc::ENOENT) =>
            {
                Ok(())
            }
            Err(source) => Err(DatapathError::Map {
                map: self.name,
                what: "remove a flow",
                source,
            }),
        }
    }

    fn rewind(&mut self) {
        self.at = None;
    }
}
