//! Pod to pod between two nodes: by a VIP, and over the same kind of tunnel without Weft's programs.
//!
//! ```text
//!  vip    pod - net1 - weft_pod ----redirect---> tunnel ~~ underlay ~~ tunnel - weft_tunnel -redirect_peer-> pod
//!  plain  pod - eth0 - kernel's forwarding ----> tunnel ~~ underlay ~~ tunnel - kernel's forwarding -------> pod
//! ```
//!
//! Both tunnels are the product's own, of one kind, with one MTU, on underlay links of their own.

use std::{
    collections::BTreeMap,
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result};
use tokio::runtime::Builder;
use weft_netmanager::{
    tunnel::mtu_over,
    wireguard::{Config, Device, Kind, Tunnels, WireGuard, key::PublicKey, peers::WantedPeer},
};
use weft_tests::{Netns, topology, wait_for};

use crate::{
    case::{Case, node, pod, pod_addresses, wire},
    load::{Family, Metric},
    mesh::{self, Machine, underlay},
};

pub(crate) const VIP_USERSPACE: &str = "vip, userspace tunnel";
pub(crate) const VIP_KERNEL: &str = "vip, kernel tunnel";
pub(crate) const PLAIN_USERSPACE: &str = "plain, userspace tunnel";
pub(crate) const PLAIN_KERNEL: &str = "plain, kernel tunnel";

/// MTU of the underlay links.
const UNDERLAY_MTU: u32 = 1500;
/// How long the first packet through a tunnel may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// Two nodes with a NetManager each, a client on the one and a backend on the other.
pub(crate) fn vip(binaries: &Path) -> Result<Case> {
    let [a, b] = joined("tunnel-vip")?;
    let (client, server) = (pod("tunnel-vip")?, pod("tunnel-vip")?);
    let mut a = Machine::start(a, 1, binaries)?;
    let mut b = Machine::start(b, 2, binaries)?;
    a.attach(&client, "")?;
    let backend = b.attach(&server, &mesh::identity())?;
    let peers = [a.peer()?, b.peer()?];
    a.follow(&[(2, backend)], &peers[1..])?;
    b.follow(&[(2, backend)], &peers[..1])?;
    a.wait_reached(&client, &server)?;
    Ok(Case {
        name: if a.has_kernel_tunnel() {
            VIP_KERNEL
        } else {
            VIP_USERSPACE
        },
        machines: vec![a, b],
        _plains: vec![],
        client,
        server,
        nodes: vec![],
        addresses: mesh::vips(),
        cgroup: None,
    })
}

/// Two nodes that route into such a tunnel, and a pod on each.
pub(crate) fn plain(binaries: &Path) -> Result<Case> {
    let nodes = joined("tunnel-plain")?;
    let (client, server) = (pod("tunnel-plain")?, pod("tunnel-plain")?);
    let mut plains = Vec::new();
    for ((netns, pod), number) in nodes.into_iter().zip([&client, &server]).zip([1, 2]) {
        wire(&netns, pod, number)?;
        let mtu = mtu_over(UNDERLAY_MTU);
        pod.ip(&format!("link set eth0 mtu {mtu}"))?;
        netns.ip(&format!("link set pod{number} mtu {mtu}"))?;
        netns.ip("link set up0 up")?;
        topology::address(&netns, "up0", &format!("{}/24", underlay(number)))?;
        plains.push(Plain::start(netns, number, binaries)?);
    }
    let peers: Vec<_> = plains.iter().map(Plain::peer).collect();
    for (plain, peer) in plains.iter_mut().zip(peers.into_iter().rev()) {
        plain.know(peer)?;
    }
    let case = Case {
        name: match plains[0].device.kind {
            Kind::Kernel => PLAIN_KERNEL,
            Kind::Userspace => PLAIN_USERSPACE,
        },
        machines: vec![],
        _plains: plains,
        client,
        server,
        nodes: vec![],
        addresses: pod_addresses(2),
        cgroup: None,
    };
    for family in Family::ALL {
        wait_for("the plain tunnel", PATIENCE, || {
            case.measure(Metric::Latency, family, Duration::from_millis(1))
                .ok()
                .flatten()
        });
    }
    Ok(case)
}

/// Two nodes joined by their underlay links.
fn joined(label: &str) -> Result<[Netns; 2]> {
    let nodes = [node(label)?, node(label)?];
    topology::veth(&nodes[0], "up0", &nodes[1], "up0")?;
    Ok(nodes)
}

/// A node's end of a tunnel that no program of Weft's sees.
pub(crate) struct Plain {
    wireguard: WireGuard,
    device: Device,
    number: u8,
    state: PathBuf,
    netns: Netns,
}

impl std::fmt::Debug for Plain {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Plain")
            .field("device", &self.device)
            .finish_non_exhaustive()
    }
}

impl Plain {
    fn start(netns: Netns, number: u8, binaries: &Path) -> Result<Self> {
        let state = std::env::temp_dir().join(netns.name());
        fs::create_dir_all(&state)
            .with_context(|| format!("failed to make {}", state.display()))?;
        let config = Config {
            name: format!("wp{}-{number}", std::process::id()),
            state: state.clone(),
            port: 0,
            mtu: mtu_over(UNDERLAY_MTU),
            is_eager: false,
            kind: None,
            program: fs::canonicalize(binaries)
                .with_context(|| format!("failed to find {}", binaries.display()))?
                .join("weft-netmanager"),
        };
        // Opened inside: the kernel is asked by making a link.
        let mut wireguard = netns.run(|| WireGuard::open(config))?;
        let device = inside(&netns, wireguard.ensure())?;
        Ok(Self {
            wireguard,
            device,
            number,
            state,
            netns,
        })
    }

    /// This end, as the other must know it.
    fn peer(&self) -> (PublicKey, WantedPeer) {
        let host = |address: std::net::IpAddr| ipnet::IpNet::from(address);
        let peer = WantedPeer {
            endpoint: Some(SocketAddr::new(underlay(self.number), self.device.port)),
            allowed: pod_addresses(self.number).into_iter().map(host).collect(),
        };
        (self.wireguard.public_key(), peer)
    }

    /// Takes the other end as a peer and routes to its pod.
    fn know(&mut self, (key, peer): (PublicKey, WantedPeer)) -> Result<()> {
        for net in &peer.allowed {
            self.netns
                .ip(&format!("route add {net} dev {}", self.device.name))?;
        }
        let want = BTreeMap::from([(key, peer)]);
        inside(&self.netns, self.wireguard.apply(&want))?;
        Ok(())
    }
}

impl Drop for Plain {
    fn drop(&mut self) {
        if let Err(error) = inside(&self.netns, self.wireguard.remove()) {
            eprintln!("failed to end the tunnel {}: {error}", self.device.name);
        }
        if let Err(error) = fs::remove_dir_all(&self.state) {
            eprintln!("failed to remove {}: {error}", self.state.display());
        }
    }
}

/// Runs `work` on a thread inside the namespace to its end.
fn inside<T: Send>(netns: &Netns, work: impl Future<Output = T> + Send) -> T {
    netns.run(|| {
        Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime of one thread needs only memory")
            .block_on(work)
    })
}
