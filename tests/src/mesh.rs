//! A mesh of real nodes on one machine.
//!
//! ```text
//!  pod ─ net1 (weft-cni) ─┐                                         one namespace per box
//!      ─ eth0 (primary) ──┤ node 1 ─ eth0 ── router ── eth0 ─ node 2 ├─ pods
//!  plain pod ─ eth0 ──────┘   │                │                │
//!                 weft-netmanager run     the watch       weft-netmanager run
//!                     + userspace tunnel                      + userspace tunnel
//! ```
//!
//! Every node runs the daemon as a node of a cluster does and follows a table in a file; pods are attached by
//! the CNI plugin and have a primary interface with a default route besides, as Kubernetes gives them one.
//! Between the nodes is a router, so that a default route leads somewhere and every link has an MTU.
//!
//! During the whole life of a mesh the [`watch`] looks at every frame on the underlay: one that shows an inner
//! packet in clear fails the test.

#![expect(
    clippy::unwrap_used,
    reason = "a step of a test that fails, fails the test, here as in its body"
)]

use std::{net::Ipv4Addr, thread, time::Duration};

use netmanager_api::{
    stream::InstanceRef,
    table::{Mesh as TableMesh, Node as TableNode, Peer, Revision, Service, Table},
};

use crate::{Netns, wait_for};

mod node;
mod plugin;
mod pod;
pub mod service;
mod underlay;
pub mod watch;

pub use node::{Node, reasons};
pub use pod::{Plain, Pod};
pub use underlay::Underlay;

/// A daemon that starts loads programs; a debug build on a busy machine takes a second.
pub const SOON: Duration = Duration::from_secs(20);
/// What is refused is refused at once; a packet that is lost in silence takes longer.
pub const AT_ONCE: Duration = Duration::from_millis(900);
/// The UDP port of every node's tunnel.
pub const TUNNEL_PORT: u16 = 27_460;

/// How a mesh is made.
#[derive(Clone, Debug)]
pub struct Options {
    /// How many nodes.
    pub nodes: u32,
    /// MTU of every underlay link, bytes.
    pub mtu: u32,
    /// Further arguments of `weft-netmanager run`.
    pub args: Vec<String>,
    /// Whether every node is of a cluster of its own; their clusters then share one pod CIDR.
    pub clusters: Clusters,
}

/// Whose nodes they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clusters {
    /// All of one cluster.
    One,
    /// Each of its own, with the same pod CIDR in each.
    OnePerNode,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            nodes: 2,
            mtu: 1_500,
            args: Vec::new(),
            clusters: Clusters::One,
        }
    }
}

/// See the module.
#[derive(Debug)]
pub struct Mesh {
    /// The nodes; number 1 is the first.
    pub nodes: Vec<Node>,
    /// What is between them.
    pub underlay: Underlay,
    options: Options,
    index: u64,
}

impl Mesh {
    /// A mesh of `nodes` nodes whose daemons are ready and know each other.
    ///
    /// # Panics
    /// When a capability or a binary is missing, or a daemon does not become ready.
    #[must_use]
    pub fn start(label: &str, nodes: u32) -> Self {
        Self::with(
            label,
            Options {
                nodes,
                ..Options::default()
            },
        )
    }

    /// The same, of any make.
    ///
    /// # Panics
    /// As [`Mesh::start`].
    #[must_use]
    pub fn with(label: &str, options: Options) -> Self {
        let mut mesh = Self::prepare(label, options);
        for node in &mut mesh.nodes {
            node.run();
        }
        for node in &mesh.nodes {
            node.wait_ready();
        }
        mesh
    }

    /// The same, before any daemon runs; every node has a first table.
    ///
    /// # Panics
    /// When a capability or a binary is missing.
    #[must_use]
    pub fn prepare(label: &str, options: Options) -> Self {
        let underlay = Underlay::new(label, options.mtu);
        let nodes = (1..=options.nodes)
            .map(|number| {
                let netns = Netns::new(&format!("{label}{number}")).unwrap();
                let pods = match options.clusters {
                    Clusters::One => number,
                    Clusters::OnePerNode => 1,
                };
                underlay.connect(number, &netns);
                Node::prepare(netns, number, pods, &options.args)
            })
            .collect();
        let mut mesh = Self {
            nodes,
            underlay,
            options,
            index: 0,
        };
        mesh.write(&[]);
        mesh
    }

    /// Node `number`.
    ///
    /// # Panics
    /// When there is none.
    #[must_use]
    pub fn node(&self, number: u32) -> &Node {
        &self.nodes[number as usize - 1]
    }

    /// The same, to be changed.
    ///
    /// # Panics
    /// When there is none.
    pub fn node_mut(&mut self, number: u32) -> &mut Node {
        &mut self.nodes[number as usize - 1]
    }

    /// A pod on node `node`, a mere client.
    ///
    /// # Panics
    /// When it cannot be attached.
    #[must_use]
    pub fn pod(&self, node: u32, name: &str) -> Pod {
        Pod::attach(self.node(node), name, None)
    }

    /// A pod on node `node` that is an instance.
    ///
    /// # Panics
    /// When it cannot be attached.
    #[must_use]
    pub fn instance(&self, node: u32, name: &str, instance: &InstanceRef) -> Pod {
        Pod::attach(self.node(node), name, Some(instance))
    }

    /// A pod on node `node` that has a primary interface only.
    ///
    /// # Panics
    /// When it cannot be wired.
    #[must_use]
    pub fn plain(&self, node: u32, name: &str) -> Plain {
        Plain::new(self.node(node), name)
    }

    /// The next table of a node: these services, every other node as a peer. It is not handed out.
    #[must_use]
    pub fn table(&self, node: u32, services: &[Service]) -> Table {
        let own = self.node(node);
        let peers = self.nodes.iter().filter(|other| other.number != node);
        Table {
            revision: Revision {
                incarnation: 1,
                index: self.index,
            },
            mesh: TableMesh {
                prefix6: service::prefix6(),
                prefix4: Some(service::prefix4()),
                seed: 7,
            },
            node: TableNode {
                number: own.number,
                blocks4: vec![own.block4()],
                carbon_g_kwh: None,
            },
            peers: peers.map(|peer| self.peer(peer)).collect(),
            services: services.to_vec(),
            spliced: Vec::new(),
        }
    }

    fn peer(&self, node: &Node) -> Peer {
        let cluster = match self.options.clusters {
            Clusters::One => "c1".to_owned(),
            Clusters::OnePerNode => format!("c{}", node.number),
        };
        Peer {
            number: node.number,
            name: format!("{cluster}/n{}", node.number),
            public_key: node.public_key(),
            endpoint: Some((underlay::address(node.number), TUNNEL_PORT).into()),
            blocks4: vec![node.block4()],
            carbon_g_kwh: None,
        }
    }

    /// Gives every node a table with these services and waits until all have applied it.
    ///
    /// # Panics
    /// When a daemon does not take it.
    pub fn follow(&mut self, services: &[Service]) {
        self.write(services);
        for node in &self.nodes {
            node.wait_applied(self.index);
        }
    }

    /// The same without waiting.
    ///
    /// # Panics
    /// When a file cannot be written.
    pub fn write(&mut self, services: &[Service]) {
        self.follow_each(|_| services.to_vec());
    }

    /// Writes every node a table of its own.
    ///
    /// # Panics
    /// When a file cannot be written.
    pub fn follow_each(&mut self, services: impl Fn(u32) -> Vec<Service>) {
        self.index += 1;
        for node in &self.nodes {
            node.write_table(&self.table(node.number, &services(node.number)));
        }
    }

    /// Waits until every node has applied what was written last.
    ///
    /// # Panics
    /// When a daemon does not take it.
    pub fn wait_applied(&self) {
        for node in &self.nodes {
            node.wait_applied(self.index);
        }
    }

    /// Waits until every tunnel has carried packets to every other node, both ways.
    ///
    /// # Panics
    /// When one does not.
    pub fn wait_connected(&self) {
        thread::scope(|scope| {
            for from in &self.nodes {
                for to in self.nodes.iter().filter(|to| to.number != from.number) {
                    scope.spawn(move || {
                        wait_for("the tunnel carries an echo", SOON, || {
                            crate::traffic::ping(&from.netns, to.address6()).ok()
                        })
                    });
                }
            }
        });
    }
}

impl Drop for Mesh {
    fn drop(&mut self) {
        let seen = self.underlay.watch.stop();
        if thread::panicking() {
            for node in &self.nodes {
                eprintln!("node {}:\n{}", node.number, node.log());
            }
        } else {
            assert!(
                seen.is_empty(),
                "inner packets in clear on the underlay: {seen:#?}"
            );
        }
    }
}

/// Where the n-th address of a subnet is.
fn nth(network: Ipv4Addr, n: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits(network.to_bits() + n)
}
