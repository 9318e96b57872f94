//! One node: a namespace with the daemon, its state, its pins and its tunnel.

use std::{
    collections::BTreeMap,
    fs,
    io::{self, BufRead, BufReader, Write},
    net::{Ipv4Addr, Ipv6Addr},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
};

use aya::maps::{Map, MapData, PerCpuArray};
use ebpf_common::{
    addr::{Mesh6, NODE_ENDPOINT, Name6},
    layout::{Flow, FlowKey, LAYOUT_VERSION},
    reason::Reason,
};
use ipnet::Ipv4Net;
use netmanager_api::{
    cni::{Reply, Request},
    table::Table,
};
use nix::{
    mount::{MntFlags, umount2},
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tempfile::TempDir;
use weft_netmanager::{
    tunnel::{key_path, pid_path},
    wireguard::key::PrivateKey,
};

use super::{SOON, TUNNEL_PORT, nth, service, underlay};
use weft_netmanager::{datapath::FlowTable, janitor::FlowSource};

use crate::{Netns, Process, binary, wait_for};

/// See the module.
#[derive(Debug)]
pub struct Node {
    daemon: Option<Process>,
    /// Its namespace.
    pub netns: Netns,
    /// Its number in the mesh.
    pub number: u32,
    /// The number of its primary pod CIDR.
    pub(super) pods: u32,
    directory: TempDir,
    args: Vec<String>,
    given: AtomicU32,
}

impl Drop for Node {
    fn drop(&mut self) {
        self.daemon = None;
        // The userspace tunnel outlives its daemon, on purpose.
        self.kill_tunnel();
        // Fails only where the daemon never mounted it.
        let _ = umount2(&self.path("bpf"), MntFlags::MNT_DETACH);
    }
}

impl Node {
    pub(super) fn prepare(netns: Netns, number: u32, pods: u32, args: &[String]) -> Self {
        for (name, value) in [("ipv4.ip_forward", "1"), ("ipv6.conf.all.forwarding", "1")] {
            netns.sysctl(name, value).unwrap();
        }
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("state")).unwrap();
        Self {
            daemon: None,
            netns,
            number,
            pods,
            directory,
            args: args.to_vec(),
            given: AtomicU32::new(0),
        }
    }

    /// A file of the node's own: `state`, `bpf`, `cni.sock`, `table.json`, `log`.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The name of its tunnel device, which no other node on this machine has.
    #[must_use]
    pub fn tunnel_device(&self) -> String {
        let digits = self.netns.name().rsplit('-').take(2);
        let parts: Vec<_> = digits.collect();
        format!("wm{}-{}", parts[1], parts[0])
    }

    /// The daemon's command line.
    #[must_use]
    pub fn command(&self) -> Command {
        let mut command = Command::new(binary("weft-netmanager"));
        command
            .args(["run", "--node", &format!("n{}", self.number)])
            .args(["--tunnel-device", &self.tunnel_device()])
            .args(["--tunnel-port", &TUNNEL_PORT.to_string()])
            .args(["--underlay", &underlay::address(self.number).to_string()])
            .arg("--table")
            .arg(self.path("table.json"))
            .arg("--state")
            .arg(self.path("state"))
            .arg("--socket")
            .arg(self.path("cni.sock"))
            .arg("--bpffs")
            .arg(self.path("bpf"))
            // Maps of a size that a test fills in no time to make.
            .args(["--flows", "4096", "--backends", "256"])
            .args(["--slots", "65536", "--vips", "2048"])
            .args(&self.args);
        command
    }

    /// Starts the daemon.
    ///
    /// # Panics
    /// When it is not built.
    pub fn run(&mut self) {
        let log = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.path("log"))
            .unwrap();
        let mut command = self.command();
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        self.daemon = Some(self.netns.spawn(&mut command).unwrap());
    }

    /// Ends the daemon as `kill -9` does.
    pub fn kill(&mut self) {
        self.daemon = None;
    }

    /// Ends the userspace tunnel as `kill -9` does; whether there was one.
    ///
    /// # Panics
    /// When it cannot be signalled.
    pub fn kill_tunnel(&self) -> bool {
        let file = pid_path(&self.path("state"), &self.tunnel_device());
        let number = fs::read_to_string(file).unwrap_or_default();
        let Ok(number) = number.trim().parse() else {
            return false;
        };
        // It may have ended by itself.
        kill(Pid::from_raw(number), Signal::SIGKILL).is_ok()
    }

    /// Does to the node what a reboot does: no daemon, no tunnel, nothing of Weft's in the kernel. The disk stays.
    ///
    /// # Panics
    /// When something cannot be removed.
    pub fn reboot(&mut self) {
        self.kill();
        self.kill_tunnel();
        umount2(&self.path("bpf"), MntFlags::MNT_DETACH).unwrap();
        self.netns.ip("link delete weft-node").unwrap();
        for family in ["-4", "-6"] {
            for priority in 5_746..5_749 {
                self.netns
                    .ip(&format!("{family} rule delete priority {priority}"))
                    .unwrap();
            }
            self.netns
                .ip(&format!("{family} route flush table all proto 157"))
                .unwrap();
        }
    }

    /// Runs `weft-netmanager guard`, as a unit of an early boot does.
    ///
    /// # Panics
    /// When it fails.
    pub fn guard(&self) {
        let mut command = Command::new(binary("weft-netmanager"));
        command.arg("guard").arg("--state").arg(self.path("state"));
        let output = self.netns.output(&mut command).unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{said}");
    }

    /// What the daemons said so far.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    /// Waits until the daemon says that it is ready.
    ///
    /// # Panics
    /// When it does not.
    #[track_caller]
    pub fn wait_ready(&self) {
        wait_for("the daemon is ready", SOON, || {
            (self.ask(&Request::Status).ok()? == Reply::Done).then_some(())
        });
    }

    /// Puts a table where the daemon looks for it.
    ///
    /// # Panics
    /// When it cannot be written.
    pub fn write_table(&self, table: &Table) {
        let beside = self.path("table.json.new");
        fs::write(&beside, serde_json::to_vec(table).unwrap()).unwrap();
        fs::rename(beside, self.path("table.json")).unwrap();
    }

    /// Waits until the daemon has taken the table of this log index and applied it.
    ///
    /// # Panics
    /// When it does not, or the kernel does not match it.
    #[track_caller]
    pub fn wait_applied(&self, index: u64) {
        let revision = format!("index: {index} ");
        wait_for("the table is taken", SOON, || {
            let log = self.log();
            log.lines()
                .any(|line| line.contains("took a table") && line.contains(&revision))
                .then_some(())
        });
        // The table is applied before the next request is answered.
        let reply = self.ask(&Request::Status).unwrap();
        assert_eq!(reply, Reply::Done, "{}", self.log());
    }

    /// Asks the daemon at its CNI door.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn ask(&self, request: &Request) -> io::Result<Reply> {
        let mut stream = UnixStream::connect(self.path("cni.sock"))?;
        stream.set_read_timeout(Some(SOON))?;
        let mut line = serde_json::to_vec(request)?;
        line.push(b'\n');
        stream.write_all(&line)?;
        let mut answer = String::new();
        BufReader::new(stream).read_line(&mut answer)?;
        Ok(serde_json::from_str(&answer)?)
    }

    /// Packets that were dropped or answered, by reason; also while no daemon runs.
    ///
    /// # Panics
    /// When the counters are not pinned.
    #[must_use]
    pub fn reasons(&self) -> BTreeMap<&'static str, u64> {
        reasons(&self.pin("REASONS"))
    }

    /// The entries of connections, wherever they are.
    ///
    /// # Panics
    /// When the maps are not pinned.
    #[must_use]
    pub fn established(&self) -> Vec<(FlowKey, Flow)> {
        let mut table = FlowTable::connections(&self.pin("FLOWS").with_file_name("")).unwrap();
        let mut all = Vec::new();
        loop {
            let page = table.next_page().unwrap();
            all.extend(page.flows);
            if page.is_last {
                return all;
            }
        }
    }

    /// Where a map is pinned.
    fn pin(&self, map: &str) -> PathBuf {
        self.path("bpf")
            .join(format!("v{LAYOUT_VERSION}/maps/{map}"))
    }

    /// How often `work` made the node count each reason; those that it did not are left out.
    ///
    /// # Panics
    /// As [`Node::reasons`], and when `work` does.
    pub fn counted<T>(&self, work: impl FnOnce() -> T) -> (T, BTreeMap<&'static str, u64>) {
        let before = self.reasons();
        let result = work();
        let mut after = self.reasons();
        for (name, count) in &mut after {
            *count -= before[name];
        }
        after.retain(|_, count| *count > 0);
        (result, after)
    }

    /// Hides pods that leave their CIDR behind the node, as a cluster's network does (the bridge plugin's `ipMasq`,
    /// flannel, kindnet).
    ///
    /// # Panics
    /// When the rules are refused.
    pub fn masquerade(&self) {
        for (program, pods) in [
            ("iptables", "10.244.0.0/16"),
            ("ip6tables", "2001:db8:f4::/48"),
        ] {
            let rule = format!("-t nat -A POSTROUTING -s {pods} ! -d {pods} -j MASQUERADE");
            let words: Vec<_> = rule.split(' ').collect();
            self.netns.succeed(program, &words).unwrap();
        }
    }

    /// The node endpoint's IPv6 address.
    ///
    /// # Panics
    /// Never: the tests' prefix is one.
    #[must_use]
    pub fn address6(&self) -> Ipv6Addr {
        let mesh = Mesh6::new(service::prefix6().network().to_bits()).unwrap();
        Ipv6Addr::from_bits(mesh.encode(Name6::Endpoint {
            node: self.number,
            endpoint: NODE_ENDPOINT,
        }))
    }

    /// Its block of IPv4 addresses.
    ///
    /// # Panics
    /// When the number is no node's.
    #[must_use]
    pub fn block4(&self) -> Ipv4Net {
        let first: Ipv4Addr = nth(service::prefix4().network(), (self.number - 1) * 32);
        Ipv4Net::new(first, 27).unwrap()
    }

    /// Its tunnel's public key, base64.
    ///
    /// # Panics
    /// When the state directory cannot be used.
    #[must_use]
    pub fn public_key(&self) -> String {
        let key = PrivateKey::load_or_create(&key_path(&self.path("state"))).unwrap();
        key.public().to_string()
    }

    pub(super) fn next_pod(&self) -> u32 {
        self.given.fetch_add(1, Ordering::Relaxed) + 1
    }
}

/// The counters of a pinned `REASONS`.
///
/// # Panics
/// When it is none.
#[must_use]
pub fn reasons(pin: &Path) -> BTreeMap<&'static str, u64> {
    let map = Map::PerCpuArray(MapData::from_pin(pin).unwrap());
    let counters: PerCpuArray<MapData, u64> = map.try_into().unwrap();
    Reason::ALL
        .iter()
        .map(|reason| {
            let counts = counters.get(&(*reason as u32), 0).unwrap();
            (reason.name(), counts.iter().sum())
        })
        .collect()
}
