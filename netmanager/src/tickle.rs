//! Ends the flows of a backend that died, also those whose client is silent.
//!
//! The programs end a connection when its client next says something: then they answer with a reset. A client that
//! only waits is made to say something:
//!
//! ```text
//!  here --one octet at a wrong sequence number, as if from the VIP--> pod
//!  pod  --challenge acknowledgement (RFC 9293, 3.10.7.4)--> weft_pod: the backend is gone --reset--> pod: ECONNRESET
//! ```
//!
//! A client of datagrams owes no answer to anything, so it is told what its next datagram would be told: port unreachable
//! ([`notice()`]), and its flow is forgotten. Only a connected socket hears of it (udp(7)). A flow that may follow is left
//! to its next datagram.
//!
//! The frame is sent out of the host's side of the pod's link, so nothing but that pod ever sees it, and no namespace
//! is entered. Rounds go on until no connection is left to end or [`ROUNDS`] are over; a burst is at most [`BURST`]
//! frames, then there is a pause.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    os::fd::{AsRawFd, OwnedFd},
    sync::Arc,
    time::Duration,
};

use ebpf_common::layout::{
    Addr, Backend, Endpoint, FLOW_ESTABLISHED, FLOW_FORWARD, FLOW_HAIRPIN, Flow, FlowKey,
    PROTO_TCP, PROTO_UDP,
};
use nix::{
    ifaddrs::getifaddrs,
    sys::socket::{AddressFamily, LinkAddr, MsgFlags, SockFlag, SockType, sendto, socket},
};
use tokio::{sync::watch, time::sleep};

use crate::{
    datapath::{DatapathError, FlowTable},
    follow::chain,
    janitor::{FlowSource, has_live_backend, is_over},
};

mod frame;
mod notice;
mod segment;

pub use notice::notice;
pub use segment::segment;

/// Walks over the flows after a death. A frame may be lost, or the pod's answer be held back by its own limit.
const ROUNDS: u32 = 5;
/// The pause between two rounds: longer than a pod needs to answer.
const BETWEEN_ROUNDS: Duration = Duration::from_millis(300);
/// Frames between two pauses: 64 in 10 ms are 6,400 in a second, a small share of a CPU.
const BURST: usize = 64;
const BETWEEN_BURSTS: Duration = Duration::from_millis(10);

/// What connections are judged by.
#[derive(Clone, Debug, Default)]
pub struct Deaths {
    /// How often something died; a raise starts the rounds.
    pub count: u64,
    /// The kernel's array of backends.
    pub backends: BTreeMap<u32, Backend>,
    /// The endpoints, by number.
    pub endpoints: BTreeMap<u32, Endpoint>,
    /// The UDP ports of VIPs (network byte order) whose flows follow.
    pub following: BTreeSet<(Addr, u16)>,
}

/// Why a frame could not be sent.
#[derive(Debug, thiserror::Error)]
enum TickleError {
    #[error(transparent)]
    Flows(#[from] DatapathError),
    #[error("failed to open a packet socket")]
    Open(#[source] io::Error),
    #[error("failed to list the links")]
    Links(#[source] io::Error),
    #[error("failed to send out of link {ifindex}")]
    Send {
        ifindex: u32,
        #[source]
        source: io::Error,
    },
}

/// Follows `deaths` until its sender is gone; `ended` is told up to which count its flows were seen to.
pub async fn follow(
    [mut connections, mut datagrams]: [FlowTable; 2],
    mut deaths: watch::Receiver<Arc<Deaths>>,
    ended: watch::Sender<u64>,
) {
    while deaths.changed().await.is_ok() {
        let now = deaths.borrow_and_update().clone();
        match tell_all(&mut datagrams, &now).await {
            Ok(0) => {}
            Ok(sent) => tracing::info!(sent, "told clients that their backends are dead"),
            Err(error) => tracing::warn!(error = chain(&error), "failed to tell clients"),
        }
        for _ in 0..ROUNDS {
            let now = deaths.borrow_and_update().clone();
            match round(&mut connections, &now).await {
                Ok(0) => break,
                Ok(sent) => tracing::info!(sent, "asked clients of dead backends to speak"),
                Err(error) => tracing::warn!(error = chain(&error), "failed to end connections"),
            }
            sleep(BETWEEN_ROUNDS).await;
        }
        ended.send_replace(deaths.borrow().count);
    }
}

/// One walk over the connections; how many there were to end.
async fn round(flows: &mut FlowTable, deaths: &Deaths) -> Result<usize, TickleError> {
    let mut door = Door::open()?;
    flows.rewind();
    loop {
        let page = flows.next_page()?;
        for (key, flow) in &page.flows {
            if let Some(endpoint) = to_tickle(key, flow, deaths) {
                door.send(endpoint, &segment(key, flow, endpoint)).await?;
            }
        }
        if page.is_last {
            return Ok(door.sent);
        }
        tokio::task::yield_now().await;
    }
}

/// The walk over the datagrams' flows; how many clients were told.
async fn tell_all(flows: &mut FlowTable, deaths: &Deaths) -> Result<usize, TickleError> {
    let mut door = Door::open()?;
    flows.rewind();
    loop {
        let page = flows.next_page()?;
        for (key, _) in &page.flows {
            // It may have a new backend since the page was read.
            let Some(flow) = flows.get(key)? else {
                continue;
            };
            if let Some(endpoint) = to_tell(key, &flow, deaths)
                && flows.remove(page.map, key, &flow)?
            {
                door.send(endpoint, &notice(key, endpoint)).await?;
            }
        }
        if page.is_last {
            return Ok(door.sent);
        }
        tokio::task::yield_now().await;
    }
}

/// The way out of the host's sides of the pods' links.
struct Door {
    socket: OwnedFd,
    links: BTreeMap<u32, LinkAddr>,
    sent: usize,
}

impl Door {
    fn open() -> Result<Self, TickleError> {
        let socket = socket(
            AddressFamily::Packet,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
            None,
        )
        .map_err(|error| TickleError::Open(error.into()))?;
        Ok(Self {
            socket,
            links: links()?,
            sent: 0,
        })
    }

    /// Sends a frame to an endpoint, and pauses after a burst.
    async fn send(&mut self, endpoint: &Endpoint, frame: &[u8]) -> Result<(), TickleError> {
        let Some(link) = self.links.get(&endpoint.ifindex) else {
            return Ok(()); // The pod is gone, and with it who would wait.
        };
        send(&self.socket, link, endpoint.ifindex, frame)?;
        self.sent += 1;
        if self.sent.is_multiple_of(BURST) {
            sleep(BETWEEN_BURSTS).await;
        }
        Ok(())
    }
}

/// The endpoint that waits for a dead backend, if this is its half of a flow of datagrams.
fn to_tell<'a>(key: &FlowKey, flow: &Flow, deaths: &'a Deaths) -> Option<&'a Endpoint> {
    let is_flow = key.proto == PROTO_UDP
        && key.direction == FLOW_FORWARD
        && flow.flags & FLOW_HAIRPIN == 0
        && !deaths.following.contains(&(key.dst, key.dport_be));
    if !is_flow || has_live_backend(flow, &deaths.backends) {
        return None;
    }
    deaths.endpoints.get(&key.endpoint)
}

/// The same of an established connection.
fn to_tickle<'a>(key: &FlowKey, flow: &Flow, deaths: &'a Deaths) -> Option<&'a Endpoint> {
    let is_connection = key.proto == PROTO_TCP
        && key.direction == FLOW_FORWARD
        && flow.flags & FLOW_ESTABLISHED != 0
        // Its own end is the backend's end.
        && flow.flags & FLOW_HAIRPIN == 0
        && !is_over(flow);
    if !is_connection || has_live_backend(flow, &deaths.backends) {
        return None;
    }
    deaths.endpoints.get(&key.endpoint)
}

/// Every link with its address for packet sockets.
fn links() -> Result<BTreeMap<u32, LinkAddr>, TickleError> {
    let all = getifaddrs().map_err(|error| TickleError::Links(error.into()))?;
    Ok(all
        .filter_map(|link| link.address?.as_link_addr().copied())
        .map(|link| (link.ifindex() as u32, link))
        .collect())
}

fn send(socket: &OwnedFd, link: &LinkAddr, ifindex: u32, frame: &[u8]) -> Result<(), TickleError> {
    match sendto(socket.as_raw_fd(), frame, link, MsgFlags::empty()) {
        // A link that is down has nobody who waits; a full queue is emptied before the next round.
        Ok(_)
        | Err(
            nix::Error::ENETDOWN | nix::Error::ENXIO | nix::Error::ENOBUFS | nix::Error::EAGAIN,
        ) => Ok(()),
        Err(error) => Err(TickleError::Send {
            ifindex,
            source: error.into(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use ebpf_common::layout::{
        BACKEND_LIVE, FLOW_FIN_BACKEND, FLOW_FIN_CLIENT, FLOW_REVERSE, PROTO_ICMP,
    };

    use super::*;

    #[test]
    fn only_established_connections_of_dead_backends_are_told() {
        let key = FlowKey {
            proto: PROTO_TCP,
            endpoint: 7,
            ..FlowKey::default()
        };
        let flow = Flow {
            backend: 1,
            generation: 4,
            flags: FLOW_ESTABLISHED,
            ..Flow::default()
        };
        let deaths = |flags, generation| Deaths {
            following: BTreeSet::new(),
            count: 1,
            backends: BTreeMap::from([(
                1,
                Backend {
                    flags,
                    generation,
                    ..Backend::default()
                },
            )]),
            endpoints: BTreeMap::from([(7, Endpoint::default())]),
        };
        let udp = FlowKey { proto: 17, ..key };
        let answers = FlowKey {
            direction: FLOW_REVERSE,
            ..key
        };
        let stranger = FlowKey { endpoint: 8, ..key };
        let with = |flags| Flow { flags, ..flow };
        let over = with(FLOW_ESTABLISHED | FLOW_FIN_CLIENT | FLOW_FIN_BACKEND);
        for (name, key, flow, deaths, want) in [
            ("dead", key, flow, deaths(0, 4), true),
            ("another's index", key, flow, deaths(BACKEND_LIVE, 5), true),
            ("live", key, flow, deaths(BACKEND_LIVE, 4), false),
            (
                "opening: its SYN finds another",
                key,
                with(0),
                deaths(0, 4),
                false,
            ),
            ("over", key, over, deaths(0, 4), false),
            (
                "itself",
                key,
                with(FLOW_ESTABLISHED | FLOW_HAIRPIN),
                deaths(0, 4),
                false,
            ),
            ("a datagram's", udp, flow, deaths(0, 4), false),
            ("the other half", answers, flow, deaths(0, 4), false),
            ("nobody's", stranger, flow, deaths(0, 4), false),
        ] {
            assert_eq!(to_tickle(&key, &flow, &deaths).is_some(), want, "{name}");
        }
    }

    #[test]
    fn only_datagrams_to_dead_backends_that_do_not_follow_are_told() {
        let key = FlowKey {
            proto: PROTO_UDP,
            endpoint: 7,
            dport_be: 53_u16.to_be(),
            ..FlowKey::default()
        };
        let flow = Flow {
            backend: 1,
            generation: 4,
            ..Flow::default()
        };
        let backend = |flags, generation| Backend {
            flags,
            generation,
            ..Backend::default()
        };
        let deaths = Deaths {
            count: 1,
            backends: BTreeMap::from([(1, backend(0, 4)), (2, backend(BACKEND_LIVE, 4))]),
            endpoints: BTreeMap::from([(7, Endpoint::default())]),
            following: BTreeSet::from([(Addr::default(), 54_u16.to_be())]),
        };
        let with = |backend| Flow { backend, ..flow };
        let hairpin = Flow {
            flags: FLOW_HAIRPIN,
            ..flow
        };
        for (name, key, flow, want) in [
            ("dead", key, flow, true),
            ("forgotten", key, with(3), true),
            ("live", key, with(2), false),
            ("itself", key, hairpin, false),
            (
                "it follows",
                FlowKey {
                    dport_be: 54_u16.to_be(),
                    ..key
                },
                flow,
                false,
            ),
            (
                "an echo",
                FlowKey {
                    proto: PROTO_ICMP,
                    ..key
                },
                flow,
                false,
            ),
            (
                "the other half",
                FlowKey {
                    direction: FLOW_REVERSE,
                    ..key
                },
                flow,
                false,
            ),
            ("nobody's", FlowKey { endpoint: 8, ..key }, flow, false),
        ] {
            assert_eq!(to_tell(&key, &flow, &deaths).is_some(), want, "{name}");
        }
    }
}
