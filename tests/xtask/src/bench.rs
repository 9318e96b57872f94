//! Benchmarks by name; each is a program of its own under `tests/`, built for release.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum};

use crate::{build, host};

#[derive(Debug, Args)]
pub(crate) struct BenchArgs {
    /// Which.
    name: Bench,
    /// One JSON object instead of a table.
    #[arg(long)]
    json: bool,
    /// Interleaved rounds.
    #[arg(long, default_value_t = 15)]
    rounds: u32,
    /// Fail where a gate is missed.
    #[arg(long)]
    gate: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Bench {
    /// A VIP on one node against the direct veth route, iptables and nftables.
    Vip,
    /// Nanoseconds per packet of each program, IPv6 against IPv4; small datagrams against the direct route.
    Datapath,
    /// A VIP on another node against the same tunnel without the programs.
    Tunnel,
    /// 10,000 services with 100,000 backends: load, one change, bytes, nanoseconds per packet.
    Table,
}

/// Builds what is measured and what measures, and runs it.
pub(crate) fn run(args: &BenchArgs) -> Result<()> {
    host::check(host::Needs::NETFILTER)?;
    let binaries = build::release(build::DATA_PATH)?;
    let bench = build::executables(&["weft-tests"])?
        .remove("weft-bench")
        .context("cargo built no weft-bench")?;
    let name = match args.name {
        Bench::Vip => "vip",
        Bench::Datapath => "datapath",
        Bench::Tunnel => "tunnel",
        Bench::Table => "table",
    };
    let status = Command::new(bench)
        .arg(name)
        .arg("--binaries")
        .arg(binaries)
        .args(["--machine", &host::machine()])
        .args(["--rounds", &args.rounds.to_string()])
        .args(args.json.then_some("--json"))
        .args(args.gate.then_some("--gate"))
        .status()
        .context("failed to start weft-bench")?;
    ensure!(status.success(), "weft-bench {name}: {status}");
    Ok(())
}
