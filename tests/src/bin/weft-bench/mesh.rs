//! Weft's own case: a node with its NetManager, which follows a table from a file, and two pods attached by the
//! CNI plugin.

use std::{
    fs::{self, File},
    io::Write,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result};
use ebpf_common::addr::Policy;
use netmanager_api::table::{
    Backend, BackendState, Mesh, Node as TableNode, PolicyName, Port, Protocol, Revision, Service,
    Table, Vip,
};
use serde_json::{Value, json};
use weft_tests::{Netns, Process, topology, wait_for};

use crate::{
    case::{Case, machines},
    load::Metric,
};

const MESH6: &str = "fd77:6566:7400::/48";
const MESH4: &str = "10.16.0.0/12";
/// The balanced VIPs of service 1.
const VIP6: &str = "fd77:6566:7400:1000:0:1::";
const VIP4: Ipv4Addr = Ipv4Addr::new(10, 24, 0, 1);
const SERVICE: &str = "bench/bench/server";
/// Where other nodes would reach this one.
const UNDERLAY: &str = "198.51.100.1";
/// What a plugin answers that should be asked again (CNI spec 1.1, section 5 "Error").
const TRY_AGAIN: u64 = 11;
/// How long the NetManager may take for each step.
const PATIENCE: Duration = Duration::from_secs(20);

/// A node, its NetManager and two pods.
#[derive(Debug)]
pub(crate) struct Node {
    daemon: Process,
    device: String,
    dir: PathBuf,
    netns: Option<Netns>,
    pods: Option<[Netns; 2]>,
}

impl Node {
    /// Wires both pods and waits until the one reaches the other by its VIP.
    pub(crate) fn start(binaries: &Path) -> Result<Self> {
        let binaries = fs::canonicalize(binaries)
            .with_context(|| format!("failed to find {}", binaries.display()))?;
        let (netns, pods) = machines("vip")?;
        // An underlay as other nodes have it: its MTU is what the pods' is made of.
        netns.ip("link add up0 type veth peer name up1")?;
        netns.ip("link set up0 up")?;
        netns.ip("link set up1 up")?;
        topology::address(&netns, "up0", &format!("{UNDERLAY}/24"))?;
        let dir = std::env::temp_dir().join(netns.name());
        fs::create_dir_all(dir.join("bpf"))
            .with_context(|| format!("failed to make {}", dir.display()))?;
        write_table(&dir, 1, vec![])?;
        let device = format!("wb{}", std::process::id());
        let log_path = dir.join("netmanager.log");
        let log = File::create(&log_path).context("failed to make the log")?;
        let daemon = netns.spawn(
            Command::new(binaries.join("weft-netmanager"))
                .args(["run", "--node", "bench", "--tunnel-device", &device])
                .args(["--underlay", UNDERLAY, "--tunnel-port", "0"])
                .arg("--table")
                .arg(dir.join("table.json"))
                .arg("--state")
                .arg(dir.join("state"))
                .arg("--socket")
                .arg(dir.join("cni.sock"))
                .arg("--bpffs")
                .arg(dir.join("bpf"))
                .stdout(Stdio::null())
                .stderr(log),
        )?;
        // From here on everything is undone by dropping it.
        let mut node = Self {
            daemon,
            device,
            dir,
            netns: Some(netns),
            pods: Some(pods),
        };
        node.wire(&binaries).with_context(|| {
            let log = fs::read_to_string(&log_path).unwrap_or_default();
            let lines: Vec<_> = log.lines().rev().take(5).collect();
            format!("the NetManager said: {}", lines.join(" <- "))
        })?;
        Ok(node)
    }

    fn wire(&mut self, binaries: &Path) -> Result<()> {
        let (Some(netns), Some([client, server])) = (&self.netns, &self.pods) else {
            return Ok(());
        };
        let socket = self.dir.join("cni.sock");
        wait_for("the CNI socket", PATIENCE, || socket.exists().then_some(()));
        attach(netns, client, binaries, &socket, "")?;
        let identity = format!("WEFT_SERVICE={SERVICE};WEFT_INSTANCE_NUMBER=0;WEFT_EPOCH=1");
        let (addr4, addr6) = attach(netns, server, binaries, &socket, &identity)?;
        let backend = Backend {
            instance: 0,
            epoch: 1,
            node: 1,
            addr6,
            addr4: Some(addr4),
            state: BackendState::Ready,
        };
        write_table(&self.dir, 2, vec![backend])?;
        let port = Metric::Throughput.port();
        let listener = server
            .run(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)))
            .context("failed to listen in the pod")?;
        wait_for("the VIP", PATIENCE, || {
            client.run(|| TcpStream::connect((VIP4, port))).ok()
        });
        drop(listener);
        Ok(())
    }

    /// The case to be measured; the node lives as long as `self`.
    pub(crate) fn case(&mut self) -> Result<Case> {
        let netns = self.netns.take().context("the case was taken before")?;
        let pods = self.pods.take().context("the case was taken before")?;
        Ok(Case::wired("same-node vip", netns, pods, IpAddr::V4(VIP4)))
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // The daemon first, then the tunnel, which outlives it by design.
        let _ = self.daemon.0.kill();
        end_tunnel(&self.device);
        let _ = nix::mount::umount2(&self.dir.join("bpf"), nix::mount::MntFlags::MNT_DETACH);
        if let Err(error) = fs::remove_dir_all(&self.dir) {
            eprintln!("failed to remove {}: {error}", self.dir.display());
        }
    }
}

/// Kills the process that carries the tunnel device of this name.
fn end_tunnel(device: &str) {
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        else {
            continue;
        };
        let command = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let mut words = command.split(|byte| *byte == 0);
        if words.nth(1) == Some(b"tunnel") && words.any(|word| word == device.as_bytes()) {
            let pid = nix::unistd::Pid::from_raw(pid);
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
        }
    }
}

fn write_table(dir: &Path, index: u64, backends: Vec<Backend>) -> Result<()> {
    let table = Table {
        revision: Revision {
            incarnation: 1,
            index,
        },
        mesh: Mesh {
            prefix6: MESH6.parse()?,
            prefix4: Some(MESH4.parse()?),
            seed: 7,
        },
        node: TableNode {
            number: 1,
            blocks4: vec!["10.16.0.0/27".parse()?],
        },
        peers: vec![],
        services: vec![Service {
            name: SERVICE.to_owned(),
            number: 1,
            ports: Metric::ALL
                .map(|metric| Port {
                    protocol: Protocol::Tcp,
                    port: metric.port(),
                    target_port: metric.port(),
                })
                .to_vec(),
            vips: vec![Vip {
                policy: PolicyName(Policy::Balanced),
                instance: None,
                addr6: VIP6.parse()?,
                addr4: Some(VIP4),
            }],
            backends,
        }],
    };
    let (new, path) = (dir.join("table.new"), dir.join("table.json"));
    fs::write(&new, serde_json::to_vec(&table)?).context("failed to write the table")?;
    fs::rename(&new, &path).context("failed to write the table")
}

/// Attaches `pod` as a runtime does, again as long as it is told to; returns the pod's addresses.
fn attach(
    node: &Netns,
    pod: &Netns,
    binaries: &Path,
    socket: &Path,
    identity: &str,
) -> Result<(Ipv4Addr, Ipv6Addr)> {
    let result = wait_for("an attachment", PATIENCE, || {
        let result = add(node, pod, binaries, socket, identity);
        match &result {
            Ok(answer) if answer["code"] == TRY_AGAIN => None,
            _ => Some(result),
        }
    })?;
    let addresses: Vec<IpAddr> = result["ips"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|ip| ip["address"].as_str()?.split('/').next()?.parse().ok())
        .collect();
    let addr4 = addresses.iter().find_map(|address| match address {
        IpAddr::V4(address) => Some(*address),
        IpAddr::V6(_) => None,
    });
    let addr6 = addresses.iter().find_map(|address| match address {
        IpAddr::V6(address) => Some(*address),
        IpAddr::V4(_) => None,
    });
    addr4
        .zip(addr6)
        .with_context(|| format!("weft-cni ADD gave no address of each family: {result}"))
}

/// Executes the plugin; its result or its error object.
fn add(node: &Netns, pod: &Netns, binaries: &Path, socket: &Path, identity: &str) -> Result<Value> {
    let network = json!({
        "cniVersion": "1.1.0", "name": "weft", "type": "weft-cni", "socket": socket,
    });
    let mut child = node.run(|| {
        Command::new(binaries.join("weft-cni"))
            .env_clear()
            .env("CNI_COMMAND", "ADD")
            .env("CNI_CONTAINERID", pod.name())
            .env("CNI_NETNS", pod.path())
            .env("CNI_IFNAME", "net1")
            .env("CNI_PATH", binaries)
            .env("CNI_ARGS", identity)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .context("failed to start weft-cni")
    })?;
    let mut stdin = child
        .stdin
        .take()
        .context("weft-cni has no standard input")?;
    stdin
        .write_all(network.to_string().as_bytes())
        .context("failed to ask weft-cni")?;
    drop(stdin);
    let output = child
        .wait_with_output()
        .context("failed to wait for weft-cni")?;
    serde_json::from_slice(&output.stdout).context("weft-cni's result is no JSON")
}
