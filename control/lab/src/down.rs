//! Takes labs down: processes, mounts, namespaces, cgroups, sockets, folders, in this order.
//!
//! Everything is found by the lab's ID, so that it does not matter how far the lab was made and who is still
//! alive. Each step goes on after an error; all errors are reported.

use std::{
    fs,
    io::ErrorKind,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use nix::{
    mount::{MntFlags, umount2},
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{
    command::ambiguous,
    error::LabError,
    folder::{LABS, Lab},
    ip,
    process::{self, Found},
};

/// How long killed processes may take to be gone.
const LONGEST_DEATH: Duration = Duration::from_secs(10);
/// Where userspace WireGuard devices have their sockets.
const UAPI: &str = "/var/run/wireguard";
/// Where cgroups are.
const CGROUPS: &str = "/sys/fs/cgroup";

/// Which labs are taken down beside the dead ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Chosen<'a> {
    /// The one of this ID.
    One(&'a str),
    /// None where there are dead ones to clean, else the only one.
    Only,
    /// Every one.
    All,
}

/// Takes down what was chosen, and every dead lab.
pub(crate) fn down(chosen: Chosen<'_>) -> Result<(), LabError> {
    let (dead, mut live): (Vec<Lab>, Vec<Lab>) = Lab::all()?.into_iter().partition(Lab::is_dead);
    match chosen {
        Chosen::One(id) if dead.iter().any(|lab| lab.id == id) => live.clear(),
        Chosen::One(id) => live = vec![Lab::find(Some(id))?],
        Chosen::Only if !dead.is_empty() => live.clear(),
        Chosen::Only if live.len() > 1 => return Err(ambiguous(&live)),
        Chosen::Only | Chosen::All => {}
    }
    let mut errors = Vec::new();
    for lab in dead.iter().chain(&live) {
        match one(lab) {
            Ok(()) => println!("lab {} is gone", lab.id),
            Err(error) => errors.push(error),
        }
    }
    several(errors)
}

/// Takes one lab down.
pub(crate) fn one(lab: &Lab) -> Result<(), LabError> {
    let mut errors = Vec::new();
    let mut step = |result: Result<(), LabError>| errors.extend(result.err());
    step(kill_all(lab));
    for mount in mounts(&lab.dir) {
        step(
            umount2(&mount, MntFlags::MNT_DETACH)
                .map_err(LabError::system(format!("unmount {}", mount.display()))),
        );
    }
    for name in process::names(&lab.prefix()) {
        step(ip::ip(&["netns", "delete", &name]));
    }
    for cgroup in cgroups(lab) {
        step(remove_cgroup(&cgroup));
    }
    for socket in entries(Path::new(UAPI)) {
        if name(&socket).starts_with(&format!("wl{}", lab.id)) {
            step(gone(fs::remove_file(&socket)).map_err(LabError::file(&socket)));
        }
    }
    step(gone(fs::remove_dir_all(&lab.dir)).map_err(LabError::file(&lab.dir)));
    // The last lab takes the folder with it; while there are others it is not empty.
    let _ = fs::remove_dir(LABS);
    several(errors)
}

fn several(mut errors: Vec<LabError>) -> Result<(), LabError> {
    match errors.len() {
        0 => Ok(()),
        1 => Err(errors.remove(0)),
        _ => Err(LabError::Several(errors)),
    }
}

/// Kills until nothing is left, because a supervisor may start one more before its own end.
fn kill_all(lab: &Lab) -> Result<(), LabError> {
    let start = Instant::now();
    loop {
        let found = process::of_lab(lab);
        if found.is_empty() {
            return Ok(());
        }
        if start.elapsed() > LONGEST_DEATH {
            let left: Vec<_> = found.iter().map(|found| found.id.pid.to_string()).collect();
            return Err(LabError::Failed {
                what: format!("kill the processes of lab {}", lab.id),
                stderr: format!("still there: {}", left.join(", ")),
            });
        }
        for found in &found {
            end(found)?;
        }
        thread::sleep(Duration::from_millis(10));
    }
}

/// Kills the processes on these machines, and those in the pods that the machines are nodes of.
pub(crate) fn kill_on(lab: &Lab, machines: &[String], only: Option<&str>) -> Result<(), LabError> {
    let chosen = |found: &Found| {
        found.is_on(machines) && only.is_none_or(|word| found.command.iter().any(|own| own == word))
    };
    let mut killed = 0;
    for found in process::of_lab(lab).iter().filter(|found| chosen(found)) {
        end(found)?;
        killed += 1;
    }
    println!("killed {killed} processes");
    Ok(())
}

fn end(found: &Found) -> Result<(), LabError> {
    if !process::lives(found.id) {
        return Ok(());
    }
    match kill(Pid::from_raw(found.id.pid), Signal::SIGKILL) {
        Ok(()) | Err(nix::Error::ESRCH) => Ok(()),
        Err(error) => Err(LabError::system(format!("kill process {}", found.id.pid))(
            error,
        )),
    }
}

/// What is mounted in `dir` and below, the innermost first.
fn mounts(dir: &Path) -> Vec<PathBuf> {
    let text = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let mut mounts: Vec<PathBuf> = text
        .lines()
        .filter_map(|line| line.split_whitespace().nth(4))
        .map(PathBuf::from)
        .filter(|path| path.starts_with(dir))
        .collect();
    mounts.reverse();
    mounts
}

/// The control groups of the lab's instances. The local driver names them by its run directory's FNV-1a hash,
/// right below each hierarchy's root.
fn cgroups(lab: &Lab) -> Vec<PathBuf> {
    let runs = entries(&lab.path("agent"))
        .into_iter()
        .map(|site| site.join("run"));
    let prefixes: Vec<String> = runs
        .map(|run| format!("weft-{:08x}-", fnv1a(run.as_os_str().as_encoded_bytes())))
        .collect();
    let root = Path::new(CGROUPS);
    let hierarchies = entries(root).into_iter().filter(|path| !path.is_symlink());
    let groups = hierarchies
        .flat_map(|hierarchy| entries(&hierarchy))
        .chain(entries(root));
    groups
        .filter(|group| {
            prefixes
                .iter()
                .any(|prefix| name(group).starts_with(prefix))
        })
        .filter(|group| group.is_dir())
        .collect()
}

fn fnv1a(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0x811c_9dc5, |hash, byte| {
        (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193)
    })
}

/// Removes an empty cgroup; the kernel needs a moment after the end of its last process.
fn remove_cgroup(dir: &Path) -> Result<(), LabError> {
    let start = Instant::now();
    loop {
        match gone(fs::remove_dir(dir)) {
            Err(error)
                if error.kind() == ErrorKind::ResourceBusy && start.elapsed() < LONGEST_DEATH =>
            {
                thread::sleep(Duration::from_millis(10));
            }
            result => return result.map_err(LabError::file(dir)),
        }
    }
}

fn entries(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).collect()
}

fn name(path: &Path) -> String {
    path.file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}

/// What was not there needs no removing.
fn gone(result: std::io::Result<()>) -> std::io::Result<()> {
    match result {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        other => other,
    }
}
