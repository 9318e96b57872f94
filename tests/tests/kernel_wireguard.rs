//! The kernel's own WireGuard under the programs: two nodes, whole, and nothing in clear between them, which the
//! mesh's watch sees to.
//!
//! Which kernel has it is not for the test to guess: `cargo xtask vm` builds and runs this under those that do.

#![expect(
    clippy::unwrap_used,
    reason = "a step of a test that fails, fails the test, here as in its body"
)]

use std::{fs, time::Duration};

use netmanager_api::table::BackendState::Ready;
use weft_tests::{
    mesh::{
        Mesh, Node, Options, TUNNEL_PORT,
        service::{balanced, service},
    },
    traffic::{call, datagram, echo, ping},
};
use wireguard_control::{Backend, Device};

/// Peers speak at least this often while there is traffic (WireGuard's REKEY_AFTER_TIME).
const HANDSHAKE: Duration = Duration::from_secs(120);

/// The node's device, as the kernel describes it.
fn device(node: &Node) -> Device {
    let name = node.tunnel_device().parse().unwrap();
    node.netns
        .run(|| Device::get(&name, Backend::Kernel))
        .unwrap()
}

/// The files of tunnel processes that a node has.
fn processes(node: &Node) -> Vec<String> {
    fs::read_dir(node.path("state"))
        .unwrap()
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| name.ends_with(".pid"))
        .collect()
}

fn a_vip_is_reached(label: &str, args: &[&str]) {
    let mut mesh = Mesh::with(
        label,
        Options {
            args: args.iter().map(|&arg| arg.to_owned()).collect(),
            ..Options::default()
        },
    );
    let (client, server) = (mesh.pod(1, "client"), mesh.pod(2, "server"));
    server.serve("server");
    mesh.follow(&[service(5, vec![server.backend(0, Ready)])]);
    mesh.wait_connected();
    for to in balanced(5) {
        for from in [&client.netns, &mesh.node(1).netns] {
            let (mut stream, who) = call(from, to).unwrap();
            assert_eq!(who, "server");
            echo(&mut stream, &[7; 50_000]).unwrap();
            assert_eq!(datagram(from, to).unwrap(), "server");
            ping(from, to).unwrap();
        }
    }
    for (node, other) in [(1, 2), (2, 1)].map(|(a, b)| (mesh.node(a), mesh.node(b))) {
        let device = device(node);
        assert_eq!(device.listen_port, Some(TUNNEL_PORT));
        let [peer] = &device.peers[..] else {
            panic!("{:?}", device.peers);
        };
        assert_eq!(peer.config.public_key.to_base64(), other.public_key());
        let handshake = peer.stats.last_handshake_time.expect("a handshake");
        assert!(handshake.elapsed().unwrap() < HANDSHAKE);
        // Four streams there and back.
        assert!(peer.stats.rx_bytes > 200_000 && peer.stats.tx_bytes > 200_000);
        assert_eq!(processes(node), [""; 0], "a userspace tunnel");
    }
}

#[test]
#[ignore = "needs a kernel with WireGuard: cargo xtask vm"]
fn a_vip_is_reached_through_the_kernels_tunnel_and_nothing_is_in_clear() {
    a_vip_is_reached("kwg", &[]);
}

#[test]
#[ignore = "needs a kernel with WireGuard: cargo xtask vm"]
fn classifiers_work_on_the_kernels_tunnel_too() {
    a_vip_is_reached("kwc", &["--hook", "clsact"]);
}
