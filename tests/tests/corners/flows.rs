//! The life of flows: equal tuples, ports that are used again, ends that only one side knows of, backends that
//! leave.

use std::{
    io::{Read, Write},
    net::{IpAddr, SocketAddr, TcpStream},
    thread,
    time::Duration,
};

use ebpf_common::{
    addr::Policy,
    layout::{Addr, FLOW_FIN_BACKEND, FLOW_FIN_CLIENT, FLOW_FORWARD, FLOW_RST},
};
use netmanager_api::table::BackendState::{Draining, Ready};
use nix::{
    libc,
    sys::socket::{setsockopt, sockopt::Linger},
};
use weft_tests::{
    Stopwatch,
    mesh::{
        AT_ONCE, Mesh, Pod,
        service::{TARGET_HTTP, addresses, balanced, service},
    },
    traffic::{
        DNS, HTTP, call, call_from, connection_from, datagram, datagram_over, datagram_socket,
        echo, listen, ping,
    },
    wait_for,
};

/// Far more than a table takes to be applied.
const SOON: Duration = Duration::from_secs(5);

/// A source port that nobody else takes in a namespace of a test.
const PORT: u16 = 20_001;

/// Two nodes: a client on the first, a server on each, both instances of service 5; service 6 is the far one's.
struct Stage {
    mesh: Mesh,
    client: Pod,
    near: Pod,
    far: Pod,
}

impl Stage {
    fn start(label: &str) -> Self {
        let mesh = Mesh::start(label, 2);
        let stage = Self {
            client: mesh.pod(1, "client"),
            near: mesh.pod(1, "near"),
            far: mesh.pod(2, "far"),
            mesh,
        };
        stage.near.serve("near");
        stage.far.serve("far");
        stage
    }

    fn own(&self, to: IpAddr, port: u16) -> SocketAddr {
        own(&self.client, to, port)
    }
}

/// A pod's own address of the family of `to`.
fn own(pod: &Pod, to: IpAddr, port: u16) -> SocketAddr {
    let [own4, own6] = pod.addresses();
    SocketAddr::new(if to.is_ipv4() { own4 } else { own6 }, port)
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_pod_that_is_its_own_backend_reaches_itself_by_every_protocol() {
    let mut mesh = Mesh::start("hairpin", 1);
    let pod = mesh.pod(1, "pod");
    pod.serve("itself");
    mesh.follow(&[service(5, vec![pod.backend(0, Ready)])]);
    for to in balanced(5) {
        let (mut stream, who) =
            call_from(&pod.netns, own(&pod, to, PORT), SocketAddr::new(to, HTTP)).unwrap();
        assert_eq!(who, "itself");
        echo(&mut stream, &[9; 200_000]).unwrap();
        assert_eq!(datagram(&pod.netns, to).unwrap(), "itself");
        ping(&pod.netns, to).unwrap();
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn equal_tuples_of_two_pods_and_of_one_pod_to_two_vips_are_kept_apart() {
    let mut stage = Stage::start("tuples");
    let other = stage.mesh.pod(1, "other");
    for (server, port) in [("near", PORT), ("far", PORT + 1)] {
        let backend = match server {
            "near" => stage.near.backend(0, Ready),
            _ => stage.far.backend(1, Ready),
        };
        stage
            .mesh
            .follow(&[service(5, vec![backend.clone()]), service(6, vec![backend])]);
        stage.mesh.wait_connected();
        for (one, two) in balanced(5).into_iter().zip(balanced(6)) {
            let closest = addresses(Policy::Closest, 5);
            let closest = if one.is_ipv4() {
                closest[0]
            } else {
                closest[1]
            };
            let mut streams = Vec::new();
            for to in [one, two, closest] {
                for pod in [&stage.client, &other] {
                    let from = own(pod, to, port);
                    let (stream, who) =
                        call_from(&pod.netns, from, SocketAddr::new(to, HTTP)).unwrap();
                    assert_eq!(
                        (who.as_str(), stream.peer_addr().unwrap().ip()),
                        (server, to)
                    );
                    streams.push(stream);
                }
            }
            // All at once, each its own bytes.
            for round in 0..3 {
                for (index, stream) in streams.iter_mut().enumerate() {
                    echo(stream, &[index as u8 + round; 3_000]).unwrap();
                }
            }
            let any = if one.is_ipv4() { "0.0.0.0" } else { "::" }
                .parse()
                .unwrap();
            let socket = datagram_socket(&stage.client.netns, SocketAddr::new(any, port)).unwrap();
            for _ in 0..3 {
                for to in [one, two, closest] {
                    assert_eq!(
                        datagram_over(&socket, SocketAddr::new(to, DNS)).unwrap(),
                        server
                    );
                }
            }
        }
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn one_udp_socket_has_many_peers_at_once() {
    let mut stage = Stage::start("peers");
    let backends = vec![stage.near.backend(0, Ready), stage.far.backend(1, Ready)];
    let services: Vec<_> = (1..=20)
        .map(|number| service(number, backends.clone()))
        .collect();
    stage.mesh.follow(&services);
    stage.mesh.wait_connected();
    for family in [0, 1] {
        let any = ["0.0.0.0", "::"][family].parse().unwrap();
        let socket = datagram_socket(&stage.client.netns, SocketAddr::new(any, PORT)).unwrap();
        let ask = |number| {
            let to = SocketAddr::new(balanced(number)[family], DNS);
            datagram_over(&socket, to).unwrap()
        };
        let first: Vec<_> = (1..=20).map(ask).collect();
        assert!(first.iter().any(|who| who == "near") && first.iter().any(|who| who == "far"));
        for _ in 0..3 {
            let again: Vec<_> = (1..=20).map(ask).collect();
            assert_eq!(again, first, "a flow keeps its backend");
        }
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_source_port_used_again_reaches_no_removed_backend() {
    let mut stage = Stage::start("reuse");
    let (near, far) = (stage.near.backend(0, Ready), stage.far.backend(1, Ready));
    stage.mesh.follow(&[service(5, vec![near.clone()])]);
    stage.mesh.wait_connected();
    for to in balanced(5) {
        stage.mesh.follow(&[service(5, vec![near.clone()])]);
        let (from, to) = (stage.own(to, PORT), SocketAddr::new(to, HTTP));
        let (stream, who) = call_from(&stage.client.netns, from, to).unwrap();
        assert_eq!(who, "near");
        // The client goes without a word: nobody saw the connection end.
        abandon(&stage.client, stream);
        stage.mesh.follow(&[service(5, vec![far.clone()])]);
        let watch = Stopwatch::start();
        let (mut stream, who) = call_from(&stage.client.netns, from, to).unwrap();
        assert!(watch.had() < AT_ONCE, "{:?}", watch.had());
        assert_eq!(who, "far");
        echo(&mut stream, &[1; 10_000]).unwrap();
        abandon(&stage.client, stream);
    }
}

/// Ends a connection of a pod so that the network sees nothing of it.
fn abandon(pod: &Pod, stream: TcpStream) {
    let rules = |verb: &str| {
        for program in ["iptables", "ip6tables"] {
            let words = [verb, "OUTPUT", "-o", "net1", "-j", "DROP"];
            pod.netns.succeed(program, &words).unwrap();
        }
    };
    rules("-I");
    let at_once = libc::linger {
        l_onoff: 1,
        l_linger: 0,
    };
    setsockopt(&stream, Linger, &at_once).unwrap();
    drop(stream);
    rules("-D");
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_client_that_forgot_its_connection_makes_it_anew_and_it_lasts() {
    let mut stage = Stage::start("halfopen");
    stage.mesh.follow(&[
        service(5, vec![stage.near.backend(0, Ready)]),
        service(6, vec![stage.far.backend(0, Ready)]),
    ]);
    stage.mesh.wait_connected();
    for to in [balanced(5), balanced(6)].concat() {
        let (from, to) = (stage.own(to, PORT), SocketAddr::new(to, HTTP));
        let (mut stream, _) = call_from(&stage.client.netns, from, to).unwrap();
        echo(&mut stream, &[1; 10_000]).unwrap();
        abandon(&stage.client, stream);
        // The backend holds the old connection: it challenges the SYN, is told a reset, and takes the next SYN.
        let (mut stream, _) = call_from(&stage.client.netns, from, to).unwrap();
        echo(&mut stream, &[2; 10_000]).unwrap();
        let flows = stage.mesh.node(1).established();
        let lasts = flows.iter().any(|(key, flow)| {
            let own = (FLOW_FORWARD, PORT.to_be(), map_address(to.ip()));
            let over = FLOW_RST | FLOW_FIN_CLIENT | FLOW_FIN_BACKEND;
            (key.direction, key.sport_be, key.dst) == own && flow.flags & over == 0
        });
        assert!(lasts, "{to}: not among the established: {flows:?}");
        drop(stream);
    }
}

fn map_address(address: IpAddr) -> Addr {
    match address {
        IpAddr::V4(address) => Addr::from_v4(address.to_bits()),
        IpAddr::V6(address) => Addr::from_v6(address.to_bits()),
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_port_in_time_wait_at_the_backend_is_used_again_at_once() {
    let mut stage = Stage::start("timewait");
    stage.near.stop_serving();
    stage
        .mesh
        .follow(&[service(5, vec![stage.near.backend(0, Ready)])]);
    let listener = listen(&stage.near.netns, TARGET_HTTP).unwrap();
    const ROUNDS: usize = 20;
    thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..2 * ROUNDS {
                // The server closes first, so the state waits on its side.
                let (mut stream, _) = listener.accept().unwrap();
                stream.write_all(b"gone\n").unwrap();
            }
        });
        for to in balanced(5) {
            let (from, to) = (stage.own(to, PORT), SocketAddr::new(to, HTTP));
            let late = (0..ROUNDS).filter(|_| {
                let watch = Stopwatch::start();
                let mut stream = connection_from(&stage.client.netns, from, to).unwrap();
                let mut said = String::new();
                stream.read_to_string(&mut said).unwrap();
                assert_eq!(said, "gone\n");
                watch.had() >= AT_ONCE
            });
            // A machine may halt now and then; who waits for its SYN to be sent again waits in every round.
            let late = late.count();
            assert!(late <= ROUNDS / 5, "{to}: late in {late} rounds");
        }
    });
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_draining_backend_keeps_its_flows_and_new_ones_go_elsewhere() {
    let mut stage = Stage::start("drain");
    let (near, far) = (stage.near.backend(0, Ready), stage.far.backend(1, Ready));
    stage.mesh.follow(&[service(5, vec![far.clone()])]);
    stage.mesh.wait_connected();
    let mut streams: Vec<_> = balanced(5)
        .map(|to| call(&stage.client.netns, to).unwrap().0)
        .into();
    let sockets = balanced(5).map(|to| {
        let any = SocketAddr::new(
            if to.is_ipv4() { "0.0.0.0" } else { "::" }.parse().unwrap(),
            0,
        );
        let socket = datagram_socket(&stage.client.netns, any).unwrap();
        let to = SocketAddr::new(to, DNS);
        assert_eq!(datagram_over(&socket, to).unwrap(), "far");
        (socket, to)
    });
    let draining = stage.far.backend(1, Draining);
    stage.mesh.follow(&[service(5, vec![near, draining])]);
    for to in balanced(5) {
        for _ in 0..20 {
            assert_eq!(call(&stage.client.netns, to).unwrap().1, "near");
            assert_eq!(datagram(&stage.client.netns, to).unwrap(), "near");
        }
    }
    for stream in &mut streams {
        echo(stream, &[4; 50_000]).unwrap();
    }
    for (socket, to) in &sockets {
        assert_eq!(datagram_over(socket, *to).unwrap(), "far");
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn new_flows_avoid_a_dead_backend_within_a_second_of_the_table() {
    let mut stage = Stage::start("death");
    let (near, far) = (stage.near.backend(0, Ready), stage.far.backend(1, Ready));
    let both = [service(5, vec![near.clone(), far])];
    stage.mesh.follow(&both);
    stage.mesh.wait_connected();
    stage.far.stop_serving();
    let vips = balanced(5);
    let answered = |client: &Pod| {
        let mut vips = vips.into_iter().flat_map(|to| [to; 10]);
        vips.all(|to| call(&client.netns, to).is_ok_and(|(_, who)| who == "near"))
    };
    const ROUNDS: usize = 5;
    let mut took = Vec::new();
    for _ in 0..ROUNDS {
        stage.mesh.follow(&both);
        let written = Stopwatch::start();
        stage.mesh.write(&[service(5, vec![near.clone()])]);
        // A call to the dead one is refused by its node at once, so that this looks often.
        wait_for("every call is answered", SOON, || {
            answered(&stage.client).then_some(())
        });
        took.push(written.had());
    }
    // A machine may be busy now and then; what is slow is slow in every round.
    let late = took.iter().filter(|took| took.as_secs() >= 1).count();
    assert!(late <= ROUNDS / 2, "{took:?}");
    for to in vips {
        for _ in 0..20 {
            assert_eq!(datagram(&stage.client.netns, to).unwrap(), "near");
        }
    }
}
