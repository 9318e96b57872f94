//! The kernel programs without a network: bytes in, verdict and bytes out (`BPF_PROG_TEST_RUN`).
//!
//! A [`Node`] is one load of the committed object with small maps of its own. A test run has no device but
//! loopback, so the sender is told by what `ENDPOINTS` holds for loopback's index; where a packet goes is told
//! by the MAC addresses that the program wrote. The object of another build is taken from `WEFT_BPF_OBJECT`.

pub mod bytes;
pub mod flows;
pub mod odd;
pub mod packet;
pub mod stage;
pub mod talk;
pub mod wire;

use std::{net::IpAddr, path::PathBuf};

use aya::{
    Ebpf, EbpfLoader, TestRun, TestRunOptions,
    maps::{
        Array, HashMap, MapData, MapError, PerCpuArray, PerCpuHashMap, PerCpuValues, ProgramArray,
        RingBuf,
    },
    programs::SchedClassifier,
    util::nr_cpus,
};
use ebpf_common::{
    layout::{
        Account, Addr, Backend, Config, Count, DIRECT_FLOWS, DIRECT_PLACES,
        ENDPOINT_PLAIN_REDIRECT, Endpoint, Event, LogConfig, LogState, PROGRAM_POD, PROGRAM_TUNNEL,
        Peer, RefusedKey, Settled, Vip, VipKey, direct_link,
    },
    reason::Reason,
};

use self::bytes::Bytes;

/// Drop (`TC_ACT_SHOT`, linux/pkt_cls.h).
pub const DROPPED: u32 = 2;
/// On its way to a device (`TC_ACT_REDIRECT`).
pub const REDIRECTED: u32 = 7;
/// What a test run sees as its device: loopback's index in every network namespace.
const DEVICE: u32 = 1;
/// Where `ifindex` is in `struct __sk_buff` (linux/bpf.h), bytes.
const IFINDEX: usize = 40;

/// What a program did with one packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// The TC action.
    pub action: u32,
    /// The packet as the program left it.
    pub bytes: Vec<u8>,
}

/// By which maps a node knows its endpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Known {
    /// By hash and by place, as the daemon writes it.
    Both,
    /// Only by hash (`ENDPOINTS`, `LOCAL`).
    ByHash,
    /// Only by place (`ENDPOINTS_DIRECT`, `LOCAL_DIRECT`).
    ByPlace,
}

/// How many entries the maps that a test may want to fill have.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// Entries of `FLOWS`.
    pub flows: u32,
    /// Entries of `FLOWS_LRU`.
    pub recent: u32,
    /// Connections in `AGEING`.
    pub ageing: u32,
    /// Places of `FLOWS_DIRECT`, at least 1.
    pub places: u32,
}

impl Default for Sizes {
    fn default() -> Self {
        Self {
            flows: 1024,
            recent: 4096,
            ageing: 512,
            places: DIRECT_FLOWS,
        }
    }
}

/// One load of the programs, with maps of its own.
pub struct Node {
    ebpf: Ebpf,
    /// The kernel empties a program array when the last descriptor of it is closed.
    _programs: ProgramArray<MapData>,
    known: Known,
}

impl Node {
    /// Loads the object; panics with the verifier's words where the kernel refuses it.
    #[must_use]
    pub fn load(sizes: Sizes) -> Self {
        let path = object_path();
        let mut ebpf = EbpfLoader::new()
            .map_max_entries("FLOWS", sizes.flows)
            .map_max_entries("FLOWS_LRU", sizes.recent)
            .map_max_entries("AGEING", sizes.ageing)
            .map_max_entries("FLOWS_DIRECT", sizes.places)
            .map_max_entries("SLOTS", 65_536)
            .load_file(&path)
            .unwrap_or_else(|error| panic!("{} does not load: {error:?}", path.display()));
        let mut programs: ProgramArray<MapData> = ebpf
            .take_map("PROGRAMS")
            .expect("the object has PROGRAMS")
            .try_into()
            .expect("PROGRAMS is a program array");
        for (name, slot) in [
            ("weft_dispatch_pod", None),
            ("weft_dispatch_tunnel", None),
            ("weft_pod", Some(PROGRAM_POD)),
            ("weft_tunnel", Some(PROGRAM_TUNNEL)),
        ] {
            let program: &mut SchedClassifier = ebpf
                .program_mut(name)
                .unwrap_or_else(|| panic!("the object has no {name}"))
                .try_into()
                .expect("a classifier");
            program
                .load()
                .unwrap_or_else(|error| panic!("{name} is refused: {error}"));
            if let Some(slot) = slot {
                let fd = program.fd().expect("just loaded");
                programs.set(slot, fd, 0).expect("a slot of PROGRAMS");
            }
        }
        Self {
            ebpf,
            _programs: programs,
            known: Known::Both,
        }
    }

    /// How many instructions the verifier went through for each program.
    #[must_use]
    pub fn verified(&self) -> Vec<(&str, u32)> {
        self.ebpf
            .programs()
            .filter_map(|(name, program)| {
                let info = program.info().ok()?;
                let count = info.verified_instruction_count();
                Some((name, count.expect("the kernel is 5.16 or later")))
            })
            .collect()
    }

    /// What the mesh and this node are.
    pub fn configure(&mut self, config: &Config) {
        self.array::<96>("CONFIG")
            .set(0, config.to_array(), 0)
            .expect("CONFIG has one element");
    }

    /// Makes an endpoint local.
    pub fn attach(&mut self, endpoint: &Endpoint) {
        let value = endpoint.to_array::<64>();
        for address in [endpoint.addr4, endpoint.addr6] {
            if address == Addr::default() {
                continue;
            }
            if self.known != Known::ByPlace {
                self.hash::<16, 64>("LOCAL")
                    .insert(address.to_array::<16>(), value, 0)
                    .expect("LOCAL has room");
            }
            if self.known != Known::ByHash {
                self.array::<64>("LOCAL_DIRECT")
                    .set(address.direct(), value, 0)
                    .expect("every address has a place");
            }
        }
    }

    /// Makes a node forget who is local, and know those that are made local from now on by one of its ways only.
    pub fn know(&mut self, known: Known) {
        self.known = known;
        for (hash, places) in [("ENDPOINTS", "ENDPOINTS_DIRECT"), ("LOCAL", "LOCAL_DIRECT")] {
            for place in 0..DIRECT_PLACES {
                self.array::<64>(places)
                    .set(place, [0; 64], 0)
                    .expect("a place");
            }
            if hash == "LOCAL" {
                clear(&mut self.hash::<16, 64>(hash));
            } else {
                clear(&mut self.hash::<4, 64>(hash));
            }
        }
    }

    /// Declares a port of a VIP.
    pub fn declare(&mut self, key: &VipKey, vip: &Vip) {
        self.hash::<20, 20>("VIPS")
            .insert(key.to_array::<20>(), vip.to_array::<20>(), 0)
            .expect("VIPS has room");
    }

    /// Writes a run of slots.
    pub fn slots(&mut self, base: u32, backends: &[u32]) {
        let mut slots = self.array::<4>("SLOTS");
        for (offset, backend) in (0..).zip(backends) {
            slots
                .set(base + offset, backend.to_ne_bytes(), 0)
                .expect("SLOTS has room");
        }
    }

    /// Says what the path to the node of an endpoint address carries.
    pub fn peer(&mut self, address: IpAddr, node: u32, mtu: u32) {
        self.hash::<16, 8>("PEERS")
            .insert(
                addr(address).of_peer().to_array::<16>(),
                Peer { node, mtu }.to_array::<8>(),
                0,
            )
            .expect("PEERS has room");
    }

    /// Writes a backend.
    pub fn backend(&mut self, index: u32, backend: &Backend) {
        self.array::<48>("BACKENDS")
            .set(index, backend.to_array(), 0)
            .expect("BACKENDS has room");
    }

    /// An Ethernet frame that `sender` sends, through the dispatcher.
    pub fn from_pod(&mut self, sender: &Endpoint, frame: &[u8]) -> Outcome {
        self.link(DEVICE, sender);
        self.from_link(DEVICE, frame)
    }

    /// Makes an endpoint the one that sends by the device with this index.
    pub fn link(&mut self, device: u32, sender: &Endpoint) {
        let value = sender.to_array::<64>();
        if self.known != Known::ByPlace {
            self.hash::<4, 64>("ENDPOINTS")
                .insert(device.to_ne_bytes(), value, 0)
                .expect("ENDPOINTS has room");
        }
        if self.known != Known::ByHash {
            self.array::<64>("ENDPOINTS_DIRECT")
                .set(direct_link(device), value, 0)
                .expect("every link has a place");
        }
    }

    /// An Ethernet frame by a device, which is one of this network namespace. CPUs may do so at once.
    #[must_use]
    pub fn from_link(&self, device: u32, frame: &[u8]) -> Outcome {
        self.run("weft_dispatch_pod", Some(device), frame)
    }

    /// An IP packet that comes out of the tunnel, through the dispatcher.
    pub fn from_tunnel(&mut self, packet: &[u8]) -> Outcome {
        self.run("weft_dispatch_tunnel", None, packet)
    }

    /// How many packets a reason was counted for, on all CPUs.
    pub fn count(&mut self, reason: Reason) -> u64 {
        let reasons: PerCpuArray<&mut MapData, u64> = self
            .ebpf
            .map_mut("REASONS")
            .expect("the object has REASONS")
            .try_into()
            .expect("a per-CPU array");
        reasons
            .get(&(reason as u32), 0)
            .expect("a counter per reason")
            .iter()
            .sum()
    }

    /// What was counted in an element of `VIP_COUNTS` or `BACKEND_COUNTS`, on all CPUs.
    pub fn counted(&mut self, map: &str, index: u32) -> Count {
        let counts: PerCpuArray<&mut MapData, [u8; 40]> = self.map(map, PerCpuArray::try_from);
        let each = counts.get(&index, 0).expect("an element");
        each.iter().map(|bytes| Count::from_slice(bytes)).fold(
            Count::default(),
            |mut sum, count| {
                for direction in 0..2 {
                    sum.packets[direction] += count.packets[direction];
                    sum.bytes[direction] += count.bytes[direction];
                }
                sum.flows += count.flows;
                sum
            },
        )
    }

    /// Samples one flow in `sample_every` into the log, at most `per_second` events on a CPU.
    pub fn sample(&mut self, sample_every: u32, per_second: u32) {
        let config = LogConfig {
            sample_every,
            per_second,
        };
        self.array::<8>("LOG_CONFIG")
            .set(0, config.to_array(), 0)
            .expect("LOG_CONFIG has one element");
    }

    /// Takes every event out of the log.
    pub fn events(&mut self) -> Vec<Event> {
        let mut ring: RingBuf<&mut MapData> = self.map("LOG", RingBuf::try_from);
        let mut events = Vec::new();
        while let Some(item) = ring.next() {
            events.push(Event::from_slice(&item));
        }
        events
    }

    /// How many events were written, beyond the bound, and lost to a full ring, on all CPUs.
    pub fn logged(&mut self) -> [u64; 3] {
        let states: PerCpuArray<&mut MapData, [u8; 40]> =
            self.map("LOG_STATE", PerCpuArray::try_from);
        let each = states.get(&0, 0).expect("one element");
        each.iter().map(|bytes| LogState::from_slice(bytes)).fold(
            [0; 3],
            |[written, limited, lost], state| {
                [
                    written + state.written,
                    limited + state.limited,
                    lost + state.lost,
                ]
            },
        )
    }

    /// An entry of a hash map, where there is one.
    pub fn entry<const K: usize, const V: usize, T: Bytes>(
        &mut self,
        map: &str,
        key: &impl Bytes,
    ) -> Option<T> {
        let value = self.hash::<K, V>(map).get(&key.to_array(), 0).ok();
        value.map(|value| T::from_slice(&value))
    }

    /// An element of an array, where there is one.
    pub fn element<const N: usize, T: Bytes>(&mut self, map: &str, index: u32) -> Option<T> {
        let value = self.array::<N>(map).get(&index, 0).ok();
        value.map(|value| T::from_slice(&value))
    }

    /// Every element of `REFUSED`, on all CPUs: the VIP's counter, the reason's code, the count.
    pub fn refused(&mut self) -> Vec<(u32, u32, u64)> {
        let refused: PerCpuHashMap<&mut MapData, [u8; 8], u64> =
            self.map("REFUSED", PerCpuHashMap::try_from);
        let mut all: Vec<_> = refused
            .iter()
            .map(|entry| entry.expect("an element"))
            .map(|(key, counts)| (RefusedKey::from_slice(&key), counts.iter().sum()))
            .map(|(key, count)| (key.counter, key.reason, count))
            .collect();
        all.sort_unstable();
        all
    }

    /// Every reason that was counted, with its count.
    pub fn counts(&mut self) -> Vec<(&'static str, u64)> {
        Reason::ALL
            .iter()
            .map(|&reason| (reason.name(), self.count(reason)))
            .filter(|&(_, count)| count > 0)
            .collect()
    }

    /// What [`Node::counts`] says, and from zero again.
    pub fn take_counts(&mut self) -> Vec<(&'static str, u64)> {
        let counts = self.counts();
        let cpus = nr_cpus().expect("the number of CPUs");
        let mut reasons: PerCpuArray<&mut MapData, u64> =
            self.map("REASONS", PerCpuArray::try_from);
        let is_counted = |reason: &&Reason| counts.iter().any(|(name, _)| *name == reason.name());
        for &reason in Reason::ALL.iter().filter(is_counted) {
            let zeros = PerCpuValues::try_from(vec![0; cpus]).expect("one per CPU");
            reasons
                .set(reason as u32, zeros, 0)
                .expect("a counter per reason");
        }
        counts
    }

    /// What the programs counted of an endpoint's flows; zero where they never did.
    pub fn account(&mut self, endpoint: u32) -> Account {
        self.hash::<4, 64>("ACCOUNTS")
            .get(&endpoint.to_ne_bytes(), 0)
            .map(|value| Account::from_slice(&value))
            .unwrap_or_default()
    }

    /// Corrects the count as user space does.
    pub fn settle(&mut self, endpoint: u32, settled: &Settled) {
        self.hash::<4, 32>("SETTLED")
            .insert(endpoint.to_ne_bytes(), settled.to_array::<32>(), 0)
            .expect("SETTLED has room");
    }

    /// As if an endpoint had been answered so often that it is not for long.
    pub fn owe_answers(&mut self, endpoint: u32) {
        let full = (u64::MAX / 2).to_ne_bytes();
        self.hash::<4, 8>("ANSWERS")
            .insert(endpoint.to_ne_bytes(), full, 0)
            .expect("ANSWERS gives way");
    }

    fn run(&self, name: &str, device: Option<u32>, packet: &[u8]) -> Outcome {
        let program: &SchedClassifier = self
            .ebpf
            .program(name)
            .expect("loaded above")
            .try_into()
            .expect("a classifier");
        let mut out = vec![0_u8; packet.len() + 256];
        // What is not said of it is zero.
        let context = device.map(|device| {
            let mut context = [0; IFINDEX + 4];
            context[IFINDEX..].copy_from_slice(&device.to_ne_bytes());
            context
        });
        let result = program
            .test_run(TestRunOptions {
                data_in: Some(packet),
                data_out: Some(&mut out),
                ctx_in: context.as_ref().map(|context| context.as_slice()),
                ..TestRunOptions::default()
            })
            .unwrap_or_else(|error| panic!("{name} does not run: {error}"));
        out.truncate(result.data_size_out as usize);
        Outcome {
            action: result.return_value,
            bytes: out,
        }
    }

    fn array<const N: usize>(&mut self, name: &str) -> Array<&mut MapData, [u8; N]> {
        self.map(name, Array::try_from)
    }

    fn hash<const K: usize, const V: usize>(
        &mut self,
        name: &str,
    ) -> HashMap<&mut MapData, [u8; K], [u8; V]> {
        self.map(name, HashMap::try_from)
    }

    fn map<'a, M>(
        &'a mut self,
        name: &str,
        convert: impl FnOnce(&'a mut aya::maps::Map) -> Result<M, MapError>,
    ) -> M {
        let map = self
            .ebpf
            .map_mut(name)
            .unwrap_or_else(|| panic!("the object has no map {name}"));
        convert(map).unwrap_or_else(|error| panic!("{name}: {error}"))
    }
}

/// Removes every entry.
fn clear<K: aya::Pod, V: aya::Pod>(map: &mut HashMap<&mut MapData, K, V>) {
    let keys: Vec<_> = map.keys().filter_map(Result::ok).collect();
    for key in keys {
        map.remove(&key).expect("the key is there");
    }
}

/// The object under test.
fn object_path() -> PathBuf {
    std::env::var_os("WEFT_BPF_OBJECT").map_or_else(
        || {
            PathBuf::from(concat!(
                env!("CARGO_MANIFEST_DIR"),
                "/../ebpf/prebuilt/weft.bpf.o"
            ))
        },
        PathBuf::from,
    )
}

/// An address as maps hold it.
#[must_use]
pub fn addr(address: IpAddr) -> Addr {
    match address {
        IpAddr::V4(v4) => Addr::from_v4(v4.to_bits()),
        IpAddr::V6(v6) => Addr::from_v6(v6.to_bits()),
    }
}

/// A pod's endpoint by its number, with MAC addresses that tell it from every other.
#[must_use]
pub fn endpoint(number: u32, v4: IpAddr, v6: IpAddr) -> Endpoint {
    let [.., high, low] = number.to_be_bytes();
    Endpoint {
        addr6: addr(v6),
        addr4: addr(v4),
        number,
        ifindex: DEVICE,
        flags: if number == ebpf_common::addr::NODE_ENDPOINT {
            ENDPOINT_PLAIN_REDIRECT
        } else {
            0
        },
        quota: 0,
        mac: [2, 0, 0, 1, high, low],
        host_mac: [2, 0, 0, 2, high, low],
        pad: 0,
    }
}
