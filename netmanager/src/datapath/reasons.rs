//! The packet counters.

use std::path::Path;

use aya::maps::{MapData, PerCpuArray};
use ebpf_common::reason::Reason;

use super::{
    DatapathError,
    object::{map_error, open_map},
};

/// Packets by reason, summed over the CPUs.
pub struct Reasons(PerCpuArray<MapData, u64>);

impl Reasons {
    pub(super) fn open(maps: &Path) -> Result<Self, DatapathError> {
        open_map(&maps.join("REASONS"), "REASONS").map(Self)
    }

    /// The count of every reason.
    ///
    /// # Errors
    /// When the map cannot be read.
    pub fn read(&self) -> Result<Vec<(Reason, u64)>, DatapathError> {
        Reason::ALL
            .iter()
            .map(|&reason| {
                let counts = self
                    .0
                    .get(&(reason as u32), 0)
                    .map_err(|source| map_error("REASONS", "be read", source))?;
                Ok((reason, counts.iter().sum()))
            })
            .collect()
    }
}
