//! One lead, as openraft talks to it.
//!
//! An AppendEntries is given up after a heartbeat interval; openraft sends it anew, and no heartbeat meanwhile. What takes longer
//! would never be acknowledged: followers that read it and answer too late take its sender for their leader for ever, and
//! whom others elect fares the same. So entries are sent by a task of their own, which goes on:
//!
//! ```text
//!  openraft: append(prev, entries) --> on their way, once
//!            <-- PartialSuccess(prev) ---- meanwhile a heartbeat was answered
//!            append(prev, entries) --> the same ones are waited for --> answered --> a heartbeat behind them
//!            <-- Success
//! ```
//!
//! openraft takes an answer for one to what it asked last, given since then. An answer to what was asked before counts only
//! with a heartbeat at its end, which says the same of now.

use std::{future::pending, time::Duration};

use openraft::{
    LogId, OptionalSend, RaftNetwork, RaftNetworkFactory, Snapshot, Vote,
    error::{
        Fatal, Infallible, InstallSnapshotError, NetworkError, RPCError, ReplicationClosed,
        StreamingError,
    },
    network::{Backoff, RPCOption},
    raft::{
        AppendEntriesRequest, AppendEntriesResponse, InstallSnapshotRequest,
        InstallSnapshotResponse, SnapshotResponse, VoteRequest, VoteResponse,
    },
};
use tokio::time::{sleep, timeout};
use tokio_util::task::AbortOnDropHandle;

use super::{
    Member, Types, encode,
    network::{Failure, Network, Peer},
    transfer::Way,
};

/// Where entries and heartbeats go.
pub(crate) const APPEND: &str = "/raft/v1/append";

/// How soon an unreachable lead is tried again.
const RETRY: Duration = Duration::from_millis(250);

/// How long an empty part of a snapshot may take: several writes of a slow disk.
const PART: Duration = Duration::from_secs(2);

/// The slowest way that is waited for, bytes per second: to the other lead and onto its disk. What takes longer is taken for
/// lost; a connection that breaks says so itself.
const SLOWEST: u64 = 16 << 10;

type Message = AppendEntriesRequest<Types>;
type Answer = Result<AppendEntriesResponse<u64>, Failure<Infallible>>;

/// How long a message of `size` bytes may take that an empty one has `limit` for.
fn patience(limit: Duration, size: usize) -> Duration {
    let size = u64::try_from(size).unwrap_or(u64::MAX);
    limit + Duration::from_millis(size.saturating_mul(1000) / SLOWEST)
}

/// Entries that were sent.
#[derive(Debug)]
struct Sent {
    vote: Vote<u64>,
    prev: Option<LogId<u64>>,
    last: LogId<u64>,
    stage: Stage,
}

#[derive(Debug)]
enum Stage {
    UnderWay(AbortOnDropHandle<Answer>),
    /// Here the logs are compared again: the follower said this of what ends there.
    Answered {
        at: Option<LogId<u64>>,
    },
}

impl Sent {
    /// Whether what comes of these answers `message`, too: behind one entry a leader's log is always the same.
    fn serves(&self, message: &Message) -> bool {
        (self.vote, self.prev) == (message.vote, message.prev_log_id)
    }
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Link {
    peer: Peer,
    sent: Option<Sent>,
}

impl RaftNetworkFactory<Types> for Network {
    type Network = Link;

    async fn new_client(&mut self, id: u64, member: &Member) -> Link {
        Link {
            peer: self.peer(id, member),
            sent: None,
        }
    }
}

impl Link {
    /// Sends entries, or waits for those that are on their way; it may be given up and called again.
    async fn append(&mut self, message: Message, limit: Duration) -> Answer {
        let Some(last) = message.entries.last().map(|entry| entry.log_id) else {
            return beat(&self.peer, &message, limit).await;
        };
        let Message {
            vote,
            prev_log_id: prev,
            leader_commit,
            ..
        } = message;
        let heartbeat = |at| Message {
            vote,
            prev_log_id: at,
            leader_commit,
            entries: Vec::new(),
        };
        let earlier = self.sent.take().filter(|sent| sent.serves(&message));
        let is_resumed = earlier.is_some();
        let sent = self.sent.insert(earlier.unwrap_or_else(|| Sent {
            vote,
            prev,
            last,
            stage: Stage::UnderWay(send(self.peer.clone(), message, limit)),
        }));
        let at = match &mut sent.stage {
            Stage::Answered { at } => *at,
            Stage::UnderWay(reply) => {
                let answer = tokio::select! {
                    biased;
                    reply = reply => match reply {
                        Ok(answer) => answer,
                        Err(died) => Err(failure(&died)),
                    },
                    beat = meanwhile(&self.peer, heartbeat(prev), limit) => {
                        if !matches!(beat, AppendEntriesResponse::PartialSuccess(_)) {
                            self.sent = None;
                        }
                        return Ok(beat);
                    }
                };
                match answer {
                    Ok(AppendEntriesResponse::Success) if is_resumed => Some(sent.last),
                    Ok(AppendEntriesResponse::Conflict) if is_resumed => prev,
                    answer => {
                        self.sent = None;
                        return answer;
                    }
                }
            }
        };
        // Given up from here on, only this is asked again.
        sent.stage = Stage::Answered { at };
        let answer = beat(&self.peer, &heartbeat(at), limit).await?;
        self.sent = None;
        match answer {
            AppendEntriesResponse::Success if at < Some(last) => {
                Ok(AppendEntriesResponse::PartialSuccess(at))
            }
            AppendEntriesResponse::Conflict if at != prev => Err(failure(&Lost)),
            answer => Ok(answer),
        }
    }
}

/// A follower no longer has what it acknowledged.
#[derive(Debug, thiserror::Error)]
#[error("it has lost what it acknowledged")]
struct Lost;

fn failure(error: &(impl std::error::Error + 'static)) -> Failure<Infallible> {
    RPCError::Network(NetworkError::new(error))
}

/// Sends entries in a task of its own.
fn send(peer: Peer, message: Message, limit: Duration) -> AbortOnDropHandle<Answer> {
    AbortOnDropHandle::new(tokio::spawn(async move {
        let body = encode(&message).map_err(|error| failure(&error))?;
        let limit = patience(limit, body.len());
        peer.append(message.vote, APPEND, body, limit).await
    }))
}

/// Sends a message without entries.
async fn beat(peer: &Peer, heartbeat: &Message, limit: Duration) -> Answer {
    let body = encode(heartbeat).map_err(|error| failure(&error))?;
    peer.append(heartbeat.vote, APPEND, body, limit).await
}

/// A heartbeat while entries are on their way, when half of a call is over; what openraft is told, if anything is to be.
async fn meanwhile(peer: &Peer, heartbeat: Message, limit: Duration) -> AppendEntriesResponse<u64> {
    sleep(limit / 2).await;
    match beat(peer, &heartbeat, limit).await {
        Ok(AppendEntriesResponse::Success) if heartbeat.prev_log_id.is_some() => {
            AppendEntriesResponse::PartialSuccess(heartbeat.prev_log_id)
        }
        // openraft takes no success without an entry, and asks again by itself.
        Ok(AppendEntriesResponse::Success) | Err(_) => pending().await,
        Ok(answer) => answer,
    }
}

impl RaftNetwork<Types> for Link {
    async fn append_entries(&mut self, message: Message, option: RPCOption) -> Answer {
        let limit = self.peer.heartbeat().min(option.hard_ttl());
        match timeout(limit, self.append(message, limit)).await {
            Ok(answer) => answer,
            Err(late) => Err(failure(&late)),
        }
    }

    async fn install_snapshot(
        &mut self,
        message: InstallSnapshotRequest<Types>,
        option: RPCOption,
    ) -> Result<InstallSnapshotResponse<u64>, Failure<InstallSnapshotError>> {
        // Behind the last part the whole is installed.
        let size = match message.done {
            true => usize::try_from(message.offset).unwrap_or(usize::MAX),
            false => 0,
        };
        let limit = patience(PART, size.saturating_add(message.data.len()));
        let limit = limit.min(option.hard_ttl());
        self.peer.ask("/raft/v1/snapshot", &message, limit).await
    }

    async fn full_snapshot(
        &mut self,
        vote: Vote<u64>,
        snapshot: Snapshot<Types>,
        cancel: impl Future<Output = ReplicationClosed> + OptionalSend + 'static,
        option: RPCOption,
    ) -> Result<SnapshotResponse<u64>, StreamingError<Types, Fatal<u64>>> {
        let (to, sent) = self.peer.progress();
        let way = Way {
            network: self,
            to,
            sent,
            option,
        };
        way.send(vote, snapshot, cancel).await
    }

    async fn vote(
        &mut self,
        message: VoteRequest<u64>,
        option: RPCOption,
    ) -> Result<VoteResponse<u64>, Failure<Infallible>> {
        let limit = option.hard_ttl();
        self.peer.ask("/raft/v1/vote", &message, limit).await
    }

    fn backoff(&self) -> Backoff {
        Backoff::new(std::iter::repeat(RETRY))
    }
}

#[cfg(test)]
mod tests;
