//! The table of a bench: one service with a port for each load.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::Path,
};

use anyhow::{Context, Result};
use ebpf_common::addr::Policy;
use netmanager_api::table::{
    Backend, BackendState, Mesh, Node, Peer, PolicyName, Port, Protocol, Revision, Service, Table,
    Vip,
};

use super::Addresses;
use crate::load::Metric;

const MESH6: &str = "fd77:6566:7400::/48";
const MESH4: &str = "10.16.0.0/12";
/// The balanced VIPs of service 1.
const VIP6: [u16; 8] = [0xfd77, 0x6566, 0x7400, 0x1000, 0, 1, 0, 0];
const VIP4: Ipv4Addr = Ipv4Addr::new(10, 24, 0, 1);
const SERVICE: &str = "bench/bench/server";
/// The service of a client that has one.
const CALLER: &str = "bench/bench/client";

/// The VIP's addresses, IPv4 first.
pub(crate) fn vips() -> Vec<IpAddr> {
    vec![VIP4.into(), VIP6.into()]
}

/// The CNI arguments of the service's instance.
pub(crate) fn identity() -> String {
    instance_of(SERVICE)
}

/// The CNI arguments of an instance of a service that calls it.
pub(crate) fn caller() -> String {
    instance_of(CALLER)
}

fn instance_of(service: &str) -> String {
    format!("WEFT_SERVICE={service};WEFT_INSTANCE_NUMBER=0;WEFT_EPOCH=1")
}

fn blocks4(node: u8) -> Result<Vec<ipnet::Ipv4Net>> {
    Ok(vec![format!("10.16.0.{}/27", 32 * (node - 1)).parse()?])
}

/// A node as others know it.
pub(super) fn peer(number: u8, public_key: String, endpoint: SocketAddr) -> Result<Peer> {
    Ok(Peer {
        number: number.into(),
        name: format!("bench/n{number}"),
        public_key,
        endpoint: Some(endpoint),
        blocks4: blocks4(number)?,
        carbon_g_kwh: None,
    })
}

/// The table of one node; each backend with the number of its node.
pub(super) fn table(
    node: u8,
    index: u64,
    backends: &[(u8, Addresses)],
    peers: Vec<Peer>,
) -> Result<Table> {
    let backend = |(instance, (node, addresses)): (usize, &(u8, Addresses))| Backend {
        instance: instance as u32,
        epoch: 1,
        node: u32::from(*node),
        addr6: addresses.v6,
        addr4: Some(addresses.v4),
        state: BackendState::Ready,
    };
    let port = |metric: Metric| Port {
        protocol: match metric {
            Metric::Datagrams => Protocol::Udp,
            _ => Protocol::Tcp,
        },
        port: metric.port(),
        target_port: metric.port(),
        follow: false,
    };
    Ok(Table {
        revision: Revision {
            incarnation: 1,
            index,
        },
        mesh: Mesh {
            prefix6: MESH6.parse()?,
            prefix4: Some(MESH4.parse()?),
            seed: 7,
        },
        node: Node {
            number: node.into(),
            blocks4: blocks4(node)?,
            carbon_g_kwh: None,
        },
        peers,
        services: vec![Service {
            name: SERVICE.to_owned(),
            number: 1,
            ports: Metric::ALL.map(port).to_vec(),
            vips: vec![Vip {
                policy: PolicyName(Policy::Balanced),
                instance: None,
                addr6: VIP6.into(),
                addr4: Some(VIP4),
            }],
            backends: backends.iter().enumerate().map(backend).collect(),
        }],
        // Only a node that was told a cgroup splices.
        spliced: vec![SERVICE.to_owned(), CALLER.to_owned()],
    })
}

/// Puts the table where the NetManager looks for it.
pub(super) fn write(dir: &Path, table: &Table) -> Result<()> {
    let (new, path) = (dir.join("table.new"), dir.join("table.json"));
    fs::write(&new, serde_json::to_vec(table)?).context("failed to write the table")?;
    fs::rename(&new, &path).context("failed to write the table")
}
