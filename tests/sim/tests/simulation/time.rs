//! The clocks of a host: when it is in the simulation, by its own stopped tokio clock.

use std::sync::{Arc, Mutex, PoisonError};

use tokio::time::Instant;

/// Tells the simulation's time from inside a host, milliseconds.
#[derive(Clone, Debug, Default)]
pub(crate) struct HostClock(Arc<Mutex<Option<(u64, Instant)>>>);

impl HostClock {
    /// The host's clock shows `instant` at `now`.
    pub(crate) fn set(&self, now: u64, instant: Instant) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some((now, instant));
    }

    /// What time it is.
    pub(crate) fn now(&self) -> u64 {
        let known = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.map_or(0, |(now, instant)| {
            let since = Instant::now().saturating_duration_since(instant);
            now + u64::try_from(since.as_millis()).expect("a simulation is short")
        })
    }
}
