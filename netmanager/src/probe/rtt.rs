//! Who answers, and how fast: the state of the echo probes, without sockets and clocks.
//!
//! ```text
//!            answer                         third miss in a row
//! unknown -----------> reachable(rtt) <---------------------------> unreachable
//!    '-------------------- third miss in a row ------------------------^
//! ```
//!
//! Time is the time since the prober began. Each peer is asked about once a second; the next question is
//! never asked before the last one was answered or missed.

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
/// Added to the interval at most, so that nodes that started together do not ask together.
const JITTER: Duration = Duration::from_millis(200);
/// The first question to a new peer waits at most this long.
const FIRST: Duration = Duration::from_millis(50);
/// Weight of a new sample is one in this many (RFC 6298 section 2: alpha = 1/8).
const SMOOTHING: u32 = 8;
/// A reported time stays while the smoothed one is within this many microseconds of it ...
const STICKY_US: u32 = 100;
/// ... or within one in this many of it: `closest` must not follow noise.
const STICKY_RATIO: u32 = 8;

/// A question to send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ask {
    /// The node to ask.
    pub node: u32,
    /// What the answer must repeat.
    pub sequence: u64,
}

/// One peer's probes.
#[derive(Clone, Debug, PartialEq, Eq)]
struct PeerProbe {
    due: Duration,
    open: Option<(u64, Duration)>,
    misses: u32,
    smoothed_us: Option<u32>,
    reported_us: Option<u32>,
}

/// The probes of all peers.
#[derive(Clone, Debug, Default)]
pub struct Rtts {
    peers: BTreeMap<u32, PeerProbe>,
    sequence: u64,
    seed: u64,
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

    /// Probes exactly `nodes` from now on; those that stay keep what was measured.
    pub fn set(&mut self, nodes: &BTreeSet<u32>, now: Duration) {
        self.peers.retain(|node, _| nodes.contains(node));
        for node in nodes {
            let seed = self.seed;
            self.peers.entry(*node).or_insert_with(|| PeerProbe {
                due: now + share(FIRST, mix(seed ^ u64::from(*node))),
                open: None,
                misses: 0,
                smoothed_us: None,
                reported_us: None,
            });
        }
    }

    /// When [`Rtts::tick`] has something to do next.
    #[must_use]
    pub fn next(&self) -> Option<Duration> {
        self.peers
            .values()
            .map(|peer| match peer.open {
                Some((_, sent)) => peer.due.min(sent + TIMEOUT),
                None => peer.due,
            })
            .min()
    }

    /// Notes what was missed by `now` and returns the questions that are due.
    pub fn tick(&mut self, now: Duration) -> Vec<Ask> {
        let mut asks = Vec::new();
        for (node, peer) in &mut self.peers {
            if peer.open.is_some_and(|(_, sent)| now >= sent + TIMEOUT) {
                peer.open = None;
                peer.misses = peer.misses.saturating_add(1);
                if peer.misses >= MISSES {
                    peer.smoothed_us = None;
                    peer.reported_us = None;
                }
            }
            if now >= peer.due && peer.open.is_none() {
                self.sequence += 1;
                let jitter = mix(self.seed ^ u64::from(*node) ^ (self.sequence << 32));
                peer.open = Some((self.sequence, now));
                peer.due = now + INTERVAL + share(JITTER, jitter);
                asks.push(Ask {
                    node: *node,
                    sequence: self.sequence,
                });
            }
        }
        asks
    }

    /// Notes an answer of `node`; one that was missed already, or never asked for, counts for nothing. Returns
    /// whether what is reported changed.
    pub fn answered(&mut self, node: u32, sequence: u64, now: Duration) -> bool {
        let Some(peer) = self.peers.get_mut(&node) else {
            return false;
        };
        let Some((_, sent)) = peer
            .open
            .take_if(|(open, sent)| *open == sequence && now < *sent + TIMEOUT)
        else {
            return false;
        };
        peer.misses = 0;
        let sample = u32::try_from(now.saturating_sub(sent).as_micros())
            .expect("an answer in time takes less than a second");
        let smoothed = match peer.smoothed_us {
            Some(old) => old - old / SMOOTHING + sample / SMOOTHING,
            None => sample,
        };
        peer.smoothed_us = Some(smoothed);
        if let Some(reported) = peer.reported_us
            && smoothed.abs_diff(reported) <= STICKY_US.max(reported / STICKY_RATIO)
        {
            return false;
        }
        peer.reported_us = Some(smoothed);
        true
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
fn mix(number: u64) -> u64 {
    let number = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let number = (number ^ (number >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    number ^ (number >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PEER: u32 = 7;

    fn probing() -> Rtts {
        let mut rtts = Rtts::new(1);
        rtts.set(&BTreeSet::from([PEER]), Duration::ZERO);
        rtts
    }

    /// Lets time come to the next question and returns it with its time; questions before it are missed.
    fn next_ask(rtts: &mut Rtts) -> (Ask, Duration) {
        loop {
            let now = rtts.next().unwrap();
            if let Some(ask) = rtts.tick(now).first() {
                return (*ask, now);
            }
        }
    }

    fn answer_after(rtts: &mut Rtts, micros: u64) {
        let (ask, now) = next_ask(rtts);
        rtts.answered(ask.node, ask.sequence, now + Duration::from_micros(micros));
    }

    fn miss(rtts: &mut Rtts) {
        let (_, now) = next_ask(rtts);
        rtts.tick(now + TIMEOUT);
    }

    #[test]
    fn three_misses_in_a_row_make_a_peer_unreachable_and_one_answer_reachable() {
        let mut rtts = probing();
        answer_after(&mut rtts, 500);
        for _ in 0..2 {
            miss(&mut rtts);
            miss(&mut rtts);
            assert_eq!(rtts.unreachable(), BTreeSet::new());
            assert_eq!(rtts.rtt_us(), BTreeMap::from([(PEER, 500)]));
            answer_after(&mut rtts, 500);
        }
        for _ in 0..4 {
            miss(&mut rtts);
        }
        assert_eq!(rtts.unreachable(), BTreeSet::from([PEER]));
        assert_eq!(rtts.rtt_us(), BTreeMap::new());
        answer_after(&mut rtts, 9000);
        assert_eq!(rtts.unreachable(), BTreeSet::new());
        assert_eq!(rtts.rtt_us(), BTreeMap::from([(PEER, 9000)]));
    }

    #[test]
    fn a_peer_that_never_answered_is_unknown_until_it_is_unreachable() {
        let mut rtts = probing();
        for misses in 0..5 {
            assert_eq!(rtts.rtt_us(), BTreeMap::new());
            assert_eq!(
                rtts.unreachable().len(),
                usize::from(misses >= 3),
                "{misses}"
            );
            miss(&mut rtts);
        }
    }

    #[test]
    fn questions_are_a_second_to_a_second_and_a_fifth_apart_and_one_is_open() {
        let mut rtts = probing();
        let (_, mut last) = next_ask(&mut rtts);
        assert!(last < FIRST);
        let mut gaps = BTreeSet::new();
        for _ in 0..50 {
            let (_, now) = next_ask(&mut rtts);
            let gap = now - last;
            assert!((INTERVAL..INTERVAL + JITTER).contains(&gap), "{gap:?}");
            gaps.insert(gap);
            last = now;
        }
        assert!(gaps.len() > 40, "the interval has no jitter");
    }

    #[test]
    fn late_foreign_and_repeated_answers_count_for_nothing() {
        let mut rtts = probing();
        let (ask, now) = next_ask(&mut rtts);
        let soon = now + Duration::from_millis(1);
        rtts.answered(ask.node + 1, ask.sequence, soon);
        rtts.answered(ask.node, ask.sequence + 1, soon);
        rtts.answered(ask.node, ask.sequence, now + TIMEOUT);
        assert_eq!(rtts.rtt_us(), BTreeMap::new());
        rtts.answered(ask.node, ask.sequence, soon);
        rtts.answered(ask.node, ask.sequence, now + Duration::from_millis(900));
        assert_eq!(rtts.rtt_us(), BTreeMap::from([(PEER, 1000)]));
    }

    #[test]
    fn noise_is_not_reported_and_a_change_is_within_a_few_probes() {
        let mut rtts = probing();
        for sample in [10_000, 10_800, 9_300, 11_000, 9_000, 10_500] {
            answer_after(&mut rtts, sample);
            assert_eq!(rtts.rtt_us(), BTreeMap::from([(PEER, 10_000)]), "{sample}");
        }
        let mut probes = 0;
        while rtts.rtt_us()[&PEER] < 25_000 {
            answer_after(&mut rtts, 30_000);
            probes += 1;
            assert!(probes <= 15, "{:?}", rtts.rtt_us());
        }
    }

    #[test]
    fn a_peer_that_stays_keeps_its_measurement_and_one_that_leaves_is_forgotten() {
        let mut rtts = probing();
        answer_after(&mut rtts, 700);
        rtts.set(&BTreeSet::from([PEER, 8]), Duration::from_secs(5));
        assert_eq!(rtts.rtt_us(), BTreeMap::from([(PEER, 700)]));
        rtts.set(&BTreeSet::from([8]), Duration::from_secs(6));
        assert_eq!(rtts.rtt_us(), BTreeMap::new());
        assert!(
            rtts.next()
                .is_some_and(|next| next < Duration::from_secs(6))
        );
    }
}
