//! What this process logs, of all its tests: shown with the test that fails, and searched for what a door must say.
//!
//! The tests of agents use this file, too.

use std::{
    io,
    sync::{Mutex, Once, PoisonError},
    time::Duration,
};

use tokio::time::{Instant, sleep};
use tracing_subscriber::{
    EnvFilter, Layer, filter::LevelFilter, fmt, layer::SubscriberExt, util::SubscriberInitExt,
};

/// How long a line may take to come.
const LIMIT: Duration = Duration::from_secs(60);
/// What a failing test shows, unless `RUST_LOG` says otherwise.
const SHOWN: &str = "info,openraft=warn";

static LOGGED: Mutex<Vec<u8>> = Mutex::new(Vec::new());

/// The warnings so far.
#[derive(Clone, Copy)]
pub(crate) struct Log;

impl Log {
    /// From now on what is logged is kept.
    pub(crate) fn start() {
        static STARTED: Once = Once::new();
        STARTED.call_once(|| {
            let kept = fmt::layer().with_ansi(false).with_writer(|| Self);
            let shown = fmt::layer().with_ansi(false).with_test_writer();
            let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| SHOWN.into());
            tracing_subscriber::registry()
                .with(kept.with_filter(LevelFilter::WARN))
                .with(shown.with_filter(filter))
                .init();
        });
    }

    /// Waits until one line holds all of these.
    pub(crate) async fn says(parts: &[&str]) {
        let end = Instant::now() + LIMIT;
        while !Self::has(parts) {
            assert!(Instant::now() < end, "no line has {parts:?}");
            sleep(Duration::from_millis(20)).await;
        }
    }

    /// Whether one line holds all of these by now.
    pub(crate) fn has(parts: &[&str]) -> bool {
        let logged = LOGGED.lock().unwrap_or_else(PoisonError::into_inner);
        let text = String::from_utf8_lossy(&logged);
        let mut lines = text.lines();
        lines.any(|line| parts.iter().all(|part| line.contains(part)))
    }
}

impl io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut logged = LOGGED.lock().unwrap_or_else(PoisonError::into_inner);
        logged.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
