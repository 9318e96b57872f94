//! The simulation of the leads (`tests/sim`), with as many seeds as are wanted, or one of them printed.

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
    /// Runs this seed only, and prints what happens.
    #[arg(long, conflicts_with_all = ["seeds", "from"])]
    seed: Option<u64>,
}

/// Builds the simulation for speed and runs it.
pub(crate) fn run(args: &SimArgs) -> Result<()> {
    let mut command = build::cargo(&[
        "test",
        "--quiet",
        "--profile",
        "sim",
        "--package",
        "weft-sim",
        "--",
        "--ignored",
        "--nocapture",
    ]);
    command
        .env("WEFT_SIM_SEEDS", args.seeds.to_string())
        .env("WEFT_SIM_FROM", args.from.to_string());
    if let Some(seed) = args.seed {
        command.env("WEFT_SIM_SEED", seed.to_string());
    }
    let status = command.status().context("failed to start cargo test")?;
    ensure!(status.success(), "the simulation: {status}");
    Ok(())
}
