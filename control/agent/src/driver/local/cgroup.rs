//! Control groups: an instance's share of the processor, its limit of memory and what it uses, where the host lets us.
//!
//! Processing power is a share, not a ceiling: what nobody uses is anybody's. Memory is a ceiling: what an
//! instance booked is all it gets, or others would pay. One group per instance and hierarchy, right below the
//! hierarchy's root, under cgroup v2 or (where `cpu`, `cpuacct` and `memory` are mounted on their own) v1.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use control_core::goal::Requests;

/// The hierarchies of this host.
#[derive(Debug)]
pub(super) struct Cgroups {
    hierarchies: Vec<Hierarchy>,
    /// Tells the groups of one run directory from those of another.
    prefix: String,
    complained: AtomicBool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Hierarchy {
    root: PathBuf,
    kind: Kind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    V2,
    V1Cpu,
    V1Memory,
    V1Usage,
}

impl Cgroups {
    /// What there is below `root` (`/sys/fs/cgroup`).
    pub(super) fn find(root: &Path, run_dir: &Path) -> Self {
        let v2 = fs::read_to_string(root.join("cgroup.controllers")).is_ok_and(|controllers| {
            ["cpu", "memory"]
                .iter()
                .all(|wanted| controllers.split_whitespace().any(|c| c == *wanted))
                && fs::write(root.join("cgroup.subtree_control"), "+cpu +memory").is_ok()
        });
        let hierarchy = |path: &Path, kind| Hierarchy {
            root: path.to_owned(),
            kind,
        };
        let hierarchies = if v2 {
            vec![hierarchy(root, Kind::V2)]
        } else {
            [
                ("cpu", "cpu.shares", Kind::V1Cpu),
                ("memory", "memory.limit_in_bytes", Kind::V1Memory),
                ("cpuacct", "cpuacct.usage", Kind::V1Usage),
            ]
            .into_iter()
            .filter(|(name, file, _)| root.join(name).join(file).exists())
            .map(|(name, _, kind)| hierarchy(&root.join(name), kind))
            .collect()
        };
        let cgroups = Self {
            hierarchies,
            prefix: format!(
                "weft-{:08x}-",
                fnv1a(run_dir.as_os_str().as_encoded_bytes())
            ),
            complained: AtomicBool::new(false),
        };
        if cgroups.hierarchies.is_empty() {
            cgroups.complain("there is no writable cpu or memory cgroup");
        }
        cgroups
    }

    /// Puts a process into its instance's groups; where that does not work, it runs without.
    pub(super) fn enter(&self, name: &str, requests: Requests, pid: i32) {
        for hierarchy in &self.hierarchies {
            if let Err(error) = hierarchy.enter(&self.dir(hierarchy, name), requests, pid) {
                self.complain(&format!("{}: {error}", hierarchy.root.display()));
            }
        }
    }

    /// Processor time that an instance has used; `None` where it is in no group that counts it.
    pub(super) fn used(&self, name: &str) -> Option<Duration> {
        self.hierarchies
            .iter()
            .find_map(|hierarchy| hierarchy.used(&self.dir(hierarchy, name)))
    }

    /// Removes an instance's groups; succeeds when there are none.
    pub(super) fn remove(&self, name: &str) -> io::Result<()> {
        for hierarchy in &self.hierarchies {
            match fs::remove_dir(self.dir(hierarchy, name)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    fn dir(&self, hierarchy: &Hierarchy, name: &str) -> PathBuf {
        hierarchy.root.join(format!("{}{name}", self.prefix))
    }

    /// Once, not for every instance.
    fn complain(&self, why: &str) {
        if !self.complained.swap(true, Ordering::Relaxed) {
            tracing::warn!(why, "instances run without limits");
        }
    }
}

impl Hierarchy {
    fn enter(&self, dir: &Path, requests: Requests, pid: i32) -> io::Result<()> {
        match fs::create_dir(dir) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        for (file, value) in settings(self.kind, requests) {
            fs::write(dir.join(file), value.to_string())?;
        }
        fs::write(dir.join("cgroup.procs"), pid.to_string())
    }

    fn used(&self, dir: &Path) -> Option<Duration> {
        let read = |file| fs::read_to_string(dir.join(file)).ok();
        match self.kind {
            Kind::V2 => {
                let stat = read("cpu.stat")?;
                let usage = stat
                    .lines()
                    .find_map(|line| line.strip_prefix("usage_usec "))?;
                Some(Duration::from_micros(usage.trim().parse().ok()?))
            }
            Kind::V1Usage => {
                let nanos = read("cpuacct.usage")?;
                Some(Duration::from_nanos(nanos.trim().parse().ok()?))
            }
            Kind::V1Cpu | Kind::V1Memory => None,
        }
    }
}

/// What is written for an instance; nothing for what it did not ask for.
fn settings(kind: Kind, requests: Requests) -> Vec<(&'static str, u64)> {
    let memory = requests.memory.get();
    // Kubernetes' own conversion: 1024 shares per vCPU, at least 2; shares 2..=262144 map to weights 1..=10000.
    let shares = (requests.cpu.as_milli() * 1024 / 1000).clamp(2, 262_144);
    let weight = 1 + (shares - 2) * 9999 / 262_142;
    let cpu = |file, value| (requests.cpu.as_milli() > 0).then_some((file, value));
    let limit = |file| (memory > 0).then_some((file, memory));
    let (cpu, memory) = match kind {
        Kind::V2 => (cpu("cpu.weight", weight), limit("memory.max")),
        Kind::V1Cpu => (cpu("cpu.shares", shares), None),
        Kind::V1Memory => (None, limit("memory.limit_in_bytes")),
        Kind::V1Usage => (None, None),
    };
    cpu.into_iter().chain(memory).collect()
}

fn fnv1a(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0x811c_9dc5, |hash, byte| {
        (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn requests(cpu: &str, memory: &str) -> Requests {
        Requests {
            cpu: cpu.parse().unwrap(),
            memory: memory.parse().unwrap(),
            gpus: 0,
        }
    }

    #[test]
    fn requests_become_a_share_and_a_limit() {
        let one = requests("1", "64Mi");
        assert_eq!(settings(Kind::V1Cpu, one), [("cpu.shares", 1024)]);
        assert_eq!(
            settings(Kind::V1Memory, one),
            [("memory.limit_in_bytes", 64 << 20)]
        );
        assert_eq!(
            settings(Kind::V2, one),
            [("cpu.weight", 39), ("memory.max", 64 << 20)]
        );
        assert_eq!(
            settings(Kind::V2, requests("1m", "1Ki"))[0],
            ("cpu.weight", 1)
        );
        assert_eq!(settings(Kind::V2, Requests::default()), []);
    }

    #[test]
    fn what_an_instance_used_is_read_in_both_versions() {
        let dir = tempfile::tempdir().unwrap();
        let hierarchy = |kind| Hierarchy {
            root: dir.path().to_owned(),
            kind,
        };
        let used = |kind| hierarchy(kind).used(dir.path());
        assert_eq!((used(Kind::V2), used(Kind::V1Usage)), (None, None));
        let stat = "usage_usec 1500000\nuser_usec 1000000\nsystem_usec 500000\n";
        fs::write(dir.path().join("cpu.stat"), stat).unwrap();
        fs::write(dir.path().join("cpuacct.usage"), "2000000001\n").unwrap();
        assert_eq!(used(Kind::V2), Some(Duration::from_millis(1_500)));
        assert_eq!(
            used(Kind::V1Usage),
            Some(Duration::from_nanos(2_000_000_001))
        );
        assert_eq!(used(Kind::V1Memory), None);
    }

    #[test]
    fn a_host_without_control_groups_is_no_error() {
        let dir = tempfile::tempdir().unwrap();
        let cgroups = Cgroups::find(dir.path(), Path::new("/run/weft"));
        assert!(cgroups.hierarchies.is_empty());
        cgroups.enter("a.b.c.0.1", requests("1", "64Mi"), 1);
        cgroups.remove("a.b.c.0.1").unwrap();
    }

    #[test]
    fn a_host_with_both_versions_takes_the_one_that_has_the_controllers() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["cpu", "memory"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        fs::write(dir.path().join("cpu/cpu.shares"), "1024").unwrap();
        fs::write(dir.path().join("memory/memory.limit_in_bytes"), "0").unwrap();
        let found = |dir: &Path| {
            let cgroups = Cgroups::find(dir, Path::new("/run/weft"));
            cgroups
                .hierarchies
                .into_iter()
                .map(|h| h.kind)
                .collect::<Vec<_>>()
        };
        assert_eq!(found(dir.path()), [Kind::V1Cpu, Kind::V1Memory]);
        fs::write(
            dir.path().join("cgroup.controllers"),
            "cpuset cpu io memory pids",
        )
        .unwrap();
        assert_eq!(found(dir.path()), [Kind::V2]);
        fs::write(dir.path().join("cgroup.controllers"), "cpuset io").unwrap();
        assert_eq!(found(dir.path()), [Kind::V1Cpu, Kind::V1Memory]);
    }
}
