//! Talking to the other leads: one POST per message.
//!
//! ```text
//!  POST /raft/v1/append | vote | snapshot     openraft's own messages; ?to= says for which member
//!  POST /raft/v1/ask                          what any lead asks of the leader
//! ```
//!
//! A body is [`encode`]d; an answer is always 200 with a `Result`, so another status means that the door itself
//! refused.

use std::{
    collections::BTreeSet,
    io,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use http::{Method, Request, StatusCode};
use openraft::{
    Vote,
    error::{Infallible, NetworkError, RPCError, RaftError, RemoteError, Unreachable},
    raft::AppendEntriesResponse,
};
use serde::{Serialize, de::DeserializeOwned};
use tokio::time::Instant;

use super::{Grants, Member, Pace, decode, encode, transfer::Sent};
use crate::{dial::DialError, world::Wire};

/// Names the member that a message of openraft's is for, by its id.
pub(crate) const TO: &str = "to";
/// For how long a leader's message asks its reader not to elect another, milliseconds; a header, which older leads skip.
pub(crate) const LEASE: &str = "weft-lease-ms";

/// Why a lead did not answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PostError {
    /// The message did not get there, or the answer did not come back.
    #[error("failed to reach lead {name} at {address}")]
    Unreachable {
        name: String,
        address: String,
        #[source]
        source: DialError,
    },
    /// It took too long.
    #[error("lead {name} did not answer within {limit:?}")]
    Slow { name: String, limit: Duration },
    /// The door refused.
    #[error("lead {name} answered {status}")]
    Refused { name: String, status: StatusCode },
    /// A message cannot be written.
    #[error("a message cannot be encoded")]
    Encode(#[from] rmp_serde::encode::Error),
    /// A message cannot be read.
    #[error("an answer cannot be decoded")]
    Decode(#[from] rmp_serde::decode::Error),
}

impl PostError {
    /// Whether the message certainly had no effect: nobody took it.
    pub(crate) fn never_arrived(&self) -> bool {
        match self {
            Self::Encode(_) => true,
            Self::Unreachable { source, .. } => refused(source.as_ref()),
            Self::Slow { .. } | Self::Refused { .. } | Self::Decode(_) => false,
        }
    }
}

/// Whether a connection was refused, and not broken.
fn refused(error: &(dyn std::error::Error + 'static)) -> bool {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes
        .filter_map(|cause| cause.downcast_ref::<io::Error>())
        .any(|error| error.kind() == io::ErrorKind::ConnectionRefused)
}

/// Messages to the other leads.
#[derive(Clone, Debug)]
pub(crate) struct Network {
    wire: Arc<dyn Wire>,
    away: Arc<Mutex<BTreeSet<String>>>,
    /// How far snapshots got.
    sent: Sent,
    pub(super) pace: Pace,
    /// What the others granted this lead as a leader.
    pub(crate) grants: Grants,
}

impl Network {
    pub(crate) fn new(wire: Arc<dyn Wire>, pace: Pace) -> Self {
        Self {
            wire,
            away: Arc::default(),
            sent: Sent::default(),
            pace,
            grants: Grants::default(),
        }
    }

    /// Says once when a lead goes out of reach, and once when it is back.
    fn note(&self, member: &Member, failure: Option<&PostError>) {
        let mut away = self.away.lock().unwrap_or_else(PoisonError::into_inner);
        match failure {
            Some(error @ PostError::Unreachable { .. }) => {
                if away.insert(member.name.clone()) {
                    tracing::warn!(lead = member.name, %error, "a lead is out of reach");
                }
            }
            Some(_) => {}
            None => {
                if away.remove(&member.name) {
                    tracing::info!(lead = member.name, "a lead is back");
                }
            }
        }
    }

    /// One lead, for openraft's messages.
    pub(super) fn peer(&self, id: u64, member: &Member) -> Peer {
        Peer {
            id,
            member: member.clone(),
            network: self.clone(),
        }
    }

    /// Sends `message` to a lead and reads its answer.
    pub(crate) async fn post<Q: Serialize, A: DeserializeOwned>(
        &self,
        member: &Member,
        path: &str,
        message: &Q,
        limit: Duration,
    ) -> Result<A, PostError> {
        let body = encode(message)?;
        self.send(member, path, body, limit, None).await
    }

    /// Sends what is encoded already, and asks for a lease if one is named.
    async fn send<A: DeserializeOwned>(
        &self,
        member: &Member,
        path: &str,
        body: Vec<u8>,
        limit: Duration,
        lease: Option<Duration>,
    ) -> Result<A, PostError> {
        let mut request = Request::builder()
            .method(Method::POST)
            .uri(format!("https://{}{path}", member.address));
        if let Some(lease) = lease {
            request = request.header(LEASE, lease.as_millis().to_string());
        }
        let request = request.body(Bytes::from(body));
        let request = request.expect("the parts are valid");
        let answer = tokio::time::timeout(limit, self.exchange(member, request));
        let bytes = answer.await.map_err(|_| PostError::Slow {
            name: member.name.clone(),
            limit,
        })??;
        Ok(decode(&bytes)?)
    }

    async fn exchange(&self, member: &Member, request: Request<Bytes>) -> Result<Bytes, PostError> {
        let answer = self.wire.exchange(&member.name, member.address, request);
        let answer = match answer.await {
            Ok((StatusCode::OK, body)) => Ok(body),
            Ok((status, _)) => Err(PostError::Refused {
                name: member.name.clone(),
                status,
            }),
            Err(source) => Err(PostError::Unreachable {
                name: member.name.clone(),
                address: member.address.to_string(),
                source,
            }),
        };
        self.note(member, answer.as_ref().err());
        answer
    }
}

/// One lead, for openraft's messages.
#[derive(Clone, Debug)]
pub(super) struct Peer {
    id: u64,
    member: Member,
    network: Network,
}

/// Why one was not answered.
pub(super) type Failure<E> = RPCError<u64, Member, RaftError<u64, E>>;

impl Peer {
    /// Which member it is, and how far snapshots got that were sent to it.
    pub(super) fn progress(&self) -> (u64, Sent) {
        (self.id, self.network.sent.clone())
    }

    /// How long a message without entries may take.
    pub(super) fn heartbeat(&self) -> Duration {
        self.network.pace.heartbeat()
    }

    /// Sends `message` and reads the answer.
    pub(super) async fn ask<Q, A, E>(
        &self,
        path: &str,
        message: &Q,
        limit: Duration,
    ) -> Result<A, Failure<E>>
    where
        Q: Serialize,
        A: DeserializeOwned,
        E: std::error::Error + DeserializeOwned,
    {
        let body = encode(message).map_err(|error| RPCError::Network(NetworkError::new(&error)))?;
        self.send(path, body, limit, None).await
    }

    /// Sends entries or a heartbeat, encoded, as the leader of `vote`, and notes the lease that an answer grants.
    pub(super) async fn append(
        &self,
        vote: Vote<u64>,
        path: &str,
        body: Vec<u8>,
        limit: Duration,
    ) -> Result<AppendEntriesResponse<u64>, Failure<Infallible>> {
        let (sent, lease) = (Instant::now(), self.network.pace.lease());
        let answer = self.send(path, body, limit, Some(lease)).await?;
        if !matches!(answer, AppendEntriesResponse::HigherVote(_)) {
            let granted = self.network.pace.granted(self.id, lease);
            self.network.grants.note(vote, self.id, sent + granted);
        }
        Ok(answer)
    }

    /// Like [`Peer::ask`], for what is encoded already.
    async fn send<A, E>(
        &self,
        path: &str,
        body: Vec<u8>,
        limit: Duration,
        lease: Option<Duration>,
    ) -> Result<A, Failure<E>>
    where
        A: DeserializeOwned,
        E: std::error::Error + DeserializeOwned,
    {
        // A lead that was replaced may have another behind its address: its part is nobody else's.
        let path = format!("{path}?{TO}={}", self.id);
        let answer: Result<Result<A, RaftError<u64, E>>, PostError> = self
            .network
            .send(&self.member, &path, body, limit, lease)
            .await;
        match answer {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(error)) => Err(RPCError::RemoteError(RemoteError::new(self.id, error))),
            Err(error @ PostError::Unreachable { .. }) => {
                Err(RPCError::Unreachable(Unreachable::new(&error)))
            }
            Err(error) => Err(RPCError::Network(NetworkError::new(&error))),
        }
    }
}
