//! The proposer: packs the commands that wait into one entry, and gives each asker its own outcomes.
//!
//! One entry is in flight at a time; what comes meanwhile is the next one, so that the slower the disk, the
//! larger the entries, up to what a lead writes and reads in one go.

use std::{sync::Arc, time::Duration};

use control_core::command::{Batch, Command, Outcome};
use openraft::error::{ClientWriteError, RaftError};
use serde::{Deserialize, Serialize};
use tokio::{
    sync::{mpsc, oneshot},
    time::timeout,
};

use super::Raft;
use crate::{
    gather::{QUEUE, Size, gather, share},
    world::Clock,
};

/// How long an entry may take to be committed before its askers are told that nobody knows.
const COMMIT: Duration = Duration::from_secs(5);

/// Commands that were committed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Done {
    /// The entry's index.
    pub(crate) index: u64,
    /// One per command, in order.
    pub(crate) outcomes: Vec<Outcome>,
}

/// Why commands were not committed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub(crate) enum ProposeError {
    /// Another lead leads; nothing was proposed.
    #[error("this lead is not the leader")]
    NotLeader,
    /// The leader does not hear from a majority; nothing was proposed.
    #[error("the leader hears from no majority of the leads")]
    NoMajority,
    /// Too few leads have room on their disks; nothing was proposed.
    #[error("changes are refused while too few leads have room on their disks: {0}")]
    NoRoom(String),
    /// The entry may or may not be committed later.
    #[error("no majority of the leads confirmed the change in time: it may still happen")]
    Unknown,
    /// The lead is stopping.
    #[error("the lead is stopping")]
    Stopped,
}

struct Job {
    commands: Vec<Command>,
    size: Size,
    reply: oneshot::Sender<Result<Done, ProposeError>>,
}

/// The queue in front of the log.
#[derive(Clone, Debug)]
pub(crate) struct Proposer {
    jobs: mpsc::Sender<Job>,
}

/// What takes a batch and says what came of it: Raft, or a test's log.
pub(crate) trait Log: Send + Sync + 'static {
    /// Commits one entry.
    fn commit(
        &self,
        batch: Batch,
    ) -> impl Future<Output = Result<(u64, Vec<Outcome>), ProposeError>> + Send;
}

impl Log for Raft {
    async fn commit(&self, batch: Batch) -> Result<(u64, Vec<Outcome>), ProposeError> {
        match self.client_write(batch.into()).await {
            Ok(written) => Ok((written.log_id.index, written.data)),
            Err(RaftError::APIError(ClientWriteError::ForwardToLeader(_))) => {
                Err(ProposeError::NotLeader)
            }
            Err(error) => {
                tracing::error!(%error, "raft refused an entry");
                Err(ProposeError::Stopped)
            }
        }
    }
}

impl Proposer {
    /// A proposer, and the task that it needs.
    pub(crate) fn new(log: Arc<impl Log>, clock: Clock) -> (Self, impl Future<Output = ()> + Send) {
        let (jobs, queue) = mpsc::channel(QUEUE);
        (Self { jobs }, run(log, clock, queue))
    }

    /// Proposes `commands`, in one entry, in order.
    pub(crate) async fn propose(&self, commands: Vec<Command>) -> Result<Done, ProposeError> {
        let (reply, answer) = oneshot::channel();
        let job = Job {
            size: Size::of(&commands),
            commands,
            reply,
        };
        let sent = self.jobs.send(job).await;
        sent.map_err(|_| ProposeError::Stopped)?;
        answer.await.map_err(|_| ProposeError::Stopped)?
    }
}

async fn run(log: Arc<impl Log>, clock: Clock, mut queue: mpsc::Receiver<Job>) {
    while let Some(first) = queue.recv().await {
        let mut commands = Vec::new();
        let mut waiting = Vec::new();
        for job in gather(first, &mut queue, |job| job.size).await {
            waiting.push((job.commands.len(), job.reply));
            commands.extend(job.commands);
        }
        let batch = Batch {
            log_time_ms: clock.now_ms(),
            commands,
        };
        let committed = timeout(COMMIT, log.commit(batch)).await;
        let committed = committed.unwrap_or(Err(ProposeError::Unknown));
        let committed = committed.map(|(index, outcomes)| Done { index, outcomes });
        for (reply, own) in share(waiting, committed) {
            // An asker that went away needs no answer.
            let _ = reply.send(own);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    };

    use control_core::command::{Applied, Refusal};
    use tokio::sync::Semaphore;

    use super::*;

    /// Commits when it is let; refuses every command that forgets a cluster.
    struct FakeLog {
        let_through: Semaphore,
        sizes: Mutex<Vec<usize>>,
        index: AtomicU64,
    }

    impl Log for FakeLog {
        async fn commit(&self, batch: Batch) -> Result<(u64, Vec<Outcome>), ProposeError> {
            self.let_through.acquire().await.unwrap().forget();
            self.sizes.lock().unwrap().push(batch.commands.len());
            let outcome = |command: &Command| match command {
                Command::ForgetCluster { cluster, .. } => {
                    Err(Refusal::UnknownCluster(cluster.clone()))
                }
                _ => Ok(Applied::Changed),
            };
            let index = self.index.fetch_add(1, Ordering::Relaxed);
            Ok((index, batch.commands.iter().map(outcome).collect()))
        }
    }

    fn fake() -> Arc<FakeLog> {
        Arc::new(FakeLog {
            let_through: Semaphore::new(0),
            sizes: Mutex::default(),
            index: AtomicU64::new(1),
        })
    }

    #[tokio::test]
    async fn what_waits_together_is_one_entry_and_each_gets_its_own_outcome() {
        let log = fake();
        let (proposer, task) = Proposer::new(log.clone(), Clock::default());
        let task = tokio::spawn(task);
        let forget = Command::ForgetCluster {
            cluster: "edge".parse().unwrap(),
            abandon: false,
        };
        let all = futures::future::join_all((0..100).map(|number| {
            let commands = if number % 2 == 0 {
                vec![Command::Tick, Command::Tick]
            } else {
                vec![forget.clone()]
            };
            proposer.propose(commands)
        }));
        log.let_through.add_permits(1000);
        for (number, done) in all.await.into_iter().enumerate() {
            let outcomes = done.unwrap().outcomes;
            if number % 2 == 0 {
                assert_eq!(outcomes, [Ok(Applied::Changed), Ok(Applied::Changed)]);
            } else {
                assert!(matches!(outcomes[..], [Err(Refusal::UnknownCluster(_))]));
            }
        }
        let sizes = log.sizes.lock().unwrap().clone();
        assert_eq!(sizes.iter().sum::<usize>(), 150);
        assert!(sizes.len() <= 5, "{sizes:?}");
        task.abort();
    }

    #[tokio::test(start_paused = true)]
    async fn an_entry_that_nobody_confirms_is_said_to_be_unknown() {
        let (proposer, task) = Proposer::new(fake(), Clock::default());
        let task = tokio::spawn(task);
        let answer = proposer.propose(vec![Command::Tick]).await;
        assert_eq!(answer, Err(ProposeError::Unknown));
        task.abort();
    }
}
