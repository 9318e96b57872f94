//! Can a new backend be reached through the network: tried until it once can be.
//!
//! The state is pure; [`attempt`] does one try. A backend that was reached stays so for as long as it is
//! wanted: readiness is its agent's to judge, this only proves the path.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::{Ipv6Addr, SocketAddr, SocketAddrV6},
    os::fd::AsRawFd,
    time::{Duration, Instant},
};

use netmanager_api::stream::InstanceRef;
use nix::sys::{
    socket::{
        AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn6, bind, connect,
        recv, send, setsockopt, socket, sockopt,
    },
    time::{TimeVal, TimeValLike},
};
use tokio::net::TcpSocket;

/// Rest between two tries: a migration waits for this.
const REST: Duration = Duration::from_millis(200);
/// Tries at once; the others wait.
const AT_ONCE: usize = 32;
/// A try that has no answer by then failed.
const PATIENCE: Duration = Duration::from_secs(1);

/// How a backend is tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ReachBy {
    /// It takes a TCP connection.
    Tcp(SocketAddrV6),
    /// It answers an ICMPv6 echo: a service with UDP ports only.
    Echo(Ipv6Addr),
}

/// The tries of all probing backends.
#[derive(Clone, Debug, Default)]
pub struct Reaches {
    targets: BTreeMap<InstanceRef, Target>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Target {
    by: ReachBy,
    state: State,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Due(Duration),
    Trying,
    Reached,
}

impl Reaches {
    /// Tries exactly `targets` from now on; one that is unchanged keeps its result.
    pub fn set(&mut self, targets: &BTreeMap<InstanceRef, ReachBy>, now: Duration) {
        self.targets
            .retain(|instance, target| targets.get(instance) == Some(&target.by));
        for (instance, by) in targets {
            self.targets.entry(instance.clone()).or_insert(Target {
                by: *by,
                state: State::Due(now),
            });
        }
    }

    /// When [`Reaches::tick`] has something to do next.
    #[must_use]
    pub fn next(&self) -> Option<Duration> {
        if self.trying() >= AT_ONCE {
            return None;
        }
        self.targets
            .values()
            .filter_map(|target| match target.state {
                State::Due(due) => Some(due),
                State::Trying | State::Reached => None,
            })
            .min()
    }

    /// The tries that are due.
    pub fn tick(&mut self, now: Duration) -> Vec<(InstanceRef, ReachBy)> {
        let free = AT_ONCE - self.trying().min(AT_ONCE);
        self.targets
            .iter_mut()
            .filter(|(_, target)| matches!(target.state, State::Due(due) if due <= now))
            .take(free)
            .map(|(instance, target)| {
                target.state = State::Trying;
                (instance.clone(), target.by)
            })
            .collect()
    }

    fn trying(&self) -> usize {
        self.targets
            .values()
            .filter(|target| target.state == State::Trying)
            .count()
    }

    /// Notes how the try of `instance` by `by` ended; that of a target that changed meanwhile counts for nothing.
    pub fn tried(&mut self, instance: &InstanceRef, by: ReachBy, reached: Outcome, now: Duration) {
        if let Some(target) = self.targets.get_mut(instance)
            && target.by == by
            && target.state == State::Trying
        {
            target.state = match reached {
                Outcome::Reached => State::Reached,
                Outcome::Failed => State::Due(now + REST),
            };
        }
    }

    /// Those that were reached.
    #[must_use]
    pub fn reached(&self) -> BTreeSet<InstanceRef> {
        self.targets
            .iter()
            .filter(|(_, target)| target.state == State::Reached)
            .map(|(instance, _)| instance.clone())
            .collect()
    }
}

/// How a try ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The backend answered.
    Reached,
    /// It refused, or nothing came back.
    Failed,
}

/// Tries once, from the address `from`.
pub(super) async fn attempt(from: Ipv6Addr, by: ReachBy) -> Outcome {
    let tried = tokio::time::timeout(PATIENCE, async {
        match by {
            ReachBy::Tcp(to) => connect_tcp(from, to).await,
            ReachBy::Echo(to) => echo(from, to).await,
        }
    });
    match tried.await {
        Ok(Ok(())) => Outcome::Reached,
        Ok(Err(error)) => {
            tracing::debug!(?by, %error, "a probing backend was not reached");
            Outcome::Failed
        }
        Err(_) => Outcome::Failed,
    }
}

async fn connect_tcp(from: Ipv6Addr, to: SocketAddrV6) -> io::Result<()> {
    let socket = TcpSocket::new_v6()?;
    socket.bind(SocketAddr::from((from, 0)))?;
    // A probe leaves nothing behind: no lingering state at either end.
    socket.set_zero_linger()?;
    socket.connect(to.into()).await.map(drop)
}

/// ICMPv6 types (RFC 4443 sections 4.1 and 4.2).
const ECHO_REQUEST: u8 = 128;
const ECHO_REPLY: u8 = 129;

async fn echo(from: Ipv6Addr, to: Ipv6Addr) -> io::Result<()> {
    tokio::task::spawn_blocking(move || echo_blocking(from, to)).await?
}

/// Asks once and waits [`PATIENCE`] for the answer.
fn echo_blocking(from: Ipv6Addr, to: Ipv6Addr) -> io::Result<()> {
    let fd = socket(
        AddressFamily::Inet6,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::IcmpV6,
    )?;
    let raw = fd.as_raw_fd();
    bind(raw, &SockaddrIn6::from(SocketAddrV6::new(from, 0, 0, 0)))?;
    // Connected, the socket takes packets of this backend only; the kernel fills the checksum in.
    connect(raw, &SockaddrIn6::from(SocketAddrV6::new(to, 0, 0, 0)))?;
    let request = [ECHO_REQUEST, 0, 0, 0, b'w', b'f', 0, 1];
    send(raw, &request, MsgFlags::empty())?;
    let deadline = Instant::now() + PATIENCE;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let left = TimeVal::microseconds(left.as_micros().max(1).try_into().unwrap_or(i64::MAX));
        setsockopt(&fd, sockopt::ReceiveTimeout, &left)?;
        let mut reply = [0; 64];
        let len = recv(raw, &mut reply, MsgFlags::empty())?;
        if len >= request.len() && reply[0] == ECHO_REPLY && reply[4..8] == request[4..] {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn instance(number: u32) -> InstanceRef {
        InstanceRef {
            service: "shop/web/front".to_owned(),
            instance: number,
            epoch: 1,
        }
    }

    fn tcp(port: u16) -> ReachBy {
        ReachBy::Tcp(SocketAddrV6::new(Ipv6Addr::LOCALHOST, port, 0, 0))
    }

    #[test]
    fn a_backend_is_tried_until_it_is_reached_and_then_no_more() {
        let mut reaches = Reaches::default();
        let targets = BTreeMap::from([(instance(0), tcp(80))]);
        reaches.set(&targets, Duration::ZERO);
        let mut now = Duration::ZERO;
        for _ in 0..3 {
            assert_eq!(reaches.tick(now), [(instance(0), tcp(80))]);
            assert_eq!(reaches.tick(now), []);
            reaches.tried(&instance(0), tcp(80), Outcome::Failed, now);
            assert_eq!(reaches.reached(), BTreeSet::new());
            assert_eq!(reaches.next(), Some(now + REST));
            now += REST;
        }
        reaches.tick(now);
        reaches.tried(&instance(0), tcp(80), Outcome::Reached, now);
        reaches.set(&targets, now);
        assert_eq!(reaches.reached(), BTreeSet::from([instance(0)]));
        assert_eq!(reaches.next(), None);
        assert_eq!(reaches.tick(now + REST), []);
    }

    #[test]
    fn a_backend_that_moves_is_tried_anew_and_the_old_try_counts_for_nothing() {
        let mut reaches = Reaches::default();
        reaches.set(&BTreeMap::from([(instance(0), tcp(80))]), Duration::ZERO);
        reaches.tick(Duration::ZERO);
        reaches.set(&BTreeMap::from([(instance(0), tcp(81))]), Duration::ZERO);
        reaches.tried(&instance(0), tcp(80), Outcome::Reached, Duration::ZERO);
        assert_eq!(reaches.reached(), BTreeSet::new());
        assert_eq!(reaches.tick(Duration::ZERO), [(instance(0), tcp(81))]);
        reaches.set(&BTreeMap::new(), Duration::ZERO);
        assert_eq!(reaches.next(), None);
    }

    #[test]
    fn a_crowd_is_tried_a_few_at_a_time() {
        let mut reaches = Reaches::default();
        let targets = (0..100).map(|number| (instance(number), tcp(80))).collect();
        reaches.set(&targets, Duration::ZERO);
        let first = reaches.tick(Duration::ZERO);
        assert_eq!(first.len(), AT_ONCE);
        assert_eq!(reaches.next(), None);
        for (instance, by) in &first[..10] {
            reaches.tried(instance, *by, Outcome::Failed, Duration::ZERO);
        }
        assert_eq!(reaches.next(), Some(Duration::ZERO));
        assert_eq!(reaches.tick(Duration::ZERO).len(), 10);
    }

    #[tokio::test]
    async fn a_listener_is_reached_and_a_closed_port_is_not() {
        let listener = tokio::net::TcpListener::bind((Ipv6Addr::LOCALHOST, 0))
            .await
            .unwrap();
        let port = listener.local_addr().unwrap().port();
        assert_eq!(
            attempt(Ipv6Addr::LOCALHOST, tcp(port)).await,
            Outcome::Reached
        );
        drop(listener);
        assert_eq!(
            attempt(Ipv6Addr::LOCALHOST, tcp(port)).await,
            Outcome::Failed
        );
    }
}
