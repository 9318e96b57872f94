//! The commands, and what each is made of.

use anyhow::{Result, bail};
use clap::{Args, Parser, Subcommand};

use crate::{bench, check, demo, ebpf, faults, fuzz, host, sim, vm};

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
    Test(TestArgs),
    /// Format, lints, golden files and the dependency rule; never writes into the source.
    Verify,
    /// Puts right what `verify` finds and a tool can: format, lints, golden files.
    Fix,
    /// The tests that need root, each in network namespaces of its own.
    Netns(FilterArgs),
    /// The same tests, and those of kernel WireGuard, under Debian's older kernels, emulated: slow.
    Vm(vm::VmArgs),
    /// Looks for inputs that break a decoder or the kernel programs' rules.
    Fuzz(fuzz::FuzzArgs),
    /// Rebuilds the kernel programs' object, and the toolchain for it where it is missing.
    Ebpf,
    /// Builds Weft and shows it whole on this machine, each claim checked.
    Demo(demo::DemoArgs),
    /// Measures against peers in one run.
    Bench(bench::BenchArgs),
    /// Runs the leads in simulated worlds, each decided by a seed.
    Sim(sim::SimArgs),
    /// Runs real leads under faults, decided by a seed, and checks what their clients saw.
    Faults(faults::FaultsArgs),
}

#[derive(Debug, Args)]
struct TestArgs {
    /// Shows the demo too, as one more test.
    #[arg(long)]
    demo: bool,
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
            Command::Test(args) => test(&args),
            Command::Verify => check::verify(),
            Command::Fix => check::fix(),
            Command::Netns(args) => {
                host::check(host::Needs::NETWORK)?;
                finish(check::netns(args.filter.as_deref())?)
            }
            Command::Vm(args) => finish(vm::run(&args)?),
            Command::Fuzz(args) => fuzz::run(&args),
            Command::Ebpf => ebpf::rebuild(),
            Command::Demo(args) => demo::run(&args),
            Command::Bench(args) => bench::run(&args),
            Command::Sim(args) => sim::run(&args),
            Command::Faults(args) => faults::run(&args),
        }
    }
}

fn test(args: &TestArgs) -> Result<()> {
    host::check(host::Needs::NETWORK)?;
    check::verify()?;
    let mut tally = check::unit()?;
    tally += check::netns(None)?;
    if args.demo {
        let shown = demo::run(&demo::DemoArgs::default());
        if let Err(error) = &shown {
            println!("the demo: {error:#}");
        }
        tally += check::Tally::of(&shown);
    }
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
