//! A connection that has to begin: whoever knocks and then says nothing is let go.
//!
//! Until the first bytes nothing else would end it: pings and the time limits of HTTP begin behind them.

use std::{
    future::Future,
    io,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Sleep, sleep},
};

/// How long a peer has for its first bytes.
const PATIENCE: Duration = Duration::from_secs(5);
/// How many: HTTP/2's preface, which no request of HTTP/1.1 is shorter than (RFC 9113, 3.4).
const FIRST: usize = 24;

/// A connection that breaks where its peer has not begun in time.
#[derive(Debug)]
pub(super) struct Begun<S> {
    stream: S,
    missing: usize,
    ends: Pin<Box<Sleep>>,
}

impl<S> Begun<S> {
    pub(super) fn new(stream: S) -> Self {
        Self {
            stream,
            missing: FIRST,
            ends: Box::pin(sleep(PATIENCE)),
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Begun<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.missing > 0 && self.ends.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        let before = buffer.filled().len();
        let polled = Pin::new(&mut self.stream).poll_read(cx, buffer);
        let read = buffer.filled().len() - before;
        self.missing = self.missing.saturating_sub(read);
        polled
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Begun<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn who_says_nothing_or_too_little_is_let_go_and_who_began_is_not() {
        for (said, is_let_go) in [(0, true), (FIRST - 1, true), (FIRST, false)] {
            let (mut peer, own) = duplex(64);
            let mut begun = Begun::new(own);
            peer.write_all(&vec![b'x'; said]).await.unwrap();
            begun.read_exact(&mut vec![0; said]).await.unwrap();
            let next = tokio::time::timeout(PATIENCE * 10, begun.read_u8()).await;
            let let_go = next.map(|read| read.unwrap_err().kind());
            let want = is_let_go.then_some(io::ErrorKind::TimedOut);
            assert_eq!(let_go.ok(), want, "{said} bytes");
        }
    }
}
