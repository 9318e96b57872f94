//! Waiting for a condition instead of sleeping for a guess.

use std::{
    io, thread,
    time::{Duration, Instant},
};

use crate::steal::CpuTime;

/// How long the condition rests between two looks.
const REST: Duration = Duration::from_millis(5);

/// However much was stolen, one waits at most this many times as long.
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
/// When the machine has had `within`, on a slow machine so many times that: time that its host gave to others does
/// not count. The message names `what` was waited for.
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
            "{what}: not within {within:?} ({passed:?}, of which {:.2} was stolen)",
            watch.stolen()
        );
        thread::sleep(REST);
    }
}

/// Measures how long something took, but for what the host gave to others meanwhile.
#[derive(Debug)]
pub struct Stopwatch {
    start: Instant,
    before: io::Result<CpuTime>,
}

impl Stopwatch {
    /// Starts one.
    #[must_use]
    pub fn start() -> Self {
        Self {
            start: Instant::now(),
            before: CpuTime::now(),
        }
    }

    /// The time that the machine had since the start.
    #[must_use]
    pub fn had(&self) -> Duration {
        had(self.start.elapsed(), self.stolen())
    }

    fn stolen(&self) -> f64 {
        match (&self.before, CpuTime::now()) {
            (Ok(before), Ok(now)) => before.stolen_until(now),
            _ => 0.0,
        }
    }
}

/// The part of a time that the machine had, where a share of it was stolen.
fn had(passed: Duration, stolen: f64) -> Duration {
    passed.mul_f64((1.0 - stolen).max(1.0 / PATIENCE))
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
    fn stolen_time_is_waited_for_again_but_not_for_ever() {
        let second = Duration::from_secs(1);
        assert_eq!(had(second, 0.0), second);
        assert_eq!(had(second, 0.5), second / 2);
        assert_eq!(had(second, 1.0), second / 5);
    }

    #[test]
    #[should_panic(expected = "a miracle: not within 20ms")]
    fn waiting_in_vain_names_what_was_waited_for() {
        wait_for("a miracle", Duration::from_millis(20), || None::<()>);
    }
}
