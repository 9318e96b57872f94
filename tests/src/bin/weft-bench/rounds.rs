//! Interleaving: every case in every round, each round in another order, so that what disturbs the machine
//! disturbs all of them alike.

use std::time::Duration;

use anyhow::Result;

use crate::{
    case::Case,
    figures::{Figures, Series},
    load::{Family, Metric},
    statistics::Program,
};

/// How often and how long.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rounds {
    pub(crate) count: u32,
    /// How long each load lasts in each round.
    pub(crate) time: Duration,
}

/// A case with the programs that its packets meet, each with its name in the result.
#[derive(Debug)]
pub(crate) struct Watched<'a> {
    pub(crate) case: &'a Case,
    pub(crate) programs: Vec<(&'static str, Program)>,
}

impl Rounds {
    fn each(self, mut round: impl FnMut(usize) -> Result<()>) -> Result<()> {
        for number in 0..self.count as usize {
            round(number)?;
            eprintln!("round {} of {}", number + 1, self.count);
        }
        Ok(())
    }

    /// The metrics of every case over each family that it has.
    pub(crate) fn values(
        self,
        cases: &[Case],
        metrics: &[Metric],
        figures: &mut Figures,
    ) -> Result<()> {
        self.each(|round| {
            for (metric, family) in pairs(metrics) {
                for turn in 0..cases.len() {
                    let case = &cases[(round + turn) % cases.len()];
                    let Some(value) = case.measure(metric, family, self.time)? else {
                        continue;
                    };
                    let series = Series {
                        metric: metric.name(),
                        family,
                        case: case.name,
                    };
                    figures.push(series, metric.unit(), value);
                }
            }
            Ok(())
        })
    }

    /// Nanoseconds per packet of every program under each load.
    pub(crate) fn costs(
        self,
        watched: &[Watched<'_>],
        metrics: &[Metric],
        figures: &mut Figures,
    ) -> Result<()> {
        self.each(|round| {
            for (metric, family) in pairs(metrics) {
                for turn in 0..watched.len() {
                    let Watched { case, programs } = &watched[(round + turn) % watched.len()];
                    let runs = || programs.iter().map(|(_, program)| program.runs());
                    let before = runs().collect::<Result<Vec<_>>>()?;
                    case.measure(metric, family, self.time)?;
                    let after = runs().collect::<Result<Vec<_>>>()?;
                    for ((name, _), (before, after)) in
                        programs.iter().zip(before.into_iter().zip(after))
                    {
                        let Some(cost) = after.since(before) else {
                            continue;
                        };
                        let series = Series {
                            metric: metric.name(),
                            family,
                            case: name,
                        };
                        figures.push(series, "ns", cost);
                    }
                }
            }
            Ok(())
        })
    }
}

fn pairs(metrics: &[Metric]) -> impl Iterator<Item = (Metric, Family)> {
    metrics
        .iter()
        .flat_map(|metric| Family::ALL.map(|family| (*metric, family)))
}
