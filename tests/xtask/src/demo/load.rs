//! The steady load: 250 pages a second from the visitor's pod, watched second by second.

use std::{
    collections::BTreeMap,
    fmt,
    fs::{self, File},
    path::PathBuf,
    process::{Child, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;

use super::mesh::{Mesh, VISITOR, wait};

/// Pages per second.
const RATE: &str = "250";
/// The load ends by itself if nobody ends it, seconds.
const LONGEST: &str = "600";
/// Seconds that a page takes at most, and one for the counting.
const TAIL: usize = 3;

/// A running load.
#[derive(Debug)]
pub(crate) struct Load {
    child: Child,
    file: PathBuf,
}

/// What a load saw in some seconds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) ok: u64,
    pub(crate) failed: u64,
    /// The longest time without a success, milliseconds.
    pub(crate) gap_ms: u64,
    pub(crate) slowest_ms: u64,
    pub(crate) served: BTreeMap<String, u64>,
    pub(crate) failures: BTreeMap<String, u64>,
}

/// A moment of a load.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mark(usize);

impl Load {
    /// Starts it and waits until pages come.
    pub(crate) fn start(mesh: &Mesh) -> Result<Self> {
        let file = std::env::temp_dir().join(format!("weft-demo-{}.load", mesh.id()));
        let out = File::create(&file).context("failed to make the load's file")?;
        let url = mesh.page("balanced", 4)?;
        let args = [
            "bookinfo",
            "load",
            &url,
            "--rate",
            RATE,
            "--seconds",
            LONGEST,
        ];
        let child = mesh
            .command(VISITOR, &args)
            .stdin(Stdio::null())
            .stdout(out)
            .spawn()
            .context("failed to start the load")?;
        let load = Self { child, file };
        wait("the load runs", Duration::from_secs(10), || {
            ensure!(
                load.seconds().len() >= 2,
                "the load has not counted two seconds"
            );
            Ok(())
        })?;
        Ok(load)
    }

    /// Now.
    pub(crate) fn mark(&self) -> Mark {
        Mark(self.seconds().len())
    }

    /// How many seconds were counted since a mark.
    pub(crate) fn seconds_since(&self, mark: Mark) -> usize {
        self.seconds().len().saturating_sub(mark.0)
    }

    /// What was seen since a mark, all that was sent by now included.
    pub(crate) fn since(&self, mark: Mark) -> Result<Seen> {
        let now = self.seconds().len();
        wait("the load counts on", Duration::from_secs(20), || {
            ensure!(
                self.seconds().len() >= now + TAIL,
                "the load does not count any more"
            );
            Ok(())
        })?;
        Ok(self.seconds()[mark.0..]
            .iter()
            .fold(Seen::default(), Seen::plus))
    }

    /// What was seen in the last `count` seconds.
    pub(crate) fn last(&self, count: usize) -> Seen {
        let seconds = self.seconds();
        let first = seconds.len().saturating_sub(count);
        seconds[first..].iter().fold(Seen::default(), Seen::plus)
    }

    /// Ends the load; everything that it saw.
    pub(crate) fn stop(mut self) -> Result<Seen> {
        let pid = i32::try_from(self.child.id()).context("a process number is an i32")?;
        kill(Pid::from_raw(pid), Signal::SIGTERM).context("failed to end the load")?;
        let status = self.child.wait().context("failed to wait for the load")?;
        ensure!(status.success(), "the load ended with {status}");
        let sum = self
            .lines()
            .into_iter()
            .find_map(|line| Some(Seen::of(line.get("sum")?)));
        sum.context("the load gave no sum")
    }

    fn seconds(&self) -> Vec<Seen> {
        let lines = self.lines();
        lines
            .iter()
            .filter_map(|line| line.get("second"))
            .map(Seen::of)
            .collect()
    }

    fn lines(&self) -> Vec<Value> {
        let text = fs::read_to_string(&self.file).unwrap_or_default();
        text.lines()
            .filter_map(|line| serde_json::from_str(line).ok())
            .collect()
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        // Both fail where it has ended, which is the aim.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_file(&self.file);
    }
}

impl Seen {
    fn of(value: &Value) -> Self {
        let number = |name: &str| value[name].as_u64().unwrap_or(0);
        let counts = |name: &str| serde_json::from_value(value[name].clone()).unwrap_or_default();
        Self {
            ok: number("ok"),
            failed: number("failed"),
            gap_ms: number("gap_ms"),
            slowest_ms: number("slowest_ms"),
            served: counts("served"),
            failures: counts("failures"),
        }
    }

    fn plus(mut self, other: &Self) -> Self {
        self.ok += other.ok;
        self.failed += other.failed;
        self.gap_ms = self.gap_ms.max(other.gap_ms);
        self.slowest_ms = self.slowest_ms.max(other.slowest_ms);
        for (place, count) in &other.served {
            *self.served.entry(place.clone()).or_default() += count;
        }
        for (reason, count) in &other.failures {
            *self.failures.entry(reason.clone()).or_default() += count;
        }
        self
    }

    /// That no page failed, and that there were any.
    pub(crate) fn flawless(&self) -> Result<String, String> {
        if self.failed == 0 && self.ok > 0 {
            Ok(self.to_string())
        } else {
            Err(self.to_string())
        }
    }
}

impl fmt::Display for Seen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            ok,
            failed,
            gap_ms,
            slowest_ms,
            ..
        } = self;
        write!(
            f,
            "{ok} pages answered, {failed} failed, longest gap {gap_ms} ms, slowest {slowest_ms} ms"
        )?;
        for (reason, count) in &self.failures {
            write!(f, "; {count} x {reason}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn seconds_add_up_and_gaps_do_not() {
        let first = Seen::of(&json!({ "ok": 2, "gap_ms": 5, "served": { "a": 2 } }));
        let second = Seen::of(
            &json!({ "ok": 1, "failed": 1, "gap_ms": 3, "served": { "a": 1 },
            "failures": { "refused": 1 } }),
        );
        let sum = first.clone().plus(&second);
        assert_eq!((sum.ok, sum.failed, sum.gap_ms), (3, 1, 5));
        assert_eq!(sum.served["a"], 3);
        assert!(first.flawless().is_ok());
        assert!(sum.flawless().unwrap_err().ends_with("1 x refused"));
        assert!(Seen::default().flawless().is_err());
    }
}
