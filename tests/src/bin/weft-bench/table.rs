//! A table of 10,000 services and 100,000 backends: how long it takes to reach the kernel, whole and by one
//! change, what it weighs, and whether a packet notices it.
//!
//! The planner and the maps are the daemon's own, in this process; programs run by `BPF_PROG_TEST_RUN`, and their
//! time is the kernel's own statistics.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::{AsFd, AsRawFd},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use aya::{
    maps::MapInfo,
    programs::{SchedClassifier, TestRun, TestRunOptions},
    sys::{Stats, enable_stats},
};
use ebpf_common::addr::{Mesh4, Mesh6, Name4, Name6, Policy};
use netmanager_api::table::{
    Backend, BackendState, Mesh, Node, PolicyName, Port, Protocol, Revision, Service, Table, Vip,
};
use nix::mount::{MntFlags, umount2};
use weft_netmanager::{
    datapath::{BpfDatapath, Datapath, HookMode, Options, Sizes},
    plan::{Inputs, NodeEndpoint, Planner, PodEndpoint, TunnelDevice},
    policy::Sight,
};
use weft_tests::{Netns, program::packet::Packet};

use crate::{
    figures::{Figures, Series},
    load::Family,
};

const SERVICES: u32 = 10_000;
const BACKENDS: u32 = 100_000;
const SIZES: Sizes = Sizes {
    endpoints: 1_024,
    backends: 131_072,
    slots: 524_288,
    vips: 65_536,
    flows: 131_072,
};
/// `lo` is the device of packets in a test run.
const DEVICE: u32 = 1;
/// A test run only says that a packet would go there.
const TUNNEL: u32 = 99;
/// How many flows are asked of, and how often each in a round.
const FLOWS: u32 = 512;
const PASSES: u32 = 8;
const POD: Ipv4Addr = Ipv4Addr::new(10, 16, 0, 2);
const POD6: &str = "fd77:6566:7400::1:0:2";

/// The case of a table with one service.
pub(crate) const ONE: &str = "one service";
/// The case of the whole table.
pub(crate) const WHOLE: &str = "10,000 services";
/// Metrics that have a bound of their own, milliseconds.
pub(crate) const LOAD: &str = "load";
pub(crate) const CHANGE: &str = "one change";
/// Of a packet of a known flow.
pub(crate) const PACKET: &str = "packet";

/// Measures so many rounds.
pub(crate) fn measure(rounds: u32, figures: &mut Figures) -> Result<()> {
    let netns = Netns::new("table")?;
    netns.run(|| {
        let text = serde_json::to_vec(&table(SERVICES, BACKENDS)?)?;
        (0..rounds).try_for_each(|round| {
            one_round(round, &text, figures)?;
            eprintln!("round {} of {rounds}", round + 1);
            Ok(())
        })
    })
}

fn one_round(round: u32, text: &[u8], figures: &mut Figures) -> Result<()> {
    let mut push = |case, metric, unit, value| {
        let family = Family::Ipv4;
        figures.push(
            Series {
                metric,
                family,
                case,
            },
            unit,
            value,
        );
    };
    push(WHOLE, "on the wire", "KiB", text.len() as f64 / 1_024.0);
    let pins = Pins::new(&format!("{round}"))?;
    let before = resident_kib()?;
    let started = Instant::now();
    let whole: Arc<Table> = Arc::new(serde_json::from_slice(text)?);
    push(WHOLE, "decode", "ms", ms(started));
    let one = Arc::new(Table {
        services: whole.services[..1].to_vec(),
        ..Table::clone(&whole)
    });

    let mut node = Loaded::open(&pins.0)?;
    let started = Instant::now();
    node.load(&whole)?;
    push(WHOLE, LOAD, "ms", ms(started));
    let pins_of_one = Pins::new(&format!("{round}-one"))?;
    let mut node_of_one = Loaded::open(&pins_of_one.0)?;
    node_of_one.load(&one)?;
    let flows = [flows(&one, 1), flows(&whole, 1), flows(&whole, FLOWS)];
    let [alone, among, of_many] = interleaved([
        (&node_of_one, &flows[0]),
        (&node, &flows[1]),
        (&node, &flows[2]),
    ])?;
    push(ONE, PACKET, "ns", alone);
    push(WHOLE, PACKET, "ns", among);
    push(WHOLE, "packet of 512 services", "ns", of_many);
    drop((node_of_one, pins_of_one));

    let changed = Arc::new(with_one_changed(&whole, round));
    let started = Instant::now();
    let writes = node.load(&changed)?;
    push(WHOLE, CHANGE, "ms", ms(started));
    ensure!(
        (1..100).contains(&writes),
        "one change made {writes} writes"
    );

    let started = Instant::now();
    node.adopt()?;
    let writes = node.load(&changed)?;
    push(WHOLE, "restart", "ms", ms(started));
    ensure!(writes == 0, "a restart wrote {writes} entries");
    push(WHOLE, "maps", "KiB", pins.kernel_bytes()? as f64 / 1_024.0);
    push(
        WHOLE,
        "resident",
        "KiB",
        resident_kib()?.saturating_sub(before) as f64,
    );
    Ok(())
}

fn ms(started: Instant) -> f64 {
    started.elapsed().as_secs_f64() * 1_000.0
}

/// A folder of pins, removed on drop.
struct Pins(PathBuf);

impl Pins {
    fn new(name: &str) -> Result<Self> {
        let path = std::env::temp_dir().join(format!("weft-table-{}-{name}", std::process::id()));
        fs::create_dir_all(&path).with_context(|| format!("failed to make {}", path.display()))?;
        Ok(Self(path))
    }

    /// What the kernel says that the maps take.
    fn kernel_bytes(&self) -> Result<u64> {
        let mut sum = 0;
        for entry in fs::read_dir(self.0.join("v2/maps"))? {
            let info = MapInfo::from_pin(entry?.path())?;
            let fd = info.fd()?;
            let text = fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_fd().as_raw_fd()))?;
            let bytes = text.lines().find_map(|line| line.strip_prefix("memlock:"));
            sum += bytes
                .context("no memlock in fdinfo")?
                .trim()
                .parse::<u64>()?;
        }
        Ok(sum)
    }
}

impl Drop for Pins {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Kilobytes that this process holds in memory.
fn resident_kib() -> Result<u64> {
    let text = fs::read_to_string("/proc/self/status")?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let number = line.and_then(|line| line.split_whitespace().next());
    Ok(number.context("no VmRSS")?.parse()?)
}

/// The daemon's planner and maps, without the daemon.
struct Loaded {
    datapath: BpfDatapath,
    planner: Planner,
    dispatcher: SchedClassifier,
    endpoint: NodeEndpoint,
    pods: Vec<PodEndpoint>,
}

impl Loaded {
    fn open(pins: &Path) -> Result<Self> {
        let datapath = BpfDatapath::open(&Options {
            bpffs: pins.to_owned(),
            mode: HookMode::Tcx,
            sizes: SIZES,
            splice: None,
        })?;
        let planner = Planner::adopt(datapath.capacity()?, datapath.state()?, Duration::ZERO);
        Ok(Self {
            dispatcher: SchedClassifier::from_pin(pins.join("programs/weft_dispatch_pod"))?,
            datapath,
            planner,
            endpoint: NodeEndpoint {
                ifindex: 2,
                mac: [2, 0, 0, 0, 0, 1],
                host_mac: [2, 0, 0, 0, 0, 2],
                addr6: "fd77:6566:7400::1:0:1".parse()?,
                addr4: Some(Ipv4Addr::new(10, 16, 0, 1)),
            },
            pods: vec![PodEndpoint {
                number: 2,
                ifindex: DEVICE,
                mac: [2, 0, 0, 0, 0, 3],
                host_mac: [2, 0, 0, 0, 0, 4],
                addr6: POD6.parse()?,
                addr4: Some(POD),
                service: None,
            }],
        })
    }

    /// As a daemon that starts.
    fn adopt(&mut self) -> Result<()> {
        let state = self.datapath.state()?;
        self.planner = Planner::adopt(self.datapath.capacity()?, state, Duration::ZERO);
        Ok(())
    }

    /// Makes the maps match; gives the number of writes.
    fn load(&mut self, table: &Arc<Table>) -> Result<usize> {
        let sight = Sight::default();
        let inputs = Inputs {
            table,
            node: &self.endpoint,
            pods: &self.pods,
            sight: &sight,
            tunnel: Some(TunnelDevice {
                ifindex: TUNNEL,
                mtu: 1_420,
            }),
            quota: 0,
        };
        self.planner.plan(&inputs, Duration::ZERO)?;
        let (vips, backends) = self.planner.take_given();
        self.datapath.reset_counts(&vips, &backends)?;
        let writes = self.planner.writes();
        self.datapath.apply(&writes)?;
        self.planner.wrote(&writes);
        Ok(writes.len())
    }

    /// Sends each frame once.
    fn pass(&self, frames: &[Vec<u8>]) -> Result<()> {
        let mut out = [0; 256];
        for frame in frames {
            let result = self.dispatcher.test_run(TestRunOptions {
                data_in: Some(frame),
                data_out: Some(&mut out),
                ..TestRunOptions::default()
            })?;
            // TC_ACT_SHOT.
            ensure!(result.return_value != 2, "a packet was dropped");
        }
        Ok(())
    }
}

/// A packet of each of [`FLOWS`] flows to so many services of a table.
fn flows(table: &Table, services: u32) -> Vec<Vec<u8>> {
    let step = table.services.len() / services as usize;
    let frame = |flow: u32| {
        let service = &table.services[(flow % services) as usize * step];
        let vip = service.vips[0].addr4.unwrap_or(Ipv4Addr::UNSPECIFIED);
        let port = 20_000 + flow as u16;
        Packet::udp((IpAddr::V4(POD), port), (IpAddr::V4(vip), 80), &[0; 64]).frame()
    };
    (0..FLOWS).map(frame).collect()
}

/// Nanoseconds per packet of known flows, of each pair in turn, so that what disturbs the machine disturbs them alike.
fn interleaved<const N: usize>(pairs: [(&Loaded, &Vec<Vec<u8>>); N]) -> Result<[f64; N]> {
    for _ in 0..2 {
        for (node, frames) in pairs {
            node.pass(frames)?;
        }
    }
    let _counting = enable_stats(Stats::RunTime)?;
    let mut spent = [(Duration::ZERO, 0); N];
    for pass in 0..PASSES as usize {
        for turn in 0..N {
            let number = (pass + turn) % N;
            let (node, frames) = pairs[number];
            // What the turn before left in the cache is not what a node's packets find.
            node.pass(frames)?;
            let before = node.dispatcher.info()?;
            node.pass(frames)?;
            let after = node.dispatcher.info()?;
            spent[number].0 += after.run_time() - before.run_time();
            spent[number].1 += after.run_count() - before.run_count();
        }
    }
    Ok(spent.map(|(time, count)| time.as_nanos() as f64 / count as f64))
}

/// Every service has one port and two VIPs' worth of addresses, and its share of the backends.
fn table(services: u32, backends: u32) -> Result<Table> {
    let mesh6 = Mesh6::new(0xfd77_6566_7400 << 80).context("a mesh prefix")?;
    let mesh4 = Mesh4::new(u32::from_be_bytes([10, 16, 0, 0]), 12).context("a mesh prefix")?;
    let each = backends / services;
    let backend = |number: u32| {
        let (node, endpoint) = (2 + number / 200, 2 + number % 200);
        Backend {
            instance: number % each,
            epoch: 1,
            node,
            addr6: Ipv6Addr::from_bits(mesh6.encode(Name6::Endpoint { node, endpoint })),
            addr4: Some(Ipv4Addr::from_bits(
                u32::from_be_bytes([10, 16, 0, 0]) + 256 + number,
            )),
            state: BackendState::Ready,
        }
    };
    let service = |number: u32| Service {
        name: format!("default/scale/service-{number}"),
        number,
        ports: vec![Port {
            protocol: Protocol::Udp,
            port: 80,
            target_port: 8_080,
            follow: false,
        }],
        vips: vec![Vip {
            policy: PolicyName(Policy::Balanced),
            instance: None,
            addr6: Ipv6Addr::from_bits(mesh6.encode(Name6::Vip {
                policy: Policy::Balanced,
                service: number,
                instance: 0,
            })),
            addr4: mesh4
                .encode(Name4::Vip {
                    policy: Policy::Balanced,
                    number,
                })
                .map(Ipv4Addr::from_bits),
        }],
        backends: ((number - 1) * each..number * each).map(backend).collect(),
    };
    Ok(Table {
        revision: Revision {
            incarnation: 1,
            index: 1,
        },
        mesh: Mesh {
            prefix6: "fd77:6566:7400::/48".parse()?,
            prefix4: Some("10.16.0.0/12".parse()?),
            seed: 7,
        },
        node: Node {
            number: 1,
            blocks4: vec!["10.16.0.0/27".parse()?],
            carbon_g_kwh: None,
        },
        peers: vec![],
        services: (1..=services).map(service).collect(),
        spliced: vec![],
    })
}

/// The next table, in which one backend of some service drains.
fn with_one_changed(table: &Table, round: u32) -> Table {
    let mut table = table.clone();
    table.revision.index += 1;
    let at = (round as usize * 7_919) % table.services.len();
    if let Some(backend) = table.services[at].backends.first_mut() {
        backend.state = BackendState::Draining;
    }
    table
}
