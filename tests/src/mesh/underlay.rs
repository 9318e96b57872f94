//! What is between the nodes: a router with one link per node.
//!
//! ```text
//!  node N eth0  198.18.N.2/24  2001:db8:N::2/64  ── nN  198.18.N.1  2001:db8:N::1  router
//! ```
//!
//! Addresses are of the benchmarking and documentation blocks (RFC 2544, RFC 3849).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::watch::Watch;
use crate::{Netns, topology};

/// See the module.
#[derive(Debug)]
pub struct Underlay {
    /// The router.
    pub router: Netns,
    /// Looks at every frame that the router receives or sends.
    pub watch: Watch,
    mtu: u32,
}

/// The address of a node on the underlay.
#[must_use]
pub(super) fn address(node: u32) -> IpAddr {
    Ipv4Addr::new(198, 18, node as u8, 2).into()
}

fn address6(node: u32, host: u16) -> Ipv6Addr {
    Ipv6Addr::new(0x2001, 0xdb8, node as u16, 0, 0, 0, 0, host)
}

impl Underlay {
    pub(super) fn new(label: &str, mtu: u32) -> Self {
        let router = Netns::new(&format!("{label}r")).unwrap();
        router.sysctl("ipv4.ip_forward", "1").unwrap();
        router.sysctl("ipv6.conf.all.forwarding", "1").unwrap();
        Self {
            watch: Watch::start(&router),
            router,
            mtu,
        }
    }

    /// Links a node to the router, with a default route.
    pub(super) fn connect(&self, node: u32, netns: &Netns) {
        let mtu = self.mtu;
        topology::veth(netns, "eth0", &self.router, &port(node)).unwrap();
        let (own6, router6) = (address6(node, 2), address6(node, 1));
        netns
            .ip_batch(&[
                format!("link set eth0 mtu {mtu}"),
                format!("address add {}/24 dev eth0", address(node)),
                format!("address add {own6}/64 dev eth0 nodad"),
                format!("route add default via 198.18.{node}.1"),
                format!("route add default via {router6}"),
            ])
            .unwrap();
        self.router
            .ip_batch(&[
                format!("link set {} mtu {mtu}", port(node)),
                format!("address add 198.18.{node}.1/24 dev {}", port(node)),
                format!("address add {router6}/64 dev {} nodad", port(node)),
            ])
            .unwrap();
    }

    /// Sets the MTU of the router's link to a node: the way there is narrower than the node's device says.
    ///
    /// # Panics
    /// When the kernel refuses it.
    pub fn narrow(&self, node: u32, mtu: u32) {
        self.router
            .ip(&format!("link set {} mtu {mtu}", port(node)))
            .unwrap();
    }

    /// Loses everything to and from a node, without a word.
    ///
    /// # Panics
    /// When the kernel refuses it.
    pub fn cut(&self, node: u32) {
        self.set(node, "down");
    }

    /// Ends [`Underlay::cut`].
    ///
    /// # Panics
    /// When the kernel refuses it.
    pub fn mend(&self, node: u32) {
        self.set(node, "up");
        // The link lost its IPv6 address when it went down.
        let address = format!("{}/64", address6(node, 1));
        topology::address(&self.router, &port(node), &address).unwrap();
    }

    fn set(&self, node: u32, state: &str) {
        self.router
            .ip(&format!("link set {} {state}", port(node)))
            .unwrap();
    }
}

/// The router's link to a node.
fn port(node: u32) -> String {
    format!("n{node}")
}
