//! What is not declared or not linked is refused at once.

use std::{
    io::ErrorKind,
    net::{IpAddr, SocketAddr, UdpSocket},
    time::Duration,
};

use netmanager_api::table::BackendState::Ready;
use weft_tests::{
    Netns,
    mesh::{
        AT_ONCE, Mesh,
        service::{balanced, service},
    },
    traffic::{HTTP, call_at, failure, ping},
    wait_for,
};

const UNDECLARED: u16 = 81;

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn undeclared_ports_and_unlinked_services_are_refused_at_once_in_every_protocol() {
    let mut mesh = Mesh::start("refuse", 1);
    let (client, server) = (mesh.pod(1, "client"), mesh.pod(1, "server"));
    server.serve("server");
    mesh.follow(&[service(5, vec![server.backend(0, Ready)])]);
    let node = mesh.node(1);
    for from in [&client.netns, &node.netns] {
        for (number, port, reason) in [
            (5, UNDECLARED, "undeclared_port"),
            (6, HTTP, "not_linked"),
            (6, UNDECLARED, "not_linked"),
        ] {
            for to in balanced(number) {
                let to = SocketAddr::new(to, port);
                let ((), counted) = node.counted(|| {
                    let (after, error) = failure(|| call_at(from, to));
                    assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "TCP {to}");
                    assert!(after < AT_ONCE, "TCP {to}: {after:?}");
                    let after = refused_datagram(from, to);
                    assert!(after < AT_ONCE, "UDP {to}: {after:?}");
                });
                assert_eq!(counted.get(reason), Some(&2), "{to}: {counted:?}");
            }
        }
        for to in balanced(6) {
            let ((after, error), counted) = node.counted(|| failure(|| ping(from, to)));
            assert_eq!(error.kind(), ErrorKind::HostUnreachable, "{to}: {error}");
            assert!(after < AT_ONCE, "{to}: {after:?}");
            assert_eq!(counted.get("not_linked"), Some(&1), "{to}: {counted:?}");
        }
    }
}

/// How long a connected UDP socket takes to hear that nobody is there.
fn refused_datagram(netns: &Netns, to: SocketAddr) -> Duration {
    let any: IpAddr = match to {
        SocketAddr::V4(_) => "0.0.0.0".parse().unwrap(),
        SocketAddr::V6(_) => "::".parse().unwrap(),
    };
    let socket = netns.run(|| UdpSocket::bind((any, 0))).unwrap();
    socket.connect(to).unwrap();
    socket.set_read_timeout(Some(2 * AT_ONCE)).unwrap();
    let (after, error) = failure(|| {
        socket.send(b"question")?;
        socket.recv(&mut [0; 16])
    });
    // A socket hears a port as refused, a host or an administrator's refusal as unreachable.
    assert!(
        matches!(
            error.kind(),
            ErrorKind::ConnectionRefused | ErrorKind::HostUnreachable
        ),
        "UDP {to}: {error}"
    );
    after
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_client_whose_link_is_taken_away_is_refused_from_then_on() {
    let mut mesh = Mesh::start("unlink", 1);
    let (client, server) = (mesh.pod(1, "client"), mesh.pod(1, "server"));
    server.serve("server");
    let linked = service(5, vec![server.backend(0, Ready)]);
    for _ in 0..2 {
        mesh.follow(std::slice::from_ref(&linked));
        for to in balanced(5) {
            assert_eq!(
                weft_tests::traffic::call(&client.netns, to).unwrap().1,
                "server"
            );
        }
        mesh.follow(&[]);
        for to in balanced(5) {
            let (after, error) = failure(|| weft_tests::traffic::call(&client.netns, to));
            assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
            assert!(after < AT_ONCE, "{after:?}");
        }
    }
    wait_for("the last refusal is counted", AT_ONCE, || {
        (mesh.node(1).reasons()["not_linked"] >= 4).then_some(())
    });
}
