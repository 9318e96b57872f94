//! Weft's own side: a node with its NetManager, which follows a table from a file, and pods attached by the CNI
//! plugin.

use std::{
    ffi::OsStr,
    fs::{self, File},
    net::{IpAddr, TcpListener, TcpStream},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result};
use netmanager_api::table::Peer;
use weft_netmanager::{tunnel::key_path, wireguard::key::PrivateKey};
use weft_tests::{Netns, Process, topology, wait_for};

use crate::{
    load::{Family, Metric, Path as Way},
    statistics::Program,
};

mod cni;
mod table;

pub(crate) use cni::Addresses;
pub(crate) use table::{caller, identity, vips};

/// UDP port of the tunnels; in a namespace of its own any port is free.
const TUNNEL_PORT: u16 = 27_460;
/// How long the NetManager may take for each step.
const PATIENCE: Duration = Duration::from_secs(20);

/// A node and its NetManager.
#[derive(Debug)]
pub(crate) struct Machine {
    daemon: Process,
    device: String,
    dir: PathBuf,
    binaries: PathBuf,
    number: u8,
    revision: u64,
    netns: Netns,
}

/// The underlay address of a node.
pub(crate) fn underlay(number: u8) -> IpAddr {
    IpAddr::from([198, 51, 100, number])
}

impl Machine {
    /// Starts the NetManager of node `number` over the link `up0` and waits until pods can be attached.
    pub(crate) fn start(netns: Netns, number: u8, binaries: &Path) -> Result<Self> {
        Self::start_with(netns, number, binaries, &[])
    }

    /// The same with further options.
    pub(crate) fn start_with(
        netns: Netns,
        number: u8,
        binaries: &Path,
        options: &[&OsStr],
    ) -> Result<Self> {
        let binaries = fs::canonicalize(binaries)
            .with_context(|| format!("failed to find {}", binaries.display()))?;
        netns.ip("link set up0 up")?;
        topology::address(&netns, "up0", &format!("{}/24", underlay(number)))?;
        let dir = std::env::temp_dir().join(netns.name());
        fs::create_dir_all(dir.join("bpf"))
            .with_context(|| format!("failed to make {}", dir.display()))?;
        table::write(&dir, &table::table(number, 1, &[], vec![])?)?;
        let device = format!("wb{}-{number}", std::process::id());
        let log = File::create(dir.join("netmanager.log")).context("failed to make the log")?;
        let daemon = netns.spawn(
            Command::new(binaries.join("weft-netmanager"))
                .args(["run", "--node", "bench", "--tunnel-device", &device])
                .args(["--underlay", &underlay(number).to_string()])
                .args(["--tunnel-port", &TUNNEL_PORT.to_string()])
                .arg("--table")
                .arg(dir.join("table.json"))
                .arg("--state")
                .arg(dir.join("state"))
                .arg("--socket")
                .arg(dir.join("cni.sock"))
                .arg("--bpffs")
                .arg(dir.join("bpf"))
                .args(options)
                .stdout(Stdio::null())
                .stderr(log),
        )?;
        // From here on everything is undone by dropping it.
        let machine = Self {
            daemon,
            device,
            dir,
            binaries,
            number,
            revision: 1,
            netns,
        };
        let socket = machine.socket();
        wait_for("the CNI socket", PATIENCE, || {
            UnixStream::connect(&socket).ok()
        });
        Ok(machine)
    }

    fn socket(&self) -> PathBuf {
        self.dir.join("cni.sock")
    }

    /// Attaches a pod as a runtime does.
    pub(crate) fn attach(&self, pod: &Netns, identity: &str) -> Result<Addresses> {
        cni::attach(&self.netns, pod, &self.binaries, &self.socket(), identity).with_context(|| {
            let log = fs::read_to_string(self.dir.join("netmanager.log")).unwrap_or_default();
            let lines: Vec<_> = log.lines().rev().take(5).collect();
            format!("the NetManager said: {}", lines.join(" <- "))
        })
    }

    /// Gives the node a table with these backends, by node, and these peers.
    pub(crate) fn follow(&mut self, backends: &[(u8, Addresses)], peers: &[Peer]) -> Result<()> {
        self.revision += 1;
        let table = table::table(self.number, self.revision, backends, peers.to_vec())?;
        table::write(&self.dir, &table)
    }

    /// This node as a peer of others.
    pub(crate) fn peer(&self) -> Result<Peer> {
        let key = PrivateKey::load_or_create(&key_path(&self.dir.join("state")))
            .context("failed to read the tunnel's key")?;
        let endpoint = std::net::SocketAddr::new(underlay(self.number), TUNNEL_PORT);
        table::peer(self.number, key.public().to_string(), endpoint)
    }

    /// Whether the kernel carries its tunnel: a TUN device says what it is.
    pub(crate) fn has_kernel_tunnel(&self) -> bool {
        self.netns
            .ip(&format!("-details link show dev {}", self.device))
            .is_ok_and(|text| text.contains("wireguard"))
    }

    /// Waits until `client` reaches `server` by the VIP of each family.
    pub(crate) fn wait_reached(&self, client: &Netns, server: &Netns) -> Result<()> {
        let port = Metric::Throughput.port();
        for (family, address) in Family::ALL.into_iter().zip(vips()) {
            let way = Way {
                client,
                server,
                address,
            };
            let _listener = server
                .run(|| TcpListener::bind(way.listen(Metric::Throughput)))
                .context("failed to listen in the pod")?;
            let what = format!("the VIP over {}", family.name());
            let target = std::net::SocketAddr::new(address, port);
            wait_for(&what, PATIENCE, || {
                client.run(|| TcpStream::connect_timeout(&target, PATIENCE / 20).ok())
            });
        }
        Ok(())
    }

    /// A dispatcher, with what it calls.
    pub(crate) fn program(&self, name: &str) -> Result<Program> {
        Program::pinned_below(&self.dir.join("bpf"), name)
    }
}

impl Drop for Machine {
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
