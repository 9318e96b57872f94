//! Two nodes, whole: daemons, programs, the userspace tunnel over a veth pair as the underlay, and pods.

use std::{
    net::IpAddr,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use ebpf_common::addr::Policy;
use netmanager_api::table::{
    Backend,
    BackendState::{Draining, Ready},
    Peer,
};
use weft_netmanager::{tunnel::key_path, wireguard::key::PrivateKey};
use weft_tests::{
    topology::pair,
    traffic::{call, datagram, echo, ping},
    wait_for,
};

use super::machine::{Node, Pod, SOON, block4, table_of, vip};

/// In a namespace of its own, any port is free.
const PORT: u16 = 27_460;

struct Mesh {
    a: Node,
    b: Node,
    client: Pod,
    here: Pod,
    there: Pod,
    index: u64,
}

impl Mesh {
    /// A client and a server on one node, another server on the other.
    fn start(label: &str) -> Self {
        let (netns_a, netns_b) = pair(label).unwrap();
        let mut nodes = [(netns_a, 1), (netns_b, 2)].map(|(netns, number)| {
            Node::prepare_in(
                netns,
                number,
                &[
                    "--underlay",
                    &format!("192.0.2.{number}"),
                    "--tunnel-port",
                    &PORT.to_string(),
                ],
            )
        });
        for node in &mut nodes {
            node.run_ready();
        }
        let [a, b] = nodes;
        let mut mesh = Self {
            client: a.attach("client"),
            here: a.attach("here"),
            there: b.attach("there"),
            a,
            b,
            index: 1,
        };
        mesh.here.serve("here");
        mesh.there.serve("there");
        mesh.follow(vec![
            mesh.here.backend(0, Ready),
            mesh.there.backend(1, Ready),
        ]);
        mesh
    }

    /// Gives both nodes a table with these backends, and each other.
    fn follow(&mut self, backends: Vec<Backend>) {
        self.index += 1;
        for (node, other) in [(&self.a, &self.b), (&self.b, &self.a)] {
            let mut table = table_of(node.number, self.index, backends.clone());
            let key = PrivateKey::load_or_create(&key_path(&other.path("state"))).unwrap();
            table.peers.push(Peer {
                number: other.number,
                name: format!("lab/n{}", other.number),
                public_key: key.public().to_string(),
                endpoint: Some(format!("192.0.2.{}:{PORT}", other.number).parse().unwrap()),
                blocks4: vec![block4(other.number)],
            });
            node.follow(&table);
        }
    }

    /// Who answers `policy`, over both families; each of `calls` calls must be answered.
    fn answers(&self, policy: Policy, instance: Option<u32>, calls: usize) -> Vec<String> {
        let vip = vip(policy, instance);
        let mut who: Vec<String> = [IpAddr::from(vip.addr6), vip.addr4.unwrap().into()]
            .into_iter()
            .flat_map(|to| (0..calls).map(move |_| to))
            .map(|to| call(&self.client.netns, to).unwrap().1)
            .collect();
        who.sort();
        who.dedup();
        who
    }

    /// Waits until the first packet passed the tunnel both ways.
    fn wait_connected(&self) {
        let to = vip(Policy::Instance, Some(1)).addr6;
        wait_for("the tunnel carries a call", SOON, || {
            call(&self.client.netns, to).ok()
        });
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_vip_reaches_the_other_node_through_the_tunnel_by_every_protocol() {
    let mut mesh = Mesh::start("mesh");
    mesh.wait_connected();
    assert_eq!(mesh.answers(Policy::Balanced, None, 20), ["here", "there"]);
    assert_eq!(mesh.answers(Policy::Instance, Some(1), 3), ["there"]);
    let closest = mesh.answers(Policy::Closest, None, 20);
    assert!(
        closest.contains(&"here".to_owned()),
        "nothing is closer: {closest:?}"
    );
    let far = vip(Policy::Instance, Some(1));
    for to in [IpAddr::from(far.addr6), far.addr4.unwrap().into()] {
        for from in [&mesh.client.netns, &mesh.a.netns] {
            let (mut stream, who) = call(from, to).unwrap();
            assert_eq!(who, "there");
            echo(&mut stream, &[3; 200_000]).unwrap();
            datagram(from, to).unwrap();
            ping(from, to).unwrap();
        }
    }
    mesh.follow(vec![
        mesh.here.backend(0, Draining),
        mesh.there.backend(1, Ready),
    ]);
    assert_eq!(mesh.answers(Policy::Balanced, None, 5), ["there"]);
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn both_daemons_killed_and_started_again_are_not_noticed_by_a_stream_between_the_nodes() {
    let mut mesh = Mesh::start("mkill");
    mesh.wait_connected();
    let far = vip(Policy::Instance, Some(1)).addr4.unwrap();
    let (mut stream, _) = call(&mesh.client.netns, far).unwrap();
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let exchange = scope.spawn(|| {
            let mut longest = Duration::ZERO;
            while !stop.load(Ordering::Relaxed) {
                let start = Instant::now();
                echo(&mut stream, &[1; 500]).unwrap();
                longest = longest.max(start.elapsed());
            }
            longest
        });
        for node in [&mut mesh.a, &mut mesh.b] {
            node.kill();
            call(&mesh.client.netns, far).unwrap();
            node.run_ready();
        }
        stop.store(true, Ordering::Relaxed);
        let longest = exchange.join().unwrap();
        assert!(longest < Duration::from_millis(500), "{longest:?}");
    });
    assert_eq!(mesh.answers(Policy::Balanced, None, 20), ["here", "there"]);
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_node_skips_backends_behind_a_peer_that_does_not_answer_and_takes_them_back() {
    let mesh = Mesh::start("mlost");
    mesh.wait_connected();
    let only = |who: &'static [&'static str]| {
        let from = Instant::now();
        wait_for("the answers follow the probes", SOON, || {
            let vip = vip(Policy::Balanced, None).addr6;
            let mut found: Vec<String> = (0..12)
                .filter_map(|_| call(&mesh.client.netns, vip).ok())
                .map(|(_, who)| who)
                .collect();
            found.sort();
            found.dedup();
            (found == who).then_some(())
        });
        from.elapsed()
    };
    mesh.b.netns.ip("link set eth0 down").unwrap();
    only(&["here"]);
    // From now on no call goes to the silent one.
    assert_eq!(mesh.answers(Policy::Balanced, None, 20), ["here"]);
    mesh.b.netns.ip("link set eth0 up").unwrap();
    only(&["here", "there"]);
}
