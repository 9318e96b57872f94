//! Keeps the tunnel process alive without being its keeper: starts it, finds it again, starts it anew.
//!
//! Whether it lives is asked of the lock on its pid file, which the kernel drops with the process: a number
//! alone may belong to another process by now. A daemon that restarts finds the lock taken and does nothing.

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use nix::{sys::signal::Signal, unistd::Pid};

use super::pid_path;

/// Rest before the first restart; doubles with each failure up to [`MAX_REST`].
const MIN_REST: Duration = Duration::from_millis(200);
/// Longest rest between two starts.
const MAX_REST: Duration = Duration::from_secs(10);
/// A tunnel that lived this long is started again without a rest.
const STEADY: Duration = Duration::from_secs(30);
/// The log is begun anew at a start that finds it longer.
const MAX_LOG: u64 = 1 << 20;
/// How long a tunnel may take to end after SIGTERM.
const STOP_GRACE: Duration = Duration::from_secs(3);

/// The version whose process a start makes.
const VERSION: &str = env!("CARGO_PKG_VERSION");

/// How to start a tunnel.
#[derive(Clone, Debug)]
pub struct Launch {
    /// The program; its first argument will be `tunnel`. `/proc/self/exe` is the daemon's own.
    pub program: PathBuf,
    /// Name of the device.
    pub name: String,
    /// Folder of the key, the pid file and the log.
    pub state: PathBuf,
    /// UDP port.
    pub port: u16,
    /// MTU of the device.
    pub mtu: u16,
}

/// Why a tunnel is not running.
#[derive(Debug, thiserror::Error)]
pub enum SupervisorError {
    /// A file of its state refused.
    #[error("failed to {action} {}", path.display())]
    State {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The program cannot be started.
    #[error("failed to start {} tunnel", program.display())]
    Start {
        /// The program.
        program: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It ended and is started again after a rest.
    #[error("tunnel {name} ended ({status}), next start in {} ms; its last words: {words}", rest.as_millis())]
    Ended {
        /// The device.
        name: String,
        /// How it ended.
        status: String,
        /// Time until the next start.
        rest: Duration,
        /// The last line of its log.
        words: String,
    },
    /// It does not end.
    #[error("tunnel {name} does not end on SIGTERM")]
    Stuck {
        /// The device.
        name: String,
    },
}

/// Keeps one tunnel alive.
#[derive(Debug)]
pub struct Supervisor {
    launch: Launch,
    child: Option<Child>,
    started: Option<Instant>,
    rest: Rest,
}

/// How long to wait before the next start; pure.
#[derive(Debug, Default, PartialEq, Eq)]
struct Rest {
    failures: u32,
    until: Option<Instant>,
}

impl Rest {
    /// Notes that a tunnel ended at `now` after it lived for `lived`.
    fn ended(&mut self, lived: Duration, now: Instant) {
        if lived >= STEADY {
            *self = Self::default();
            return;
        }
        let rest = MIN_REST
            .saturating_mul(1 << self.failures.min(10))
            .min(MAX_REST);
        self.failures += 1;
        self.until = Some(now + rest);
    }

    /// What is left of the rest at `now`.
    fn left(&self, now: Instant) -> Option<Duration> {
        self.until
            .map(|until| until.saturating_duration_since(now))
            .filter(|left| !left.is_zero())
    }
}

impl Supervisor {
    /// A supervisor that has done nothing yet.
    #[must_use]
    pub fn new(launch: Launch) -> Self {
        Self {
            launch,
            child: None,
            started: None,
            rest: Rest::default(),
        }
    }

    /// How the tunnel is started.
    #[must_use]
    pub fn launch(&self) -> &Launch {
        &self.launch
    }

    /// The device's MTU at the next start.
    pub fn set_mtu(&mut self, mtu: u16) {
        self.launch.mtu = mtu;
    }

    /// Whether a process carries the tunnel.
    ///
    /// # Errors
    /// When the pid file cannot be asked.
    pub fn is_alive(&self) -> Result<bool, SupervisorError> {
        let path = pid_path(&self.launch.state, &self.launch.name);
        let state = |source| SupervisorError::State {
            action: "ask the lock of",
            path: path.clone(),
            source,
        };
        let file = match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            opened => opened.map_err(state)?,
        };
        match file.try_lock_shared() {
            Ok(()) => Ok(false),
            Err(TryLockError::WouldBlock) => Ok(true),
            Err(TryLockError::Error(source)) => Err(state(source)),
        }
    }

    /// Whether a process of another version carries the tunnel.
    ///
    /// # Errors
    /// When the pid file cannot be asked.
    pub fn is_outdated(&self) -> Result<bool, SupervisorError> {
        let noted = fs::read_to_string(version_path(&self.launch)).unwrap_or_default();
        Ok(self.is_alive()? && noted.trim() != VERSION)
    }

    /// Starts the tunnel unless it lives or is just starting.
    ///
    /// # Errors
    /// When it cannot be started, and while it rests after an end.
    pub fn ensure(&mut self, now: Instant) -> Result<(), SupervisorError> {
        let ended = match self.child.as_mut().map(Child::try_wait) {
            Some(Ok(None)) => return Ok(()),
            Some(Ok(Some(status))) => Some(status),
            Some(Err(_)) | None => None,
        };
        if ended.is_some() || self.child.is_some() {
            self.child = None;
            let lived = self.started.map_or(Duration::ZERO, |started| {
                now.saturating_duration_since(started)
            });
            self.rest.ended(lived, now);
            tracing::warn!(
                name = self.launch.name,
                status = ended.map(|status| status.to_string()),
                lived_s = lived.as_secs(),
                "the tunnel ended"
            );
        }
        if self.is_alive()? {
            return Ok(());
        }
        if let Some(rest) = self.rest.left(now) {
            return Err(self.ended(ended, rest));
        }
        self.start(now)
    }

    fn ended(&self, status: Option<ExitStatus>, rest: Duration) -> SupervisorError {
        let log = fs::read_to_string(log_path(&self.launch)).unwrap_or_default();
        SupervisorError::Ended {
            name: self.launch.name.clone(),
            status: status.map_or_else(|| "before".to_owned(), |status| status.to_string()),
            rest,
            words: log.lines().last().unwrap_or("none").to_owned(),
        }
    }

    fn start(&mut self, now: Instant) -> Result<(), SupervisorError> {
        let Launch {
            program,
            name,
            state,
            port,
            mtu,
        } = &self.launch;
        let log = open_log(&log_path(&self.launch))?;
        let errors = log.try_clone().map_err(|source| SupervisorError::State {
            action: "share",
            path: log_path(&self.launch),
            source,
        })?;
        // A file, not the daemon's own output: a pipe would break with the daemon.
        let child = Command::new(program)
            .arg0("weft-netmanager")
            .arg("tunnel")
            .args(["--name", name])
            .arg("--state")
            .arg(state)
            .args(["--port", &port.to_string()])
            .args(["--mtu", &mtu.to_string()])
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(errors)
            .spawn()
            .map_err(|source| SupervisorError::Start {
                program: program.clone(),
                source,
            })?;
        tracing::info!(name, pid = child.id(), "started the tunnel");
        fs::write(version_path(&self.launch), VERSION).map_err(|source| {
            SupervisorError::State {
                action: "write",
                path: version_path(&self.launch),
                source,
            }
        })?;
        self.child = Some(child);
        self.started = Some(now);
        Ok(())
    }

    /// Ends the tunnel and waits for it.
    ///
    /// # Errors
    /// When it cannot be signalled or does not end.
    pub fn stop(&mut self) -> Result<(), SupervisorError> {
        let path = pid_path(&self.launch.state, &self.launch.name);
        let state = |action| {
            let path = path.clone();
            move |source| SupervisorError::State {
                action,
                path,
                source,
            }
        };
        if let Some(mut child) = self.child.take() {
            let _ = nix::sys::signal::kill(pid(child.id()), Signal::SIGTERM);
            let deadline = Instant::now() + STOP_GRACE;
            while !matches!(child.try_wait(), Ok(Some(_)) | Err(_)) {
                if Instant::now() > deadline {
                    child.kill().map_err(state("end the process of"))?;
                }
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        if !self.is_alive()? {
            return Ok(());
        }
        let number: u32 = fs::read_to_string(&path)
            .map_err(state("read"))?
            .trim()
            .parse()
            .map_err(|error| state("read")(io::Error::other(error)))?;
        let deadline = Instant::now() + STOP_GRACE;
        nix::sys::signal::kill(pid(number), Signal::SIGTERM)
            .map_err(|errno| state("end the process of")(errno.into()))?;
        while self.is_alive()? {
            if Instant::now() > deadline {
                return Err(SupervisorError::Stuck {
                    name: self.launch.name.clone(),
                });
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }
}

fn pid(number: u32) -> Pid {
    Pid::from_raw(i32::try_from(number).expect("Linux gives process numbers below 2^22"))
}

/// The file that names the version of the process.
fn version_path(launch: &Launch) -> PathBuf {
    launch.state.join(format!("tunnel-{}.version", launch.name))
}

fn log_path(launch: &Launch) -> PathBuf {
    launch.state.join(format!("tunnel-{}.log", launch.name))
}

/// Opens the log to append to; one that grew too long is begun anew.
fn open_log(path: &Path) -> Result<File, SupervisorError> {
    let state = |source| SupervisorError::State {
        action: "open",
        path: path.to_owned(),
        source,
    };
    let file = OpenOptions::new()
        .append(true)
        .create(true)
        .open(path)
        .map_err(state)?;
    if file.metadata().map_err(state)?.len() > MAX_LOG {
        file.set_len(0).map_err(state)?;
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tunnel_that_keeps_dying_is_started_ever_more_rarely_and_a_steady_one_at_once() {
        let now = Instant::now();
        let mut rest = Rest::default();
        assert_eq!(rest.left(now), None);
        let mut rests = Vec::new();
        for _ in 0..8 {
            rest.ended(Duration::from_millis(10), now);
            rests.push(rest.left(now).unwrap().as_millis());
        }
        assert_eq!(rests, [200, 400, 800, 1600, 3200, 6400, 10_000, 10_000]);
        assert_eq!(rest.left(now + MAX_REST), None);
        rest.ended(STEADY, now);
        assert_eq!(rest, Rest::default());
    }

    fn supervisor(program: &str, state: &Path) -> Supervisor {
        Supervisor::new(Launch {
            program: program.into(),
            name: "weft9".to_owned(),
            state: state.to_owned(),
            port: 0,
            mtu: 1420,
        })
    }

    #[test]
    fn a_locked_pid_file_is_a_living_tunnel_and_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let mut supervisor = supervisor("/nonexistent", dir.path());
        assert!(!supervisor.is_alive().unwrap());
        let file = File::create(pid_path(dir.path(), "weft9")).unwrap();
        assert!(!supervisor.is_alive().unwrap());
        file.lock().unwrap();
        assert!(supervisor.is_alive().unwrap());
        supervisor.ensure(Instant::now()).unwrap();
        // Not by a drop: a child that another test is about to start has the descriptor, too, until it runs its program.
        file.unlock().unwrap();
        assert!(!supervisor.is_alive().unwrap());
    }

    #[test]
    fn a_program_that_is_not_there_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let error = supervisor("/nonexistent", dir.path())
            .ensure(Instant::now())
            .unwrap_err();
        assert_eq!(error.to_string(), "failed to start /nonexistent tunnel");
    }

    #[test]
    fn a_tunnel_that_ends_at_once_rests_and_its_last_words_are_told() {
        let dir = tempfile::tempdir().unwrap();
        let mut supervisor = supervisor("/bin/false", dir.path());
        fs::write(log_path(&supervisor.launch), "first\nno such luck\n").unwrap();
        let start = Instant::now();
        supervisor.ensure(start).unwrap();
        supervisor.child.as_mut().unwrap().wait().unwrap();
        let error = supervisor.ensure(start).unwrap_err().to_string();
        assert_eq!(
            error,
            "tunnel weft9 ended (exit status: 1), next start in 200 ms; its last words: no such luck"
        );
        supervisor.ensure(start + MIN_REST).unwrap();
        supervisor.stop().unwrap();
    }
}
