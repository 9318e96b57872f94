//! One node of the tests: a namespace with a daemon that follows a table in a file, and pods attached by hand
//! through the CNI door.

use std::{
    fs,
    io::{self, BufRead, BufReader, Write},
    net::{Ipv4Addr, Ipv6Addr},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Mutex,
    time::Duration,
};

use ebpf_common::addr::{Mesh4, Mesh6, Name4, Name6, Policy};
use netmanager_api::{
    cni::{AttachmentKey, PodRef, Refused, Reply, Request, Reserve, Reserved},
    stream::InstanceRef,
    table::{
        Backend, BackendState, Mesh, Node as TableNode, PolicyName, Port, Protocol, Revision,
        Service, Table, Vip,
    },
};
use nix::{
    mount::{MntFlags, umount2},
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tempfile::TempDir;
use weft_tests::{Netns, Process, binary, traffic::Server, wait_for};

/// A daemon that starts loads programs; a debug build on a busy machine takes a second.
pub(crate) const SOON: Duration = Duration::from_secs(60);
/// What is refused is refused at once; a packet that is lost in silence takes longer.
pub(crate) const AT_ONCE: Duration = Duration::from_millis(900);

pub(crate) const VIP4: Ipv4Addr = Ipv4Addr::new(10, 24, 0, 5);
pub(crate) const UNLINKED4: Ipv4Addr = Ipv4Addr::new(10, 24, 0, 6);

pub(crate) fn vip6() -> Ipv6Addr {
    "fd12:3456:789a:1000:0:5::".parse().unwrap()
}

pub(crate) fn unlinked6() -> Ipv6Addr {
    "fd12:3456:789a:1000:0:6::".parse().unwrap()
}

/// The table of node 1 with one service, TCP 80 -> 8080 and UDP 53 -> 5353.
pub(crate) fn table(index: u64, backends: Vec<Backend>) -> Table {
    table_of(1, index, backends)
}

/// The same of another node.
pub(crate) fn table_of(number: u32, index: u64, backends: Vec<Backend>) -> Table {
    let port = |protocol, port, target_port| Port {
        protocol,
        port,
        target_port,
        follow: false,
    };
    Table {
        revision: Revision {
            incarnation: 1,
            index,
        },
        mesh: Mesh {
            prefix6: "fd12:3456:789a::/48".parse().unwrap(),
            prefix4: Some("10.16.0.0/12".parse().unwrap()),
            seed: 7,
        },
        node: TableNode {
            number,
            blocks4: vec![block4(number)],
            carbon_g_kwh: None,
        },
        peers: Vec::new(),
        services: vec![Service {
            name: "default/shop/web".into(),
            number: 5,
            ports: vec![port(Protocol::Tcp, 80, 8080), port(Protocol::Udp, 53, 5353)],
            vips: vec![
                vip(Policy::Balanced, None),
                vip(Policy::Closest, None),
                vip(Policy::Instance, Some(1)),
            ],
            backends,
        }],
        spliced: Vec::new(),
    }
}

/// The block of a node's IPv4 addresses.
pub(crate) fn block4(number: u32) -> ipnet::Ipv4Net {
    format!("10.16.0.{}/27", (number - 1) * 32).parse().unwrap()
}

/// A VIP of the service, as the leads number it.
pub(crate) fn vip(policy: Policy, instance: Option<u32>) -> Vip {
    let mesh4 = Mesh4::new(u32::from_be_bytes([10, 16, 0, 0]), 12).unwrap();
    let mesh6 = Mesh6::new(0xfd12_3456_789a << 80).unwrap();
    let number = if instance.is_some() { 9 } else { 5 };
    let name6 = Name6::Vip {
        policy,
        service: 5,
        instance: instance.unwrap_or(0),
    };
    Vip {
        policy: PolicyName(policy),
        instance,
        addr6: Ipv6Addr::from_bits(mesh6.encode(name6)),
        addr4: mesh4
            .encode(Name4::Vip { policy, number })
            .map(Ipv4Addr::from_bits),
    }
}

pub(crate) struct Node {
    pub(crate) netns: Netns,
    pub(crate) number: u32,
    directory: TempDir,
    /// What the daemon's command line has beside what every test's has.
    pub(crate) args: Vec<String>,
    /// Another version's daemon, instead of this one's.
    pub(crate) program: Option<PathBuf>,
    daemon: Option<Process>,
}

impl Drop for Node {
    fn drop(&mut self) {
        self.daemon = None;
        // The userspace tunnel outlives its daemon, on purpose.
        let folders = [self.path("state"), self.path("state/second")];
        for entry in folders
            .iter()
            .filter_map(|at| fs::read_dir(at).ok())
            .flatten()
            .flatten()
        {
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.starts_with("tunnel-") && name.ends_with(".pid") {
                let number = fs::read_to_string(entry.path()).unwrap_or_default();
                if let Ok(number) = number.trim().parse() {
                    // It may have ended by itself.
                    let _ = kill(Pid::from_raw(number), Signal::SIGKILL);
                }
            }
        }
        // Fails only where the daemon never mounted it.
        let _ = umount2(&self.path("bpf"), MntFlags::MNT_DETACH);
    }
}

impl Node {
    /// A node whose daemon answers.
    pub(crate) fn start(label: &str, args: &[&str]) -> Self {
        let mut node = Self::prepare(label, args);
        node.write_table(&table(1, Vec::new()));
        node.run();
        node.wait_ready();
        node
    }

    /// A node without a daemon.
    pub(crate) fn prepare(label: &str, args: &[&str]) -> Self {
        Self::prepare_in(Netns::new(label).unwrap(), 1, args)
    }

    /// The same in a namespace that is there.
    pub(crate) fn prepare_in(netns: Netns, number: u32, args: &[&str]) -> Self {
        Self {
            netns,
            number,
            directory: tempfile::tempdir().unwrap(),
            args: args.iter().map(|&arg| arg.to_owned()).collect(),
            program: None,
            daemon: None,
        }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The daemon's command line, with `state` as its state directory.
    pub(crate) fn command(&self, state: &Path, socket: &Path) -> Command {
        let own = || binary("weft-netmanager");
        let mut command = Command::new(self.program.clone().unwrap_or_else(own));
        command
            .args(["run", "--node", "n1", "--tunnel-device", &self.device()])
            .args(self.source())
            .arg("--state")
            .arg(state)
            .arg("--socket")
            .arg(socket)
            .arg("--bpffs")
            .arg(self.path("bpf"))
            .args(self.sizes())
            .args(&self.args);
        command
    }

    /// Maps of a size that takes no time to make, unless the test wants others.
    fn sizes(&self) -> Vec<&'static str> {
        let sizes = [
            ["--flows", "4096"],
            ["--backends", "256"],
            ["--slots", "65536"],
            ["--vips", "256"],
        ];
        let is_given = |option: &str| self.args.iter().any(|arg| arg == option);
        sizes
            .into_iter()
            .filter(|[option, _]| !is_given(option))
            .flatten()
            .collect()
    }

    /// Whom it follows: the agent of `args`, else a file.
    fn source(&self) -> Vec<String> {
        if self.args.iter().any(|arg| arg == "--agent") {
            return Vec::new();
        }
        vec![
            "--table".to_owned(),
            self.path("table.json").display().to_string(),
        ]
    }

    /// The command line that takes the node out of the mesh.
    pub(crate) fn removal(&self) -> Command {
        let mut command = Command::new(binary("weft-netmanager"));
        command
            .args(["remove", "--tunnel-device", &self.device()])
            .arg("--state")
            .arg(self.path("state"))
            .arg("--bpffs")
            .arg(self.path("bpf"));
        command
    }

    /// The command line that hands the node back to the previous version.
    pub(crate) fn downgrade(&self) -> Command {
        let mut command = Command::new(binary("weft-netmanager"));
        command
            .arg("downgrade")
            .arg("--state")
            .arg(self.path("state"))
            .arg("--bpffs")
            .arg(self.path("bpf"));
        command
    }

    /// The daemon's process.
    pub(crate) fn pid(&self) -> u32 {
        self.daemon.as_ref().unwrap().0.id()
    }

    /// A name that no other test's tunnel has.
    fn device(&self) -> String {
        let digits = self.netns.name().chars().filter(char::is_ascii_digit);
        digits.fold("wn".to_owned(), |name, digit| format!("{name}{digit}"))
    }

    pub(crate) fn run(&mut self) {
        let log = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.path("log"))
            .unwrap();
        let mut command = self.command(&self.path("state"), &self.path("cni.sock"));
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        self.daemon = Some(self.netns.spawn(&mut command).unwrap());
    }

    /// Starts the daemon, with a first table where there is none yet, and waits until it is ready.
    pub(crate) fn run_ready(&mut self) {
        if !self.path("table.json").exists() {
            self.write_table(&table_of(self.number, 1, Vec::new()));
        }
        self.run();
        self.wait_ready();
    }

    /// As `kill -9` does it.
    pub(crate) fn kill(&mut self) {
        self.daemon = None;
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    pub(crate) fn wait_ready(&self) {
        wait_for("the daemon is ready", SOON, || {
            (self.try_ask(&Request::Status).ok()? == Reply::Done).then_some(())
        });
    }

    pub(crate) fn write_table(&self, table: &Table) {
        let beside = self.path("table.json.new");
        fs::write(&beside, serde_json::to_vec(table).unwrap()).unwrap();
        fs::rename(beside, self.path("table.json")).unwrap();
    }

    /// Writes the table and waits until the daemon took it.
    pub(crate) fn follow(&self, table: &Table) {
        self.write_table(table);
        let revision = format!("index: {} ", table.revision.index);
        wait_for("the table is taken", SOON, || {
            let log = self.log();
            log.lines()
                .any(|line| line.contains("took a table") && line.contains(&revision))
                .then_some(())
        });
        // The table is applied before the next request is answered.
        assert_eq!(self.ask(&Request::Status), Reply::Done, "{}", self.log());
    }

    /// Waits until the table of this index is on disk.
    pub(crate) fn wait_saved(&self, index: u64) {
        wait_for("the table is on disk", SOON, || {
            let saved = fs::read(self.path("state/table.json")).ok()?;
            let saved: Table = serde_json::from_slice(&saved).ok()?;
            (saved.revision.index == index).then_some(())
        });
    }

    /// Waits until somebody answers at the socket, whatever the answer.
    pub(crate) fn wait_open(&self) {
        wait_for("the door is open", SOON, || {
            self.try_ask(&Request::Status).ok()
        });
    }

    pub(crate) fn ask(&self, request: &Request) -> Reply {
        self.try_ask(request)
            .unwrap_or_else(|error| panic!("{error}\n{}", self.log()))
    }

    fn try_ask(&self, request: &Request) -> io::Result<Reply> {
        let mut stream = UnixStream::connect(self.path("cni.sock"))?;
        stream.set_read_timeout(Some(SOON))?;
        let mut line = serde_json::to_vec(request)?;
        line.push(b'\n');
        stream.write_all(&line)?;
        let mut answer = String::new();
        BufReader::new(stream).read_line(&mut answer)?;
        Ok(serde_json::from_str(&answer)?)
    }

    pub(crate) fn refusal(&self, request: &Request) -> Refused {
        match self.ask(request) {
            Reply::Refused(refused) => refused,
            reply => panic!("{reply:?} is no refusal"),
        }
    }

    /// A pod that is attached as the CNI plugin does it.
    pub(crate) fn attach(&self, name: &str) -> Pod {
        self.attach_as(name, None)
    }

    /// A pod that is an instance of a service.
    pub(crate) fn attach_as(&self, name: &str, instance: Option<InstanceRef>) -> Pod {
        let netns = Netns::new(&format!("p{name}")).unwrap();
        let key = AttachmentKey {
            network: "weft".into(),
            container_id: name.into(),
            ifname: "net1".into(),
        };
        let wish = Reserve {
            key: key.clone(),
            netns: netns.path().display().to_string(),
            pod: PodRef {
                name: name.into(),
                ..PodRef::default()
            },
            instance,
            mac: None,
        };
        let reserved = match self.ask(&Request::Reserve(wish)) {
            Reply::Reserved(reserved) => reserved,
            reply => panic!("{reply:?} is no reservation"),
        };
        self.wire(&netns, &reserved);
        let link = self
            .netns
            .ip(&format!("-o link show {}", reserved.host_ifname))
            .unwrap();
        let host_ifindex = link.split(':').next().unwrap().parse().unwrap();
        let activate = Request::Activate {
            key: key.clone(),
            host_ifindex,
        };
        assert_eq!(self.ask(&activate), Reply::Done);
        self.netns
            .ip(&format!("link set {} up", reserved.host_ifname))
            .unwrap();
        Pod {
            servers: Mutex::default(),
            netns,
            node: self.number,
            key,
            reserved,
        }
    }

    fn wire(&self, pod: &Netns, reserved: &Reserved) {
        let Reserved {
            host_ifname,
            host_mac,
            mac,
            mtu,
            addr6,
            gateway6,
            mesh6,
            ..
        } = reserved;
        self.netns
            .ip(&format!(
                "link add {host_ifname} address {host_mac} mtu {mtu} type veth peer name net1 address {mac} mtu {mtu} netns {}",
                pod.name()
            ))
            .unwrap();
        pod.ip("link set net1 up").unwrap();
        pod.ip(&format!("address add {addr6}/128 dev net1 nodad"))
            .unwrap();
        let mut ways = vec![(
            "-6",
            gateway6.to_string(),
            mesh6.to_string(),
            addr6.to_string(),
        )];
        if let (Some(addr4), Some(gateway4), Some(mesh4)) =
            (reserved.addr4, reserved.gateway4, reserved.mesh4)
        {
            pod.ip(&format!("address add {addr4}/32 dev net1")).unwrap();
            ways.push((
                "-4",
                gateway4.to_string(),
                mesh4.to_string(),
                addr4.to_string(),
            ));
        }
        for (family, gateway, mesh, own) in ways {
            pod.ip(&format!(
                "neigh add {gateway} lladdr {host_mac} dev net1 nud permanent"
            ))
            .unwrap();
            pod.ip(&format!("{family} route add {gateway} dev net1"))
                .unwrap();
            pod.ip(&format!(
                "{family} route add {mesh} via {gateway} dev net1 src {own} onlink"
            ))
            .unwrap();
        }
    }
}

pub(crate) struct Pod {
    servers: Mutex<Vec<Server>>,
    pub(crate) netns: Netns,
    node: u32,
    pub(crate) key: AttachmentKey,
    pub(crate) reserved: Reserved,
}

impl Pod {
    /// This pod as a backend of the table.
    pub(crate) fn backend(&self, instance: u32, state: BackendState) -> Backend {
        Backend {
            instance,
            epoch: 1,
            node: self.node,
            addr6: self.reserved.addr6,
            addr4: self.reserved.addr4,
            state,
        }
    }

    /// Answers TCP 8080 and UDP 5353 until the pod is dropped.
    pub(crate) fn serve(&self, name: &str) {
        let server = Server::start(&self.netns, name, &[8080], &[5353]).unwrap();
        self.servers.lock().unwrap().push(server);
    }
}
