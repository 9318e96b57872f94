//! A follower that takes its time.

use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

use bytes::Bytes;
use control_core::command::{Batch, Command};
use http::{Request, StatusCode};
use openraft::{CommittedLeaderId, Entry, EntryPayload, error::RaftError};
use tokio::time::timeout;

use super::*;
use crate::{
    dial::DialError,
    raft::{Pace, SharedBatch, Timers, decode},
    world::{Boxed, Wire},
};

const LIMIT: Duration = Duration::from_millis(250);

fn log(index: u64) -> LogId<u64> {
    LogId::new(CommittedLeaderId::new(3, 1), index)
}

/// The entries behind `prev` up to `last`, so large that they may take seconds.
fn message(prev: Option<u64>, last: u64) -> Message {
    let first = prev.map_or(0, |prev| prev + 1);
    let large = Command::RevokeCertificate {
        holder: "x".repeat(64 << 10),
        certificate: None,
    };
    let batch = Batch {
        log_time_ms: 0,
        commands: vec![large],
    };
    let batch = SharedBatch::from(batch);
    let entry = |index| Entry {
        log_id: log(index),
        payload: EntryPayload::Normal(batch.clone()),
    };
    Message {
        vote: Vote::new_committed(3, 1),
        prev_log_id: prev.map(log),
        leader_commit: None,
        entries: (first..=last).map(entry).collect(),
    }
}

/// See the module.
#[derive(Debug)]
struct Slow {
    /// How long entries take to get there, and into its log.
    takes: Duration,
    /// Whether it forgets what it wrote.
    forgets: AtomicBool,
    last: Mutex<Option<LogId<u64>>>,
    /// Of every message: the entry before it, and how many there are in it.
    seen: Mutex<Vec<(Option<u64>, usize)>>,
}

impl Slow {
    fn new(takes: Duration, last: Option<u64>) -> Arc<Self> {
        Arc::new(Self {
            takes,
            forgets: AtomicBool::new(false),
            last: Mutex::new(last.map(log)),
            seen: Mutex::default(),
        })
    }

    fn seen(&self) -> Vec<(Option<u64>, usize)> {
        std::mem::take(&mut self.seen.lock().unwrap())
    }
}

impl Wire for Slow {
    fn exchange(
        &self,
        _: &str,
        _: SocketAddr,
        request: Request<Bytes>,
    ) -> Boxed<'_, Result<(StatusCode, Bytes), DialError>> {
        Box::pin(async move {
            let message: Message = decode(request.body()).unwrap();
            let (prev, count) = (message.prev_log_id, message.entries.len());
            let seen = (prev.map(|prev| prev.index), count);
            self.seen.lock().unwrap().push(seen);
            if count > 0 {
                sleep(self.takes).await;
            }
            let mut last = self.last.lock().unwrap();
            let answer = match prev <= *last {
                true => {
                    let end = message.entries.last().map(|entry| entry.log_id);
                    if !self.forgets.load(Ordering::Relaxed) {
                        *last = end.max(*last);
                    }
                    AppendEntriesResponse::Success
                }
                false => AppendEntriesResponse::Conflict,
            };
            let answer: Result<AppendEntriesResponse<u64>, RaftError<u64>> = Ok(answer);
            Ok((StatusCode::OK, encode(&answer).unwrap().into()))
        })
    }
}

fn link(follower: &Arc<Slow>) -> Link {
    let network = Network::new(follower.clone(), Pace::new(Timers::default()));
    let member = Member::new("b", "127.0.0.1:1".parse().unwrap());
    Link {
        peer: network.peer(2, &member),
        sent: None,
    }
}

/// Asks as openraft has it; `None` where the call was given up.
async fn ask(link: &mut Link, message: &Message) -> Option<Answer> {
    timeout(LIMIT, link.append(message.clone(), LIMIT))
        .await
        .ok()
}

#[tokio::test(start_paused = true)]
async fn entries_go_once_and_heartbeats_pass_them() {
    let follower = Slow::new(Duration::from_millis(1000), Some(7));
    let mut link = link(&follower);
    let message = message(Some(7), 9);
    let mut calls = 0;
    loop {
        calls += 1;
        match ask(&mut link, &message).await.unwrap().unwrap() {
            AppendEntriesResponse::PartialSuccess(at) => assert_eq!(at, Some(log(7))),
            answer => {
                assert_eq!(answer, AppendEntriesResponse::Success);
                break;
            }
        }
    }
    assert!(calls > 2);
    let mut want = vec![(Some(7), 0); calls - 1];
    want.insert(0, (Some(7), 2));
    // Said again of now.
    want.push((Some(9), 0));
    assert_eq!(follower.seen(), want);
}

#[tokio::test(start_paused = true)]
async fn what_is_answered_in_time_is_asked_once() {
    let follower = Slow::new(Duration::from_millis(100), Some(7));
    let mut link = link(&follower);
    for (message, want) in [
        (message(Some(7), 9), AppendEntriesResponse::Success),
        (message(Some(20), 22), AppendEntriesResponse::Conflict),
        (message(Some(9), 10), AppendEntriesResponse::Success),
    ] {
        assert_eq!(ask(&mut link, &message).await.unwrap().unwrap(), want);
        let prev = message.prev_log_id.map(|prev| prev.index);
        assert_eq!(follower.seen(), [(prev, message.entries.len())]);
    }
}

#[tokio::test(start_paused = true)]
async fn the_first_entries_go_once_although_every_call_is_given_up() {
    let follower = Slow::new(Duration::from_millis(1000), None);
    let mut link = link(&follower);
    let message = message(None, 2);
    let mut calls = 0;
    let answer = loop {
        calls += 1;
        if let Some(answer) = ask(&mut link, &message).await {
            break answer.unwrap();
        }
    };
    assert_eq!(answer, AppendEntriesResponse::Success);
    assert!(calls > 2);
    let seen = follower.seen();
    let entries = seen.iter().filter(|(_, count)| *count > 0).count();
    assert_eq!(entries, 1, "{seen:?}");
}

#[tokio::test(start_paused = true)]
async fn entries_that_came_since_go_after_those_under_way() {
    let follower = Slow::new(Duration::from_millis(300), Some(7));
    let mut link = link(&follower);
    let first = ask(&mut link, &message(Some(7), 9)).await.unwrap();
    assert_eq!(
        first.unwrap(),
        AppendEntriesResponse::PartialSuccess(Some(log(7)))
    );
    let mut prev = 7;
    loop {
        match ask(&mut link, &message(Some(prev), 12)).await.unwrap() {
            Ok(AppendEntriesResponse::PartialSuccess(Some(at))) => prev = at.index,
            answer => break assert_eq!(answer.unwrap(), AppendEntriesResponse::Success),
        }
    }
    let seen = follower.seen().into_iter();
    let entries: Vec<_> = seen.filter(|(_, count)| *count > 0).collect();
    assert_eq!(entries, [(Some(7), 2), (Some(9), 3)]);
}

#[tokio::test(start_paused = true)]
async fn who_lost_what_it_acknowledged_gets_it_again() {
    let follower = Slow::new(Duration::from_millis(300), Some(7));
    follower.forgets.store(true, Ordering::Relaxed);
    let mut link = link(&follower);
    let message = message(Some(7), 9);
    let partial = AppendEntriesResponse::PartialSuccess(Some(log(7)));
    let answer = loop {
        match ask(&mut link, &message).await.unwrap() {
            Ok(answer) if answer == partial => {}
            answer => break answer,
        }
    };
    assert!(matches!(answer, Err(RPCError::Network(_))), "{answer:?}");
    follower.forgets.store(false, Ordering::Relaxed);
    while ask(&mut link, &message).await.unwrap().unwrap() == partial {}
    let entries = follower.seen().iter().filter(|(_, it)| *it > 0).count();
    assert_eq!(entries, 2);
}

#[tokio::test(start_paused = true)]
async fn entries_of_another_place_take_the_place_of_those_under_way() {
    let follower = Slow::new(Duration::from_millis(1000), Some(9));
    let mut link = link(&follower);
    ask(&mut link, &message(Some(7), 9)).await.unwrap().unwrap();
    ask(&mut link, &message(Some(9), 11))
        .await
        .unwrap()
        .unwrap();
    let mut other = message(Some(9), 11);
    other.vote = Vote::new_committed(4, 1);
    ask(&mut link, &other).await.unwrap().unwrap();
    let seen = follower.seen().into_iter();
    let entries: Vec<_> = seen.filter(|(_, count)| *count > 0).collect();
    assert_eq!(entries, [(Some(7), 2), (Some(9), 2), (Some(9), 2)]);
    sleep(Duration::from_secs(5)).await;
    // Who waits for them no more takes them back.
    assert_eq!(*follower.last.lock().unwrap(), Some(log(11)));
}

#[tokio::test(start_paused = true)]
async fn entries_that_are_lost_are_sent_again() {
    let follower = Slow::new(Duration::from_secs(3600), Some(7));
    let mut link = link(&follower);
    let message = message(Some(7), 9);
    for round in 1..=2 {
        let answer = loop {
            match ask(&mut link, &message).await {
                Some(Ok(answer)) => {
                    let partial = AppendEntriesResponse::PartialSuccess(Some(log(7)));
                    assert_eq!(answer, partial);
                }
                Some(Err(error)) => break error,
                None => panic!("the heartbeats are answered"),
            }
        };
        assert!(matches!(answer, RPCError::Network(_)), "{answer}");
        let entries = follower.seen().iter().filter(|(_, it)| *it > 0).count();
        assert_eq!(entries, 1, "round {round}");
    }
}

#[test]
fn what_is_larger_may_take_longer() {
    for (size, want) in [
        (0, 250),
        (16 << 10, 1_250),
        (1 << 20, 64_250),
        (64 << 20, 4_096_250),
    ] {
        let patience = patience(LIMIT, size);
        assert_eq!(patience, Duration::from_millis(want), "{size}");
    }
}
