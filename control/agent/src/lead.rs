//! The agent's one outbound stream, to any lead.
//!
//! The leads are tried in an order that starts anywhere; a stream that breaks, is not welcomed, or whose renewals
//! nobody counts for a lease (a lead cut off from the leader) gives way to the next lead, with a back-off that
//! doubles up to [`LONGEST_PAUSE`] and is jittered. What comes in goes to the engine; what goes out is the
//! newest report, never a queue of old ones.

use std::{
    collections::VecDeque,
    hash::{BuildHasher, RandomState},
    io,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use control_api::stream::{
    FromAgent, Hello, LeadDoorClient, MESSAGE_LIMIT, REPORT_AT_LEAST, ToAgent, Welcome,
};
use control_core::report::{ClusterFacts, Report};
use futures::future::BoxFuture;
use hyper_util::rt::TokioIo;
use netmanager_api::{
    conditions::Conditions,
    identity::{Guarded, RevokedList, SERVER_NAME, Shown},
};
use rustls::ClientConfig;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    sync::{mpsc, watch},
    time::{MissedTickBehavior, interval, interval_at, timeout},
};
use tokio_rustls::TlsConnector;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{
    Streaming,
    transport::{Channel, Endpoint, Uri},
};

use crate::{event::Event, now};

/// How long a lead has to take the connection.
const CONNECT: Duration = Duration::from_secs(3);
/// How long a lead has to welcome: it may have to wait for an election.
const WELCOME: Duration = Duration::from_secs(5);
/// How often a silent connection is probed, and how long it has to answer.
const KEEPALIVE: Duration = Duration::from_secs(2);
/// The pause after a first failure.
const SHORTEST_PAUSE: Duration = Duration::from_millis(100);
/// The longest pause of an agent that was never welcomed; for one that was see [`longest_pause`].
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// What the engine has for the leads.
#[derive(Clone, Debug, Default)]
pub struct Outbox {
    /// The newest report; `None` before the first.
    pub report: Option<Arc<Report>>,
    /// The newest state of the Knowledge Base that the agent has.
    pub revision: Option<(u64, u64)>,
    /// The session that the agent has.
    pub session: Option<u64>,
}

/// A connection.
pub trait Line: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Line for T {}

/// The way to the leads: what is said on it is the same whoever carries it.
pub trait Lines: std::fmt::Debug + Send + Sync {
    /// Connects to the door of the lead at this address.
    fn dial(&self, lead: SocketAddr) -> BoxFuture<'static, io::Result<Box<dyn Line>>>;
}

/// Mutual TLS over TCP; a connection ends with the lead's certificate.
#[derive(Clone, Debug)]
pub struct TlsLines {
    /// TLS that accepts leads only.
    pub tls: Arc<ClientConfig>,
    /// The certificates that count no more.
    pub revoked: RevokedList,
}

impl Lines for TlsLines {
    fn dial(&self, lead: SocketAddr) -> BoxFuture<'static, io::Result<Box<dyn Line>>> {
        let (tls, revoked) = (TlsConnector::from(self.tls.clone()), self.revoked.clone());
        Box::pin(async move {
            let tcp = TcpStream::connect(lead).await?;
            tcp.set_nodelay(true)?;
            let name = SERVER_NAME
                .try_into()
                .expect("the server name is a DNS name");
            let stream = tls.connect(name, tcp).await?;
            let shown = Shown::of_peer(stream.get_ref().1).map_err(io::Error::other)?;
            let stream = Guarded::new(stream, Arc::new(shown), revoked);
            Ok(Box::new(stream) as Box<dyn Line>)
        })
    }
}

/// Follows one lead after the other.
#[derive(Debug)]
pub struct LeadClient {
    /// Where the leads are.
    pub leads: Vec<SocketAddr>,
    /// The way to them.
    pub lines: Arc<dyn Lines>,
    /// The cluster's name.
    pub cluster: String,
    /// What its operator says of it.
    pub facts: ClusterFacts,
    /// What is to be said.
    pub outbox: watch::Receiver<Outbox>,
    /// What is to be said of load and coordinates; a change also where it is the same again.
    pub conditions: watch::Receiver<Conditions>,
    /// Where what is heard goes.
    pub events: mpsc::Sender<Event>,
}

/// Why a stream ended.
#[derive(Debug, thiserror::Error)]
enum Parting {
    #[error("failed to connect")]
    Connect(#[source] tonic::transport::Error),
    #[error("the lead refused the stream: {}", .0.message())]
    Refused(Box<tonic::Status>),
    #[error("the lead did not welcome this cluster within {} s", WELCOME.as_secs())]
    Unwelcome,
    #[error("the lead's first word is no welcome")]
    Form,
    #[error("the stream broke: {}", .0.message())]
    Broke(Box<tonic::Status>),
    #[error("the lead ended the stream")]
    Ended,
    #[error("no renewal was counted for a lease of {0:?}")]
    Unrenewed(Duration),
    #[error("the agent ends")]
    Over,
}

impl LeadClient {
    /// Follows leads until `shutdown`.
    pub async fn run(mut self, shutdown: CancellationToken) {
        let mut pause = SHORTEST_PAUSE;
        let mut longest = LONGEST_PAUSE;
        let mut failures = 0;
        let mut next = random() as usize;
        loop {
            let lead = self.leads[next % self.leads.len()];
            let mut welcomed = None;
            let parting = tokio::select! {
                () = shutdown.cancelled() => return,
                parting = self.follow(lead, &mut welcomed) => parting,
            };
            if matches!(parting, Parting::Over) {
                return;
            }
            let cause = std::error::Error::source(&parting).map(chain);
            // While all are away: one line per lead, and then silence until there is news.
            if welcomed.is_some() || failures < self.leads.len() {
                tracing::warn!(%lead, reason = %parting, cause, "parted from a lead");
            } else {
                tracing::debug!(%lead, reason = %parting, cause, "parted from a lead");
            }
            failures += 1;
            if let Some(lease) = welcomed {
                (pause, failures) = (SHORTEST_PAUSE, 0);
                longest = longest_pause(lease);
                if self.events.send(Event::Parted).await.is_err() {
                    return;
                }
            }
            next = next.wrapping_add(1);
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = tokio::time::sleep(jittered(pause, random())) => {}
            }
            pause = (pause * 2).min(longest);
        }
    }

    /// Follows one lead to the end; `welcomed` is then the lease, if there was a welcome.
    async fn follow(&mut self, lead: SocketAddr, welcomed: &mut Option<Duration>) -> Parting {
        match self.open(lead).await {
            Ok(mut stream) => {
                *welcomed = Some(stream.welcome.lease());
                tracing::info!(%lead, session = stream.welcome.session, "following a lead");
                let event = Event::Welcomed {
                    welcome: stream.welcome,
                    sent: stream.greeted,
                };
                if self.events.send(event).await.is_err() {
                    return Parting::Over;
                }
                match self.exchange(&mut stream).await {
                    Ok(()) => Parting::Ended,
                    Err(parting) => parting,
                }
            }
            Err(parting) => parting,
        }
    }

    /// Connects, says hello and waits for the welcome.
    async fn open(&mut self, lead: SocketAddr) -> Result<Stream, Parting> {
        let channel = connect(lead, self.lines.clone())
            .await
            .map_err(Parting::Connect)?;
        let mut client = LeadDoorClient::new(channel)
            .max_decoding_message_size(MESSAGE_LIMIT)
            .max_encoding_message_size(MESSAGE_LIMIT);
        let (sender, receiver) = mpsc::channel(8);
        let outbox = self.outbox.borrow().clone();
        let hello = FromAgent::Hello(Hello {
            cluster: self.cluster.clone(),
            facts: self.facts.clone(),
            session: outbox.session,
            revision: outbox.revision,
            version: env!("CARGO_PKG_VERSION").to_owned(),
        });
        let greeted = now();
        sender
            .try_send(hello)
            .expect("the channel is new and has room for eight");
        let welcome = async {
            let response = client.follow(ReceiverStream::new(receiver)).await;
            let mut messages = response.map_err(refused)?.into_inner();
            let first = messages.message().await.map_err(refused)?;
            match first.ok_or(Parting::Ended)? {
                ToAgent::Welcome(welcome) => Ok((welcome, messages)),
                _ => Err(Parting::Form),
            }
        };
        let (welcome, messages) = timeout(WELCOME, welcome)
            .await
            .map_err(|_| Parting::Unwelcome)??;
        Ok(Stream {
            welcome,
            greeted,
            sender,
            messages,
        })
    }

    /// Talks until the stream ends (`Ok`) or breaks.
    async fn exchange(&mut self, stream: &mut Stream) -> Result<(), Parting> {
        let lease = stream.welcome.lease();
        let mut renewals = Renewals::new(lease, stream.greeted);
        let mut alive = interval((lease / 3).max(Duration::from_millis(10)));
        let mut remind = interval_at(
            tokio::time::Instant::now() + REPORT_AT_LEAST,
            REPORT_AT_LEAST,
        );
        alive.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut said: Option<Arc<Report>> = None;
        self.outbox.mark_changed();
        loop {
            tokio::select! {
                message = stream.messages.message() => {
                    let Some(message) = message.map_err(|status| Parting::Broke(Box::new(status)))? else {
                        return Ok(());
                    };
                    let event = match message {
                        ToAgent::Welcome(_) => return Err(Parting::Form),
                        ToAgent::Renewed { sequence } => match renewals.counted(sequence) {
                            Some(sent) => Event::Renewed { lease, sent },
                            None => continue,
                        },
                        ToAgent::Assignments(assignments) => Event::Ordered(assignments),
                        ToAgent::Tables(tables) => Event::Tabled(tables),
                        ToAgent::Conditions(conditions) => Event::Conditions(conditions),
                    };
                    self.events.send(event).await.map_err(|_| Parting::Over)?;
                }
                _ = alive.tick() => {
                    let now = now();
                    if renewals.overdue(now) {
                        return Err(Parting::Unrenewed(lease));
                    }
                    if let Ok(permit) = stream.sender.try_reserve() {
                        permit.send(FromAgent::Alive { sequence: renewals.send(now) });
                    }
                }
                _ = remind.tick() => {
                    said = None;
                    self.outbox.mark_changed();
                }
                changed = self.conditions.changed() => {
                    changed.map_err(|_| Parting::Over)?;
                    let conditions = self.conditions.borrow_and_update().clone();
                    // Full: the lead is slow. They are said again soon.
                    let _ = stream.sender.try_send(FromAgent::Conditions(conditions));
                }
                changed = self.outbox.changed() => {
                    changed.map_err(|_| Parting::Over)?;
                    let newest = self.outbox.borrow_and_update().report.clone();
                    if let Some(report) = newest.filter(|newest| said.as_ref() != Some(newest)) {
                        // Full: the lead is slow. The next report, at the latest the reminder, says it all.
                        if stream.sender.try_send(FromAgent::Report((*report).clone())).is_ok() {
                            said = Some(report);
                        } else {
                            remind.reset_after(lease / 3);
                        }
                    }
                }
            }
        }
    }
}

/// A welcomed stream.
struct Stream {
    welcome: Welcome,
    greeted: Instant,
    sender: mpsc::Sender<FromAgent>,
    messages: Streaming<ToAgent>,
}

/// The renewals of one stream: which were sent when, and when one was last counted.
#[derive(Debug)]
struct Renewals {
    lease: Duration,
    sequence: u64,
    waiting: VecDeque<(u64, Instant)>,
    counted: Instant,
}

impl Renewals {
    fn new(lease: Duration, greeted: Instant) -> Self {
        Self {
            lease,
            sequence: 0,
            waiting: VecDeque::new(),
            counted: greeted,
        }
    }

    /// The number of the renewal that is sent now.
    fn send(&mut self, now: Instant) -> u64 {
        self.sequence += 1;
        self.waiting.push_back((self.sequence, now));
        self.sequence
    }

    /// The leader counted this one; says when it was sent, unless a later one was counted before.
    fn counted(&mut self, sequence: u64) -> Option<Instant> {
        let mut found = None;
        while let Some(&(first, sent)) = self.waiting.front() {
            if first > sequence {
                break;
            }
            self.waiting.pop_front();
            found = (first == sequence).then_some(sent);
        }
        self.counted = found.unwrap_or(self.counted);
        found
    }

    /// Whether the leader would have given this cluster up by now.
    fn overdue(&self, now: Instant) -> bool {
        now >= self.counted + self.lease
    }
}

fn refused(status: tonic::Status) -> Parting {
    Parting::Refused(Box::new(status))
}

/// A channel to a lead.
pub(crate) async fn connect(
    lead: SocketAddr,
    lines: Arc<dyn Lines>,
) -> Result<Channel, tonic::transport::Error> {
    let connector = tower::service_fn(move |_: Uri| {
        let dialling = lines.dial(lead);
        async { io::Result::Ok(TokioIo::new(dialling.await?)) }
    });
    Endpoint::from_static("http://weft.internal")
        .connect_timeout(CONNECT)
        .http2_keep_alive_interval(KEEPALIVE)
        .keep_alive_timeout(KEEPALIVE)
        .keep_alive_while_idle(true)
        .connect_with_connector(connector)
        .await
}

/// An error with all its causes, in one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    let mut texts: Vec<String> = causes.map(ToString::to_string).collect();
    // Wrappers that add nothing, or quote their source.
    texts.dedup_by(|text, before| before.ends_with(text.as_str()));
    texts.join(": ")
}

/// The longest pause between two tries under a lease.
///
/// Leads that come back wait one lease before they call a cluster lost: an agent must find one in time, also where
/// the first that it tries is still away.
fn longest_pause(lease: Duration) -> Duration {
    (lease / 4).clamp(SHORTEST_PAUSE, LONGEST_PAUSE)
}

/// Between half of `pause` and all of it.
fn jittered(pause: Duration, random: u64) -> Duration {
    let half = pause / 2;
    half + half.mul_f64((random % 1024) as f64 / 1024.0)
}

/// A number that differs between agents and calls; its quality does not matter.
fn random() -> u64 {
    RandomState::new().hash_one(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_agent_tries_every_lead_of_three_within_one_lease() {
        for lease in [1, 3, 10, 60].map(Duration::from_secs) {
            assert!(longest_pause(lease) * 3 < lease, "{lease:?}");
        }
        assert_eq!(longest_pause(Duration::from_secs(600)), LONGEST_PAUSE);
    }

    #[test]
    fn a_pause_is_jittered_within_its_upper_half() {
        let pause = Duration::from_millis(100);
        for random in [0, 1, 511, 1023, u64::MAX] {
            let jittered = jittered(pause, random);
            assert!(jittered >= pause / 2 && jittered <= pause, "{jittered:?}");
        }
    }

    #[test]
    fn a_lease_counts_from_the_sending_of_the_renewal_that_was_counted() {
        let lease = Duration::from_secs(3);
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut renewals = Renewals::new(lease, start);
        assert_eq!(renewals.send(at(1)), 1);
        assert_eq!(renewals.send(at(2)), 2);
        assert_eq!(renewals.counted(2), Some(at(2)));
        assert_eq!(renewals.counted(1), None, "a late answer renews nothing");
        assert_eq!(
            renewals.counted(9),
            None,
            "nor does one that was never asked for"
        );
        assert!(!renewals.overdue(at(4)));
        assert!(renewals.overdue(at(5)));
    }
}
