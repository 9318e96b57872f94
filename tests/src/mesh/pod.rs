//! Pods: with a primary interface as every Kubernetes pod has one, and attached by the CNI plugin or not.
//!
//! ```text
//!  pod  eth0  10.244.C.K/32, 2001:db8:f4:C::K/128 ── pK  10.244.C.1, 2001:db8:f4:C::1  node
//!       default via 10.244.C.1, 2001:db8:f4:C::1
//! ```

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Mutex,
};

use netmanager_api::{
    stream::InstanceRef,
    table::{Backend, BackendState},
};
use serde_json::Value;

use super::{
    Node, nth,
    plugin::{Call, IFNAME},
    service::{TARGET_DNS, TARGET_HTTP},
};
use crate::{Netns, topology, traffic::Server};

/// A namespace with a default route through its node, and nothing of Weft's.
#[derive(Debug)]
pub struct Plain {
    servers: Mutex<Vec<Server>>,
    /// Its namespace.
    pub netns: Netns,
    /// The primary interface's addresses.
    pub primary: [IpAddr; 2],
    /// The node's end of the primary interface.
    pub primary_link: String,
}

impl Plain {
    pub(super) fn new(node: &Node, name: &str) -> Self {
        let netns = Netns::new(name).unwrap();
        let (cluster, number) = (node.pods, node.next_pod());
        let link = format!("p{number}");
        topology::veth(&netns, "eth0", &node.netns, &link).unwrap();
        let gateway4 = Ipv4Addr::new(10, 244, cluster as u8, 1);
        let own4 = nth(gateway4, number);
        let host6 = |host| Ipv6Addr::new(0x2001, 0xdb8, 0xf4, cluster as u16, 0, 0, 0, host);
        let (gateway6, own6) = (host6(1), host6(number as u16 + 1));
        node.netns
            .ip_batch(&[
                format!("address add {gateway4}/32 dev {link}"),
                format!("address add {gateway6}/128 dev {link} nodad"),
                format!("route add {own4}/32 dev {link}"),
                format!("route add {own6}/128 dev {link}"),
            ])
            .unwrap();
        netns
            .ip_batch(&[
                format!("address add {own4}/32 dev eth0"),
                format!("address add {own6}/128 dev eth0 nodad"),
                format!("route add {gateway4}/32 dev eth0"),
                format!("route add {gateway6}/128 dev eth0"),
                format!("route add default via {gateway4} dev eth0"),
                format!("route add default via {gateway6} dev eth0"),
            ])
            .unwrap();
        Self {
            servers: Mutex::default(),
            netns,
            primary: [own4.into(), own6.into()],
            primary_link: link,
        }
    }

    /// Serves as `name` at the targets of [`super::service::service`], until the pod is dropped.
    ///
    /// # Panics
    /// When it serves already.
    pub fn serve(&self, name: &str) {
        self.serve_at(name, &[TARGET_HTTP], &[TARGET_DNS]);
    }

    /// The same at other ports.
    ///
    /// # Panics
    /// When a port is taken.
    pub fn serve_at(&self, name: &str, tcp: &[u16], udp: &[u16]) {
        let server = Server::start(&self.netns, name, tcp, udp).unwrap();
        self.servers.lock().unwrap().push(server);
    }

    /// Ends all servers and their connections.
    ///
    /// # Panics
    /// When a server panicked.
    pub fn stop_serving(&self) {
        self.servers.lock().unwrap().clear();
    }
}

/// A pod that is attached to the mesh.
#[derive(Debug)]
pub struct Pod {
    /// What it is besides.
    pub plain: Plain,
    /// Its node's number.
    pub node: u32,
    /// Its IPv4 address in the mesh.
    pub addr4: Ipv4Addr,
    /// Its IPv6 address in the mesh.
    pub addr6: Ipv6Addr,
    /// The MAC address of `net1`.
    pub mac: [u8; 6],
    /// The node's end of `net1`.
    pub host_link: String,
    /// The node's end's MAC address.
    pub host_mac: [u8; 6],
}

impl std::ops::Deref for Pod {
    type Target = Plain;

    fn deref(&self) -> &Plain {
        &self.plain
    }
}

impl Pod {
    pub(super) fn attach(node: &Node, name: &str, instance: Option<&InstanceRef>) -> Self {
        let plain = Plain::new(node, name);
        let result = Self::call(node, &plain.netns, instance, |call| call.add());
        let addresses: Vec<IpAddr> = result["ips"]
            .as_array()
            .into_iter()
            .flatten()
            .map(|ip| ip["address"].as_str().unwrap())
            .map(|net| net.parse::<ipnet::IpNet>().unwrap().addr())
            .collect();
        let mac = |interface: &Value| parse_mac(interface["mac"].as_str().unwrap());
        let interfaces = &result["interfaces"];
        assert_eq!(interfaces[1]["name"], IFNAME);
        Self {
            node: node.number,
            addr4: addresses
                .iter()
                .find_map(|address| match address {
                    IpAddr::V4(address) => Some(*address),
                    IpAddr::V6(_) => None,
                })
                .unwrap(),
            addr6: addresses
                .iter()
                .find_map(|address| match address {
                    IpAddr::V6(address) => Some(*address),
                    IpAddr::V4(_) => None,
                })
                .unwrap(),
            mac: mac(&interfaces[1]),
            host_link: interfaces[0]["name"].as_str().unwrap().to_owned(),
            host_mac: mac(&interfaces[0]),
            plain,
        }
    }

    /// Detaches the pod as a runtime does.
    ///
    /// # Panics
    /// When the plugin refuses.
    pub fn detach(&self, node: &Node) {
        Self::call(node, &self.netns, None, |call| call.del());
    }

    fn call<T>(
        node: &Node,
        pod: &Netns,
        instance: Option<&InstanceRef>,
        work: impl FnOnce(Call<'_>) -> T,
    ) -> T {
        work(Call {
            node: &node.netns,
            pod,
            socket: &node.path("cni.sock"),
            instance,
        })
    }

    /// Both addresses in the mesh.
    #[must_use]
    pub fn addresses(&self) -> [IpAddr; 2] {
        [self.addr4.into(), self.addr6.into()]
    }

    /// This pod as a backend of a table.
    #[must_use]
    pub fn backend(&self, instance: u32, state: BackendState) -> Backend {
        Backend {
            instance,
            epoch: 1,
            node: self.node,
            addr6: self.addr6,
            addr4: Some(self.addr4),
            state,
        }
    }
}

fn parse_mac(text: &str) -> [u8; 6] {
    let octets: Vec<u8> = text
        .split(':')
        .map(|octet| u8::from_str_radix(octet, 16).unwrap())
        .collect();
    octets.try_into().unwrap()
}
