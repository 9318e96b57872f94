//! What the programs counted: by VIP, by backend, by reason.

use std::{collections::BTreeSet, path::Path};

use aya::maps::{MapData, MapError, PerCpuArray, PerCpuHashMap, PerCpuValues};
use aya::util::nr_cpus;
use ebpf_common::layout::{Count, RefusedKey};

use super::{
    DatapathError,
    object::{map_error, open_map},
    raw::Raw,
};

const VIPS: &str = "VIP_COUNTS";
const BACKENDS: &str = "BACKEND_COUNTS";
const REFUSED: &str = "REFUSED";

/// The counters, summed over the CPUs where they are read.
pub struct Counts {
    vips: PerCpuArray<MapData, Raw<Count>>,
    backends: PerCpuArray<MapData, Raw<Count>>,
    refused: PerCpuHashMap<MapData, Raw<RefusedKey>, u64>,
}

impl Counts {
    pub(super) fn open(maps: &Path) -> Result<Self, DatapathError> {
        Ok(Self {
            vips: open_map(&maps.join(VIPS), VIPS)?,
            backends: open_map(&maps.join(BACKENDS), BACKENDS)?,
            refused: open_map(&maps.join(REFUSED), REFUSED)?,
        })
    }

    /// How many VIPs can be counted apart.
    pub(super) fn len(&self) -> u32 {
        self.vips.len()
    }

    /// What was counted of the VIP with an element.
    ///
    /// # Errors
    /// When the map cannot be read.
    pub fn vip(&self, counter: u32) -> Result<Count, DatapathError> {
        read(&self.vips, counter).map_err(|source| map_error(VIPS, "be read", source))
    }

    /// What was counted of the backend with an index.
    ///
    /// # Errors
    /// When the map cannot be read.
    pub fn backend(&self, index: u32) -> Result<Count, DatapathError> {
        read(&self.backends, index).map_err(|source| map_error(BACKENDS, "be read", source))
    }

    /// Refused packets by VIP and reason.
    ///
    /// # Errors
    /// When the map cannot be read.
    pub fn refused(&self) -> Result<Vec<(RefusedKey, u64)>, DatapathError> {
        self.refused
            .iter()
            .map(|entry| entry.map(|(key, counts)| (key.0, counts.iter().sum())))
            .collect::<Result<_, MapError>>()
            .map_err(|source| map_error(REFUSED, "be read", source))
    }

    /// Starts the counts of new owners from zero: elements of VIPs, and indexes of backends.
    ///
    /// # Errors
    /// When a map cannot be written.
    pub(super) fn reset(&mut self, vips: &[u32], backends: &[u32]) -> Result<(), DatapathError> {
        for (name, map, indexes) in [
            (VIPS, &mut self.vips, vips),
            (BACKENDS, &mut self.backends, backends),
        ] {
            for &index in indexes {
                set_zero(map, index).map_err(|source| map_error(name, "be written", source))?;
            }
        }
        let owners: BTreeSet<u32> = vips.iter().copied().collect();
        if owners.is_empty() {
            return Ok(());
        }
        for (key, _) in self.refused()? {
            if owners.contains(&key.counter) {
                match self.refused.remove(&Raw(key)) {
                    Ok(()) | Err(MapError::KeyNotFound) => {}
                    Err(source) => return Err(map_error(REFUSED, "remove an entry", source)),
                }
            }
        }
        Ok(())
    }
}

fn read(map: &PerCpuArray<MapData, Raw<Count>>, index: u32) -> Result<Count, MapError> {
    let each = map.get(&index, 0)?;
    Ok(each.iter().fold(Count::default(), |sum, Raw(count)| {
        let add = |a: [u64; 2], b: [u64; 2]| [a[0] + b[0], a[1] + b[1]];
        Count {
            packets: add(sum.packets, count.packets),
            bytes: add(sum.bytes, count.bytes),
            flows: sum.flows + count.flows,
        }
    }))
}

fn set_zero(map: &mut PerCpuArray<MapData, Raw<Count>>, index: u32) -> Result<(), MapError> {
    let cpus = nr_cpus().map_err(|(_, io_error)| MapError::IoError(io_error))?;
    let zeros =
        PerCpuValues::try_from(vec![Raw(Count::default()); cpus]).map_err(MapError::IoError)?;
    map.set(index, zeros, 0)
}
