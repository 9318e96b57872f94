//! How long the leads wait for each other, and how that follows the network.
//!
//! ```text
//!  round trips --Ways--> the largest --follow--> the one to go by --Timers::at--> Tempo
//! ```
//!
//! A heartbeat is at least three round trips, a lease three heartbeats: what answers at all then answers in time, and one
//! lost heartbeat costs no election. What was asked for (`--heartbeat`, `--election`) is the least of each.

use std::time::Duration;

/// A heartbeat lasts so many round trips.
const TRIPS: u32 = 3;
/// A lease lasts so many heartbeats.
const HEARTBEATS: u32 = 3;
/// The longest round trip that the timers follow, a geostationary satellite's: who takes longer is as good as away, and
/// must not keep the others waiting.
const LONGEST: Duration = Duration::from_millis(600);
/// The round trip to go by is a multiple of this: jitter is no news.
const STEP: Duration = Duration::from_millis(10);

/// How long the group waits at least before it thinks that something is wrong.
///
/// A lead grants the leader a lease with every message. When it heard nothing for that long it stands for election, each
/// lead a while after those that come before it. Where round trips ask for more, both last longer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timers {
    /// Between two heartbeats, and the limit of one, milliseconds.
    pub heartbeat_ms: u64,
    /// How long a lead believes in a silent leader, milliseconds; at least three heartbeats.
    pub lease_ms: u64,
}

impl Default for Timers {
    /// For leads a LAN apart: a lost leader is replaced within 0.75 to 1 s.
    fn default() -> Self {
        Self {
            heartbeat_ms: 250,
            lease_ms: 750,
        }
    }
}

impl Timers {
    /// How long a lead believes in a silent leader at least.
    pub(crate) fn lease(self) -> Duration {
        Duration::from_millis(self.lease_ms)
    }

    /// The timers where the largest round trip is `trip`.
    pub(crate) fn at(self, trip: Duration) -> Tempo {
        let trip = trip.min(LONGEST);
        let heartbeat = Duration::from_millis(self.heartbeat_ms).max(TRIPS * trip);
        Tempo {
            heartbeat,
            lease: self.lease().max(HEARTBEATS * heartbeat),
            // A canvass and a vote take a round trip each.
            stagger: Duration::from_millis(self.heartbeat_ms / 2).max(2 * trip),
        }
    }

    /// The longest heartbeat of them all.
    pub(super) fn longest_heartbeat(self) -> Duration {
        self.at(LONGEST).heartbeat
    }
}

/// The timers in force.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tempo {
    /// Between two heartbeats, and the limit of one.
    pub(crate) heartbeat: Duration,
    /// How long a lead believes in a silent leader: the soonest that another can be elected.
    pub(crate) lease: Duration,
    /// Between two candidates.
    pub(crate) stagger: Duration,
}

/// The round trip to go by after `now`, when the largest one is `measured`: more at once, less only when a quarter is gone.
pub(crate) fn follow(now: Duration, measured: Duration) -> Duration {
    let steps = measured.min(LONGEST).as_micros().div_ceil(STEP.as_micros());
    let next = STEP * u32::try_from(steps).unwrap_or(u32::MAX);
    match next > now || 4 * next <= 3 * now {
        true => next,
        false => now,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn timers_are_as_asked_for_until_round_trips_want_more() {
        let base = Timers::default();
        for (trip, heartbeat, lease, stagger) in [
            (0, 250, 750, 125),
            (10, 250, 750, 125),
            (80, 250, 750, 160),
            (100, 300, 900, 200),
            (300, 900, 2_700, 600),
            (600, 1_800, 5_400, 1_200),
            // A lead behind such a link is away.
            (60_000, 1_800, 5_400, 1_200),
        ] {
            let tempo = base.at(ms(trip));
            let want = Tempo {
                heartbeat: ms(heartbeat),
                lease: ms(lease),
                stagger: ms(stagger),
            };
            assert_eq!(tempo, want, "{trip} ms");
        }
        let slow = Timers {
            heartbeat_ms: 2_000,
            lease_ms: 9_000,
        };
        assert_eq!(slow.at(ms(600)).lease, ms(9_000));
    }

    #[test]
    fn jitter_changes_nothing_and_a_shorter_way_does() {
        let mut now = Duration::ZERO;
        for (measured, want) in [
            (1, 10),
            (3, 10),
            (101, 110),
            (109, 110),
            (92, 110),
            (112, 120),
            (91, 120),
            (90, 90),
            (5_000, 600),
        ] {
            now = follow(now, ms(measured));
            assert_eq!(now, ms(want), "{measured} ms");
        }
    }

    proptest! {
        #[test]
        fn a_heartbeat_is_three_round_trips_and_a_lease_three_heartbeats(
            trips in prop::collection::vec(0_u64..700_000, 1..50),
            heartbeat_ms in 1_u64..3_000,
            more_ms in 0_u64..3_000,
        ) {
            let base = Timers { heartbeat_ms, lease_ms: 3 * heartbeat_ms + more_ms };
            let mut now = Duration::ZERO;
            for trip in trips {
                let trip = Duration::from_micros(trip);
                now = follow(now, trip);
                let tempo = base.at(now);
                prop_assert!(tempo.heartbeat >= 3 * trip.min(LONGEST));
                prop_assert!(tempo.heartbeat <= base.longest_heartbeat());
                prop_assert!(tempo.lease >= 3 * tempo.heartbeat);
                prop_assert!(tempo.lease >= base.lease());
                prop_assert!(tempo.stagger >= 2 * trip.min(LONGEST));
                // It does not stay long when the way gets short.
                prop_assert!(now <= (trip.min(LONGEST) + STEP) * 4 / 3);
            }
        }
    }
}
