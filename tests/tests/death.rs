//! What clients notice of a backend that dies or drains: real sockets, the real daemon.

#![expect(
    clippy::unwrap_used,
    reason = "a step of a test that fails, fails the test, here as in its body"
)]

use std::{
    io::{ErrorKind, Read},
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use netmanager_api::table::{
    BackendState::{Draining, Ready},
    Table,
};
use weft_tests::{
    Stopwatch,
    traffic::{DNS, any_of, call, datagram_over, datagram_socket, echo, failure},
};

#[path = "node/machine.rs"]
#[expect(dead_code, reason = "shared with the tests of a node")]
mod machine;

use machine::{AT_ONCE, Node, VIP4, table, vip6};

fn vips() -> [IpAddr; 2] {
    [VIP4.into(), vip6().into()]
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_client_that_only_waits_is_reset_when_its_backend_dies() {
    let node = Node::start("idle", &[]);
    let (client, old, new) = (node.attach("c"), node.attach("o"), node.attach("n"));
    old.serve("old");
    new.serve("new");
    node.follow(&table(2, vec![old.backend(0, Ready)]));
    // Pods of both families, and the host's own processes.
    let mut waiting = Vec::new();
    for from in [&client.netns, &node.netns] {
        for to in vips() {
            let (mut stream, who) = call(from, to).unwrap();
            assert_eq!(who, "old");
            echo(&mut stream, b"hello").unwrap();
            waiting.push((to, stream));
        }
    }
    let watch = Stopwatch::start();
    node.follow(&table(3, vec![new.backend(1, Ready)]));
    for (to, mut stream) in waiting {
        stream
            .set_read_timeout(Some(Duration::from_secs(5)))
            .unwrap();
        let error = stream.read(&mut [0]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{to}: {error}");
    }
    assert!(watch.had() < 2 * AT_ONCE, "{:?}", watch.had());
    assert_eq!(call(&client.netns, VIP4).unwrap().1, "new");
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_client_that_waits_is_reset_by_a_daemon_that_was_away_when_its_backend_died() {
    let mut node = Node::start("away", &[]);
    let (client, old) = (node.attach("c"), node.attach("o"));
    old.serve("old");
    node.follow(&table(2, vec![old.backend(0, Ready)]));
    let (mut stream, _) = call(&client.netns, VIP4).unwrap();
    node.kill();
    node.write_table(&table(3, Vec::new()));
    node.run();
    stream
        .set_read_timeout(Some(Duration::from_secs(15)))
        .unwrap();
    let error = stream.read(&mut [0]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{error}");
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_connection_to_a_backend_that_lives_on_is_left_alone_when_another_dies() {
    let node = Node::start("other", &[]);
    let (client, a, b) = (node.attach("c"), node.attach("a"), node.attach("b"));
    a.serve("a");
    b.serve("b");
    node.follow(&table(2, vec![a.backend(0, Ready), b.backend(1, Ready)]));
    let (mut kept, mut ended) = (Vec::new(), Vec::new());
    while kept.len() < 3 || ended.len() < 3 {
        let (stream, who) = call(&client.netns, VIP4).unwrap();
        if who == "a" { &mut kept } else { &mut ended }.push(stream);
    }
    node.follow(&table(3, vec![a.backend(0, Ready)]));
    for mut stream in ended {
        let error = stream.read(&mut [0]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{error}");
    }
    for mut stream in kept {
        echo(&mut stream, b"still there").unwrap();
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_datagram_client_hears_that_its_backend_died_and_then_finds_another() {
    let node = Node::start("udp", &[]);
    let (client, old, new) = (node.attach("c"), node.attach("o"), node.attach("n"));
    old.serve("old");
    new.serve("new");
    for (index, to) in [2, 4].into_iter().zip(vips()) {
        let to = SocketAddr::new(to, DNS);
        node.follow(&table(index, vec![old.backend(0, Ready)]));
        let socket = datagram_socket(&client.netns, any_of(&to)).unwrap();
        // Only a connected socket hears of errors (udp(7)).
        socket.connect(to).unwrap();
        assert_eq!(datagram_over(&socket, to).unwrap(), "old");
        node.follow(&table(index + 1, vec![new.backend(1, Ready)]));
        let (after, error) = failure(|| datagram_over(&socket, to));
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{error}");
        assert!(after < AT_ONCE);
        assert_eq!(datagram_over(&socket, to).unwrap(), "new");
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_datagram_client_that_only_waits_is_told_when_its_backend_dies() {
    let node = Node::start("told", &[]);
    let (client, old, new) = (node.attach("c"), node.attach("o"), node.attach("n"));
    old.serve("old");
    new.serve("new");
    node.follow(&table(2, vec![old.backend(0, Ready)]));
    let mut waiting = Vec::new();
    for from in [&client.netns, &node.netns] {
        for to in vips() {
            let to = SocketAddr::new(to, DNS);
            let socket = datagram_socket(from, any_of(&to)).unwrap();
            socket.connect(to).unwrap();
            assert_eq!(datagram_over(&socket, to).unwrap(), "old");
            waiting.push((to, socket));
        }
    }
    node.follow(&table(3, vec![new.backend(1, Ready)]));
    for (to, socket) in waiting {
        let (after, error) = failure(|| socket.recv(&mut [0; 64]));
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{to}: {error}");
        assert!(after < 2 * AT_ONCE, "{to}: {after:?}");
        // Told once: what it says next finds another at once.
        assert_eq!(datagram_over(&socket, to).unwrap(), "new", "{to}");
    }
}

/// The table with every UDP port's flows following.
fn following(mut table: Table) -> Table {
    for port in table
        .services
        .iter_mut()
        .flat_map(|service| &mut service.ports)
    {
        port.follow = true;
    }
    table
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_datagram_flow_follows_at_once_and_a_connection_is_drained() {
    let node = Node::start("follow", &[]);
    let (client, old, new) = (node.attach("c"), node.attach("o"), node.attach("n"));
    old.serve("old");
    new.serve("new");
    node.follow(&following(table(2, vec![old.backend(0, Ready)])));
    let (mut stream, _) = call(&client.netns, VIP4).unwrap();
    let mut sockets = Vec::new();
    for to in vips() {
        let to = SocketAddr::new(to, DNS);
        let socket = datagram_socket(&client.netns, any_of(&to)).unwrap();
        assert_eq!(datagram_over(&socket, to).unwrap(), "old");
        sockets.push((to, socket));
    }
    let both = vec![old.backend(0, Draining), new.backend(1, Ready)];
    node.follow(&following(table(3, both)));
    for (to, socket) in &sockets {
        assert_eq!(datagram_over(socket, *to).unwrap(), "new");
    }
    echo(&mut stream, b"still the old one").unwrap();
}
