//! Waiting for a condition instead of sleeping for a guess.

use std::{
    io, thread,
    time::{Duration, Instant},
};

use crate::{steal::CpuTime, still::stood_still};

/// How long the condition rests between two looks.
const REST: Duration = Duration::from_millis(5);

/// However much was taken, one waits at most this many times as long.
const PATIENCE: f64 = 5.0;

/// How many times slower than ours the machine is that the tests run on: `WEFT_TEST_SLOWNESS`, for emulated ones.
fn slowness() -> u32 {
    let given = std::env::var("WEFT_TEST_SLOWNESS").ok();
    given.and_then(|number| number.parse().ok()).unwrap_or(1)
}

/// How long something may take here that may take `within` on our own machine.
#[must_use]
pub fn slowed(within: Duration) -> Duration {
    within * slowness()
}

/// Asks `condition` until it gives a value, and returns that value.
///
/// # Panics
/// When the machine has had `within`, on a slow machine so many times that: time that its host gave to others and
/// in which a CPU stood still does not count. The message names `what` was waited for.
#[track_caller]
pub fn wait_for<T>(what: &str, within: Duration, mut condition: impl FnMut() -> Option<T>) -> T {
    let watch = Stopwatch::start();
    let within = slowed(within);
    loop {
        if let Some(value) = condition() {
            return value;
        }
        let passed = watch.start.elapsed();
        assert!(
            passed < within || watch.had() < within,
            "{what}: not within {within:?} ({passed:?}, of which the machine had {:?})",
            watch.had()
        );
        thread::sleep(REST);
    }
}

/// Measures how long something took, but for what the host gave to others meanwhile and for what a CPU stood still.
#[derive(Debug)]
pub struct Stopwatch {
    start: Instant,
    before: io::Result<CpuTime>,
    stood: Duration,
}

impl Stopwatch {
    /// Starts one.
    #[must_use]
    pub fn start() -> Self {
        Self {
            before: CpuTime::now(),
            stood: stood_still(),
            start: Instant::now(),
        }
    }

    /// The time that the machine had since the start.
    #[must_use]
    pub fn had(&self) -> Duration {
        let stood = stood_still().saturating_sub(self.stood);
        had(self.start.elapsed(), self.stolen(), stood)
    }

    fn stolen(&self) -> f64 {
        match (&self.before, CpuTime::now()) {
            (Ok(before), Ok(now)) => before.stolen_until(now),
            _ => 0.0,
        }
    }
}

/// The part of a time that the machine had, where a share of it was stolen and a CPU stood still for a while of it:
/// for what was stolen it did, too.
fn had(passed: Duration, stolen: f64, stood: Duration) -> Duration {
    let taken = passed.mul_f64(stolen).max(stood);
    passed
        .saturating_sub(taken)
        .max(passed.mul_f64(1.0 / PATIENCE))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waiting_ends_with_the_first_value() {
        let mut looks = 0;
        let value = wait_for("the third look", Duration::from_secs(5), || {
            looks += 1;
            (looks == 3).then_some(looks)
        });
        assert_eq!(value, 3);
    }

    #[test]
    fn what_was_taken_is_waited_for_again_but_not_for_ever() {
        let second = Duration::from_secs(1);
        for (stolen, stood, want) in [
            (0.0, 0, 1_000),
            (0.5, 0, 500),
            (0.0, 700, 300),
            (0.5, 700, 300),
            (0.5, 300, 500),
            (1.0, 0, 200),
            (0.0, 1_500, 200),
        ] {
            let had = had(second, stolen, Duration::from_millis(stood));
            assert_eq!(had, Duration::from_millis(want), "{stolen} {stood}");
        }
    }

    #[test]
    #[should_panic(expected = "a miracle: not within 20ms")]
    fn waiting_in_vain_names_what_was_waited_for() {
        wait_for("a miracle", Duration::from_millis(20), || None::<()>);
    }
}
