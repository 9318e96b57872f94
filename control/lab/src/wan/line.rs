//! A delay line: what goes in comes out later, in order, or is dropped where it holds too much.

use std::{collections::VecDeque, time::Duration};

/// The most packets under way on one line; like a router's buffer it drops the newest.
const LONGEST: usize = 8192;

/// Packets under way in one direction between two sites.
#[derive(Debug)]
pub(super) struct Line {
    delay: Duration,
    under_way: VecDeque<(Duration, Vec<u8>)>,
    dropped: u64,
}

impl Line {
    pub(super) fn new(delay: Duration) -> Self {
        Self {
            delay,
            under_way: VecDeque::new(),
            dropped: 0,
        }
    }

    /// A packet enters at `now`.
    pub(super) fn push(&mut self, packet: &[u8], now: Duration) {
        if self.under_way.len() < LONGEST {
            self.under_way
                .push_back((now + self.delay, packet.to_vec()));
        } else {
            self.dropped += 1;
        }
    }

    /// The next packet that has arrived by `now`.
    pub(super) fn pop(&mut self, now: Duration) -> Option<Vec<u8>> {
        let (due, _) = self.under_way.front()?;
        if *due > now {
            return None;
        }
        self.under_way.pop_front().map(|(_, packet)| packet)
    }

    /// When the next packet arrives.
    pub(super) fn next(&self) -> Option<Duration> {
        self.under_way.front().map(|(due, _)| *due)
    }

    /// How many packets were dropped since this was asked last.
    pub(super) fn take_dropped(&mut self) -> u64 {
        std::mem::take(&mut self.dropped)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn a_packet_arrives_after_its_delay_and_not_before() {
        let mut line = Line::new(10 * MS);
        line.push(b"a", 5 * MS);
        assert_eq!(line.next(), Some(15 * MS));
        assert_eq!(line.pop(15 * MS - Duration::from_nanos(1)), None);
        assert_eq!(line.pop(15 * MS), Some(b"a".to_vec()));
        assert_eq!((line.pop(99 * MS), line.next()), (None, None));
    }

    #[test]
    fn a_full_line_drops_the_newest_and_counts_it() {
        let mut line = Line::new(MS);
        for number in 0..LONGEST + 3 {
            line.push(&number.to_be_bytes(), Duration::ZERO);
        }
        assert_eq!(line.take_dropped(), 3);
        assert_eq!(line.take_dropped(), 0);
        let mut arrived = 0_usize;
        while let Some(packet) = line.pop(MS) {
            assert_eq!(packet, arrived.to_be_bytes());
            arrived += 1;
        }
        assert_eq!(arrived, LONGEST);
    }

    proptest! {
        #[test]
        fn packets_keep_their_order(times in prop::collection::vec(0u64..50, 0..60)) {
            let mut times = times;
            times.sort_unstable();
            let mut line = Line::new(7 * MS);
            for (number, time) in times.iter().enumerate() {
                line.push(&[u8::try_from(number).unwrap()], Duration::from_millis(*time));
            }
            let mut arrived = Vec::new();
            while let Some(packet) = line.pop(Duration::from_secs(1)) {
                arrived.extend(packet);
            }
            prop_assert!(arrived.is_sorted());
            prop_assert_eq!(arrived.len(), times.len());
        }
    }
}
