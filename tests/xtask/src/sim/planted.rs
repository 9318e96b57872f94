//! Bugs that the simulation must find: each is planted in a copy of the source, never in the source itself.
//!
//! A bug is one replacement of text, which is there exactly once: when the code around it changes, the test below says so.

use std::{
    env, fs,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, ensure};

use crate::build;

/// A bug.
struct Planted {
    name: &'static str,
    file: &'static str,
    from: &'static str,
    to: &'static str,
}

const PLANTED: &[Planted] = &[
    // A vote that is not persisted: after a crash a lead votes again in the same term.
    Planted {
        name: "vote",
        file: "control/lead/src/raft/log.rs",
        from: "self.disk.write(vec![vote]).await.map_err(vote_failed)",
        to: "let _ = vote; Ok(())",
    },
    // An entry that is acknowledged before it is on the disk.
    Planted {
        name: "ack",
        file: "control/lead/src/raft/disk.rs",
        from: "        transaction.set_two_phase_commit(true);",
        to: "        if writes.iter().any(|it| matches!(it, Write::Append(_))) {
            let _ = transaction.set_durability(redb::Durability::None);
        }",
    },
    // A read from a leader that may have been deposed: it asks nobody, and looks at no lease.
    Planted {
        name: "read",
        file: "control/lead/src/lead.rs",
        from: "        if !self.has_majority() {",
        to: "        let applied = self.raft.metrics().borrow().last_applied;
        if let (Ask::ReadIndex, Some(applied)) = (&ask, applied) {
            return Ok(Answer::Index(applied.index));
        }
        if !self.has_majority() {",
    },
    // A cluster that is back starts things before its owed stops are done.
    Planted {
        name: "starts",
        file: "control/agent/src/reconcile.rs",
        from: "    if may_start(view, orders) {",
        to: "    if view.orders.is_some() {",
    },
];

fn planted(name: &str) -> Result<&'static Planted> {
    let names: Vec<_> = PLANTED.iter().map(|it| it.name).collect();
    let found = PLANTED.iter().find(|it| it.name == name);
    found.with_context(|| format!("{name:?} is no planted bug: {}", names.join(", ")))
}

impl Planted {
    /// The file below `root` with the bug in it.
    fn plant(&self, root: &Path) -> Result<String> {
        let path = root.join(self.file);
        let text = fs::read_to_string(&path)
            .with_context(|| format!("failed to read {}", path.display()))?;
        ensure!(
            text.matches(self.from).count() == 1,
            "the bug {:?} cannot be planted: {:?} is not in {} exactly once",
            self.name,
            self.from,
            self.file
        );
        Ok(text.replace(self.from, self.to))
    }
}

/// A copy of the last commit; gone when dropped.
struct Checkout(PathBuf);

impl Checkout {
    fn make(dir: PathBuf) -> Result<Self> {
        let _ = git(&["worktree", "remove", "--force"], &dir);
        git(&["worktree", "add", "--detach"], &dir)?;
        Ok(Self(dir))
    }
}

impl Drop for Checkout {
    fn drop(&mut self) {
        if let Err(error) = git(&["worktree", "remove", "--force"], &self.0) {
            eprintln!("{} stays: {error:#}", self.0.display());
        }
    }
}

fn git(arguments: &[&str], dir: &Path) -> Result<()> {
    let mut command = Command::new("git");
    command.args(arguments).arg(dir).current_dir(build::root());
    let output = command.output().context("failed to start git")?;
    ensure!(
        output.status.success(),
        "git {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}

/// Plants the bug `name` in a copy, and runs `simulation` there until a seed finds it.
pub(super) fn find(name: &str, mut simulation: Command) -> Result<()> {
    let bug = planted(name)?;
    let checkout = Checkout::make(target().join("planted").join(name))?;
    let text = bug.plant(&checkout.0)?;
    fs::write(checkout.0.join(bug.file), text).context("failed to plant the bug")?;
    let mut child = simulation
        .current_dir(&checkout.0)
        .env("CARGO_TARGET_DIR", target())
        .env("WEFT_SIM_FIRST", "1")
        .stdout(Stdio::piped())
        .spawn()
        .context("failed to start cargo test")?;
    let output = child.stdout.take().expect("standard output was piped");
    let mut is_found = false;
    for line in BufReader::new(output).lines() {
        let line = line.context("failed to read what the simulation says")?;
        is_found |= line.starts_with("seed ");
        println!("{line}");
    }
    child.wait().context("failed to wait for the simulation")?;
    ensure!(is_found, "no seed finds the bug {name:?}");
    Ok(())
}

/// Where cargo builds.
fn target() -> PathBuf {
    let given = env::var_os("CARGO_TARGET_DIR").map(PathBuf::from);
    given.unwrap_or_else(|| build::root().join("target"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_bug_can_still_be_planted() {
        for bug in PLANTED {
            bug.plant(build::root()).expect(bug.name);
        }
    }
}
