//! What this lead hands on to the leader, many requests in one message: changes that come at the same time, and what was
//! asked about the same entry.
//!
//! Only changes with a key travel together: a message whose answer is lost is sent again, and each of them is carried
//! out once.

use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
};

use control_core::command::Command;
use futures::{
    FutureExt,
    future::{BoxFuture, Shared},
};
use tokio::{
    sync::{mpsc, oneshot},
    task::JoinSet,
};

use crate::{
    gather::{QUEUE, Size, gather, share},
    lead::{ANSWER, ASK, Answer, Ask, AskError},
    raft::{Member, network::Network, propose::ProposeError},
};

type Answered = Result<Answer, AskError>;
type Asked = Shared<BoxFuture<'static, Answered>>;

/// By leader and entry.
type Questions = Mutex<BTreeMap<(String, u64), Asked>>;

struct Job {
    leader: Member,
    commands: Vec<Command>,
    size: Size,
    reply: oneshot::Sender<Answered>,
}

/// See the module.
pub(crate) struct Courier {
    network: Network,
    jobs: mpsc::Sender<Job>,
    /// Questions under way about what the control loop made of an entry.
    planned: Questions,
}

impl Courier {
    /// A courier, and the task that it needs.
    pub(crate) fn new(network: Network) -> (Self, impl Future<Output = ()> + Send) {
        let (jobs, queue) = mpsc::channel(QUEUE);
        let courier = Self {
            network: network.clone(),
            jobs,
            planned: Mutex::default(),
        };
        (courier, run(network, queue))
    }

    /// Has `commands`, each with a key, proposed by `leader`.
    pub(crate) async fn propose(&self, leader: &Member, commands: Vec<Command>) -> Answered {
        let (reply, answer) = oneshot::channel();
        let job = Job {
            leader: leader.clone(),
            size: Size::of(&commands),
            commands,
            reply,
        };
        let stopped = || AskError::from(ProposeError::Stopped);
        self.jobs.send(job).await.map_err(|_| stopped())?;
        answer.await.map_err(|_| stopped())?
    }

    /// Asks `leader` which entry shows what came of entry `index`.
    pub(crate) async fn planned(&self, leader: &Member, index: u64) -> Answered {
        let key = (leader.name.clone(), index);
        let asked = {
            let mut planned = self.planned.lock().unwrap_or_else(PoisonError::into_inner);
            let ask = || {
                let (network, leader) = (self.network.clone(), leader.clone());
                let asked = async move { ask(&network, &leader, Ask::Planned { index }).await };
                asked.boxed().shared()
            };
            planned.entry(key.clone()).or_insert_with(ask).clone()
        };
        let _over = Over(&self.planned, key);
        asked.await
    }
}

/// A question that is answered, or that one asker no longer waits for: who asks next asks anew.
struct Over<'a>(&'a Questions, (String, u64));

impl Drop for Over<'_> {
    fn drop(&mut self) {
        let mut questions = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        questions.remove(&self.1);
    }
}

async fn run(network: Network, mut queue: mpsc::Receiver<Job>) {
    let mut under_way = JoinSet::new();
    loop {
        tokio::select! {
            first = queue.recv() => {
                let Some(first) = first else { return };
                let jobs = gather(first, &mut queue, |job| job.size).await;
                let network = network.clone();
                under_way.spawn(async move { carry(&network, jobs).await });
            }
            Some(_) = under_way.join_next() => {}
        }
    }
}

async fn carry(network: &Network, jobs: Vec<Job>) {
    let mut commands = Vec::new();
    let mut waiting = Vec::new();
    let mut leader = None;
    for job in jobs {
        waiting.push((job.commands.len(), job.reply));
        commands.extend(job.commands);
        // The last one knows best; who does not lead says so.
        leader = Some(job.leader);
    }
    let Some(leader) = leader else { return };
    let done = match ask(network, &leader, Ask::Propose(commands)).await {
        Ok(Answer::Done(done)) => Ok(done),
        Ok(_) => Err(ProposeError::Stopped.into()),
        Err(error) => Err(error),
    };
    for (reply, own) in share(waiting, done) {
        // An asker that went away needs no answer.
        let _ = reply.send(own.map(Answer::Done));
    }
}

/// Asks; an answer that does not come is as if nobody led: it is asked again.
async fn ask(network: &Network, leader: &Member, ask: Ask) -> Answered {
    match network.post(leader, ASK, &ask, ANSWER).await {
        Ok(answer) => answer,
        Err(error) => {
            tracing::debug!(%error, leader = leader.name, "the leader did not answer");
            Err(ProposeError::NoMajority.into())
        }
    }
}
