//! The agent stream, from the node's end.
//!
//! One stream at a time, over mutual TLS, to an agent of the node's own cluster. The node says who it is,
//! then whatever changed of the rest; the agent sends tables. When the stream breaks the node dials again
//! after a pause that doubles and is jittered, and forwards with its last table meanwhile (I5).

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime},
};

use hyper_util::rt::TokioIo;
use netmanager_api::{
    conditions::Conditions,
    identity::{Credentials, IdentityError, Role, SERVER_NAME},
    stream::{Endpoint, FromNode, Hello, Measured, NodeDoorClient, ToNode},
    table::{Revision, Table},
};
use rustls_pki_types::ServerName;
use tokio::{
    net::TcpStream,
    sync::{mpsc, watch},
    time::{Instant, MissedTickBehavior, interval, sleep, timeout},
};
use tokio_rustls::{TlsConnector, rustls::ClientConfig};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport;

/// Pauses between attempts.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// A stream that lived this long was a success: the next pause is the first again.
const STEADY: Duration = Duration::from_secs(10);
/// How long an agent may take to answer a knock.
const KNOCK: Duration = Duration::from_secs(5);
/// An agent that does not answer a ping for this long is gone.
const KEEP_ALIVE: Duration = Duration::from_secs(5);
/// A node that says nothing new says its measurements again: an agent takes one that is silent for dead.
const REPEAT: Duration = Duration::from_secs(1);
/// The largest table, bytes; 10,000 services with ten backends each stay below.
const MAX_MESSAGE: usize = 256 << 20;

/// What the agent should know of this node; the stream sends what changed.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outbox {
    /// Who the node is; nothing is sent before it is known.
    pub hello: Option<Hello>,
    /// The attached endpoints.
    pub endpoints: Vec<Endpoint>,
    /// The table that the kernel matches.
    pub applied: Option<Revision>,
    /// What was measured.
    pub measured: Measured,
}

/// Where what the agent says goes.
#[derive(Clone, Debug)]
pub struct Inbox {
    /// Newer tables.
    pub tables: mpsc::Sender<Table>,
    /// The newest conditions; a change also where they are the same again.
    pub conditions: watch::Sender<Conditions>,
}

/// Where the agent is and how to prove who this node is.
#[derive(Clone, Debug)]
pub struct Agent {
    /// `HOST:PORT` of its node door.
    pub address: String,
    /// The node's name, which must be the certificate's.
    pub node: String,
    /// Folder of `tls.crt`, `tls.key` and `ca.crt`.
    pub credentials: PathBuf,
}

/// Why a stream did not come about, or ended.
#[derive(Debug, thiserror::Error)]
pub enum FollowError {
    /// The credentials do not serve.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The certificate is not this node's.
    #[error(
        "the certificate is for {found}, but this node is {wanted:?}: fix --node or --credentials"
    )]
    WrongNode {
        /// The certificate's identity.
        found: String,
        /// The node's name.
        wanted: String,
    },
    /// The agent cannot be reached, or is not one.
    #[error("failed to reach the agent at {address}")]
    Knock {
        /// Its address.
        address: String,
        /// Why.
        #[source]
        source: transport::Error,
    },
    /// It did not answer in time.
    #[error("the agent at {0} does not answer")]
    Silent(String),
    /// The stream was refused or broke.
    #[error("the agent ended the stream: {0}")]
    Ended(String),
}

/// Reads the credentials and checks that they are this node's.
///
/// # Errors
/// When they are missing, or not for a node of this name.
pub fn client_tls(agent: &Agent) -> Result<Arc<ClientConfig>, FollowError> {
    let credentials = Credentials::load(&agent.credentials)?;
    let Role::Node { cluster, node } = &credentials.identity.role else {
        return Err(wrong_node(&credentials, agent));
    };
    if *node != agent.node {
        return Err(wrong_node(&credentials, agent));
    }
    let cluster = cluster.clone();
    let accept = move |role: &Role| matches!(role, Role::Agent { cluster: c } if *c == cluster);
    Ok(credentials.client(&[b"h2"], accept)?)
}

fn wrong_node(credentials: &Credentials, agent: &Agent) -> FollowError {
    FollowError::WrongNode {
        found: credentials.identity.to_string(),
        wanted: agent.node.clone(),
    }
}

/// Follows the agent until the receiver of its tables is gone.
pub async fn follow(agent: Agent, mut outbox: watch::Receiver<Outbox>, inbox: Inbox) {
    let mut pause = FIRST_PAUSE;
    while !inbox.tables.is_closed() {
        let is_known = outbox
            .wait_for(|outbox| outbox.hello.is_some())
            .await
            .is_ok();
        if !is_known {
            return;
        }
        let started = Instant::now();
        let ended = session(&agent, &mut outbox, &inbox).await;
        if started.elapsed() >= STEADY {
            pause = FIRST_PAUSE;
        }
        match ended {
            Ok(()) => pause = FIRST_PAUSE,
            Err(error) => {
                let cause = chain(&error);
                tracing::warn!(agent = agent.address, %cause, ?pause, "no stream to the agent");
            }
        }
        tokio::select! {
            () = sleep(jittered(pause, entropy())) => {}
            () = inbox.tables.closed() => return,
        }
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// One stream. `Ok` when this end stopped: the daemon stops, or the node's hello changed.
async fn session(
    agent: &Agent,
    outbox: &mut watch::Receiver<Outbox>,
    inbox: &Inbox,
) -> Result<(), FollowError> {
    let tls = client_tls(agent)?;
    let silent = |_| FollowError::Silent(agent.address.clone());
    let channel = timeout(KNOCK, connect(agent, tls))
        .await
        .map_err(silent)??;
    let mut client = NodeDoorClient::new(channel).max_decoding_message_size(MAX_MESSAGE);
    let (sender, receiver) = mpsc::channel(16);
    let mut sent = Outbox::default();
    let first = outbox.borrow_and_update().clone();
    say_changes(&sender, &mut sent, &first).await;
    let ended = |status: tonic::Status| FollowError::Ended(status.to_string());
    let mut answers = timeout(KNOCK, client.follow(ReceiverStream::new(receiver)))
        .await
        .map_err(silent)?
        .map_err(ended)?
        .into_inner();
    tracing::info!(agent = agent.address, "following the agent");
    let mut repeats = interval(REPEAT);
    repeats.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            answer = answers.message() => match answer.map_err(ended)? {
                Some(ToNode::Table(table)) => {
                    if inbox.tables.send(*table).await.is_err() {
                        return Ok(());
                    }
                }
                Some(ToNode::Conditions(conditions)) => {
                    inbox.conditions.send_replace(conditions);
                }
                None => return Err(FollowError::Ended("without a reason".to_owned())),
            },
            changed = outbox.changed() => {
                let now = outbox.borrow_and_update().clone();
                if changed.is_err() || now.hello_without_applied() != sent.hello_without_applied() {
                    return Ok(());
                }
                say_changes(&sender, &mut sent, &now).await;
            }
            _ = repeats.tick() => {
                // A full channel has words in it already; a closed one ends with the answers.
                let _ = sender.try_send(FromNode::Measured(sent.measured.clone()));
            }
            () = inbox.tables.closed() => return Ok(()),
        }
    }
}

impl Outbox {
    /// Who the node is, apart from what the stream says later.
    fn hello_without_applied(&self) -> Option<Hello> {
        self.hello.clone().map(|hello| Hello {
            applied: None,
            ..hello
        })
    }
}

/// Sends what differs between `sent` and `now`. A closed channel is noticed where the answers end.
async fn say_changes(sender: &mpsc::Sender<FromNode>, sent: &mut Outbox, now: &Outbox) {
    let mut messages = Vec::new();
    if sent.hello.is_none()
        && let Some(hello) = &now.hello
    {
        messages.push(FromNode::Hello(Hello {
            applied: now.applied,
            ..hello.clone()
        }));
        messages.push(FromNode::Endpoints {
            endpoints: now.endpoints.clone(),
        });
        messages.push(FromNode::Measured(now.measured.clone()));
    } else {
        if sent.endpoints != now.endpoints {
            messages.push(FromNode::Endpoints {
                endpoints: now.endpoints.clone(),
            });
        }
        if sent.measured != now.measured {
            messages.push(FromNode::Measured(now.measured.clone()));
        }
    }
    if sent.applied != now.applied
        && let Some(revision) = now.applied
    {
        messages.push(FromNode::Applied { revision });
    }
    for message in messages {
        if sender.send(message).await.is_err() {
            return;
        }
    }
    sent.clone_from(now);
}

async fn connect(agent: &Agent, tls: Arc<ClientConfig>) -> Result<transport::Channel, FollowError> {
    let address = agent.address.clone();
    let connector = tower::service_fn(move |_: http::Uri| {
        let (address, tls) = (address.clone(), TlsConnector::from(tls.clone()));
        async move {
            let stream = TcpStream::connect(&address).await?;
            stream.set_nodelay(true)?;
            let name = ServerName::try_from(SERVER_NAME).expect("the name is a DNS name");
            tls.connect(name, stream).await.map(TokioIo::new)
        }
    });
    transport::Endpoint::from_static("http://weft.internal")
        .http2_keep_alive_interval(KEEP_ALIVE)
        .keep_alive_timeout(KEEP_ALIVE)
        .keep_alive_while_idle(true)
        .connect_with_connector(connector)
        .await
        .map_err(|source| FollowError::Knock {
            address: agent.address.clone(),
            source,
        })
}

/// Half to all of `pause`, so that the nodes of a cluster do not knock together.
fn jittered(pause: Duration, random: u32) -> Duration {
    let half = pause / 2;
    half + half.mul_f64(f64::from(random) / f64::from(u32::MAX))
}

/// Enough randomness for a pause: the fine digits of the clock.
fn entropy() -> u32 {
    let nanos = SystemTime::UNIX_EPOCH
        .elapsed()
        .map_or(0, |since| since.subsec_nanos());
    nanos.wrapping_mul(0x9e37_79b1) // 2^32 / golden ratio spreads the digits
}

/// An error and its causes in one line.
#[must_use]
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        if !text.ends_with(&next) {
            text.push_str(": ");
            text.push_str(&next);
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hello() -> Hello {
        Hello {
            node: "n1".into(),
            public_key: "k".into(),
            tunnel_port: 1,
            underlay: Vec::new(),
            applied: None,
            version: "0".into(),
        }
    }

    fn drain(receiver: &mut mpsc::Receiver<FromNode>) -> Vec<FromNode> {
        std::iter::from_fn(|| receiver.try_recv().ok()).collect()
    }

    #[tokio::test]
    async fn the_first_words_are_complete_and_the_next_only_what_changed() {
        let (sender, mut receiver) = mpsc::channel(16);
        let mut sent = Outbox::default();
        let revision = Revision {
            incarnation: 1,
            index: 7,
        };
        let mut now = Outbox {
            hello: Some(hello()),
            applied: Some(revision),
            ..Outbox::default()
        };
        say_changes(&sender, &mut sent, &now).await;
        let first = drain(&mut receiver);
        assert!(
            matches!(&first[0], FromNode::Hello(hello) if hello.applied == Some(revision)),
            "{first:?}"
        );
        assert_eq!(
            first.len(),
            4,
            "endpoints, measurements and the revision follow"
        );

        say_changes(&sender, &mut sent, &now).await;
        assert_eq!(drain(&mut receiver), []);
        now.measured.unreachable.push(4);
        say_changes(&sender, &mut sent, &now).await;
        assert_eq!(
            drain(&mut receiver),
            [FromNode::Measured(now.measured.clone())]
        );
    }

    #[test]
    fn a_pause_is_jittered_between_half_and_all_of_it() {
        let pause = Duration::from_secs(2);
        assert_eq!(jittered(pause, 0), Duration::from_secs(1));
        assert_eq!(jittered(pause, u32::MAX), pause);
    }
}
