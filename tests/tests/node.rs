//! One node, whole: the real daemon, its programs, pods attached through the CNI door.

#![expect(
    clippy::unwrap_used,
    reason = "a step of a test that fails, fails the test, here as in its body"
)]

use std::{
    io::ErrorKind,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use netmanager_api::{
    cni::{Reply, Request},
    table::BackendState::{Draining, Ready},
};
use weft_tests::{
    Stopwatch,
    traffic::{call, datagram, echo, failure, ping},
    wait_for,
};

#[path = "follow/agent.rs"]
mod agent;
#[path = "node/limits.rs"]
mod limits;
#[path = "node/machine.rs"]
mod machine;
#[path = "node/mesh.rs"]
mod mesh;
#[path = "node/policy.rs"]
mod policy;
#[path = "node/stream.rs"]
mod stream;
#[path = "node/takeover.rs"]
mod takeover;

use machine::{AT_ONCE, Node, SOON, UNLINKED4, VIP4, table, unlinked6, vip6};

/// An exchange that takes so long has noticed something: what is lost is sent again after 200 ms, then after twice that.
const NOTICED: Duration = Duration::from_millis(500);

fn a_vip_is_served(label: &str, args: &[&str]) {
    let node = Node::start(label, args);
    let (client, server) = (node.attach("c"), node.attach("s"));
    server.serve("server");
    node.follow(&table(2, vec![server.backend(0, Ready)]));
    for from in [&client.netns, &node.netns] {
        for to in [VIP4.into(), vip6().into()] as [std::net::IpAddr; 2] {
            let (mut stream, who) = call(from, to).unwrap();
            assert_eq!(who, "server");
            echo(&mut stream, &[7; 100_000]).unwrap();
            datagram(from, to).unwrap();
            ping(from, to).unwrap();
        }
    }
    for to in [UNLINKED4.into(), unlinked6().into()] as [std::net::IpAddr; 2] {
        let (after, error) = failure(|| call(&client.netns, to));
        assert!(after < AT_ONCE, "{to}: {error} after {after:?}");
        assert_ne!(error.kind(), ErrorKind::TimedOut);
    }
    assert_eq!(
        node.ask(&Request::Check {
            key: client.key.clone()
        }),
        Reply::Done
    );
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn pods_and_the_host_reach_a_vip_by_every_protocol_and_only_a_linked_one() {
    a_vip_is_served("vip", &[]);
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_kernel_without_tcx_serves_the_same_by_classifiers() {
    a_vip_is_served("cls", &["--hook", "clsact"]);
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_daemon_killed_and_started_again_is_not_noticed_by_a_stream() {
    let mut node = Node::start("kill", &[]);
    let (client, server) = (node.attach("c"), node.attach("s"));
    server.serve("server");
    node.follow(&table(2, vec![server.backend(0, Ready)]));

    let (mut stream, _) = call(&client.netns, VIP4).unwrap();
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let exchange = scope.spawn(|| {
            let (mut exchanges, mut late) = (0u32, Vec::new());
            while !stop.load(Ordering::Relaxed) {
                let watch = Stopwatch::start();
                echo(&mut stream, &[1; 500]).unwrap();
                late.extend(Some(watch.had()).filter(|had| *had >= NOTICED));
                exchanges += 1;
            }
            (exchanges, late)
        });
        for _ in 0..3 {
            node.kill();
            assert_eq!(
                call(&client.netns, vip6()).unwrap().1,
                "server",
                "nobody runs"
            );
            node.run();
            node.wait_ready();
        }
        stop.store(true, Ordering::Relaxed);
        let (exchanges, late) = exchange.join().unwrap();
        assert!(exchanges > 100, "{exchanges}");
        // A machine may halt once; what a start breaks, each of them does.
        assert!(late.len() <= 1, "{late:?} of {exchanges}");
    });

    assert_eq!(
        node.ask(&Request::Check {
            key: server.key.clone()
        }),
        Reply::Done
    );
    let late = node.attach("late");
    assert!(late.reserved.endpoint > server.reserved.endpoint);
    assert_eq!(call(&late.netns, VIP4).unwrap().1, "server");
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_draining_backend_keeps_its_flows_and_a_withdrawn_one_loses_them_at_once() {
    let node = Node::start("drain", &[]);
    let (client, old, new) = (node.attach("c"), node.attach("o"), node.attach("n"));
    old.serve("old");
    new.serve("new");
    node.follow(&table(2, vec![old.backend(0, Ready)]));
    let (mut stream, who) = call(&client.netns, VIP4).unwrap();
    assert_eq!(who, "old");

    node.follow(&table(
        3,
        vec![old.backend(0, Draining), new.backend(1, Ready)],
    ));
    for _ in 0..20 {
        assert_eq!(call(&client.netns, VIP4).unwrap().1, "new");
    }
    echo(&mut stream, b"still the old one").unwrap();

    node.follow(&table(4, vec![new.backend(1, Ready)]));
    let (after, error) =
        failure(|| echo(&mut stream, b"anybody").and_then(|()| echo(&mut stream, b"there")));
    assert!(after < AT_ONCE, "{error} after {after:?}");
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);

    node.follow(&table(5, Vec::new()));
    let (after, error) = failure(|| call(&client.netns, VIP4));
    assert!(after < AT_ONCE, "no backend: {error} after {after:?}");
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn the_node_endpoint_comes_back_and_without_it_nothing_leaves_by_the_default_route() {
    let mut node = Node::start("guard", &[]);
    let server = node.attach("s");
    server.serve("server");
    node.follow(&table(2, vec![server.backend(0, Ready)]));
    node.netns.ip("link set weft-node down").unwrap();
    node.netns.ip("link set weft-node up").unwrap();
    wait_for("the host reaches the VIP again", SOON, || {
        (call(&node.netns, VIP4).ok()?.1 == "server").then_some(())
    });
    assert_eq!(call(&node.netns, vip6()).unwrap().1, "server");

    node.kill();
    node.netns
        .ip("link add out type veth peer name outside")
        .unwrap();
    for device in ["out", "outside"] {
        node.netns.ip(&format!("link set {device} up")).unwrap();
    }
    node.netns.ip("address add 192.0.2.1/24 dev out").unwrap();
    node.netns.ip("route add default via 192.0.2.2").unwrap();
    node.netns.ip("-6 route add default dev out").unwrap();
    node.netns.ip("link delete weft-node").unwrap();
    for to in [VIP4.to_string(), vip6().to_string()] {
        let refused = node
            .netns
            .ip(&format!("route get {to}"))
            .unwrap_err()
            .to_string();
        assert!(refused.contains("No route to host"), "{refused}");
    }
    node.run();
    wait_for("a new daemon makes the node endpoint anew", SOON, || {
        (call(&node.netns, VIP4).ok()?.1 == "server").then_some(())
    });
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_pod_that_vanished_is_forgotten_and_a_release_that_waited_is_carried_out() {
    let mut node = Node::start("gone", &[]);
    let (vanishing, released) = (node.attach("v"), node.attach("r"));
    let check = |node: &Node, key| node.ask(&Request::Check { key });
    let key = vanishing.key.clone();
    drop(vanishing);
    wait_for("the vanished pod is forgotten", SOON, || {
        matches!(check(&node, key.clone()), Reply::Refused(_)).then_some(())
    });

    node.kill();
    let queue = netmanager_api::cni::pending_dir(&node.path("cni.sock"));
    std::fs::create_dir_all(&queue).unwrap();
    let release = Request::Release {
        key: released.key.clone(),
    };
    let queued = queue.join(released.key.file_name());
    std::fs::write(&queued, serde_json::to_vec(&release).unwrap()).unwrap();
    node.run();
    node.wait_ready();
    assert!(matches!(
        check(&node, released.key.clone()),
        Reply::Refused(_)
    ));
    assert!(!queued.exists());
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn what_cannot_be_is_refused_by_name() {
    let mut node = Node::prepare("bad", &[]);
    node.run();
    node.wait_open();
    let refused = node.refusal(&Request::Status);
    assert_eq!(refused.code, 50);
    assert!(refused.message.contains("n1 has no number"), "{refused}");

    node.netns
        .ip("link add taken type veth peer name taken1")
        .unwrap();
    node.netns.ip("link set taken up").unwrap();
    node.netns.ip("link set taken1 up").unwrap();
    node.netns
        .ip("-6 route add fd12:3456:789a:7::/64 dev taken")
        .unwrap();
    node.write_table(&table(1, Vec::new()));
    wait_for("the collision is named", SOON, || {
        let message = node.refusal(&Request::Status).message;
        (message.contains("fd12:3456:789a::/48")
            && message.contains("fd12:3456:789a:7::/64")
            && message.contains("taken"))
        .then_some(())
    });
    node.netns
        .ip("-6 route delete fd12:3456:789a:7::/64 dev taken")
        .unwrap();
    node.wait_ready();

    let mut second = node.command(&node.path("state"), &node.path("other.sock"));
    let output = node.netns.output(&mut second).unwrap();
    assert!(!output.status.success());
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        said.contains("another NetManager") && said.contains("runs on the state directory"),
        "{said}"
    );
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_node_whose_ipv4_prefix_is_taken_goes_on_by_ipv6() {
    let mut node = Node::prepare("only6", &[]);
    node.netns
        .ip("link add taken type veth peer name taken1")
        .unwrap();
    for device in ["taken", "taken1"] {
        node.netns.ip(&format!("link set {device} up")).unwrap();
    }
    node.netns.ip("route add 10.20.0.0/16 dev taken").unwrap();
    node.run_ready();
    let (client, server) = (node.attach("c"), node.attach("s"));
    assert_eq!((client.reserved.addr4, client.reserved.mesh4), (None, None));
    server.serve("server");
    node.follow(&table(2, vec![server.backend(0, Ready)]));
    assert_eq!(call(&client.netns, vip6()).unwrap().1, "server");
    let log = node.log();
    assert!(
        log.contains("10.16.0.0/12 collides") && log.contains("10.20.0.0/16 on taken"),
        "{log}"
    );
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_node_that_is_removed_leaves_nothing_in_the_kernel() {
    let mut node = Node::start("leave", &[]);
    node.kill();
    let output = node.netns.output(&mut node.removal()).unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let left = [
        node.netns.ip("-o link").unwrap(),
        node.netns.ip("rule").unwrap(),
        node.netns.ip("-6 rule").unwrap(),
        node.netns.ip("route show table all proto 157").unwrap(),
        node.netns.ip("-6 route show table all proto 157").unwrap(),
    ]
    .concat();
    for trace in [
        "weft",
        "22342",
        "proto 157",
        "10.16.0.0/12",
        "fd12:3456:789a::/48",
    ] {
        assert!(!left.contains(trace), "{left}");
    }
    assert_eq!(
        std::fs::read_dir(node.path("bpf")).unwrap().count(),
        0,
        "the pins are gone"
    );
}
