//! Counters and gauges in Prometheus' text format, over the smallest HTTP that a scraper needs.
//!
//! `GET` of anything gives everything; there is nothing to configure and nothing to write. What there is stands
//! in `docs/metrics.md`. The counters live in the kernel's pinned maps, so they go on over a restart.

use std::{collections::BTreeMap, io, net::SocketAddr, sync::Arc, time::Duration};

use netmanager_api::table::Revision;

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::{mpsc, oneshot, watch},
    task::spawn_blocking,
    time::timeout,
};

use crate::{
    daemon::monotonic,
    datapath::{Counts, DatapathError, LogCounters, Reasons},
    follow::chain,
    observe::{Ask, Names},
};

mod families;
mod render;

use render::{Reading, render};

/// What the daemon knows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Gauges {
    /// Attached endpoints.
    pub endpoints: u64,
    /// Entries of `VIPS`.
    pub vips: u64,
    /// The table that the kernel matches.
    pub applied: Revision,
    /// When the last table came, on the kernel's monotonic clock.
    pub table_since: Option<Duration>,
    /// Whether the kernel does not match the table.
    pub has_trouble: bool,
    /// Peers whose last probes failed.
    pub unreachable: usize,
    /// Round-trip times by node number, microseconds.
    pub rtt_us: BTreeMap<u32, u32>,
    /// The largest packet that the tunnel takes, bytes; 0 while there is none.
    pub tunnel_mtu: u32,
    /// Entries in use, of the maps that user space fills.
    pub map_entries: BTreeMap<&'static str, u64>,
    /// Entries kept in the flow maps at the last whole pass, by map.
    pub flows: BTreeMap<&'static str, u64>,
    /// Flows that the janitor removed.
    pub flows_removed: u64,
    /// Capacity of each map.
    pub map_sizes: BTreeMap<&'static str, u32>,
}

/// The counters in the kernel.
pub struct Counters {
    /// By reason.
    pub reasons: Reasons,
    /// By VIP and backend.
    pub counts: Counts,
    /// Of the flow log.
    pub log: LogCounters,
}

/// How long a scraper may take.
const PATIENCE: Duration = Duration::from_secs(5);
/// The longest request that is read, bytes.
const MAX_REQUEST: usize = 8 << 10;

/// Serves scrapers one after the other, until the daemon is gone.
pub async fn serve(
    listener: TcpListener,
    counters: Counters,
    asks: mpsc::Sender<Ask>,
    gauges: watch::Receiver<Gauges>,
) {
    let counters = Arc::new(counters);
    let mut gone = gauges.clone();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = gone.wait_for(|_| false) => return,
        };
        let known = gauges.borrow().clone();
        let text = scrape(&counters, &asks, &known).await;
        let answered = match accepted {
            Ok((stream, _)) => timeout(PATIENCE, answer(stream, &text)).await,
            Err(error) => Ok(Err(error)),
        };
        if let Ok(Err(error)) = answered {
            tracing::debug!(%error, "a scraper went away");
        }
    }
}

/// Binds the metrics' address.
///
/// # Errors
/// When the address cannot be had.
pub async fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    TcpListener::bind(address).await
}

/// Asks for the names, and reads what was counted on a thread of its own: a large node's takes a while.
async fn scrape(counters: &Arc<Counters>, asks: &mpsc::Sender<Ask>, gauges: &Gauges) -> String {
    let (sender, receiver) = oneshot::channel();
    let asked = asks.send(Ask::Names(sender)).await;
    let names = match asked {
        Ok(()) => receiver.await.unwrap_or_default(),
        Err(_) => Arc::default(),
    };
    let (counters, wanted) = (counters.clone(), names.clone());
    let reading = spawn_blocking(move || counters.read(&wanted)).await;
    let reading = match reading {
        Ok(Ok(reading)) => reading,
        Ok(Err(error)) => {
            tracing::warn!(error = chain(&error), "failed to read the counters");
            Reading::default()
        }
        Err(error) => {
            tracing::error!(%error, "reading the counters ended early");
            Reading::default()
        }
    };
    render(&names, gauges, &reading, monotonic())
}

impl Counters {
    fn read(&self, names: &Names) -> Result<Reading, DatapathError> {
        Ok(Reading {
            reasons: self.reasons.read()?,
            vips: names
                .vips
                .keys()
                .map(|counter| Ok((*counter, self.counts.vip(*counter)?)))
                .collect::<Result<_, DatapathError>>()?,
            backends: names
                .backends
                .keys()
                .map(|index| Ok((*index, self.counts.backend(*index)?)))
                .collect::<Result<_, DatapathError>>()?,
            refused: self.counts.refused()?,
            log: self.log.read()?,
        })
    }
}

async fn answer(mut stream: TcpStream, text: &str) -> io::Result<()> {
    let mut request = Vec::new();
    let mut part = [0; 1_024];
    while !request.windows(4).any(|end| end == b"\r\n\r\n") && request.len() < MAX_REQUEST {
        match stream.read(&mut part).await? {
            0 => break,
            read => request.extend_from_slice(&part[..read]),
        }
    }
    let head = format!(
        "HTTP/1.1 200 OK\r\nContent-Type: text/plain; version=0.0.4\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        text.len()
    );
    stream.write_all(head.as_bytes()).await?;
    stream.write_all(text.as_bytes()).await?;
    stream.shutdown().await
}

#[cfg(test)]
mod tests;
