//! The peers: a direct route, and kube-proxy's ways, each with two pods on a node of its own.

use std::net::{IpAddr, Ipv4Addr};

use anyhow::{Context, Result};
use weft_tests::{Netns, netns::NetnsError, topology};

use crate::load::{Metric, Path};

/// A service address that only the DNAT rules know.
const SERVICE: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 1);

/// Two pods on a node, and the address by which the one calls the other.
#[derive(Debug)]
pub(crate) struct Case {
    pub(crate) name: &'static str,
    node: Netns,
    client: Netns,
    server: Netns,
    address: IpAddr,
}

impl Case {
    pub(crate) fn path(&self) -> Path<'_> {
        Path {
            client: &self.client,
            server: &self.server,
            address: self.address,
        }
    }

    /// Each pod on a veth pair of its own, the node routes between them, and nothing else is there.
    pub(crate) fn direct() -> Result<Self> {
        let (node, [client, server]) = machines("direct")?;
        for (number, pod) in [(1, &client), (2, &server)] {
            let device = format!("pod{number}");
            topology::veth(pod, "eth0", &node, &device)?;
            topology::address(pod, "eth0", &format!("192.0.2.{number}/32"))?;
            pod.ip("route add 169.254.1.1 dev eth0 scope link")?;
            pod.ip("route add default via 169.254.1.1 dev eth0")?;
            topology::address(&node, &device, "169.254.1.1/32")?;
            node.ip(&format!("route add 192.0.2.{number}/32 dev {device}"))?;
        }
        Ok(Self {
            name: "direct route",
            node,
            client,
            server,
            address: IpAddr::from([192, 0, 2, 2]),
        })
    }

    /// A bridge with both pods, and a DNAT rule of iptables.
    pub(crate) fn iptables() -> Result<Self> {
        let case = Self::bridged("iptables dnat", "iptables")?;
        let rule =
            format!("-t nat -A PREROUTING -d {SERVICE} -p tcp -j DNAT --to-destination 192.0.2.2");
        let words: Vec<_> = rule.split_whitespace().collect();
        case.node.succeed("iptables", &words)?;
        Ok(case)
    }

    /// A bridge with both pods, and a DNAT rule of nftables.
    pub(crate) fn nftables() -> Result<Self> {
        let case = Self::bridged("nftables dnat", "nftables")?;
        case.node.succeed("nft", &["add table ip weft"])?;
        let chain = "add chain ip weft pre { type nat hook prerouting priority dstnat; }";
        case.node.succeed("nft", &[chain])?;
        let rule = format!("add rule ip weft pre ip daddr {SERVICE} dnat to 192.0.2.2");
        case.node.succeed("nft", &[&rule])?;
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
            node,
            client,
            server,
            address: SERVICE.into(),
        })
    }

    /// Two pods that somebody else wired.
    pub(crate) fn wired(
        name: &'static str,
        node: Netns,
        [client, server]: [Netns; 2],
        address: IpAddr,
    ) -> Self {
        Self {
            name,
            node,
            client,
            server,
            address,
        }
    }
}

/// A node that forwards, and two pods whose clients do not run out of ports.
pub(crate) fn machines(label: &str) -> Result<(Netns, [Netns; 2])> {
    let make = || -> Result<(Netns, [Netns; 2]), NetnsError> {
        let node = Netns::new(label)?;
        node.sysctl("ipv4.ip_forward", "1")?;
        let pods = [Netns::new(label)?, Netns::new(label)?];
        for pod in &pods {
            pod.sysctl("ipv4.ip_local_port_range", "1024 65535")?;
            pod.sysctl("ipv4.tcp_tw_reuse", "1")?;
            let own = Metric::ALL
                .map(|metric| metric.port().to_string())
                .join(",");
            pod.sysctl("ipv4.ip_local_reserved_ports", &own)?;
        }
        Ok((node, pods))
    };
    make().with_context(|| format!("failed to make the machines of {label}"))
}
