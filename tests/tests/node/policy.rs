//! Every policy, by the shares that the kernel picks: connections counted by who answers.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr, UdpSocket},
    thread,
    time::Duration,
};

use ebpf_common::addr::Policy;
use netmanager_api::{
    conditions::{BackendLoad, Conditions, STALE},
    stream::ToNode,
    table::{Backend, BackendState::Ready, Table},
};
use weft_tests::{
    Netns,
    traffic::{HTTP, call, failure, who_answers},
    wait_for,
};

use super::{
    machine::{AT_ONCE, Node, Pod, SOON, table, vip},
    mesh::{Mesh, PORT, Way},
    stream::Followed,
};

/// Connections that a share is told from: five standard deviations of a quarter are 0.11.
const CALLS: usize = 400;
const SLACK: f64 = 0.11;

/// The shares of those who answer `calls` connections.
fn shares_of(from: &Netns, to: IpAddr, calls: usize) -> BTreeMap<String, f64> {
    let mut shares = BTreeMap::new();
    let names = from.run(|| {
        (0..calls)
            .map(|_| who_answers(SocketAddr::new(to, HTTP)).unwrap())
            .collect::<Vec<_>>()
    });
    for name in names {
        *shares.entry(name).or_default() += 1.0 / calls as f64;
    }
    shares
}

/// Both addresses of the service's VIP.
fn addresses(policy: Policy, instance: Option<u32>) -> [IpAddr; 2] {
    let vip = vip(policy, instance);
    [vip.addr6.into(), vip.addr4.unwrap().into()]
}

/// Asserts the shares of `policy` in both families.
#[track_caller]
fn assert_shares(from: &Netns, policy: Policy, want: &[(&str, f64)]) {
    for to in addresses(policy, None) {
        let shares = shares_of(from, to, CALLS);
        for (name, want) in want {
            let got = shares.get(*name).copied().unwrap_or(0.0);
            assert!(
                (got - want).abs() < SLACK,
                "{policy:?} by {to}: {shares:?}, want {want} for {name}"
            );
            assert!(
                *want > 0.0 || got == 0.0,
                "{policy:?} by {to}: {shares:?}, want none for {name}"
            );
        }
    }
}

const NAMES: [&str; 4] = ["s0", "s1", "s2", "s3"];

/// One node with a client and four backends, as an agent's table shows them.
struct Lab {
    followed: Followed,
    client: Pod,
    servers: Vec<Pod>,
    index: u64,
}

impl Lab {
    /// The backends stand on `nodes`; the node starts with these round-trip times, microseconds.
    fn start(label: &str, nodes: [u32; 4], rtt_us: &str) -> Self {
        let followed = Followed::start_with(label, |node| {
            std::fs::create_dir_all(node.path("state")).unwrap();
            let sight = format!(r#"{{"rtt_us":{{{rtt_us}}},"unreachable":[]}}"#);
            std::fs::write(node.path("state").join("sight.json"), sight).unwrap();
        });
        followed.node.wait_open();
        let mut followed = followed;
        followed.apply(table_of(1, Vec::new()));
        let client = followed.node.attach("client");
        let servers: Vec<Pod> = NAMES.map(|name| served(&followed.node, name)).into();
        let mut lab = Self {
            followed,
            client,
            servers,
            index: 1,
        };
        let backends = lab.backends(nodes);
        lab.apply(backends);
        lab
    }

    fn backends(&self, nodes: [u32; 4]) -> Vec<Backend> {
        self.servers
            .iter()
            .zip(0..)
            .zip(nodes)
            .map(|((server, instance), node)| Backend {
                node,
                ..server.backend(instance, Ready)
            })
            .collect()
    }

    fn apply(&mut self, backends: Vec<Backend>) {
        self.index += 1;
        self.followed.apply(table_of(self.index, backends));
    }

    /// Says how loaded the backends are, in their order.
    fn say_loads(&self, percents: [u16; 4]) {
        let loads = self.servers.iter().zip(percents);
        self.followed.say(ToNode::Conditions(Conditions {
            loads: loads
                .map(|(server, percent)| BackendLoad {
                    addr6: server.reserved.addr6,
                    percent,
                })
                .collect(),
            ..Conditions::default()
        }));
    }

    /// Waits until the shares of `policy` are as wanted.
    fn wait(&self, what: &str, policy: Policy, wanted: impl Fn(&BTreeMap<String, f64>) -> bool) {
        let [to, _] = addresses(policy, None);
        wait_for(what, SOON, || {
            wanted(&shares_of(&self.client.netns, to, CALLS / 2)).then_some(())
        });
    }
}

fn served(node: &Node, name: &'static str) -> Pod {
    let pod = node.attach(name);
    pod.serve(name);
    pod
}

/// The table with a VIP of every policy.
fn table_of(index: u64, backends: Vec<Backend>) -> Table {
    let mut table = table(index, backends);
    for policy in [Policy::LeastLoaded, Policy::Greenest] {
        table.services[0].vips.push(vip(policy, None));
    }
    table
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn balanced_shares_equally_and_closest_by_bands_that_overflow() {
    let lab = Lab::start(
        "bands",
        [2, 3, 4, 5],
        r#""2":5000,"3":5400,"4":40000,"5":90000"#,
    );
    let client = &lab.client.netns;
    let quarter = NAMES.map(|name| (name, 0.25));
    assert_shares(client, Policy::Balanced, &quarter);
    // Nobody reports a load, and no carbon is known: equal, and what is near.
    assert_shares(client, Policy::LeastLoaded, &quarter);
    let third = 1.0 / 3.0;
    let within = [("s0", third), ("s1", third), ("s2", third), ("s3", 0.0)];
    assert_shares(client, Policy::Greenest, &within);
    let near = [("s0", 0.5), ("s1", 0.5), ("s2", 0.0), ("s3", 0.0)];
    assert_shares(client, Policy::Closest, &near);
    lab.say_loads([95, 95, 10, 10]);
    lab.wait("the near ones are saturated", Policy::Closest, |shares| {
        shares.contains_key("s2")
    });
    assert_shares(client, Policy::Closest, &within);
    lab.say_loads([30, 95, 10, 10]);
    lab.wait("one has room again", Policy::Closest, |shares| {
        !shares.contains_key("s2")
    });
    assert_shares(client, Policy::Closest, &near);
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn least_loaded_follows_the_load_and_forgets_it_when_reports_stop() {
    let lab = Lab::start("load", [1; 4], "");
    let client = &lab.client.netns;
    // One round: (mean / load) ^ 1/4 with a mean of 207.5 is 0.71 and 2.13.
    lab.say_loads([800, 10, 10, 10]);
    let loaded = |shares: &BTreeMap<String, f64>| shares.get("s0").copied().unwrap_or(0.0) < 0.17;
    lab.wait("the loaded one gets less", Policy::LeastLoaded, loaded);
    let shares = [("s0", 0.1), ("s1", 0.3), ("s2", 0.3), ("s3", 0.3)];
    assert_shares(client, Policy::LeastLoaded, &shares);
    let quarter = NAMES.map(|name| (name, 0.25));
    assert_shares(client, Policy::Balanced, &quarter);
    // From here on nobody reports.
    wait_for("the load is forgotten", SOON + STALE, || {
        let log = lab.followed.node.log();
        log.contains("load and coordinates is too old")
            .then_some(())
    });
    lab.wait("all are equal", Policy::LeastLoaded, |shares| {
        shares.get("s0").copied().unwrap_or(0.0) > 0.17
    });
    assert_shares(client, Policy::LeastLoaded, &quarter);
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn sticky_keeps_a_client_at_its_backend_when_another_is_lost_and_returns() {
    let mut lab = Lab::start("sticky", [1; 4], "");
    let mut clients: Vec<Pod> = ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j"]
        .map(|name| lab.followed.node.attach(name))
        .into();
    let only = |pod: &Pod, to: IpAddr| {
        let shares = shares_of(&pod.netns, to, 10);
        assert_eq!(shares.len(), 1, "one client, one backend: {shares:?}");
        shares.into_keys().next().unwrap()
    };
    let look = |clients: &[Pod]| -> Vec<String> {
        let clients = clients.iter();
        clients
            .flat_map(|pod| addresses(Policy::Sticky, None).map(|to| only(pod, to)))
            .collect()
    };
    let backends = lab.backends([1; 4]);
    lab.index += 1;
    let mut with_sticky = table_of(lab.index, backends.clone());
    with_sticky.services[0].vips.push(vip(Policy::Sticky, None));
    lab.followed.apply(with_sticky.clone());
    let before = look(&clients);
    let lost = before[0].clone();
    assert!(before.iter().any(|name| *name != lost), "{before:?}");
    let mut without = with_sticky.clone();
    let position = NAMES.iter().position(|name| *name == lost).unwrap();
    without.services[0].backends.remove(position);
    without.revision.index += 1;
    lab.followed.apply(without.clone());
    let after = look(&clients);
    assert!(!after.contains(&lost), "{after:?}");
    let moves = before.iter().zip(&after);
    let stayed = moves.clone().filter(|(before, now)| before == now).count();
    let kept = before.iter().filter(|name| **name != lost).count();
    // Maglev moves some that need not, at most two in a hundred; by a remainder two in three would move.
    assert!(stayed + 3 >= kept, "{:?}", moves.collect::<Vec<_>>());
    with_sticky.revision.index += 2;
    lab.followed.apply(with_sticky);
    assert_eq!(look(&clients), before, "and back");
    clients.clear();
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn an_instance_is_that_instance_or_refused_and_never_another() {
    let mut lab = Lab::start("inst", [1; 4], "");
    for to in addresses(Policy::Instance, Some(1)) {
        let shares = shares_of(&lab.client.netns, to, 50);
        assert_eq!(shares.into_keys().collect::<Vec<_>>(), ["s1"]);
    }
    let mut backends = lab.backends([1; 4]);
    backends.remove(1);
    lab.apply(backends);
    for to in addresses(Policy::Instance, Some(1)) {
        for _ in 0..10 {
            let (after, error) = failure(|| call(&lab.client.netns, to));
            assert!(after < AT_ONCE, "{to}: {error} after {after:?}");
        }
    }
    let third = 1.0 / 3.0;
    let others = [("s0", third), ("s1", 0.0), ("s2", third), ("s3", third)];
    assert_shares(&lab.client.netns, Policy::Balanced, &others);
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn greenest_prefers_the_cleaner_node_by_its_carbon() {
    let mesh = Mesh::start_by("green", |_| Way::Direct, [100, 50]);
    mesh.wait_connected();
    // The first answers come through a tunnel that is just being set up.
    wait_for("the other node is near", SOON, || {
        (mesh.answers(Policy::Greenest, None, 10) == ["here", "there"]).then_some(())
    });
    // What is measured on a machine that is busy for a while may be beyond `greenest`'s 50 ms.
    wait_for("the cleaner node has its share", SOON, || {
        let is_fair = |to| {
            let shares = shares_of(&mesh.client.netns, to, CALLS);
            shares
                .get("here")
                .is_some_and(|here| (here - 0.2).abs() < SLACK)
        };
        addresses(Policy::Greenest, None)
            .into_iter()
            .all(is_fair)
            .then_some(())
    });
}

/// Carries datagrams between the tunnels of two nodes, each `late`.
fn relay(netns: &Netns, late: Duration) -> Way {
    let socket = netns.run(|| UdpSocket::bind("192.0.2.1:0").unwrap());
    let port = socket.local_addr().unwrap().port();
    thread::spawn(move || {
        let ends = [1, 2].map(|host| SocketAddr::from(([192, 0, 2, host], PORT)));
        let mut datagram = [0; 65_536];
        while let Ok((length, from)) = socket.recv_from(&mut datagram) {
            let to = if from == ends[0] { ends[1] } else { ends[0] };
            let (sender, bytes) = (socket.try_clone().unwrap(), datagram[..length].to_vec());
            thread::spawn(move || {
                thread::sleep(late);
                // The namespace ends with the test.
                let _ = sender.send_to(&bytes, to);
            });
        }
    });
    Way::Relay(port)
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn what_is_measured_through_the_tunnel_decides_what_is_close_and_close_enough() {
    let late = Duration::from_millis(40);
    let mut mesh = Mesh::start_by("far", |netns| relay(netns, late), [100, 50]);
    mesh.wait_connected();
    wait_for("80 ms are measured", SOON, || {
        (mesh.answers(Policy::Greenest, None, 10) == ["here"]).then_some(())
    });
    assert_eq!(mesh.answers(Policy::Closest, None, 40), ["here"]);
    mesh.follow(vec![mesh.there.backend(1, Ready)]);
    assert_eq!(mesh.answers(Policy::Closest, None, 5), ["there"]);
    assert_eq!(
        mesh.answers(Policy::Greenest, None, 5),
        ["there"],
        "nothing is within the bound"
    );
}
