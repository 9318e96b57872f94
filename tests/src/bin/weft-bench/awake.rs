//! CPUs that do not halt. On a virtual machine a CPU that halts is given to another guest, and every wake-up waits
//! until the host gives it back: measured, that was three quarters of a ping-pong between two processes. A loop of
//! the kernel's idle class (sched(7), `SCHED_IDLE`) on each CPU runs only where nothing else wants to.

use std::process::{Command, Stdio};

use anyhow::{Context, Result};
use weft_tests::Process;

use crate::load::CPUS;

/// The kernel shares time between sessions first, where it groups them (sched(7), autogroup): as the lowest session,
/// or it would take its half.
const LOOP: &str =
    "[ ! -e /proc/self/autogroup ] || echo 19 > /proc/self/autogroup; while :; do :; done";

/// The loops; they end with this, and with this process however it ends.
#[derive(Debug)]
pub(crate) struct Awake {
    _loops: Vec<Process>,
}

impl Awake {
    /// Keeps the CPUs of the loads awake.
    pub(crate) fn keep() -> Result<Self> {
        let loops = CPUS.map(|cpu| {
            Command::new("setsid")
                .args(["setpriv", "--pdeathsig", "KILL", "chrt", "--idle", "0"])
                .args(["taskset", "--cpu-list", &cpu.to_string()])
                .args(["sh", "-c", LOOP])
                .stdin(Stdio::null())
                .spawn()
                .map(Process)
                .context(
                    "failed to start setsid (package util-linux) with a loop of the idle class",
                )
        });
        Ok(Self {
            _loops: loops.into_iter().collect::<Result<_>>()?,
        })
    }
}
