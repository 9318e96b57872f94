//! The checks that CI runs, and the count of tests.

use std::{
    fmt, fs,
    io::{BufRead, BufReader},
    ops::AddAssign,
    process::Stdio,
    thread,
};

use anyhow::{Context, Result};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};

use crate::build;

/// How many tests passed and failed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    /// Tests that passed.
    pub(crate) passed: u32,
    /// Tests that failed, and test programs that could not be built or crashed.
    pub(crate) failed: u32,
}

impl Tally {
    /// Whether something passed and nothing failed.
    pub(crate) fn is_green(self) -> bool {
        self.failed == 0 && self.passed > 0
    }

    /// One check that is not a cargo test.
    pub(crate) fn of(result: &Result<()>) -> Self {
        Self {
            passed: u32::from(result.is_ok()),
            failed: u32::from(result.is_err()),
        }
    }

    /// The count in a line of libtest, `test result: ok. 3 passed; 0 failed; ...`.
    pub(crate) fn parse(line: &str) -> Option<Self> {
        let rest = line.strip_prefix("test result: ")?;
        let count = |word: &str| {
            rest.split([';', '.'])
                .find_map(|part| part.trim().strip_suffix(word)?.trim().parse().ok())
        };
        Some(Self {
            passed: count("passed")?,
            failed: count("failed")?,
        })
    }
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed", self.passed, self.failed)
    }
}

/// Format, lints, golden files and the dependency rule; writes nothing into the source.
pub(crate) fn verify() -> Result<()> {
    build::run(&["fmt", "--all", "--check"])?;
    build::run(&[
        "clippy",
        "--workspace",
        "--features",
        "weft-tests/vm",
        "--all-targets",
        "--quiet",
        "--",
        "-D",
        "warnings",
    ])?;
    build::run(&[
        "test",
        "--quiet",
        "--package",
        "weft-tests",
        "--test",
        "dependencies",
    ])?;
    golden("no")
}

/// Format, machine-applicable lints and golden files, put right in the source.
pub(crate) fn fix() -> Result<()> {
    build::run(&[
        "clippy",
        "--workspace",
        "--features",
        "weft-tests/vm",
        "--all-targets",
        "--quiet",
        "--fix",
        "--allow-dirty",
        "--allow-staged",
    ])?;
    build::run(&["fmt", "--all"])?;
    golden("always")
}

/// Runs the tests with golden files; `update` says what becomes of a difference (insta's `INSTA_UPDATE`).
fn golden(update: &str) -> Result<()> {
    eprintln!("$ INSTA_UPDATE={update} cargo test --workspace golden");
    let status = build::cargo(&["test", "--workspace", "--quiet", "golden"])
        .env("INSTA_UPDATE", update)
        .stdout(Stdio::null())
        .status()
        .context("failed to start cargo test")?;
    anyhow::ensure!(
        status.success(),
        "a golden file differs: cargo xtask fix writes it anew, the review shows the change"
    );
    Ok(())
}

/// The tests that need no capability.
pub(crate) fn unit() -> Result<Tally> {
    tests(&["test", "--workspace", "--no-fail-fast"])
}

/// The tests that need root, in a mount namespace of their own: what they forget is gone with it.
pub(crate) fn netns(filter: Option<&str>) -> Result<Tally> {
    build::run(&["build", "--workspace", "--bins", "--quiet"])?;
    let mut args = vec!["test", "--workspace", "--no-fail-fast"];
    // What it leaves out are not tests that need root, but the seeds that `cargo xtask sim` names.
    args.extend(["--exclude", "weft-sim", "--", "--ignored"]);
    args.extend(filter);
    thread::scope(|scope| {
        scope
            .spawn(|| {
                own_mounts().context("failed to make a mount namespace for the tests")?;
                tests(&args)
            })
            .join()
            .expect("the thread returns its errors")
    })
}

/// Gives the calling thread, and what it starts, mounts of its own: an empty bpffs and no named namespaces.
pub(crate) fn own_mounts() -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
    fs::create_dir_all("/run/netns")?;
    mount(
        Some("tmpfs"),
        "/run/netns",
        Some("tmpfs"),
        MsFlags::empty(),
        none,
    )?;
    mount(
        Some("bpf"),
        "/sys/fs/bpf",
        Some("bpf"),
        MsFlags::empty(),
        none,
    )?;
    Ok(())
}

/// Runs cargo's tests, shows what they say and counts them.
fn tests(args: &[&str]) -> Result<Tally> {
    eprintln!("$ cargo {}", args.join(" "));
    let mut child = build::cargo(args)
        .stdout(Stdio::piped())
        .env("INSTA_UPDATE", "no")
        .spawn()
        .context("failed to start cargo test")?;
    let output = child.stdout.take().expect("standard output was piped");
    let mut tally = Tally::default();
    for line in BufReader::new(output).lines() {
        let line = line.context("failed to read what cargo test says")?;
        println!("{line}");
        if let Some(count) = Tally::parse(&line) {
            tally += count;
        }
    }
    let status = child.wait().context("failed to wait for cargo test")?;
    if !status.success() && tally.failed == 0 {
        tally.failed = 1;
    }
    Ok(tally)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_libtest_is_counted() {
        let line = "test result: FAILED. 12 passed; 3 failed; 4 ignored; 0 measured; 9 filtered out; finished in 0.2s";
        assert_eq!(
            Tally::parse(line),
            Some(Tally {
                passed: 12,
                failed: 3
            })
        );
        for other in ["running 3 tests", "test result: ok.", "test a ... ok"] {
            assert_eq!(Tally::parse(other), None, "{other}");
        }
    }

    #[test]
    fn nothing_run_is_not_green() {
        assert!(!Tally::default().is_green());
        assert!(
            Tally {
                passed: 1,
                failed: 0
            }
            .is_green()
        );
        assert!(
            !Tally {
                passed: 9,
                failed: 1
            }
            .is_green()
        );
    }
}
