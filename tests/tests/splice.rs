//! Connections within a node that are spliced: real sockets, the real daemon and its programs.
//!
//! The kernels of `cargo xtask vm` refuse to; `splice_refused.rs` is for those.

#![cfg(not(feature = "vm"))]
#![expect(
    clippy::unwrap_used,
    reason = "a step of a test that fails, fails the test, here as in its body"
)]

use std::{
    io::{ErrorKind, Read, Write},
    net::{IpAddr, Shutdown, TcpStream},
    os::fd::AsRawFd,
    thread,
    time::Duration,
};

use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, SockaddrStorage, bind, connect, send, socket,
};
use socket2::Protocol;
use weft_tests::{Netns, Stopwatch, wait_for};

#[path = "node/machine.rs"]
#[expect(dead_code, reason = "the node's own tests use the rest")]
mod machine;
#[path = "splice/mesh.rs"]
mod mesh;
#[path = "splice/stream.rs"]
mod stream;

use machine::{SOON, VIP4, vip6};
use mesh::{Mesh, by_tcp};
use stream::{Direction, Random, read_some, run};

/// A reader that still waits after this waits for ever.
const PATIENCE: Duration = Duration::from_secs(5);

fn addresses() -> [IpAddr; 2] {
    [VIP4.into(), vip6().into()]
}

fn exchange(client: &mut TcpStream, server: &mut TcpStream) {
    client.write_all(b"question").unwrap();
    let mut eight = [0; 8];
    server.read_exact(&mut eight).unwrap();
    assert_eq!(&eight, b"question");
    server.write_all(b"answered").unwrap();
    client.read_exact(&mut eight).unwrap();
    assert_eq!(&eight, b"answered");
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_connection_is_spliced_where_both_services_ask_and_only_there() {
    let mut mesh = Mesh::start("both");
    for (asking, spliced) in [
        (&["a/b/client", "a/b/server"][..], true),
        (&["a/b/server"], false),
        (&["a/b/client"], false),
        (&[], false),
    ] {
        mesh.ask(asking);
        for to in addresses() {
            let (mut client, mut server) = mesh.connect(to);
            exchange(&mut client, &mut server);
            let by_tcp = [mesh.by_tcp(&client), mesh.by_tcp(&server)];
            let expected = if spliced { [0, 0] } else { [8, 8] };
            assert_eq!(by_tcp, expected, "{asking:?} to {to}");
        }
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn random_chunks_both_ways_arrive_as_they_were_written() {
    let mut mesh = Mesh::start("chunks");
    mesh.ask_both();
    for (round, to) in [0, 1, 2, 3]
        .into_iter()
        .zip(addresses().into_iter().cycle())
    {
        let (mut client, mut server) = mesh.connect(to);
        exchange(&mut client, &mut server);
        assert_eq!(mesh.messages(), 2);
        let there = Direction::new(&client, &server, 2 * round);
        let back = Direction::new(&server, &client, 2 * round + 1);
        thread::scope(|scope| {
            let there = scope.spawn(move || run(there));
            let back = scope.spawn(move || run(back));
            there.join().unwrap();
            back.join().unwrap();
        });
        drop((client, server));
        mesh.wait_forgotten();
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn questions_and_answers_of_every_size_stay_spliced() {
    let mut mesh = Mesh::start("sizes");
    mesh.ask_both();
    for to in addresses() {
        let (mut client, mut server) = mesh.connect(to);
        let mut random = Random::new(7);
        for _ in 0..300 {
            for turn in 0..2 {
                let (from, into) = if turn == 0 {
                    (&mut client, &mut server)
                } else {
                    (&mut server, &mut client)
                };
                let size = random.size();
                let message = random.bytes(size);
                let mut read = vec![0; size];
                thread::scope(|scope| {
                    scope.spawn(|| from.write_all(&message).unwrap());
                    into.read_exact(&mut read).unwrap();
                });
                assert!(read == message, "{size} bytes to {to}");
            }
        }
        assert_eq!([mesh.by_tcp(&client), mesh.by_tcp(&server)], [0, 0]);
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_message_that_is_handed_over_is_counted_as_a_packet() {
    let mut mesh = Mesh::start("counted");
    mesh.ask_both();
    for to in addresses() {
        let (mut client, mut server) = mesh.connect(to);
        let (packets, bytes) = mesh.counted();
        for _ in 0..50 {
            exchange(&mut client, &mut server);
        }
        assert_eq!(mesh.counted(), (packets + 100, bytes + 800));
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn what_was_written_before_an_end_is_read_before_it_and_the_other_half_goes_on() {
    let mut mesh = Mesh::start("half");
    mesh.ask_both();
    for to in addresses() {
        let (mut client, mut server) = mesh.connect(to);
        client.write_all(&[7; 100_000]).unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        let mut all = Vec::new();
        server.read_to_end(&mut all).unwrap();
        assert_eq!(all, [7; 100_000]);
        server.write_all(&[8; 100_000]).unwrap();
        let ends = [0, 1];
        assert_eq!([mesh.by_tcp(&client), mesh.by_tcp(&server)], ends);
        drop(server);
        let mut all = Vec::new();
        client.read_to_end(&mut all).unwrap();
        assert_eq!(all, [8; 100_000]);
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_reader_that_its_own_shutdown_wakes_may_read_again() {
    let mut mesh = Mesh::start("woken");
    mesh.ask_both();
    for to in addresses() {
        let (mut client, mut server) = mesh.connect(to);
        exchange(&mut client, &mut server);
        let mut other = client.try_clone().unwrap();
        let reader = thread::spawn(move || {
            let mut six = [0; 6];
            assert_eq!(read_some(&mut other, &mut six), 6);
            six
        });
        client.shutdown(Shutdown::Write).unwrap();
        // The end has arrived, so the client's FIN is on its way to be acknowledged.
        assert_eq!(server.read(&mut [0; 6]).unwrap(), 0);
        server.write_all(b"thanks").unwrap();
        assert_eq!(&reader.join().unwrap(), b"thanks");
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn who_writes_to_an_end_that_is_gone_is_told() {
    let mut mesh = Mesh::start("gone");
    mesh.ask_both();
    let (mut client, mut server) = mesh.connect(VIP4.into());
    exchange(&mut client, &mut server);
    drop(server);
    let error = wait_for("an error", PATIENCE, || client.write_all(b"more").err());
    assert!(
        matches!(
            error.kind(),
            ErrorKind::BrokenPipe | ErrorKind::ConnectionReset
        ),
        "{error}"
    );
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_sender_waits_for_a_reader_that_is_slow_and_nothing_is_lost() {
    /// More than any send and receive buffer together.
    const ALL: usize = 64 << 20;
    let mut mesh = Mesh::start("slow");
    mesh.ask_both();
    let (mut client, mut server) = mesh.connect(VIP4.into());
    exchange(&mut client, &mut server);
    client.set_nonblocking(true).unwrap();
    let mut random = Random::new(1);
    let chunk = random.bytes(64 * 1024);
    let mut sent = 0;
    let stopped = loop {
        match client.write(&chunk) {
            Ok(written) => sent += written,
            Err(error) => break error,
        }
        assert!(sent < ALL, "nothing holds the sender back");
    };
    assert_eq!(stopped.kind(), ErrorKind::WouldBlock);
    client.set_nonblocking(false).unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    let mut all = Vec::new();
    server.read_to_end(&mut all).unwrap();
    assert_eq!(all.len(), sent);
    // Every write began with the chunk's first byte, and the last of a series may have been cut short.
    assert!(mesh.by_tcp(&server) > 0, "it went by TCP in the end");
    assert!(mesh.by_tcp(&server) < sent as u64, "it began spliced");
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn urgent_data_arrives_in_its_place() {
    let mut mesh = Mesh::start("urgent");
    mesh.ask_both();
    let (mut client, mut server) = mesh.connect(VIP4.into());
    client.write_all(b"ab").unwrap();
    send(client.as_raw_fd(), b"!", MsgFlags::MSG_OOB).unwrap();
    client.write_all(b"cd").unwrap();
    let mut five = [0; 5];
    server.read_exact(&mut five).unwrap();
    assert_eq!(&five, b"ab!cd");
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_spliced_connection_does_not_notice_that_the_daemon_dies_and_comes_back() {
    let mut mesh = Mesh::start("restart");
    mesh.ask_both();
    let (mut client, mut server) = mesh.connect(VIP4.into());
    exchange(&mut client, &mut server);
    mesh.node.kill();
    exchange(&mut client, &mut server);
    let (mut young, mut other) = mesh.connect(vip6().into());
    exchange(&mut young, &mut other);
    assert_eq!(mesh.by_tcp(&young), 0, "it is spliced without a daemon");
    mesh.node.run();
    mesh.node.wait_ready();
    exchange(&mut client, &mut server);
    exchange(&mut young, &mut other);
    let (mut last, mut its) = mesh.connect(VIP4.into());
    exchange(&mut last, &mut its);
    for stream in [&client, &server, &young, &other, &last, &its] {
        assert_eq!(mesh.by_tcp(stream), 0);
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_connection_whose_backend_is_withdrawn_ends() {
    let mut mesh = Mesh::start("withdrawn");
    mesh.ask_both();
    let (mut client, mut server) = mesh.connect(VIP4.into());
    exchange(&mut client, &mut server);
    mesh.withdraw();
    let error = wait_for("an error", PATIENCE, || {
        client.write_all(b"more").err().or_else(|| {
            client
                .set_read_timeout(Some(Duration::from_millis(50)))
                .unwrap();
            client
                .read(&mut [0; 8])
                .err()
                .filter(|error| error.kind() != ErrorKind::WouldBlock)
        })
    });
    assert!(
        matches!(
            error.kind(),
            ErrorKind::BrokenPipe | ErrorKind::ConnectionReset
        ),
        "{error}"
    );
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn who_began_to_send_before_it_was_connected_goes_by_tcp_in_order() {
    let mut mesh = Mesh::start("early");
    mesh.ask_both();
    mesh.fill_backlog();
    let to = SockaddrStorage::from(std::net::SocketAddr::new(VIP4.into(), 80));
    let raw = mesh.client.netns.run(|| {
        socket(
            AddressFamily::Inet,
            SockType::Stream,
            SockFlag::SOCK_NONBLOCK,
            None,
        )
        .unwrap()
    });
    // The handshake waits for a place in the backlog.
    let error = connect(raw.as_raw_fd(), &to).unwrap_err();
    assert_eq!(error, nix::errno::Errno::EINPROGRESS);
    let stream = TcpStream::from(raw);
    stream.set_nonblocking(false).unwrap();
    let mut early = stream.try_clone().unwrap();
    let sender = thread::spawn(move || {
        // It waits within the kernel until the connection is there, and then goes on where it was: in TCP.
        early.write_all(b"first ").unwrap();
        early.write_all(b"second ").unwrap();
    });
    thread::sleep(Duration::from_millis(100));
    let mut server = mesh.empty_backlog(&stream);
    sender.join().unwrap();
    (&stream).write_all(b"third").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let mut all = String::new();
    server.read_to_string(&mut all).unwrap();
    assert_eq!(all, "first second third");
    assert_eq!(mesh.by_tcp(&server), all.len() as u64 + 1);
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_connection_with_forged_addresses_takes_no_part() {
    let mut mesh = Mesh::start("forged");
    mesh.ask_both();
    let (mut client, mut server) = mesh.connect(VIP4.into());
    exchange(&mut client, &mut server);
    // The same tuple within a namespace of somebody else, over its loopback.
    let forger = Netns::new("forger").unwrap();
    let source = client.local_addr().unwrap();
    for address in [source.ip(), VIP4.into()] {
        forger
            .ip(&format!("address add {address}/32 dev lo"))
            .unwrap();
    }
    let (mut forged, mut accepted) = forger.run(|| {
        let listener = std::net::TcpListener::bind((VIP4, 80)).unwrap();
        let raw = socket(
            AddressFamily::Inet,
            SockType::Stream,
            SockFlag::empty(),
            None,
        )
        .unwrap();
        bind(raw.as_raw_fd(), &SockaddrStorage::from(source)).unwrap();
        connect(
            raw.as_raw_fd(),
            &SockaddrStorage::from(listener.local_addr().unwrap()),
        )
        .unwrap();
        (TcpStream::from(raw), listener.accept().unwrap().0)
    });
    forged.write_all(b"poison").unwrap();
    let mut six = [0; 6];
    accepted.set_read_timeout(Some(PATIENCE)).unwrap();
    accepted.read_exact(&mut six).unwrap();
    assert_eq!(by_tcp(&forger, &accepted), Some(6));
    exchange(&mut client, &mut server);
    assert_eq!(mesh.by_tcp(&server), 0);
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_listener_of_mptcp_is_spliced_with_plain_clients_and_left_alone_with_its_own_kind() {
    let mut mesh = Mesh::start("mptcp");
    mesh.ask_both();
    mesh.listen_by(Protocol::MPTCP);
    for to in addresses() {
        let (mut client, mut server) = mesh.connect(to);
        exchange(&mut client, &mut server);
        assert_eq!([mesh.by_tcp(&client), mesh.by_tcp(&server)], [0, 0]);
        let seen = server.peer_addr().unwrap().ip().to_canonical();
        assert_eq!(seen, client.local_addr().unwrap().ip());
        drop((client, server));
        mesh.wait_forgotten();

        let (mut client, mut server) = mesh.connect_by(Protocol::MPTCP, to);
        exchange(&mut client, &mut server);
        let shown = mesh.client.netns.succeed("ss", &["--mptcp", "-nH"]);
        assert!(shown.unwrap().contains("ESTAB"), "it did not become MPTCP");
        assert_eq!(mesh.remembered(), 0);
        let there = Direction::new(&client, &server, 100);
        let back = Direction::new(&server, &client, 101);
        thread::scope(|scope| {
            for direction in [there, back] {
                scope.spawn(move || run(direction));
            }
        });
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn hundreds_of_connections_leave_nothing_behind() {
    let mut mesh = Mesh::start("many");
    mesh.ask_both();
    let watch = Stopwatch::start();
    for number in 0..300 {
        let (mut client, mut server) = mesh.connect(addresses()[number % 2]);
        exchange(&mut client, &mut server);
        assert!(watch.had() < SOON, "{number} took {SOON:?}");
    }
    mesh.wait_forgotten();
}
