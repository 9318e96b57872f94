//! What the machine must have: checked first, installed where a package manager can, named exactly where not.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail, ensure};

/// The oldest kernel whose eBPF the programs are written for.
const OLDEST_KERNEL: (u32, u32) = (6, 1);

/// What a command needs of the machine beyond a C compiler.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Needs {
    /// Programs, each with the Debian and Ubuntu package that holds it.
    programs: &'static [(&'static str, &'static str)],
}

impl Needs {
    /// Making network namespaces and links.
    pub(crate) const NETWORK: Self = Self {
        programs: &[("ip", "iproute2")],
    };
    /// Measuring beside netfilter.
    pub(crate) const NETFILTER: Self = Self {
        programs: &[
            ("ip", "iproute2"),
            ("iptables", "iptables"),
            ("nft", "nftables"),
        ],
    };
    /// Building libFuzzer.
    pub(crate) const ENGINE: Self = Self {
        programs: &[("g++", "g++")],
    };
    /// Booting other kernels.
    pub(crate) const GUESTS: Self = Self {
        programs: &[
            ("ip", "iproute2"),
            ("nft", "nftables"),
            ("qemu-system-x86_64", "qemu-system-x86"),
            ("depmod", "kmod"),
            ("xz", "xz-utils"),
        ],
    };
}

/// Checks root, the kernel and the C compiler, and installs the programs that are missing.
pub(crate) fn check(needs: Needs) -> Result<()> {
    ensure!(
        nix::unistd::geteuid().is_root(),
        "root is needed to make network namespaces and load eBPF programs: sudo -E cargo xtask ..."
    );
    let release = fs::read_to_string("/proc/sys/kernel/osrelease")
        .context("failed to read the kernel's release")?;
    check_kernel(release.trim())?;
    ensure!(
        runs("cc"),
        "no C compiler (cc) was found: apt-get install -y --no-install-recommends gcc libc6-dev"
    );
    install(needs.programs)
}

fn check_kernel(release: &str) -> Result<()> {
    let mut numbers = release
        .split(|character: char| !character.is_ascii_digit())
        .map(str::parse);
    let (Some(Ok(major)), Some(Ok(minor))) = (numbers.next(), numbers.next()) else {
        bail!("the kernel's release {release:?} has no version in it");
    };
    let (oldest_major, oldest_minor) = OLDEST_KERNEL;
    ensure!(
        (major, minor) >= OLDEST_KERNEL,
        "Linux {release} is too old: {oldest_major}.{oldest_minor} or later is needed"
    );
    Ok(())
}

fn install(programs: &[(&str, &str)]) -> Result<()> {
    let packages: Vec<&str> = programs
        .iter()
        .filter(|(program, _)| !runs(program))
        .map(|(_, package)| *package)
        .collect();
    if packages.is_empty() {
        return Ok(());
    }
    let line = format!(
        "apt-get update && apt-get install -y --no-install-recommends {}",
        packages.join(" ")
    );
    eprintln!("installing: {line}");
    let installed = Command::new("sh")
        .args(["-c", &line])
        .env("DEBIAN_FRONTEND", "noninteractive")
        .stdout(Stdio::null())
        .status()
        .is_ok_and(|status| status.success());
    ensure!(
        installed,
        "packages are missing and could not be installed: {line}"
    );
    Ok(())
}

/// What a kernel says when something is wrong with it.
const ALARMS: [&str; 5] = [
    "WARNING: ",
    "BUG: ",
    "Oops",
    "general protection fault",
    "Kernel panic",
];

/// Whether a line of the kernel's log says that something is wrong with it.
pub(crate) fn is_alarm(line: &str) -> bool {
    ALARMS.iter().any(|alarm| line.contains(alarm))
}

/// How many such lines this machine's kernel has in its log.
pub(crate) fn kernel_alarms() -> usize {
    let log = Command::new("dmesg").stderr(Stdio::null()).output();
    let said = log.map(|output| output.stdout).unwrap_or_default();
    String::from_utf8_lossy(&said)
        .lines()
        .filter(|line| is_alarm(line))
        .count()
}

/// Whether a program of this name is in the `PATH`.
fn runs(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(|dir| Path::new(dir).to_owned()))
        .any(|dir| dir.join(program).is_file())
}

/// Processor, kernel and number of CPUs, for people who compare figures.
pub(crate) fn machine() -> String {
    let cpu = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpu
        .lines()
        .find_map(|line| line.strip_prefix("model name"))
        .map_or("unknown processor", |rest| {
            rest.trim_start_matches([' ', '\t', ':'])
        });
    let cpus = cpu
        .lines()
        .filter(|line| line.starts_with("processor"))
        .count();
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    format!("{model}, {cpus} CPUs, Linux {}", release.trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_warning_of_the_kernel_is_an_alarm_and_other_words_are_not() {
        assert!(is_alarm(
            "[   12.1] WARNING: CPU: 0 PID: 9 at net/core/skbuff.c:100 skb_x+0x1/0x2"
        ));
        assert!(!is_alarm("[    6.1] 9pnet: Installing 9P2000 support"));
    }

    #[test]
    fn a_kernel_is_judged_by_its_first_two_numbers() {
        for (release, good) in [
            ("6.1.0-28-amd64", true),
            ("6.18.44", true),
            ("10.0", true),
            ("6.0.19", false),
            ("5.15.0-generic", false),
        ] {
            assert_eq!(check_kernel(release).is_ok(), good, "{release}");
        }
        let error = check_kernel("5.15.0-generic").unwrap_err().to_string();
        assert_eq!(
            error,
            "Linux 5.15.0-generic is too old: 6.1 or later is needed"
        );
        assert!(check_kernel("unknown").is_err());
    }
}
