//! What the paths to the peers carry (`PEERS`): an entry where that is less than the tunnel device takes.

use std::{collections::BTreeMap, path::Path};

use aya::maps::{HashMap, MapData};
use ebpf_common::layout::{Addr, Peer};

use super::{
    DatapathError,
    object::{map_error, open_map},
    raw::Raw,
};

const PEERS: &str = "PEERS";

/// See the module.
pub struct Peers(HashMap<MapData, Raw<Addr>, Raw<Peer>>);

impl Peers {
    pub(super) fn open(maps: &Path) -> Result<Self, DatapathError> {
        open_map(&maps.join(PEERS), PEERS).map(Self)
    }

    /// What the map holds.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn read(&self) -> Result<BTreeMap<Addr, Peer>, DatapathError> {
        self.0
            .iter()
            .map(|entry| entry.map(|(key, peer)| (key.0, peer.0)))
            .collect::<Result<_, _>>()
            .map_err(|source| map_error(PEERS, "be read", source))
    }

    /// Makes the map hold exactly `want`.
    ///
    /// # Errors
    /// When it cannot be read or written.
    pub fn write(&mut self, want: &BTreeMap<Addr, Peer>) -> Result<(), DatapathError> {
        let have = self.read()?;
        for (key, peer) in want {
            if have.get(key) != Some(peer) {
                self.0
                    .insert(Raw(*key), Raw(*peer), 0)
                    .map_err(|source| map_error(PEERS, "take an entry", source))?;
            }
        }
        for key in have.keys().filter(|key| !want.contains_key(key)) {
            self.0
                .remove(&Raw(*key))
                .map_err(|source| map_error(PEERS, "remove an entry", source))?;
        }
        Ok(())
    }
}
