//! What the paths to the peers carry: measured while there is a tunnel, and put into the kernel's map.
//!
//! The map outlives the daemon: what it holds is where a new one begins, so that a restart is no hole for large
//! packets.

use std::collections::BTreeMap;

use ebpf_common::{
    addr::{Mesh6, NODE_ENDPOINT, Name6},
    layout::{Addr, Peer},
};
use netmanager_api::table::Table;
use tokio::sync::watch;

use super::node::Node;
use crate::{
    datapath::{DatapathError, Peers},
    probe::mtu::PathProbes,
};

/// The path probes, what they found, and the kernel's map.
pub(super) struct Paths {
    pub(super) probes: Option<PathProbes>,
    /// The peers whose path carries less than the tunnel device, by node number.
    narrow: watch::Sender<BTreeMap<u32, u32>>,
    map: Peers,
}

impl Paths {
    /// Begins with what the map holds.
    pub(super) fn new(map: Peers) -> Result<Self, DatapathError> {
        let known = map.read()?;
        let known = known.values().map(|peer| (peer.node, peer.mtu)).collect();
        Ok(Self {
            probes: None,
            narrow: watch::Sender::new(known),
            map,
        })
    }
}

impl Node {
    /// Measures the paths to the table's peers, and writes down what is known of them. Without probes the tunnel
    /// device's size is taken for all of them.
    pub(super) async fn measure_paths(&mut self, table: &Table) -> Result<(), DatapathError> {
        let mesh = Mesh6::new(table.mesh.prefix6.network().to_bits());
        let (Some(tunnel), Some(mesh)) = (self.tunnel(), mesh) else {
            return Ok(());
        };
        if self.paths.probes.is_none() {
            let narrow = self.paths.narrow.clone();
            let shutdown = self.parts.shutdown.clone();
            match PathProbes::start(mesh, table.node.number, narrow, shutdown).await {
                Ok(probes) => self.paths.probes = Some(probes),
                Err(error) => tracing::warn!(%error, "the paths to the peers are not measured"),
            }
        }
        if let Some(probes) = &self.paths.probes {
            let nodes = table.peers.iter().map(|peer| peer.number).collect();
            probes.set(nodes, tunnel.mtu);
        }
        let want = entries(mesh, table, &self.paths.narrow.borrow());
        self.paths.map.write(&want)
    }

    /// For waiting until a path carries another size.
    pub(super) fn watch_paths(&self) -> watch::Receiver<BTreeMap<u32, u32>> {
        self.paths.narrow.subscribe()
    }
}

/// An entry for every prefix of endpoint addresses of a peer whose path is narrow.
fn entries(mesh: Mesh6, table: &Table, narrow: &BTreeMap<u32, u32>) -> BTreeMap<Addr, Peer> {
    let mut entries = BTreeMap::new();
    for peer in &table.peers {
        let node = peer.number;
        let Some(&mtu) = narrow.get(&node) else {
            continue;
        };
        let endpoint = NODE_ENDPOINT;
        let own = Addr::from_v6(mesh.encode(Name6::Endpoint { node, endpoint }));
        let blocks = peer.blocks4.iter();
        let blocks = blocks.map(|block| Addr::from_v4(block.network().to_bits()));
        for address in std::iter::once(own).chain(blocks) {
            entries.insert(address.of_peer(), Peer { node, mtu });
        }
    }
    entries
}

#[cfg(test)]
mod tests {
    use std::net::Ipv6Addr;

    use netmanager_api::table;

    use super::*;

    #[test]
    fn a_narrow_path_is_known_by_every_prefix_of_its_peer() {
        let prefix6 = "fd12:3456:789a::/48".parse().unwrap();
        let peers = [7, 8].map(|number| table::Peer {
            number,
            name: format!("c/n{number}"),
            public_key: String::new(),
            endpoint: None,
            blocks4: vec![
                format!("10.16.{number}.32/27").parse().unwrap(),
                format!("10.16.{number}.64/27").parse().unwrap(),
            ],
            carbon_g_kwh: None,
        });
        let table = Table {
            revision: table::Revision {
                incarnation: 1,
                index: 1,
            },
            mesh: table::Mesh {
                prefix6,
                prefix4: None,
                seed: 1,
            },
            node: table::Node {
                number: 1,
                blocks4: Vec::new(),
                carbon_g_kwh: None,
            },
            peers: peers.into(),
            services: Vec::new(),
            spliced: Vec::new(),
        };
        let mesh = Mesh6::new(prefix6.network().to_bits()).unwrap();
        let found = entries(mesh, &table, &BTreeMap::from([(8, 1340), (9, 1300)]));
        let v4 = |d| Addr::from_v4(u32::from_be_bytes([10, 16, 8, d]));
        let v6: Ipv6Addr = "fd12:3456:789a:0:0:8::".parse().unwrap();
        let entry = Peer { node: 8, mtu: 1340 };
        let want = [Addr::from_v6(v6.to_bits()), v4(32), v4(64)];
        assert_eq!(found, want.map(|address| (address, entry)).into());
    }
}
