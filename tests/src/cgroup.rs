//! A cgroup of the process' own, for programs that the kernel runs for the sockets of a cgroup.
//!
//! A socket belongs to the cgroup in which its process was when it was made, and an accepted one to its listener's.

use std::{
    fs, io,
    path::{Path, PathBuf},
    process,
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use crate::wait_for;

static NEXT: AtomicU32 = AtomicU32::new(0);
/// How long the kernel may take to forget the processes that were in it.
const PATIENCE: Duration = Duration::from_secs(5);

/// A cgroup v2 folder; on drop its processes go back to where this one came from, and it is removed.
#[derive(Debug)]
pub struct Cgroup {
    home: PathBuf,
    path: PathBuf,
}

impl Cgroup {
    /// Makes one whose unique name contains `label`.
    ///
    /// # Errors
    /// When there is no cgroup v2 hierarchy, or the capability to change it is missing.
    pub fn new(label: &str) -> io::Result<Self> {
        let root = root()?;
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = root.join(format!("weft-t-{label}-{}-{number}", process::id()));
        fs::create_dir(&path)?;
        Ok(Self {
            home: root.join(own()?.trim_start_matches('/')),
            path,
        })
    }

    /// Its folder.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Moves this process into it, every thread.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn enter(&self) -> io::Result<()> {
        fs::write(self.path.join("cgroup.procs"), process::id().to_string())
    }

    /// Moves its processes back to where this one came from.
    ///
    /// # Errors
    /// When the kernel cannot be asked who they are.
    pub fn leave(&self) -> io::Result<()> {
        let all = fs::read_to_string(self.path.join("cgroup.procs"))?;
        for process in all.lines() {
            // One that has ended meanwhile has left by itself.
            let _ = fs::write(self.home.join("cgroup.procs"), process);
        }
        Ok(())
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        if let Err(error) = self.leave() {
            eprintln!("failed to leave {}: {error}", self.path.display());
        }
        wait_for("the cgroup is empty", PATIENCE, || {
            fs::remove_dir(&self.path).ok()
        });
    }
}

/// Where the cgroup v2 hierarchy is mounted.
fn root() -> io::Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    let mount = mounts.lines().find_map(|line| {
        let mut words = line.split(' ').skip(1);
        let path = words.next()?;
        (words.next()? == "cgroup2").then(|| PathBuf::from(path))
    });
    mount.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "no cgroup2 is mounted"))
}

/// This process' cgroup within it.
fn own() -> io::Result<String> {
    let all = fs::read_to_string("/proc/self/cgroup")?;
    let own = all.lines().find_map(|line| line.strip_prefix("0::"));
    Ok(own.unwrap_or("/").to_owned())
}
