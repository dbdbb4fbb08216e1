//! Small statistics over what was measured.

/// The value below which `per_mille` of the sorted `values` lie; 0 if there are none.
pub(crate) fn quantile(values: &[f64], per_mille: usize) -> f64 {
    let last = values.len().saturating_sub(1);
    values.get(last * per_mille / 1_000).copied().unwrap_or(0.0)
}

/// `count` as a float; counts here are far below 2^53, so nothing is lost.
#[expect(clippy::cast_precision_loss, reason = "counts are below 2^53")]
pub(crate) fn to_f64(count: u64) -> f64 {
    count as f64
}

/// How evenly `shares` are spread: 1 when all are equal, 1/n when one has all (Jain, 1984).
pub(crate) fn fairness(shares: &[f64]) -> f64 {
    let sum: f64 = shares.iter().sum();
    let squares: f64 = shares.iter().map(|share| share * share).sum();
    if squares > 0.0 {
        sum * sum / (squares * to_f64(shares.len() as u64))
    } else {
        1.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_values_that_occurred() {
        let values = [1.0, 2.0, 3.0, 4.0, 5.0];
        let at = [0, 500, 990, 1_000].map(|per_mille| quantile(&values, per_mille));
        assert!(
            at.iter()
                .zip([1.0, 3.0, 4.0, 5.0])
                .all(|(a, b)| (a - b).abs() < 1e-9)
        );
        assert!(quantile(&[], 500).abs() < 1e-9);
    }

    #[test]
    fn fairness_is_one_for_equal_shares_and_one_nth_for_one_winner() {
        assert!((fairness(&[2.0, 2.0, 2.0]) - 1.0).abs() < 1e-9);
        assert!((fairness(&[6.0, 0.0, 0.0]) - 1.0 / 3.0).abs() < 1e-9);
    }
}
