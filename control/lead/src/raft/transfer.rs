//! A snapshot on its way to another lead: in parts, and on from where it broke off.
//!
//! ```text
//!  leader: part at 0 --> has it      follower: parts of this snapshot, by its id, one behind the other
//!          part at n --> lost
//!          ... openraft sends the snapshot again ...
//!          part at n --> has it      or, where it has less: it is to go on at m
//!          the last  --> its hash is right, and it is installed
//! ```
//!
//! A snapshot's id holds the SHA-256 of its bytes, so that the same id is the same bytes, whoever sends them.

use std::{
    cmp::Ordering,
    collections::BTreeMap,
    future::Future,
    io::Cursor,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use netmanager_api::identity::fingerprint;
use openraft::{
    RaftNetwork, Snapshot, SnapshotMeta, SnapshotSegmentId, Vote,
    error::{
        Fatal, InstallSnapshotError, NetworkError, RPCError, RaftError, RemoteError,
        ReplicationClosed, SnapshotMismatch, StreamingError,
    },
    network::RPCOption,
    raft::{InstallSnapshotRequest, InstallSnapshotResponse, SnapshotResponse},
};
use tokio::time::sleep;

use super::{CHUNK, Member, Raft, Types};

/// How often a part is sent before openraft is told, which sends the snapshot again a moment later.
const TRIES: u32 = 5;
/// How long before it is sent again.
const AGAIN: Duration = Duration::from_millis(100);

/// Before the hash in an id.
const HASH: &str = " sha256 ";

/// The id of the snapshot `data` up to the entry that `of` names.
pub(super) fn id(of: &str, data: &[u8]) -> String {
    format!("{of}{HASH}{}", fingerprint(data))
}

/// Whether `data` are those that the id was given; one of an older lead says nothing.
fn is_whole(id: &str, data: &[u8]) -> bool {
    id.rsplit_once(HASH)
        .is_none_or(|(_, hash)| hash == fingerprint(data))
}

/// How far the last snapshot got that was sent to each member.
#[derive(Clone, Debug, Default)]
pub(super) struct Sent(Arc<Mutex<BTreeMap<u64, (String, u64)>>>);

impl Sent {
    fn at(&self, to: u64, id: &str) -> u64 {
        let sent = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let known = sent.get(&to).filter(|(known, _)| known == id);
        known.map_or(0, |(_, offset)| *offset)
    }

    fn note(&self, to: u64, id: &str, offset: u64) {
        let mut sent = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        sent.insert(to, (id.to_owned(), offset));
    }
}

/// Where a snapshot goes.
pub(super) struct Way<'a, N> {
    pub(super) network: &'a mut N,
    pub(super) to: u64,
    pub(super) sent: Sent,
    pub(super) option: RPCOption,
}

type Streamed = Result<SnapshotResponse<u64>, StreamingError<Types, Fatal<u64>>>;

impl<N: RaftNetwork<Types>> Way<'_, N> {
    /// Sends a snapshot, from where it broke off the last time; what is under way is dropped with `cancel`.
    pub(super) async fn send(
        self,
        vote: Vote<u64>,
        snapshot: Snapshot<Types>,
        cancel: impl Future<Output = ReplicationClosed>,
    ) -> Streamed {
        tokio::select! {
            sent = self.parts(vote, snapshot) => sent,
            closed = cancel => Err(closed.into()),
        }
    }

    async fn parts(self, vote: Vote<u64>, snapshot: Snapshot<Types>) -> Streamed {
        let Snapshot { meta, snapshot } = snapshot;
        let data = snapshot.into_inner();
        let length = data.len() as u64;
        let mut offset = self.sent.at(self.to, &meta.snapshot_id).min(length);
        let mut failures = 0;
        loop {
            let end = offset.saturating_add(CHUNK).min(length);
            let part = usize::try_from(offset).unwrap_or(usize::MAX)
                ..usize::try_from(end).unwrap_or(usize::MAX);
            let message = InstallSnapshotRequest {
                vote,
                meta: meta.clone(),
                offset,
                data: data[part].to_vec(),
                done: end == length,
            };
            let answer = self.network.install_snapshot(message, self.option.clone());
            match answer.await {
                Ok(answer) if answer.vote > vote || end == length => {
                    self.sent.note(self.to, &meta.snapshot_id, 0);
                    return Ok(SnapshotResponse::new(answer.vote));
                }
                Ok(_) => {
                    failures = 0;
                    offset = end;
                }
                Err(RPCError::RemoteError(remote)) => match remote.source {
                    RaftError::APIError(InstallSnapshotError::SnapshotMismatch(it)) => {
                        failures += 1;
                        if failures >= TRIES {
                            return Err(NetworkError::new(&it).into());
                        }
                        // An older lead says 0.
                        offset = it.expect.offset.min(length);
                    }
                    RaftError::Fatal(source) => {
                        return Err(RemoteError::new(self.to, source).into());
                    }
                },
                Err(error) => {
                    failures += 1;
                    if failures >= TRIES {
                        return Err(match error {
                            RPCError::Timeout(error) => error.into(),
                            RPCError::Unreachable(error) => error.into(),
                            RPCError::Network(error) => error.into(),
                            other => NetworkError::new(&other).into(),
                        });
                    }
                }
            }
            self.sent.note(self.to, &meta.snapshot_id, offset);
            if failures > 0 {
                sleep(AGAIN).await;
            }
        }
    }
}

/// The snapshot that another lead sends, as far as it is here.
#[derive(Debug, Default)]
pub(crate) struct Incoming(tokio::sync::Mutex<Parts>);

#[derive(Debug, Default)]
struct Parts {
    id: String,
    data: Vec<u8>,
}

/// What a part does to what is here.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    /// It belongs behind what is here.
    Takes,
    /// It begins another snapshot.
    Begins,
    /// It does not fit: the next one is to be from there on.
    Expects(u64),
}

impl Parts {
    fn step(&self, id: &str, offset: u64) -> Step {
        let here = self.data.len() as u64;
        match self.id == id {
            true if offset <= here => Step::Takes,
            true => Step::Expects(here),
            false if offset == 0 => Step::Begins,
            false => Step::Expects(0),
        }
    }

    /// What came twice is taken once.
    fn take(&mut self, offset: u64, part: &[u8]) {
        self.data
            .truncate(usize::try_from(offset).unwrap_or(usize::MAX));
        self.data.extend_from_slice(part);
    }
}

type Answer = Result<InstallSnapshotResponse<u64>, RaftError<u64, InstallSnapshotError>>;

fn mismatch(
    meta: &SnapshotMeta<u64, Member>,
    offset: u64,
    expected: u64,
) -> RaftError<u64, InstallSnapshotError> {
    let segment = |offset| SnapshotSegmentId {
        id: meta.snapshot_id.clone(),
        offset,
    };
    RaftError::APIError(InstallSnapshotError::SnapshotMismatch(SnapshotMismatch {
        expect: segment(expected),
        got: segment(offset),
    }))
}

impl Incoming {
    /// Takes a part, and installs the snapshot behind the last one.
    pub(crate) async fn take(&self, raft: &Raft, message: InstallSnapshotRequest<Types>) -> Answer {
        let InstallSnapshotRequest {
            vote,
            meta,
            offset,
            data,
            done,
        } = message;
        let mut parts = self.0.lock().await;
        let own = raft.with_raft_state(|state| *state.vote_ref()).await;
        let own = own.map_err(RaftError::Fatal)?;
        if vote.partial_cmp(&own).is_none_or(Ordering::is_lt) {
            return Ok(InstallSnapshotResponse { vote: own });
        }
        match parts.step(&meta.snapshot_id, offset) {
            Step::Takes => {}
            Step::Begins => {
                *parts = Parts {
                    id: meta.snapshot_id.clone(),
                    data: Vec::new(),
                };
                // What the log may lose for it has to wait from now on.
                let begun = raft.begin_receiving_snapshot().await;
                begun.map_err(fatal)?;
            }
            Step::Expects(expected) => return Err(mismatch(&meta, offset, expected)),
        }
        parts.take(offset, &data);
        if !done {
            return Ok(InstallSnapshotResponse { vote: own });
        }
        let Parts { id, data } = std::mem::take(&mut *parts);
        if !is_whole(&id, &data) {
            tracing::warn!(
                id,
                bytes = data.len(),
                "a snapshot came damaged: it is asked for again"
            );
            return Err(mismatch(&meta, offset, 0));
        }
        let snapshot = Snapshot {
            meta,
            snapshot: Box::new(Cursor::new(data)),
        };
        let installed = raft.install_full_snapshot(vote, snapshot).await;
        let installed = installed.map_err(RaftError::Fatal)?;
        Ok(InstallSnapshotResponse {
            vote: installed.vote,
        })
    }
}

fn fatal<E: std::error::Error>(error: RaftError<u64, E>) -> RaftError<u64, InstallSnapshotError> {
    match error.into_fatal() {
        Some(fatal) => RaftError::Fatal(fatal),
        None => RaftError::Fatal(Fatal::Stopped),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_come_one_behind_the_other_and_what_does_not_fit_is_told_where_to_go_on() {
        let mut parts = Parts::default();
        assert_eq!(parts.step("a", 3), Step::Expects(0));
        assert_eq!(parts.step("a", 0), Step::Begins);
        parts.id = "a".to_owned();
        parts.take(0, b"abc");
        assert_eq!(parts.step("a", 4), Step::Expects(3));
        assert_eq!(parts.step("a", 3), Step::Takes);
        parts.take(3, b"def");
        // Its answer was lost.
        assert_eq!(parts.step("a", 3), Step::Takes);
        parts.take(3, b"def");
        assert_eq!(parts.data, b"abcdef");
        assert_eq!(parts.step("b", 6), Step::Expects(0));
        assert_eq!(parts.step("b", 0), Step::Begins);
    }

    #[test]
    fn a_snapshot_is_whole_where_it_is_what_its_id_says() {
        let id = id("1-1-7", b"data");
        assert!(is_whole(&id, b"data"));
        assert!(!is_whole(&id, b"date"));
        assert!(is_whole("1-1-7", b"date"), "an older lead's says nothing");
    }

    #[test]
    fn a_member_gets_on_with_the_same_snapshot_and_begins_another() {
        let sent = Sent::default();
        sent.note(2, "a", 100);
        for (to, id, want) in [(2, "a", 100), (2, "b", 0), (3, "a", 0)] {
            assert_eq!(sent.at(to, id), want);
        }
    }
}
