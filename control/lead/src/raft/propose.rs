//! The proposer: packs the commands that wait into one entry, and gives each asker its own outcomes.
//!
//! What comes while an entry is in flight is the next one, so that the slower the disk, the larger the entries, up to what a
//! lead writes and reads in one go. Two may be in flight, so that one is written here while the other is on its way; but a
//! second that were smaller than the first would cost as much as it, and the next would be smaller still: it waits until
//! as many ask.

use std::{mem, sync::Arc, time::Duration};

use control_core::command::{Batch, Command, Outcome};
use futures::{StreamExt, stream::FuturesUnordered};
use openraft::error::{ClientWriteError, RaftError};
use serde::{Deserialize, Serialize};
use tokio::{
    sync::{mpsc, oneshot},
    time::{Instant, sleep_until, timeout},
};

use super::Raft;
use crate::{
    gather::{GATHER, QUEUE, Size, share},
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

/// What waits to become an entry.
#[derive(Default)]
struct Waiting {
    jobs: Vec<Job>,
    size: Size,
    /// When the first came.
    since: Option<Instant>,
}

impl Waiting {
    fn push(&mut self, job: Job) {
        self.since.get_or_insert_with(Instant::now);
        self.size += job.size;
        self.jobs.push(job);
    }

    /// When it becomes an entry, if nothing else happens; `in_flight` are the askers of those that are.
    fn due(&self, in_flight: &[usize]) -> Option<Instant> {
        let is_full = self.size.is_full();
        let is_due = match in_flight {
            [] => true,
            [one] => is_full || self.jobs.len() >= *one,
            _ => false,
        };
        let since = self.since.filter(|_| is_due)?;
        Some(if is_full { since } else { since + GATHER })
    }
}

async fn run(log: Arc<impl Log>, clock: Clock, mut queue: mpsc::Receiver<Job>) {
    let mut waiting = Waiting::default();
    let mut in_flight = FuturesUnordered::new();
    let mut askers: Vec<usize> = Vec::new();
    loop {
        let due = waiting.due(&askers);
        tokio::select! {
            biased;
            Some(count) = in_flight.next() => {
                let at = askers.iter().position(|it| *it == count);
                at.map(|at| askers.swap_remove(at));
            }
            job = queue.recv(), if !waiting.size.is_full() => match job {
                Some(job) => waiting.push(job),
                None => return,
            },
            () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {
                let jobs = mem::take(&mut waiting).jobs;
                askers.push(jobs.len());
                in_flight.push(carry(&*log, &clock, jobs));
            }
        }
    }
}

/// Commits one entry and tells the askers; how many they were.
async fn carry(log: &impl Log, clock: &Clock, jobs: Vec<Job>) -> usize {
    let count = jobs.len();
    let mut commands = Vec::new();
    let mut waiting = Vec::new();
    for job in jobs {
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
    count
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
        /// How many entries came.
        asked: AtomicU64,
        let_through: Semaphore,
        sizes: Mutex<Vec<usize>>,
        index: AtomicU64,
    }

    impl Log for FakeLog {
        async fn commit(&self, batch: Batch) -> Result<(u64, Vec<Outcome>), ProposeError> {
            self.asked.fetch_add(1, Ordering::Relaxed);
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
            asked: AtomicU64::default(),
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
    async fn a_second_entry_is_in_flight_once_as_many_ask_for_it_and_no_third() {
        let log = fake();
        let (proposer, task) = Proposer::new(log.clone(), Clock::default());
        let task = tokio::spawn(task);
        let mut asking = tokio::task::JoinSet::new();
        let mut ask = |count: usize| {
            for _ in 0..count {
                let proposer = proposer.clone();
                asking.spawn(async move { proposer.propose(vec![Command::Tick]).await });
            }
        };
        let in_flight = || async {
            tokio::time::sleep(10 * GATHER).await;
            log.asked.load(Ordering::Relaxed)
        };
        ask(4);
        assert_eq!(in_flight().await, 1);
        ask(3);
        assert_eq!(in_flight().await, 1);
        ask(1);
        assert_eq!(in_flight().await, 2);
        ask(20);
        assert_eq!(in_flight().await, 2);
        log.let_through.add_permits(1);
        assert_eq!(in_flight().await, 3);
        log.let_through.add_permits(2);
        while let Some(done) = asking.join_next().await {
            assert!(done.unwrap().is_ok());
        }
        assert_eq!(*log.sizes.lock().unwrap(), [4, 4, 20]);
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
