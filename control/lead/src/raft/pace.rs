//! The timers in force on this lead, shared by all who wait.

use std::{
    collections::BTreeSet,
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep};

use super::{
    Raft,
    timers::{Tempo, Timers, follow},
    ways::Ways,
};

/// Where a lead is asked how far the others are.
pub(crate) const PULSE: &str = "/raft/v1/pulse";

/// What a lead answers there, at once: neither Raft nor the disk has a part in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Pulse {
    /// Who answers. Who can be asked this keeps the promises that a leader asks for ([`super::promise`]).
    pub(crate) id: u64,
    /// Its longest way to another lead and back, microseconds.
    #[serde(default)]
    pub(crate) rtt_us: Option<u64>,
}

/// What a lead says of how it keeps pace with the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Paced {
    /// Its longest way to another lead and back, microseconds; `None` where none is measured yet.
    pub(crate) rtt_us: Option<u64>,
    /// Between two heartbeats of its own, milliseconds.
    pub(crate) heartbeat_ms: u64,
    /// How long it believes in a silent leader, milliseconds.
    pub(crate) lease_ms: u64,
}

#[derive(Debug, Default)]
struct Inner {
    ways: Ways,
    /// The round trip that the timers go by.
    trip: Duration,
    /// The members that were asked for a pulse and gave one.
    answered: BTreeSet<u64>,
}

#[derive(Debug)]
struct Shared {
    base: Timers,
    inner: Mutex<Inner>,
    is_hushed: AtomicBool,
}

/// See the module.
#[derive(Clone, Debug)]
pub(crate) struct Pace(Arc<Shared>);

impl Pace {
    pub(crate) fn new(base: Timers) -> Self {
        Self(Arc::new(Shared {
            base,
            inner: Mutex::default(),
            is_hushed: AtomicBool::new(false),
        }))
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The least that the timers can be.
    pub(crate) fn base(&self) -> Timers {
        self.0.base
    }

    /// The timers now.
    pub(crate) fn tempo(&self) -> Tempo {
        self.0.base.at(self.inner().trip)
    }

    /// [`Tempo::heartbeat`] now.
    pub(crate) fn heartbeat(&self) -> Duration {
        self.tempo().heartbeat
    }

    /// [`Tempo::lease`] now.
    pub(crate) fn lease(&self) -> Duration {
        self.tempo().lease
    }

    /// [`Tempo::stagger`] now.
    pub(crate) fn stagger(&self) -> Duration {
        self.tempo().stagger
    }

    /// The longest way of this lead's own to another one and back, microseconds.
    fn rtt_us(&self) -> Option<u64> {
        let own = self.inner().ways.own();
        own.map(|rtt| u64::try_from(rtt.as_micros()).unwrap_or(u64::MAX))
    }

    /// What this lead, `id`, answers who asks for its pulse.
    pub(crate) fn pulse(&self, id: u64) -> Pulse {
        Pulse {
            id,
            rtt_us: self.rtt_us(),
        }
    }

    /// What this lead says of itself.
    pub(crate) fn told(&self) -> Paced {
        let Tempo {
            heartbeat, lease, ..
        } = self.tempo();
        let ms = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        Paced {
            rtt_us: self.rtt_us(),
            heartbeat_ms: ms(heartbeat),
            lease_ms: ms(lease),
        }
    }

    /// The lead at `to` gave its pulse after `took`, or did not.
    pub(crate) fn note(&self, to: SocketAddr, took: Duration, pulse: Option<Pulse>) {
        let now = Instant::now();
        let mut inner = self.inner();
        match pulse {
            Some(Pulse { id, rtt_us }) => {
                inner.answered.insert(id);
                let said = rtt_us.map(Duration::from_micros);
                inner.ways.answered(to, took, said, now);
            }
            None => inner.ways.failed(to),
        }
        if let Some(longest) = inner.ways.longest(now) {
            let trip = follow(inner.trip, longest);
            let (before, after) = (self.0.base.at(inner.trip), self.0.base.at(trip));
            inner.trip = trip;
            if before != after {
                let Tempo {
                    heartbeat, lease, ..
                } = after;
                tracing::info!(rtt = ?longest, ?heartbeat, ?lease, "the timers follow the network");
            }
        }
    }

    /// Forgets the ways to others than these.
    pub(crate) fn keep(&self, leads: &[SocketAddr]) {
        self.inner().ways.keep(leads);
    }

    /// Whether the ways are measured well enough to go by.
    pub(crate) fn is_known(&self) -> bool {
        self.inner().ways.are_known()
    }

    /// How much of the lease that a message asked for this member grants: an older one knows only its own.
    pub(super) fn granted(&self, by: u64, asked: Duration) -> Duration {
        match self.inner().answered.contains(&by) {
            true => asked,
            false => asked.min(self.0.base.lease()),
        }
    }

    /// No heartbeats, until what this returns is dropped.
    pub(super) fn hush(&self) -> Hush<'_> {
        self.0.is_hushed.store(true, Ordering::Relaxed);
        Hush(self)
    }

    /// Sends this lead's heartbeats while it leads; ends when Raft does. openraft's own interval is fixed.
    pub(crate) async fn beat(self, raft: Raft) {
        loop {
            if !self.0.is_hushed.load(Ordering::Relaxed)
                && raft.trigger().heartbeat().await.is_err()
            {
                return;
            }
            sleep(self.heartbeat()).await;
        }
    }
}

/// See [`Pace::hush`].
pub(super) struct Hush<'a>(&'a Pace);

impl Drop for Hush<'_> {
    fn drop(&mut self) {
        self.0.0.is_hushed.store(false, Ordering::Relaxed);
    }
}
