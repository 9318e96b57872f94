//! Requests from one pod to a VIP while something happens to the node, and what became of them.

use std::{
    fs,
    io::{self, Read, Write},
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use weft_tests::traffic::MARKER;

use super::super::machine::{Pod, VIP4, vip6};

/// How long an answer may take before the request counts as failed.
const PATIENCE: Duration = Duration::from_secs(3);
/// Requests per second, each on a connection of its own. By hand more: `WEFT_TEST_REQUESTS=20000`.
const RATE: f64 = 250.0;

/// Load that runs until it is ended.
pub(crate) struct Load {
    stop: Arc<AtomicBool>,
    openers: Vec<JoinHandle<Outcome>>,
    streams: Vec<JoinHandle<Outcome>>,
    pods: Vec<PathBuf>,
    before: Again,
}

/// What became of the requests.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    pub(crate) requests: u64,
    pub(crate) failures: Vec<String>,
    pub(crate) longest: Duration,
}

impl Outcome {
    fn add(&mut self, other: Self) {
        self.requests += other.requests;
        self.failures.extend(other.failures);
        self.longest = self.longest.max(other.longest);
    }
}

/// The whole.
#[derive(Debug)]
pub(crate) struct Report {
    /// Requests on connections of their own.
    pub(crate) opened: Outcome,
    /// Requests on connections that last.
    pub(crate) kept: Outcome,
    /// Segments that had to be sent again, by both pods. Those that had arrived are left out: they were sent again
    /// because their ACK was late, as where a machine halts for longer than TCP waits, 200 ms.
    pub(crate) retransmitted: u64,
}

impl Load {
    /// Begins: over IPv4 and IPv6, connections of their own and two that last.
    pub(crate) fn start(client: &Pod, server: &Pod) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let rate = std::env::var("WEFT_TEST_REQUESTS")
            .ok()
            .and_then(|text| text.parse().ok())
            .unwrap_or(RATE);
        let targets = [VIP4.into(), vip6().into()].map(|address| SocketAddr::new(address, 80));
        let pods = vec![client.netns.path(), server.netns.path()];
        let before = Again::of(&pods);
        let spawn = |work: Box<dyn FnOnce(&AtomicBool) -> Outcome + Send>| {
            let (stop, netns) = (stop.clone(), client.netns.path());
            thread::spawn(move || {
                enter(&netns);
                work(&stop)
            })
        };
        let openers = targets
            .map(|to| {
                spawn(Box::new(move |stop| {
                    open(to, rate.min(1_000.0) / 2.0, stop)
                }))
            })
            .into();
        let streams = targets
            .map(|to| spawn(Box::new(move |stop| keep(to, rate / 2.0, stop))))
            .into();
        Self {
            stop,
            openers,
            streams,
            pods,
            before,
        }
    }

    /// Ends it.
    pub(crate) fn end(self) -> Report {
        self.stop.store(true, Ordering::Relaxed);
        let sum = |threads: Vec<JoinHandle<Outcome>>| {
            threads
                .into_iter()
                .fold(Outcome::default(), |mut all, one| {
                    all.add(one.join().unwrap());
                    all
                })
        };
        let (opened, kept) = (sum(self.openers), sum(self.streams));
        let after = Again::of(&self.pods);
        let sent = after.sent - self.before.sent;
        let received = after.received - self.before.received;
        Report {
            opened,
            kept,
            retransmitted: sent.saturating_sub(received),
        }
    }
}

fn enter(netns: &Path) {
    nix::sched::setns(
        fs::File::open(netns).unwrap(),
        nix::sched::CloneFlags::CLONE_NEWNET,
    )
    .unwrap();
}

/// What TCP did more than once.
#[derive(Clone, Copy, Debug, Default)]
struct Again {
    /// Segments sent again (RFC 4022, tcpRetransSegs).
    sent: u64,
    /// Segments that came although they were there, what an ACK that came too late causes (linux/snmp.h,
    /// `LINUX_MIB_DELAYEDACKLOST`).
    received: u64,
}

impl Again {
    /// That of some namespaces so far.
    fn of(netns: &[PathBuf]) -> Self {
        netns.iter().fold(Self::default(), |all, netns| Self {
            sent: all.sent + counter(netns, "snmp", "Tcp:", "RetransSegs"),
            received: all.received + counter(netns, "netstat", "TcpExt:", "DelayedACKLost"),
        })
    }
}

/// A counter of a namespace: its file, the first word of its line, its name.
fn counter(netns: &Path, file: &str, line: &str, name: &str) -> u64 {
    let read = || {
        enter(netns);
        fs::read_to_string(format!("/proc/thread-self/net/{file}")).unwrap()
    };
    let text = thread::scope(|scope| scope.spawn(read).join().unwrap());
    let mut lines = text.lines().filter(|text| text.starts_with(line));
    let (names, values) = (lines.next().unwrap(), lines.next().unwrap());
    let position = names.split(' ').position(|text| text == name);
    let value = values.split(' ').nth(position.unwrap()).unwrap();
    value.parse().unwrap()
}

/// Runs requests at `rate` a second until `stop`.
fn paced(rate: f64, stop: &AtomicBool, mut request: impl FnMut(u64) -> io::Result<()>) -> Outcome {
    let mut outcome = Outcome::default();
    let start = Instant::now();
    while !stop.load(Ordering::Relaxed) {
        let due = Duration::from_secs_f64(outcome.requests as f64 / rate);
        if let Some(early) = due.checked_sub(start.elapsed()) {
            thread::sleep(early);
        }
        let began = Instant::now();
        if let Err(error) = request(outcome.requests) {
            outcome
                .failures
                .push(format!("{error} after {:?}", began.elapsed()));
        }
        outcome.requests += 1;
        outcome.longest = outcome.longest.max(began.elapsed());
    }
    outcome
}

/// Each request on a connection of its own, which the client ends.
fn open(to: SocketAddr, rate: f64, stop: &AtomicBool) -> Outcome {
    paced(rate, stop, |number| {
        let mut stream = connect(to)?;
        exchange(&mut stream, number)
    })
}

/// All requests on one connection.
fn keep(to: SocketAddr, rate: f64, stop: &AtomicBool) -> Outcome {
    let mut stream = connect(to).unwrap();
    paced(rate, stop, |number| exchange(&mut stream, number))
}

fn connect(to: SocketAddr) -> io::Result<TcpStream> {
    let mut stream = TcpStream::connect_timeout(&to, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_nodelay(true)?;
    // All of it: who closes with bytes unread resets.
    stream.read_exact(&mut [0; MARKER.len() + "server\n".len()])?;
    Ok(stream)
}

fn exchange(stream: &mut TcpStream, request: u64) -> io::Result<()> {
    let (question, mut answer) = ([request as u8; 100], [0; 100]);
    stream.write_all(&question)?;
    stream.read_exact(&mut answer)?;
    if answer == question {
        Ok(())
    } else {
        Err(io::Error::other("somebody else's answer"))
    }
}
