//! From weights to counts of slots.

use super::Candidate;

/// Slots that a backend has on average while weights differ: a share is exact to about a sixteenth of the mean.
const FINENESS: usize = 8;
/// Above so many slots in all a large service is divided more coarsely ...
const MOST: usize = 1024;
/// ... but never more than this: half of the mean must be expressible.
const COARSEST: usize = 2;

/// Slots in proportion to `weights`, one weight per candidate: at least one each, one each where they are equal.
pub(super) fn slots(candidates: &[Candidate], weights: &[f64]) -> Vec<u32> {
    let counts = counts(weights);
    candidates
        .iter()
        .zip(counts)
        .flat_map(|(candidate, count)| std::iter::repeat_n(candidate.index, count))
        .collect()
}

/// Hamilton's method (largest remainders) with a seat for everybody; a tie goes to the first.
fn counts(weights: &[f64]) -> Vec<usize> {
    let sum: f64 = weights.iter().sum();
    let is_equal = weights.iter().all(|weight| *weight == weights[0]);
    if is_equal || sum <= 0.0 {
        return vec![1; weights.len()];
    }
    let backends = weights.len();
    let total = (FINENESS * backends).min(MOST).max(COARSEST * backends);
    let quota: Vec<f64> = weights
        .iter()
        .map(|weight| weight / sum * total as f64)
        .collect();
    let mut counts: Vec<usize> = quota.iter().map(|quota| (*quota as usize).max(1)).collect();
    let mut order: Vec<usize> = (0..backends).collect();
    order.sort_by(|a, b| quota[*b].fract().total_cmp(&quota[*a].fract()));
    let left = total.saturating_sub(counts.iter().sum());
    for position in order.into_iter().take(left) {
        counts[position] += 1;
    }
    let divisor = counts.iter().copied().fold(0, gcd);
    counts.iter().map(|count| count / divisor).collect()
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn counts_follow_the_weights() {
        let cases: [(&[f64], &[usize]); 6] = [
            (&[], &[]),
            (&[0.25], &[1]),
            (&[3.0, 3.0, 3.0], &[1, 1, 1]),
            (&[1.0, 3.0], &[1, 3]),
            (&[1.0, 0.001], &[15, 1]),
            (&[2.0, 1.0, 1.0], &[2, 1, 1]),
        ];
        for (weights, want) in cases {
            assert_eq!(counts(weights), want, "{weights:?}");
        }
    }

    proptest! {
        #[test]
        fn every_share_is_near_its_weight_and_nobody_is_left_out(
            weights in prop::collection::vec(0.125f64..8.0, 1..60),
        ) {
            let counts = counts(&weights);
            let (sum, total) = (weights.iter().sum::<f64>(), counts.iter().sum::<usize>());
            prop_assert!(total <= MOST.max(FINENESS * weights.len()) + weights.len());
            for (weight, count) in weights.iter().zip(&counts) {
                let (fair, share) = (weight / sum, *count as f64 / total as f64);
                prop_assert!(*count >= 1);
                // One slot of rounding, and the seats that were given away.
                let slack = 2.0 / (FINENESS * weights.len()) as f64 + 0.1 * fair;
                prop_assert!((fair - share).abs() <= slack, "{fair} {share}");
            }
        }

        #[test]
        fn a_large_service_stays_within_its_slots(count in 1usize..5000) {
            let weights: Vec<f64> = (0..count).map(|at| 1.0 + (at % 7) as f64).collect();
            let total: usize = counts(&weights).iter().sum();
            prop_assert!(total <= MOST.max(3 * count), "{total} for {count}");
        }
    }
}
