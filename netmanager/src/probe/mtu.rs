//! What the path to each peer carries: the state of the padded probes, without sockets and clocks.
//!
//! ```text
//!             answer at `low`                     three misses at the size that is in use
//!  searching ------------------> settled ------------------------> doubted
//!      ^   sizes between low and high                                | the floor is answered: the path has shrunk
//!      '-------------------------------------------------------------'   (if not, the peer is silent: nothing changes)
//! ```
//!
//! A search by packets alone (RFC 8899, datagram packetization layer path MTU discovery), because an error message
//! of the underlay may never come. Sizes are of whole inner packets. The largest that the device takes is asked
//! first, so that a path without a bottleneck costs one probe; until an answer says otherwise, it is also what is
//! used. A path that is settled is asked again every [`INTERVAL`] with the size that is in use, and after
//! [`RAISE`] with larger ones. Only probes of a size tell that it is lost: while nothing at all is answered, the
//! last known size stays.
//!
//! Time is the time since the prober began. One probe to a peer is open at a time, and all peers together are asked
//! at most [`PER_SECOND`] times a second once they are settled.

use std::{collections::BTreeMap, time::Duration};

use ebpf_common::layout::PATH_FLOOR;

mod prober;

pub use prober::PathProbes;

/// How often the size in use is confirmed, where there are few peers.
pub const INTERVAL: Duration = Duration::from_secs(1);
/// A probe that has no answer by then is lost.
pub const TIMEOUT: Duration = Duration::from_millis(500);
/// Probes of one size that are lost in a row before it is taken for too large (`MAX_PROBES`, RFC 8899 5.1.2).
pub const TRIES: u32 = 3;
/// After this time a settled path is searched for a larger size (`PMTU_RAISE_TIMER`, RFC 8899 5.1.1, is ten minutes;
/// a path through a tunnel between two nodes is cheaper to ask).
pub const RAISE: Duration = Duration::from_secs(60);
/// Confirmations of all peers together.
pub const PER_SECOND: u32 = 100;
/// A search ends when no size is left that differs by more: WireGuard pads to 16 bytes.
const STEP: u32 = 16;
/// Asked second: what a tunnel over a common Ethernet carries.
const COMMON: u32 = 1420;
/// A first probe waits, so that a peer whose tunnel is being made is not asked in vain.
const FIRST: Duration = Duration::from_millis(20);

/// A probe to send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Padded {
    /// The node to ask.
    pub node: u32,
    /// What the answer must repeat.
    pub sequence: u64,
    /// Bytes of the whole packet, from the IP header on.
    pub size: u32,
}

/// What one peer's path is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// For a size between what passes and what does not.
    Searching,
    /// Whether the size in use still passes.
    Settled { raise: Duration },
    /// Whether anything passes, after the size in use did not.
    Doubted,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Open {
    sequence: u64,
    sent: Duration,
    size: u32,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Path {
    /// In use.
    mtu: u32,
    /// The largest that passed since the search began.
    low: u32,
    /// The smallest that did not.
    high: u32,
    phase: Phase,
    due: Duration,
    open: Option<Open>,
    lost: u32,
}

/// The paths to all peers.
#[derive(Clone, Debug, Default)]
pub struct Paths {
    peers: BTreeMap<u32, Path>,
    most: u32,
    sequence: u64,
    /// What was known before the first probe.
    known: BTreeMap<u32, u32>,
}

impl Paths {
    /// No peers; of some it is known what their paths carried, by node number.
    #[must_use]
    pub fn new(known: BTreeMap<u32, u32>) -> Self {
        Self {
            known,
            ..Self::default()
        }
    }

    /// Measures the paths to exactly `nodes` from now on, up to `most` bytes, the device's MTU. Peers that stay keep
    /// what was measured while `most` does not change; nothing is measured where it is the floor.
    pub fn set(&mut self, nodes: impl IntoIterator<Item = u32>, most: u32, now: Duration) {
        let before = std::mem::take(&mut self.peers);
        let kept = |node: u32| before.get(&node).filter(|_| most == self.most).cloned();
        self.peers = nodes
            .into_iter()
            .filter(|_| most > PATH_FLOOR)
            .map(|node| {
                let known = self.known.get(&node).copied().unwrap_or(most);
                let path = kept(node).unwrap_or_else(|| Path::new(most, known, now + FIRST));
                (node, path)
            })
            .collect();
        self.most = most;
    }

    /// When [`Paths::tick`] has something to do next.
    #[must_use]
    pub fn next(&self) -> Option<Duration> {
        self.peers
            .values()
            .map(|path| path.open.map_or(path.due, |open| open.sent + TIMEOUT))
            .min()
    }

    /// Notes what was lost by `now` and returns the probes that are due.
    pub fn tick(&mut self, now: Duration) -> Vec<Padded> {
        let (rest, most) = (self.rest(), self.most);
        let mut probes = Vec::new();
        for (node, path) in &mut self.peers {
            if path.open.is_some_and(|open| now >= open.sent + TIMEOUT) {
                path.missed(now, rest);
            }
            if path.open.is_some() || now < path.due {
                continue;
            }
            self.sequence += 1;
            let open = Open {
                sequence: self.sequence,
                sent: now,
                size: path.size(now, most),
            };
            path.open = Some(open);
            probes.push(Padded {
                node: *node,
                sequence: open.sequence,
                size: open.size,
            });
        }
        probes
    }

    /// Notes an answer of `node`; one that came too late or was never asked for counts for nothing. Returns whether
    /// what its path carries changed.
    pub fn answered(&mut self, node: u32, sequence: u64, now: Duration) -> bool {
        let rest = self.rest();
        let Some(path) = self.peers.get_mut(&node) else {
            return false;
        };
        let Some(open) = path
            .open
            .take_if(|open| open.sequence == sequence && now < open.sent + TIMEOUT)
        else {
            return false;
        };
        let before = path.mtu;
        path.passed(open.size, now, rest);
        path.mtu != before
    }

    /// What the paths carry that carry less than the device takes, by node number.
    #[must_use]
    pub fn narrow(&self) -> BTreeMap<u32, u32> {
        self.peers
            .iter()
            .filter(|(_, path)| path.mtu < self.most)
            .map(|(node, path)| (*node, path.mtu))
            .collect()
    }

    /// What the path to a peer carries, as far as is known.
    #[must_use]
    pub fn mtu(&self, node: u32) -> Option<u32> {
        self.peers.get(&node).map(|path| path.mtu)
    }

    /// Time between two confirmations of one path.
    fn rest(&self) -> Duration {
        let peers = u32::try_from(self.peers.len()).unwrap_or(u32::MAX);
        INTERVAL.max(Duration::from_secs(1) / PER_SECOND * peers)
    }
}

impl Path {
    fn new(most: u32, known: u32, due: Duration) -> Self {
        Self {
            mtu: known.clamp(PATH_FLOOR, most),
            low: PATH_FLOOR,
            high: most + 1,
            phase: Phase::Searching,
            due,
            open: None,
            lost: 0,
        }
    }

    /// The size of the next question.
    fn size(&mut self, now: Duration, most: u32) -> u32 {
        if let Phase::Settled { raise } = self.phase
            && now >= raise
            && self.mtu < most
        {
            self.high = most + 1;
            self.phase = Phase::Searching;
        }
        match self.phase {
            Phase::Settled { .. } => self.mtu,
            Phase::Doubted => PATH_FLOOR,
            // Nothing was refused yet.
            Phase::Searching if self.high == most + 1 => most,
            Phase::Searching if self.low < COMMON && COMMON < self.high => COMMON,
            Phase::Searching => self.low.midpoint(self.high),
        }
    }

    fn passed(&mut self, size: u32, now: Duration, rest: Duration) {
        self.lost = 0;
        match self.phase {
            Phase::Settled { .. } => self.due = now + rest,
            Phase::Doubted => {
                self.high = self.mtu;
                self.low = PATH_FLOOR;
                self.mtu = PATH_FLOOR;
                self.search(now, rest);
            }
            Phase::Searching => {
                // Nothing smaller than what is in use is asked for.
                self.low = size;
                self.mtu = size;
                self.search(now, rest);
            }
        }
    }

    fn missed(&mut self, now: Duration, rest: Duration) {
        let Some(open) = self.open.take() else {
            return;
        };
        self.lost += 1;
        self.due = now;
        if self.lost < TRIES {
            return;
        }
        self.lost = 0;
        match self.phase {
            Phase::Settled { .. } => self.phase = Phase::Doubted,
            // Nothing passes: the peer is silent, and says nothing of its path.
            Phase::Doubted => {
                self.phase = Phase::Settled { raise: now + RAISE };
                self.due = now + rest;
            }
            // It may be the peer that is silent.
            Phase::Searching if open.size <= self.mtu => self.phase = Phase::Doubted,
            Phase::Searching => {
                self.high = open.size;
                self.search(now, rest);
            }
        }
    }

    /// Goes on with the search, or ends it.
    fn search(&mut self, now: Duration, rest: Duration) {
        if self.high - self.low > STEP {
            self.phase = Phase::Searching;
            self.due = now;
        } else {
            self.phase = Phase::Settled { raise: now + RAISE };
            self.due = now + rest;
        }
    }
}

#[cfg(test)]
mod tests;
