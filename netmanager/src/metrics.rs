//! Counters and gauges in Prometheus' text format, over the smallest HTTP that a scraper needs.
//!
//! `GET` of anything gives everything; there is nothing to configure and nothing to write.

use std::{collections::BTreeMap, fmt::Write, io, net::SocketAddr, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::watch,
    time::timeout,
};

use crate::datapath::Reasons;

/// What the daemon knows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Gauges {
    /// Attached endpoints.
    pub endpoints: u64,
    /// Entries of `VIPS`.
    pub vips: u64,
    /// Log index of the table that the kernel matches.
    pub applied_index: u64,
    /// Entries kept in the flow maps at the last whole pass, by map.
    pub flows: BTreeMap<&'static str, u64>,
    /// Flows that the janitor removed.
    pub flows_removed: u64,
    /// Capacity of each map.
    pub map_sizes: BTreeMap<&'static str, u32>,
}

/// How long a scraper may take.
const PATIENCE: Duration = Duration::from_secs(5);
/// The longest request that is read, bytes.
const MAX_REQUEST: usize = 8 << 10;

/// Serves scrapers one after the other, until the daemon is gone.
pub async fn serve(listener: TcpListener, reasons: Reasons, gauges: watch::Receiver<Gauges>) {
    let mut gone = gauges.clone();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = gone.wait_for(|_| false) => return,
        };
        let text = render(&read(&reasons), &gauges.borrow());
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

fn read(reasons: &Reasons) -> Vec<(&'static str, u64)> {
    match reasons.read() {
        Ok(counts) => counts
            .into_iter()
            .map(|(reason, count)| (reason.name(), count))
            .collect(),
        Err(error) => {
            tracing::warn!(%error, "failed to read the packet counters");
            Vec::new()
        }
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

fn render(reasons: &[(&str, u64)], gauges: &Gauges) -> String {
    let mut text = String::new();
    family(
        &mut text,
        (
            "weft_refused_packets_total",
            "counter",
            "Packets dropped or answered, by reason.",
        ),
        reasons
            .iter()
            .map(|(name, count)| (format!("{{reason=\"{name}\"}}"), *count)),
    );
    let by_map = |counts: &BTreeMap<&'static str, u64>| -> Vec<(String, u64)> {
        counts
            .iter()
            .map(|(name, count)| (format!("{{map=\"{name}\"}}"), *count))
            .collect()
    };
    family(
        &mut text,
        (
            "weft_flows",
            "gauge",
            "Flow entries at the last whole pass, by map.",
        ),
        by_map(&gauges.flows).into_iter(),
    );
    let sizes = gauges
        .map_sizes
        .iter()
        .map(|(name, size)| (*name, u64::from(*size)))
        .collect();
    family(
        &mut text,
        (
            "weft_map_entries_limit",
            "gauge",
            "How many entries a map holds.",
        ),
        by_map(&sizes).into_iter(),
    );
    for (name, kind, help, value) in [
        (
            "weft_endpoints",
            "gauge",
            "Attached endpoints.",
            gauges.endpoints,
        ),
        (
            "weft_vip_ports",
            "gauge",
            "Declared ports and VIPs in the kernel.",
            gauges.vips,
        ),
        (
            "weft_table_index",
            "gauge",
            "Log index of the applied table.",
            gauges.applied_index,
        ),
        (
            "weft_flows_removed_total",
            "counter",
            "Flows collected.",
            gauges.flows_removed,
        ),
    ] {
        family(
            &mut text,
            (name, kind, help),
            std::iter::once((String::new(), value)),
        );
    }
    text
}

fn family(
    text: &mut String,
    (name, kind, help): (&str, &str, &str),
    values: impl Iterator<Item = (String, u64)>,
) {
    // Writing to a string cannot fail.
    let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
    for (labels, value) in values {
        let _ = writeln!(text, "{name}{labels} {value}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_family_has_its_type_and_values() {
        let gauges = Gauges {
            endpoints: 2,
            flows: BTreeMap::from([("FLOWS", 7)]),
            map_sizes: BTreeMap::from([("VIPS", 9)]),
            ..Gauges::default()
        };
        let text = render(&[("not_linked", 3)], &gauges);
        for line in [
            "# TYPE weft_refused_packets_total counter",
            "weft_refused_packets_total{reason=\"not_linked\"} 3",
            "weft_flows{map=\"FLOWS\"} 7",
            "weft_map_entries_limit{map=\"VIPS\"} 9",
            "weft_endpoints 2",
        ] {
            assert!(
                text.lines().any(|found| found == line),
                "{line} is not in:\n{text}"
            );
        }
    }
}
