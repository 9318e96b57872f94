//! The simulation of leads and agents (`tests/sim`), with as many seeds as are wanted, or one of them printed.

mod planted;

use anyhow::{Context, Result, ensure};
use clap::Args;

use crate::build;

#[derive(Debug, Args)]
pub(crate) struct SimArgs {
    /// How many seeds are run.
    #[arg(long, default_value_t = 200)]
    seeds: u64,
    /// The first of them.
    #[arg(long, default_value_t = 0)]
    from: u64,
    /// What the runs are about: leads, mesh, returns or twins; unless it is said, each seed has one of the first three.
    #[arg(long)]
    profile: Option<String>,
    /// Runs this seed only, and prints what happens; with RUST_LOG also what leads and agents log.
    #[arg(long, conflicts_with_all = ["seeds", "from"])]
    seed: Option<u64>,
    /// Plants a bug in a copy of the last commit, and says which seed finds it: vote, ack, read or starts.
    #[arg(long, conflicts_with = "seed")]
    planted: Option<String>,
}

/// How the simulation is built and run.
const RUN: &[&str] = &[
    "test",
    "--quiet",
    "--profile",
    "sim",
    "--package",
    "weft-sim",
    "--",
    "--ignored",
    "--nocapture",
];

/// Builds the simulation for speed and runs it.
pub(crate) fn run(args: &SimArgs) -> Result<()> {
    let mut command = build::cargo(RUN);
    command
        .env("WEFT_SIM_SEEDS", args.seeds.to_string())
        .env("WEFT_SIM_FROM", args.from.to_string());
    if let Some(profile) = &args.profile {
        command.env("WEFT_SIM_PROFILE", profile);
    }
    if let Some(name) = &args.planted {
        return planted::find(name, command);
    }
    if let Some(seed) = args.seed {
        command.env("WEFT_SIM_SEED", seed.to_string());
    }
    let status = command.status().context("failed to start cargo test")?;
    ensure!(status.success(), "the simulation: {status}");
    Ok(())
}
