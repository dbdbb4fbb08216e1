//! The penalties and the logit bias of a request: their ranges and their defaults.
//!
//! It never touches a logit: instances do.

use std::sync::Arc;

use step3rt_core::ids::TokenId;
use step3rt_core::step::LogitAdjustments;

use crate::generate::{ModelLimits, SamplingDefaults};
use crate::refusal::Violations;
use crate::v1;

/// Presence and frequency penalties lie between its negative and it, as in the field's other APIs.
pub const MAX_PENALTY: f32 = 2.0;
/// A repetition penalty above this leaves of a logit nothing that could be told from noise.
pub const MAX_REPETITION_PENALTY: f32 = 100.0;
/// A logit bias lies between its negative and it: enough to force or to ban a token of any model.
pub const MAX_LOGIT_BIAS: f32 = 100.0;
/// Most entries of a logit bias. Each of them is work for every token that is sampled, and travels
/// to an instance whenever the sequence joins one.
pub const MAX_LOGIT_BIAS_ENTRIES: usize = 1024;

/// Whether a repetition penalty can be applied.
#[must_use]
pub fn is_repetition_penalty(value: f32) -> bool {
    value > 0.0 && value <= MAX_REPETITION_PENALTY // false for NaN
}

/// Notes what is out of range.
pub(crate) fn check(
    sampling: &v1::SamplingParams,
    limits: &ModelLimits,
    violations: &mut Violations,
) {
    for (field, penalty) in [
        ("sampling.presence_penalty", sampling.presence_penalty),
        ("sampling.frequency_penalty", sampling.frequency_penalty),
    ] {
        let penalty = penalty.unwrap_or(0.0);
        violations.check(is_within(penalty, MAX_PENALTY), field, || {
            format!(
                "{penalty} is not between -{MAX_PENALTY} and {MAX_PENALTY}. Use 0 to disable it"
            )
        });
    }
    let repetition = sampling.repetition_penalty.unwrap_or(1.0);
    violations.check(
        is_repetition_penalty(repetition),
        "sampling.repetition_penalty",
        || {
            format!(
                "{repetition} is not above 0 and at most {MAX_REPETITION_PENALTY}. Use 1 to \
                 disable it"
            )
        },
    );
    check_logit_bias(sampling, limits, violations);
}

/// The count first: a flood of entries is refused before it is looked at.
fn check_logit_bias(
    sampling: &v1::SamplingParams,
    limits: &ModelLimits,
    violations: &mut Violations,
) {
    let field = "sampling.logit_bias";
    let num_entries = sampling.logit_bias.len();
    if num_entries > MAX_LOGIT_BIAS_ENTRIES {
        violations.check(false, field, || {
            format!(
                "{num_entries} entries exceed the limit of {MAX_LOGIT_BIAS_ENTRIES}: each is work \
                 for every token. Send fewer"
            )
        });
        return;
    }
    let vocab_size = limits.vocab_size;
    // A map has no order, and a message should be the same each time.
    if let Some(id) = sampling.logit_bias.keys().max() {
        violations.check(*id < vocab_size, field, || {
            format!("id {id} is not in the vocabulary of {vocab_size}. Leave it out")
        });
    }
    let entries = sampling.logit_bias.iter();
    let worst = entries.filter(|(_, bias)| !is_within(**bias, MAX_LOGIT_BIAS));
    if let Some((id, bias)) = worst.min_by_key(|(id, _)| **id) {
        violations.check(false, field, || {
            format!(
                "{bias} for id {id} is not between -{MAX_LOGIT_BIAS} and {MAX_LOGIT_BIAS}. Use \
                 these to ban or force a token"
            )
        });
    }
}

/// What checked parameters change; `None` if that is nothing.
pub(crate) fn of(
    sampling: &v1::SamplingParams,
    defaults: &SamplingDefaults,
) -> Option<Arc<LogitAdjustments>> {
    let mut logit_bias: Vec<_> = sampling
        .logit_bias
        .iter()
        .filter(|(_, bias)| is_away(**bias, 0.0))
        .map(|(id, bias)| (TokenId(*id), *bias))
        .collect();
    logit_bias.sort_unstable_by_key(|(token, _)| *token);
    let adjustments = LogitAdjustments {
        presence_penalty: sampling.presence_penalty.unwrap_or(0.0),
        frequency_penalty: sampling.frequency_penalty.unwrap_or(0.0),
        repetition_penalty: sampling
            .repetition_penalty
            .unwrap_or(defaults.repetition_penalty),
        logit_bias,
    };
    let is_neutral = !is_away(adjustments.presence_penalty, 0.0)
        && !is_away(adjustments.frequency_penalty, 0.0)
        && !is_away(adjustments.repetition_penalty, 1.0)
        && adjustments.logit_bias.is_empty();
    (!is_neutral).then(|| Arc::new(adjustments))
}

fn is_within(value: f32, most: f32) -> bool {
    value >= -most && value <= most // false for NaN
}

fn is_away(value: f32, neutral: f32) -> bool {
    (value - neutral).abs() > 0.0
}

#[cfg(test)]
mod tests;
