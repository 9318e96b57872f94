//! The tests under other kernels: QEMU without KVM, Debian's own images, and the host's root mounted over 9p.
//!
//! ```text
//!  host                                    guest
//!    /                 -- 9p, read-only -->  overlay, changes stay in memory
//!    test programs, built here               run there, with the host's libraries and tools
//!    initramfs: a static shell, 9p           init.sh, then run.sh
//!    standard output  <-- serial line 2 --   what the tests say, and how many programs failed
//!    a file           <-- serial line 1 --   what the kernel says; a warning in it fails the run
//! ```
//!
//! An emulated processor is some 20 times slower: nothing is measured here.

mod initramfs;
mod kernel;

use std::{
    fs,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, ensure};
use clap::Args;

use self::kernel::{Kernel, Series};
use crate::{build, check::Tally, debian, host};

/// The packages whose tests run there; the rest of the workspace does not speak to the kernel.
const PACKAGES: [&str; 3] = ["weft-tests", "weft-netmanager", "weft-cni"];
/// How long a guest may run, in seconds: all tests take about a quarter of it on two busy cores.
const PATIENCE_S: u32 = 3600;
#[derive(Debug, Args)]
pub(crate) struct VmArgs {
    /// Only this kernel; else each in turn.
    #[arg(long)]
    kernel: Option<Series>,
    /// Only the tests whose names contain this.
    #[arg(long)]
    test: Option<String>,
    /// Only the test programs whose names start with this, for instance `program_`.
    #[arg(long)]
    program: Option<String>,
}

/// Runs the tests that need root under other kernels.
pub(crate) fn run(args: &VmArgs) -> Result<Tally> {
    host::check(host::Needs::GUESTS)?;
    let programs = programs(args.program.as_deref())?;
    let mut tally = Tally::default();
    for series in [Series::V6_1, Series::V6_12] {
        if args.kernel.is_none_or(|only| only == series) {
            let kernel = Kernel::provide(series)?;
            tally += guest(&kernel, &programs, args.test.as_deref())?;
        }
    }
    Ok(tally)
}

/// Builds the tests, those that only another kernel can run among them, and the binaries that they start.
fn programs(prefix: Option<&str>) -> Result<Vec<PathBuf>> {
    let packages: Vec<&str> = PACKAGES
        .iter()
        .flat_map(|package| ["--package", package])
        .collect();
    build::run(&[&["build", "--quiet", "--bins"], &packages[..]].concat())?;
    let args = ["test", "--no-run", "--features", "weft-tests/vm"];
    let programs = build::announced(&[&args, &packages[..]].concat())?
        .into_iter()
        .filter(|(name, _)| prefix.is_none_or(|prefix| name.starts_with(prefix)))
        .map(|(_, path)| path)
        .collect::<Vec<_>>();
    ensure!(
        !programs.is_empty(),
        "no test program's name starts with {}",
        prefix.unwrap_or_default()
    );
    Ok(programs)
}

/// Boots a kernel, runs the programs' tests in it and counts them.
fn guest(kernel: &Kernel, programs: &[PathBuf], filter: Option<&str>) -> Result<Tally> {
    let folder = debian::cache("vm/run")?;
    let file = |name: &str| folder.join(format!("{}-{name}", kernel.release));
    let (initramfs, log) = (file("initramfs"), file("kernel.log"));
    fs::write(
        &initramfs,
        initramfs::build(kernel, &script(kernel, programs, filter))?,
    )
    .with_context(|| format!("failed to write {}", initramfs.display()))?;
    println!("Linux {}", kernel.release);
    let mut child = machine(kernel, &initramfs, &log)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("failed to start qemu-system-x86_64")?;
    let output = child.stdout.take().expect("standard output was piped");
    let mut tally = Tally::default();
    let mut end = None;
    for line in BufReader::new(output).split(b'\n') {
        let line = line.context("failed to read what the guest says")?;
        let line = String::from_utf8_lossy(&line);
        let line = line.trim_end_matches('\r');
        println!("{line}");
        if let Some(count) = Tally::parse(line) {
            tally += count;
        }
        end = failed_programs(line).or(end);
    }
    let status = child.wait().context("failed to wait for qemu")?;
    let said = fs::read(&log).with_context(|| format!("failed to read {}", log.display()))?;
    let said = String::from_utf8_lossy(&said);
    for alarm in said.lines().filter(|line| host::is_alarm(line)) {
        println!("the kernel: {}", alarm.trim_end());
        tally.failed += 1;
    }
    match end {
        Some(failed) => tally.failed = tally.failed.max(failed),
        None => {
            println!(
                "the guest ended before its tests did ({status}); see {}",
                log.display()
            );
            tally.failed += 1;
        }
    }
    Ok(tally)
}

/// The machine: two processors without what KVM would need, no devices but the serial lines and the host's root.
fn machine(kernel: &Kernel, initramfs: &Path, log: &Path) -> Command {
    let mut command = Command::new("timeout");
    command
        .arg(PATIENCE_S.to_string())
        .args(["qemu-system-x86_64", "-machine", "q35"])
        .args(["-accel", "tcg,thread=multi", "-cpu", "Nehalem"])
        .args(["-smp", "2", "-m", "3072"])
        .args(["-nodefaults", "-no-reboot", "-display", "none"])
        .arg("-kernel")
        .arg(kernel.image())
        .arg("-initrd")
        .arg(initramfs)
        .args([
            "-append",
            "console=ttyS0 loglevel=5 panic=-1 no_timer_check mitigations=off",
        ])
        .arg("-serial")
        .arg(format!("file:{}", log.display()))
        .args(["-serial", "stdio"])
        .args([
            "-virtfs",
            "local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap",
        ]);
    command
}

/// What the guest does once it has the host's root.
fn script(kernel: &Kernel, programs: &[PathBuf], filter: Option<&str>) -> String {
    let mut script = String::from("#!/bin/sh\n");
    let path = std::env::var("PATH").unwrap_or_default();
    let mut variables = vec![
        ("PATH", format!("/usr/sbin:/usr/bin:/sbin:/bin:{path}")),
        ("HOME", "/root".to_owned()),
        ("MODULES", kernel.modules().display().to_string()),
        ("ROOT", build::root().join("tests").display().to_string()),
        ("FILTER", filter.unwrap_or_default().to_owned()),
        ("INSTA_UPDATE", "no".to_owned()),
        ("WEFT_TEST_SLOWNESS", "6".to_owned()),
    ];
    for name in ["RUST_BACKTRACE", "RUST_LOG", "WEFT_BPF_OBJECT"] {
        if let Ok(value) = std::env::var(name) {
            variables.push((name, value));
        }
    }
    for (name, value) in variables {
        script += &format!("export {name}={}\n", quoted(&value));
    }
    script += "mkdir -p /run/weft\ncat > /run/weft/tests << 'END OF TESTS'\n";
    for program in programs {
        script += &format!("{}\n", program.display());
    }
    script + "END OF TESTS\n" + include_str!("vm/run.sh")
}

/// A word of the shell.
fn quoted(value: &str) -> String {
    format!("'{}'", value.replace('\'', r"'\''"))
}

/// How many programs failed, if this is the guest's last line.
fn failed_programs(line: &str) -> Option<u32> {
    line.strip_prefix("weft-vm: ")?
        .strip_suffix(" failed")?
        .parse()
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_guests_last_line_says_how_many_programs_failed() {
        assert_eq!(failed_programs("weft-vm: 2 failed"), Some(2));
        assert_eq!(failed_programs("weft-vm: /target/debug/deps/node-1"), None);
        assert_eq!(failed_programs("test result: ok. 1 passed; 0 failed"), None);
    }

    #[test]
    fn a_quote_in_a_value_stays_in_it() {
        assert_eq!(quoted("it's"), r"'it'\''s'");
    }
}
