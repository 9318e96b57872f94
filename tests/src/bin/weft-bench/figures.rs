//! Medians, ratios of the same round, and a bootstrap interval of their median.

use serde::Serialize;

/// Resamples of the bootstrap.
const RESAMPLES: usize = 2_000;

/// One line of the result.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Row {
    pub(crate) case: &'static str,
    pub(crate) metric: &'static str,
    pub(crate) unit: &'static str,
    pub(crate) median: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
    /// Median over the rounds of the value by the reference's value in the same round.
    pub(crate) ratio: f64,
    /// Lower end of its bootstrap 95 % interval.
    pub(crate) ratio_low: f64,
}

impl Row {
    /// Sums up `values`, one per round, beside the reference's of the same rounds; neither is empty.
    pub(crate) fn new(
        case: &'static str,
        metric: &'static str,
        unit: &'static str,
        values: &[f64],
        reference: &[f64],
    ) -> Self {
        let ratios: Vec<f64> = values.iter().zip(reference).map(|(a, b)| a / b).collect();
        let sorted = sorted(values);
        Self {
            case,
            metric,
            unit,
            median: median(values),
            min: sorted[0],
            max: sorted[sorted.len() - 1],
            ratio: median(&ratios),
            ratio_low: low(&ratios),
        }
    }
}

fn sorted(values: &[f64]) -> Vec<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted
}

fn median(values: &[f64]) -> f64 {
    let sorted = sorted(values);
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 {
        sorted[middle]
    } else {
        f64::midpoint(sorted[middle - 1], sorted[middle])
    }
}

/// The 2.5th percentile of the medians of resamples; the same for the same values.
fn low(ratios: &[f64]) -> f64 {
    let mut random = Random(0x5eed);
    let mut medians: Vec<f64> = (0..RESAMPLES)
        .map(|_| {
            let resample: Vec<f64> = (0..ratios.len())
                .map(|_| ratios[random.below(ratios.len())])
                .collect();
            median(&resample)
        })
        .collect();
    medians.sort_by(f64::total_cmp);
    medians[RESAMPLES / 40]
}

/// `SplitMix64` (Steele, Lea, Flood 2014).
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^= mixed >> 31;
        usize::try_from(mixed % limit as u64).expect("the remainder is below a usize")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ratio_is_taken_within_its_round() {
        let row = Row::new("c", "m", "u", &[10.0, 40.0, 90.0], &[10.0, 20.0, 30.0]);
        assert_eq!(
            (row.median, row.min, row.max, row.ratio),
            (40.0, 10.0, 90.0, 2.0)
        );
    }

    #[test]
    fn the_interval_is_a_point_where_all_rounds_agree_and_wider_where_they_do_not() {
        let same = Row::new("c", "m", "u", &[9.0; 15], &[10.0; 15]);
        assert_eq!(same.ratio_low, same.ratio);
        let values: Vec<f64> = (1..=15).map(f64::from).collect();
        let wide = Row::new("c", "m", "u", &values, &[10.0; 15]);
        assert_eq!(wide.ratio, 0.8);
        assert!((0.3..0.8).contains(&wide.ratio_low), "{}", wide.ratio_low);
    }

    #[test]
    fn an_even_number_of_rounds_has_its_median_between_the_middle_two() {
        assert_eq!(median(&[4.0, 1.0, 3.0, 2.0]), 2.5);
    }
}
