//! What a node does when a map is full, with real sockets.

use std::{
    io::ErrorKind,
    net::{IpAddr, SocketAddr, UdpSocket},
    process::{self, Command},
    time::Instant,
};

use netmanager_api::table::BackendState::{Draining, Ready};
use weft_tests::{
    traffic::{DNS, any_of, call, datagram_over, datagram_socket, echo},
    wait_for,
};

use super::machine::{AT_ONCE, Node, SOON, VIP4, table, vip6};

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_full_table_refuses_new_connections_at_once_and_keeps_every_old_one() {
    /// Two entries each; an eighth of them may have places besides.
    const CONNECTIONS: usize = 512;
    const PLACES: usize = 128;
    // Both ends of each are this process's, which may have 1,024 files by default.
    let limit = Command::new("prlimit")
        .args(["--nofile=8192:", "--pid", &process::id().to_string()])
        .status();
    assert!(limit.unwrap().success());
    let node = Node::start("full", &["--flows", "1024"]);
    let (client, server) = (node.attach("c"), node.attach("s"));
    server.serve("server");
    node.follow(&table(2, vec![server.backend(0, Ready)]));
    let vips: [IpAddr; 2] = [VIP4.into(), vip6().into()];
    let mut streams: Vec<_> = (0..CONNECTIONS)
        .map(|number| call(&client.netns, vips[number % 2]).unwrap().0)
        .collect();
    for to in vips {
        let (after, error) = loop {
            let began = Instant::now();
            match call(&client.netns, to) {
                // It found a place of its own.
                Ok((stream, _)) => streams.push(stream),
                Err(error) => break (began.elapsed(), error),
            }
            assert!(streams.len() <= CONNECTIONS + PLACES, "nothing is full");
        };
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{to}: {error}");
        assert!(after < AT_ONCE, "{to}: {after:?}");
    }
    for stream in &mut streams {
        echo(stream, b"still there").unwrap();
    }
    // Not all of them had places.
    streams.truncate(streams.len() - 8);
    wait_for("the room of those that ended is used", SOON, || {
        call(&client.netns, VIP4).ok()
    });
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_pod_that_sprays_ports_ends_nobody_elses_idle_datagram_flows() {
    const FLOWS: usize = 20;
    const SPRAYED: usize = 5_000;
    let sizes = ["--flows", "4096", "--flows-per-endpoint", "512"];
    let node = Node::start("spray", &sizes);
    let (idle, sprays) = (node.attach("i"), node.attach("p"));
    let (old, new) = (node.attach("o"), node.attach("n"));
    old.serve("old");
    new.serve("new");
    node.follow(&table(2, vec![old.backend(0, Ready)]));
    let to = SocketAddr::from((VIP4, DNS));
    let sockets: Vec<_> = (0..FLOWS)
        .map(|_| datagram_socket(&idle.netns, any_of(&to)).unwrap())
        .collect();
    for socket in &sockets {
        assert_eq!(datagram_over(socket, to).unwrap(), "old");
    }
    // From now on who has lost its flow goes elsewhere.
    let both = vec![old.backend(0, Draining), new.backend(1, Ready)];
    node.follow(&table(3, both));
    let refused = sprays.netns.run(|| {
        let spray = |_: &usize| {
            let socket = UdpSocket::bind(any_of(&to)).unwrap();
            socket.connect(to).unwrap();
            socket.send(b"spray").unwrap();
            // What is refused is refused before the call returns.
            socket.take_error().unwrap().is_some()
        };
        (0..SPRAYED).filter(spray).count()
    });
    assert!(refused > SPRAYED / 4, "the quota holds: {refused}");
    for socket in &sockets {
        assert_eq!(datagram_over(socket, to).unwrap(), "old");
    }
}
