//! Connections of the simulation: bytes in order, as TCP carries them.
//!
//! ```text
//!  write --> segments --network--> in any order --> put in order --> read
//!                        '-- lost or cut: sent again, given up after a while
//! ```
//!
//! A process that ends closes its connections; a machine without power says nothing, and answers what comes once it is
//! back with a reset.

use std::{
    collections::{BTreeMap, VecDeque},
    io,
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, Waker},
};

use bytes::{Buf, Bytes};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::oneshot,
};

use crate::{
    network::{HostId, Network},
    time::HostClock,
};

/// A connection's number.
pub(crate) type LineId = u64;

/// What travels on a connection.
#[derive(Clone, Debug)]
pub(crate) enum Piece {
    /// Somebody wants to connect.
    Open,
    /// Somebody listens there.
    Opened,
    /// Bytes, by their place among all pieces of their direction.
    Bytes(u64, Bytes),
    /// There are no more.
    End(u64),
    /// Nobody knows this connection.
    Reset,
}

/// What one end has heard.
#[derive(Debug, Default)]
struct Heard {
    /// The next piece in order.
    next: u64,
    /// Those that came before their turn.
    early: BTreeMap<u64, Option<Bytes>>,
    ready: VecDeque<Bytes>,
    ended: bool,
    broken: bool,
    reader: Option<Waker>,
}

impl Heard {
    /// Takes a piece; `None` is the end.
    fn take(&mut self, number: u64, piece: Option<Bytes>) {
        self.early.insert(number, piece);
        while let Some(piece) = self.early.remove(&self.next) {
            self.next += 1;
            match piece {
                Some(bytes) => self.ready.push_back(bytes),
                None => self.ended = true,
            }
        }
        self.wake();
    }

    fn wake(&mut self) {
        if let Some(reader) = self.reader.take() {
            reader.wake();
        }
    }
}

type Shared = Arc<Mutex<Heard>>;

fn lock<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Debug, Default)]
struct Ends {
    up: BTreeMap<LineId, (HostId, Shared)>,
    opening: BTreeMap<LineId, oneshot::Sender<bool>>,
}

/// The ends of connections that a host holds.
#[derive(Clone)]
pub(crate) struct Lines {
    host: HostId,
    clock: HostClock,
    network: Network,
    ends: Arc<Mutex<Ends>>,
    /// Without power nothing is said any more.
    silent: Arc<AtomicBool>,
}

impl std::fmt::Debug for Lines {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lines")
            .field("host", &self.host)
            .finish_non_exhaustive()
    }
}

impl Lines {
    pub(crate) fn new(host: HostId, clock: HostClock, network: Network) -> Self {
        Self {
            host,
            clock,
            network,
            ends: Arc::default(),
            silent: Arc::default(),
        }
    }

    /// Whatever is dropped from now on says nothing.
    pub(crate) fn silence(&self) {
        self.silent.store(true, Ordering::Relaxed);
    }

    fn send(&self, to: HostId, line: LineId, piece: Piece) {
        if !self.silent.load(Ordering::Relaxed) {
            let way = (self.host, to);
            self.network.send_piece(self.clock.now(), way, line, piece);
        }
    }

    fn end(&self, to: HostId, line: LineId) -> End {
        let heard = Shared::default();
        lock(&self.ends).up.insert(line, (to, heard.clone()));
        End {
            lines: self.clone(),
            to,
            line,
            heard,
            sent: 0,
            closed: false,
        }
    }

    /// Connects to `to`; silence where nothing comes back.
    pub(crate) async fn dial(self, to: HostId) -> io::Result<End> {
        let line = self.network.next_line();
        let (sender, opened) = oneshot::channel();
        let end = self.end(to, line);
        lock(&self.ends).opening.insert(line, sender);
        self.send(to, line, Piece::Open);
        match opened.await {
            Ok(true) => Ok(end),
            _ => Err(io::ErrorKind::ConnectionRefused.into()),
        }
    }

    /// Takes what came from `from`; the end of a connection that begins, where `listens`.
    pub(crate) fn take(
        &self,
        from: HostId,
        line: LineId,
        piece: Piece,
        listens: bool,
    ) -> Option<End> {
        let heard = lock(&self.ends).up.get(&line).map(|(_, it)| it.clone());
        match (piece, heard) {
            (Piece::Open, None) if listens => {
                let end = self.end(from, line);
                self.send(from, line, Piece::Opened);
                return Some(end);
            }
            (Piece::Opened, Some(_)) => {
                if let Some(opened) = lock(&self.ends).opening.remove(&line) {
                    // Who dialled may have given up.
                    let _ = opened.send(true);
                }
            }
            (Piece::Bytes(number, bytes), Some(heard)) => lock(&heard).take(number, Some(bytes)),
            (Piece::End(number), Some(heard)) => lock(&heard).take(number, None),
            (Piece::Reset, Some(heard)) => {
                let opening = lock(&self.ends).opening.remove(&line);
                opening.map(|opening| opening.send(false));
                let mut heard = lock(&heard);
                heard.broken = true;
                heard.wake();
            }
            (Piece::Open | Piece::Opened | Piece::Bytes(..), None) => {
                self.send(from, line, Piece::Reset);
            }
            (Piece::Reset | Piece::End(_), None) | (Piece::Open, Some(_)) => {}
        }
        None
    }
}

/// One end of a connection.
#[derive(Debug)]
pub(crate) struct End {
    lines: Lines,
    to: HostId,
    line: LineId,
    heard: Shared,
    sent: u64,
    closed: bool,
}

impl End {
    fn close(&mut self) {
        if !std::mem::replace(&mut self.closed, true) {
            self.lines.send(self.to, self.line, Piece::End(self.sent));
        }
    }
}

impl AsyncRead for End {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let mut heard = lock(&self.heard);
        if heard.broken {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        if let Some(first) = heard.ready.front_mut() {
            let length = first.len().min(buffer.remaining());
            buffer.put_slice(&first[..length]);
            first.advance(length);
            if first.is_empty() {
                heard.ready.pop_front();
            }
            return Poll::Ready(Ok(()));
        }
        if heard.ended {
            return Poll::Ready(Ok(()));
        }
        heard.reader = Some(context.waker().clone());
        Poll::Pending
    }
}

impl AsyncWrite for End {
    fn poll_write(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        if self.closed || lock(&self.heard).broken {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        let piece = Piece::Bytes(self.sent, Bytes::copy_from_slice(data));
        self.sent += 1;
        self.lines.send(self.to, self.line, piece);
        Poll::Ready(Ok(data.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.close();
        Poll::Ready(Ok(()))
    }
}

impl Drop for End {
    fn drop(&mut self) {
        self.close();
        let mut ends = lock(&self.lines.ends);
        ends.up.remove(&self.line);
        ends.opening.remove(&self.line);
    }
}
