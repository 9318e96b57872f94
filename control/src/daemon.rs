//! `weft lead`, and what daemons need.

use std::{collections::BTreeMap, net::SocketAddr, num::NonZeroU32, path::PathBuf, time::Duration};

use anyhow::{Context, anyhow, ensure};
use clap::Args;
use control_core::goal::Bytes;
use tokio::{
    runtime::{Builder, Runtime},
    signal::unix::{SignalKind, signal},
};
use tokio_util::sync::CancellationToken;
use weft_lead::{Options, REQUESTS, Timers};

use crate::heap;

/// Threads of a daemon: enough that one may wait for the disk; more would only cost memory.
const THREADS: usize = 2;

/// How a lead runs.
#[derive(Debug, Args)]
pub(crate) struct Daemon {
    /// Its name, as in its certificate.
    #[arg(long)]
    name: String,
    /// Where its database is.
    #[arg(long, value_name = "DIR")]
    data: PathBuf,
    /// The folder with tls.crt, tls.key and ca.crt, role lead.
    #[arg(long, value_name = "DIR")]
    credentials: PathBuf,
    /// Where it listens for users, agents and leads.
    #[arg(long, value_name = "IP:PORT")]
    listen: SocketAddr,
    /// Where the others find it; as --listen when it is left out.
    #[arg(long, value_name = "IP:PORT")]
    advertise: Option<SocketAddr>,
    /// Where it takes tokens for the control API (weft token); nowhere when it is left out.
    #[arg(long, value_name = "IP:PORT")]
    listen_tokens: Option<SocketAddr>,
    /// The mesh file; needed on the first start.
    #[arg(long, value_name = "FILE")]
    mesh: Option<PathBuf>,
    /// A lead of a new group, this one too; needed on the first start, the same list for every lead.
    #[arg(long = "peer", value_name = "NAME=IP:PORT", value_parser = peer, conflicts_with = "join")]
    peers: Vec<(String, SocketAddr)>,
    /// A lead of the group that this one joins; needed on the first start of a lead that was added.
    #[arg(long, value_name = "NAME=IP:PORT", value_parser = peer, value_delimiter = ',')]
    join: Vec<(String, SocketAddr)>,
    /// How long a cluster may be silent before it is lost; counts on the first start.
    #[arg(long, default_value = "10s", value_parser = duration)]
    lease: Duration,
    /// Time between two heartbeats of the leader, and the limit of one; at least this long, and longer where the leads are far apart.
    #[arg(long, default_value = "250ms", value_parser = duration)]
    heartbeat: Duration,
    /// How long a lead believes in a silent leader before it stands for election; at least this long, and three heartbeats.
    #[arg(long, default_value = "750ms", value_parser = duration)]
    election: Duration,
    /// How much of its disk is not for changes: with less free it lets another lead, and where no majority has more, changes are
    /// refused. 256Mi, or a twentieth of a smaller disk, when it is left out.
    #[arg(long, value_name = "SIZE")]
    disk_reserve: Option<Bytes>,
    /// How many requests a user, a token or an agent may make in a second, at this lead; twice as many at once.
    #[arg(long, value_name = "COUNT", default_value_t = REQUESTS)]
    requests_per_second: NonZeroU32,
}

impl Daemon {
    pub(crate) fn run(self) -> anyhow::Result<()> {
        let count = self.peers.len();
        let peers: BTreeMap<_, _> = self.peers.into_iter().collect();
        ensure!(peers.len() == count, "--peer names a lead twice");
        let options = Options {
            name: self.name,
            data: self.data,
            credentials: self.credentials,
            listen: self.listen,
            advertise: self.advertise,
            tokens: self.listen_tokens,
            mesh: self.mesh,
            peers,
            join: self.join.into_iter().collect(),
            lease: self.lease,
            timers: Timers {
                heartbeat_ms: millis(self.heartbeat),
                lease_ms: millis(self.election),
            },
            reserve: self.disk_reserve.map(Bytes::get),
            requests_per_second: self.requests_per_second,
        };
        heap::keep();
        runtime()?.block_on(async {
            let shutdown = CancellationToken::new();
            end_on_signal(shutdown.clone())?;
            Ok(weft_lead::run(options, shutdown).await?)
        })
    }
}

/// A daemon's runtime.
pub(crate) fn runtime() -> anyhow::Result<Runtime> {
    Builder::new_multi_thread()
        .worker_threads(THREADS)
        .enable_all()
        .build()
        .context("failed to start the runtime")
}

fn end_on_signal(shutdown: CancellationToken) -> anyhow::Result<()> {
    let catch = |kind| signal(kind).context("failed to wait for signals");
    let (mut interrupt, mut terminate) = (
        catch(SignalKind::interrupt())?,
        catch(SignalKind::terminate())?,
    );
    tokio::spawn(async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
        tracing::info!("ending");
        shutdown.cancel();
    });
    Ok(())
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn peer(text: &str) -> anyhow::Result<(String, SocketAddr)> {
    let (name, address) = text
        .split_once('=')
        .ok_or_else(|| anyhow!("expected NAME=IP:PORT"))?;
    Ok((name.to_owned(), address.parse()?))
}

/// `10s`, `250ms` or `2m`.
pub(crate) fn duration(text: &str) -> anyhow::Result<Duration> {
    let split = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let number: u64 = number
        .parse()
        .context("expected a number and a unit, like 10s")?;
    ensure!(number > 0, "it must be more than nothing");
    match unit {
        "ms" => Ok(Duration::from_millis(number)),
        "s" => Ok(Duration::from_secs(number)),
        "m" => Ok(Duration::from_secs(number.saturating_mul(60))),
        _ => Err(anyhow!("unknown unit {unit:?}: use ms, s or m")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_duration_has_a_unit() {
        assert_eq!(duration("250ms").unwrap(), Duration::from_millis(250));
        assert_eq!(duration("10s").unwrap(), Duration::from_secs(10));
        assert_eq!(duration("2m").unwrap(), Duration::from_secs(120));
        for bad in [
            "",
            "10",
            "s",
            "1h",
            "-1s",
            "0s",
            "1.5s",
            "99999999999999999999s",
        ] {
            assert!(duration(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_peer_has_a_name_and_an_address() {
        assert_eq!(
            peer("a=[::1]:7").unwrap(),
            ("a".to_owned(), "[::1]:7".parse().unwrap())
        );
        for bad in ["a", "a=", "a=host:7", "a=1.2.3.4"] {
            assert!(peer(bad).is_err(), "{bad:?}");
        }
    }
}
