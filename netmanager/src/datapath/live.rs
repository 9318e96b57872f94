//! The maps as they stand, element by element, for a trace.

use std::path::Path;

use aya::maps::{Array, HashMap, MapData};
use ebpf_common::layout::{Addr, Backend, Endpoint, Flow, FlowKey, PROTO_TCP, Peer, Vip, VipKey};

use super::{DatapathError, FlowTable, object::open_map, raw::Raw};
use crate::observe::trace::{Maps, Place};

/// See the module. What cannot be read is taken for absent.
pub struct Live {
    vips: HashMap<MapData, Raw<VipKey>, Raw<Vip>>,
    slots: Array<MapData, u32>,
    backends: Array<MapData, Raw<Backend>>,
    local: HashMap<MapData, Raw<Addr>, Raw<Endpoint>>,
    peers: HashMap<MapData, Raw<Addr>, Raw<Peer>>,
    connections: FlowTable,
    datagrams: FlowTable,
}

impl Live {
    /// Opens the maps that are pinned in `maps`.
    pub(super) fn open(maps: &Path) -> Result<Self, DatapathError> {
        Ok(Self {
            vips: open_map(&maps.join("VIPS"), "VIPS")?,
            slots: open_map(&maps.join("SLOTS"), "SLOTS")?,
            backends: open_map(&maps.join("BACKENDS"), "BACKENDS")?,
            local: open_map(&maps.join("LOCAL"), "LOCAL")?,
            peers: open_map(&maps.join("PEERS"), "PEERS")?,
            connections: FlowTable::connections(maps)?,
            datagrams: FlowTable::datagrams(maps)?,
        })
    }
}

impl Maps for Live {
    fn vip(&self, key: &VipKey) -> Option<Vip> {
        self.vips.get(&Raw(*key), 0).ok().map(|vip| vip.0)
    }

    fn slot(&self, index: u32) -> Option<u32> {
        self.slots.get(&index, 0).ok()
    }

    fn backend(&self, index: u32) -> Option<Backend> {
        self.backends.get(&index, 0).ok().map(|backend| backend.0)
    }

    fn place(&self, address: &Addr) -> Place {
        let endpoint = self.local.get(&Raw(*address), 0).ok();
        let peer = self.peers.get(&Raw(address.of_peer()), 0).ok();
        Place {
            endpoint: endpoint.map(|endpoint| endpoint.0.number),
            path_mtu: peer.map(|peer| peer.0.mtu),
        }
    }

    fn flow(&self, key: &FlowKey) -> Option<Flow> {
        let table = match key.proto {
            PROTO_TCP => &self.connections,
            _ => &self.datagrams,
        };
        table.get(key).ok().flatten()
    }
}
