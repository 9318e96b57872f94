//! The cases on one node: Weft's own, a direct route, and kube-proxy's ways, each with two pods on a node of its own.

use std::{
    ffi::OsStr,
    net::{IpAddr, Ipv4Addr},
    path,
    time::Duration,
};

use anyhow::{Context, Result};
use weft_tests::{Cgroup, Netns, netns::NetnsError, topology};

use crate::{
    load::{self, Family, Metric, Path},
    mesh::{self, Machine},
    tunnel::Plain,
};

/// A service address that only the DNAT rules know.
const SERVICE: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 1);

pub(crate) const DIRECT: &str = "direct route";
pub(crate) const VIP: &str = "same-node vip";
pub(crate) const SPLICED: &str = "same-node vip spliced";
pub(crate) const IPTABLES: &str = "iptables dnat";
pub(crate) const NFTABLES: &str = "nftables dnat";

/// Two pods, and the addresses by which the one calls the other.
#[derive(Debug)]
pub(crate) struct Case {
    pub(crate) name: &'static str,
    // In this order: what runs in a namespace ends before it.
    pub(crate) machines: Vec<Machine>,
    pub(crate) _plains: Vec<Plain>,
    pub(crate) client: Netns,
    pub(crate) server: Netns,
    pub(crate) nodes: Vec<Netns>,
    pub(crate) addresses: Vec<IpAddr>,
    pub(crate) cgroup: Option<Cgroup>,
}

impl Case {
    /// The way to the server over a family; `None` where the case has none.
    pub(crate) fn path(&self, family: Family) -> Option<Path<'_>> {
        let wanted = |address: &&IpAddr| address.is_ipv4() == (family == Family::Ipv4);
        let address = *self.addresses.iter().find(wanted)?;
        Some(Path {
            client: &self.client,
            server: &self.server,
            address,
        })
    }

    /// A node with its NetManager, and a VIP between two of its pods.
    pub(crate) fn vip(binaries: &path::Path) -> Result<Self> {
        Self::by_vip(VIP, binaries, None)
    }

    /// The same between services that asked to be spliced.
    pub(crate) fn spliced(binaries: &path::Path) -> Result<Self> {
        let cgroup = Cgroup::new("bench").context("failed to make a cgroup")?;
        Self::by_vip(SPLICED, binaries, Some(cgroup))
    }

    fn by_vip(name: &'static str, binaries: &path::Path, cgroup: Option<Cgroup>) -> Result<Self> {
        let (node, [client, server]) = machines("vip")?;
        // An underlay as other nodes have it: its MTU is what the pods' is made of.
        node.ip("link add up0 type veth peer name up1")?;
        node.ip("link set up1 up")?;
        let options: Vec<&OsStr> = cgroup
            .iter()
            .flat_map(|cgroup| ["--splice-cgroup".as_ref(), cgroup.path().as_os_str()])
            .collect();
        let mut machine = Machine::start_with(node, 1, binaries, &options)?;
        machine.attach(&client, &mesh::caller())?;
        let backend = machine.attach(&server, &mesh::identity())?;
        machine.follow(&[(1, backend)], &[])?;
        machine.wait_reached(&client, &server)?;
        Ok(Self {
            name,
            machines: vec![machine],
            _plains: vec![],
            client,
            server,
            nodes: vec![],
            addresses: mesh::vips(),
            cgroup,
        })
    }

    /// Loads the case; its sockets are made in its cgroup, where it has one. `None` where it does not carry that.
    pub(crate) fn measure(
        &self,
        metric: Metric,
        family: Family,
        time: Duration,
    ) -> Result<Option<f64>> {
        let Some(path) = self.path(family) else {
            return Ok(None);
        };
        self.load(&path, metric, time)
            .with_context(|| self.name.to_owned())
    }

    fn load(&self, path: &Path<'_>, metric: Metric, time: Duration) -> Result<Option<f64>> {
        let Some(cgroup) = &self.cgroup else {
            return load::measure(path, metric, time).map(Some);
        };
        if metric == Metric::Datagrams {
            return Ok(None);
        }
        cgroup.enter().context("failed to enter the cgroup")?;
        let value = load::measure(path, metric, time);
        cgroup.leave().context("failed to leave the cgroup")?;
        value.map(Some)
    }

    /// Each pod on a veth pair of its own, the node routes between them, and nothing else is there.
    pub(crate) fn direct() -> Result<Self> {
        let (node, [client, server]) = machines("direct")?;
        for (number, pod) in [(1, &client), (2, &server)] {
            wire(&node, pod, number)?;
        }
        Ok(Self {
            name: DIRECT,
            machines: vec![],
            _plains: vec![],
            client,
            server,
            nodes: vec![node],
            addresses: pod_addresses(2),
            cgroup: None,
        })
    }

    /// A bridge with both pods, and DNAT rules of iptables.
    pub(crate) fn iptables() -> Result<Self> {
        let case = Self::bridged(IPTABLES, "iptables")?;
        for protocol in ["tcp", "udp"] {
            let rule = format!(
                "-t nat -A PREROUTING -d {SERVICE} -p {protocol} -j DNAT --to-destination 192.0.2.2"
            );
            let words: Vec<_> = rule.split_whitespace().collect();
            case.nodes[0].succeed("iptables", &words)?;
        }
        Ok(case)
    }

    /// A bridge with both pods, and a DNAT rule of nftables.
    pub(crate) fn nftables() -> Result<Self> {
        let case = Self::bridged(NFTABLES, "nftables")?;
        let node = &case.nodes[0];
        node.succeed("nft", &["add table ip weft"])?;
        let chain = "add chain ip weft pre { type nat hook prerouting priority dstnat; }";
        node.succeed("nft", &[chain])?;
        let rule = format!("add rule ip weft pre ip daddr {SERVICE} dnat to 192.0.2.2");
        node.succeed("nft", &[&rule])?;
        Ok(case)
    }

    /// A bridge with both pods; `bridge-nf-call-iptables` sends their frames through netfilter, and back to the
    /// bridge, as on a node with kube-proxy.
    fn bridged(name: &'static str, label: &str) -> Result<Self> {
        let (node, [client, server]) = machines(label)?;
        node.ip("link add br0 type bridge")?;
        topology::address(&node, "br0", "192.0.2.254/24")?;
        node.ip("link set br0 up")?;
        for (number, pod) in [(1, &client), (2, &server)] {
            topology::veth(pod, "eth0", &node, &format!("pod{number}"))?;
            node.ip(&format!("link set pod{number} master br0"))?;
            topology::address(pod, "eth0", &format!("192.0.2.{number}/24"))?;
            pod.ip("route add default via 192.0.2.254")?;
        }
        node.sysctl("bridge.bridge-nf-call-iptables", "1")?;
        Ok(Self {
            name,
            machines: vec![],
            _plains: vec![],
            client,
            server,
            nodes: vec![node],
            addresses: vec![SERVICE.into()],
            cgroup: None,
        })
    }
}

/// The addresses of a pod that is wired without Weft.
pub(crate) fn pod_addresses(number: u8) -> Vec<IpAddr> {
    vec![
        IpAddr::from([192, 0, 2, number]),
        IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 0, u16::from(number)]),
    ]
}

/// Wires a pod to its node by a veth pair and routes of both families, without Weft.
pub(crate) fn wire(node: &Netns, pod: &Netns, number: u8) -> Result<()> {
    let device = format!("pod{number}");
    topology::veth(pod, "eth0", node, &device)?;
    for (gateway, length) in [("169.254.1.1", 32), ("fe80::1", 64)] {
        topology::address(node, &device, &format!("{gateway}/{length}"))?;
    }
    for address in pod_addresses(number) {
        let length = if address.is_ipv4() { 32 } else { 128 };
        topology::address(pod, "eth0", &format!("{address}/{length}"))?;
        node.ip(&format!("route add {address}/{length} dev {device}"))?;
    }
    pod.ip("route add 169.254.1.1 dev eth0 scope link")?;
    pod.ip("route add default via 169.254.1.1 dev eth0")?;
    pod.ip("-6 route add default via fe80::1 dev eth0")?;
    Ok(())
}

/// A node that forwards, and two pods whose clients do not run out of ports.
pub(crate) fn machines(label: &str) -> Result<(Netns, [Netns; 2])> {
    let make = || -> Result<(Netns, [Netns; 2]), NetnsError> {
        Ok((node(label)?, [pod(label)?, pod(label)?]))
    };
    make().with_context(|| format!("failed to make the machines of {label}"))
}

/// A namespace that forwards.
pub(crate) fn node(label: &str) -> Result<Netns, NetnsError> {
    let node = Netns::new(label)?;
    node.sysctl("ipv4.ip_forward", "1")?;
    node.sysctl("ipv6.conf.all.forwarding", "1")?;
    Ok(node)
}

/// A namespace whose clients do not run out of ports.
pub(crate) fn pod(label: &str) -> Result<Netns, NetnsError> {
    let pod = Netns::new(label)?;
    pod.sysctl("ipv4.ip_local_port_range", "1024 65535")?;
    pod.sysctl("ipv4.tcp_tw_reuse", "1")?;
    let own = Metric::ALL
        .map(|metric| metric.port().to_string())
        .join(",");
    pod.sysctl("ipv4.ip_local_reserved_ports", &own)?;
    Ok(pod)
}
