//! Who calls: pods, the host, pods without an interface of Weft's; from wherever.

use std::{
    io,
    net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream},
    thread,
};

use netmanager_api::table::BackendState::Ready;
use weft_tests::{
    mesh::{
        Clusters, Mesh, Options, Pod, SOON,
        service::{TARGET_HTTP, balanced, service},
    },
    traffic::{HTTP, call, datagram, echo, listen, ping},
    wait_for,
};

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_client_reaches_backends_of_its_own_node_of_another_node_and_of_another_cluster_alike() {
    let mut mesh = Mesh::with(
        "reach",
        Options {
            clusters: Clusters::OnePerNode,
            ..Options::default()
        },
    );
    let (client, far) = (mesh.pod(1, "client"), mesh.pod(2, "far"));
    let near = mesh.pod(1, "near");
    assert_eq!(
        client.primary, far.primary,
        "the clusters' pod CIDRs overlap"
    );
    near.serve("near");
    far.serve("far");
    mesh.follow(&[
        service(5, vec![near.backend(0, Ready)]),
        service(6, vec![far.backend(0, Ready)]),
    ]);
    mesh.wait_connected();
    for (number, name) in [(5, "near"), (6, "far")] {
        for to in balanced(number) {
            let (mut stream, who) = call(&client.netns, to).unwrap();
            assert_eq!(who, name);
            echo(&mut stream, &[7; 300_000]).unwrap();
            assert_eq!(datagram(&client.netns, to).unwrap(), name);
            ping(&client.netns, to).unwrap();
        }
    }
    wait_for("the watch looks", SOON, || {
        (mesh.underlay.watch.frames() > 100).then_some(())
    });
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_call_passes_through_a_chain_of_vips_over_both_nodes() {
    let mut mesh = Mesh::start("chain", 2);
    let (first, second) = (mesh.pod(1, "first"), mesh.pod(2, "second"));
    let third = mesh.pod(1, "third");
    third.serve("third");
    mesh.follow(&[
        service(5, vec![second.backend(0, Ready)]),
        service(6, vec![third.backend(0, Ready)]),
    ]);
    mesh.wait_connected();
    for (to, next) in balanced(5).into_iter().zip(balanced(6)) {
        let listener = listen(&second.netns, TARGET_HTTP).unwrap();
        thread::scope(|scope| {
            scope.spawn(|| forward(&second, &listener, next));
            let (mut stream, who) = call(&first.netns, to).unwrap();
            assert_eq!(who, "third");
            echo(&mut stream, &[5; 100_000]).unwrap();
        });
    }
}

/// Takes one connection and carries its bytes to and from a VIP.
fn forward(pod: &Pod, listener: &TcpListener, next: IpAddr) {
    let (mut client, _) = listener.accept().unwrap();
    let mut server = pod
        .netns
        .run(|| TcpStream::connect(SocketAddr::new(next, HTTP)))
        .unwrap();
    let (mut from_client, mut to_server) =
        (client.try_clone().unwrap(), server.try_clone().unwrap());
    thread::scope(|scope| {
        scope.spawn(move || {
            io::copy(&mut from_client, &mut to_server).unwrap();
            to_server.shutdown(Shutdown::Write).unwrap();
        });
        io::copy(&mut server, &mut client).unwrap();
    });
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn the_host_and_an_unattached_pod_reach_vips_through_the_node_endpoint() {
    let mut mesh = Mesh::start("door", 2);
    let (near, far) = (mesh.pod(1, "near"), mesh.pod(2, "far"));
    let plain = mesh.plain(1, "plain");
    near.serve("near");
    far.serve("far");
    mesh.follow(&[
        service(5, vec![near.backend(0, Ready)]),
        service(6, vec![far.backend(0, Ready)]),
    ]);
    mesh.wait_connected();
    mesh.node(1).masquerade();
    for (number, name) in [(5, "near"), (6, "far")] {
        for to in balanced(number) {
            for from in [&mesh.node(1).netns, &plain.netns] {
                let (mut stream, who) = call(from, to).unwrap();
                assert_eq!(who, name);
                echo(&mut stream, &[7; 100_000]).unwrap();
                assert_eq!(datagram(from, to).unwrap(), name);
                ping(from, to).unwrap();
            }
        }
    }
}
