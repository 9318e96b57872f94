//! Commands of several askers that travel as one batch, and to each asker its own part of what came of it.

use std::{ops::AddAssign, time::Duration};

use control_core::command::Command;
use tokio::{sync::mpsc, time::timeout};

use crate::raft::{self, propose::Done};

/// How many askers may wait.
pub(crate) const QUEUE: usize = 4096;
/// How long the first job waits for others.
pub(crate) const GATHER: Duration = Duration::from_millis(1);
/// What fills a batch; the last asker's commands may go beyond it.
const BATCH: Size = Size {
    commands: 256,
    bytes: 256 << 10,
};

/// How much a batch is: a lead that writes a large one, or reads it, does nothing else meanwhile.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Size {
    commands: usize,
    bytes: usize,
}

impl Size {
    /// The size of these.
    pub(crate) fn of(commands: &[Command]) -> Self {
        Self {
            commands: commands.len(),
            // What cannot be written is refused where it is to be.
            bytes: commands.iter().filter_map(|it| raft::size(it).ok()).sum(),
        }
    }

    /// Whether it fills a batch.
    pub(crate) fn is_full(self) -> bool {
        self.commands >= BATCH.commands || self.bytes >= BATCH.bytes
    }
}

impl AddAssign for Size {
    fn add_assign(&mut self, other: Self) {
        self.commands += other.commands;
        self.bytes += other.bytes;
    }
}

/// `commands` in pieces that are proposed one after the other.
pub(crate) fn pieces(commands: Vec<Command>) -> Vec<Vec<Command>> {
    let mut pieces: Vec<Vec<Command>> = Vec::new();
    let mut size = Size::default();
    for command in commands {
        let own = Size::of(std::slice::from_ref(&command));
        match pieces.last_mut().filter(|_| !size.is_full()) {
            Some(piece) => piece.push(command),
            None => {
                pieces.push(vec![command]);
                size = Size::default();
            }
        }
        size += own;
    }
    pieces
}

/// The jobs that travel with `first`; `size` is what one brings.
pub(crate) async fn gather<J>(
    first: J,
    queue: &mut mpsc::Receiver<J>,
    size: impl Fn(&J) -> Size,
) -> Vec<J> {
    let mut whole = size(&first);
    let mut jobs = vec![first];
    let more = async {
        while !whole.is_full() {
            let Some(job) = queue.recv().await else { break };
            whole += size(&job);
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

    fn report_like(bytes: usize) -> Command {
        Command::RevokeCertificate {
            holder: "x".repeat(bytes),
            certificate: None,
        }
    }

    #[test]
    fn what_is_too_much_for_one_batch_goes_in_pieces_and_in_order() {
        let large = BATCH.bytes / 2;
        for (sizes, want) in [
            (vec![], vec![]),
            (vec![1; 600], vec![256, 256, 88]),
            (vec![large, large, 1, 1], vec![2, 2]),
            (vec![4 * large, 1, 4 * large, 1], vec![1, 2, 1]),
        ] {
            let commands: Vec<_> = sizes.iter().map(|bytes| report_like(*bytes)).collect();
            let pieces = pieces(commands.clone());
            let lengths: Vec<_> = pieces.iter().map(Vec::len).collect();
            assert_eq!(lengths, want);
            assert_eq!(pieces.concat(), commands);
        }
    }

    #[tokio::test]
    async fn nobody_joins_a_batch_that_is_large_enough() {
        let (jobs, mut queue) = mpsc::channel(8);
        for _ in 0..3 {
            jobs.send(vec![report_like(BATCH.bytes / 2)]).await.unwrap();
        }
        let size = |job: &Vec<Command>| Size::of(job);
        let first = queue.recv().await.unwrap();
        assert_eq!(gather(first, &mut queue, size).await.len(), 2);
        let large = vec![report_like(BATCH.bytes)];
        assert_eq!(gather(large, &mut queue, size).await.len(), 1);
    }

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
