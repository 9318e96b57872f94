//! Time that this process had: where the machine stands still now and then, nothing that a test waits for has had the
//! time that the clock says.
//!
//! A thread that only sleeps says by how much it woke too late.

use std::{
    sync::{LazyLock, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

/// How often the thread wakes.
const TICK: Duration = Duration::from_millis(10);
/// What a busy machine may add to it.
const BUSY: Duration = Duration::from_millis(40);
/// So much of it may unseat a leader: it is a heartbeat.
const DISTURBS: Duration = Duration::from_millis(250);
/// How often a disturbed test is tried.
const ATTEMPTS: usize = 20;

/// What was taken so far.
#[derive(Clone, Copy)]
struct Taken {
    sum: Duration,
    /// When the thread woke last.
    woke: Instant,
}

impl Taken {
    fn at(self, now: Instant) -> Duration {
        let late = now.saturating_duration_since(self.woke + TICK);
        self.sum + if late > BUSY { late } else { Duration::ZERO }
    }

    /// Until now, for all who ask.
    fn now() -> Duration {
        static TAKEN: LazyLock<Mutex<Taken>> = LazyLock::new(|| {
            thread::spawn(|| {
                loop {
                    thread::sleep(TICK);
                    Taken::tick(&TAKEN);
                }
            });
            let (sum, woke) = (Duration::ZERO, Instant::now());
            Mutex::new(Taken { sum, woke })
        });
        Self::lock(&TAKEN).at(Instant::now())
    }

    fn tick(taken: &Mutex<Self>) {
        let (mut taken, woke) = (Self::lock(taken), Instant::now());
        taken.sum = taken.at(woke);
        taken.woke = woke;
    }

    fn lock(taken: &Mutex<Self>) -> MutexGuard<'_, Self> {
        taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Measures the time that the process had.
#[derive(Clone, Copy)]
pub(crate) struct Stopwatch {
    start: Instant,
    before: Duration,
}

impl Stopwatch {
    pub(crate) fn start() -> Self {
        Self {
            before: Taken::now(),
            start: Instant::now(),
        }
    }

    /// The time since the start that the process had.
    pub(crate) fn had(self) -> Duration {
        self.start.elapsed().saturating_sub(self.taken())
    }

    /// The time since the start that was taken from it.
    fn taken(self) -> Duration {
        Taken::now().saturating_sub(self.before)
    }
}

/// Tries what a group does only while nothing disturbs it, until it does. That it does not counts the second time that the
/// machine did not stand still meanwhile: threads that wait for each other are not seen as standing still.
pub(crate) async fn undisturbed(mut attempt: impl AsyncFnMut() -> Result<(), String>) {
    let mut failed = None;
    for _ in 0..ATTEMPTS {
        let watch = Stopwatch::start();
        let Err(why) = attempt().await else { return };
        let taken = watch.taken();
        println!("once more, {taken:?} were taken: {why}");
        if taken < DISTURBS
            && let Some(before) = failed.replace(why)
        {
            panic!("{before}; then {}", failed.unwrap_or_default());
        }
    }
    panic!("each of {ATTEMPTS} attempts was disturbed");
}

/// An attempt fails where this does not hold.
pub(crate) fn ensure(holds: bool, why: impl Into<String>) -> Result<(), String> {
    if holds { Ok(()) } else { Err(why.into()) }
}
