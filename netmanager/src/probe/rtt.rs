//! Who answers, and how fast: the state of the echo probes, without sockets and clocks.
//!
//! ```text
//!            answer                         third miss in a row
//! unknown -----------> reachable(rtt) <---------------------------> unreachable
//!    '-------------------- third miss in a row ------------------------^
//! ```
//!
//! A node asks at most [`BUDGET`] questions a second, however large the mesh is. A peer whose backends are in use
//! is asked once a second, as long as there are no more than [`IN_USE`] of them; the others share what is left, at
//! most once a second each: they are there for the network coordinates. A peer that missed a question is asked
//! again at once, so that a peer in use which falls silent is unreachable after at most [`SILENT`]. The next
//! question is never asked before the last one was answered or missed. Time is the time since the prober began.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

/// Shortest time between two questions to one peer.
pub const INTERVAL: Duration = Duration::from_secs(1);
/// A question not answered by then is missed.
pub const TIMEOUT: Duration = Duration::from_secs(1);
/// Misses in a row that make a peer unreachable.
pub const MISSES: u32 = 3;
/// Questions a second in all; as many may be asked at once after a pause.
pub const BUDGET: u32 = 64;
/// Questions a second that peers in use may take of the budget.
pub const IN_USE: u32 = 48;
/// From the last answer of a peer in use to its third miss: an interval, its jitter, and three misses.
pub const SILENT: Duration = Duration::from_millis(1_000 + 200 + 3 * 1_000);
/// Added to an interval is at most a fifth of it, so that nodes that started together do not ask together.
const JITTER: u32 = 5;
/// The first question to a new peer waits at most this long.
const FIRST: Duration = Duration::from_millis(50);
/// Weight of a new sample is one in this many (RFC 6298 section 2: alpha = 1/8).
const SMOOTHING: u32 = 8;
/// So many samples in a row on one side of the smoothed time are a new path, not noise: it is taken at once.
const STRAYS: usize = 3;
/// A sample strays when it is this far from the smoothed time, microseconds ...
const STRAY_US: u32 = 1_000;
/// ... and one in this many of it.
const STRAY_RATIO: u32 = 4;
/// A reported time stays while the smoothed one is within this many microseconds of it ...
const STICKY_US: u32 = 100;
/// ... or within one in this many of it: `closest` must not follow noise.
const STICKY_RATIO: u32 = 8;

/// Why a peer is probed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Interest {
    /// Backends on it may get this node's flows.
    InUse,
    /// It is a peer: its distance tells where this node is.
    Known,
}

/// A question to send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ask {
    /// The node to ask.
    pub node: u32,
    /// What the answer must repeat.
    pub sequence: u64,
}

/// What an answer changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answered {
    /// It was missed already, or never asked for.
    Late,
    /// The time that is reported stays.
    Same,
    /// The time that is reported is another.
    Changed,
}

/// One peer's probes.
#[derive(Clone, Debug, PartialEq, Eq)]
struct PeerProbe {
    interest: Interest,
    due: Duration,
    open: Option<(u64, Duration)>,
    misses: u32,
    smoothed_us: Option<u32>,
    strays: Vec<u32>,
    reported_us: Option<u32>,
}

impl PeerProbe {
    /// Takes a sample into the smoothed time.
    fn smooth(&mut self, sample: u32) -> u32 {
        let Some(old) = self.smoothed_us else {
            return sample;
        };
        let same_side = self
            .strays
            .last()
            .is_none_or(|last| (*last > old) == (sample > old));
        if sample.abs_diff(old) <= STRAY_US.max(old / STRAY_RATIO) || !same_side {
            self.strays.clear();
        } else {
            self.strays.push(sample);
        }
        if self.strays.len() < STRAYS {
            return old - old / SMOOTHING + sample / SMOOTHING;
        }
        let mut strays = std::mem::take(&mut self.strays);
        strays.sort_unstable();
        strays[STRAYS / 2]
    }
}

/// The probes of all peers.
#[derive(Clone, Debug, Default)]
pub struct Rtts {
    peers: BTreeMap<u32, PeerProbe>,
    pace: Pace,
    budget: Budget,
    sequence: u64,
    seed: u64,
}

/// How often one peer is asked.
#[derive(Clone, Copy, Debug, Default)]
struct Pace {
    in_use: Duration,
    known: Duration,
}

impl Pace {
    fn of(peers: &BTreeMap<u32, Interest>) -> Self {
        let in_use = peers
            .values()
            .filter(|interest| **interest == Interest::InUse)
            .count() as u32;
        let known = peers.len() as u32 - in_use;
        let left = BUDGET - in_use.min(IN_USE);
        Self {
            in_use: INTERVAL.max(INTERVAL * in_use / IN_USE),
            known: INTERVAL.max(INTERVAL * known / left),
        }
    }

    fn interval(&self, interest: Interest) -> Duration {
        match interest {
            Interest::InUse => self.in_use,
            Interest::Known => self.known,
        }
    }
}

/// The questions that may still be asked (a virtual clock: ITU-T I.371, generic cell rate algorithm).
#[derive(Clone, Copy, Debug, Default)]
struct Budget {
    paid_until: Duration,
}

impl Budget {
    /// When the next question may be asked.
    fn free_at(self) -> Duration {
        self.paid_until.saturating_sub(INTERVAL)
    }

    fn take(&mut self, now: Duration) -> bool {
        if self.free_at() > now {
            return false;
        }
        self.paid_until = self.paid_until.max(now) + INTERVAL / BUDGET;
        true
    }
}

impl Rtts {
    /// No peers; `seed` spreads the questions of this node in time.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self {
            seed,
            ..Self::default()
        }
    }

    /// Probes exactly `peers` from now on; those that stay keep what was measured.
    pub fn set(&mut self, peers: &BTreeMap<u32, Interest>, now: Duration) {
        self.peers.retain(|node, _| peers.contains_key(node));
        self.pace = Pace::of(peers);
        for (node, interest) in peers {
            let seed = self.seed;
            let peer = self.peers.entry(*node).or_insert_with(|| PeerProbe {
                interest: *interest,
                due: now + share(FIRST, mix(seed ^ u64::from(*node))),
                open: None,
                misses: 0,
                smoothed_us: None,
                strays: Vec::new(),
                reported_us: None,
            });
            peer.interest = *interest;
            let latest = now + self.pace.interval(*interest);
            if peer.open.is_none() && peer.due > latest {
                peer.due = now + share(latest - now, mix(seed ^ u64::from(*node)));
            }
        }
    }

    /// When [`Rtts::tick`] has something to do next.
    #[must_use]
    pub fn next(&self) -> Option<Duration> {
        self.peers
            .values()
            .map(|peer| match peer.open {
                Some((_, sent)) => sent + TIMEOUT,
                None => peer.due.max(self.budget.free_at()),
            })
            .min()
    }

    /// Notes what was missed by `now` and returns the questions that are due: those in use first, then the oldest.
    pub fn tick(&mut self, now: Duration) -> Vec<Ask> {
        let mut due = Vec::new();
        for (node, peer) in &mut self.peers {
            if peer.open.is_some_and(|(_, sent)| now >= sent + TIMEOUT) {
                peer.open = None;
                peer.due = now;
                peer.misses = peer.misses.saturating_add(1);
                if peer.misses >= MISSES {
                    peer.smoothed_us = None;
                    peer.strays.clear();
                    peer.reported_us = None;
                }
            }
            if now >= peer.due && peer.open.is_none() {
                due.push((peer.interest, peer.due, *node));
            }
        }
        due.sort_unstable();
        let mut asks = Vec::new();
        for (_, _, node) in due {
            if !self.budget.take(now) {
                break;
            }
            let peer = self.peers.get_mut(&node).expect("it was listed just now");
            let interval = self.pace.interval(peer.interest);
            self.sequence += 1;
            let jitter = mix(self.seed ^ u64::from(node) ^ (self.sequence << 32));
            peer.open = Some((self.sequence, now));
            peer.due = now + interval + share(interval / JITTER, jitter);
            asks.push(Ask {
                node,
                sequence: self.sequence,
            });
        }
        asks
    }

    /// Notes an answer of `node`.
    pub fn answered(&mut self, node: u32, sequence: u64, now: Duration) -> Answered {
        let Some(peer) = self.peers.get_mut(&node) else {
            return Answered::Late;
        };
        let Some((_, sent)) = peer
            .open
            .take_if(|(open, sent)| *open == sequence && now < *sent + TIMEOUT)
        else {
            return Answered::Late;
        };
        peer.misses = 0;
        let sample = u32::try_from(now.saturating_sub(sent).as_micros())
            .expect("an answer in time takes less than a second");
        let smoothed = peer.smooth(sample);
        peer.smoothed_us = Some(smoothed);
        if let Some(reported) = peer.reported_us
            && smoothed.abs_diff(reported) <= STICKY_US.max(reported / STICKY_RATIO)
        {
            return Answered::Same;
        }
        peer.reported_us = Some(smoothed);
        Answered::Changed
    }

    /// The smoothed time of one that answers, microseconds.
    #[must_use]
    pub fn smoothed_us(&self, node: u32) -> Option<u32> {
        self.peers.get(&node)?.smoothed_us
    }

    /// The smoothed times of those that answer, in microseconds; small changes are not shown.
    #[must_use]
    pub fn rtt_us(&self) -> BTreeMap<u32, u32> {
        self.peers
            .iter()
            .filter_map(|(node, peer)| Some((*node, peer.reported_us?)))
            .collect()
    }

    /// Those that missed the last [`MISSES`] questions.
    #[must_use]
    pub fn unreachable(&self) -> BTreeSet<u32> {
        self.peers
            .iter()
            .filter(|(_, peer)| peer.misses >= MISSES)
            .map(|(node, _)| *node)
            .collect()
    }
}

/// A part of `whole` chosen by `random`.
fn share(whole: Duration, random: u64) -> Duration {
    let nanos = u64::try_from(whole.as_nanos()).expect("a jitter is less than a second");
    Duration::from_nanos(random % nanos)
}

/// Spreads a number over all 64 bits (the finaliser of splitmix64).
pub(super) const fn mix(number: u64) -> u64 {
    let number = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let number = (number ^ (number >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    number ^ (number >> 31)
}

#[cfg(test)]
mod tests;
