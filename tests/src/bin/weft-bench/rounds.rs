//! Interleaving: every case in every round, each round in another order, so that what disturbs the machine
//! disturbs all of them alike. What is compared is measured again where the hypervisor stole its time.

use std::time::Duration;

use anyhow::{Context, Result};
use weft_tests::steal::CpuTime;

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
    /// As many measurements again as there are.
    fn repeats(self, metrics: &[Metric]) -> Repeats {
        Repeats::new(self.count * pairs(metrics).count() as u32)
    }

    pub(crate) fn each(self, mut round: impl FnMut(usize) -> Result<()>) -> Result<()> {
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
        let mut repeats = self.repeats(metrics);
        self.each(|round| {
            for (metric, family) in pairs(metrics) {
                let values = repeats.undisturbed(|| {
                    let turn = |turn| &cases[(round + turn) % cases.len()];
                    (0..cases.len())
                        .map(turn)
                        .map(|case| Ok((case.name, case.measure(metric, family, self.time)?)))
                        .collect::<Result<Vec<_>>>()
                })?;
                for (case, value) in values {
                    let Some(value) = value else { continue };
                    let series = Series {
                        metric: metric.name(),
                        family,
                        case,
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
        let mut repeats = self.repeats(metrics);
        self.each(|round| {
            for (metric, family) in pairs(metrics) {
                for turn in 0..watched.len() {
                    let Watched { case, programs } = &watched[(round + turn) % watched.len()];
                    let runs = || programs.iter().map(|(_, program)| program.runs());
                    let (before, after) = repeats.undisturbed(|| {
                        let before = runs().collect::<Result<Vec<_>>>()?;
                        case.measure(metric, family, self.time)?;
                        Ok((before, runs().collect::<Result<Vec<_>>>()?))
                    })?;
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

fn cpu_time() -> Result<CpuTime> {
    CpuTime::now().context("failed to read the time that was stolen")
}

/// Above this share of the CPU time, a comparison says more of the neighbours than of what it compares.
const MUCH: f64 = 0.03;

/// How often something may be measured again because time was stolen.
#[derive(Debug)]
pub(crate) struct Repeats(u32);

impl Repeats {
    /// So many are left.
    pub(crate) const fn new(left: u32) -> Self {
        Self(left)
    }

    /// Measures, and again while too much time was stolen and repeats are left. Whether a result counts does not
    /// depend on what it is.
    pub(crate) fn undisturbed<T>(&mut self, mut measure: impl FnMut() -> Result<T>) -> Result<T> {
        loop {
            let before = cpu_time()?;
            let measured = measure()?;
            let stolen = before.stolen_until(cpu_time()?);
            if stolen <= MUCH || self.0 == 0 {
                return Ok(measured);
            }
            self.0 -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_repeats_left_what_was_measured_counts() {
        let mut times = 0;
        let mut repeats = Repeats(0);
        repeats
            .undisturbed(|| {
                times += 1;
                Ok(())
            })
            .unwrap();
        assert_eq!(times, 1);
    }
}
