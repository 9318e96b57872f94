//! Probes: how far the peers are, and whether new backends can be reached.
//!
//! ```text
//!  Targets --watch--> [loop] --echo through the tunnel--> node endpoints of the peers
//!                       |  \--TCP connect or ICMPv6 echo--> each probing backend
//!                       '--watch--> Observed: round-trip times, unreachable peers, reached backends
//! ```
//!
//! Everything is sent from the node endpoint's address, so a probe goes the way that traffic goes. The loop
//! also answers the echo of the other nodes. What is decided is in [`rtt`], [`coordinate`] and [`reach`]; here is
//! the I/O.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::{Ipv6Addr, SocketAddr},
    time::{Duration, Instant},
};

use ebpf_common::addr::{Mesh6, NODE_ENDPOINT, Name6};
use netmanager_api::{conditions::Coordinate, stream::InstanceRef};
use tokio::{
    net::UdpSocket,
    sync::watch,
    task::{JoinHandle, JoinSet},
    time::sleep_until,
};
use tokio_util::sync::CancellationToken;

pub mod coordinate;
mod echo;
pub mod mtu;
pub mod reach;
pub mod rtt;

use coordinate::Place;
pub use echo::ECHO_PORT;
use echo::{Echo, Kind};
use reach::{Outcome, ReachBy, Reaches};
use rtt::{Answered, Interest, Rtts};

/// When nothing is due: the loop wakes for a message.
const FAR: Duration = Duration::from_secs(1 << 32);

/// What is probed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Targets {
    /// The peers, by node number.
    pub nodes: BTreeMap<u32, Interest>,
    /// The probing backends.
    pub reach: BTreeMap<InstanceRef, ReachBy>,
}

/// What was found; a new value only when it differs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Observed {
    /// Smoothed round-trip time of each peer that answers, microseconds.
    pub rtt_us: BTreeMap<u32, u32>,
    /// The peers whose last probes failed.
    pub unreachable: BTreeSet<u32>,
    /// The probing backends that were reached.
    pub reached: BTreeSet<InstanceRef>,
    /// Where this node is in the network, once enough peers answered.
    pub coordinate: Option<Coordinate>,
}

/// Why probes cannot begin.
#[derive(Debug, thiserror::Error)]
#[error("failed to bind the echo to {local}")]
pub struct ProbeError {
    /// The address.
    pub local: SocketAddr,
    /// Why.
    #[source]
    pub source: io::Error,
}

/// Running probes.
#[derive(Debug)]
pub struct Probes {
    targets: watch::Sender<Targets>,
    observed: watch::Receiver<Observed>,
    task: JoinHandle<()>,
}

impl Probes {
    /// Begins to answer and to probe from the endpoint of node `node` of `mesh`, which must be on an
    /// interface already; ends with `shutdown` or on drop.
    ///
    /// # Errors
    /// When the echo cannot be bound.
    pub async fn start(
        mesh: Mesh6,
        node: u32,
        shutdown: CancellationToken,
    ) -> Result<Self, ProbeError> {
        let from = endpoint(mesh, node);
        let local = SocketAddr::from((from, ECHO_PORT));
        let socket = UdpSocket::bind(local)
            .await
            .map_err(|source| ProbeError { local, source })?;
        let (targets, wanted) = watch::channel(Targets::default());
        let (found, observed) = watch::channel(Observed::default());
        let prober = Prober {
            mesh,
            from,
            socket,
            began: Instant::now(),
            rtts: Rtts::new(u64::from(node)),
            place: Place::new(u64::from(node)),
            reaches: Reaches::default(),
            tries: JoinSet::new(),
        };
        let task = tokio::spawn(prober.run(wanted, found, shutdown));
        Ok(Self {
            targets,
            observed,
            task,
        })
    }

    /// Probes exactly `targets` from now on.
    pub fn set(&self, targets: Targets) {
        self.targets.send_if_modified(|old| {
            let changed = *old != targets;
            *old = targets;
            changed
        });
    }

    /// What was found; changes can be waited for.
    #[must_use]
    pub fn observed(&self) -> watch::Receiver<Observed> {
        self.observed.clone()
    }
}

impl Drop for Probes {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// The address of a node's own endpoint.
fn endpoint(mesh: Mesh6, node: u32) -> Ipv6Addr {
    Ipv6Addr::from_bits(mesh.encode(Name6::Endpoint {
        node,
        endpoint: NODE_ENDPOINT,
    }))
}

/// The loop's state.
struct Prober {
    mesh: Mesh6,
    from: Ipv6Addr,
    socket: UdpSocket,
    began: Instant,
    rtts: Rtts,
    place: Place,
    reaches: Reaches,
    tries: JoinSet<(InstanceRef, ReachBy, Outcome)>,
}

impl Prober {
    async fn run(
        mut self,
        mut targets: watch::Receiver<Targets>,
        observed: watch::Sender<Observed>,
        shutdown: CancellationToken,
    ) {
        let mut message = [0; echo::LEN + 1];
        loop {
            if self.next().is_some_and(|next| next <= self.now()) {
                self.tick().await;
                self.publish(&observed);
            }
            let wake = self.began + self.next().unwrap_or(FAR);
            tokio::select! {
                () = shutdown.cancelled() => return,
                changed = targets.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    let targets = targets.borrow_and_update().clone();
                    let now = self.now();
                    self.rtts.set(&targets.nodes, now);
                    self.reaches.set(&targets.reach, now);
                    self.publish(&observed);
                }
                received = self.socket.recv_from(&mut message) => match received {
                    Ok((len, from)) => {
                        if self.heard(&message[..len], from).await {
                            self.publish(&observed);
                        }
                    }
                    // An ICMP error to one of our own questions; its miss is counted anyway.
                    Err(error) => tracing::trace!(%error, "the echo socket reports an error"),
                },
                Some(tried) = self.tries.join_next() => match tried {
                    Ok((instance, by, outcome)) => {
                        let now = self.now();
                        self.reaches.tried(&instance, by, outcome, now);
                        self.publish(&observed);
                    }
                    Err(error) => tracing::error!(%error, "a try to reach a backend ended early"),
                },
                () = sleep_until(wake.into()) => {}
            }
        }
    }

    fn next(&self) -> Option<Duration> {
        self.rtts
            .next()
            .into_iter()
            .chain(self.reaches.next())
            .min()
    }

    fn now(&self) -> Duration {
        self.began.elapsed()
    }

    /// Sends what is due.
    async fn tick(&mut self) {
        let now = self.now();
        for ask in self.rtts.tick(now) {
            let to = SocketAddr::from((endpoint(self.mesh, ask.node), ECHO_PORT));
            let question = Echo {
                kind: Kind::Ask,
                sequence: ask.sequence,
                from: self.place.coordinate(),
            };
            if let Err(error) = self.socket.send_to(&question.encode(), to).await {
                tracing::trace!(%to, %error, "failed to send a probe");
            }
        }
        for (instance, by) in self.reaches.tick(now) {
            let from = self.from;
            self.tries
                .spawn(async move { (instance, by, reach::attempt(from, by).await) });
        }
    }

    /// Answers a question, notes an answer; returns whether there is something new to publish.
    async fn heard(&mut self, message: &[u8], from: SocketAddr) -> bool {
        let Some(node) = echo::node_of(self.mesh, from, ECHO_PORT) else {
            return false;
        };
        let Some(echo) = Echo::decode(message) else {
            return false;
        };
        match echo.kind {
            Kind::Ask => {
                let answer = Echo {
                    kind: Kind::Answer,
                    from: self.place.coordinate(),
                    ..echo
                };
                if let Err(error) = self.socket.send_to(&answer.encode(), from).await {
                    tracing::trace!(%from, %error, "failed to answer a probe");
                }
                false
            }
            Kind::Answer => {
                let answered = self.rtts.answered(node, echo.sequence, self.now());
                let rtt_us = self.rtts.smoothed_us(node);
                let Some(rtt_us) = rtt_us.filter(|_| answered != Answered::Late) else {
                    return false;
                };
                let moved = self.place.learn(&echo.from, rtt_us);
                moved || answered == Answered::Changed
            }
        }
    }

    fn publish(&self, observed: &watch::Sender<Observed>) {
        let now = Observed {
            rtt_us: self.rtts.rtt_us(),
            unreachable: self.rtts.unreachable(),
            reached: self.reaches.reached(),
            coordinate: self.place.told(),
        };
        observed.send_if_modified(|old| {
            let changed = *old != now;
            *old = now;
            changed
        });
    }
}
