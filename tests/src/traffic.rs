//! Traffic of the tests: servers that say who they are, and calls that say at once whether they got through.

#![expect(
    clippy::unwrap_used,
    reason = "a step of a test that fails, fails the test, here as in its body"
)]

use std::{
    io::{self, ErrorKind, Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::AsRawFd,
    thread,
    time::Duration,
};

use nix::sys::{
    socket::{
        AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrStorage, bind, connect,
        recv, send, setsockopt, socket,
        sockopt::{Ipv4RecvErr, Ipv6RecvErr, ReceiveTimeout, ReuseAddr, SendTimeout},
    },
    time::TimeVal,
};

use crate::{Netns, Stopwatch, wait::slowed};

mod server;

pub use server::{MARKER, Server};

/// The declared TCP port of the tests' services.
pub const HTTP: u16 = 80;
/// The declared UDP port of the tests' services.
pub const DNS: u16 = 53;
/// After this long a call has failed, on a machine that is not slower than ours.
const PATIENCE: Duration = Duration::from_secs(3);
/// How long an address that is taken rests between two attempts.
const REST: Duration = Duration::from_millis(5);

/// A connection from `netns` to port [`HTTP`], and who greets at its other end.
///
/// # Errors
/// When nobody answers within three seconds, or somebody refuses.
pub fn call(netns: &Netns, to: impl Into<IpAddr>) -> io::Result<(TcpStream, String)> {
    call_at(netns, SocketAddr::new(to.into(), HTTP))
}

/// Who greets at `to`, from the namespace that the calling thread is in: for many calls in a row.
///
/// # Errors
/// As [`call`].
pub fn who_answers(to: SocketAddr) -> io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&to, slowed(PATIENCE))?;
    let who = greeting(&mut stream)?;
    // Until the server has closed its end: many calls in a row must not pile up there.
    stream.shutdown(Shutdown::Write)?;
    stream.read_to_end(&mut Vec::new())?;
    Ok(who)
}

/// As [`call`], at any port.
///
/// # Errors
/// As [`call`].
pub fn call_at(netns: &Netns, to: SocketAddr) -> io::Result<(TcpStream, String)> {
    let mut stream = netns.run(|| TcpStream::connect_timeout(&to, slowed(PATIENCE)))?;
    let who = greeting(&mut stream)?;
    Ok((stream, who))
}

/// As [`call_at`], from a source address and port that may be in use by other connections.
///
/// # Errors
/// As [`call`], and when the source cannot be had.
pub fn call_from(
    netns: &Netns,
    from: SocketAddr,
    to: SocketAddr,
) -> io::Result<(TcpStream, String)> {
    let mut stream = connection_from(netns, from, to)?;
    let who = greeting(&mut stream)?;
    Ok((stream, who))
}

/// Listens at a port of `netns`, over both families. Nobody waits longer for a call than a call may take: where the
/// caller has failed, a test that joins its server ends, too.
///
/// # Errors
/// When the port is taken for longer than a call may take.
pub fn listen(netns: &Netns, port: u16) -> io::Result<TcpListener> {
    let listener = netns.run(|| once_free(|| TcpListener::bind((Ipv6Addr::UNSPECIFIED, port))))?;
    // It bounds accept, too (socket(7), SO_RCVTIMEO).
    setsockopt(
        &listener,
        ReceiveTimeout,
        &TimeVal::new(slowed(PATIENCE).as_secs().cast_signed(), 0),
    )?;
    Ok(listener)
}

/// A connection of which nothing was read.
///
/// # Errors
/// As [`call_from`].
pub fn connection_from(netns: &Netns, from: SocketAddr, to: SocketAddr) -> io::Result<TcpStream> {
    let family = if to.is_ipv4() {
        AddressFamily::Inet
    } else {
        AddressFamily::Inet6
    };
    let to = SockaddrStorage::from(to);
    once_free(|| {
        let flags = SockFlag::SOCK_CLOEXEC;
        let socket = netns.run(|| socket(family, SockType::Stream, flags, None))?;
        setsockopt(&socket, ReuseAddr, &true)?;
        // It bounds connect, too (socket(7), SO_SNDTIMEO).
        setsockopt(
            &socket,
            SendTimeout,
            &TimeVal::new(slowed(PATIENCE).as_secs().cast_signed(), 0),
        )?;
        bind(socket.as_raw_fd(), &SockaddrStorage::from(from))?;
        // Called again, it waits for the connection that it has begun.
        uninterrupted(|| Ok(connect(socket.as_raw_fd(), &to)?))?;
        Ok(socket.into())
    })
}

/// Does again what needs an address or a port, for as long as that is taken and a call may take. What was just closed
/// may stay open for a moment: a process that another test is about to start has this one's descriptors until it
/// runs its program.
fn once_free<T>(mut work: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    let watch = Stopwatch::start();
    loop {
        match work() {
            Err(error) if is_taken(&error) && watch.had() < slowed(PATIENCE) => {
                thread::sleep(REST);
            }
            ended => return ended,
        }
    }
}

fn is_taken(error: &io::Error) -> bool {
    // The second where a connection from the same address to the same is there already.
    matches!(
        error.kind(),
        ErrorKind::AddrInUse | ErrorKind::AddrNotAvailable
    )
}

fn greeting(stream: &mut TcpStream) -> io::Result<String> {
    stream.set_read_timeout(Some(slowed(PATIENCE)))?;
    stream.set_nodelay(true)?;
    let mut greeting = Vec::new();
    let mut byte = [0];
    while byte != *b"\n" {
        stream.read_exact(&mut byte)?;
        greeting.extend(byte);
    }
    Ok(name_in(&greeting))
}

fn name_in(greeting: &[u8]) -> String {
    let text = String::from_utf8_lossy(greeting);
    text.trim().trim_start_matches(MARKER).to_owned()
}

/// Sends bytes over a connection and reads them back.
///
/// # Errors
/// When the connection breaks or stays silent for three seconds.
///
/// # Panics
/// When other bytes come back.
pub fn echo(stream: &mut TcpStream, bytes: &[u8]) -> io::Result<()> {
    // Both at once: more than both ends' buffers would block for ever.
    let mut writer = stream.try_clone()?;
    let mut back = vec![0; bytes.len()];
    let (read, written) = thread::scope(|scope| {
        let written = scope.spawn(move || writer.write_all(bytes));
        let read = stream.read_exact(&mut back);
        (read, written.join().expect("a writer returns its errors"))
    });
    both(read, written)?;
    assert!(back == bytes, "other bytes came back");
    Ok(())
}

/// What became of a connection that one thread read and another wrote.
fn both(read: io::Result<()>, written: io::Result<()>) -> io::Result<()> {
    match read {
        // The kernel tells a reset to whoever asks first; the other one finds the connection at its end.
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => {
            Err(written.err().unwrap_or(error))
        }
        read => read.and(written),
    }
}

/// Sends a datagram to port [`DNS`] and reads it back; who answered.
///
/// # Errors
/// When nobody answers within three seconds, or somebody refuses.
pub fn datagram(netns: &Netns, to: impl Into<IpAddr>) -> io::Result<String> {
    let to = SocketAddr::new(to.into(), DNS);
    datagram_over(&datagram_socket(netns, any_of(&to))?, to)
}

/// A UDP socket in `netns`.
///
/// # Errors
/// When the source cannot be had.
pub fn datagram_socket(netns: &Netns, from: SocketAddr) -> io::Result<UdpSocket> {
    let socket = netns.run(|| once_free(|| UdpSocket::bind(from)))?;
    socket.set_read_timeout(Some(slowed(PATIENCE)))?;
    Ok(socket)
}

/// Sends a datagram over an unconnected socket, and reads the answer, which must come from `to`.
///
/// # Errors
/// As [`datagram`].
///
/// # Panics
/// When the answer comes from elsewhere, or is another.
pub fn datagram_over(socket: &UdpSocket, to: SocketAddr) -> io::Result<String> {
    socket.send_to(b"question", to)?;
    let mut back = [0; 128];
    let (length, from) = uninterrupted(|| socket.recv_from(&mut back))?;
    assert_eq!(from, to, "who was asked answers");
    let (who, rest) = back[..length].split_at(length - b"question".len());
    assert_eq!(rest, b"question");
    Ok(name_in(who))
}

/// Waits again where a signal ended the wait: the kernel restarts nothing that has a time limit (signal(7)).
fn uninterrupted<T>(mut wait: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match wait() {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            ended => return ended,
        }
    }
}

/// The unspecified address of `to`'s family, port 0.
#[must_use]
pub fn any_of(to: &SocketAddr) -> SocketAddr {
    match to {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    }
}

/// An ICMP echo.
///
/// # Errors
/// When no answer comes within three seconds, or an error does.
///
/// # Panics
/// When another answer comes.
pub fn ping(netns: &Netns, to: impl Into<IpAddr>) -> io::Result<()> {
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
    setsockopt(
        &socket,
        ReceiveTimeout,
        &TimeVal::new(slowed(PATIENCE).as_secs().cast_signed(), 0),
    )?;
    // A host that is unreachable is an error here, too, not only a port.
    match to {
        SocketAddr::V4(_) => setsockopt(&socket, Ipv4RecvErr, &true)?,
        SocketAddr::V6(_) => setsockopt(&socket, Ipv6RecvErr, &true)?,
    }
    connect(socket.as_raw_fd(), &SockaddrStorage::from(to))?;
    send(
        socket.as_raw_fd(),
        &[request, 0, 0, 0, 0, 0, 0, 1, b'w'],
        MsgFlags::empty(),
    )?;
    let mut back = [0; 64];
    let length = uninterrupted(|| Ok(recv(socket.as_raw_fd(), &mut back, MsgFlags::empty())?))?;
    assert_eq!((back[0], length), (answer, 9));
    Ok(())
}

/// How long `work` takes to fail, as [`Stopwatch::had`] says it, and its error.
///
/// # Panics
/// When it succeeds.
#[track_caller]
pub fn failure<T>(work: impl FnOnce() -> io::Result<T>) -> (Duration, io::Error) {
    let watch = Stopwatch::start();
    match work() {
        Ok(_) => panic!("it succeeded"),
        Err(error) => (watch.had(), error),
    }
}

#[cfg(test)]
mod tests {
    use ErrorKind::{AddrInUse, ConnectionReset, TimedOut, UnexpectedEof};

    use super::*;

    #[test]
    fn a_reset_that_the_writer_was_told_is_no_end_of_the_connection() {
        let of = |error: Option<ErrorKind>| error.map_or(Ok(()), |kind| Err(kind.into()));
        for (read, written, result) in [
            (None, None, None),
            (
                Some(UnexpectedEof),
                Some(ConnectionReset),
                Some(ConnectionReset),
            ),
            (Some(UnexpectedEof), None, Some(UnexpectedEof)),
            (Some(TimedOut), Some(ConnectionReset), Some(TimedOut)),
            (None, Some(ConnectionReset), Some(ConnectionReset)),
        ] {
            let became = both(of(read), of(written)).err().map(|error| error.kind());
            assert_eq!(became, result, "{read:?} {written:?}");
        }
    }

    #[test]
    fn an_address_that_is_taken_is_waited_for_and_nothing_else_is() {
        let mut taken = 3;
        let free = once_free(|| {
            taken -= 1;
            if taken == 0 {
                Ok("free")
            } else {
                Err(AddrInUse.into())
            }
        });
        assert_eq!(free.unwrap(), "free");
        let mut attempts = 0;
        let reset = once_free(|| {
            attempts += 1;
            Err::<(), _>(ConnectionReset.into())
        });
        assert_eq!(reset.unwrap_err().kind(), ConnectionReset);
        assert_eq!(attempts, 1);
    }
}
