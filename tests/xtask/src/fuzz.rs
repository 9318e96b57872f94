//! Fuzzing by coverage: builds `tests/fuzz` with LLVM's coverage counters and lets libFuzzer look for inputs.
//!
//! The counters are a pass of the stable compiler's LLVM, so no other toolchain is needed; what is built that way
//! is kept apart (`target/fuzz`), because every crate is instrumented. Inputs that libFuzzer thought worth keeping stay in
//! `target/fuzz/corpus`, what it found in `target/fuzz/found`: put a finding into `tests/fuzz/corpus/TARGET` with
//! its fix, and every test run tries it again.

use std::{
    fs,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;

use crate::{build, debian::output, host};

/// What rustc must be told: the counters that libFuzzer reads (its `-fsanitize=fuzzer`, clang's
/// SanitizerCoverage page), and checks that a release build leaves out.
const FLAGS: [&str; 6] = [
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "-Cdebug-assertions=on",
];
/// The longest input, bytes: a table of a few services.
const LONGEST: u32 = 4096;

#[derive(Debug, Args)]
pub(crate) struct FuzzArgs {
    /// The target: a folder of tests/fuzz/corpus.
    target: String,
    /// How long.
    #[arg(long, default_value_t = 60)]
    seconds: u32,
}

/// Runs one target; a finding is an error that names its file.
pub(crate) fn run(args: &FuzzArgs) -> Result<()> {
    host::check(host::Needs::ENGINE)?;
    let known = build::root().join("tests/fuzz/corpus").join(&args.target);
    ensure!(
        known.is_dir(),
        "no target {:?}: {}",
        args.target,
        targets()?.join(", ")
    );
    let folder = folder()?;
    let program = engine(&folder)?;
    let kept = folder.join("corpus").join(&args.target);
    let found = folder.join("found");
    for path in [&kept, &found] {
        fs::create_dir_all(path).with_context(|| format!("failed to make {}", path.display()))?;
    }
    let alarms = host::kernel_alarms();
    let mut child = Command::new(program)
        .env("WEFT_FUZZ_TARGET", &args.target)
        .arg(format!("-max_total_time={}", args.seconds))
        .arg(format!("-max_len={LONGEST}"))
        .arg("-print_final_stats=1")
        .arg(format!(
            "-artifact_prefix={}/{}-",
            found.display(),
            args.target
        ))
        .args([&kept, &known])
        .stdout(Stdio::inherit())
        .stderr(Stdio::piped())
        .spawn()
        .context("failed to start the engine")?;
    let said = child.stderr.take().expect("standard error was piped");
    let mut executions = None;
    for line in BufReader::new(said).lines() {
        let line = line.context("failed to read what the engine says")?;
        eprintln!("{line}");
        executions = number_of_executions(&line).or(executions);
    }
    let status = child.wait().context("failed to wait for the engine")?;
    ensure!(
        status.success(),
        "{}: a finding in {} ({status})",
        args.target,
        found.display()
    );
    let new = host::kernel_alarms().saturating_sub(alarms);
    ensure!(new == 0, "the kernel warned {new} times: dmesg");
    match executions {
        Some(count) => println!("{}: {count} executions, no finding", args.target),
        None => bail!("the engine did not say how often it ran"),
    }
    Ok(())
}

/// The names of the targets.
fn targets() -> Result<Vec<String>> {
    let folder = build::root().join("tests/fuzz/corpus");
    let mut names: Vec<String> = fs::read_dir(&folder)
        .with_context(|| format!("failed to list {}", folder.display()))?
        .filter_map(|entry| Some(entry.ok()?.file_name().to_string_lossy().into_owned()))
        .collect();
    names.sort();
    Ok(names)
}

/// The target folder's part for fuzzing.
fn folder() -> Result<PathBuf> {
    let metadata = output(
        build::cargo(&["metadata", "--format-version=1", "--no-deps"]).stderr(Stdio::inherit()),
    )?;
    let metadata: serde_json::Value =
        serde_json::from_str(&metadata).context("cargo's metadata is not JSON")?;
    let target = metadata["target_directory"]
        .as_str()
        .context("cargo names no target folder")?;
    Ok(Path::new(target).join("fuzz"))
}

/// Builds the engine with all targets.
fn engine(folder: &Path) -> Result<PathBuf> {
    // Named, so that the flags are for what runs in the end and not for what builds it.
    let version = output(Command::new("rustc").arg("-vV"))?;
    let triple = version
        .lines()
        .find_map(|line| line.strip_prefix("host: "))
        .context("rustc names no host")?;
    let args = [
        "build",
        "--profile=fuzz",
        "--package=weft-fuzz",
        "--features=engine",
        "--bin=weft-fuzz",
        "--target",
        triple,
    ];
    eprintln!("$ cargo {}", args.join(" "));
    let status = build::cargo(&args)
        .env("CARGO_TARGET_DIR", folder)
        .env("CARGO_ENCODED_RUSTFLAGS", FLAGS.join("\x1f"))
        .status()
        .context("failed to start cargo build")?;
    ensure!(status.success(), "the engine does not build: {status}");
    Ok(folder.join(triple).join("fuzz/weft-fuzz"))
}

/// How often the engine ran its target, if this line of its says so.
fn number_of_executions(line: &str) -> Option<u64> {
    let rest = line.strip_prefix("stat::number_of_executed_units:")?;
    rest.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_engine_says_how_often_it_ran() {
        let line = "stat::number_of_executed_units: 1048576";
        assert_eq!(number_of_executions(line), Some(1_048_576));
        assert_eq!(number_of_executions("stat::peak_rss_mb: 60"), None);
    }

    #[test]
    fn every_target_has_a_corpus() {
        let names = targets().unwrap();
        assert!(names.contains(&"programs".to_owned()), "{names:?}");
    }
}
