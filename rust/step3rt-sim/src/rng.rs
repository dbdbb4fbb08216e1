//! Owns the only source of chance: a seed gives the same numbers on every machine.
//!
//! It never reads a clock or an address. `SplitMix64` (Steele, Lea and Flood, 2014) passes the
//! usual batteries, and its whole state is one word, which is all that a replay needs.

/// A stream of numbers.
#[derive(Clone, Debug)]
pub(crate) struct Rng(u64);

impl Rng {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// A stream of its own, so that drawing more here does not shift what is drawn there.
    pub(crate) fn fork(&mut self) -> Self {
        Self(self.next())
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// From 0 to `bound - 1`. The bias is below `bound` in 2^64.
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        assert!(bound > 0, "nothing is below 0");
        let wide = u128::from(self.next()) * u128::from(bound);
        u64::try_from(wide >> 64).expect("less than bound")
    }

    /// From `low` to `high`, both included.
    pub(crate) fn within(&mut self, low: u32, high: u32) -> u32 {
        let drawn = u64::from(low) + self.below(u64::from(high - low) + 1);
        u32::try_from(drawn).expect("at most high")
    }

    /// True `per_mille` times in a thousand.
    pub(crate) fn chance(&mut self, per_mille: u32) -> bool {
        self.below(1_000) < u64::from(per_mille)
    }

    /// One of `items`, which are not empty.
    pub(crate) fn pick<T: Copy>(&mut self, items: &[T]) -> T {
        let index = self.below(items.len() as u64);
        items[usize::try_from(index).expect("an index")]
    }

    /// From 0 to 1, 1 excluded.
    pub(crate) fn unit(&mut self) -> f64 {
        let drawn = u32::try_from(self.next() >> 32).expect("32 bits");
        f64::from(drawn) / (f64::from(u32::MAX) + 1.0)
    }

    /// A waiting time with mean `mean`.
    pub(crate) fn exponential(&mut self, mean: f64) -> f64 {
        -mean * (1.0 - self.unit()).ln()
    }
}

/// Spreads `word` over all 64 bits, one to one.
pub(crate) fn mix(word: u64) -> u64 {
    let word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_gives_the_published_numbers() {
        // The first outputs of the reference implementation for the seed 1234567.
        let mut rng = Rng::new(1_234_567);
        assert_eq!(rng.next(), 6_457_827_717_110_365_317);
        assert_eq!(rng.next(), 3_203_168_211_198_807_973);
    }

    #[test]
    fn ranges_are_reached_to_both_ends_and_no_further() {
        let mut rng = Rng::new(7);
        let drawn: std::collections::BTreeSet<u32> = (0..200).map(|_| rng.within(3, 6)).collect();
        assert_eq!(drawn.into_iter().collect::<Vec<_>>(), [3, 4, 5, 6]);
        assert!((0..200).all(|_| !rng.chance(0) && rng.chance(1_000)));
        assert!((0..200).all(|_| (0.0..1.0).contains(&rng.unit())));
    }
}
