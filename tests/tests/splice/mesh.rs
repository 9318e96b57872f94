//! A node that splices, with two pods of two services, in a cgroup of the tests' own.

use std::{
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use aya::maps::{HashMap, Map, MapData, PerCpuArray};
use netmanager_api::{
    stream::InstanceRef,
    table::{Backend, BackendState::Ready},
};
use nix::sys::socket::{Backlog, listen};
use socket2::{Domain, Protocol, Socket, Type};
use weft_tests::{Cgroup, Netns, wait_for};

use crate::machine::{Node, Pod, SOON, VIP4, table};

/// The process as a whole is in the cgroup: one test at a time.
static ONE: Mutex<()> = Mutex::new(());
/// How long one read may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// The services of the client's and of the server's pod.
const SERVICES: [&str; 2] = ["a/b/client", "a/b/server"];
/// Bytes of a value of `SPLICES`, and where it counts messages.
const SPLICE_LEN: usize = 128;
const MESSAGES: usize = 40;
/// A value of `VIP_COUNTS`: packets and bytes there and back, flows.
const COUNT_WORDS: usize = 5;

pub(crate) struct Mesh {
    pub(crate) node: Node,
    pub(crate) client: Pod,
    server: Pod,
    listener: Option<TcpListener>,
    filling: Vec<TcpStream>,
    index: u64,
    // Dropped after the node, whose daemon is in it.
    _cgroup: Cgroup,
    _one: MutexGuard<'static, ()>,
}

impl Mesh {
    pub(crate) fn start(label: &str) -> Self {
        let one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
        let cgroup = Cgroup::new(label).unwrap();
        cgroup.enter().unwrap();
        let path = cgroup.path().display().to_string();
        let node = Node::start(label, &["--splice-cgroup", &path]);
        let attach = |name: &str, service: &str| {
            let instance = InstanceRef {
                service: service.to_owned(),
                instance: 0,
                epoch: 1,
            };
            node.attach_as(name, Some(instance))
        };
        let client = attach("client", SERVICES[0]);
        let server = attach("server", SERVICES[1]);
        let mut mesh = Self {
            node,
            client,
            server,
            listener: None,
            filling: Vec::new(),
            index: 1,
            _cgroup: cgroup,
            _one: one,
        };
        mesh.listen_by(Protocol::TCP);
        mesh
    }

    /// The server listens with a socket of this protocol.
    pub(crate) fn listen_by(&mut self, protocol: Protocol) {
        self.listener = None;
        let listener = self.server.netns.run(|| {
            let listener = Socket::new(Domain::IPV6, Type::STREAM, Some(protocol)).unwrap();
            listener.set_reuse_address(true).unwrap();
            let any: SocketAddr = "[::]:8080".parse().unwrap();
            listener.bind(&any.into()).unwrap();
            listener.listen(128).unwrap();
            listener
        });
        self.listener = Some(listener.into());
    }

    fn accept(&self) -> (TcpStream, SocketAddr) {
        let listener = self.listener.as_ref().expect("it listens from its start");
        listener.accept().unwrap()
    }

    /// The node's table says that these services ask to be spliced.
    pub(crate) fn ask(&mut self, services: &[&str]) {
        self.follow(services, vec![self.server.backend(0, Ready)]);
    }

    pub(crate) fn ask_both(&mut self) {
        self.ask(&SERVICES);
    }

    /// The service has no backend any more.
    pub(crate) fn withdraw(&mut self) {
        self.follow(&SERVICES, Vec::new());
    }

    fn follow(&mut self, services: &[&str], backends: Vec<Backend>) {
        self.index += 1;
        let mut table = table(self.index, backends);
        table.spliced = services.iter().map(|&name| name.to_owned()).collect();
        self.node.follow(&table);
    }

    /// Both ends of a new connection.
    pub(crate) fn connect(&self, to: IpAddr) -> (TcpStream, TcpStream) {
        self.connect_by(Protocol::TCP, to)
    }

    /// The same, by a client's socket of this protocol.
    pub(crate) fn connect_by(&self, protocol: Protocol, to: IpAddr) -> (TcpStream, TcpStream) {
        let to = SocketAddr::new(to, 80);
        let client = self.client.netns.run(|| {
            let client =
                Socket::new(Domain::for_address(to), Type::STREAM, Some(protocol)).unwrap();
            client.connect_timeout(&to.into(), PATIENCE).unwrap();
            TcpStream::from(client)
        });
        let (server, _) = self.accept();
        for stream in [&client, &server] {
            stream.set_nodelay(true).unwrap();
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
        }
        (client, server)
    }

    /// The server takes no further connection: a SYN is not answered.
    pub(crate) fn fill_backlog(&mut self) {
        self.set_backlog(0);
        let to = SocketAddr::new(VIP4.into(), 80);
        let fill = || TcpStream::connect_timeout(&to, Duration::from_millis(300));
        while let Ok(stream) = self.client.netns.run(fill) {
            self.filling.push(stream);
        }
        assert!(!self.filling.is_empty());
    }

    fn set_backlog(&self, length: i32) {
        let listener = self.listener.as_ref().expect("it listens from its start");
        listen(listener, Backlog::new(length).unwrap()).unwrap();
    }

    /// Takes the connections that wait, at last that of `wanted`.
    pub(crate) fn empty_backlog(&mut self, wanted: &TcpStream) -> TcpStream {
        self.set_backlog(16);
        loop {
            let (stream, from) = self.accept();
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            if wanted.local_addr().unwrap().port() == from.port() {
                return stream;
            }
        }
    }

    /// Bytes that TCP received on this end of a connection of the pods'; an end of the stream counts as one.
    pub(crate) fn by_tcp(&self, stream: &TcpStream) -> u64 {
        let pods = [&self.client, &self.server];
        let shown = pods.iter().find_map(|pod| by_tcp(&pod.netns, stream));
        shown.expect("it is a socket of one of the pods")
    }

    fn map(&self, name: &str) -> Map {
        let layout = format!("v{}", ebpf_common::layout::LAYOUT_VERSION);
        let pin = self.node.path("bpf").join(layout).join("maps").join(name);
        MapData::from_pin(pin).and_then(Map::from_map_data).unwrap()
    }

    /// Packets and bytes that were counted for VIPs, both directions.
    pub(crate) fn counted(&self) -> (u64, u64) {
        let map: PerCpuArray<MapData, [u64; COUNT_WORDS]> =
            self.map("VIP_COUNTS").try_into().unwrap();
        let cpus = (0..map.len()).flat_map(|index| map.get(&index, 0).unwrap().to_vec());
        cpus.fold(
            (0, 0),
            |(packets, bytes), [there, back, bytes_there, bytes_back, _]| {
                (packets + there + back, bytes + bytes_there + bytes_back)
            },
        )
    }

    fn splices(&self) -> Vec<[u8; SPLICE_LEN]> {
        let map = self.map("SPLICES");
        let map: HashMap<MapData, u64, [u8; SPLICE_LEN]> = map.try_into().unwrap();
        map.iter()
            .filter_map(Result::ok)
            .map(|(_, splice)| splice)
            .collect()
    }

    /// How many sockets are remembered.
    pub(crate) fn remembered(&self) -> usize {
        self.splices().len()
    }

    /// Messages that were handed over between the sockets that are remembered.
    pub(crate) fn messages(&self) -> u64 {
        let count = |splice: &[u8; SPLICE_LEN]| {
            u64::from_ne_bytes(splice[MESSAGES..MESSAGES + 8].try_into().unwrap())
        };
        self.splices().iter().map(count).sum()
    }

    /// Waits until no socket is remembered.
    pub(crate) fn wait_forgotten(&self) {
        wait_for("the sockets are forgotten", SOON, || {
            (self.remembered() == 0).then_some(())
        });
    }
}

/// Bytes that TCP received on this end of a connection, if it is in that namespace.
pub(crate) fn by_tcp(netns: &Netns, stream: &TcpStream) -> Option<u64> {
    let (own, other) = (stream.local_addr().unwrap(), stream.peer_addr().unwrap());
    let filter = format!("sport = :{} and dport = :{}", own.port(), other.port());
    let shown = netns.succeed("ss", &["-tinH", &filter]).unwrap();
    let count = |word: &str| word.strip_prefix("bytes_received:")?.parse().ok();
    // It is left out where it is zero.
    (!shown.is_empty()).then(|| shown.split_whitespace().find_map(count).unwrap_or(0))
}
