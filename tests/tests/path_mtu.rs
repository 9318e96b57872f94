//! What a path carries, and how far it is: real packets between real nodes over underlays of every size.

#![expect(
    clippy::unwrap_used,
    reason = "a step of a test that fails, fails the test, here as in its body"
)]

use std::{
    io,
    net::{IpAddr, SocketAddr, UdpSocket},
    os::fd::{AsFd, AsRawFd, OwnedFd},
    time::Instant,
};

use netmanager_api::table::BackendState::Ready;
use nix::sys::{
    socket::{
        AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockProtocol,
        SockType, SockaddrStorage, connect, recvmsg, send, sendmsg, setsockopt, socket,
        sockopt::{Ipv4RecvErr, Ipv4Ttl, Ipv6RecvErr, Ipv6Ttl, ReceiveTimeout, SendTimeout},
    },
    time::TimeVal,
};
use weft_tests::{
    Netns,
    mesh::{
        Mesh, Options, SOON,
        service::{balanced, service},
    },
    traffic::{DNS, HTTP, call, datagram_socket, echo, ping},
    wait_for,
};

/// A client on node 1 and a server on node 2, connected.
fn meshed(label: &str, mtu: u32) -> (Mesh, weft_tests::mesh::Pod, weft_tests::mesh::Pod) {
    let options = Options {
        mtu,
        ..Options::default()
    };
    let mut mesh = Mesh::with(label, options);
    let (client, server) = (mesh.pod(1, "client"), mesh.pod(2, "server"));
    server.serve("far");
    mesh.follow(&[service(5, vec![server.backend(0, Ready)])]);
    mesh.wait_connected();
    (mesh, client, server)
}

/// Sends `size` bytes as one datagram and reads them back, behind a greeting or without.
fn echo_datagram(socket: &UdpSocket, size: usize) -> io::Result<()> {
    let sent: Vec<u8> = (0..size).map(|byte| (byte * 31) as u8).collect();
    socket.send(&sent)?;
    let mut back = vec![0; 1 << 16];
    let length = socket.recv(&mut back)?;
    assert!(
        back[..length].ends_with(&sent),
        "{size} bytes came back as others"
    );
    Ok(())
}

/// The same with the patience that a path needs which is not known yet: what is too large for it is refused once on
/// each side.
fn echo_datagram_at_last(socket: &UdpSocket, size: usize) -> io::Result<()> {
    echo_datagram(socket, size)
        .or_else(|_| echo_datagram(socket, size))
        .or_else(|_| echo_datagram(socket, size))
}

fn connected(netns: &Netns, to: IpAddr) -> UdpSocket {
    let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = datagram_socket(netns, any.parse().unwrap()).unwrap();
    netns.run(|| socket.connect((to, DNS))).unwrap();
    socket
}

fn every_payload_arrives_over(label: &str, underlay: u32) {
    let (mut mesh, client, server) = meshed(label, underlay);
    let near = mesh.pod(1, "near");
    near.serve("near");
    mesh.follow(&[
        service(5, vec![server.backend(0, Ready)]),
        service(6, vec![near.backend(0, Ready)]),
    ]);
    let inner = weft_netmanager::tunnel::mtu_over(underlay) as usize;
    for (to, name) in balanced(5)
        .map(|to| (to, "far"))
        .into_iter()
        .chain(balanced(6).map(|to| (to, "near")))
    {
        let header = if to.is_ipv4() { 20 } else { 40 };
        let mut sizes = vec![1, 2, 3, 100, 536, 1_220, 4_096, 16_384, 65_535, 65_536];
        // Around one full packet with TCP's timestamps, without, and with a UDP header only.
        sizes.extend([32, 20, 8].into_iter().flat_map(|l4| {
            let full = inner - header - l4;
            [full - 1, full, full + 1, 2 * full + 1]
        }));
        let (mut stream, who) = call(&client.netns, to).unwrap();
        assert_eq!(who, name);
        let socket = connected(&client.netns, to);
        let largest = if to.is_ipv4() { 65_507 } else { 65_527 };
        for size in sizes {
            let bytes: Vec<u8> = (0..size).map(|byte| (byte * 7) as u8).collect();
            echo(&mut stream, &bytes).unwrap_or_else(|error| panic!("TCP {to} {size}: {error}"));
            let size = size.min(largest);
            echo_datagram_at_last(&socket, size)
                .unwrap_or_else(|error| panic!("UDP {to} {size}: {error}"));
        }
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_train_of_datagrams_that_the_device_cuts_arrives_in_pieces_with_right_checksums() {
    const PIECE: u16 = 1_111;
    let (mut mesh, client, server) = meshed("train", 1_500);
    let near = mesh.pod(1, "near");
    near.serve("near");
    mesh.follow(&[
        service(5, vec![server.backend(0, Ready)]),
        service(6, vec![near.backend(0, Ready)]),
    ]);
    for to in balanced(5).into_iter().chain(balanced(6)) {
        let socket = connected(&client.netns, to);
        let sent: Vec<u8> = (0..20 * u32::from(PIECE))
            .map(|byte| (byte * 13) as u8)
            .collect();
        let length = sendmsg::<()>(
            socket.as_raw_fd(),
            &[io::IoSlice::new(&sent)],
            &[ControlMessage::UdpGsoSegments(&PIECE)],
            MsgFlags::empty(),
            None,
        );
        assert_eq!(length, Ok(sent.len()));
        let mut back = Vec::new();
        for _ in 0..20 {
            let mut piece = [0; 2_048];
            let length = socket.recv(&mut piece).unwrap();
            back.push(piece[length - usize::from(PIECE)..length].to_vec());
        }
        let mut want: Vec<Vec<u8>> = sent.chunks(PIECE.into()).map(<[u8]>::to_vec).collect();
        back.sort();
        want.sort();
        assert!(back == want, "{to}: other pieces came back");
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn every_payload_arrives_over_an_underlay_of_1280() {
    every_payload_arrives_over("s1280", 1_280);
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn every_payload_arrives_over_an_underlay_of_1400() {
    every_payload_arrives_over("s1400", 1_400);
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn every_payload_arrives_over_an_underlay_of_1500() {
    every_payload_arrives_over("s1500", 1_500);
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn every_payload_arrives_over_an_underlay_of_9000() {
    every_payload_arrives_over("s9000", 9_000);
}

/// What the kernel of `netns` believes that the path to `to` carries.
fn learned(netns: &Netns, to: IpAddr) -> Option<u32> {
    let route = netns.ip(&format!("route get {to}")).unwrap();
    let mut words = route.split_whitespace();
    words.find(|word| *word == "mtu")?;
    words.next()?.parse().ok()
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_path_that_narrows_under_a_connection_is_told_to_the_sender_and_the_connection_goes_on() {
    let (mesh, client, _server) = meshed("narrow", 1_500);
    let mut streams = balanced(5).map(|to| call(&client.netns, to).unwrap().0);
    for stream in &mut streams {
        stream.set_read_timeout(Some(SOON)).unwrap();
        echo(stream, &[1; 200_000]).unwrap();
    }
    // The way there answers that it is narrow; the way back says nothing. No inner packet over 1320 bytes fits.
    mesh.underlay.narrow(2, 1_400);
    let began = Instant::now();
    for stream in &mut streams {
        echo(stream, &[2; 200_000]).unwrap();
    }
    println!("went on after {:?}", began.elapsed());
    for to in balanced(5) {
        let socket = connected(&client.netns, to);
        let header = if to.is_ipv4() { 28 } else { 48 };
        let full = vec![0; 1_420 - header];
        // The first is refused with the size; the socket says so at the next turn.
        let mtu = wait_for("the client knows the path", SOON, || {
            let _ = socket.send(&full);
            learned(&client.netns, to)
        });
        // 1,280 where the first was refused while the search went on.
        assert!((1_280..=1_340).contains(&mtu), "{to}: {mtu}");
        // Larger ones leave in fragments of their sender's own; answers to the first ones may still come.
        let socket = connected(&client.netns, to);
        echo_datagram_at_last(&socket, 1_420 - header).unwrap();
        echo_datagram_at_last(&socket, 5_000).unwrap();
        // A new connection is told before it sends anything.
        let (mut stream, _) = call(&client.netns, to).unwrap();
        echo(&mut stream, &[3; 200_000]).unwrap();
    }
}

/// Which protocol a trace is of.
#[derive(Clone, Copy, Debug)]
enum Probe {
    Udp,
    Tcp,
    Echo,
}

/// How often a probe is sent before its hop counts as silent, as by traceroute: a datagram may be lost, above all where
/// other tests fill the queues of the same CPUs.
const PROBES: u32 = 3;

/// Who answers a packet of so many hops: a router on the way, or `None` for the destination itself.
fn hop(netns: &Netns, to: IpAddr, probe: Probe, hops: u8) -> Option<IpAddr> {
    let mut result = Err(nix::Error::EAGAIN);
    for _ in 0..PROBES {
        result = answer(netns, to, probe, hops);
        if result != Err(nix::Error::EAGAIN) {
            break;
        }
    }
    result.unwrap_or_else(|error| panic!("{probe:?} to {to} with {hops} hops: {error}"))
}

fn answer(netns: &Netns, to: IpAddr, probe: Probe, hops: u8) -> nix::Result<Option<IpAddr>> {
    let socket = probe_socket(netns, to, probe, hops);
    let port = match probe {
        Probe::Udp => DNS,
        Probe::Tcp => HTTP,
        Probe::Echo => 0,
    };
    let address = SockaddrStorage::from(SocketAddr::new(to, port));
    let result = connect(socket.as_raw_fd(), &address).and_then(|()| match probe {
        Probe::Tcp => Ok(0),
        Probe::Udp => exchange(&socket, b"question"),
        Probe::Echo => {
            let request = if to.is_ipv4() { 8 } else { 128 };
            exchange(&socket, &[request, 0, 0, 0, 0, 0, 0, 1, b'w'])
        }
    });
    match result {
        Ok(_) => Ok(None),
        Err(nix::Error::EHOSTUNREACH) => Ok(Some(offender(&socket))),
        Err(error) => Err(error),
    }
}

fn probe_socket(netns: &Netns, to: IpAddr, probe: Probe, hops: u8) -> OwnedFd {
    netns
        .sysctl("ipv4.ping_group_range", "0 2147483647")
        .unwrap();
    let family = if to.is_ipv4() {
        AddressFamily::Inet
    } else {
        AddressFamily::Inet6
    };
    let (kind, protocol) = match (probe, to) {
        (Probe::Udp, _) => (SockType::Datagram, None),
        (Probe::Tcp, _) => (SockType::Stream, None),
        (Probe::Echo, IpAddr::V4(_)) => (SockType::Datagram, Some(SockProtocol::Icmp)),
        (Probe::Echo, IpAddr::V6(_)) => (SockType::Datagram, Some(SockProtocol::IcmpV6)),
    };
    let fd = netns.run(|| socket(family, kind, SockFlag::SOCK_CLOEXEC, protocol).unwrap());
    setsockopt(&fd, ReceiveTimeout, &TimeVal::new(3, 0)).unwrap();
    setsockopt(&fd, SendTimeout, &TimeVal::new(3, 0)).unwrap();
    if to.is_ipv4() {
        setsockopt(&fd, Ipv4RecvErr, &true).unwrap();
        setsockopt(&fd, Ipv4Ttl, &i32::from(hops)).unwrap();
    } else {
        setsockopt(&fd, Ipv6RecvErr, &true).unwrap();
        setsockopt(&fd, Ipv6Ttl, &i32::from(hops)).unwrap();
    }
    fd
}

fn exchange(socket: &OwnedFd, question: &[u8]) -> nix::Result<usize> {
    send(socket.as_raw_fd(), question, MsgFlags::empty())?;
    nix::sys::socket::recv(socket.as_fd().as_raw_fd(), &mut [0; 128], MsgFlags::empty())
}

/// Who sent the ICMP error that waits at a socket.
fn offender(socket: &OwnedFd) -> IpAddr {
    let mut control = nix::cmsg_space!([u8; 128]);
    let mut buffer = [0; 256];
    let mut parts = [io::IoSliceMut::new(&mut buffer)];
    let message = recvmsg::<SockaddrStorage>(
        socket.as_raw_fd(),
        &mut parts,
        Some(&mut control),
        MsgFlags::MSG_ERRQUEUE,
    )
    .unwrap();
    message
        .cmsgs()
        .unwrap()
        .find_map(|control| match control {
            ControlMessageOwned::Ipv4RecvErr(_, Some(from)) => {
                Some(IpAddr::from(from.sin_addr.s_addr.to_ne_bytes()))
            }
            ControlMessageOwned::Ipv6RecvErr(_, Some(from)) => {
                Some(IpAddr::from(from.sin6_addr.s6_addr))
            }
            _ => None,
        })
        .unwrap()
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_trace_to_a_vip_shows_the_two_nodes_on_the_way_by_every_protocol() {
    let (mut mesh, client, server) = meshed("trace", 1_500);
    let near = mesh.pod(1, "near");
    near.serve("near");
    mesh.follow(&[
        service(5, vec![server.backend(0, Ready)]),
        service(6, vec![near.backend(0, Ready)]),
    ]);
    let endpoint = |node: u32, to: &IpAddr| -> IpAddr {
        let node = mesh.node(node);
        match to {
            IpAddr::V4(_) => {
                let own = node.netns.ip("-4 -o address show dev weft-node").unwrap();
                let at = own.split_whitespace().find(|word| word.starts_with("10."));
                at.unwrap().split('/').next().unwrap().parse().unwrap()
            }
            IpAddr::V6(_) => node.address6().into(),
        }
    };
    for probe in [Probe::Udp, Probe::Tcp, Probe::Echo] {
        for to in balanced(5) {
            let way: Vec<_> = (1..=3)
                .map(|hops| hop(&client.netns, to, probe, hops))
                .collect();
            let want = [Some(endpoint(1, &to)), Some(endpoint(2, &to)), None];
            assert_eq!(way, want, "{probe:?} to {to}");
        }
        for to in balanced(6) {
            let way: Vec<_> = (1..=2)
                .map(|hops| hop(&client.netns, to, probe, hops))
                .collect();
            assert_eq!(way, [Some(endpoint(1, &to)), None], "{probe:?} to {to}");
        }
    }
    for to in balanced(5) {
        ping(&client.netns, to).unwrap();
    }
}
