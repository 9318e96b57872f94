//! What was measured, a value per round, and what it says: medians, comparisons within a round, and a bootstrap
//! interval of their median.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::load::Family;

/// Resamples of the bootstrap.
const RESAMPLES: usize = 2_000;

/// What one line of the result is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Series {
    pub(crate) metric: &'static str,
    pub(crate) family: Family,
    pub(crate) case: &'static str,
}

/// All values, by series.
#[derive(Debug, Default)]
pub(crate) struct Figures {
    values: BTreeMap<Series, Measured>,
}

#[derive(Debug)]
struct Measured {
    unit: &'static str,
    rounds: Vec<f64>,
}

/// A median and its bootstrap 95 % interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Interval {
    pub(crate) median: f64,
    pub(crate) low: f64,
    pub(crate) high: f64,
}

/// One line of the result.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Row {
    pub(crate) case: &'static str,
    pub(crate) metric: &'static str,
    pub(crate) family: Family,
    pub(crate) unit: &'static str,
    pub(crate) median: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
    /// Median over the rounds of the value by the reference's value in the same round; none without a reference.
    pub(crate) ratio: Option<f64>,
    /// Lower end of its bootstrap 95 % interval.
    pub(crate) ratio_low: Option<f64>,
    /// Upper end of its bootstrap 95 % interval.
    pub(crate) ratio_high: Option<f64>,
}

impl Figures {
    /// Adds the value of one more round.
    pub(crate) fn push(&mut self, series: Series, unit: &'static str, value: f64) {
        let measured = self.values.entry(series).or_insert_with(|| Measured {
            unit,
            rounds: Vec::new(),
        });
        measured.rounds.push(value);
    }

    /// Every series that was measured.
    pub(crate) fn series(&self) -> impl Iterator<Item = Series> {
        self.values.keys().copied()
    }

    /// `compare` of the values of two series in each round; none where one was not measured.
    pub(crate) fn compare(
        &self,
        own: Series,
        reference: Series,
        compare: impl Fn(f64, f64) -> f64,
    ) -> Option<Interval> {
        let (own, reference) = (self.values.get(&own)?, self.values.get(&reference)?);
        let pairs = own.rounds.iter().zip(&reference.rounds);
        let compared: Vec<f64> = pairs.map(|(own, other)| compare(*own, *other)).collect();
        Some(interval(&compared))
    }

    /// The median of a series between its least and its greatest value.
    pub(crate) fn range(&self, own: Series) -> Option<Interval> {
        let rounds = &self.values.get(&own)?.rounds;
        let sorted = sorted(rounds);
        Some(Interval {
            median: median(rounds),
            low: *sorted.first()?,
            high: *sorted.last()?,
        })
    }

    /// A line for each series; `reference` says what it is divided by.
    pub(crate) fn rows(&self, reference: impl Fn(Series) -> Series) -> Vec<Row> {
        let row = |(series, measured): (&Series, &Measured)| {
            let sorted = sorted(&measured.rounds);
            let ratio = self.compare(*series, reference(*series), |own, other| own / other);
            Row {
                case: series.case,
                metric: series.metric,
                family: series.family,
                unit: measured.unit,
                median: median(&measured.rounds),
                min: sorted[0],
                max: sorted[sorted.len() - 1],
                ratio: ratio.map(|ratio| ratio.median),
                ratio_low: ratio.map(|ratio| ratio.low),
                ratio_high: ratio.map(|ratio| ratio.high),
            }
        };
        self.values.iter().map(row).collect()
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

/// The 2.5th and 97.5th percentile of the medians of resamples; the same for the same values.
fn interval(values: &[f64]) -> Interval {
    let mut random = Random(0x5eed);
    let medians: Vec<f64> = (0..RESAMPLES)
        .map(|_| {
            let resample: Vec<f64> = (0..values.len())
                .map(|_| values[random.below(values.len())])
                .collect();
            median(&resample)
        })
        .collect();
    let medians = sorted(&medians);
    Interval {
        median: median(values),
        low: medians[RESAMPLES / 40],
        high: medians[RESAMPLES - 1 - RESAMPLES / 40],
    }
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

    fn series(case: &'static str) -> Series {
        Series {
            metric: "m",
            family: Family::Ipv4,
            case,
        }
    }

    fn figures(own: &[f64], reference: &[f64]) -> Figures {
        let mut figures = Figures::default();
        for (own, reference) in own.iter().zip(reference) {
            figures.push(series("own"), "u", *own);
            figures.push(series("reference"), "u", *reference);
        }
        figures
    }

    fn own_row(figures: &Figures) -> Row {
        let rows = figures.rows(|_| series("reference"));
        rows.into_iter().find(|row| row.case == "own").unwrap()
    }

    #[test]
    fn a_ratio_is_taken_within_its_round() {
        let row = own_row(&figures(&[10.0, 40.0, 90.0], &[10.0, 20.0, 30.0]));
        assert_eq!(
            (row.median, row.min, row.max, row.ratio),
            (40.0, 10.0, 90.0, Some(2.0))
        );
    }

    #[test]
    fn the_interval_is_a_point_where_all_rounds_agree_and_wider_where_they_do_not() {
        let same = own_row(&figures(&[9.0; 15], &[10.0; 15]));
        assert_eq!(same.ratio_low, same.ratio);
        assert_eq!(same.ratio_high, same.ratio);
        let values: Vec<f64> = (1..=15).map(f64::from).collect();
        let wide = own_row(&figures(&values, &[10.0; 15]));
        assert_eq!(wide.ratio, Some(0.8));
        let (low, high) = (wide.ratio_low.unwrap(), wide.ratio_high.unwrap());
        assert!((0.3..0.8).contains(&low), "{low}");
        assert!((0.8..1.3).contains(&high) && high > 0.8, "{high}");
    }

    #[test]
    fn an_even_number_of_rounds_has_its_median_between_the_middle_two() {
        assert_eq!(median(&[4.0, 1.0, 3.0, 2.0]), 2.5);
    }

    #[test]
    fn a_series_without_its_reference_has_no_ratio() {
        let mut figures = Figures::default();
        figures.push(series("own"), "u", 1.0);
        assert_eq!(own_row(&figures).ratio, None);
    }
}
