//! The path probes on the wire: a question that is padded to a size, and its short answer.
//!
//! ```text
//! | 4: "WEFT" | 1: version | 1: 1 question, 2 answer | 2: zero | 8: sequence | zeroes up to the size asked for |
//! ```
//!
//! Over UDP between node endpoints, on a port of its own, so that the programs let a question pass that is larger
//! than what the path is known to carry. The answer has 16 bytes: only the way of the question is measured, and
//! nothing is amplified. The socket ignores what the kernel believes of the path (`IPV6_PMTUDISC_PROBE`).

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::SocketAddr,
    time::{Duration, Instant},
};

use ebpf_common::{addr::Mesh6, layout::PATH_PORT};
use rustix::net::sockopt::{Ipv6PathMtuDiscovery, set_ipv6_mtu_discover};
use tokio::{net::UdpSocket, sync::watch, task::JoinHandle, time::sleep_until};
use tokio_util::sync::CancellationToken;

use super::Paths;
use crate::probe::{echo::node_of, endpoint};

/// IPv6 and UDP headers around a message.
const HEADERS: u32 = 48;
/// Length of an answer, and the least of a question.
const LEN: usize = 16;
const MAGIC: [u8; 4] = *b"WEFT";
const VERSION: u8 = 1;
const ASK: u8 = 1;
const ANSWER: u8 = 2;
/// When nothing is due: the loop wakes for a message.
const FAR: Duration = Duration::from_secs(1 << 32);
/// The largest packet.
const MOST: usize = 65_536;

/// Whose paths are measured, up to how many bytes.
type Targets = (BTreeSet<u32>, u32);

/// Running path probes.
#[derive(Debug)]
pub struct PathProbes {
    targets: watch::Sender<Targets>,
    task: JoinHandle<()>,
}

impl PathProbes {
    /// Begins to answer and to ask from the endpoint of node `node` of `mesh`, which must be on an interface already;
    /// ends with `shutdown` or on drop. `narrow` has what is known of paths that carry less than the device, by node
    /// number, and is told what is found.
    ///
    /// # Errors
    /// When the socket cannot be bound.
    pub async fn start(
        mesh: Mesh6,
        node: u32,
        narrow: watch::Sender<BTreeMap<u32, u32>>,
        shutdown: CancellationToken,
    ) -> io::Result<Self> {
        let socket = UdpSocket::bind((endpoint(mesh, node), PATH_PORT)).await?;
        set_ipv6_mtu_discover(&socket, Ipv6PathMtuDiscovery::PROBE)?;
        let (targets, wanted) = watch::channel((BTreeSet::new(), 0));
        let prober = Prober {
            mesh,
            socket,
            began: Instant::now(),
            paths: Paths::new(narrow.borrow().clone()),
            message: vec![0; MOST],
        };
        let task = tokio::spawn(prober.run(wanted, narrow, shutdown));
        Ok(Self { targets, task })
    }

    /// Measures the paths to exactly `nodes` from now on, up to `most` bytes.
    pub fn set(&self, nodes: BTreeSet<u32>, most: u32) {
        self.targets.send_if_modified(|old| {
            let new = (nodes, most);
            let changed = *old != new;
            *old = new;
            changed
        });
    }
}

impl Drop for PathProbes {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// The first bytes of a message.
fn encode(kind: u8, sequence: u64) -> [u8; LEN] {
    let mut bytes = [0; LEN];
    bytes[..4].copy_from_slice(&MAGIC);
    bytes[4] = VERSION;
    bytes[5] = kind;
    bytes[8..].copy_from_slice(&sequence.to_be_bytes());
    bytes
}

/// Kind and sequence of a message.
fn decode(bytes: &[u8]) -> Option<(u8, u64)> {
    let head: &[u8; LEN] = bytes.first_chunk()?;
    let sequence = u64::from_be_bytes(head[8..].try_into().ok()?);
    match head[..8] {
        [b'W', b'E', b'F', b'T', VERSION, ASK, 0, 0] => Some((ASK, sequence)),
        [b'W', b'E', b'F', b'T', VERSION, ANSWER, 0, 0] if bytes.len() == LEN => {
            Some((ANSWER, sequence))
        }
        _ => None,
    }
}

/// The loop's state.
struct Prober {
    mesh: Mesh6,
    socket: UdpSocket,
    began: Instant,
    paths: Paths,
    message: Vec<u8>,
}

impl Prober {
    async fn run(
        mut self,
        mut targets: watch::Receiver<Targets>,
        narrow: watch::Sender<BTreeMap<u32, u32>>,
        shutdown: CancellationToken,
    ) {
        loop {
            if self.paths.next().is_some_and(|next| next <= self.now()) {
                self.tick().await;
            }
            if targets.borrow().1 != 0 {
                self.publish(&narrow);
            }
            let wake = self.began + self.paths.next().unwrap_or(FAR);
            tokio::select! {
                () = shutdown.cancelled() => return,
                changed = targets.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    let (nodes, most) = targets.borrow_and_update().clone();
                    let now = self.now();
                    self.paths.set(nodes, most, now);
                }
                received = self.socket.recv_from(&mut self.message) => match received {
                    Ok((len, from)) => self.heard(len, from).await,
                    // An ICMP error to one of our own questions; its loss is counted anyway.
                    Err(error) => tracing::trace!(%error, "the path socket reports an error"),
                },
                () = sleep_until(wake.into()) => {}
            }
        }
    }

    fn publish(&self, narrow: &watch::Sender<BTreeMap<u32, u32>>) {
        let found = self.paths.narrow();
        narrow.send_if_modified(|old| {
            let changed = *old != found;
            *old = found;
            changed
        });
    }

    fn now(&self) -> Duration {
        self.began.elapsed()
    }

    /// Sends what is due.
    async fn tick(&mut self) {
        let now = self.now();
        for probe in self.paths.tick(now) {
            let to = SocketAddr::from((endpoint(self.mesh, probe.node), PATH_PORT));
            let mut question = encode(ASK, probe.sequence).to_vec();
            question.resize(probe.size.saturating_sub(HEADERS) as usize, 0);
            if let Err(error) = self.socket.send_to(&question, to).await {
                tracing::trace!(%to, %error, "failed to send a path probe");
            }
        }
    }

    /// Answers a question, notes an answer.
    async fn heard(&mut self, len: usize, from: SocketAddr) {
        let Some(node) = node_of(self.mesh, from, PATH_PORT) else {
            return;
        };
        match decode(&self.message[..len]) {
            Some((ASK, sequence)) => {
                let answer = encode(ANSWER, sequence);
                if let Err(error) = self.socket.send_to(&answer, from).await {
                    tracing::trace!(%from, %error, "failed to answer a path probe");
                }
            }
            Some((_, sequence)) => {
                let now = self.now();
                if self.paths.answered(node, sequence, now) {
                    let mtu = self.paths.mtu(node);
                    tracing::info!(node, mtu, "the path to a peer carries another size");
                }
            }
            None => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_question_of_any_size_is_read_and_an_answer_of_one_only() {
        for len in [LEN, LEN + 1, 1_372, 8_872] {
            let mut question = encode(ASK, 7).to_vec();
            question.resize(len, 0);
            assert_eq!(decode(&question), Some((ASK, 7)), "{len}");
            question[5] = ANSWER;
            let answer = (len == LEN).then_some((ANSWER, 7));
            assert_eq!(decode(&question), answer, "{len}");
        }
        let good = encode(ASK, u64::MAX);
        for at in 0..8 {
            let mut bad = good;
            bad[at] ^= 0x80;
            assert_eq!(decode(&bad), None, "byte {at}");
        }
        assert_eq!(decode(&good[..LEN - 1]), None);
        assert_eq!(decode(&[]), None);
    }

    #[test]
    fn only_the_prober_of_a_node_endpoint_is_heard() {
        let mesh = Mesh6::new(0xfd12_3456_789a << 80).unwrap();
        for (from, node) in [
            ("[fd12:3456:789a:0:0:9:0:1]:9339", Some(9)),
            ("[fd12:3456:789a:0:0:9:0:1]:9338", None),
            ("[fd12:3456:789a:0:0:9:0:2]:9339", None),
            ("[fd12:3456:789a:1000:0:9::]:9339", None),
            ("10.16.0.1:9339", None),
        ] {
            assert_eq!(
                node_of(mesh, from.parse().unwrap(), PATH_PORT),
                node,
                "{from}"
            );
        }
    }
}
