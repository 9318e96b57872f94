//! The network of the simulation: requests and answers on their way, connections, and what happens to them there.
//!
//! A message takes at least [`HOP`], so that hosts can be run one after the other for that long without missing
//! anything. A lost message is silence; messages may overtake each other, and openraft's own may arrive twice (the
//! others travel over TCP, which does not repeat them). What belongs to a connection is sent again where it is lost.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use bytes::Bytes;
use http::{Request, StatusCode};
use tokio::sync::oneshot;
use weft_lead::{Boxed, Wire, dial::DialError};

use crate::{
    disk::Disk,
    line::{LineId, Piece},
    random::Random,
    time::HostClock,
    trace::Trace,
};

/// The shortest way between two hosts, milliseconds.
pub(crate) const HOP: u64 = 8;
/// How long the sender of a connection's piece waits before it sends it again, milliseconds.
const AGAIN: u64 = 250;

/// A host's number: the leads from 0, then the clients', then the agents'.
pub(crate) type HostId = usize;

pub(crate) type Answer = Result<(StatusCode, Bytes), DialError>;

/// Who waits for an answer; of two answers the first counts.
pub(crate) type Waiting = Arc<Mutex<Option<oneshot::Sender<Answer>>>>;

/// What is on its way.
pub(crate) enum Parcel {
    Request {
        from: HostId,
        request: Box<Request<Bytes>>,
        waiting: Waiting,
    },
    Answer {
        answer: Answer,
        waiting: Waiting,
    },
    Line {
        from: HostId,
        line: LineId,
        piece: Piece,
    },
}

/// What the network does to messages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Weather {
    /// The longest that a message takes beyond a hop, milliseconds.
    pub(crate) delay: u64,
    /// How many of a thousand are lost.
    pub(crate) loss: u64,
    /// How many of a thousand of openraft's arrive twice.
    pub(crate) twice: u64,
}

struct Inner {
    /// When the present turn began.
    turn: u64,
    random: Random,
    weather: Weather,
    /// Ways that are cut, from and to.
    cut: BTreeSet<(HostId, HostId)>,
    under_way: BTreeMap<(u64, u64), (HostId, Parcel)>,
    sent: u64,
    lines: LineId,
    trace: Trace,
}

/// See the module.
#[derive(Clone)]
pub(crate) struct Network(Arc<Mutex<Inner>>);

impl Network {
    pub(crate) fn new(random: Random, trace: Trace) -> Self {
        let inner = Inner {
            turn: 0,
            random,
            weather: Weather::default(),
            cut: BTreeSet::new(),
            under_way: BTreeMap::new(),
            sent: 0,
            lines: 0,
            trace,
        };
        Self(Arc::new(Mutex::new(inner)))
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All hosts have been run up to `now`.
    pub(crate) fn set_turn(&self, now: u64) {
        self.inner().turn = now;
    }

    pub(crate) fn set_weather(&self, weather: Weather) {
        self.inner().weather = weather;
    }

    /// Cuts these ways.
    pub(crate) fn cut(&self, ways: BTreeSet<(HostId, HostId)>) {
        self.inner().cut.extend(ways);
    }

    /// Mends these ways; all where none are named.
    pub(crate) fn mend(&self, ways: Option<&BTreeSet<(HostId, HostId)>>) {
        let cut = &mut self.inner().cut;
        cut.retain(|way| ways.is_some_and(|ways| !ways.contains(way)));
    }

    /// Whether nothing is cut off from anybody among these hosts, and nothing is lost or late.
    pub(crate) fn is_calm_among(&self, mut hosts: impl FnMut(HostId) -> bool) -> bool {
        let inner = self.inner();
        let mut cut = inner.cut.iter();
        let whole = !cut.any(|(from, to)| hosts(*from) && hosts(*to));
        whole && inner.weather.loss == 0 && inner.weather.delay <= 30
    }

    /// Whether the way from one to the other is cut.
    pub(crate) fn is_cut(&self, from: HostId, to: HostId) -> bool {
        self.inner().cut.contains(&(from, to))
    }

    /// Sends a request at `now`.
    pub(crate) fn ask(
        &self,
        now: u64,
        (from, to): (HostId, HostId),
        request: Request<Bytes>,
    ) -> oneshot::Receiver<Answer> {
        let (waiting, answer) = oneshot::channel();
        let waiting = Arc::new(Mutex::new(Some(waiting)));
        let path = request.uri().path().to_owned();
        let repeatable = path.starts_with("/raft/") && path != "/raft/v1/ask";
        let again = repeatable.then(|| request.clone());
        let mut inner = self.inner();
        let parcel = |request| Parcel::Request {
            from,
            request: Box::new(request),
            waiting: waiting.clone(),
        };
        let body = request.body().clone();
        inner.send(now, (from, to), (&path, &body), parcel(request));
        let twice = inner.weather.twice;
        if let Some(request) = again
            && inner.random.chance(twice)
        {
            inner.send(now, (from, to), (&path, &body), parcel(request));
        }
        answer
    }

    /// Sends an answer at `now`.
    pub(crate) fn answer(
        &self,
        now: u64,
        (from, to): (HostId, HostId),
        answer: Answer,
        waiting: Waiting,
    ) {
        let (label, body) = match &answer {
            Ok((status, body)) => (status.to_string(), body.clone()),
            Err(error) => (error.to_string(), Bytes::new()),
        };
        let parcel = Parcel::Answer { answer, waiting };
        self.inner().send(now, (from, to), (&label, &body), parcel);
    }

    /// A number for a connection.
    pub(crate) fn next_line(&self) -> LineId {
        let mut inner = self.inner();
        inner.lines += 1;
        inner.lines
    }

    /// Sends a piece of a connection at `now`.
    pub(crate) fn send_piece(
        &self,
        now: u64,
        (from, to): (HostId, HostId),
        line: LineId,
        piece: Piece,
    ) {
        let mut inner = self.inner();
        // How many bytes it is says nothing: there is a time of day among them that is the system's.
        let label = match &piece {
            Piece::Bytes(number, _) => format!("#{line} {number}"),
            piece => format!("#{line} {piece:?}"),
        };
        let weather = inner.weather;
        let mut delay = HOP + inner.random.within(0, weather.delay + 1);
        while inner.random.chance(weather.loss) {
            delay += AGAIN;
        }
        inner
            .trace
            .note(now, format_args!("{from}>{to} {label} +{delay}"));
        inner.sent += 1;
        let key = (now + delay, inner.sent);
        let parcel = Parcel::Line { from, line, piece };
        inner.under_way.insert(key, (to, parcel));
    }

    /// A host ended while it served a request: who waits hears so, or nothing.
    pub(crate) fn reset(&self, (from, to): (HostId, HostId), waiting: Waiting) {
        let mut inner = self.inner();
        let (now, heard) = (inner.turn, inner.random.chance(700));
        drop(inner);
        if heard {
            let answer = Err("connection reset".into());
            self.answer(now, (from, to), answer, waiting);
        }
    }

    /// What arrives at `to` before `until`, with its times.
    pub(crate) fn arrivals(&self, to: HostId, until: u64) -> Vec<(u64, Parcel)> {
        let mut inner = self.inner();
        let due: Vec<_> = inner
            .under_way
            .range(..(until, 0))
            .filter(|(_, (host, _))| *host == to)
            .map(|(key, _)| *key)
            .collect();
        let mut arrivals = Vec::new();
        for key in due {
            let Some((_, parcel)) = inner.under_way.remove(&key) else {
                continue;
            };
            match parcel {
                // It did not get through, and comes again.
                Parcel::Line { from, .. } if inner.cut.contains(&(from, to)) => {
                    let key = (key.0 + AGAIN, key.1);
                    inner.under_way.insert(key, (to, parcel));
                }
                parcel => arrivals.push((key.0, parcel)),
            }
        }
        arrivals
    }
}

impl Inner {
    fn send(
        &mut self,
        now: u64,
        (from, to): (HostId, HostId),
        (label, body): (&str, &Bytes),
        parcel: Parcel,
    ) {
        let weather = self.weather;
        let lost = self.cut.contains(&(from, to)) || self.random.chance(weather.loss);
        let delay = HOP + self.random.within(0, weather.delay + 1);
        let fate = if lost { "lost" } else { "arrives" };
        let sum = Trace::sum(body);
        self.trace.note(
            now,
            format_args!("{from}>{to} {label} {} {sum:x} {fate} +{delay}", body.len()),
        );
        self.sent += 1;
        if !lost {
            self.under_way
                .insert((now + delay, self.sent), (to, parcel));
        }
    }
}

/// The way from one host to the leads.
pub(crate) struct HostWire {
    pub(crate) host: HostId,
    pub(crate) clock: HostClock,
    pub(crate) network: Network,
    /// The disk of the host: without power nothing is said.
    pub(crate) disk: Option<Disk>,
}

impl fmt::Debug for HostWire {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HostWire")
            .field("host", &self.host)
            .finish_non_exhaustive()
    }
}

/// Where a lead is said to be: its number is its port.
pub(crate) fn address(host: HostId) -> SocketAddr {
    let port = u16::try_from(host).expect("there are few hosts");
    SocketAddr::from(([127, 0, 0, 1], port))
}

impl HostWire {
    /// Asks `to`; silence where the request or its answer is lost.
    pub(crate) fn ask(&self, to: HostId, request: Request<Bytes>) -> Boxed<'static, Answer> {
        if self.disk.as_ref().is_some_and(Disk::is_dead) {
            return Box::pin(std::future::pending());
        }
        let now = self.clock.now();
        let answer = self.network.ask(now, (self.host, to), request);
        Box::pin(async {
            match answer.await {
                Ok(answer) => answer,
                Err(_) => std::future::pending().await,
            }
        })
    }
}

impl Wire for HostWire {
    fn exchange(
        &self,
        _name: &str,
        address: SocketAddr,
        request: Request<Bytes>,
    ) -> Boxed<'_, Answer> {
        self.ask(usize::from(address.port()), request)
    }
}
