//! Time that the hypervisor gave to other machines while something was measured here (`steal` of proc_stat(5)):
//! what else could tell a slow program from a slow machine.

use std::fs;

use anyhow::{Context, Result};

/// Above this share of the CPU time, a comparison says more of the neighbours than of what it compares.
const MUCH: f64 = 0.03;

/// CPU time since boot, in ticks of `USER_HZ`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CpuTime {
    all: u64,
    stolen: u64,
}

impl CpuTime {
    /// That of all CPUs.
    ///
    /// # Errors
    /// When the kernel's count cannot be read.
    pub(crate) fn now() -> Result<Self> {
        let text = fs::read_to_string("/proc/stat").context("failed to read /proc/stat")?;
        Self::parse(&text).context("failed to read the line `cpu` of /proc/stat")
    }

    fn parse(text: &str) -> Option<Self> {
        // user, nice, system, idle, iowait, irq, softirq, steal; what follows is counted in the first two, too.
        let ticks: Option<Vec<u64>> = text
            .lines()
            .find_map(|line| line.strip_prefix("cpu "))?
            .split_whitespace()
            .take(8)
            .map(|word| word.parse().ok())
            .collect();
        let ticks = ticks?;
        Some(Self {
            all: ticks.iter().sum(),
            stolen: *ticks.get(7)?,
        })
    }

    /// The share that was stolen from `self` to `later`.
    pub(crate) fn stolen_until(self, later: Self) -> f64 {
        match later.all - self.all {
            0 => 0.0,
            all => (later.stolen - self.stolen) as f64 / all as f64,
        }
    }
}

/// How often something may be measured again because time was stolen.
#[derive(Debug)]
pub(crate) struct Repeats(pub(crate) u32);

impl Repeats {
    /// Measures, and again while too much time was stolen and repeats are left. Whether a result counts does not
    /// depend on what it is.
    ///
    /// # Errors
    /// When measuring fails.
    pub(crate) fn undisturbed<T>(&mut self, mut measure: impl FnMut() -> Result<T>) -> Result<T> {
        loop {
            let before = CpuTime::now()?;
            let measured = measure()?;
            let stolen = before.stolen_until(CpuTime::now()?);
            if stolen <= MUCH || self.0 == 0 {
                return Ok(measured);
            }
            self.0 -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_share_is_of_all_cpus_and_guests_are_not_counted_twice() {
        let text = |user, steal| format!("cpu  {user} 0 50 800 0 0 0 {steal} 40 40\ncpu0 1 1 1\n");
        let [before, after] =
            [(100, 0), (190, 10)].map(|(user, steal)| CpuTime::parse(&text(user, steal)).unwrap());
        assert!((before.stolen_until(after) - 0.1).abs() < 1e-9);
        assert_eq!(before.stolen_until(before), 0.0);
        assert!(CpuTime::parse("cpu 1 2 3\n").is_none());
    }

    #[test]
    fn without_repeats_left_what_was_measured_counts() {
        let mut times = 0;
        let mut repeats = Repeats(0);
        repeats
            .undisturbed(|| {
                times += 1;
                Ok(())
            })
            .unwrap();
        assert_eq!(times, 1);
    }
}
