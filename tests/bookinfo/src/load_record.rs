//! What a load saw: counts per second and in all, and the longest time without a success.

use std::{collections::BTreeMap, mem, time::Duration};

use serde::Serialize;

/// How many failures are kept one by one.
const KEPT: usize = 50;

/// What came of one request.
#[derive(Clone, Debug)]
pub(crate) struct Outcome {
    /// When it was sent, since the start.
    pub(crate) sent: Duration,
    /// When it ended, since the start.
    pub(crate) ended: Duration,
    /// Who served it, or why it failed.
    pub(crate) result: Result<Vec<String>, String>,
}

/// Counts of one second, or of all.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Counts {
    /// Requests answered well.
    pub(crate) ok: u64,
    /// Requests failed.
    pub(crate) failed: u64,
    /// The longest time without a success that ended here, milliseconds.
    pub(crate) gap_ms: u64,
    /// The slowest success, milliseconds.
    pub(crate) slowest_ms: u64,
    /// How often each place served.
    pub(crate) served: BTreeMap<String, u64>,
    /// Failures by reason.
    pub(crate) failures: BTreeMap<String, u64>,
}

/// A failed request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Failed {
    /// When it was sent, milliseconds since the start.
    pub(crate) sent_ms: u64,
    /// How long it took to fail, milliseconds.
    pub(crate) took_ms: u64,
    /// Why.
    pub(crate) reason: String,
}

/// The sum of a load.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Sum {
    /// All counts.
    #[serde(flatten)]
    pub(crate) counts: Counts,
    /// How long it lasted, milliseconds.
    pub(crate) lasted_ms: u64,
    /// The first failures.
    pub(crate) first_failures: Vec<Failed>,
}

/// Everything seen so far.
#[derive(Debug, Default)]
pub(crate) struct Record {
    second: Counts,
    all: Counts,
    last_success: Duration,
    first_failures: Vec<Failed>,
}

impl Record {
    /// Counts one request.
    pub(crate) fn add(&mut self, outcome: Outcome) {
        let took_ms = millis(outcome.ended.saturating_sub(outcome.sent));
        let gap_ms = millis(outcome.ended.saturating_sub(self.last_success));
        if outcome.result.is_ok() {
            self.last_success = self.last_success.max(outcome.ended);
        } else if let Err(reason) = &outcome.result
            && self.first_failures.len() < KEPT
        {
            self.first_failures.push(Failed {
                sent_ms: millis(outcome.sent),
                took_ms,
                reason: reason.clone(),
            });
        }
        for counts in [&mut self.second, &mut self.all] {
            match &outcome.result {
                Ok(servers) => {
                    counts.ok += 1;
                    counts.gap_ms = counts.gap_ms.max(gap_ms);
                    counts.slowest_ms = counts.slowest_ms.max(took_ms);
                    for server in servers {
                        *counts.served.entry(server.clone()).or_default() += 1;
                    }
                }
                Err(reason) => {
                    counts.failed += 1;
                    *counts.failures.entry(reason.clone()).or_default() += 1;
                }
            }
        }
    }

    /// The counts since this was asked last.
    pub(crate) fn take_second(&mut self) -> Counts {
        mem::take(&mut self.second)
    }

    /// Everything, with the time since the last success as a gap.
    pub(crate) fn sum(mut self, lasted: Duration) -> Sum {
        let open = millis(lasted.saturating_sub(self.last_success));
        self.all.gap_ms = self.all.gap_ms.max(open);
        Sum {
            counts: self.all,
            lasted_ms: millis(lasted),
            first_failures: self.first_failures,
        }
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(sent_ms: u64, ended_ms: u64, result: Result<&str, &str>) -> Outcome {
        Outcome {
            sent: Duration::from_millis(sent_ms),
            ended: Duration::from_millis(ended_ms),
            result: result
                .map(|place| vec![place.to_owned()])
                .map_err(str::to_owned),
        }
    }

    #[test]
    fn a_gap_lasts_from_one_success_to_the_next() {
        let mut record = Record::default();
        record.add(outcome(0, 10, Ok("a")));
        record.add(outcome(20, 30, Err("refused")));
        record.add(outcome(300, 410, Ok("b")));
        record.add(outcome(400, 420, Ok("b")));
        let second = record.take_second();
        assert_eq!((second.ok, second.failed, second.gap_ms), (3, 1, 400));
        assert_eq!(second.slowest_ms, 110);
        assert_eq!(
            second.served,
            BTreeMap::from([("a".into(), 1), ("b".into(), 2)])
        );
        assert_eq!(second.failures, BTreeMap::from([("refused".into(), 1)]));
        assert_eq!(record.take_second(), Counts::default());
    }

    #[test]
    fn a_gap_that_is_still_open_counts_in_the_sum() {
        let mut record = Record::default();
        record.add(outcome(0, 100, Ok("a")));
        record.add(outcome(150, 160, Err("refused")));
        let sum = record.sum(Duration::from_millis(900));
        assert_eq!(sum.counts.gap_ms, 800);
        let failed = Failed {
            sent_ms: 150,
            took_ms: 10,
            reason: "refused".into(),
        };
        assert_eq!(sum.first_failures, [failed]);
    }

    #[test]
    fn answers_that_overtake_each_other_make_no_gap() {
        let mut record = Record::default();
        record.add(outcome(0, 500, Ok("a")));
        record.add(outcome(0, 400, Ok("a")));
        assert_eq!(record.sum(Duration::from_millis(500)).counts.gap_ms, 500);
    }
}
