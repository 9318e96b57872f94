//! This lead as a voter: it takes a leader's messages and keeps what it promises by them ([`super::promise`]).
//!
//! A message and its promise are one step, and so are the question whether this lead is free and its vote: whatever comes
//! between would be a vote against a promise.

use std::{sync::Arc, time::Duration};

use openraft::{
    error::{Fatal, RaftError},
    raft::{AppendEntriesRequest, AppendEntriesResponse, VoteRequest, VoteResponse},
};
use tokio::{
    sync::{Mutex, RwLock},
    time::Instant,
};

use super::{
    Raft, Types,
    disk::{Disk, DiskError, put},
    promise::Promise,
};

/// Where the longest lease is that was promised, milliseconds.
pub(super) const PROMISE: &str = "promise";

/// See the module.
#[derive(Clone)]
pub(crate) struct Voter {
    raft: Raft,
    disk: Disk,
    /// What every lead waits for a leader that does not say how long.
    least: Duration,
    promise: Arc<Mutex<Promise>>,
    /// Shared by messages, held alone by votes.
    turn: Arc<RwLock<()>>,
}

impl Voter {
    /// The voter on `disk`, which `is_fresh` when it never voted.
    pub(super) fn new(
        raft: Raft,
        disk: Disk,
        least: Duration,
        is_fresh: bool,
    ) -> Result<Self, DiskError> {
        let stored = disk.get(PROMISE)?.map_or(least, Duration::from_millis);
        let promise = match is_fresh {
            true => Promise::first(least),
            false => Promise::again(stored.max(least), Instant::now()),
        };
        Ok(Self {
            raft,
            disk,
            least,
            promise: Arc::new(Mutex::new(promise)),
            turn: Arc::default(),
        })
    }

    /// For how long it votes for nobody.
    pub(super) async fn is_bound_for(&self) -> Duration {
        self.promise.lock().await.left(Instant::now())
    }

    /// Promises to vote for nobody for `lease`.
    async fn give(&self, lease: Duration) -> Result<(), DiskError> {
        let mut promise = self.promise.lock().await;
        if promise.must_write(lease, Instant::now()) {
            let ms = u64::try_from(lease.as_millis()).unwrap_or(u64::MAX);
            self.disk.write(vec![put(PROMISE, &ms)?]).await?;
            promise.written(lease);
        }
        promise.give(lease, Instant::now());
        Ok(())
    }

    /// Takes entries or a heartbeat of a leader that asks for a lease, or does not say for which.
    pub(crate) async fn append(
        &self,
        message: AppendEntriesRequest<Types>,
        asked: Option<Duration>,
    ) -> Result<Result<AppendEntriesResponse<u64>, RaftError<u64>>, DiskError> {
        let lease = asked.unwrap_or(self.least).max(self.least);
        let _turn = self.turn.read().await;
        // A leader whose term is over gets no promise: it would keep this lead from electing the next one.
        let known = self.raft.metrics().borrow().vote;
        if message.vote >= known
            && let Err(error) = self.give(lease).await
        {
            // As when Raft itself cannot write: the database takes nothing any more until it is opened again.
            tracing::error!(%error, "a promise cannot be written");
            let _ = self.raft.shutdown().await;
            return Err(error);
        }
        Ok(self.raft.append_entries(message).await)
    }

    /// Votes for a candidate, unless it promised not to.
    pub(crate) async fn vote(
        &self,
        request: VoteRequest<u64>,
    ) -> Result<VoteResponse<u64>, RaftError<u64>> {
        let _turn = self.turn.write().await;
        if self.is_bound_for().await.is_zero() {
            return self.raft.vote(request).await;
        }
        let own = self.raft.with_raft_state(|state| *state.vote_ref()).await?;
        Ok(VoteResponse::new(own, None, false))
    }

    /// Stands for election if it `may`, which includes that it votes for itself.
    pub(super) async fn elect(&self, may: impl Future<Output = bool>) -> Result<bool, Fatal<u64>> {
        let _turn = self.turn.write().await;
        let may = self.is_bound_for().await.is_zero() && may.await;
        if may {
            self.raft.trigger().elect().await?;
        }
        Ok(may)
    }
}
