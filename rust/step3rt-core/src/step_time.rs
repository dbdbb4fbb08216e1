//! Owns what is known of how long a lane's step takes on one attention instance, from what is in
//! it.
//!
//! It never decides what goes into a step and never reads a clock: whoever plans asks, and tells
//! it how long the step then took.
//!
//! ```text
//!   time = constant + decodes + prefill tokens + context tokens + other lanes at work
//!          each with a coefficient >= 0 that is fitted from the steps of this instance
//! ```
//!
//! **Fit.** Least squares with forgetting, as recursive least squares does it, but kept as sums
//! (the normal equations) and solved by coordinate descent from the last solution. That is as
//! cheap for five unknowns, holds "no coefficient below zero" exactly instead of cutting it off
//! afterwards, and has no inverse that grows without bound while a kind of work does not occur.
//! Where the data cannot tell a slope from the constant, the slope stays at 0: work is thought to
//! be free until a step has shown its price.
//!
//! **Outliers.** Errors count relative to the larger of what was predicted and what was measured.
//! So a step that took a thousand times as long as predicted pulls less than one that took twice as
//! long, and one that seems to have taken no time pulls no more than a step of half the time would.

/// What decides how long a step takes.
#[expect(
    clippy::struct_field_names,
    reason = "counts start with num_ in this project"
)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct StepLoad {
    /// Sequences that compute one token.
    pub(crate) num_decodes: u32,
    /// Tokens of all other chunks.
    pub(crate) num_prefill_tokens: u32,
    /// Tokens whose K and V attention reads, summed over the chunks.
    pub(crate) num_context_tokens: u64,
    /// Lanes of the instance with sequences, besides this one: they take turns with it.
    pub(crate) num_other_lanes: u32,
}

/// See the module's documentation. Times are in microseconds.
#[derive(Debug)]
pub(crate) struct StepTimeModel {
    coefficients: [f64; NUM_TERMS],
    /// Weighted sums of products of two terms, the older the less.
    products: [[f64; NUM_TERMS]; NUM_TERMS],
    /// Weighted sums of products of a term and the time.
    moments: [f64; NUM_TERMS],
    num_steps: u32,
    num_prefill_steps: u32,
    /// Mean relative error of recent predictions, 0 to 1.
    spread: f64,
    fastest_us: f64,
}

const NUM_TERMS: usize = 5;
const CONSTANT: usize = 0;
const DECODE: usize = 1;
const PREFILL: usize = 2;
const CONTEXT: usize = 3;
const OTHER_LANE: usize = 4;

/// What a step weighs after the next one. The last 200 steps decide: seconds of decoding, within
/// which a mix of loads has been seen and a change of the machine is still followed.
const MEMORY: f64 = 0.995;
/// Coordinate descent goes on with the next step where it stopped, so few rounds are enough.
const NUM_ROUNDS: usize = 2;
/// Pulls slopes to 0 by this share of what is known of them, which decides only where nothing
/// else does.
const SHRINKAGE: f64 = 1e-4;
/// A sum below this is dust of steps long forgotten.
const DUST: f64 = 1e-30;
/// The first steps of a process warm caches and kernels up, and few points fit anything.
const MIN_STEPS: u32 = 16;
const MIN_PREFILL_STEPS: u32 = 4;
/// Mean errors that a prediction leaves as room for chance: for a normal distribution, one step in
/// twenty is still longer.
const MARGIN_SPREADS: f64 = 2.0;
/// How far the optimistic figures stay below what was measured, in mean errors.
const OPTIMISM_SPREADS: f64 = 3.0;
/// The fastest step that was seen may have had a slow way there and back: three times faster is
/// out of reach.
const FASTEST_SHARE: f64 = 3.0;
/// No step is taken to be faster or slower than this.
const TIMES_US: (f64, f64) = (1.0, 1e9);

impl Default for StepTimeModel {
    fn default() -> Self {
        Self {
            coefficients: [0.0; NUM_TERMS],
            products: [[0.0; NUM_TERMS]; NUM_TERMS],
            moments: [0.0; NUM_TERMS],
            num_steps: 0,
            num_prefill_steps: 0,
            spread: 1.0,
            fastest_us: f64::INFINITY,
        }
    }
}

impl StepTimeModel {
    /// Takes a step into account that took `duration_ns`; none is known to take no time at all,
    /// so that says only that the clock stood still.
    pub(crate) fn observe(&mut self, load: StepLoad, duration_ns: u64) {
        if duration_ns == 0 {
            return;
        }
        let time_us = (to_f64(duration_ns) / 1e3).clamp(TIMES_US.0, TIMES_US.1);
        let predicted_us = self.predict_us(load);
        let scale_us = time_us.max(predicted_us);
        self.num_steps = self.num_steps.saturating_add(1);
        self.num_prefill_steps = self
            .num_prefill_steps
            .saturating_add(u32::from(load.num_prefill_tokens > 0));
        if predicted_us > 0.0 {
            let error = (time_us - predicted_us).abs() / scale_us;
            let share = (1.0 / f64::from(self.num_steps)).max(1.0 - MEMORY);
            self.spread += share * (error - self.spread);
        }
        self.fastest_us = self.fastest_us.min(time_us);
        let terms = terms(load);
        let weight = 1.0 / (scale_us * scale_us);
        for (row, (&term, products)) in terms.iter().zip(&mut self.products).enumerate() {
            for (&other, product) in terms.iter().zip(products) {
                *product = *product * MEMORY + weight * term * other;
            }
            self.moments[row] = self.moments[row] * MEMORY + weight * term * time_us;
        }
        self.solve();
    }

    /// Whether enough steps were seen for predictions to be worth something.
    pub(crate) fn is_fitted(&self) -> bool {
        self.num_steps >= MIN_STEPS && self.num_prefill_steps >= MIN_PREFILL_STEPS
    }

    /// How long a step with this load takes, as a rule.
    pub(crate) fn predict_us(&self, load: StepLoad) -> f64 {
        let terms = terms(load).into_iter().zip(self.coefficients);
        terms.map(|(term, coefficient)| term * coefficient).sum()
    }

    /// The time that a step may be predicted to take if it is to end within `target_us` but for
    /// rare chance.
    pub(crate) fn within_us(&self, target_us: f64) -> f64 {
        target_us / (1.0 + MARGIN_SPREADS * self.spread)
    }

    /// How many tokens a chunk that starts at `num_computed_tokens` may have for `room_us` more.
    pub(crate) fn prefill_tokens_within(&self, room_us: f64, num_computed_tokens: u32) -> u32 {
        let context = self.coefficients[CONTEXT];
        let room_us = room_us - context * f64::from(num_computed_tokens);
        let token_us = self.coefficients[PREFILL] + context;
        if room_us <= 0.0 {
            0
        } else if token_us <= 0.0 {
            u32::MAX
        } else {
            whole(room_us / token_us)
        }
    }

    /// What a chunk adds to a step.
    pub(crate) fn prefill_us(&self, num_new_tokens: u32, num_computed_tokens: u32) -> f64 {
        let context = f64::from(num_computed_tokens) + f64::from(num_new_tokens);
        self.coefficients[PREFILL] * f64::from(num_new_tokens)
            + self.coefficients[CONTEXT] * context
    }

    /// A time below which no step is expected to stay, whatever is in it; 0 if nothing is known.
    pub(crate) fn least_step_us(&self) -> f64 {
        if !self.is_fitted() {
            return 0.0;
        }
        (self.fastest_us / FASTEST_SHARE).min(self.coefficients[CONSTANT] * self.optimism())
    }

    /// The same for a token of a prompt.
    pub(crate) fn least_prefill_token_us(&self) -> f64 {
        if !self.is_fitted() {
            return 0.0;
        }
        self.coefficients[PREFILL] * self.optimism()
    }

    fn optimism(&self) -> f64 {
        (1.0 - OPTIMISM_SPREADS * self.spread).max(0.0)
    }

    /// Moves each coefficient in turn to where the squares are least while the others stay.
    fn solve(&mut self) {
        for _ in 0..NUM_ROUNDS {
            for (term, products) in self.products.iter().enumerate() {
                let own = products[term];
                if own <= DUST {
                    continue; // long not seen: what was known stays known
                }
                let all: f64 = products.iter().zip(&self.coefficients).map(mul).sum();
                let others = all - own * self.coefficients[term];
                let shrinkage = if term == CONSTANT { 0.0 } else { SHRINKAGE };
                let best = (self.moments[term] - others) / (own * (1.0 + shrinkage));
                self.coefficients[term] = best.max(0.0);
            }
        }
    }
}

fn terms(load: StepLoad) -> [f64; NUM_TERMS] {
    let mut terms = [0.0; NUM_TERMS];
    terms[CONSTANT] = 1.0;
    terms[DECODE] = f64::from(load.num_decodes);
    terms[PREFILL] = f64::from(load.num_prefill_tokens);
    terms[CONTEXT] = to_f64(load.num_context_tokens);
    terms[OTHER_LANE] = f64::from(load.num_other_lanes);
    terms
}

fn mul((a, b): (&f64, &f64)) -> f64 {
    a * b
}

#[expect(
    clippy::cast_precision_loss,
    reason = "a time or a count of tokens needs no more than 52 bits of precision"
)]
fn to_f64(count: u64) -> f64 {
    count as f64
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "positive, and a cast saturates"
)]
fn whole(value: f64) -> u32 {
    value as u32
}

#[cfg(test)]
mod tests;
