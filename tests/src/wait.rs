//! Waiting for a condition instead of sleeping for a guess.

use std::{
    thread,
    time::{Duration, Instant},
};

/// How long the condition rests between two looks.
const REST: Duration = Duration::from_millis(5);

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
/// When `within` has passed, on a slow machine so many times that; the message names `what` was waited for.
#[track_caller]
pub fn wait_for<T>(what: &str, within: Duration, mut condition: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    let within = slowed(within);
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(start.elapsed() < within, "{what}: not within {within:?}");
        thread::sleep(REST);
    }
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
    #[should_panic(expected = "a miracle: not within 20ms")]
    fn waiting_in_vain_names_what_was_waited_for() {
        wait_for("a miracle", Duration::from_millis(20), || None::<()>);
    }
}
