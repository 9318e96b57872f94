//! What an instance has on disk: one folder, which is all that a driver needs to take it over.
//!
//! ```text
//!  RUN_DIR/pods/NAMESPACE.APPLICATION.SERVICE.INSTANCE.EPOCH/
//!      state.json   what it is, and its process       hosts     bound over /etc/hosts
//!      netns        its network namespace             log, log.1
//! ```

use std::{
    fs::{self, File},
    io::{self, Write},
    net::IpAddr,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use control_core::{assignment::Run, report::InstanceId};
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, setns, unshare},
    sys::statfs::{NSFS_MAGIC, statfs},
};
use serde::{Deserialize, Serialize};

/// What outlives the agent.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Kept {
    pub(super) id: InstanceId,
    pub(super) node: String,
    pub(super) run: Run,
    /// Counts the starts.
    pub(super) life: u64,
    /// Whether it served when it was last looked at.
    pub(super) serves: bool,
    /// Its process, while there is one.
    pub(super) process: Option<Process>,
    /// Its addresses, once attached.
    pub(super) addresses: Vec<IpAddr>,
}

/// A process that no other can be mistaken for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Process {
    pub(super) pid: i32,
    /// When it started, clock ticks after boot (`starttime` of proc_pid_stat(5)).
    pub(super) start: u64,
}

/// The folder of one instance.
#[derive(Clone, Debug)]
pub(super) struct Pod {
    dir: PathBuf,
    name: String,
}

impl Pod {
    /// The folder of `id`.
    ///
    /// # Errors
    /// When the id does not name a service, for people.
    pub(super) fn of(pods: &Path, id: &InstanceId) -> Result<Self, String> {
        let parts: Vec<_> = id.service.split('/').collect();
        let label = |part: &&str| netmanager_api::identity::is_label(part);
        if parts.len() != 3 || !parts.iter().all(label) {
            return Err(format!(
                "{:?} is not namespace/application/service",
                id.service
            ));
        }
        let name = format!("{}.{}.{}", parts.join("."), id.instance, id.epoch);
        Ok(Self::named(pods, name))
    }

    pub(super) fn named(pods: &Path, name: String) -> Self {
        Self {
            dir: pods.join(&name),
            name,
        }
    }

    /// Every folder there is.
    pub(super) fn list(pods: &Path) -> io::Result<Vec<Self>> {
        let mut list = Vec::new();
        for entry in fs::read_dir(pods)? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            list.push(Self::named(pods, name));
        }
        list.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(list)
    }

    /// Its name; serves as the container's id.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn netns(&self) -> PathBuf {
        self.dir.join("netns")
    }

    pub(super) fn hosts(&self) -> PathBuf {
        self.dir.join("hosts")
    }

    pub(super) fn log(&self) -> PathBuf {
        self.dir.join("log")
    }

    /// What is kept; `None` when there is nothing or nothing that can be read.
    pub(super) fn kept(&self) -> Option<Kept> {
        serde_json::from_slice(&fs::read(self.dir.join("state.json")).ok()?).ok()
    }

    /// Keeps `kept`; a reader sees it whole or not at all.
    pub(super) fn keep(&self, kept: &Kept) -> io::Result<()> {
        fs::create_dir_all(&self.dir)?;
        let new = self.dir.join(".state.json");
        let mut file = File::create(&new)?;
        file.write_all(&serde_json::to_vec(kept)?)?;
        fs::rename(new, self.dir.join("state.json"))
    }

    /// Makes its network namespace with a loopback that is up; does nothing when there is one.
    pub(super) fn make_netns(&self) -> io::Result<()> {
        let path = self.netns();
        if is_netns(&path) {
            return Ok(());
        }
        fs::create_dir_all(&self.dir)?;
        File::create(&path)?;
        on_a_thread(|| {
            unshare(CloneFlags::CLONE_NEWNET)?;
            loopback_up()?;
            bind(Path::new("/proc/thread-self/ns/net"), &path)
        })
    }

    /// Puts the namespace of a running process back where its file is no namespace any more (another mount
    /// namespace than its maker's).
    pub(super) fn mend_netns(&self, process: Process) -> io::Result<()> {
        let path = self.netns();
        if is_netns(&path) {
            return Ok(());
        }
        File::create(&path)?;
        bind(Path::new(&format!("/proc/{}/ns/net", process.pid)), &path)
    }

    /// Moves the calling thread into its network namespace.
    pub(super) fn enter(&self) -> io::Result<()> {
        enter(&self.netns())
    }

    /// Whether its network namespace can be entered.
    pub(super) fn enterable(&self) -> io::Result<()> {
        on_a_thread(|| self.enter())
    }

    /// Every process whose network namespace is this one.
    pub(super) fn processes(&self) -> io::Result<Vec<i32>> {
        if !is_netns(&self.netns()) {
            return Ok(Vec::new());
        }
        let key = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
        let ours = key(fs::metadata(self.netns())?);
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc")?.flatten() {
            let Some(pid) = entry
                .file_name()
                .to_str()
                .and_then(|name| name.parse().ok())
            else {
                continue;
            };
            let netns = fs::metadata(entry.path().join("ns/net"));
            if netns.is_ok_and(|metadata| key(metadata) == ours) {
                found.push(pid);
            }
        }
        Ok(found)
    }

    /// Writes its hosts file.
    pub(super) fn write_hosts(&self, kept: &Kept) -> io::Result<()> {
        fs::write(self.hosts(), hosts(kept))
    }

    /// Removes the folder with all that is in it; succeeds when it is gone.
    pub(super) fn remove(&self) -> io::Result<()> {
        let netns = self.netns();
        if is_netns(&netns) {
            umount2(&netns, MntFlags::MNT_DETACH)?;
        }
        match fs::remove_dir_all(&self.dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            done => done,
        }
    }
}

/// Gives the calling thread mounts of its own, with the pod's hosts file over /etc/hosts, and without the
/// namespaces of the other pods, which would otherwise live as long as this one.
pub(super) fn own_mounts(pods: &Path, pod: &Pod) -> io::Result<()> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    mount(
        None::<&str>,
        "/",
        None::<&str>,
        MsFlags::MS_REC | MsFlags::MS_PRIVATE,
        None::<&str>,
    )?;
    for other in Pod::list(pods)? {
        if is_netns(&other.netns()) {
            umount2(&other.netns(), MntFlags::MNT_DETACH)?;
        }
    }
    bind(&pod.hosts(), Path::new("/etc/hosts"))
}

/// Runs `work` on a thread that ends with it, so that the caller's namespaces stay its own.
pub(super) fn on_a_thread<T: Send>(work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    std::thread::scope(|scope| {
        std::thread::Builder::new()
            .spawn_scoped(scope, work)?
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Moves the calling thread into the network namespace at `path`.
pub(super) fn enter(path: &Path) -> io::Result<()> {
    setns(File::open(path)?, CloneFlags::CLONE_NEWNET)?;
    Ok(())
}

fn bind(from: &Path, to: &Path) -> io::Result<()> {
    mount(Some(from), to, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
    Ok(())
}

/// Whether there is a namespace at `path`.
pub(super) fn is_netns(path: &Path) -> bool {
    statfs(path).is_ok_and(|fs| fs.filesystem_type() == NSFS_MAGIC)
}

/// Sets the loopback of the calling thread's network namespace up.
fn loopback_up() -> io::Result<()> {
    /// The loopback is the first link of every network namespace.
    const LOOPBACK: u32 = 1;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()?;
    runtime.block_on(async {
        let (connection, netlink, _) = rtnetlink::new_connection()?;
        tokio::spawn(connection);
        let up = rtnetlink::LinkUnspec::new_with_index(LOOPBACK).up().build();
        let set = netlink.link().set(up).execute().await;
        set.map_err(io::Error::other)
    })
}

fn hosts(kept: &Kept) -> String {
    let mut text = String::from("127.0.0.1 localhost\n::1 localhost ip6-localhost\n");
    let own = kept.id.service.rsplit('/').next().unwrap_or_default();
    for address in &kept.addresses {
        text += &format!("{address} {own}-{}\n", kept.id.instance);
    }
    for line in &kept.run.hosts {
        text += &format!("{} {}\n", line.address, line.names.join(" "));
    }
    text
}
