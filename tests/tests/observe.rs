//! What a person sees of a node: metrics that move as packets do, the flow log, traces and probes.

#![expect(
    clippy::unwrap_used,
    reason = "a step of a test that fails, fails the test, here as in its body"
)]

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Read, Write},
    net::{IpAddr, SocketAddr, TcpStream, UdpSocket},
    os::unix::net::UnixStream,
    sync::atomic::{AtomicU64, Ordering},
    thread,
    time::Duration,
};

use aya::{
    maps::{Map, MapData, PerCpuArray, PerCpuHashMap, PerCpuValues},
    util::nr_cpus,
};
use ebpf_common::addr::Policy;
use netmanager_api::{
    observe::{
        Filter, FlowEvent, FlowsRequest, Outcome, Request, Said, Trace, TraceRequest, Verdict, Way,
        beside,
    },
    table::BackendState::Ready,
};
use weft_tests::{
    Stopwatch,
    mesh::{
        Mesh, Node, Options, SOON,
        service::{addresses, service},
    },
    pinned::Pinned,
    traffic::{HTTP, call, call_at, datagram, echo},
    wait_for,
};

/// A port of the node's own namespace.
const METRICS: &str = "127.0.0.1:9177";
const AT_ONCE: Duration = Duration::from_secs(1);

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_count_that_goes_to_another_owner_starts_from_zero_and_no_other_does() {
    let mut pinned = Pinned::open();
    let cpus = nr_cpus().unwrap();
    for name in ["VIP_COUNTS", "BACKEND_COUNTS"] {
        let map = Map::PerCpuArray(pinned.map(name));
        let mut counts: PerCpuArray<MapData, [u64; 5]> = map.try_into().unwrap();
        for index in 1..4 {
            let ones = PerCpuValues::try_from(vec![[1; 5]; cpus]).unwrap();
            counts.set(index, ones, 0).unwrap();
        }
    }
    let map = Map::PerCpuHashMap(pinned.map("REFUSED"));
    let mut refused: PerCpuHashMap<MapData, [u32; 2], u64> = map.try_into().unwrap();
    for key in [[1, 3], [1, 4], [2, 3]] {
        let ones = PerCpuValues::try_from(vec![1; cpus]).unwrap();
        refused.insert(key, ones, 0).unwrap();
    }
    pinned.datapath().reset_counts(&[1], &[2]).unwrap();
    let counts = pinned.datapath().counts().unwrap();
    let flows = |n: [u32; 3], of: &dyn Fn(u32) -> u64| n.map(of);
    let cpus = cpus as u64;
    let vips = flows([1, 2, 3], &|n| counts.vip(n).unwrap().flows);
    assert_eq!(vips, [0, cpus, cpus]);
    let backends = flows([1, 2, 3], &|n| counts.backend(n).unwrap().flows);
    assert_eq!(backends, [cpus, 0, cpus]);
    let left: Vec<_> = counts.refused().unwrap();
    let left: Vec<_> = left
        .iter()
        .map(|(key, count)| (key.counter, *count))
        .collect();
    assert_eq!(left, [(2, cpus)]);
}

/// One that asked at a node's observe door.
struct Observer(BufReader<UnixStream>);

impl Observer {
    fn ask(node: &Node, request: &Request) -> Self {
        let mut stream = UnixStream::connect(beside(&node.path("cni.sock"))).unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        let mut line = serde_json::to_vec(request).unwrap();
        line.push(b'\n');
        stream.write_all(&line).unwrap();
        Self(BufReader::new(stream))
    }

    /// Follows the flows that fit, from this instant on.
    fn follow(node: &Node, filter: Filter) -> Self {
        let request = FlowsRequest {
            filter,
            ..FlowsRequest::default()
        };
        Self::follow_by(node, request)
    }

    fn follow_by(node: &Node, request: FlowsRequest) -> Self {
        let mut observer = Self::ask(node, &Request::Flows(request));
        let said = observer.next();
        assert!(matches!(said, Said::Following { .. }), "{said:?}");
        observer
    }

    fn next(&mut self) -> Said {
        let mut line = String::new();
        self.0.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{line:?}: {error}"))
    }

    /// The next event with this verdict.
    fn event(&mut self, verdict: Verdict) -> FlowEvent {
        loop {
            match self.next() {
                Said::Flow(event) if event.verdict == verdict => return *event,
                Said::Flow(_) | Said::Following { .. } => {}
                said => panic!("{said}"),
            }
        }
    }

    fn trace(&mut self) -> Trace {
        match self.next() {
            Said::Trace(trace) => *trace,
            said => panic!("{said}"),
        }
    }
}

/// The samples of a scrape, by series.
fn scrape(node: &Node) -> BTreeMap<String, f64> {
    let address: SocketAddr = METRICS.parse().unwrap();
    let mut stream = node.netns.run(|| TcpStream::connect(address)).unwrap();
    stream.write_all(b"GET /metrics HTTP/1.1\r\n\r\n").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    let (_, body) = text.split_once("\r\n\r\n").unwrap();
    body.lines()
        .filter(|line| !line.starts_with('#'))
        .map(|line| line.rsplit_once(' ').unwrap())
        .map(|(series, value)| (series.to_owned(), value.parse().unwrap()))
        .collect()
}

fn traced(from: &str, to: IpAddr, probe: bool) -> TraceRequest {
    TraceRequest {
        from: from.to_owned(),
        to,
        port: Some(HTTP),
        protocol: "tcp".to_owned(),
        sport: None,
        probe,
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn metrics_move_as_packets_do_and_go_on_over_a_restart() {
    let mut mesh = Mesh::with(
        "metr",
        Options {
            nodes: 1,
            args: ["--metrics", METRICS].map(str::to_owned).to_vec(),
            ..Options::default()
        },
    );
    let (client, server) = (mesh.pod(1, "client"), mesh.pod(1, "server"));
    server.serve("server");
    mesh.follow(&[service(5, vec![server.backend(0, Ready)])]);
    let vip = "node=\"n1\",service=\"default/shop/s5\",policy=\"balanced\",instance=\"\"";
    let backend = "node=\"n1\",service=\"default/shop/s5\",instance=\"0\",epoch=\"1\",at=\"1\"";
    let requests = format!("weft_vip_packets_total{{{vip},direction=\"request\"}}");
    let answers = format!("weft_vip_bytes_total{{{vip},direction=\"answer\"}}");
    let flows = format!("weft_vip_flows_opened_total{{{vip}}}");
    let by_backend = format!("weft_backend_bytes_total{{{backend},direction=\"request\"}}");
    let undeclared = format!("weft_vip_refused_packets_total{{{vip},reason=\"undeclared_port\"}}");
    let unlinked = "weft_refused_packets_total{node=\"n1\",reason=\"not_linked\"}";

    let before = scrape(mesh.node(1));
    assert_eq!((before[&requests], before[&flows]), (0.0, 0.0));
    for to in addresses(Policy::Balanced, 5) {
        let (mut stream, _) = call(&client.netns, to).unwrap();
        echo(&mut stream, &[7; 50_000]).unwrap();
        datagram(&client.netns, to).unwrap();
    }
    for to in addresses(Policy::Balanced, 6) {
        call(&client.netns, to).unwrap_err();
    }
    let vip4 = addresses(Policy::Balanced, 5)[0];
    call_at(&client.netns, SocketAddr::new(vip4, 81)).unwrap_err();
    let after = scrape(mesh.node(1));
    assert_eq!(after[&flows], 4.0, "two families, two protocols");
    assert!(after[&requests] > 8.0, "{}", after[&requests]);
    assert!(after[&answers] > 100_000.0, "{}", after[&answers]);
    assert!(after[&by_backend] > 100_000.0, "{}", after[&by_backend]);
    assert_eq!(after[&undeclared], 1.0);
    assert_eq!(after[unlinked] - before[unlinked], 2.0);
    assert_eq!(after["weft_endpoints{node=\"n1\"}"], 2.0);

    let node = mesh.node_mut(1);
    node.kill();
    let (mut stream, _) = call(&client.netns, vip4).unwrap();
    echo(&mut stream, b"while nobody counts but the kernel").unwrap();
    node.run();
    node.wait_ready();
    let later = wait_for("the metrics are back", SOON, || {
        let later = scrape(mesh.node(1));
        later.contains_key(&flows).then_some(later)
    });
    assert_eq!(later[&flows], 5.0, "what passed meanwhile is counted too");
    for (series, value) in &after {
        if series.contains("_packets_total") || series.contains("_bytes_total") {
            assert!(
                later[series] >= *value,
                "{series}: {value} then {}",
                later[series]
            );
        }
    }

    // What the table names no more is exported no more.
    mesh.follow(&[]);
    assert!(!scrape(mesh.node(1)).contains_key(&flows));
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_refusal_and_a_flows_life_are_told_within_a_second() {
    let mut mesh = Mesh::start("flows", 1);
    let (client, server) = (mesh.pod(1, "client"), mesh.pod(1, "server"));
    server.serve("server");
    mesh.follow(&[service(5, vec![server.backend(0, Ready)])]);
    let node = mesh.node(1);
    let mut refusals = Observer::follow(
        node,
        Filter {
            verdict: Some(Verdict::Refused),
            pod: Some(client.netns.name().to_owned()),
            ..Filter::default()
        },
    );
    let mut flows = Observer::follow(
        node,
        Filter {
            service: Some("s5".to_owned()),
            ..Filter::default()
        },
    );
    for to in addresses(Policy::Balanced, 6) {
        let watch = Stopwatch::start();
        call(&client.netns, to).unwrap_err();
        let event = refusals.event(Verdict::Refused);
        assert!(watch.had() < AT_ONCE, "{:?}", watch.had());
        assert_eq!(event.reason.as_deref(), Some("not_linked"), "{event}");
        assert_eq!(event.from.pod.as_deref(), Some(client.netns.name()));
        assert_eq!(event.to.address, SocketAddr::new(to, HTTP));
        assert_eq!(event.service, None);
    }
    for to in addresses(Policy::Balanced, 5) {
        let watch = Stopwatch::start();
        let (stream, _) = call(&client.netns, to).unwrap();
        let opened = flows.event(Verdict::Opened);
        drop(stream);
        let ended = flows.event(Verdict::Ended);
        assert!(watch.had() < AT_ONCE, "{:?}", watch.had());
        for event in [&opened, &ended] {
            assert_eq!(event.to.address, SocketAddr::new(to, HTTP), "{event}");
            assert_eq!(
                event.from.pod.as_deref(),
                Some(client.netns.name()),
                "{event}"
            );
            assert_eq!(event.policy.as_deref(), Some("balanced"), "{event}");
            assert_eq!(
                (event.instance, event.backend_node),
                (Some(0), Some(1)),
                "{event}"
            );
        }
        assert_eq!(opened.from, ended.from);
        assert_eq!(opened.translated_to, ended.translated_to);
        assert!(ended.age_s.is_some_and(|age| age < 3), "{ended}");
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn who_does_not_read_is_cut_off_with_a_line_that_says_so_and_nobody_else_notices() {
    let mut mesh = Mesh::start("slow", 1);
    let client = mesh.pod(1, "client");
    mesh.follow(&[]);
    let node = mesh.node(1);
    let flood = FlowsRequest {
        per_second: 100_000,
        ..FlowsRequest::default()
    };
    let mut slow = Observer::follow_by(node, flood.clone());
    let mut quick = Observer::follow_by(node, flood);
    let socket = client.netns.run(|| UdpSocket::bind("0.0.0.0:0")).unwrap();
    let unlinked = SocketAddr::new(addresses(Policy::Balanced, 6)[0], HTTP);
    let (seen, lost) = (AtomicU64::new(0), AtomicU64::new(0));
    thread::scope(|scope| {
        scope.spawn(|| {
            while seen.load(Ordering::Relaxed) < 4_000 {
                match quick.next() {
                    Said::Flow(_) => _ = seen.fetch_add(1, Ordering::Relaxed),
                    Said::Lost { limited, full } => {
                        lost.fetch_add(limited + full, Ordering::Relaxed);
                    }
                    said => panic!("{said}"),
                }
            }
        });
        let mut sent = 0;
        wait_for("the quick one sees 4,000 events", SOON, || {
            let (seen, lost) = (seen.load(Ordering::Relaxed), lost.load(Ordering::Relaxed));
            // Half of what a follower may be behind: also a quick one may have to wait for a CPU.
            while sent < seen + lost + 500 {
                socket.send_to(&[0; 8], unlinked).unwrap();
                sent += 1;
            }
            (seen >= 4_000).then_some(())
        });
    });
    let why = loop {
        match slow.next() {
            Said::Cut { why } => break why,
            Said::Flow(_) | Said::Lost { .. } | Said::Following { .. } => {}
            said => panic!("{said}"),
        }
    };
    assert!(why.contains("messages behind"), "{why}");
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_trace_says_where_a_probe_then_goes_also_on_another_node() {
    let mut mesh = Mesh::start("trace", 2);
    let (client, server) = (mesh.pod(1, "client"), mesh.pod(2, "server"));
    server.serve("server");
    mesh.follow(&[service(5, vec![server.backend(0, Ready)])]);
    mesh.wait_connected();
    let name = client.netns.name();
    let (near, far) = (mesh.node(1), mesh.node(2));
    for to in addresses(Policy::Balanced, 6) {
        let trace = Observer::ask(near, &Request::Trace(traced(name, to, false))).trace();
        let Outcome::Refused { reason, .. } = trace.outcome else {
            panic!("{trace}");
        };
        assert_eq!(reason, "not_linked");
    }
    for to in addresses(Policy::Balanced, 5) {
        let trace = Observer::ask(near, &Request::Trace(traced(name, to, false))).trace();
        let Outcome::Depends { backends } = &trace.outcome else {
            panic!("{trace}");
        };
        assert_eq!(backends[0].share, 1_000);
        assert!(matches!(backends[0].way, Way::Tunnel { .. }), "{trace}");

        let mut there = Observer::follow(
            far,
            Filter {
                verdict: Some(Verdict::Delivered),
                ..Filter::default()
            },
        );
        for protocol in ["tcp", "icmp"] {
            let mut request = traced(name, to, true);
            if protocol == "icmp" {
                request.port = None;
                request.protocol = protocol.to_owned();
            }
            let mut probe = Observer::ask(near, &Request::Trace(request));
            let trace = probe.trace();
            let Outcome::Opens { backend, .. } = &trace.outcome else {
                panic!("{trace}");
            };
            let (opened, sent) = (
                probe.event(Verdict::Opened),
                probe.event(Verdict::Tunnelled),
            );
            for event in [&opened, &sent] {
                assert!(event.probe, "{event}");
                assert_eq!(event.from.address, trace.source, "{event}");
                assert_eq!(event.translated_to, Some(backend.address), "{event}");
            }
            let answer = probe.event(Verdict::Delivered);
            assert_eq!(
                (answer.from.address, answer.to.address),
                (trace.to, trace.source)
            );
            let Said::Probed { answered, note } = probe.next() else {
                panic!("the end");
            };
            assert!(
                answered && note.contains("not shown: what c1/n2 saw"),
                "{note}"
            );
            let seen = there.event(Verdict::Delivered);
            assert!(
                seen.probe && seen.to.pod.as_deref() == Some(server.netns.name()),
                "{seen}"
            );
        }
    }
    let nobody = traced("nobody", [10, 24, 0, 5].into(), false);
    let said = Observer::ask(near, &Request::Trace(nobody)).next();
    let Said::Refused { message } = said else {
        panic!("nobody is no pod");
    };
    assert!(
        message.contains("no pod of this node is named \"nobody\""),
        "{message}"
    );
}
