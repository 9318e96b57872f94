//! What a host brings along: a firewall, reverse-path filters, a filtering bridge.

use netmanager_api::table::BackendState::Ready;
use weft_tests::{
    Netns,
    mesh::{
        Mesh, Options, Pod,
        service::{balanced, service},
    },
    traffic::{call, datagram, echo, ping},
};

/// Two nodes, a client on the first and a server on each.
struct Two {
    mesh: Mesh,
    client: Pod,
    _servers: [Pod; 2],
}

impl Two {
    /// `prepare` changes each node's namespace before its daemon starts.
    fn start(label: &str, prepare: impl Fn(&Netns)) -> Self {
        let mut mesh = Mesh::prepare(label, Options::default());
        for node in &mut mesh.nodes {
            prepare(&node.netns);
            node.run();
        }
        for node in &mesh.nodes {
            node.wait_ready();
        }
        let (client, near) = (mesh.pod(1, "client"), mesh.pod(1, "near"));
        let far = mesh.pod(2, "far");
        near.serve("near");
        far.serve("far");
        mesh.follow(&[
            service(5, vec![near.backend(0, Ready)]),
            service(6, vec![far.backend(0, Ready)]),
        ]);
        mesh.wait_connected();
        Self {
            mesh,
            client,
            _servers: [near, far],
        }
    }

    /// Every protocol to both servers, from the pod and from the host.
    fn exchange(&self) {
        for from in [&self.client.netns, &self.mesh.node(1).netns] {
            for (number, name) in [(5, "near"), (6, "far")] {
                for to in balanced(number) {
                    let (mut stream, who) = call(from, to).unwrap();
                    assert_eq!(who, name);
                    echo(&mut stream, &[7; 100_000]).unwrap();
                    assert_eq!(datagram(from, to).unwrap(), name);
                    ping(from, to).unwrap();
                }
            }
        }
    }
}

/// kube-proxy's rule and a policy that drops, and counters of the mesh's packets before it.
const NFT_FORWARD: &str = "
table inet cluster {
    chain forward {
        type filter hook forward priority filter - 5; policy drop;
        ip saddr 10.16.0.0/12 counter comment \"mesh\"
        ip daddr 10.16.0.0/12 counter comment \"mesh\"
        ip6 saddr fd12:3456:789a::/48 counter comment \"mesh\"
        ip6 daddr fd12:3456:789a::/48 counter comment \"mesh\"
        ct state invalid drop
    }
}";

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn no_overlay_packet_crosses_forward_whose_policy_drops() {
    let two = Two::start("forward", |netns| {
        nft(netns, NFT_FORWARD);
        for program in ["iptables", "ip6tables"] {
            for rule in [
                "-P FORWARD DROP",
                "-N KUBE-FORWARD",
                "-A FORWARD -j KUBE-FORWARD",
                "-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP",
                "-A KUBE-FORWARD -m mark --mark 0x4000/0x4000 -j ACCEPT",
                "-A KUBE-FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
            ] {
                let words: Vec<_> = rule.split(' ').collect();
                netns.succeed(program, &words).unwrap();
            }
        }
    });
    two.exchange();
    for node in &two.mesh.nodes {
        assert_eq!(forwarded(&node.netns), 0, "{}", rules(&node.netns));
        for program in ["iptables", "ip6tables"] {
            let counts = node
                .netns
                .succeed(program, &["-L", "FORWARD", "-v", "-x", "-n"])
                .unwrap();
            assert!(counts.contains("policy DROP 0 packets"), "{counts}");
        }
    }
    // The counters count: a packet that the host does forward is seen.
    let plain = two.mesh.plain(1, "plain");
    let _ = call(&plain.netns, balanced(5)[0]);
    assert!(forwarded(&two.mesh.node(1).netns) > 0);
}

fn nft(netns: &Netns, rules: &str) {
    netns.succeed("nft", &[rules]).unwrap();
}

fn rules(netns: &Netns) -> String {
    netns
        .succeed("nft", &["list", "table", "inet", "cluster"])
        .unwrap()
}

/// Packets of the mesh that the FORWARD hook saw.
fn forwarded(netns: &Netns) -> u64 {
    let rules = rules(netns);
    let counted = rules.lines().filter(|line| line.contains("mesh"));
    let counts: Vec<u64> = counted
        .map(|line| {
            let mut words = line
                .split_whitespace()
                .skip_while(|word| *word != "packets");
            words.nth(1).unwrap().parse().unwrap()
        })
        .collect();
    assert_eq!(counts.len(), 4, "{rules}");
    counts.iter().sum()
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn strict_reverse_path_filters_on_the_host_drop_nothing() {
    let two = Two::start("rpfilter", |netns| {
        for scope in ["all", "default"] {
            netns
                .sysctl(&format!("ipv4.conf.{scope}.rp_filter"), "1")
                .unwrap();
        }
    });
    two.exchange();
    for node in &two.mesh.nodes {
        assert_eq!(filtered(&node.netns), 0, "node {}", node.number);
    }
}

/// Packets that the kernel dropped by their reverse path.
fn filtered(netns: &Netns) -> u64 {
    let text = netns
        .run(|| std::fs::read_to_string("/proc/thread-self/net/netstat"))
        .unwrap();
    let mut lines = text.lines().filter(|line| line.starts_with("TcpExt:"));
    let (names, values) = (lines.next().unwrap(), lines.next().unwrap());
    let mut pairs = names.split(' ').zip(values.split(' '));
    let (_, value) = pairs
        .find(|(name, _)| *name == "IPReversePathFilter")
        .unwrap();
    value.parse().unwrap()
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_bridge_that_calls_iptables_sees_no_overlay_packet() {
    let two = Two::start("bridge", |netns| {
        for family in ["iptables", "ip6tables"] {
            netns
                .sysctl(&format!("bridge.bridge-nf-call-{family}"), "1")
                .unwrap();
        }
        nft(netns, NFT_FORWARD);
    });
    // The pods' primary interfaces stand in a bridge, as the reference plugin has them.
    let netns = &two.mesh.node(1).netns;
    netns
        .ip_batch(&[
            "link add cni0 type bridge".to_owned(),
            "link set cni0 up".to_owned(),
            format!("link set {} master cni0", two.client.primary_link),
        ])
        .unwrap();
    two.exchange();
    assert_eq!(forwarded(netns), 0, "{}", rules(netns));
}
