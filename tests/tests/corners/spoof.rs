//! What nobody may send: from a pod, from the underlay, from a peer through the tunnel.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::ErrorKind,
    net::{IpAddr, Ipv4Addr, UdpSocket},
};

use netmanager_api::table::BackendState::Ready;
use tokio::runtime::Builder;
use weft_netmanager::wireguard::{Config, Tunnels, WireGuard, peers::WantedPeer};
use weft_tests::{
    Netns, binary,
    capture::Capture,
    mesh::{
        Mesh, Node, SOON, TUNNEL_PORT,
        service::{TARGET_DNS, balanced, service},
    },
    program::packet::{Packet, SYN, Transport},
    raw::{self, ETH_P_ARP, Tunnel, ethernet, kind_of},
    topology,
    traffic::{DNS, MARKER, ping},
    wait_for,
};

const PORT: u16 = 20_001;
/// A port of the host that nobody in the mesh may reach.
const HOST_PORT: u16 = 7_777;
const BROADCAST: [u8; 6] = [0xff; 6];
const NOBODY: [u8; 6] = [2, 0xde, 0xad, 0, 0, 1];

/// Addresses of both families.
type Both = [IpAddr; 2];

fn both(v4: &str, v6: &str) -> Both {
    [v4.parse().unwrap(), v6.parse().unwrap()]
}

/// One thing that nobody may send, in each family.
struct Case {
    what: &'static str,
    from: Both,
    to: Both,
    port: u16,
    reason: &'static str,
}

impl Case {
    fn packets(&self) -> impl Iterator<Item = Packet> + '_ {
        self.from
            .into_iter()
            .zip(self.to)
            .map(|(from, to)| Packet::udp((from, PORT), (to, self.port), MARKER.as_bytes()))
    }
}

/// Pods chatter, and what they say is refused, too: a packet is sent so often that its count stands out.
const TIMES: u64 = 8;

/// Does `work` again and again, until `node` has counted it for `reason`.
#[track_caller]
fn counts(node: &Node, what: &str, reason: &str, work: impl Fn()) {
    let before = node.reasons()[reason];
    wait_for(&format!("{what}: {reason}"), SOON, || {
        work();
        (node.reasons()[reason] >= before + TIMES).then_some(())
    });
}

/// Waits until everything that was sent before has arrived, then checks that none of it did.
fn nothing_arrived(captures: Vec<(&str, Capture)>) {
    for (who, capture) in captures {
        for frame in capture.stop() {
            let text = String::from_utf8_lossy(&frame).into_owned();
            assert!(!text.contains(MARKER), "{who} received {frame:02x?}");
        }
    }
}

/// A host's socket that must stay silent.
fn host_ear(netns: &Netns) -> UdpSocket {
    let socket = netns.run(|| UdpSocket::bind(("::", HOST_PORT)).unwrap());
    socket.set_nonblocking(true).unwrap();
    socket
}

#[track_caller]
fn heard_nothing(ear: &UdpSocket) {
    let heard = ear.recv_from(&mut [0; 64]);
    assert_eq!(heard.unwrap_err().kind(), ErrorKind::WouldBlock);
}

fn node_addresses(node: &Node) -> Both {
    let first = node.block4().hosts().next().unwrap();
    [first.into(), node.address6().into()]
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_pod_sends_only_from_its_own_addresses_and_only_to_what_it_may() {
    let mut mesh = Mesh::start("spoof", 2);
    let (pod, other) = (mesh.pod(1, "pod"), mesh.pod(1, "other"));
    let far = mesh.pod(2, "far");
    mesh.follow(&[service(5, vec![other.backend(0, Ready)])]);
    let node = mesh.node(1);
    let (vip, own) = (balanced(5), pod.addresses());
    let ear = host_ear(&node.netns);
    let captures = vec![
        ("the other pod", Capture::start(&other.netns, "net1")),
        ("the far pod", Capture::start(&far.netns, "net1")),
        ("the router", Capture::start(&mesh.underlay.router, "n1")),
    ];
    let foreign = both("192.0.2.9", "2001:db8:bad::9");
    let case = |what, from, to, port, reason| Case {
        what,
        from,
        to,
        port,
        reason,
    };
    let here = node_addresses(node);
    for case in [
        case("a foreign source", foreign, vip, DNS, "spoofed_source"),
        case(
            "another pod's source",
            other.addresses(),
            vip,
            DNS,
            "spoofed_source",
        ),
        case(
            "a far pod's source",
            far.addresses(),
            vip,
            DNS,
            "spoofed_source",
        ),
        case("the node's source", here, vip, DNS, "spoofed_source"),
        case("a VIP's source", vip, vip, DNS, "spoofed_source"),
        case(
            "a VIP to a pod",
            vip,
            other.addresses(),
            PORT,
            "spoofed_source",
        ),
        case(
            "the primary address",
            pod.primary,
            vip,
            DNS,
            "spoofed_source",
        ),
        case(
            "the node's underlay address",
            own,
            both("198.18.1.2", "2001:db8:1::2"),
            HOST_PORT,
            "not_mesh",
        ),
        case(
            "the router",
            own,
            both("198.18.1.1", "2001:db8:1::1"),
            HOST_PORT,
            "not_mesh",
        ),
        case(
            "the loopback",
            own,
            both("127.0.0.1", "::1"),
            HOST_PORT,
            "not_mesh",
        ),
        case(
            "multicast",
            own,
            both("224.0.0.251", "ff02::1"),
            HOST_PORT,
            "not_mesh",
        ),
        case(
            "broadcast",
            own,
            both("255.255.255.255", "ff02::2"),
            HOST_PORT,
            "not_mesh",
        ),
        case(
            "another pod's primary address",
            own,
            other.primary,
            TARGET_DNS,
            "not_mesh",
        ),
        case("the node endpoint", own, here, HOST_PORT, "direct_endpoint"),
        case(
            "another pod",
            own,
            other.addresses(),
            TARGET_DNS,
            "direct_endpoint",
        ),
        case(
            "a far pod",
            own,
            far.addresses(),
            TARGET_DNS,
            "direct_endpoint",
        ),
    ] {
        for packet in case.packets() {
            let what = format!("{} ({})", case.what, packet.dst);
            let frame = ethernet(
                pod.host_mac,
                pod.mac,
                kind_of(&packet.bytes()),
                &packet.bytes(),
            );
            counts(node, &what, case.reason, || {
                raw::send(&pod.netns, "net1", &frame);
            });
        }
    }
    let nobody = "fd12:3456:789a::1:0:ff".parse().unwrap();
    let packet = Packet::udp((own[1], PORT), (nobody, DNS), MARKER.as_bytes()).bytes();
    let frame = ethernet(pod.host_mac, pod.mac, kind_of(&packet), &packet);
    counts(node, "an endpoint that is not there", "no_endpoint", || {
        raw::send(&pod.netns, "net1", &frame);
    });
    for (from, to) in own.into_iter().zip(here) {
        let syn = Packet::tcp((from, PORT), (to, HOST_PORT), SYN, 1, 0).bytes();
        let frame = ethernet(pod.host_mac, pod.mac, kind_of(&syn), &syn);
        counts(node, "a connection to the host", "direct_endpoint", || {
            raw::send(&pod.netns, "net1", &frame);
        });
    }
    nothing_arrived(captures);
    heard_nothing(&ear);
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_pods_link_layer_claims_are_not_believed() {
    let mut mesh = Mesh::start("claims", 1);
    let (pod, other) = (mesh.pod(1, "pod"), mesh.pod(1, "other"));
    other.serve("other");
    mesh.follow(&[service(5, vec![other.backend(0, Ready)])]);
    let node = mesh.node(1);
    let neighbours = |netns: &Netns| {
        let all = netns.ip("neigh show").unwrap();
        let of_ours = all
            .lines()
            .filter(|line| !line.contains("dev eth0") && !line.contains("dev p"));
        of_ours.map(str::to_owned).collect::<BTreeSet<_>>()
    };
    let before = [&node.netns, &other.netns].map(neighbours);
    // "That address is here": of the gateway, of the other pod, of the pod itself.
    for claimed in [Ipv4Addr::new(169, 254, 87, 70), other.addr4, pod.addr4] {
        for operation in [1, 2] {
            let arp = [
                &[0, 1, 8, 0, 6, 4, 0, operation][..],
                &NOBODY,
                &claimed.octets(),
                &BROADCAST,
                &claimed.octets(),
            ]
            .concat();
            let frame = ethernet(BROADCAST, NOBODY, ETH_P_ARP, &arp);
            counts(node, "an ARP claim", "not_mesh", || {
                raw::send(&pod.netns, "net1", &frame);
            });
        }
    }
    let advertised = Packet {
        ttl: 255,
        ..advertisement(other.addr6.into(), "ff02::1".parse().unwrap())
    };
    for to in [BROADCAST, pod.host_mac] {
        let frame = ethernet(to, NOBODY, raw::ETH_P_IPV6, &advertised.bytes());
        counts(node, "a neighbour's claim", "not_mesh", || {
            raw::send(&pod.netns, "net1", &frame);
        });
    }
    assert_eq!([&node.netns, &other.netns].map(neighbours), before);

    // Foreign link addresses around a packet that may go: what arrives has the right ones.
    let capture = Capture::start(&other.netns, "net1");
    for (to, from) in [
        (BROADCAST, NOBODY),
        (NOBODY, other.mac),
        (other.mac, node_mac(node)),
    ] {
        for (own, vip) in pod.addresses().into_iter().zip(balanced(5)) {
            let packet = Packet::udp((own, PORT), (vip, DNS), MARKER.as_bytes()).bytes();
            raw::send(
                &pod.netns,
                "net1",
                &ethernet(to, from, kind_of(&packet), &packet),
            );
        }
    }
    for to in balanced(5) {
        ping(&pod.netns, to).unwrap();
    }
    let is_ours = |frame: &&Vec<u8>| {
        // What the server says to it, and hears of that, is not asked for.
        let packet = Packet::parse(&frame[14..]);
        frame[..6] == other.mac && packet.is_ok_and(|packet| packet.transport == Transport::Udp)
    };
    let frames = capture.stop();
    let arrived: Vec<_> = frames.iter().filter(is_ours).collect();
    assert_eq!(arrived.len(), 6, "{frames:02x?}");
    assert!(arrived.iter().all(|frame| frame[6..12] == other.host_mac));
}

/// A neighbour advertisement (RFC 4861 section 4.4): `claimed` is at [`NOBODY`].
fn advertisement(claimed: IpAddr, to: IpAddr) -> Packet {
    let IpAddr::V6(target) = claimed else {
        panic!("{claimed} has no neighbour discovery")
    };
    let mut packet = Packet::echo(claimed, to, 0);
    packet.transport = Transport::Icmp(136, 0);
    packet.payload = [&[0x20, 0, 0, 0][..], &target.octets(), &[2, 1], &NOBODY].concat();
    packet
}

fn node_mac(node: &Node) -> [u8; 6] {
    mac_of(&node.netns, "weft-node")
}

fn mac_of(netns: &Netns, device: &str) -> [u8; 6] {
    let link = netns.ip(&format!("-o link show {device}")).unwrap();
    let mut words = link
        .split_whitespace()
        .skip_while(|word| *word != "link/ether");
    let octets: Vec<u8> = words
        .nth(1)
        .unwrap()
        .split(':')
        .map(|octet| u8::from_str_radix(octet, 16).unwrap())
        .collect();
    octets.try_into().unwrap()
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn nobody_enters_the_mesh_from_the_underlay_or_an_unattached_pod_by_a_mesh_address() {
    let mut mesh = Mesh::start("outside", 2);
    let (pod, far) = (mesh.pod(1, "pod"), mesh.pod(2, "far"));
    let plain = mesh.plain(1, "plain");
    // A machine on a link of the node that the watch does not look at.
    let neighbour = Netns::new("neighbour").unwrap();
    topology::veth(&mesh.node(1).netns, "side", &neighbour, "eth0").unwrap();
    mesh.follow(&[
        service(5, vec![pod.backend(0, Ready)]),
        service(6, vec![far.backend(0, Ready)]),
    ]);
    mesh.wait_connected();
    let node = mesh.node(1);
    let captures = vec![
        ("the pod", Capture::start(&pod.netns, "net1")),
        ("the far pod", Capture::start(&far.netns, "net1")),
    ];
    let here = node_addresses(node);
    let foreign = both("192.0.2.9", "2001:db8:bad::9");
    let sources = [here, pod.addresses(), far.addresses(), balanced(6), foreign];
    let targets = [balanced(5), balanced(6), pod.addresses(), far.addresses()];
    let door = mac_of(&node.netns, &plain.primary_link);
    for source in sources {
        for target in targets {
            for (from, to) in source.into_iter().zip(target) {
                let packet = Packet::udp((from, PORT), (to, DNS), MARKER.as_bytes()).bytes();
                let kind = kind_of(&packet);
                raw::send(&plain.netns, "eth0", &ethernet(door, NOBODY, kind, &packet));
                let frame = ethernet(mac_of(&node.netns, "side"), NOBODY, kind, &packet);
                raw::send(&neighbour, "eth0", &frame);
            }
        }
    }
    ping(&node.netns, balanced(6)[0]).unwrap();
    nothing_arrived(captures);
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_peer_reaches_only_local_endpoints_and_only_from_its_own() {
    let mut mesh = Mesh::start("peer", 3);
    let (pod, third) = (mesh.pod(1, "pod"), mesh.pod(3, "third"));
    let bad = mesh.pod(2, "bad");
    mesh.follow(&[service(5, vec![pod.backend(0, Ready)])]);
    mesh.wait_connected();
    let ear = host_ear(&mesh.node(1).netns);
    let captures = vec![
        ("the pod", Capture::start(&pod.netns, "net1")),
        ("the third pod", Capture::start(&third.netns, "net1")),
        (
            "the third node",
            Capture::start(&mesh.node(3).netns, &mesh.node(3).tunnel_device()),
        ),
    ];
    let tunnel = Tunnel::find(&mesh.node(2).netns, &mesh.node(2).tunnel_device(), || {
        ping(&mesh.node(2).netns, mesh.node(1).address6()).unwrap();
    });
    // A peer that does as it likes, on a node whose WireGuard believes it everything but the third node's
    // addresses: what is left is the programs' own check.
    for number in [1, 2] {
        mesh.node_mut(number).kill();
    }
    let (node, peer) = (mesh.node(1), mesh.node(2));
    believe(node, peer, &[]);
    believe(peer, node, &[mesh.node(3)]);
    let send = |packet: &[u8]| tunnel.send(packet);
    let (own, target) = (bad.addresses(), pod.addresses());
    let here = node_addresses(node);
    let foreign = both("192.0.2.9", "2001:db8:bad::9");
    let nobody = both("10.16.0.30", "fd12:3456:789a::1:0:ff");
    let case = |what, from, to, reason| Case {
        what,
        from,
        to,
        port: HOST_PORT,
        reason,
    };
    for case in [
        case("a VIP's source", balanced(5), target, "tunnel_source"),
        case("the pod's own source", target, target, "tunnel_source"),
        case("the node's own source", here, target, "tunnel_source"),
        case(
            "a source outside the mesh",
            foreign,
            target,
            "tunnel_source",
        ),
        case(
            "the host",
            own,
            both("198.18.1.2", "2001:db8:1::2"),
            "tunnel_destination",
        ),
        case(
            "the host's loopback",
            own,
            both("127.0.0.1", "::1"),
            "tunnel_destination",
        ),
        case(
            "a pod's primary address",
            own,
            pod.primary,
            "tunnel_destination",
        ),
        case("a VIP", own, balanced(5), "tunnel_destination"),
        case(
            "an endpoint that is not there",
            own,
            nobody,
            "tunnel_destination",
        ),
        case("the host by its endpoint", own, here, "tunnel_destination"),
        case(
            "the host from its peer",
            node_addresses(peer),
            here,
            "tunnel_destination",
        ),
    ] {
        for packet in case.packets() {
            let what = format!("{} ({})", case.what, packet.dst);
            counts(node, &what, case.reason, || send(&packet.bytes()));
        }
    }
    for (from, to) in own.into_iter().zip(here) {
        let syn = Packet::tcp((from, PORT), (to, HOST_PORT), SYN, 1, 0).bytes();
        counts(
            node,
            "a connection to the host",
            "tunnel_destination",
            || send(&syn),
        );
    }
    // To the third node's pod by way of the first; and as the third node, which WireGuard itself refuses.
    for (from, to) in own.into_iter().zip(third.addresses()) {
        let packet = Packet::udp((from, PORT), (to, HOST_PORT), MARKER.as_bytes()).bytes();
        counts(node, "a third node's pod", "tunnel_destination", || {
            send(&packet)
        });
    }
    for (from, to) in third.addresses().into_iter().zip(target) {
        send(&Packet::udp((from, PORT), (to, HOST_PORT), MARKER.as_bytes()).bytes());
    }
    ping(&node.netns, peer.address6()).unwrap();
    heard_nothing(&ear);
    nothing_arrived(captures);
}

/// Makes the tunnel of `node` take every address for one of `peer` that is no other peer's, without those of `others`.
fn believe(node: &Node, peer: &Node, others: &[&Node]) {
    let config = Config {
        name: node.tunnel_device(),
        state: node.path("state"),
        port: TUNNEL_PORT,
        mtu: 1420,
        kind: None,
        is_eager: false,
        program: binary("weft-netmanager"),
    };
    let key = peer.public_key().parse().unwrap();
    let halves = ["0.0.0.0/1", "128.0.0.0/1", "::/1", "8000::/1"];
    let everything = halves.map(|net| net.parse().unwrap());
    node.netns.run(|| {
        let runtime = Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let mut wireguard = WireGuard::open(config).unwrap();
            wireguard.ensure().await.unwrap();
            let report = wireguard.report().await.unwrap();
            let mut wanted: BTreeMap<_, _> = report
                .peers
                .into_iter()
                .map(|(key, peer)| {
                    let peer = WantedPeer {
                        endpoint: peer.endpoint,
                        allowed: peer.allowed,
                    };
                    (key, peer)
                })
                .collect();
            for other in others {
                wanted.remove(&other.public_key().parse().unwrap());
            }
            wanted.get_mut(&key).unwrap().allowed = BTreeSet::from(everything);
            wireguard.apply(&wanted).await.unwrap();
        });
    });
}
