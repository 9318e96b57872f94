//! Takes the flow log out of the kernel's ring, gives the events their names, and tells them to who follows.
//!
//! The ring is read always, so that a probe is seen whoever follows; the programs sample flows only while somebody
//! does. Nobody is waited for: a follower that falls [`BEHIND`] messages back has lost some and is cut off by
//! its door.

use std::{
    collections::BTreeMap,
    io,
    sync::Arc,
    time::{Duration, SystemTime},
};

use netmanager_api::observe::{FlowsRequest, Said};
use tokio::{
    io::unix::AsyncFd,
    sync::{broadcast, mpsc, oneshot},
    time::{MissedTickBehavior, interval},
};

use super::{Ask, Names, told::told};
use crate::{
    daemon::monotonic,
    datapath::{DatapathError, FlowLog, LogCounters, LogCounts},
    follow::chain,
};

/// How many messages a follower may be behind.
const BEHIND: usize = 1_024;
/// How many may follow at once.
const MAX_FOLLOWERS: usize = 8;
/// How many events are taken before others have their turn.
const BATCH: usize = 256;
/// How often it is said what was lost.
const LOST_EVERY: Duration = Duration::from_secs(1);

/// What the door asks of the reader.
#[derive(Debug)]
pub(super) enum Order {
    /// Wants events.
    Join(FlowsRequest, oneshot::Sender<Result<Joined, String>>),
    /// Only wants the events of probes.
    Listen(oneshot::Sender<broadcast::Receiver<Arc<Said>>>),
    /// Has gone.
    Leave(u64),
}

/// A follower's end.
#[derive(Debug)]
pub(super) struct Joined {
    pub(super) messages: broadcast::Receiver<Arc<Said>>,
    /// What is sampled now.
    pub(super) following: Said,
    number: u64,
    orders: mpsc::UnboundedSender<Order>,
}

impl Drop for Joined {
    fn drop(&mut self) {
        // Fails only where the reader is gone, and its sample with it.
        let _ = self.orders.send(Order::Leave(self.number));
    }
}

/// The reader's state.
pub(super) struct Reader {
    log: AsyncFd<FlowLog>,
    counters: LogCounters,
    asks: mpsc::Sender<Ask>,
    told: broadcast::Sender<Arc<Said>>,
    orders: mpsc::UnboundedSender<Order>,
    followers: BTreeMap<u64, FlowsRequest>,
    next: u64,
    lost: LogCounts,
}

impl Reader {
    /// A reader that samples nothing yet.
    ///
    /// # Errors
    /// When the ring cannot be waited for or its maps cannot be used.
    pub(super) fn new(
        log: FlowLog,
        counters: LogCounters,
        asks: mpsc::Sender<Ask>,
        orders: mpsc::UnboundedSender<Order>,
    ) -> io::Result<Self> {
        let lost = counters.read().unwrap_or_default();
        let mut reader = Self {
            log: log.watched()?,
            counters,
            asks,
            told: broadcast::Sender::new(BEHIND),
            orders,
            followers: BTreeMap::new(),
            next: 0,
            lost,
        };
        // A predecessor may have been killed while somebody followed.
        if let Err(error) = reader.sample() {
            tracing::warn!(error = chain(&error), "failed to set the flow log's sample");
        }
        Ok(reader)
    }

    /// Serves until the door is gone.
    pub(super) async fn run(mut self, mut orders: mpsc::UnboundedReceiver<Order>) {
        let mut ticks = interval(LOST_EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                order = orders.recv() => match order {
                    Some(order) => self.obey(order),
                    None => return,
                },
                ready = self.log.readable_mut() => match ready {
                    Ok(mut guard) => {
                        let mut events = Vec::new();
                        while events.len() < BATCH {
                            match guard.get_inner_mut().next_event() {
                                Some(event) => events.push(event),
                                None => {
                                    guard.clear_ready();
                                    break;
                                }
                            }
                        }
                        self.tell(&events).await;
                    }
                    Err(error) => {
                        tracing::error!(%error, "the flow log cannot be read any more");
                        return;
                    }
                },
                _ = ticks.tick(), if !self.followers.is_empty() => self.tell_lost(),
            }
        }
    }

    async fn tell(&self, events: &[ebpf_common::layout::Event]) {
        if events.is_empty() || self.told.receiver_count() == 0 {
            return;
        }
        let names = names(&self.asks).await;
        // Both clocks now: a moment of the one is a moment of the other.
        let (now, wall) = (monotonic(), wall());
        for event in events {
            let ago = now.saturating_sub(Duration::from_nanos(event.time_ns));
            let time_ms = wall.saturating_sub(ago).as_millis() as u64;
            // Nobody listens any more: nothing is lost.
            let _ = self
                .told
                .send(Arc::new(Said::Flow(Box::new(told(event, &names, time_ms)))));
        }
    }

    fn tell_lost(&mut self) {
        let Ok(now) = self.counters.read() else {
            return;
        };
        let (limited, full) = (
            now.limited.saturating_sub(self.lost.limited),
            now.full.saturating_sub(self.lost.full),
        );
        self.lost = now;
        if limited + full > 0 {
            let _ = self.told.send(Arc::new(Said::Lost { limited, full }));
        }
    }

    fn obey(&mut self, order: Order) {
        match order {
            Order::Join(wish, reply) => {
                let joined = self.join(wish);
                // Who is gone leaves at once, by the drop of what it would have got.
                let _ = reply.send(joined);
            }
            Order::Listen(reply) => {
                let _ = reply.send(self.told.subscribe());
            }
            Order::Leave(number) => {
                self.followers.remove(&number);
                if let Err(error) = self.sample() {
                    tracing::warn!(error = chain(&error), "failed to set the flow log's sample");
                }
            }
        }
    }

    fn join(&mut self, wish: FlowsRequest) -> Result<Joined, String> {
        if self.followers.len() >= MAX_FOLLOWERS {
            return Err(format!(
                "{MAX_FOLLOWERS} clients follow the flows of this node already: end one of them"
            ));
        }
        if wish.sample_every == 0 || wish.per_second == 0 {
            return Err("--sample and --per-second must be at least 1".to_owned());
        }
        if self.followers.is_empty() {
            self.lost = self.counters.read().unwrap_or_default();
        }
        self.next += 1;
        self.followers.insert(self.next, wish);
        let (sample_every, per_second) = self.sample().map_err(|error| {
            self.followers.remove(&self.next);
            chain(&error)
        })?;
        Ok(Joined {
            messages: self.told.subscribe(),
            following: Said::Following {
                sample_every,
                per_second,
            },
            number: self.next,
            orders: self.orders.clone(),
        })
    }

    /// Tells the kernel the most that anybody wants.
    fn sample(&mut self) -> Result<(u32, u32), DatapathError> {
        let wishes = self.followers.values();
        let sample_every = wishes.clone().map(|wish| wish.sample_every).min();
        let per_second = wishes.map(|wish| wish.per_second).max();
        let sample = (sample_every.unwrap_or(0), per_second.unwrap_or(0));
        self.log.get_mut().sample(sample.0, sample.1)?;
        Ok(sample)
    }
}

/// What the numbers stand for, as the daemon knows it; nothing has a name where it is gone.
pub(super) async fn names(asks: &mpsc::Sender<Ask>) -> Arc<Names> {
    let (sender, receiver) = oneshot::channel();
    match asks.send(Ask::Names(sender)).await {
        Ok(()) => receiver.await.unwrap_or_default(),
        Err(_) => Arc::default(),
    }
}

fn wall() -> Duration {
    SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default()
}
