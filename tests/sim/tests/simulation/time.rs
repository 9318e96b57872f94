//! The clocks of a host: when it is in the simulation, by its own stopped tokio clock.

use std::sync::{Arc, Mutex, PoisonError};

use tokio::time::Instant;

/// Tells the simulation's time from inside a host, milliseconds.
#[derive(Clone, Debug, Default)]
pub(crate) struct HostClock(Arc<Mutex<Option<Shown>>>);

/// A time, and the instant of a running clock at which it was.
type Shown = (u64, Option<Instant>);

impl HostClock {
    /// The host's clock shows `instant` at `now`.
    pub(crate) fn set(&self, now: u64, instant: Instant) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some((now, Some(instant)));
    }

    /// Stays at `now`: nothing runs on the host.
    pub(crate) fn stop(&self, now: u64) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some((now, None));
    }

    /// What time it is.
    pub(crate) fn now(&self) -> u64 {
        let known = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some((now, instant)) = known else {
            return 0;
        };
        let since = instant.map(|it| Instant::now().saturating_duration_since(it));
        let since = since.unwrap_or_default().as_millis();
        now + u64::try_from(since).expect("a simulation is short")
    }
}
