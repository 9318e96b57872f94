//! How long messages take to the other leads and back.
//!
//! Of each way the median of the last few counts, so that one message that had to wait changes nothing; of all ways the
//! longest does. What other leads measured counts, too: the leader has to wait for those that elect the next one.

use std::{
    collections::{BTreeMap, VecDeque},
    net::SocketAddr,
    time::Duration,
};

use tokio::time::Instant;

/// So many of a way are kept: two of them may be wrong.
const KEPT: usize = 5;
/// How long what another lead said counts.
const SAID: Duration = Duration::from_secs(10);

#[derive(Clone, Debug, Default)]
struct Way {
    trips: VecDeque<Duration>,
    /// Whether the last message was answered: the first on a new connection takes longer.
    is_open: bool,
    /// The longest of the other lead's own ways.
    said: Option<(Duration, Instant)>,
}

impl Way {
    fn median(&self) -> Option<Duration> {
        let mut trips: Vec<_> = self.trips.iter().copied().collect();
        trips.sort_unstable();
        trips.get(trips.len().saturating_sub(1) / 2).copied()
    }
}

/// The ways to the other leads.
#[derive(Clone, Debug, Default)]
pub(super) struct Ways(BTreeMap<SocketAddr, Way>);

impl Ways {
    /// The lead at `to` answered after `took`, and said what its own longest way takes.
    pub(super) fn answered(
        &mut self,
        to: SocketAddr,
        took: Duration,
        said: Option<Duration>,
        now: Instant,
    ) {
        let way = self.0.entry(to).or_default();
        if std::mem::replace(&mut way.is_open, true) {
            way.trips.push_back(took);
        }
        if way.trips.len() > KEPT {
            way.trips.pop_front();
        }
        way.said = said.map(|said| (said, now));
    }

    /// It did not answer: how long it would have taken is not known.
    pub(super) fn failed(&mut self, to: SocketAddr) {
        self.0.entry(to).or_default().is_open = false;
    }

    /// Forgets the ways to others than these.
    pub(super) fn keep(&mut self, leads: &[SocketAddr]) {
        self.0.retain(|to, _| leads.contains(to));
    }

    /// Whether each way that is open has been measured often enough to be believed.
    pub(super) fn are_known(&self) -> bool {
        let mut open = self.0.values().filter(|way| way.is_open);
        open.all(|way| way.trips.len() > KEPT / 2)
    }

    /// The longest of this lead's own ways.
    pub(super) fn own(&self) -> Option<Duration> {
        self.0.values().filter_map(Way::median).max()
    }

    /// The longest way that this lead or another that it hears knows of.
    pub(super) fn longest(&self, now: Instant) -> Option<Duration> {
        let said = self.0.values().filter_map(|way| way.said);
        let said = said.filter(|(_, at)| now.saturating_duration_since(*at) <= SAID);
        said.map(|(said, _)| said).max().max(self.own())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn to(port: u16) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], port))
    }

    #[test]
    fn an_outlier_changes_nothing_and_a_new_way_is_followed() {
        let now = Instant::now();
        let mut ways = Ways::default();
        // The first has to connect.
        ways.answered(to(1), ms(400), None, now);
        assert_eq!(ways.own(), None);
        for (took, want) in [
            (100, 100),
            (2_000, 100),
            (100, 100),
            (101, 100),
            (2_000, 101),
            (102, 102),
            (300, 102),
            (300, 300),
            (300, 300),
        ] {
            ways.answered(to(1), ms(took), None, now);
            assert_eq!(ways.own(), Some(ms(want)), "after {took} ms");
        }
        ways.failed(to(1));
        ways.answered(to(1), ms(1_200), None, now);
        assert_eq!(ways.own(), Some(ms(300)), "it was connected anew");
    }

    #[test]
    fn the_longest_way_counts_whoever_measured_it_while_it_is_heard() {
        let now = Instant::now();
        let mut ways = Ways::default();
        for _ in 0..4 {
            ways.answered(to(1), ms(10), Some(ms(200)), now);
            ways.answered(to(2), ms(50), Some(ms(20)), now);
        }
        assert_eq!(ways.own(), Some(ms(50)));
        assert_eq!(ways.longest(now), Some(ms(200)));
        assert_eq!(ways.longest(now + SAID + ms(1)), Some(ms(50)));
        ways.keep(&[to(1)]);
        assert_eq!(ways.own(), Some(ms(10)));
    }
}
