//! No inner packet on the underlay in clear, whatever is dead: the watch of each mesh looks, these tests give it
//! something to see.

use std::{
    net::{IpAddr, SocketAddr, UdpSocket},
    os::fd::AsRawFd,
};

use netmanager_api::table::BackendState::Ready;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrStorage, connect, socket};
use weft_tests::{
    Netns,
    capture::Capture,
    mesh::{
        Mesh, Options, Plain, Pod, SOON, TUNNEL_PORT,
        service::{balanced, service},
        watch::in_clear,
    },
    traffic::{DNS, HTTP, MARKER, any_of, call},
    wait_for,
};

/// A node with everybody who may call, a pod far away, and eyes on the ways that nothing may take.
struct Stage {
    mesh: Mesh,
    client: Pod,
    plain: Plain,
    far: Pod,
}

impl Stage {
    fn start(label: &str) -> Self {
        let mesh = Mesh::start(label, 2);
        Self::on(mesh)
    }

    fn on(mut mesh: Mesh) -> Self {
        let (client, plain) = (mesh.pod(1, "client"), mesh.plain(1, "plain"));
        let far = mesh.pod(2, "far");
        far.serve("far");
        mesh.node(1).masquerade();
        mesh.follow(&[service(5, vec![far.backend(0, Ready)])]);
        Self {
            mesh,
            client,
            plain,
            far,
        }
    }

    /// Everybody sends to everything of the mesh; none of it is seen outside it.
    fn press(&self, state: &str) {
        let primary = Capture::start(&self.client.netns, "eth0");
        let clients = [
            &self.client.netns,
            &self.mesh.node(1).netns,
            &self.plain.netns,
        ];
        for from in clients {
            press(from, &[balanced(5), self.far.addresses()].concat());
        }
        for frame in primary.stop() {
            assert_eq!(in_clear(&frame), None, "{state}: by the primary interface");
        }
        let seen = self.mesh.underlay.watch.seen();
        assert!(seen.is_empty(), "{state}: {seen:#?}");
    }

    fn wait_served(&self) {
        for from in [&self.client.netns, &self.mesh.node(1).netns] {
            for to in balanced(5) {
                wait_for("a call is answered", SOON, || call(from, to).ok());
            }
        }
    }
}

/// Sends a datagram and a SYN to each address, and waits for nothing.
fn press(from: &Netns, to: &[IpAddr]) {
    from.run(|| {
        for to in to {
            let (http, dns) = (SocketAddr::new(*to, HTTP), SocketAddr::new(*to, DNS));
            let datagram = UdpSocket::bind(any_of(&dns)).unwrap();
            // Refused or lost: both are right, here it is only not seen.
            let _ = datagram.send_to(MARKER.as_bytes(), dns);
            let family = match to {
                IpAddr::V4(_) => AddressFamily::Inet,
                IpAddr::V6(_) => AddressFamily::Inet6,
            };
            let fd = socket(family, SockType::Stream, SockFlag::SOCK_NONBLOCK, None).unwrap();
            let _ = connect(fd.as_raw_fd(), &SockaddrStorage::from(http));
        }
    });
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn nothing_is_in_clear_while_daemon_and_tunnel_die_and_come_back() {
    let mut stage = Stage::start("dying");
    stage.wait_served();
    stage.press("all is well");
    let device = stage.mesh.node(1).tunnel_device();

    stage
        .mesh
        .node(1)
        .netns
        .ip(&format!("link delete {device}"))
        .unwrap();
    stage.press("the tunnel device was deleted");
    stage.wait_served();

    assert!(stage.mesh.node(1).kill_tunnel());
    stage.press("the tunnel was killed");
    stage.wait_served();

    stage.mesh.node_mut(1).kill();
    stage.press("the daemon was killed");
    stage.mesh.node(1).kill_tunnel();
    wait_for("the device is gone with its process", SOON, || {
        stage
            .mesh
            .node(1)
            .netns
            .ip(&format!("link show {device}"))
            .err()
    });
    stage.press("daemon and tunnel were killed");
    stage
        .mesh
        .node(1)
        .netns
        .ip("link delete weft-node")
        .unwrap();
    stage.press("nothing of the node is left but its guards");
    stage.mesh.node_mut(1).run();
    stage.press("the daemon starts");
    stage.mesh.node(1).wait_ready();
    stage.press("the daemon is back");
    stage.wait_served();

    stage.client.netns.ip("link set net1 down").unwrap();
    stage.press("the pod's interface is down");
    stage.client.netns.ip("link delete net1").unwrap();
    stage.press("the pod's interface is deleted");
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn nothing_is_in_clear_before_the_first_tunnel_is_up() {
    let mut mesh = Mesh::prepare("early", Options::default());
    // Somebody else has the tunnel's port, so that it cannot start.
    let taken = mesh
        .node(1)
        .netns
        .run(|| UdpSocket::bind(("::", TUNNEL_PORT)).unwrap());
    for node in &mut mesh.nodes {
        node.run();
    }
    for node in &mesh.nodes {
        node.wait_ready();
    }
    let stage = Stage::on(mesh);
    stage.press("there is no tunnel");
    for to in balanced(5) {
        assert!(call(&stage.client.netns, to).is_err(), "{to}");
    }
    drop(taken);
    stage.wait_served();
    stage.press("there is one");
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn nothing_is_in_clear_between_a_reboot_and_the_first_start_of_the_daemon() {
    let mut stage = Stage::start("boot");
    stage.wait_served();
    // The pods of before the reboot are gone; this one's primary interface stands for those of other networks.
    stage.client.netns.ip("link delete net1").unwrap();
    let node = stage.mesh.node_mut(1);
    node.reboot();
    node.guard();
    stage.press("guarded, no daemon yet");
    stage.mesh.node_mut(1).run();
    stage.press("the daemon starts");
    stage.mesh.node(1).guard();
    stage.mesh.node(1).wait_ready();
    for to in balanced(5) {
        wait_for("the host's call is answered", SOON, || {
            call(&stage.mesh.node(1).netns, to).ok()
        });
    }
    stage.press("the daemon is back");
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn the_watch_sees_a_packet_in_clear() {
    let mut mesh = Mesh::start("seen", 1);
    let netns = &mesh.node(1).netns;
    for (program, prefix) in [
        ("iptables", "10.16.0.0/12"),
        ("ip6tables", "fd12:3456:789a::/48"),
    ] {
        // A rule of somebody else's that takes the mesh's packets past the guards.
        let words = [
            "-t",
            "mangle",
            "-A",
            "OUTPUT",
            "-d",
            prefix,
            "-j",
            "MARK",
            "--set-mark",
            "7",
        ];
        netns.succeed(program, &words).unwrap();
    }
    for family in ["-4", "-6"] {
        netns
            .ip(&format!(
                "{family} rule add fwmark 7 lookup main priority 10"
            ))
            .unwrap();
    }
    press(netns, &balanced(5));
    wait_for("the watch sees both families", SOON, || {
        (mesh.underlay.watch.seen().len() >= 2).then_some(())
    });
    mesh.underlay.watch.stop();
    mesh.underlay.watch.forgive();
}
