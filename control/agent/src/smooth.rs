//! Takes the noise out of what nodes measure, so that noise does not become log entries.
//!
//! A round-trip time is reported anew when three measurements in a row lie more than 10 % and more than
//! 200 us away from the reported one, and then with two significant digits. Pure: one call per measurement.

use std::collections::BTreeMap;

/// How many measurements in a row must agree that a value has changed.
const CONFIRMATIONS: u8 = 3;
/// Differences up to this are the scheduler's, not the network's, microseconds.
const FLOOR_US: u32 = 200;

/// The round-trip times of one node as reported.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Smoother {
    peers: BTreeMap<u32, Peer>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Peer {
    reported: u32,
    /// How many measurements in a row said otherwise.
    doubts: u8,
}

impl Smoother {
    /// Takes one measurement of every peer that answered.
    pub fn measure(&mut self, rtt_us: &BTreeMap<u32, u32>) {
        self.peers.retain(|number, peer| match rtt_us.get(number) {
            Some(_) => true,
            None => {
                peer.doubts += 1;
                peer.doubts < CONFIRMATIONS
            }
        });
        for (&number, &measured) in rtt_us {
            let peer = self.peers.entry(number).or_insert(Peer {
                reported: two_digits(measured),
                doubts: 0,
            });
            if is_near(peer.reported, measured) {
                peer.doubts = 0;
            } else {
                peer.doubts += 1;
            }
            if peer.doubts >= CONFIRMATIONS {
                *peer = Peer {
                    reported: two_digits(measured),
                    doubts: 0,
                };
            }
        }
    }

    /// The round-trip times to report, by node number, microseconds.
    #[must_use]
    pub fn reported(&self) -> BTreeMap<u32, u32> {
        self.peers
            .iter()
            .map(|(&number, peer)| (number, peer.reported))
            .collect()
    }
}

fn is_near(reported: u32, measured: u32) -> bool {
    let difference = reported.abs_diff(measured);
    difference <= FLOOR_US || u64::from(difference) * 10 <= u64::from(reported)
}

/// `value` rounded to two significant decimal digits: at most 5 % away.
fn two_digits(value: u32) -> u32 {
    let mut scale = 1;
    while value / scale >= 100 {
        scale *= 10;
    }
    (value.saturating_add(scale / 2) / scale).saturating_mul(scale)
}

/// A count of flows as reported: zero is exact, the rest is the power of two below it.
#[must_use]
pub fn flows(count: u64) -> u64 {
    count.checked_ilog2().map_or(0, |log| 1 << log)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn one(rtt: u32) -> BTreeMap<u32, u32> {
        BTreeMap::from([(7, rtt)])
    }

    #[test]
    fn a_value_is_rounded_to_two_digits() {
        for (value, rounded) in [
            (0, 0),
            (7, 7),
            (99, 99),
            (104, 100),
            (105, 110),
            (12_345, 12_000),
            (19_960, 20_000),
        ] {
            assert_eq!(two_digits(value), rounded, "{value}");
        }
    }

    #[test]
    fn one_late_probe_changes_nothing_but_a_new_path_does() {
        let mut smoother = Smoother::default();
        smoother.measure(&one(20_000));
        for rtt in [90_000, 20_500, 90_000, 90_000, 19_500] {
            smoother.measure(&one(rtt));
            assert_eq!(smoother.reported(), one(20_000));
        }
        for _ in 0..3 {
            smoother.measure(&one(41_700));
        }
        assert_eq!(smoother.reported(), one(42_000));
    }

    #[test]
    fn a_peer_that_misses_one_measurement_stays() {
        let mut smoother = Smoother::default();
        smoother.measure(&one(500));
        smoother.measure(&BTreeMap::new());
        smoother.measure(&BTreeMap::new());
        smoother.measure(&one(510));
        assert_eq!(smoother.reported(), one(500));
        for _ in 0..3 {
            smoother.measure(&BTreeMap::new());
        }
        assert_eq!(smoother.reported(), BTreeMap::new());
    }

    #[test]
    fn a_flow_count_is_zero_only_when_there_is_none() {
        assert_eq!([0, 1, 2, 3, 4, 250].map(flows), [0, 1, 2, 2, 4, 128]);
    }

    proptest! {
        #[test]
        fn noise_within_ten_percent_never_changes_the_report(
            base in 3_000u32..1_000_000,
            noise in prop::collection::vec(-4i32..=4, 1..60),
        ) {
            let mut smoother = Smoother::default();
            smoother.measure(&one(base));
            let first = smoother.reported();
            for percent in noise {
                let moved = i64::from(base) + i64::from(base) * i64::from(percent) / 100;
                smoother.measure(&one(u32::try_from(moved).unwrap()));
                prop_assert_eq!(&smoother.reported(), &first);
            }
        }

        #[test]
        fn a_value_that_stays_is_reported_within_ten_percent(
            values in prop::collection::vec(0u32..10_000_000, 0..20),
            last in 0u32..10_000_000,
        ) {
            let mut smoother = Smoother::default();
            for value in values {
                smoother.measure(&one(value));
            }
            for _ in 0..3 {
                smoother.measure(&one(last));
            }
            prop_assert!(is_near(smoother.reported()[&7], last));
        }
    }
}
