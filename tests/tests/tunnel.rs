//! The userspace tunnel between two machines: two namespaces, a veth pair as the underlay.
#![expect(
    clippy::unwrap_used,
    reason = "what a test's helper cannot do fails the test"
)]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::SocketAddr,
    path::Path,
    time::{Duration, Instant},
};

use nix::{sys::signal::Signal, unistd::Pid};
use tokio_util::sync::CancellationToken;
use weft_netmanager::{
    probe::{Probes, Targets, reach::ReachBy, rtt::Interest},
    tunnel::socket_path,
    wireguard::peers::PeerOp,
};
use weft_tests::{
    capture::{self, Capture},
    topology::pair,
    wait_for,
};

#[path = "tunnel/machine.rs"]
mod machine;

use machine::{Machine, connected, connected_by, exchange, listen, stream};

/// Handshake and first bytes take some ms on an idle machine, a change of the MTU some seconds anywhere.
const SOON: Duration = Duration::from_secs(30);

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn what_the_kernel_has_carries_both_families_and_the_trial_leaves_nothing() {
    let (mut a, mut b) = connected_by("kernel", None);
    let kind = a.ensure().unwrap().kind;
    println!("this kernel's tunnels: {kind:?}");
    assert_eq!(b.ensure().unwrap().kind, kind);
    for (from, to) in [(a.addr4(), b.addr4()), (a.addr6(), b.addr6())] {
        exchange((&a, from), (&b, to), b"by whatever carries it").unwrap();
    }
    let links = a.netns.ip("-brief link").unwrap();
    assert_eq!(links.lines().count(), 3, "lo, eth0 and the tunnel: {links}");
    a.remove().unwrap();
    assert!(a.netns.ip(&format!("link show {}", a.device)).is_err());
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn both_families_pass_and_the_underlay_sees_nothing_of_them() {
    let (mut a, mut b) = connected("clear");
    let capture = Capture::start(&a.netns, "eth0");
    let marker = b"weft-inner-packet-in-clear".repeat(200);
    for (from, to) in [(a.addr4(), b.addr4()), (a.addr6(), b.addr6())] {
        exchange((&a, from), (&b, to), &marker).unwrap();
        exchange((&b, to), (&a, from), &marker).unwrap();
    }
    let ports = BTreeSet::from([a.port(), b.port()]);
    let frames = capture.stop();
    let mut encrypted = 0;
    for frame in &frames {
        assert!(
            !frame.windows(26).any(|bytes| bytes == &marker[..26]),
            "the inner payload is on the underlay: {frame:02x?}"
        );
        match capture::outer(frame) {
            capture::Outer::Udp { source, target } => {
                assert!(
                    ports.contains(&source) && ports.contains(&target),
                    "{source} {target}"
                );
                encrypted += 1;
            }
            capture::Outer::Housekeeping => {}
            capture::Outer::Other => panic!("not the tunnel's: {frame:02x?}"),
        }
    }
    assert!(encrypted > 8, "the capture saw {encrypted} tunnel packets");
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_tunnel_outlives_its_daemon_and_the_next_daemon_finds_it() {
    let (mut a, b) = connected("outlive");
    let device = a.ensure().unwrap();
    let pid = a.pid();
    let listener = listen(&b, b.addr4());
    let mut connection = stream(&a, a.addr4(), listener.address).unwrap();
    connection.round(b"before").unwrap();

    a.restart_daemon();
    connection.round(b"while the daemon is away").unwrap();
    assert_eq!(a.ensure().unwrap(), device);
    assert_eq!(a.pid(), pid);
    assert_eq!(a.apply_peer(&b).unwrap(), []);
    connection.round(b"after").unwrap();
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_tunnel_that_is_killed_is_started_again_and_is_given_its_peers() {
    let (mut a, b) = connected("killed");
    let before = a.ensure().unwrap();
    nix::sys::signal::kill(Pid::from_raw(a.pid()), Signal::SIGKILL).unwrap();
    let after = wait_for("the tunnel is back", SOON, || {
        a.ensure()
            .ok()
            .filter(|device| device.ifindex != before.ifindex)
    });
    assert_eq!(after.public_key, before.public_key);
    assert_eq!(after.mtu, 1420);
    a.apply_peer(&b).unwrap();
    a.routes_to(&b);
    exchange((&a, a.addr4()), (&b, b.addr4()), b"again").unwrap();
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_removed_peer_is_neither_sent_to_nor_heard() {
    let (mut a, b) = connected("removed");
    exchange((&a, a.addr6()), (&b, b.addr6()), b"peers").unwrap();
    assert_eq!(a.apply(&[]).unwrap(), [PeerOp::Remove(b.key())]);
    assert_eq!(a.report().unwrap().peers.len(), 0);
    for (from, to) in [(&a, &b), (&b, &a)] {
        assert!(exchange((from, from.addr6()), (to, to.addr6()), b"strangers").is_err());
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn the_endpoint_of_a_live_peer_stays_and_that_of_a_dead_one_does_not() {
    let (mut a, b) = connected("endpoint");
    exchange((&a, a.addr4()), (&b, b.addr4()), b"alive").unwrap();
    let nowhere: SocketAddr = "192.0.2.77:7".parse().unwrap();
    let mut peer = b.peer();
    peer.1.endpoint = Some(nowhere);
    assert_eq!(a.apply(&[peer.clone()]).unwrap(), []);
    exchange((&a, a.addr4()), (&b, b.addr4()), b"still alive").unwrap();

    a.apply(&[]).unwrap();
    a.apply(&[peer]).unwrap();
    assert_eq!(a.report().unwrap().peers[&b.key()].endpoint, Some(nowhere));
    let put = PeerOp::Put {
        key: b.key(),
        endpoint: b.peer().1.endpoint,
        allowed: None,
    };
    assert_eq!(a.apply_peer(&b).unwrap(), [put]);
    exchange((&a, a.addr4()), (&b, b.addr4()), b"alive again").unwrap();
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_live_peer_is_given_another_block_without_a_new_handshake() {
    let (mut a, b) = connected("blocks");
    exchange((&a, a.addr4()), (&b, b.addr4()), b"first").unwrap();
    let before = a.report().unwrap().peers[&b.key()].clone();
    assert!(before.rx_bytes > 0 && before.handshake_age.is_some());
    let mut peer = b.peer();
    peer.1.allowed.insert("10.16.4.0/27".parse().unwrap());
    assert_eq!(a.apply(&[peer.clone()]).unwrap().len(), 1);
    let after = a.report().unwrap().peers[&b.key()].clone();
    assert_eq!(after.allowed, peer.1.allowed);
    assert!(
        after.rx_bytes >= before.rx_bytes,
        "the session was made anew"
    );
    assert!(after.handshake_age >= before.handshake_age);
    exchange((&a, a.addr4()), (&b, b.addr4()), b"second").unwrap();
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_tunnel_that_moves_to_another_port_keeps_its_sessions() {
    let (mut a, b) = connected("moves");
    let listener = listen(&b, b.addr4());
    let mut connection = stream(&a, a.addr4(), listener.address).unwrap();
    connection.round(b"at the first port").unwrap();
    // In a namespace of its own, any port is free; the first one was of those that the kernel chooses from.
    let port = 27_461;
    a.set_port(port);
    assert_eq!(a.ensure().unwrap().port, port);
    connection.round(b"at the second").unwrap();
    assert_eq!(a.report().unwrap().device.port, port);
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_tunnel_follows_its_devices_mtu_to_jumbo_packets() {
    let (mut a, mut b) = connected("jumbo");
    for machine in [&mut a, &mut b] {
        machine.netns.ip("link set eth0 mtu 9000").unwrap();
        machine.set_mtu(8920);
        assert_eq!(machine.ensure().unwrap().mtu, 8920);
    }
    let listener = listen(&b, b.addr4());
    wait_for("packets of the new size pass", SOON, || {
        let mut connection = stream(&a, a.addr4(), listener.address).ok()?;
        connection.round(&[7; 100_000]).ok()
    });
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_removed_tunnel_leaves_no_device_and_no_socket() {
    let (here, _there) = pair("remove").unwrap();
    let mut a = Machine::new(here, 1, "192.0.2.1");
    let socket = socket_path(&a.device);
    assert!(socket.exists());
    nix::sys::signal::kill(Pid::from_raw(a.pid()), Signal::SIGKILL).unwrap();
    a.remove().unwrap();
    assert!(!socket.exists(), "a killed tunnel's socket stays");
    a.ensure().unwrap();
    assert!(socket.exists());
    a.remove().unwrap();
    assert!(!socket.exists());
    assert!(a.netns.ip(&format!("link show {}", a.device)).is_err());
    assert!(a.report().is_err());
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn two_tunnels_of_one_name_are_refused_with_the_way_out() {
    let (here, there) = pair("twice").unwrap();
    let a = Machine::new(here, 1, "192.0.2.1");
    let mut b = Machine::prepare(there, 2, "192.0.2.2", &a.device);
    let error = b.ensure().unwrap_err().to_string();
    assert!(
        error.contains("choose another device name"),
        "the error gives no way out: {error}"
    );
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_port_that_is_taken_is_named() {
    let (here, _there) = pair("port").unwrap();
    let taken = here.run(|| std::net::UdpSocket::bind("[::]:0").unwrap());
    let mut a = Machine::prepare(here, 1, "192.0.2.1", &machine::unique());
    a.set_port(taken.local_addr().unwrap().port());
    let error = wait_for("the tunnel gives up", SOON, || {
        a.ensure()
            .err()
            .filter(|error| error.to_string().contains("last words"))
    });
    let port = taken.local_addr().unwrap().port();
    assert!(
        error
            .to_string()
            .contains(&format!("failed to listen on UDP port {port}")),
        "{error}"
    );
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn probes_measure_the_peer_reach_its_backends_and_see_it_go() {
    let (mut a, mut b) = connected("probes");
    let (mesh, shutdown) = (machine::mesh(), CancellationToken::new());
    let echo = b.keep_running(|| Probes::start(mesh, 2, shutdown.clone()));
    let _echo = echo.unwrap();
    let listener = listen(&b, b.addr6());
    let SocketAddr::V6(listening) = listener.address else {
        panic!("{} is no IPv6 address", listener.address)
    };
    let closed = std::net::SocketAddrV6::new(*listening.ip(), 1, 0, 0);
    let probes = a
        .keep_running(|| Probes::start(mesh, 1, shutdown.clone()))
        .unwrap();
    probes.set(Targets {
        nodes: BTreeMap::from([(2, Interest::InUse), (3, Interest::InUse)]),
        reach: [
            (machine::instance(0), ReachBy::Tcp(listening)),
            (machine::instance(1), ReachBy::Echo(*listening.ip())),
            (machine::instance(2), ReachBy::Tcp(closed)),
        ]
        .into(),
    });
    let observed = probes.observed();
    let rtt = wait_for("a round-trip time", SOON, || {
        observed.borrow().rtt_us.get(&2).copied()
    });
    assert!(rtt < 1_000_000, "{rtt} us");
    wait_for("node 3, which is not there", SOON, || {
        observed.borrow().unreachable.contains(&3).then_some(())
    });
    let reached = wait_for("both backends", SOON, || {
        let reached = observed.borrow().reached.clone();
        (reached.len() == 2).then_some(reached)
    });
    assert!(!reached.contains(&machine::instance(2)));
    let place = wait_for("a place in the network", SOON, || {
        observed.borrow().coordinate
    });
    assert!(place.error_permille < 1_000, "{place:?}");

    b.remove().unwrap();
    wait_for("node 2 gone", SOON, || {
        let observed = observed.borrow();
        (observed.unreachable.contains(&2) && !observed.rtt_us.contains_key(&2)).then_some(())
    });
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn bulk_traffic_passes_whole_and_the_process_stays_small() {
    let (a, b) = connected("bulk");
    for (from, to) in [(a.addr4(), b.addr4()), (a.addr6(), b.addr6())] {
        let listener = listen(&b, to);
        let mut connection = stream(&a, from, listener.address).unwrap();
        let begin = Instant::now();
        let bytes = connection.bulk(Duration::from_secs(2)).unwrap();
        let rate = 8.0 * bytes as f64 / begin.elapsed().as_secs_f64() / 1e9;
        println!("{from}: {rate:.2} Gbit/s one way, {bytes} bytes and their checksum arrived");
    }
    for machine in [&a, &b] {
        let own = own_kib(machine.pid());
        println!("tunnel process: {own} KiB of its own");
        assert!(own <= 16 * 1024, "{own} KiB of its own");
    }
}

/// What the process allocated (`RssAnon` and `RssShmem` of proc_pid_status(5)). The pages of the executable are left out: those
/// of a debug build are three times the rest and differ from machine to machine; the demo checks the whole of a release build.
fn own_kib(pid: i32) -> u64 {
    let status =
        fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("status")).unwrap();
    ["RssAnon:", "RssShmem:"]
        .iter()
        .map(|name| {
            let line = status.lines().find(|line| line.starts_with(name)).unwrap();
            let kib = line.split_whitespace().nth(1).unwrap();
            kib.parse::<u64>().unwrap()
        })
        .sum()
}
