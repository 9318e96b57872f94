//! Real leads under faults (`weft_tests::faults`), as long as is wanted.

use std::{
    process::Command,
    thread,
    time::{SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result, ensure};
use clap::Args;

use crate::{build, check, host};

#[derive(Debug, Args)]
pub(crate) struct FaultsArgs {
    /// How long there are faults, minutes.
    #[arg(long, default_value_t = 10)]
    minutes: u64,
    /// What decides which faults there are; another one each time unless it is said.
    #[arg(long)]
    seed: Option<u64>,
    /// The round-trip time between the leads, milliseconds.
    #[arg(long, default_value_t = 0)]
    rtt: u64,
}

/// Builds the leads for release and runs them under faults.
pub(crate) fn run(args: &FaultsArgs) -> Result<()> {
    host::check(host::Needs::NETFILTER)?;
    let binaries = build::release(build::CONTROL_PLANE)?;
    let faults = build::executables(&["weft-tests"])?
        .remove("weft-faults")
        .context("cargo built no weft-faults")?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?;
    let seed = args.seed.unwrap_or(now.as_secs());
    eprintln!("seed {seed}");
    let mut command = Command::new(faults);
    command
        .arg("--data")
        .arg(&binaries)
        .arg("--binaries")
        .arg(&binaries)
        .args(["--seed", &seed.to_string()])
        .args(["--seconds", &(60 * args.minutes).to_string()])
        .args(["--rtt", &args.rtt.to_string()]);
    let run = move || {
        check::own_mounts().context("failed to make a mount namespace")?;
        command.status().context("failed to start weft-faults")
    };
    let status = thread::spawn(run).join();
    let status = status.expect("the thread returns its errors")?;
    ensure!(status.success(), "weft-faults: {status}");
    Ok(())
}
