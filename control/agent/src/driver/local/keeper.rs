//! The keeper of one instance: a thread that does what the instance's [`Life`] says.
//!
//! From its first probe on the thread lives in the pod's network namespace, where it probes the instance by the
//! instance's own addresses. It ends when the instance is over, or when the driver is dropped; then the
//! instance runs on, and the next driver adopts it.

use std::{
    io,
    net::{IpAddr, SocketAddr, TcpStream},
    process::Child,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, RecvTimeoutError},
    },
    time::{Duration, Instant},
};

use control_core::goal::Protocol;
use nix::sys::signal::Signal;

use super::{
    Shared,
    pod::{Kept, Pod},
    process::{self, NotStarted, ending, is_alive, kill_all},
};
use crate::driver::{
    State, Status,
    life::{Event, Life, Todo},
};

/// From one look at the process to the next.
const LOOK: Duration = Duration::from_millis(100);
/// How long a connection to a ready port may take; it never leaves the machine.
const CONNECT: Duration = Duration::from_millis(250);
/// How long killed processes may take to be gone.
const DYING: Duration = Duration::from_millis(500);
const DYING_LOOK: Duration = Duration::from_millis(5);

/// The keeper of one instance.
#[derive(Debug)]
pub(super) struct Keeper {
    pub(super) shared: Arc<Shared>,
    pub(super) pod: Pod,
    pub(super) kept: Kept,
    pub(super) life: Life,
    /// Stops, each with its grace.
    pub(super) stops: Receiver<Duration>,
    /// Set as soon as a stop was ordered, before it is read.
    pub(super) stopping: Arc<AtomicBool>,
    /// Its process, when this agent started it.
    pub(super) child: Option<Child>,
    /// Whether the thread is in the pod's network namespace.
    pub(super) inside: bool,
}

impl Keeper {
    /// Keeps the instance until it is over or the driver is dropped.
    pub(super) fn run(mut self) {
        loop {
            self.look();
            self.publish();
            let now = Instant::now();
            let event = match self.life.todo(now) {
                Todo::End => return,
                Todo::Attach => Some(self.attach()),
                Todo::Start => Some(self.start()),
                Todo::Probe => Some(self.probe()),
                Todo::Terminate => {
                    self.signal(Signal::SIGTERM);
                    self.life.terminated();
                    None
                }
                Todo::Kill => {
                    self.signal(Signal::SIGKILL);
                    self.life.killed(now);
                    None
                }
                Todo::Detach { by_force } => Some(self.detach(by_force)),
                Todo::Wait(until) => {
                    let until = if self.life.has_process() {
                        until.min(now + LOOK)
                    } else {
                        until
                    };
                    match self.stops.recv_timeout(until - now) {
                        Ok(grace) => Some(Event::Stop { grace }),
                        Err(RecvTimeoutError::Timeout) => None,
                        Err(RecvTimeoutError::Disconnected) => return,
                    }
                }
            };
            if let Some(event) = event {
                self.life.on(event, Instant::now());
            }
            while let Ok(grace) = self.stops.try_recv() {
                self.life.on(Event::Stop { grace }, Instant::now());
            }
        }
    }

    /// Looks whether the process is still there.
    fn look(&mut self) {
        if !self.life.has_process() {
            return;
        }
        let how = match &mut self.child {
            Some(child) => match child.try_wait() {
                Ok(None) => return,
                Ok(Some(status)) => ending(status),
                Err(error) => format!("its process is lost: {error}"),
            },
            None if self.kept.process.is_some_and(is_alive) => return,
            None => "its process ended".to_owned(),
        };
        tracing::info!(
            pod = self.pod.name(),
            how,
            "the process of an instance ended"
        );
        self.child = None;
        self.kept.process = None;
        self.kept.serves = false;
        self.keep();
        self.life.on(Event::Ended(how), Instant::now());
    }

    fn publish(&mut self) {
        let state = match self.life.state() {
            State::Gone => State::Gone,
            State::Refused => State::Refused,
            // The order is as good as read.
            _ if self.stopping.load(Ordering::Relaxed) => State::Stopping,
            state => state,
        };
        let serves = state == State::Serving;
        if serves != self.kept.serves && self.life.has_process() {
            self.kept.serves = serves;
            self.keep();
        }
        let status = Status {
            node: self.kept.node.clone(),
            state,
            life: self.kept.life,
            reason: self.life.reason().to_owned(),
        };
        self.shared.publish(&self.kept.id, status);
    }

    fn keep(&self) {
        if let Err(error) = self.pod.keep(&self.kept) {
            tracing::error!(pod = self.pod.name(), %error, "failed to keep the state of an instance");
        }
    }

    fn attach(&mut self) -> Event {
        match self.try_attach() {
            Ok(addresses) => {
                self.kept.addresses = addresses;
                self.keep();
                Event::Attached
            }
            Err(reason) => {
                tracing::warn!(
                    pod = self.pod.name(),
                    reason,
                    "failed to attach an instance"
                );
                Event::AttachFailed(reason)
            }
        }
    }

    fn try_attach(&self) -> Result<Vec<IpAddr>, String> {
        let plugin = self.shared.plugin(&self.kept.node);
        let plugin = plugin.ok_or_else(|| format!("there is no node {:?}", self.kept.node))?;
        let io = |what: &'static str| move |error: io::Error| format!("failed to {what}: {error}");
        // Kept first: whatever follows is found again.
        self.pod.keep(&self.kept).map_err(io("keep its state"))?;
        self.pod
            .make_netns()
            .map_err(io("make its network namespace"))?;
        plugin
            .add(&self.pod, &self.kept.id, &self.stopping)
            .map_err(|error| {
                // CNI spec 1.1, section 4: a DEL follows a failed ADD.
                match plugin.del(&self.pod) {
                    Ok(()) => error.to_string(),
                    Err(second) => format!("{error}; and its DEL: {second}"),
                }
            })
    }

    fn start(&mut self) -> Event {
        // What an earlier process left would hold its ports.
        if let Err(reason) = self.kill_rest() {
            return Event::StartFailed(reason);
        }
        match process::start(&self.shared.pods, &self.pod, &self.kept) {
            Ok((child, process)) => {
                self.child = Some(child);
                self.kept.process = Some(process);
                self.kept.life += 1;
                self.kept.serves = false;
                self.keep();
                let requests = self.kept.run.requests;
                self.shared
                    .cgroups
                    .enter(self.pod.name(), requests, process.pid);
                Event::Started
            }
            Err(NotStarted::Never(reason)) => Event::StartRefused(reason),
            Err(NotStarted::NotNow(reason)) => Event::StartFailed(reason),
        }
    }

    fn probe(&mut self) -> Event {
        // From anywhere else its addresses are somebody else's, or nobody's.
        if !self.inside {
            if let Err(error) = self.pod.enter() {
                return Event::Unanswered(format!(
                    "its network namespace is out of reach: {error}"
                ));
            }
            self.inside = true;
        }
        if let Err(error) = process::rotate(&self.pod.log()) {
            tracing::debug!(pod = self.pod.name(), %error, "failed to put a log aside");
        }
        let ports = self.kept.run.ports.iter();
        let tcp = ports.filter(|port| port.protocol == Protocol::Tcp);
        for port in tcp.map(|port| port.target_port) {
            if let Err(error) = connect(&self.kept.addresses, port) {
                return Event::Unanswered(format!(
                    "it takes no connection on TCP port {port}: {error}"
                ));
            }
        }
        Event::Answered
    }

    fn signal(&self, signal: Signal) {
        if let Some(process) = self.kept.process {
            process::signal(process, signal);
        }
    }

    fn detach(&mut self, by_force: bool) -> Event {
        match self.try_detach(by_force) {
            Ok(()) => Event::Detached,
            Err(reason) => {
                tracing::warn!(
                    pod = self.pod.name(),
                    reason,
                    "failed to remove an instance"
                );
                Event::DetachFailed(reason)
            }
        }
    }

    fn try_detach(&self, by_force: bool) -> Result<(), String> {
        self.kill_rest()?;
        let name = self.pod.name();
        let detached = match self.shared.plugin(&self.kept.node) {
            Some(plugin) => plugin.del(&self.pod).map_err(|error| error.to_string()),
            None => Ok(()),
        };
        let unlimited = self.shared.cgroups.remove(name);
        let unlimited = unlimited.map_err(|error| format!("failed to remove its cgroup: {error}"));
        if let Err(reason) = detached.and(unlimited) {
            if !by_force {
                return Err(reason);
            }
            tracing::error!(pod = name, reason, "removing an instance in spite of it");
        }
        self.pod
            .remove()
            .map_err(|error| format!("failed to remove its folder: {error}"))
    }

    /// Ends whatever still runs in the pod.
    fn kill_rest(&self) -> Result<(), String> {
        let deadline = Instant::now() + DYING;
        loop {
            let left = self
                .pod
                .processes()
                .map_err(|error| format!("failed to list its processes: {error}"))?;
            if !kill_all(&left) {
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(format!("its processes {left:?} do not end"));
            }
            std::thread::sleep(DYING_LOOK);
        }
    }
}

/// Connects to a port on any of the instance's addresses.
fn connect(addresses: &[IpAddr], port: u16) -> io::Result<()> {
    let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
    for address in addresses {
        match TcpStream::connect_timeout(&SocketAddr::new(*address, port), CONNECT) {
            Ok(_) => return Ok(()),
            Err(error) => last = error,
        }
    }
    Err(last)
}
