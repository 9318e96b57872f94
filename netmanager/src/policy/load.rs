//! `least_loaded`: weights that even out the reported load.
//!
//! Once a round each weight is multiplied by `(mean / load) ^ 1/4`: what is loaded above the mean gets less, and
//! only equal loads are at rest. Weights in proportion to free room would be simpler and swing without end
//! once a service is busy: what was avoided is idle by the next report and draws everything. This step is stable
//! at any load while at most five rounds pass between a change of the shares and the report that shows it
//! (a delayed integrator of gain g and delay d is stable for g < 2 sin(pi / (4d + 2))).
//!
//! A load below [`IDLE`] counts as that, and differences within [`ALIKE`] as none, so that a service that
//! idles shares equally. A backend that nobody reports has the mean weight; when nobody reports any, all are equal.

use std::collections::{BTreeMap, BTreeSet};

use super::Candidate;

/// From here on a backend is saturated, percent of what it asked for ...
pub const SATURATED: u16 = 90;
/// ... until it is down here again.
pub const EASED: u16 = 60;
/// A load below this counts as this, percent.
pub const IDLE: u16 = 10;
/// Loads that differ from the mean by no more than this many percent of it count as equal.
pub const ALIKE: f64 = 0.10;
/// How strongly one round follows the load.
const GAIN: f64 = 0.25;
/// No weight is this many times above or below the mean.
const STEEPEST: f64 = 8.0;

/// Brings the set of saturated backends up to date.
pub(super) fn note_saturated(candidates: &[Candidate], saturated: &mut BTreeSet<u128>) {
    *saturated = candidates
        .iter()
        .filter(|candidate| {
            let edge = if saturated.contains(&candidate.identity) {
                EASED + 1
            } else {
                SATURATED
            };
            candidate.load.is_some_and(|load| load >= edge)
        })
        .map(|candidate| candidate.identity)
        .collect();
}

/// The weights of a service's backends; the mean is 1.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Weights {
    round: u64,
    of: BTreeMap<u128, f64>,
}

impl Weights {
    /// One weight per candidate; a new `round` makes one step.
    pub(super) fn follow(&mut self, candidates: &[Candidate], round: u64) -> Vec<f64> {
        let loads: BTreeMap<u128, f64> = candidates
            .iter()
            .filter_map(|candidate| {
                let load = candidate.load?.max(IDLE);
                Some((candidate.identity, f64::from(load)))
            })
            .collect();
        self.of.retain(|identity, _| loads.contains_key(identity));
        if std::mem::replace(&mut self.round, round) != round && !loads.is_empty() {
            self.step(&loads);
        }
        candidates
            .iter()
            .map(|candidate| self.of.get(&candidate.identity).copied().unwrap_or(1.0))
            .collect()
    }

    fn step(&mut self, loads: &BTreeMap<u128, f64>) {
        let mean = loads.values().sum::<f64>() / loads.len() as f64;
        for (identity, load) in loads {
            let weight = self.of.entry(*identity).or_insert(1.0);
            if (load - mean).abs() > ALIKE * mean {
                *weight *= (mean / load).powf(GAIN);
            }
        }
        let mean = self.of.values().sum::<f64>() / self.of.len() as f64;
        for weight in self.of.values_mut() {
            *weight = (*weight / mean).clamp(1.0 / STEEPEST, STEEPEST);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;

    fn candidates(loads: &[Option<u16>]) -> Vec<Candidate> {
        let numbered = loads.iter().zip(1u32..);
        numbered
            .map(|(&load, number)| Candidate {
                index: number,
                identity: number.into(),
                load,
                ..Candidate::default()
            })
            .collect()
    }

    /// The loads, percent, that `weights` bring about when `demand` is shared among `capacities`.
    fn loads(weights: &[f64], capacities: &[f64], demand: f64) -> Vec<f64> {
        let sum: f64 = weights.iter().sum();
        let shares = weights.iter().zip(capacities);
        shares
            .map(|(weight, capacity)| 100.0 * demand * weight / sum / capacity)
            .collect()
    }

    #[test]
    fn nothing_is_weighed_without_a_report_and_within_the_noise() {
        let cases: [&[Option<u16>]; 4] = [
            &[None, None],
            &[Some(50), Some(55)],
            &[Some(0), Some(10)],
            &[Some(70), None],
        ];
        for loads in cases {
            let mut weights = Weights::default();
            for round in 1..20 {
                assert_eq!(
                    weights.follow(&candidates(loads), round),
                    [1.0, 1.0],
                    "{loads:?}"
                );
            }
        }
    }

    #[test]
    fn a_round_is_one_step_and_silence_forgets_the_weights() {
        let mut weights = Weights::default();
        let uneven = candidates(&[Some(80), Some(20)]);
        let first = weights.follow(&uneven, 1);
        assert!(first[0] < 0.9 && first[1] > 1.1, "{first:?}");
        assert_eq!(weights.follow(&uneven, 1), first, "the same round");
        assert!(weights.follow(&uneven, 2)[0] < first[0]);
        assert_eq!(weights.follow(&candidates(&[None, None]), 2), [1.0, 1.0]);
        assert_eq!(weights.follow(&uneven, 2), [1.0, 1.0], "nothing is left");
    }

    #[test]
    fn a_weight_is_never_more_than_eight_times_the_mean_apart() {
        let mut weights = Weights::default();
        let mut last = Vec::new();
        for round in 1..200 {
            last = weights.follow(&candidates(&[Some(500), Some(10), Some(10)]), round);
        }
        assert!(last[0] >= 1.0 / STEEPEST && last[1] <= STEEPEST, "{last:?}");
    }

    #[test]
    fn saturation_begins_high_and_ends_low() {
        let mut saturated = BTreeSet::new();
        for (load, want) in [(89, 0), (90, 1), (75, 1), (61, 1), (60, 0), (89, 0)] {
            note_saturated(&candidates(&[Some(load)]), &mut saturated);
            assert_eq!(saturated.len(), want, "{load}");
        }
        note_saturated(&candidates(&[Some(100)]), &mut saturated);
        note_saturated(&candidates(&[None]), &mut saturated);
        assert_eq!(saturated.len(), 0, "nobody says so any more");
    }

    proptest! {
        #[test]
        fn loads_meet_and_stay_together_although_reports_are_late(
            capacities in prop::collection::vec(1.0f64..4.0, 2..12),
            use_of_all in 0.3f64..0.98,
            delay in 0usize..=4,
        ) {
            let demand = use_of_all * capacities.iter().sum::<f64>();
            let mut weights = Weights::default();
            let mut now = vec![1.0; capacities.len()];
            let mut reports = VecDeque::from(vec![loads(&now, &capacities, demand); delay]);
            for round in 1..=120 {
                reports.push_back(loads(&now, &capacities, demand));
                let seen = reports.pop_front().unwrap();
                let reported: Vec<Option<u16>> = seen.iter().map(|load| Some(load.round() as u16)).collect();
                now = weights.follow(&candidates(&reported), round);
                if round > 60 {
                    let real = loads(&now, &capacities, demand);
                    let mean = real.iter().sum::<f64>() / real.len() as f64;
                    for load in &real {
                        prop_assert!((load - mean).abs() <= 0.2 * mean, "round {round}: {real:?}");
                    }
                }
            }
        }
    }
}
