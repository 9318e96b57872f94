//! One network namespace per machine of a test, removed on drop.
//!
//! Work inside a namespace runs on a thread of its own that enters it and ends there, so that no thread of
//! the test harness ever changes its namespace. Processes that such a thread starts are born inside.

use std::{
    any::Any,
    fs::File,
    io::{self, Write},
    panic::resume_unwind,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Output, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    thread,
};

use nix::sched::{CloneFlags, setns};

/// Where iproute2 keeps the names of namespaces.
const NAMES: &str = "/run/netns";
static NEXT: AtomicU32 = AtomicU32::new(0);

/// Why a namespace could not be made, entered or used.
#[derive(Debug, thiserror::Error)]
pub enum NetnsError {
    /// A program could not be started at all.
    #[error("failed to start {program}")]
    Start {
        /// The program.
        program: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The kernel refuses a value.
    #[error("failed to set {name} to {value:?} in {netns}")]
    Sysctl {
        /// The value's name below `/proc/sys/net`.
        name: String,
        /// The value.
        value: String,
        /// Where.
        netns: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A program ended with an error.
    #[error("{command} in {netns}: {status}: {stderr}")]
    Failed {
        /// The whole command line.
        command: String,
        /// Where it ran.
        netns: String,
        /// How it ended.
        status: ExitStatus,
        /// What it said.
        stderr: String,
    },
}

/// A network namespace with loopback up; removed, with all its links, on drop.
#[derive(Debug)]
pub struct Netns {
    name: String,
}

impl Netns {
    /// Makes a namespace whose unique name contains `label`.
    ///
    /// # Errors
    /// When iproute2 is missing or the capability to make namespaces is.
    pub fn new(label: &str) -> Result<Self, NetnsError> {
        // Its threads never end: born inside they would keep a namespace, and its links, for good.
        let _ = crate::still::stood_still();
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("weft-t-{label}-{}-{number}", std::process::id());
        succeed(Command::new("ip").args(["netns", "add", &name]), "the host")?;
        let netns = Self { name };
        netns.ip("link set lo up")?;
        Ok(netns)
    }

    /// The name, as `ip netns` knows it.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file that stands for the namespace.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        Path::new(NAMES).join(&self.name)
    }

    /// Runs `work` inside and returns what it returns.
    ///
    /// # Panics
    /// When the namespace cannot be entered, and when `work` does, with its own message.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let path = self.path();
        thread::scope(|scope| {
            scope
                .spawn(move || {
                    enter(&path);
                    work()
                })
                .join()
                .unwrap_or_else(|panic: Box<dyn Any + Send>| resume_unwind(panic))
        })
    }

    /// Runs `command` inside to its end and returns its output, whatever its status.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn output(&self, command: &mut Command) -> Result<Output, NetnsError> {
        let program = command.get_program().to_string_lossy().into_owned();
        self.run(|| command.stdin(Stdio::null()).output())
            .map_err(|source| NetnsError::Start { program, source })
    }

    /// Runs a program inside to its successful end and returns its standard output.
    ///
    /// # Errors
    /// When it cannot be started or ends with an error.
    pub fn succeed(&self, program: &str, args: &[&str]) -> Result<String, NetnsError> {
        self.run(|| succeed(Command::new(program).args(args), &self.name))
    }

    /// Runs `ip` with the words of `args` inside.
    ///
    /// # Errors
    /// When it ends with an error.
    pub fn ip(&self, args: &str) -> Result<String, NetnsError> {
        self.succeed("ip", &args.split_whitespace().collect::<Vec<_>>())
    }

    /// Runs the lines as commands of one `ip`, in order.
    ///
    /// # Errors
    /// When one of them ends with an error; those before it stay done.
    pub fn ip_batch(&self, lines: &[String]) -> Result<(), NetnsError> {
        let batch = format!("{}\n", lines.join("\n"));
        // One process instead of one per line: a mesh is hundreds of lines.
        let run = || {
            let (reader, mut writer) = io::pipe()?;
            // A batch is smaller than what a pipe holds.
            writer.write_all(batch.as_bytes())?;
            drop(writer);
            let mut ip = Command::new("ip");
            ip.args(["-batch", "-"]).stdin(reader).output()
        };
        let output = self.run(run).map_err(|source| NetnsError::Start {
            program: "ip".to_owned(),
            source,
        })?;
        if output.status.success() {
            return Ok(());
        }
        Err(NetnsError::Failed {
            command: batch,
            netns: self.name.clone(),
            status: output.status,
            stderr: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        })
    }

    /// Starts `command` inside and leaves it running; it is killed when the guard is dropped.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn spawn(&self, command: &mut Command) -> Result<Process, NetnsError> {
        let program = command.get_program().to_string_lossy().into_owned();
        self.run(|| command.spawn())
            .map(Process)
            .map_err(|source| NetnsError::Start { program, source })
    }

    /// Sets a value below `/proc/sys/net`, for instance `ipv4.ip_forward`.
    ///
    /// # Errors
    /// When the kernel does not know the name or refuses the value.
    pub fn sysctl(&self, name: &str, value: &str) -> Result<(), NetnsError> {
        let path = Path::new("/proc/sys/net").join(name.replace('.', "/"));
        self.run(|| std::fs::write(&path, value))
            .map_err(|source| NetnsError::Sysctl {
                name: name.to_owned(),
                value: value.to_owned(),
                netns: self.name.clone(),
                source,
            })
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        if let Err(error) = succeed(
            Command::new("ip").args(["netns", "delete", &self.name]),
            "the host",
        ) {
            eprintln!("{error}");
        }
    }
}

/// A process inside a namespace, killed on drop.
#[derive(Debug)]
pub struct Process(pub Child);

impl Drop for Process {
    fn drop(&mut self) {
        // Both fail only where the process has ended and was waited for, which is the aim.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn enter(path: &Path) {
    let file = File::open(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    setns(file, CloneFlags::CLONE_NEWNET).unwrap_or_else(|error| {
        panic!(
            "failed to enter {}: {error}: CAP_SYS_ADMIN is needed: cargo xtask netns",
            path.display()
        )
    });
}

fn succeed(command: &mut Command, netns: &str) -> Result<String, NetnsError> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command
        .stdin(Stdio::null())
        .output()
        .map_err(|source| NetnsError::Start { program, source })?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    Err(NetnsError::Failed {
        command: format!("{command:?}").replace('"', ""),
        netns: netns.to_owned(),
        status: output.status,
        stderr: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
    })
}
