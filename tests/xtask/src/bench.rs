//! Benchmarks by name; each is a program of its own under `tests/`, built for release.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum};

use crate::{
    build,
    debian::{self, Apt},
    host,
};

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
    /// How often `control` kills the leader; 3 unless it is said.
    #[arg(long)]
    kills: Option<u32>,
    /// The round-trip time between the leads of `control`, milliseconds: only what a lost leader costs is measured then.
    #[arg(long, value_name = "MS")]
    rtt: Option<u64>,
    /// How many agents `agents` simulates; 250 unless it is said.
    #[arg(long)]
    agents: Option<u32>,
    /// How many nodes each of them has; 40 unless it is said.
    #[arg(long)]
    nodes: Option<u32>,
    /// How many endpoints each of them has, a multiple of 100; 1,000 unless it is said.
    #[arg(long)]
    endpoints: Option<u32>,
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
    /// Changes acknowledged by three leads against a three-member etcd, and what a lost leader costs.
    Control,
    /// 250 agents with 40 nodes and 1,000 endpoints each on three leads: one endpoint's change, memory, a restart.
    Agents,
}

/// Builds what is measured and what measures, and runs it.
pub(crate) fn run(args: &BenchArgs) -> Result<()> {
    host::check(match args.name {
        Bench::Control | Bench::Agents => host::Needs::NETWORK,
        _ => host::Needs::NETFILTER,
    })?;
    let binaries = build::release(match args.name {
        Bench::Control | Bench::Agents => build::CONTROL_PLANE,
        _ => build::DATA_PATH,
    })?;
    let bench = build::executables(&["weft-tests"])?
        .remove("weft-bench")
        .context("cargo built no weft-bench")?;
    let name = match args.name {
        Bench::Vip => "vip",
        Bench::Datapath => "datapath",
        Bench::Tunnel => "tunnel",
        Bench::Table => "table",
        Bench::Control => "control",
        Bench::Agents => "agents",
    };
    let own = match args.name {
        Bench::Control => control(args, &binaries)?,
        Bench::Agents => agents(args, &binaries),
        _ => Vec::new(),
    };
    let status = Command::new(bench)
        .arg(name)
        .args(own)
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

/// What `control` needs besides: etcd, and a folder on the disk that holds the build.
fn control(args: &BenchArgs, binaries: &Path) -> Result<Vec<OsString>> {
    let mut own: Vec<OsString> = vec!["--data".into(), binaries.into()];
    match args.rtt {
        Some(rtt) => own.extend(["--rtt".into(), rtt.to_string().into()]),
        None => own.extend(["--etcd".into(), etcd()?.into()]),
    }
    if let Some(kills) = args.kills {
        own.extend(["--kills".into(), kills.to_string().into()]);
    }
    Ok(own)
}

/// What `agents` is told besides: a folder on the disk that holds the build, and how large.
fn agents(args: &BenchArgs, binaries: &Path) -> Vec<OsString> {
    let mut own: Vec<OsString> = vec!["--data".into(), binaries.into()];
    let sizes = [
        ("--agents", args.agents),
        ("--nodes", args.nodes),
        ("--endpoints", args.endpoints),
    ];
    for (option, size) in sizes {
        if let Some(size) = size {
            own.extend([option.into(), size.to_string().into()]);
        }
    }
    own
}

/// Debian's etcd, from the cache or downloaded into it.
fn etcd() -> Result<PathBuf> {
    let cache = debian::cache("bench")?;
    let folder = cache.join("etcd-server");
    let program = folder.join("usr/bin/etcd");
    if !program.exists() {
        let apt = Apt::suite("bookworm", &debian::cache("bench/bookworm")?)?;
        apt.unpack(&["etcd-server"], &folder, "usr/bin/etcd")?;
    }
    ensure!(
        program.exists(),
        "etcd-server holds no {}",
        program.display()
    );
    Ok(program)
}
