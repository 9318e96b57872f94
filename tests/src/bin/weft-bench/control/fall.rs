//! What a leader that is killed (SIGKILL) or drained costs its users: eight writers go on all the while, each with a new
//! application per change and at the next lead when one fails, as `weft apply --lead a,b,c` does.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use tokio::{sync::watch, task::JoinSet, time::timeout};
use weft_tests::leads::{self as weft, Leads, client::Door};

const WRITERS: usize = 8;
/// The rest of a writer after each change, so that the applications stay few.
const PACE: Duration = Duration::from_millis(20);
/// Acknowledgements before something is done to the leader, and after.
const STEADY: usize = 40;
/// How long they may take.
const LIMIT: Duration = Duration::from_secs(60);

/// What came of a kill.
#[derive(Clone, Copy, Debug)]
pub(super) struct Killed {
    /// From the kill to the first acknowledgement of a change that was begun after it.
    pub(super) pause: Duration,
    /// Changes that were acknowledged, before or after, and are not there.
    pub(super) lost: usize,
}

/// An acknowledged change.
#[derive(Clone, Debug)]
struct Done {
    name: String,
    begun: Instant,
    at: Instant,
}

/// Kills the leader, waits for the next acknowledgement, starts it again, and reads everything back from it.
pub(super) async fn kill(leads: &mut Leads, number: u32) -> Result<Killed> {
    let traffic = Traffic::start(leads, &format!("k{number}"));
    traffic.until(|done| done.len() >= STEADY).await?;
    let leader = leads.leader().await?;
    let killed = Instant::now();
    leads.kill(leader)?;
    let dead = Instant::now();
    traffic.until(|done| next(done, dead).is_some()).await?;
    let (before, at) = traffic.count_and(|done| next(done, dead));
    traffic.until(|done| done.len() >= before + STEADY).await?;
    let done = traffic.stop().await;
    leads.restart(leader).await?;
    let there = leads.applications(leader).await?;
    let lost = done.iter().filter(|it| !there.contains(&it.name)).count();
    forget(leads, &done).await?;
    Ok(Killed {
        pause: at.context("an acknowledgement was seen")? - killed,
        lost,
    })
}

/// Drains the leader; the longest time without an acknowledgement, and how long a lease is.
pub(super) async fn drain(leads: &Leads, number: u32) -> Result<(Duration, Duration)> {
    let lease = leads.lease().await?;
    let traffic = Traffic::start(leads, &format!("d{number}"));
    traffic.until(|done| done.len() >= STEADY).await?;
    let asked = Instant::now();
    leads.drain().await?;
    let (before, ()) = traffic.count_and(|_| ());
    traffic.until(|done| done.len() >= before + STEADY).await?;
    let done = traffic.stop().await;
    forget(leads, &done).await?;
    let times: Vec<_> = done.iter().map(|it| it.at).collect();
    Ok((longest_pause(&times, asked), lease))
}

/// Takes away what a trial left, also what nobody acknowledged.
async fn forget(leads: &Leads, done: &[Done]) -> Result<()> {
    let Some(prefix) = done.first().and_then(|it| it.name.split('-').next()) else {
        return Ok(());
    };
    let there = leads.applications(0).await?;
    let is_ours = |name: &&String| name.split('-').next() == Some(prefix);
    leads.delete(there.iter().filter(is_ours)).await
}

/// When the first change was acknowledged of those that were begun after `since`.
fn next(done: &[Done], since: Instant) -> Option<Instant> {
    let begun_after = done.iter().filter(|it| it.begun >= since);
    begun_after.map(|it| it.at).min()
}

/// The longest time between two of `times` that ends after `since`.
fn longest_pause(times: &[Instant], since: Instant) -> Duration {
    let mut sorted = times.to_vec();
    sorted.sort();
    let pairs = sorted.windows(2).filter(|pair| pair[1] >= since);
    pairs
        .map(|pair| pair[1] - pair[0])
        .max()
        .unwrap_or_default()
}

/// Writers, and what was acknowledged to them.
struct Traffic {
    done: watch::Sender<Vec<Done>>,
    failure: watch::Sender<String>,
    stop: watch::Sender<bool>,
    writers: JoinSet<()>,
}

impl Traffic {
    fn start(leads: &Leads, prefix: &str) -> Self {
        let mut traffic = Self {
            done: watch::Sender::default(),
            failure: watch::Sender::default(),
            stop: watch::Sender::default(),
            writers: JoinSet::new(),
        };
        for writer in 0..WRITERS {
            let writer = Writer {
                doors: leads.doors().to_vec(),
                first: writer,
                prefix: format!("{prefix}-{writer}"),
                done: traffic.done.clone(),
                failure: traffic.failure.clone(),
                stop: traffic.stop.subscribe(),
            };
            traffic.writers.spawn(writer.run());
        }
        traffic
    }

    async fn until(&self, mut is_reached: impl FnMut(&[Done]) -> bool) -> Result<()> {
        let mut done = self.done.subscribe();
        let reached = timeout(LIMIT, done.wait_for(|done| is_reached(done))).await;
        reached.map(|_| ()).with_context(|| {
            let failure = self.failure.borrow();
            format!(
                "nothing is acknowledged any more; the last failure: {}",
                *failure
            )
        })
    }

    /// How many are acknowledged, and what `look` says of them.
    fn count_and<T>(&self, look: impl FnOnce(&[Done]) -> T) -> (usize, T) {
        let done = self.done.borrow();
        (done.len(), look(&done))
    }

    /// Ends the writers, each after its change.
    async fn stop(self) -> Vec<Done> {
        self.stop.send_replace(true);
        self.writers.join_all().await;
        self.done.borrow().clone()
    }
}

struct Writer {
    doors: Vec<Door>,
    first: usize,
    prefix: String,
    done: watch::Sender<Vec<Done>>,
    failure: watch::Sender<String>,
    stop: watch::Receiver<bool>,
}

impl Writer {
    async fn run(self) {
        let mut at = self.first;
        let mut connection = None;
        let mut number = 0;
        while !*self.stop.borrow() {
            let name = format!("{}-{number}", self.prefix);
            let begun = Instant::now();
            let written = async {
                let connection = match &mut connection {
                    Some(connection) => connection,
                    none => none.insert(self.doors[at % self.doors.len()].open().await?),
                };
                weft::check(&connection.ask(weft::change(&name, 0)).await?)
            };
            match written.await {
                Ok(()) => {
                    let at = Instant::now();
                    self.done
                        .send_modify(|done| done.push(Done { name, begun, at }));
                    number += 1;
                }
                // The same once more, at the next lead: nobody knows whether it was done.
                Err(error) => {
                    self.failure.send_replace(format!("{error:#}"));
                    connection = None;
                    at += 1;
                }
            }
            tokio::time::sleep(PACE).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_that_was_begun_before_the_kill_says_nothing_of_the_pause() {
        let start = Instant::now();
        let after = |ms| start + Duration::from_millis(ms);
        let done = |begun, at| Done {
            name: String::new(),
            begun: after(begun),
            at: after(at),
        };
        let all = [done(0, 11), done(12, 900), done(13, 800)];
        assert_eq!(next(&all, after(10)), Some(after(800)));
        assert_eq!(next(&all[..1], after(10)), None);
    }

    #[test]
    fn the_longest_pause_is_the_one_that_ends_after_the_question() {
        let start = Instant::now();
        let times = [0, 500, 510, 700, 720].map(|ms| start + Duration::from_millis(ms));
        let pause = |since| longest_pause(&times, start + Duration::from_millis(since));
        assert_eq!(pause(505), Duration::from_millis(190));
        assert_eq!(pause(100), Duration::from_millis(500));
        assert_eq!(pause(800), Duration::ZERO);
    }
}
