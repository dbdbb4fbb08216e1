//! Owns how long sequences are expected to become, learned from those that have ended, and whether
//! the KV blocks will do for all of them on the way.
//!
//! It never promises anything: whoever grows beyond it may cost another its place.
//!
//! What is learned is the share of the allowed tokens that a sequence uses, apart for each
//! doubling of what is allowed: a limit of 100 is usually meant, one of 30,000 is a precaution.
//!
//! ```text
//!   blocks           ╭──╮ peak: the largest sum of those that still run
//!     │      ╭───────╯  ╰─╮
//!     │ ╭────╯            ╰───  each end gives back all that one had
//!     └──────────────────────▶ tokens from now, the same for all
//! ```

use crate::sequence::Sequence;

/// What the ends of sequences have taught.
#[derive(Debug)]
pub(crate) struct Growth {
    /// By the number of bits of the allowed tokens.
    classes: [UsedShare; 33],
    all: UsedShare,
}

/// A running mean of the share that was used, and of how far shares lie from it.
#[derive(Clone, Copy, Debug, Default)]
struct UsedShare {
    num_ended: u32,
    mean: f64,
    deviation: f64,
}

/// Fewer ends than this teach nothing: the first to end are the shortest.
const MIN_ENDED: u32 = 8;
/// The last so many ends decide.
const MEMORY: u32 = 200;

impl Default for Growth {
    fn default() -> Self {
        Self {
            classes: [UsedShare::default(); 33],
            all: UsedShare::default(),
        }
    }
}

impl Growth {
    /// Notes that a sequence has ended well with `num_used` of `num_allowed` new tokens.
    pub(crate) fn note_end(&mut self, num_allowed: u32, num_used: u32) {
        let share = f64::from(num_used) / f64::from(num_allowed.max(1));
        self.classes[class(num_allowed)].note(share.min(1.0));
        self.all.note(share.min(1.0));
    }

    /// How many tokens `sequence` will still generate, see [`Self::expected_tokens`].
    pub(crate) fn of(&self, sequence: &Sequence) -> u32 {
        let num_allowed = sequence.max_known_tokens - sequence.num_prompt_tokens();
        self.expected_tokens(num_allowed, sequence.num_generated_tokens())
    }

    /// How many tokens a sequence that has generated `num_used` of `num_allowed` will still
    /// generate, or a few more; 0 while nothing is known.
    pub(crate) fn expected_tokens(&self, num_allowed: u32, num_used: u32) -> u32 {
        let of_class = &self.classes[class(num_allowed)];
        let known = [of_class, &self.all];
        let known = known.into_iter().find(|s| s.num_ended >= MIN_ENDED);
        let Some(known) = known else { return 0 };
        let share = (known.mean + known.deviation).min(1.0);
        let expected = whole(share * f64::from(num_allowed)).max(1);
        // One that has outgrown it goes on for a good while yet, as far as anybody knows.
        let expected = if expected > num_used {
            expected
        } else {
            num_used.saturating_add(num_used / 4 + 1)
        };
        expected.min(num_allowed).saturating_sub(num_used)
    }
}

impl UsedShare {
    fn note(&mut self, share: f64) {
        self.num_ended = (self.num_ended + 1).min(MEMORY);
        let weight = 1.0 / f64::from(self.num_ended);
        let error = share - self.mean;
        self.mean += weight * error;
        if self.num_ended > 1 {
            self.deviation += weight * (error.abs() - self.deviation);
        }
    }
}

/// One sequence on its way: what it has, and for how long it goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Course {
    pub(crate) num_blocks: u64,
    pub(crate) num_tokens_to_come: u32,
}

/// The most blocks that these will need at one time, of which `num_blocks_now` are needed now.
/// Blocks that several share are counted once there, and taken off with the first that ends.
pub(crate) fn peak_blocks(
    num_blocks_now: u64,
    mut courses: Vec<Course>,
    block_size_tokens: u32,
) -> u64 {
    courses.sort_unstable_by_key(|course| course.num_tokens_to_come);
    let mut peak = num_blocks_now;
    let mut left = num_blocks_now;
    let mut num_running = courses.len() as u64;
    for course in courses {
        let grown = u64::from(course.num_tokens_to_come.div_ceil(block_size_tokens));
        peak = peak.max(left + grown * num_running);
        left = left.saturating_sub(course.num_blocks);
        num_running -= 1;
    }
    peak
}

fn class(num_allowed: u32) -> usize {
    (u32::BITS - num_allowed.leading_zeros()) as usize
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "positive, and a cast saturates"
)]
fn whole(value: f64) -> u32 {
    value.ceil() as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn learned(ends: &[(u32, u32)]) -> Growth {
        let mut growth = Growth::default();
        for &(num_allowed, num_used) in ends {
            growth.note_end(num_allowed, num_used);
        }
        growth
    }

    #[test]
    fn nothing_is_expected_before_some_have_ended() {
        let growth = learned(&[(100, 100); 7]);
        assert_eq!(growth.expected_tokens(100, 0), 0);
        let growth = learned(&[(100, 100); 8]);
        assert_eq!(growth.expected_tokens(100, 0), 100);
        assert_eq!(growth.expected_tokens(100, 30), 70);
        assert_eq!(
            growth.expected_tokens(30_000, 0),
            30_000,
            "as all the others"
        );
    }

    #[test]
    fn a_limit_that_is_meant_is_told_from_one_that_is_a_precaution() {
        let growth = learned(&[[(100, 100); 20], [(30_000, 300); 20]].concat());
        assert_eq!(growth.expected_tokens(90, 0), 90);
        assert_eq!(growth.expected_tokens(30_000, 0), 300);
        assert_eq!(growth.expected_tokens(30_000, 100), 200);
    }

    #[test]
    fn where_lengths_vary_more_than_the_mean_is_expected() {
        let ends: Vec<_> = (0..200).map(|i| (1_000, i % 101)).collect();
        let expected = learned(&ends).expected_tokens(1_000, 0);
        assert!((65..=85).contains(&expected), "{expected}, not 50");
    }

    #[test]
    fn one_that_has_outgrown_what_was_expected_is_expected_to_go_on() {
        let growth = learned(&[(1_000, 100); 20]);
        assert_eq!(growth.expected_tokens(1_000, 100), 26);
        assert_eq!(growth.expected_tokens(1_000, 400), 101);
        assert_eq!(growth.expected_tokens(1_000, 990), 10);
        assert_eq!(growth.expected_tokens(1_000, 1_000), 0);
    }

    #[test]
    fn a_change_of_habits_is_followed() {
        let growth = learned(&[[(1_000, 100); 600], [(1_000, 900); 600]].concat());
        assert!(growth.expected_tokens(1_000, 0) > 850);
    }

    #[test]
    fn a_sequence_is_expected_to_use_the_share_of_its_output_that_others_did() {
        // The prompt is no part of it: 100 tokens are allowed beside one of 900.
        let growth = learned(&[[(100, 40); 20], [(10_000, 2_000); 20]].concat());
        let mut sequence = Sequence::for_tests(&[1; 900], &[1; 10]);
        sequence.max_known_tokens = 1_000;
        assert_eq!(growth.of(&sequence), 30);
    }

    #[test]
    fn where_nothing_like_it_has_ended_the_mean_of_all_is_expected() {
        let growth = learned(&[(100, 25); 20]);
        assert_eq!(growth.expected_tokens(10_000, 0), 2_500);
    }

    fn peak(num_blocks_now: u64, courses: &[(u64, u32)]) -> u64 {
        let courses = courses.iter().map(|&(num_blocks, to_come)| Course {
            num_blocks,
            num_tokens_to_come: to_come,
        });
        peak_blocks(num_blocks_now, courses.collect(), 4)
    }

    #[test]
    fn the_peak_comes_before_an_end() {
        assert_eq!(peak(0, &[]), 0);
        assert_eq!(peak(5, &[(5, 0)]), 5);
        assert_eq!(peak(5, &[(5, 9)]), 8);
        // Both grow by two blocks, then one of them goes on alone.
        assert_eq!(peak(10, &[(5, 8), (5, 20)]), 14);
        assert_eq!(peak(10, &[(1, 8), (9, 40)]), 19);
    }

    #[test]
    fn the_peak_is_never_below_what_step_by_step_growth_needs() {
        let mut state = 1_u64;
        let mut below = |bound: u64| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (state >> 33) % bound
        };
        for _ in 0..200 {
            let tokens: Vec<(u32, u32)> = (0..=below(6))
                .map(|_| [below(40) + 1, below(60)].map(|v| u32::try_from(v).unwrap()))
                .map(|[known, to_come]| (known, to_come))
                .collect();
            let blocks = |at: u32| -> u64 {
                let running = tokens.iter().filter(|&&(_, to_come)| to_come >= at);
                running
                    .map(|&(known, _)| u64::from((known + at).div_ceil(4)))
                    .sum()
            };
            let needed = (0..60).map(blocks).max().unwrap();
            let courses: Vec<(u64, u32)> = tokens
                .iter()
                .map(|&(known, to_come)| (u64::from(known.div_ceil(4)), to_come))
                .collect();
            let expected = peak(blocks(0), &courses);
            assert!(expected >= needed && expected <= needed + courses.len() as u64);
        }
    }
}
