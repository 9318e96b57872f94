//! A server in a namespace: greets by its name, then gives back what it hears.

use std::{
    io::{self, Write},
    net::{Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket},
    sync::{
        Arc, Mutex, Weak,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use nix::sys::{
    socket::{setsockopt, sockopt::ReceiveTimeout},
    time::{TimeVal, TimeValLike},
};

use super::once_free;
use crate::Netns;

/// Begins every greeting: bytes by which a payload is known wherever it is seen.
pub const MARKER: &str = "weft-inner-packet-in-clear:";
/// How long a server takes at most to notice that it should end.
const TURN: Duration = Duration::from_millis(50);

/// A server; it ends, with its connections, when it is dropped.
#[derive(Debug)]
pub struct Server {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
    connections: Connections,
}

/// Weak, so that a connection that has ended holds no descriptor until the server ends.
type Connections = Arc<Mutex<Vec<Weak<TcpStream>>>>;

impl Server {
    /// Serves as `name` at these TCP and UDP ports of `netns`, over both families.
    ///
    /// # Errors
    /// When a port is taken.
    pub fn start(netns: &Netns, name: &str, tcp: &[u16], udp: &[u16]) -> io::Result<Self> {
        let any = |port: &u16| SocketAddr::from((Ipv6Addr::UNSPECIFIED, *port));
        let (listeners, sockets) = netns.run(|| {
            let tcp: io::Result<Vec<_>> = tcp
                .iter()
                .map(|port| once_free(|| TcpListener::bind(any(port))))
                .collect();
            let udp: io::Result<Vec<_>> = udp
                .iter()
                .map(|port| once_free(|| UdpSocket::bind(any(port))))
                .collect();
            (tcp, udp)
        });
        let (listeners, sockets) = (listeners?, sockets?);
        let mut server = Self {
            stop: Arc::default(),
            threads: Vec::new(),
            connections: Arc::default(),
        };
        let greeting = format!("{MARKER}{name}\n");
        for listener in listeners {
            let turn = TimeVal::milliseconds(TURN.as_millis() as i64);
            // It bounds accept, too (socket(7), SO_RCVTIMEO).
            setsockopt(&listener, ReceiveTimeout, &turn)?;
            let (stop, greeting) = (Arc::clone(&server.stop), greeting.clone());
            let connections = Arc::clone(&server.connections);
            let serve = move || accept(&listener, &greeting, &stop, &connections);
            server.threads.push(thread::spawn(serve));
        }
        for socket in sockets {
            socket.set_read_timeout(Some(TURN))?;
            let (stop, greeting) = (Arc::clone(&server.stop), greeting.clone());
            let serve = move || answer(&socket, &greeting, &stop);
            server.threads.push(thread::spawn(serve));
        }
        Ok(server)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
        for stream in self
            .connections
            .lock()
            .into_iter()
            .flat_map(|mut all| std::mem::take(&mut *all))
            .filter_map(|stream| stream.upgrade())
        {
            // It may have ended by itself.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

fn accept(listener: &TcpListener, greeting: &str, stop: &AtomicBool, connections: &Connections) {
    while !stop.load(Ordering::Relaxed) {
        let Ok((stream, _)) = listener.accept() else {
            continue;
        };
        let stream = Arc::new(stream);
        if let Ok(mut all) = connections.lock() {
            all.push(Arc::downgrade(&stream));
        }
        let greeting = greeting.to_owned();
        thread::spawn(move || {
            let mut end = &*stream;
            // The listener's bound is inherited, but a connection may rest.
            let _ = end.set_read_timeout(None);
            let _ = end.set_nodelay(true);
            let echoed = end
                .write_all(greeting.as_bytes())
                .and_then(|()| io::copy(&mut &*stream, &mut end));
            if echoed.is_ok() {
                let _ = end.shutdown(Shutdown::Both);
            }
        });
    }
}

fn answer(socket: &UdpSocket, greeting: &str, stop: &AtomicBool) {
    let mut datagram = vec![0; 1 << 16];
    while !stop.load(Ordering::Relaxed) {
        // An error is an empty turn, or an ICMP error of an earlier answer.
        if let Ok((length, from)) = socket.recv_from(&mut datagram) {
            let answer = [greeting.as_bytes(), &datagram[..length]].concat();
            // One that is too large for an answer with its greeting goes back without.
            if socket.send_to(&answer, from).is_err() {
                let _ = socket.send_to(&datagram[..length], from);
            }
        }
    }
}
