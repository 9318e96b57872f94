//! Processes that are started with a program of ours and end with it, however it ends.

use std::{
    fs::{self, File},
    net::{SocketAddr, TcpListener},
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use crate::Process;
use anyhow::{Context, Result, ensure};

/// Ticks of proc_pid_stat(5) in a second: `USER_HZ`.
const TICKS: u64 = 100;
/// How much of a log is shown.
const TAIL: usize = 2_000;

/// Starts `program`; what it says is in the file `log`.
///
/// # Errors
/// When it cannot be started, or the file not be written.
pub fn start(program: &Path, arguments: &[String], log: &Path) -> Result<Process> {
    let said = File::options()
        .create(true)
        .append(true)
        .open(log)
        .with_context(|| format!("failed to make {}", log.display()))?;
    let child = Command::new("setpriv")
        .args(["--pdeathsig", "KILL", "--"])
        .arg(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(said)
        .spawn()
        .context("failed to start setpriv (package util-linux)")?;
    Ok(Process(child))
}

/// The end of what a member said.
#[must_use]
pub fn tail(log: &Path) -> String {
    let text = fs::read(log).unwrap_or_default();
    let end = &text[text.len().saturating_sub(TAIL)..];
    String::from_utf8_lossy(end).into_owned()
}

/// So many free addresses of this machine, all different.
///
/// # Errors
/// When there are not so many.
pub fn addresses(count: usize) -> Result<Vec<SocketAddr>> {
    // Held together: one that is given back may be given again.
    let held: Result<Vec<_>, _> = (0..count)
        .map(|_| TcpListener::bind("127.0.0.1:0"))
        .collect();
    let held = held.context("failed to find a free port")?;
    held.iter().map(|it| Ok(it.local_addr()?)).collect()
}

/// Runs a command to its successful end.
///
/// # Errors
/// When it cannot be started, or fails.
pub fn run(command: &mut Command) -> Result<()> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.output();
    let output = output.with_context(|| format!("failed to start {name}"))?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "{name}: {}: {said}", output.status);
    Ok(())
}

/// CPU time of processes.
#[derive(Clone, Copy, Debug)]
pub struct CpuTime(u64);

impl CpuTime {
    /// Of these together.
    ///
    /// # Errors
    /// When one is gone.
    pub fn of_all(pids: &[u32]) -> Result<Self> {
        let each = pids
            .iter()
            .map(|pid| Self::at(&format!("/proc/{pid}/stat")));
        let sum: Result<u64> = each.map(|time| Ok(time?.0)).sum();
        Ok(Self(sum?))
    }

    /// Of this process.
    ///
    /// # Errors
    /// When the kernel does not say.
    pub fn own() -> Result<Self> {
        Self::at("/proc/self/stat")
    }

    fn at(path: &str) -> Result<Self> {
        let text = fs::read_to_string(path).with_context(|| format!("failed to read {path}"))?;
        let ticks = ticks(&text).with_context(|| format!("{path} has no times"))?;
        Ok(Self(ticks))
    }

    /// What was spent from this to `later`.
    #[must_use]
    pub fn until(self, later: Self) -> Duration {
        Duration::from_millis(later.0.saturating_sub(self.0) * 1_000 / TICKS)
    }
}

/// User and system time, the 14th and 15th field; the second is a name in parentheses that may hold anything.
fn ticks(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_whitespace().skip(11);
    let [user, system] = [fields.next()?, fields.next()?].map(str::parse::<u64>);
    Some(user.ok()? + system.ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_charged_for_user_and_system_time_whatever_its_name() {
        let stat = "7 (we) ft) S 1 7 7 0 -1 4194560 1 2 3 4 30 12 5 6 20 0 4 0 99 1 1";
        assert_eq!(ticks(stat), Some(42));
        assert_eq!(ticks("7 (weft) S 1"), None);
        let time = CpuTime(10).until(CpuTime(52));
        assert_eq!(time, Duration::from_millis(420));
    }
}
