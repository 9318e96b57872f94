//! Time that the hypervisor gave to other machines (`steal` of proc_stat(5)): what else could tell a slow program
//! from a slow machine.

use std::{fs, io};

/// CPU time since boot, in ticks of `USER_HZ`.
#[derive(Clone, Copy, Debug)]
pub struct CpuTime {
    all: u64,
    stolen: u64,
}

impl CpuTime {
    /// That of all CPUs.
    ///
    /// # Errors
    /// When the kernel's count cannot be read.
    pub fn now() -> io::Result<Self> {
        Self::parse(&fs::read_to_string("/proc/stat")?)
            .ok_or_else(|| io::Error::other("/proc/stat has no line `cpu` with eight numbers"))
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

    /// The share, 0 to 1, that was stolen from `self` to `later`. Numbers of /proc/stat may fall (proc_stat(5), of
    /// `iowait`): then nothing was.
    #[must_use]
    pub fn stolen_until(self, later: Self) -> f64 {
        match later.all.saturating_sub(self.all) {
            0 => 0.0,
            all => (later.stolen.saturating_sub(self.stolen) as f64 / all as f64).min(1.0),
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
        assert_eq!(after.stolen_until(before), 0.0);
        assert!(CpuTime::parse("cpu 1 2 3\n").is_none());
    }
}
