//! The lab's processes: started inside a namespace, found by what they carry.
//!
//! A process belongs to a lab when its environment names the lab or it lives in one of the lab's namespaces;
//! nothing has to be remembered, so nothing can be forgotten.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io,
    os::unix::{fs::MetadataExt, process::CommandExt},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
};

use nix::sched::{CloneFlags, setns};
use serde::{Deserialize, Serialize};

use crate::{error::LabError, folder::Lab};

/// The environment variable that every process of a lab carries.
pub(crate) const MARK: &str = "WEFT_LAB";
/// The environment variable by which an instance knows its node.
const NODE: &str = "WEFT_NODE";
/// Where iproute2 keeps the names of namespaces.
pub(crate) const NAMES: &str = "/run/netns";

/// A process: its number, and its start, because numbers are given again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) struct ProcessId {
    pub(crate) pid: i32,
    /// Clock ticks from boot to its start (proc(5), `/proc/PID/stat` field 22).
    pub(crate) started: u64,
}

/// A process of the lab, as it is found.
#[derive(Clone, Debug)]
pub(crate) struct Found {
    pub(crate) id: ProcessId,
    pub(crate) command: Vec<String>,
    /// The machine or pod whose network namespace it is in; none outside the lab's.
    pub(crate) machine: Option<String>,
    /// The node of the pod that it is in, where it says so.
    pub(crate) node: Option<String>,
}

impl Found {
    /// Whether this is a run of `command`, whose first word is a binary's name.
    pub(crate) fn runs(&self, command: &[String]) -> bool {
        match (self.command.split_first(), command.split_first()) {
            (Some((path, own)), Some((binary, arguments))) => {
                Path::new(path).file_name() == Some(binary.as_ref()) && own == arguments
            }
            _ => false,
        }
    }

    /// Whether it is on one of these machines, or in a pod there.
    pub(crate) fn is_on(&self, machines: &[String]) -> bool {
        let names = [&self.machine, &self.node];
        names
            .into_iter()
            .flatten()
            .any(|name| machines.contains(name))
    }
}

/// A network namespace's identity: device and inode of its nsfs file.
type NetnsId = (u64, u64);

/// The process of this number, now.
pub(crate) fn of(pid: i32) -> Option<ProcessId> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field may hold anything, so that counting begins after its closing parenthesis.
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_whitespace();
    let state = fields.next()?;
    let started = fields.nth(18)?.parse().ok()?;
    (state != "Z").then_some(ProcessId { pid, started })
}

/// Whether it still runs.
pub(crate) fn lives(id: ProcessId) -> bool {
    of(id.pid) == Some(id)
}

/// Every process of the lab but this one.
pub(crate) fn of_lab(lab: &Lab) -> Vec<Found> {
    let machines = namespaces(lab);
    let mark = format!("{MARK}={}", lab.id);
    let own = i32::try_from(std::process::id()).unwrap_or(0);
    pids()
        .filter(|pid| *pid != own)
        .filter_map(|pid| {
            let machine = netns_of(Path::new(&format!("/proc/{pid}/ns/net")))
                .and_then(|netns| machines.get(&netns).cloned());
            if machine.is_none() && !carries(pid, &mark) {
                return None;
            }
            Some(Found {
                id: of(pid)?,
                command: words(pid, "cmdline"),
                machine,
                node: variable(pid, NODE),
            })
        })
        .collect()
}

fn pids() -> impl Iterator<Item = i32> {
    fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

fn carries(pid: i32, mark: &str) -> bool {
    words(pid, "environ").iter().any(|word| word == mark)
}

fn variable(pid: i32, name: &str) -> Option<String> {
    let environment = environment(pid);
    let (_, value) = environment.into_iter().find(|(own, _)| own == name)?;
    Some(value)
}

/// The environment that a process was started with.
pub(crate) fn environment(pid: i32) -> Vec<(String, String)> {
    words(pid, "environ")
        .iter()
        .filter_map(|word| word.split_once('='))
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect()
}

fn words(pid: i32, file: &str) -> Vec<String> {
    fs::read(format!("/proc/{pid}/{file}"))
        .unwrap_or_default()
        .split(|byte| *byte == 0)
        .filter(|word| !word.is_empty())
        .map(|word| String::from_utf8_lossy(word).into_owned())
        .collect()
}

/// The lab's namespaces by identity, each with the machine's or pod's name.
fn namespaces(lab: &Lab) -> BTreeMap<NetnsId, String> {
    places(lab)
        .into_iter()
        .filter_map(|(name, path)| Some((netns_of(&path)?, name)))
        .collect()
}

/// The lab's machines, attached pods and instances, each with the file of its network namespace. An instance is
/// `namespace.application.service.number.epoch`, as the local driver names it.
pub(crate) fn places(lab: &Lab) -> Vec<(String, PathBuf)> {
    let prefix = lab.prefix();
    let machines = names(&prefix).into_iter().filter_map(|name| {
        let short = name.strip_prefix(&prefix)?.to_owned();
        Some((short, Path::new(NAMES).join(name)))
    });
    let sites = list(&lab.path("agent"));
    let pods = sites.iter().flat_map(|site| list(&site.join("run/pods")));
    let pods = pods.filter_map(|pod| {
        let name = pod.file_name()?.to_str()?.to_owned();
        Some((name, pod.join("netns")))
    });
    machines.chain(pods).collect()
}

fn list(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let mut paths: Vec<_> = entries.map(|entry| entry.path()).collect();
    paths.sort();
    paths
}

/// The named namespaces that begin with `prefix`.
pub(crate) fn names(prefix: &str) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(NAMES)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| name.starts_with(prefix))
        .collect();
    names.sort();
    names
}

fn netns_of(path: &Path) -> Option<NetnsId> {
    let metadata = fs::metadata(path).ok()?;
    Some((metadata.dev(), metadata.ino()))
}

/// Makes the calling thread a part of the named namespace.
pub(crate) fn enter(netns: &str) -> Result<(), LabError> {
    let path = Path::new(NAMES).join(netns);
    let file = File::open(&path).map_err(LabError::file(&path))?;
    setns(file, CloneFlags::CLONE_NEWNET).map_err(LabError::system(format!("enter {netns}")))
}

/// Does `work` inside the named namespace, on a thread of its own.
pub(crate) fn inside<T: Send>(
    netns: &str,
    work: impl FnOnce() -> Result<T, LabError> + Send,
) -> Result<T, LabError> {
    thread::scope(|scope| {
        scope
            .spawn(|| enter(netns).and_then(|()| work()))
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// What a process is started with.
#[derive(Debug)]
pub(crate) struct Start<'a> {
    /// The namespace.
    pub(crate) netns: String,
    /// The program and its arguments.
    pub(crate) program: PathBuf,
    pub(crate) arguments: &'a [String],
    pub(crate) environment: &'a [(&'static str, String)],
    /// Where standard output and error go, at the end.
    pub(crate) log: PathBuf,
}

impl Start<'_> {
    /// Starts it, detached: it outlives this process and its terminal.
    pub(crate) fn detached(&self) -> Result<(), LabError> {
        let log = File::options()
            .create(true)
            .append(true)
            .open(&self.log)
            .map_err(LabError::file(&self.log))?;
        let errors = log.try_clone().map_err(LabError::file(&self.log))?;
        inside(&self.netns, || {
            Command::new(&self.program)
                .args(self.arguments)
                .envs(self.environment.iter().cloned())
                .stdin(Stdio::null())
                .stdout(log)
                .stderr(errors)
                .process_group(0)
                .current_dir("/")
                .spawn()
                .map(drop)
                .map_err(|source: io::Error| LabError::Start {
                    program: self.program.display().to_string(),
                    source,
                })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_known_by_its_number_and_its_start() {
        let own = of(i32::try_from(std::process::id()).unwrap()).unwrap();
        assert!(lives(own));
        let earlier = ProcessId {
            started: own.started - 1,
            ..own
        };
        assert!(!lives(earlier));
    }

    #[test]
    fn a_process_that_ended_and_was_not_waited_for_does_not_live() {
        let mut child = Command::new("true").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        while of(pid).is_some() {
            thread::yield_now();
        }
        assert!(Path::new(&format!("/proc/{pid}")).exists());
        child.wait().unwrap();
    }
}
