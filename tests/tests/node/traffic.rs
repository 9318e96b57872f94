//! Traffic of the tests: each call says at once whether it got through.

use std::{
    io::{self, Read, Write},
    net::{IpAddr, SocketAddr, TcpStream, UdpSocket},
    os::fd::AsRawFd,
    time::{Duration, Instant},
};

use nix::sys::{
    socket::{
        AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrStorage, connect, recv,
        send, setsockopt, socket, sockopt::ReceiveTimeout,
    },
    time::TimeVal,
};
use weft_tests::Netns;

/// A connection from `netns`, and who greets at its other end.
pub(crate) fn call(netns: &Netns, to: impl Into<IpAddr>) -> io::Result<(TcpStream, String)> {
    let to = SocketAddr::new(to.into(), 80);
    let mut stream = netns.run(|| TcpStream::connect_timeout(&to, Duration::from_secs(3)))?;
    stream.set_read_timeout(Some(Duration::from_secs(3)))?;
    stream.set_nodelay(true)?;
    let mut greeting = Vec::new();
    let mut byte = [0];
    while byte != *b"\n" {
        stream.read_exact(&mut byte)?;
        greeting.extend(byte);
    }
    Ok((stream, String::from_utf8_lossy(&greeting).trim().to_owned()))
}

/// Sends bytes over a connection and reads them back.
pub(crate) fn echo(stream: &mut TcpStream, bytes: &[u8]) -> io::Result<()> {
    stream.write_all(bytes)?;
    let mut back = vec![0; bytes.len()];
    stream.read_exact(&mut back)?;
    assert_eq!(back, bytes);
    Ok(())
}

/// Sends a datagram to port 53 and reads it back.
pub(crate) fn datagram(netns: &Netns, to: impl Into<IpAddr>) -> io::Result<()> {
    let to = SocketAddr::new(to.into(), 53);
    let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = netns.run(|| UdpSocket::bind(any))?;
    socket.set_read_timeout(Some(Duration::from_secs(3)))?;
    socket.connect(to)?;
    socket.send(b"question")?;
    let mut back = [0; 16];
    let length = socket.recv(&mut back)?;
    assert_eq!(&back[..length], b"question");
    Ok(())
}

/// An ICMP echo.
pub(crate) fn ping(netns: &Netns, to: impl Into<IpAddr>) -> io::Result<()> {
    let to = SocketAddr::new(to.into(), 0);
    let (family, protocol, request, answer) = if to.is_ipv4() {
        (AddressFamily::Inet, SockProtocol::Icmp, 8u8, 0u8)
    } else {
        (AddressFamily::Inet6, SockProtocol::IcmpV6, 128, 129)
    };
    netns
        .sysctl("ipv4.ping_group_range", "0 2147483647")
        .unwrap();
    let socket = netns.run(|| {
        socket(
            family,
            SockType::Datagram,
            SockFlag::empty(),
            Some(protocol),
        )
    })?;
    setsockopt(&socket, ReceiveTimeout, &TimeVal::new(3, 0))?;
    connect(socket.as_raw_fd(), &SockaddrStorage::from(to))?;
    send(
        socket.as_raw_fd(),
        &[request, 0, 0, 0, 0, 0, 0, 1, b'w'],
        MsgFlags::empty(),
    )?;
    let mut back = [0; 64];
    let length = recv(socket.as_raw_fd(), &mut back, MsgFlags::empty())?;
    assert_eq!((back[0], length), (answer, 9));
    Ok(())
}

/// How long `work` takes to fail, and its error.
pub(crate) fn failure<T>(work: impl FnOnce() -> io::Result<T>) -> (Duration, io::Error) {
    let start = Instant::now();
    match work() {
        Ok(_) => panic!("it succeeded"),
        Err(error) => (start.elapsed(), error),
    }
}
