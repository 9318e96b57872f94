//! The commands, and what each is made of.

use anyhow::{Result, bail};
use clap::{Args, Parser, Subcommand};

use crate::{bench, check, host};

/// Builds, tests, measures and shows Weft.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
pub(crate) struct Xtask {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Everything that CI runs; the last line is the count.
    Test,
    /// Format, lints, golden files and the dependency rule; never writes into the source.
    Verify,
    /// Puts right what `verify` finds and a tool can: format, lints, golden files.
    Fix,
    /// The tests that need root, each in network namespaces of its own.
    Netns(FilterArgs),
    /// Measures against peers in one run.
    Bench(bench::BenchArgs),
}

#[derive(Debug, Args)]
struct FilterArgs {
    /// Only the tests whose names contain this.
    filter: Option<String>,
}

impl Xtask {
    /// Runs the command that was asked for.
    pub(crate) fn run(self) -> Result<()> {
        match self.command {
            Command::Test => test(),
            Command::Verify => check::verify(),
            Command::Fix => check::fix(),
            Command::Netns(args) => {
                host::check(host::Needs::NETWORK)?;
                finish(check::netns(args.filter.as_deref())?)
            }
            Command::Bench(args) => bench::run(&args),
        }
    }
}

fn test() -> Result<()> {
    host::check(host::Needs::NETWORK)?;
    check::verify()?;
    let mut tally = check::unit()?;
    tally += check::netns(None)?;
    finish(tally)
}

fn finish(tally: check::Tally) -> Result<()> {
    println!("{tally}");
    if tally.is_green() {
        Ok(())
    } else {
        bail!("tests failed")
    }
}
