//! What a program costs, from the kernel's own statistics: time and runs, of a dispatcher with what it calls.
//!
//! The kernel counts while a file descriptor says so (`BPF_ENABLE_STATS`), which ends with this process however it
//! ends; `kernel.bpf_stats_enabled` is not touched.

use std::{
    fs,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use aya::{
    programs::ProgramInfo,
    sys::{Stats, enable_stats},
};

/// What `bench datapath` counts, by where the program runs. On the client's node packets are translated, on the
/// backend's node only checked and delivered; between pods of one node one program does both.
pub(crate) const PROGRAMS: [&str; 5] = [
    "pod, same node",
    "pod, client's node",
    "tunnel, backend's node",
    "pod, backend's node",
    "tunnel, client's node",
];

/// A program that ran less often in a round met only what the stacks say by themselves: neighbours, reports.
const FEWEST: u64 = 100;

/// Whether a case of the figures is a program.
pub(crate) fn is_program(case: &str) -> bool {
    PROGRAMS.contains(&case)
}

/// Programs are counted as long as this lives.
#[derive(Debug)]
pub(crate) struct Counting {
    _statistics: OwnedFd,
}

impl Counting {
    pub(crate) fn start() -> Result<Self> {
        let statistics = enable_stats(Stats::RunTime)
            .context("failed to enable the kernel's program statistics")?;
        Ok(Self {
            _statistics: statistics,
        })
    }
}

/// A pinned program.
#[derive(Clone, Debug)]
pub(crate) struct Program {
    pin: PathBuf,
}

/// What it ran since it was loaded, while somebody counted.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Runs {
    nanoseconds: u64,
    count: u64,
}

impl Program {
    /// The program of this name in the pin folder of whatever layout is there.
    pub(crate) fn pinned_below(bpffs: &Path, name: &str) -> Result<Self> {
        let layouts =
            fs::read_dir(bpffs).with_context(|| format!("failed to list {}", bpffs.display()))?;
        layouts
            .flatten()
            .map(|layout| layout.path().join("programs").join(name))
            .find(|pin| pin.exists())
            .map(|pin| Self { pin })
            .with_context(|| format!("no program {name} is pinned below {}", bpffs.display()))
    }

    pub(crate) fn runs(&self) -> Result<Runs> {
        let info = ProgramInfo::from_pin(&self.pin)
            .with_context(|| format!("failed to ask for {}", self.pin.display()))?;
        Ok(Runs {
            nanoseconds: u64::try_from(info.run_time().as_nanos())
                .context("a program ran for centuries")?,
            count: info.run_count(),
        })
    }
}

impl Runs {
    /// Nanoseconds per run since `earlier`; `None` where no load can have made it run.
    pub(crate) fn since(self, earlier: Self) -> Option<f64> {
        let count = self.count.checked_sub(earlier.count)?;
        let nanoseconds = self.nanoseconds.checked_sub(earlier.nanoseconds)?;
        (count >= FEWEST).then(|| nanoseconds as f64 / count as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cost_of_a_run_is_that_of_the_runs_between_two_looks() {
        let runs = |nanoseconds, count| Runs { nanoseconds, count };
        assert_eq!(runs(10_900, 104).since(runs(900, 4)), Some(100.0));
        assert_eq!(runs(10_800, 103).since(runs(900, 4)), None);
    }
}
