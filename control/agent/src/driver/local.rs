//! The local driver: an instance is a process on this machine, in a network namespace of its own that the real
//! `weft-cni` attaches by the CNI protocol.
//!
//! ```text
//!  run, stop, forget --> LocalDriver --one keeper (thread) each--> life.rs    what next, without I/O
//!                             |                                    pod.rs     folder, namespaces, hosts file
//!                             '-- statuses <-- publish             cni.rs     the plugin, inside the node
//!                                                                  process.rs start, look, signal
//!                                                                  cgroup.rs  share, limit and use
//! ```
//!
//! A node is a network namespace of this machine, or the machine's own. Instances outlive the agent: all that
//! is needed to take one over is in its folder. One driver works on a run directory at a time. It runs no
//! images.

mod cgroup;
mod cni;
mod keeper;
mod pod;
mod process;

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc::{Sender, channel},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use control_core::{assignment::Run, report::InstanceId};
use nix::fcntl::{Flock, FlockArg};
use tokio::sync::watch;

use self::{
    cgroup::Cgroups,
    cni::Plugin,
    keeper::Keeper,
    pod::{Kept, Pod},
    process::{is_alive, kill_all},
};
use crate::{
    config::LocalConfig,
    driver::{
        Driver, State, Status, Statuses,
        life::{Event, Life},
    },
};

/// For an instance whose node is configured no more.
const HOMELESS_GRACE: Duration = Duration::from_secs(5);
/// A keeper calls nothing deep.
const KEEPER_STACK: usize = 256 << 10;

/// Why the driver does not start.
#[derive(Debug, thiserror::Error)]
pub enum LocalError {
    /// The run directory cannot be used.
    #[error("failed to use the run directory {path}")]
    RunDir {
        /// `driver.local.run_dir`.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Another agent works on the run directory.
    #[error("another agent works on the run directory {path}: give each cluster its own")]
    Busy {
        /// `driver.local.run_dir`.
        path: PathBuf,
    },
    /// The plugin is not there.
    #[error("driver.local.cni_plugin = {path} is not the weft-cni binary")]
    Plugin {
        /// `driver.local.cni_plugin`.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The agent's own network namespace cannot be named.
    #[error("failed to open the agent's network namespace")]
    Netns(#[source] io::Error),
}

/// Runs instances as processes.
#[derive(Debug)]
pub struct LocalDriver {
    shared: Arc<Shared>,
    keepers: Mutex<BTreeMap<InstanceId, Handle>>,
    /// Held as long as the driver lives.
    _lock: Flock<File>,
}

/// What the keepers share.
#[derive(Debug)]
struct Shared {
    pods: PathBuf,
    nodes: BTreeMap<String, Plugin>,
    cgroups: Cgroups,
    statuses: watch::Sender<Statuses>,
}

/// The driver's end of a keeper.
#[derive(Debug)]
struct Handle {
    stops: Sender<Duration>,
    stopping: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl LocalDriver {
    /// Takes over the run directory with everything that runs in it.
    ///
    /// # Errors
    /// When the run directory cannot be used or another agent works on it, or the plugin is not there.
    pub fn open(config: &LocalConfig) -> Result<Self, LocalError> {
        let run_dir = |source| LocalError::RunDir {
            path: config.run_dir.clone(),
            source,
        };
        let pods = config.run_dir.join("pods");
        // Environments are kept there.
        fs::create_dir_all(&pods)
            .and_then(|()| fs::set_permissions(&pods, fs::Permissions::from_mode(0o700)))
            .map_err(run_dir)?;
        let lock = File::create(config.run_dir.join("lock")).map_err(run_dir)?;
        let lock =
            Flock::lock(lock, FlockArg::LockExclusiveNonblock).map_err(|_| LocalError::Busy {
                path: config.run_dir.clone(),
            })?;
        check_plugin(&config.cni_plugin)?;
        let shared = Arc::new(Shared {
            nodes: nodes(config)?,
            cgroups: Cgroups::find(Path::new("/sys/fs/cgroup"), &config.run_dir),
            statuses: watch::Sender::new(Statuses::new()),
            pods,
        });
        let driver = Self {
            shared,
            keepers: Mutex::default(),
            _lock: lock,
        };
        for pod in Pod::list(&driver.shared.pods).map_err(run_dir)? {
            driver.take_over(pod);
        }
        Ok(driver)
    }

    /// Adopts what runs, cleans up what does not: whether it starts again is the agent's to say.
    fn take_over(&self, pod: Pod) {
        let Some(kept) = pod.kept() else {
            self.shared.clean(&pod);
            return;
        };
        let now = Instant::now();
        let alive = kept.process.filter(|process| is_alive(*process));
        let mended = alive.is_none_or(|process| {
            let mended = pod.mend_netns(process).and_then(|()| pod.enterable());
            mended
                .inspect_err(|error| {
                    tracing::error!(pod = pod.name(), %error, "failed to reach an instance's namespace");
                })
                .is_ok()
        });
        let mut life = match alive {
            Some(_) if mended => Life::adopted(kept.serves, now),
            // Alive and out of reach: it is ended like any other.
            Some(_) => Life::adopted(false, now),
            None => Life::remains(now),
        };
        let homeless = !self.shared.nodes.contains_key(&kept.node);
        if alive.is_some() && (homeless || !mended) {
            let grace = HOMELESS_GRACE;
            life.on(Event::Stop { grace }, now);
        }
        tracing::info!(
            pod = pod.name(),
            adopted = alive.is_some(),
            "found an instance of an earlier life"
        );
        self.spawn(pod, kept, life);
    }

    fn spawn(&self, pod: Pod, kept: Kept, life: Life) {
        let id = kept.id.clone();
        let status = Status {
            node: kept.node.clone(),
            state: life.state(),
            life: kept.life,
            reason: life.reason().to_owned(),
        };
        let (stops, orders) = channel();
        let stopping = Arc::new(AtomicBool::new(false));
        let keeper = Keeper {
            shared: self.shared.clone(),
            pod,
            kept,
            life,
            stops: orders,
            stopping: stopping.clone(),
            child: None,
            inside: false,
        };
        self.shared.publish(&id, status);
        let spawned = std::thread::Builder::new()
            .name("keeper".to_owned())
            .stack_size(KEEPER_STACK)
            .spawn(move || keeper.run());
        match spawned {
            Ok(thread) => {
                let handle = Handle {
                    stops,
                    stopping,
                    thread,
                };
                self.keepers().insert(id, handle);
            }
            Err(error) => {
                self.refuse(&id, "", format!("failed to start its keeper: {error}"));
            }
        }
    }

    fn refuse(&self, id: &InstanceId, node: &str, reason: String) {
        let status = Status {
            node: node.to_owned(),
            state: State::Refused,
            life: self.shared.life(id),
            reason,
        };
        self.shared.publish(id, status);
    }

    fn keepers(&self) -> MutexGuard<'_, BTreeMap<InstanceId, Handle>> {
        self.keepers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Driver for LocalDriver {
    fn run(&self, id: &InstanceId, node: &str, run: &Run) {
        let live = |status: Status| !matches!(status.state, State::Gone | State::Refused);
        if self.shared.status(id).is_some_and(live) {
            return;
        }
        let pod = match admit(&self.shared, id, node, run) {
            Ok(pod) => pod,
            Err(reason) => return self.refuse(id, node, reason),
        };
        let kept = Kept {
            id: id.clone(),
            node: node.to_owned(),
            run: run.clone(),
            life: self.shared.life(id),
            serves: false,
            process: None,
            addresses: Vec::new(),
        };
        self.spawn(pod, kept, Life::new(Instant::now()));
    }

    fn stop(&self, id: &InstanceId, grace: Duration) {
        let Some(mut status) = self.shared.status(id) else {
            let gone = Status {
                node: String::new(),
                state: State::Gone,
                life: 0,
                reason: String::new(),
            };
            return self.shared.publish(id, gone);
        };
        match status.state {
            State::Gone => return,
            State::Refused => status.state = State::Gone,
            _ => {
                status.state = State::Stopping;
                if let Some(handle) = self.keepers().get(id) {
                    handle.stopping.store(true, Ordering::Relaxed);
                    // A keeper that has ended meanwhile has said how it stands.
                    if handle.stops.send(grace).is_err() {
                        return;
                    }
                }
            }
        }
        self.shared.publish_unless_over(id, status);
    }

    fn forget(&self, id: &InstanceId) {
        let over = self
            .shared
            .status(id)
            .is_some_and(|status| matches!(status.state, State::Gone | State::Refused));
        if over {
            self.keepers().remove(id);
            self.shared
                .statuses
                .send_if_modified(|statuses| statuses.remove(id).is_some());
        }
    }

    fn used(&self) -> BTreeMap<InstanceId, Duration> {
        let statuses = self.shared.statuses.borrow().clone();
        let serving = statuses
            .into_iter()
            .filter(|(_, status)| status.state == State::Serving);
        serving
            .filter_map(|(id, _)| {
                let pod = Pod::of(&self.shared.pods, &id).ok()?;
                let used = self.shared.cgroups.used(pod.name())?;
                Some((id, used))
            })
            .collect()
    }

    fn statuses(&self) -> watch::Receiver<Statuses> {
        self.shared.statuses.subscribe()
    }
}

impl Drop for LocalDriver {
    /// Ends the keepers and leaves the instances running.
    fn drop(&mut self) {
        let handles = std::mem::take(&mut *self.keepers());
        let threads: Vec<_> = handles
            .into_values()
            .map(|handle| {
                // A plugin that is at work is not waited for; what it left is found by the next driver.
                handle.stopping.store(true, Ordering::Relaxed);
                handle.thread
            })
            .collect();
        for thread in threads {
            if thread.join().is_err() {
                tracing::error!("a keeper panicked");
            }
        }
    }
}

impl Shared {
    fn plugin(&self, node: &str) -> Option<&Plugin> {
        self.nodes.get(node)
    }

    fn status(&self, id: &InstanceId) -> Option<Status> {
        self.statuses.borrow().get(id).cloned()
    }

    fn life(&self, id: &InstanceId) -> u64 {
        self.status(id).map_or(0, |status| status.life)
    }

    fn publish(&self, id: &InstanceId, status: Status) {
        self.statuses.send_if_modified(|statuses| {
            statuses.insert(id.clone(), status.clone()).as_ref() != Some(&status)
        });
    }

    /// Publishes what was ordered, unless the keeper was faster.
    fn publish_unless_over(&self, id: &InstanceId, status: Status) {
        self.statuses.send_if_modified(|statuses| {
            let have = statuses.get(id);
            if have.is_some_and(|have| have.state == State::Gone) || have == Some(&status) {
                return false;
            }
            statuses.insert(id.clone(), status);
            true
        });
    }

    /// Removes what has no readable state: nobody can say what it was.
    fn clean(&self, pod: &Pod) {
        kill_all(&pod.processes().unwrap_or_default());
        for plugin in self.nodes.values() {
            if let Err(error) = plugin.del(pod) {
                tracing::warn!(pod = pod.name(), %error, "failed to detach what an earlier life left");
            }
        }
        let removed = self.cgroups.remove(pod.name()).and_then(|()| pod.remove());
        if let Err(error) = removed {
            tracing::warn!(pod = pod.name(), %error, "failed to remove what an earlier life left");
        }
    }
}

/// Whether an instance can be run here at all; why not.
fn admit(shared: &Shared, id: &InstanceId, node: &str, run: &Run) -> Result<Pod, String> {
    if shared.plugin(node).is_none() {
        let known: Vec<_> = shared.nodes.keys().map(String::as_str).collect();
        return Err(format!(
            "there is no node {node:?}, only {}",
            known.join(", ")
        ));
    }
    process::program(run)?;
    Pod::of(&shared.pods, id)
}

fn nodes(config: &LocalConfig) -> Result<BTreeMap<String, Plugin>, LocalError> {
    let mut nodes = BTreeMap::new();
    for node in &config.nodes {
        let plugin = Plugin {
            binary: config.cni_plugin.clone(),
            socket: node.cni_socket.clone(),
            netns: node.netns.clone(),
            own: File::open("/proc/self/ns/net").map_err(LocalError::Netns)?,
        };
        nodes.insert(node.name.clone(), plugin);
    }
    Ok(nodes)
}

fn check_plugin(path: &Path) -> Result<(), LocalError> {
    let plugin = |source| LocalError::Plugin {
        path: path.to_owned(),
        source,
    };
    let metadata = fs::metadata(path).map_err(plugin)?;
    if !metadata.is_file() || metadata.permissions().mode() & 0o111 == 0 {
        return Err(plugin(io::Error::other("it is not an executable file")));
    }
    Ok(())
}
