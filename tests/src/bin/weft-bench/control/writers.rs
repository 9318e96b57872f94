//! The load: writers that change something, wait for the acknowledgement, and change something again.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use bytes::Bytes;
use futures::future::try_join_all;
use http::Request;
use http_body_util::Full;

use weft_tests::leads::{
    self as weft, Leads,
    client::{Answer, Connection, Door},
};

use super::etcd::{self, Etcd};

/// How many write at once.
pub(super) const WRITERS: usize = 64;
/// How many things each of them changes in turn.
const EACH: u64 = 4;

/// How a store is changed.
#[derive(Clone, Copy, Debug)]
struct Change {
    /// The thing `key` as of `turn`, other than as of any other turn.
    request: fn(key: &str, turn: u64) -> Request<Full<Bytes>>,
    /// Whether the answer says that it is done.
    check: fn(&Answer) -> Result<()>,
}

/// The writers at one store, connected.
#[derive(Debug)]
pub(super) struct Writers {
    connections: Vec<Connection>,
    change: Change,
    /// Turns that are over.
    turn: u64,
}

/// What was acknowledged.
#[derive(Debug)]
pub(super) struct Written {
    time: Duration,
    /// Of each change, shortest first.
    latencies: Vec<Duration>,
    /// How many were acknowledged in time.
    in_time: usize,
}

impl Writers {
    pub(super) async fn of_weft(leads: &Leads) -> Result<Self> {
        let change = Change {
            request: weft::change,
            check: weft::check,
        };
        Self::connect(leads.doors(), change).await
    }

    pub(super) async fn of_etcd(etcd: &Etcd) -> Result<Self> {
        let change = Change {
            request: etcd::put,
            check: etcd::check,
        };
        Self::connect(etcd.doors(), change).await
    }

    async fn connect(doors: &[Door], change: Change) -> Result<Self> {
        let spread = doors.iter().cycle().take(WRITERS);
        Ok(Self {
            connections: try_join_all(spread.map(Door::open)).await?,
            change,
            turn: 0,
        })
    }

    /// All write for `time`.
    pub(super) async fn write(&mut self, time: Duration) -> Result<Written> {
        let started = Instant::now();
        let end = started + time;
        let (first, change) = (self.turn, self.change);
        let writer = |(number, connection): (usize, _)| {
            let connection: &Connection = connection;
            async move {
                let mut latencies = Vec::new();
                let mut in_time = 0;
                let mut turn = first;
                let mut now = Instant::now();
                while now < end {
                    let key = format!("w{number:02}-{}", turn % EACH);
                    let answer = connection.ask((change.request)(&key, turn)).await;
                    let answer = answer.and_then(|answer| (change.check)(&answer));
                    answer.with_context(|| format!("a change of {key} failed"))?;
                    let done = Instant::now();
                    latencies.push(done - now);
                    in_time += usize::from(done <= end);
                    now = done;
                    turn += 1;
                }
                anyhow::Ok((latencies, in_time, turn))
            }
        };
        let all = try_join_all(self.connections.iter().enumerate().map(writer)).await?;
        let mut written = Written {
            time,
            latencies: Vec::new(),
            in_time: 0,
        };
        for (latencies, in_time, turn) in all {
            written.latencies.extend(latencies);
            written.in_time += in_time;
            self.turn = self.turn.max(turn);
        }
        written.latencies.sort();
        Ok(written)
    }
}

impl Written {
    /// All changes.
    pub(super) fn count(&self) -> usize {
        self.latencies.len()
    }

    /// Those that were acknowledged in time.
    pub(super) fn per_second(&self) -> f64 {
        self.in_time as f64 / self.time.as_secs_f64()
    }

    /// How long the changes took at the most, but for the slowest.
    pub(super) fn latency(&self, share: f64) -> Duration {
        let rank = (self.latencies.len() as f64 * share).ceil() as usize;
        let at = rank.saturating_sub(1);
        self.latencies.get(at).copied().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_percentile_is_the_smallest_time_that_so_many_did_not_exceed() {
        let written = |count: u64| Written {
            time: Duration::from_secs(2),
            latencies: (1..=count).map(Duration::from_millis).collect(),
            in_time: 50,
        };
        let all = written(100);
        assert_eq!(all.latency(0.50), Duration::from_millis(50));
        assert_eq!(all.latency(0.99), Duration::from_millis(99));
        assert_eq!(written(1).latency(0.99), Duration::from_millis(1));
        assert_eq!(written(10).latency(0.99), Duration::from_millis(10));
        assert_eq!((all.count(), all.per_second()), (100, 25.0));
    }
}
