//! The sampling, stopping and output options of a request: their ranges and their defaults.
//!
//! It never looks at the prompt.

use step3rt_core::ids::TokenId;
use step3rt_core::step::SamplingState;

use crate::adjustments;
use crate::generate::ModelLimits;
use crate::refusal::Violations;
use crate::v1;

/// Most continuations of one prompt.
pub const MAX_N: u32 = 128;
/// Most stop strings of one request.
pub const MAX_STOP_STRINGS: usize = 16;
/// Longest stop string.
pub const MAX_STOP_STRING_BYTES: usize = 1024;
/// Most stop ids of one request, beside the model's own.
pub const MAX_STOP_TOKEN_IDS: usize = 128;
/// Most rivals listed per token, as in the field's other APIs.
pub const MAX_TOP_LOGPROBS: u32 = 20;
/// A temperature above this is noise and surely a mistake.
const MAX_TEMPERATURE: f32 = 100.0;

/// What a request asks for, as sent.
#[derive(Debug)]
pub(crate) struct AskedSampling {
    pub(crate) sampling: v1::SamplingParams,
    pub(crate) stopping: v1::StoppingCriteria,
    pub(crate) output: v1::OutputOptions,
}

impl AskedSampling {
    /// Notes everything that is out of range or not supported.
    pub(crate) fn check(&self, limits: &ModelLimits, violations: &mut Violations) {
        check_sampling(&self.sampling, violations);
        adjustments::check(&self.sampling, limits, violations);
        check_stopping(&self.stopping, limits, violations);
        check_output(&self.output, violations);
    }

    /// The checked parameters with every default filled in.
    pub(crate) fn state(&self, limits: &ModelLimits, random_seed: u64) -> SamplingState {
        let defaults = limits.defaults;
        SamplingState {
            temperature: self.sampling.temperature.unwrap_or(defaults.temperature),
            // A larger top_k than there are tokens is the same as off.
            top_k: self
                .sampling
                .top_k
                .unwrap_or(defaults.top_k)
                .min(limits.vocab_size),
            top_p: self.sampling.top_p.unwrap_or(defaults.top_p),
            min_p: self.sampling.min_p.unwrap_or(defaults.min_p),
            seed: self.sampling.seed.map_or(random_seed, i64::cast_unsigned),
            top_logprobs: self.output.top_logprobs,
            prompt_logprobs: self.output.prompt_logprobs,
            min_tokens: self.stopping.min_tokens.unwrap_or(0),
            stop_tokens: stop_tokens(&self.stopping, limits),
            adjustments: adjustments::of(&self.sampling, &defaults),
        }
    }
}

/// The ids that end a sequence, each once.
fn stop_tokens(stopping: &v1::StoppingCriteria, limits: &ModelLimits) -> Vec<TokenId> {
    let asked = stopping.stop_token_ids.iter().copied().map(TokenId);
    let mut tokens: Vec<_> = asked.collect();
    if !stopping.ignore_eos.unwrap_or(false) {
        tokens.extend(&limits.eos_tokens);
    }
    tokens.sort_unstable();
    tokens.dedup();
    tokens
}

fn check_sampling(sampling: &v1::SamplingParams, violations: &mut Violations) {
    let is_within = |value: Option<f32>, low: f32, high: f32| {
        value.is_none_or(|value| value >= low && value <= high) // false for NaN
    };
    let text = |value: Option<f32>| value.map_or_else(String::new, |value| value.to_string());
    violations.check(
        is_within(sampling.temperature, 0.0, MAX_TEMPERATURE),
        "sampling.temperature",
        || {
            format!(
                "{} is not between 0 (greedy) and {MAX_TEMPERATURE}. Use 0 to 2",
                text(sampling.temperature)
            )
        },
    );
    violations.check(
        is_within(sampling.top_p, f32::MIN_POSITIVE, 1.0),
        "sampling.top_p",
        || {
            format!(
                "{} is not above 0 and at most 1 (off). Use 1 to disable it",
                text(sampling.top_p)
            )
        },
    );
    violations.check(
        is_within(sampling.min_p, 0.0, 1.0),
        "sampling.min_p",
        || {
            format!(
                "{} is not between 0 (off) and 1. Use 0 to disable it",
                text(sampling.min_p)
            )
        },
    );
    violations.check(
        sampling.n.is_none_or(|n| (1..=MAX_N).contains(&n)),
        "sampling.n",
        || {
            format!(
                "{} continuations are wanted; 1 to {MAX_N} are possible. Send several requests",
                sampling.n.unwrap_or_default()
            )
        },
    );
    violations.unsupported(
        sampling.structured_output.is_some(),
        "sampling.structured_output",
        "structured output is not supported by this build. Leave it out",
    );
}

fn check_stopping(
    stopping: &v1::StoppingCriteria,
    limits: &ModelLimits,
    violations: &mut Violations,
) {
    violations.check(
        stopping.max_tokens != Some(0),
        "stopping.max_tokens",
        || {
            "0 tokens are wanted, and a request generates at least 1. Raise it, or leave it out"
                .to_owned()
        },
    );
    let min_tokens = stopping.min_tokens.unwrap_or(0);
    let most = stopping.max_tokens.unwrap_or(limits.max_model_len);
    violations.check(min_tokens <= most, "stopping.min_tokens", || {
        format!("{min_tokens} is more than the {most} tokens that can be generated. Lower it")
    });
    let num_stop = stopping.stop.len();
    violations.check(num_stop <= MAX_STOP_STRINGS, "stopping.stop", || {
        format!("{num_stop} stop strings exceed the limit of {MAX_STOP_STRINGS}. Send fewer")
    });
    for stop in stopping.stop.iter().take(MAX_STOP_STRINGS) {
        let num_bytes = stop.len();
        violations.check(
            (1..=MAX_STOP_STRING_BYTES).contains(&num_bytes),
            "stopping.stop",
            || {
                format!(
                    "a stop string of {num_bytes} bytes is not within 1 to \
                     {MAX_STOP_STRING_BYTES}. Shorten it or leave it out"
                )
            },
        );
    }
    let num_ids = stopping.stop_token_ids.len();
    violations.check(
        num_ids <= MAX_STOP_TOKEN_IDS,
        "stopping.stop_token_ids",
        || format!("{num_ids} stop ids exceed the limit of {MAX_STOP_TOKEN_IDS}. Send fewer"),
    );
    let vocab_size = limits.vocab_size;
    // One of them, as elsewhere: an error that names 128 exceeds what gRPC's libraries accept.
    let mut ids = stopping.stop_token_ids.iter().take(MAX_STOP_TOKEN_IDS);
    if let Some(id) = ids.find(|id| **id >= vocab_size) {
        violations.check(false, "stopping.stop_token_ids", || {
            format!("id {id} is not in the vocabulary of {vocab_size}. Leave it out")
        });
    }
    let masks_all = || stop_tokens(stopping, limits).len() >= vocab_size as usize;
    violations.check(
        min_tokens == 0 || num_ids > MAX_STOP_TOKEN_IDS || !masks_all(),
        "stopping.min_tokens",
        || {
            format!(
                "before {min_tokens} tokens no stop id can be chosen, and all {vocab_size} ids of \
                 the vocabulary are stop ids. Leave out min_tokens or some stop ids"
            )
        },
    );
}

fn check_output(output: &v1::OutputOptions, violations: &mut Violations) {
    let counts = [
        ("output.top_logprobs", output.top_logprobs),
        ("output.prompt_logprobs", output.prompt_logprobs),
    ];
    for (field, count) in counts {
        violations.check(
            count.is_none_or(|count| count <= MAX_TOP_LOGPROBS),
            field,
            || {
                format!(
                    "{} rivals per token exceed the limit of {MAX_TOP_LOGPROBS}. Lower it",
                    count.unwrap_or_default()
                )
            },
        );
    }
}
