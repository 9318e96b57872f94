//! Commands of several askers that travel as one batch, and to each asker its own part of what came of it.

use std::time::Duration;

use tokio::{sync::mpsc, time::timeout};

use crate::raft::propose::Done;

/// How many askers may wait.
pub(crate) const QUEUE: usize = 4096;
/// How long the first job waits for others.
const GATHER: Duration = Duration::from_millis(1);
/// The most commands in one batch, unless one asker brings more.
const BATCH: usize = 256;

/// The jobs that travel with `first`; `size` is how many commands one brings.
pub(crate) async fn gather<J>(
    first: J,
    queue: &mut mpsc::Receiver<J>,
    size: impl Fn(&J) -> usize,
) -> Vec<J> {
    let mut count = size(&first);
    let mut jobs = vec![first];
    let more = async {
        while count < BATCH {
            let Some(job) = queue.recv().await else { break };
            count += size(&job);
            jobs.push(job);
        }
    };
    // A job that `recv` has taken is pushed before the next await, so a passing deadline loses none.
    let _ = timeout(GATHER, more).await;
    jobs
}

/// To each asker its part of what came of the batch, by how many commands each brought, in order.
pub(crate) fn share<T, E: Clone>(
    waiting: Vec<(usize, T)>,
    committed: Result<Done, E>,
) -> impl Iterator<Item = (T, Result<Done, E>)> {
    let mut left = committed.map(|Done { index, outcomes }| (index, outcomes.into_iter()));
    waiting.into_iter().map(move |(count, asker)| {
        let part = match &mut left {
            Ok((index, outcomes)) => Ok(Done {
                index: *index,
                outcomes: outcomes.by_ref().take(count).collect(),
            }),
            Err(error) => Err(error.clone()),
        };
        (asker, part)
    })
}

#[cfg(test)]
mod tests {
    use control_core::command::{Applied, Refusal};

    use super::*;
    use crate::raft::propose::ProposeError;

    #[test]
    fn each_asker_gets_its_own_outcomes() {
        let refused = Refusal::UnknownCluster("edge".parse().unwrap());
        let outcomes = vec![
            Ok(Applied::Changed),
            Err(refused.clone()),
            Ok(Applied::Unchanged),
        ];
        let done: Result<_, ProposeError> = Ok(Done { index: 7, outcomes });
        let shared: Vec<_> = share(vec![(1, 'a'), (2, 'b')], done).collect();
        let part = |outcomes| Ok(Done { index: 7, outcomes });
        assert_eq!(shared[0], ('a', part(vec![Ok(Applied::Changed)])));
        let rest = vec![Err(refused), Ok(Applied::Unchanged)];
        assert_eq!(shared[1], ('b', part(rest)));
    }

    #[test]
    fn a_failure_is_every_askers() {
        let shared = share(vec![(1, 'a'), (1, 'b')], Err(ProposeError::NotLeader));
        let shared: Vec<_> = shared.collect();
        let failed = Err(ProposeError::NotLeader);
        assert_eq!(shared, [('a', failed.clone()), ('b', failed)]);
    }
}
