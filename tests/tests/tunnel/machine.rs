//! One machine of the tunnel's tests: a namespace, its tunnel, and TCP through it.

use std::{
    collections::BTreeMap,
    fs,
    future::Future,
    io::{self, Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream},
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::{Duration, Instant},
};

use ebpf_common::addr::{Mesh6, NODE_ENDPOINT, Name6};
use netmanager_api::stream::InstanceRef;
use nix::sys::socket::{self, AddressFamily, SockFlag, SockType, SockaddrStorage};
use tempfile::TempDir;
use tokio::runtime::{Builder, Runtime};
use weft_netmanager::{
    tunnel::pid_path,
    wireguard::{
        Config, Device, Kind, Report, Tunnels, TunnelsError, WireGuard,
        key::PublicKey,
        peers::{PeerOp, WantedPeer},
    },
};
use weft_tests::{Netns, binary, topology::pair};

/// A peer that does not answer within this is gone.
const PATIENCE: Duration = Duration::from_secs(3);
static NEXT: AtomicU32 = AtomicU32::new(0);

pub(crate) fn mesh() -> Mesh6 {
    Mesh6::new(0xfd12_3456_789a << 80).unwrap()
}

pub(crate) fn instance(number: u32) -> InstanceRef {
    InstanceRef {
        service: "shop/web/front".to_owned(),
        instance: number,
        epoch: 1,
    }
}

/// A device name that no other test has: sockets are per file system, not per namespace.
pub(crate) fn unique() -> String {
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    format!("wt{:x}-{number}", std::process::id())
}

pub(crate) struct Machine {
    pub(crate) netns: Netns,
    pub(crate) device: String,
    number: u32,
    underlay: IpAddr,
    config: Config,
    wireguard: WireGuard,
    port: u16,
    runtimes: Vec<Runtime>,
    _state: TempDir,
}

/// Two machines whose tunnels know each other, with addresses and routes for both families.
pub(crate) fn connected(label: &str) -> (Machine, Machine) {
    connected_by(label, Some(Kind::Userspace))
}

/// As [`connected`], carried by `kind`.
pub(crate) fn connected_by(label: &str, kind: Option<Kind>) -> (Machine, Machine) {
    let (here, there) = pair(label).unwrap();
    let [mut a, mut b] =
        [(here, 1, "192.0.2.1"), (there, 2, "192.0.2.2")].map(|(netns, number, underlay)| {
            let mut machine = Machine::prepare(netns, number, underlay, &unique());
            machine.set_kind(kind);
            machine.start();
            machine
        });
    a.apply_peer(&b).unwrap();
    b.apply_peer(&a).unwrap();
    a.routes_to(&b);
    b.routes_to(&a);
    (a, b)
}

impl Machine {
    /// A machine with a running tunnel without peers.
    pub(crate) fn new(netns: Netns, number: u32, underlay: &str) -> Self {
        let mut machine = Self::prepare(netns, number, underlay, &unique());
        machine.start();
        machine
    }

    fn start(&mut self) {
        self.port = self.ensure().unwrap().port;
    }

    /// A machine whose tunnel is not started yet.
    pub(crate) fn prepare(netns: Netns, number: u32, underlay: &str, device: &str) -> Self {
        let state = tempfile::tempdir().unwrap();
        let config = Config {
            name: device.to_owned(),
            state: state.path().to_owned(),
            port: 0,
            mtu: 1420,
            is_eager: false,
            kind: Some(Kind::Userspace),
            program: binary("weft-netmanager"),
        };
        let machine = Self {
            device: device.to_owned(),
            number,
            underlay: underlay.parse().unwrap(),
            wireguard: WireGuard::open(config.clone()).unwrap(),
            config,
            port: 0,
            runtimes: Vec::new(),
            _state: state,
            netns,
        };
        for address in [machine.addr4(), machine.addr6()] {
            machine
                .netns
                .ip(&format!("address add {address} dev lo"))
                .unwrap();
        }
        machine
    }

    pub(crate) fn set_port(&mut self, port: u16) {
        self.config.port = port;
        self.restart_daemon();
    }

    pub(crate) fn set_mtu(&mut self, mtu: u16) {
        self.config.mtu = mtu;
        self.restart_daemon();
    }

    fn set_kind(&mut self, kind: Option<Kind>) {
        self.config.kind = kind;
        // Opened inside: the kernel is asked by making a link.
        self.wireguard = self
            .netns
            .run(|| WireGuard::open(self.config.clone()))
            .unwrap();
    }

    pub(crate) fn port(&mut self) -> u16 {
        self.port
    }

    /// The daemon dies without a word and is started anew; its tunnel is not its child any more.
    pub(crate) fn restart_daemon(&mut self) {
        self.wireguard = WireGuard::open(self.config.clone()).unwrap();
    }

    pub(crate) fn key(&self) -> PublicKey {
        self.wireguard.public_key()
    }

    pub(crate) fn addr4(&self) -> IpAddr {
        Ipv4Addr::new(10, 16, 0, u8::try_from(32 * self.number + 1).unwrap()).into()
    }

    pub(crate) fn addr6(&self) -> IpAddr {
        Ipv6Addr::from_bits(mesh().encode(Name6::Endpoint {
            node: self.number,
            endpoint: NODE_ENDPOINT,
        }))
        .into()
    }

    /// This machine as a peer of others.
    pub(crate) fn peer(&self) -> (PublicKey, WantedPeer) {
        let block = Ipv4Addr::new(10, 16, 0, u8::try_from(32 * self.number).unwrap());
        let prefix = Ipv6Addr::from_bits(mesh().node_base(self.number));
        let peer = WantedPeer {
            endpoint: Some(SocketAddr::new(self.underlay, self.port)),
            allowed: [format!("{block}/27"), format!("{prefix}/96")]
                .iter()
                .map(|net| net.parse().unwrap())
                .collect(),
        };
        (self.key(), peer)
    }

    pub(crate) fn routes_to(&self, peer: &Self) {
        let own = [self.addr4(), self.addr6()];
        for (net, own) in peer.peer().1.allowed.iter().zip(own) {
            let (device, family) = (&self.device, if own.is_ipv4() { "-4" } else { "-6" });
            self.netns
                .ip(&format!(
                    "{family} route replace {net} dev {device} src {own}"
                ))
                .unwrap();
        }
    }

    /// The process that carries the tunnel.
    pub(crate) fn pid(&self) -> i32 {
        let path = pid_path(&self.config.state, &self.device);
        fs::read_to_string(path).unwrap().trim().parse().unwrap()
    }

    /// Runs `work` on a thread inside the namespace to its end.
    fn inside<T: Send>(netns: &Netns, work: impl Future<Output = T> + Send) -> T {
        netns.run(|| runtime().block_on(work))
    }

    /// Runs `work` inside the namespace; what it spawned runs on until the machine goes.
    pub(crate) fn keep_running<T: Send, F: Future<Output = T> + Send>(
        &mut self,
        work: impl FnOnce() -> F + Send,
    ) -> T {
        let runtime = self.netns.run(|| {
            Builder::new_multi_thread()
                .worker_threads(1)
                .enable_all()
                .build()
                .unwrap()
        });
        let result = self.netns.run(|| runtime.block_on(work()));
        self.runtimes.push(runtime);
        result
    }

    pub(crate) fn ensure(&mut self) -> Result<Device, TunnelsError> {
        Self::inside(&self.netns, self.wireguard.ensure())
    }

    pub(crate) fn apply(
        &mut self,
        peers: &[(PublicKey, WantedPeer)],
    ) -> Result<Vec<PeerOp>, TunnelsError> {
        let want: BTreeMap<_, _> = peers.iter().cloned().collect();
        Self::inside(&self.netns, self.wireguard.apply(&want))
    }

    pub(crate) fn apply_peer(&mut self, peer: &Self) -> Result<Vec<PeerOp>, TunnelsError> {
        self.apply(&[peer.peer()])
    }

    pub(crate) fn report(&mut self) -> Result<Report, TunnelsError> {
        Self::inside(&self.netns, self.wireguard.report())
    }

    pub(crate) fn remove(&mut self) -> Result<(), TunnelsError> {
        Self::inside(&self.netns, self.wireguard.remove())
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        for runtime in self.runtimes.drain(..) {
            runtime.shutdown_background();
        }
        if let Err(error) = self.remove() {
            eprintln!("{error}");
        }
    }
}

fn runtime() -> Runtime {
    Builder::new_current_thread().enable_all().build().unwrap()
}

/// A listener that answers: what it is sent comes back, a bulk is counted.
pub(crate) struct Listener {
    pub(crate) address: SocketAddr,
}

/// A byte that asks the listener to give everything back, or to count until the end.
const ROUND: u8 = 1;
const BULK: u8 = 2;

/// Listens on `machine`; the thread ends with its connections, at the latest with the test.
pub(crate) fn listen(machine: &Machine, address: IpAddr) -> Listener {
    let listener = machine
        .netns
        .run(|| TcpListener::bind((address, 0)))
        .unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        while let Ok((stream, _)) = listener.accept() {
            thread::spawn(move || serve(stream));
        }
    });
    Listener { address }
}

fn serve(mut stream: TcpStream) -> io::Result<()> {
    let mut mode = [0];
    stream.read_exact(&mut mode)?;
    let mut buffer = vec![0; 1 << 18];
    let (mut count, mut sum) = (0u64, Sum::default());
    loop {
        let len = stream.read(&mut buffer)?;
        if len == 0 {
            break;
        }
        match mode[0] {
            ROUND => stream.write_all(&buffer[..len])?,
            _ => {
                count += len as u64;
                sum.add(&buffer[..len]);
            }
        }
    }
    if mode[0] == BULK {
        stream.write_all(&count.to_be_bytes())?;
        stream.write_all(&sum.0.to_be_bytes())?;
    }
    Ok(())
}

/// A sum over bytes that depends on their order.
#[derive(Default)]
struct Sum(u64);

impl Sum {
    fn add(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = self.0.rotate_left(5) ^ u64::from(*byte);
        }
    }
}

/// A connection through the tunnel.
pub(crate) struct Connection {
    stream: TcpStream,
    mode: Option<u8>,
}

/// Connects from `from` on `machine` to `to`.
pub(crate) fn stream(machine: &Machine, from: IpAddr, to: SocketAddr) -> io::Result<Connection> {
    let stream = machine.netns.run(|| -> io::Result<TcpStream> {
        let family = if from.is_ipv4() {
            AddressFamily::Inet
        } else {
            AddressFamily::Inet6
        };
        let fd = socket::socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
        let raw = std::os::fd::AsRawFd::as_raw_fd(&fd);
        socket::bind(raw, &SockaddrStorage::from(SocketAddr::new(from, 0)))?;
        let patience = nix::sys::time::TimeVal::new(PATIENCE.as_secs().cast_signed(), 0);
        socket::setsockopt(&fd, socket::sockopt::SendTimeout, &patience)?;
        socket::setsockopt(&fd, socket::sockopt::ReceiveTimeout, &patience)?;
        socket::connect(raw, &SockaddrStorage::from(to))?;
        Ok(fd.into())
    })?;
    Ok(Connection { stream, mode: None })
}

impl Connection {
    /// Sends `bytes` and expects them back.
    pub(crate) fn round(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.mode.replace(ROUND).is_none() {
            self.stream.write_all(&[ROUND])?;
        }
        self.stream.write_all(bytes)?;
        let mut back = vec![0; bytes.len()];
        self.stream.read_exact(&mut back)?;
        if back == bytes {
            Ok(())
        } else {
            Err(io::Error::other("other bytes came back"))
        }
    }

    /// Sends for `time` and returns how many bytes arrived unchanged.
    pub(crate) fn bulk(&mut self, time: Duration) -> io::Result<u64> {
        self.stream.write_all(&[BULK])?;
        let chunk: Vec<u8> = (0u32..1 << 18)
            .map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8)
            .collect();
        let (mut count, mut sum) = (0u64, Sum::default());
        let deadline = Instant::now() + time;
        while Instant::now() < deadline {
            self.stream.write_all(&chunk)?;
            count += chunk.len() as u64;
            sum.add(&chunk);
        }
        self.stream.shutdown(std::net::Shutdown::Write)?;
        let mut answer = [0; 16];
        self.stream.read_exact(&mut answer)?;
        let want = [count.to_be_bytes(), sum.0.to_be_bytes()].concat();
        if answer[..] == want[..] {
            Ok(count)
        } else {
            Err(io::Error::other("other bytes arrived"))
        }
    }
}

/// One connection from `from` to `to` that gives `bytes` back.
pub(crate) fn exchange(
    from: (&Machine, IpAddr),
    to: (&Machine, IpAddr),
    bytes: &[u8],
) -> io::Result<()> {
    let listener = listen(to.0, to.1);
    stream(from.0, from.1, listener.address)?.round(bytes)
}
