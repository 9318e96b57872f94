//! Time in which a CPU stood still: what a host takes without a word (see [`crate::steal`] for what it tells), and
//! what waits for its turn.
//!
//! ```text
//!  CPU 0  | . . . . . . . . . . . . . . . . .       a thread of each CPU only sleeps;
//!  CPU 1  | . . . . ---------- . . . . . . .        by how much it woke too late, the CPU stood still
//! ```
//!
//! What stood still on several CPUs at once counts once. The threads begin with the first question and never end.

use std::{
    sync::{LazyLock, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use nix::{
    sched::{CpuSet, sched_getaffinity, sched_setaffinity},
    unistd::Pid,
};

/// How often a thread wakes.
const TICK: Duration = Duration::from_millis(10);
/// What a busy machine may add to it.
const BUSY: Duration = Duration::from_millis(40);

static STOOD: LazyLock<Mutex<Stood>> = LazyLock::new(|| {
    let cpus = own_cpus();
    let stood = Stood::new(cpus.len(), Instant::now());
    for (number, cpu) in cpus.into_iter().enumerate() {
        thread::spawn(move || {
            // Where it is refused, the thread still tells of a machine that stands still as a whole.
            let _ = sched_setaffinity(Pid::from_raw(0), &cpu);
            loop {
                thread::sleep(TICK);
                lock().wake(number, Instant::now());
            }
        });
    }
    Mutex::new(stood)
});

fn lock() -> MutexGuard<'static, Stood> {
    STOOD.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Each CPU that this process may use; a set of none where the kernel does not say.
fn own_cpus() -> Vec<CpuSet> {
    let Ok(all) = sched_getaffinity(Pid::from_raw(0)) else {
        return vec![CpuSet::new()];
    };
    let may_use = |cpu: &usize| all.is_set(*cpu).unwrap_or(false);
    (0..CpuSet::count())
        .filter(may_use)
        .map(|cpu| {
            let mut one = CpuSet::new();
            one.set(cpu).expect("a CPU of a set fits into one");
            one
        })
        .collect()
}

/// For how long any CPU stood still since the first question.
#[must_use]
pub fn stood_still() -> Duration {
    lock().until(Instant::now())
}

/// What stood still so far.
struct Stood {
    sum: Duration,
    /// What stood still before is in `sum`.
    summed: Instant,
    /// When the thread of each CPU woke last.
    woke: Vec<Instant>,
}

impl Stood {
    fn new(threads: usize, now: Instant) -> Self {
        Self {
            sum: Duration::ZERO,
            summed: now,
            woke: vec![now; threads],
        }
    }

    /// What stood still until `now`, also where a thread has not woken yet.
    fn until(&self, now: Instant) -> Duration {
        let due = self.woke.iter().min().map(|woke| *woke + TICK);
        match due {
            Some(due) if now.saturating_duration_since(due) > BUSY => {
                self.sum + now.saturating_duration_since(due.max(self.summed))
            }
            _ => self.sum,
        }
    }

    fn wake(&mut self, thread: usize, now: Instant) {
        let sum = self.until(now);
        if sum > self.sum {
            (self.sum, self.summed) = (sum, now);
        }
        self.woke[thread] = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(number: u64) -> Duration {
        Duration::from_millis(number)
    }

    #[test]
    fn who_wakes_too_late_tells_by_how_much_and_two_at_once_tell_it_once() {
        let start = Instant::now();
        let at = |number| start + ms(number);
        let mut stood = Stood::new(2, start);
        // In time, and late by what a busy machine may add.
        for (number, now) in [(0, 10), (1, 50), (0, 51), (1, 60)] {
            stood.wake(number, at(now));
        }
        assert_eq!(stood.until(at(61)), Duration::ZERO);
        // One stands still, the other does not.
        for now in (70..=960).step_by(10) {
            stood.wake(1, at(now));
        }
        assert_eq!(stood.until(at(961)), ms(900));
        stood.wake(0, at(961));
        // Both do, from 970 on.
        stood.wake(0, at(1_471));
        stood.wake(1, at(1_472));
        assert_eq!(stood.until(at(1_481)), ms(900 + 502));
        assert_eq!(
            stood.until(at(2_481)),
            ms(900 + 502 + 1_000),
            "nobody has woken yet"
        );
    }

    #[test]
    fn a_process_may_use_a_cpu() {
        assert!(!own_cpus().is_empty());
        assert!(stood_still() < Duration::from_hours(1));
    }
}
