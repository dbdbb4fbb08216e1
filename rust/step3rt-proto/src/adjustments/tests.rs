//! Which penalties and biases are refused with which words, and what the others become.

use step3rt_core::error::ErrorKind;

use super::*;
use crate::generate::{GenerateParams, check as check_request};
use crate::refusal::Refusal;
use crate::v1::generate_request::Prompt;

const VOCAB_SIZE: u32 = 2_000;

fn check_with(
    sampling: v1::SamplingParams,
    defaults: SamplingDefaults,
) -> Result<GenerateParams, Refusal> {
    let limits = ModelLimits {
        vocab_size: VOCAB_SIZE,
        max_model_len: 16,
        eos_tokens: vec![TokenId(2)],
        defaults,
    };
    let request = v1::GenerateRequest {
        prompt: Some(Prompt::TokenIds(v1::TokenIds { ids: vec![1] })),
        sampling: Some(sampling),
        ..Default::default()
    };
    check_request(request, &limits, 7)
}

fn adjustments(sampling: v1::SamplingParams) -> Option<Arc<LogitAdjustments>> {
    let params = check_with(sampling, SamplingDefaults::default()).expect("valid");
    params.sampling.adjustments
}

fn presence(value: f32) -> v1::SamplingParams {
    v1::SamplingParams {
        presence_penalty: Some(value),
        ..Default::default()
    }
}

fn frequency(value: f32) -> v1::SamplingParams {
    v1::SamplingParams {
        frequency_penalty: Some(value),
        ..Default::default()
    }
}

fn repetition(value: f32) -> v1::SamplingParams {
    v1::SamplingParams {
        repetition_penalty: Some(value),
        ..Default::default()
    }
}

fn bias(entries: impl IntoIterator<Item = (u32, f32)>) -> v1::SamplingParams {
    v1::SamplingParams {
        logit_bias: entries.into_iter().collect(),
        ..Default::default()
    }
}

#[test]
fn values_out_of_range_are_refused_with_field_value_and_remedy() {
    let cases = [
        (presence(2.001), "2.001 is not between -2 and 2"),
        (presence(-2.5), "-2.5 is not between -2 and 2"),
        (presence(f32::NAN), "NaN is not between -2 and 2"),
        (frequency(f32::INFINITY), "inf is not between -2 and 2"),
        (frequency(-3.0), "-3 is not between -2 and 2"),
        (repetition(0.0), "0 is not above 0 and at most 100"),
        (repetition(-1.0), "-1 is not above 0 and at most 100"),
        (repetition(100.5), "100.5 is not above 0 and at most 100"),
        (repetition(f32::NAN), "NaN is not above 0 and at most 100"),
        (
            bias([(3, 1.0), (4, -101.0)]),
            "-101 for id 4 is not between -100 and 100",
        ),
        (
            bias([(9, f32::NAN), (8, f32::NAN)]),
            "NaN for id 8 is not between -100 and 100",
        ),
        (
            bias([(5, 1.0), (VOCAB_SIZE, 1.0)]),
            "id 2000 is not in the vocabulary of 2000",
        ),
        (
            bias((0..1025).map(|id| (id, 1.0))),
            "1025 entries exceed the limit of 1024: each is work for every token. Send fewer",
        ),
    ];
    for (sampling, words) in cases {
        let refusal = check_with(sampling.clone(), SamplingDefaults::default()).expect_err(words);
        let field = if !sampling.logit_bias.is_empty() {
            "sampling.logit_bias"
        } else if sampling.repetition_penalty.is_some() {
            "sampling.repetition_penalty"
        } else if sampling.frequency_penalty.is_some() {
            "sampling.frequency_penalty"
        } else {
            "sampling.presence_penalty"
        };
        assert_eq!(refusal.error.kind, ErrorKind::InvalidParameter);
        assert_eq!(refusal.violations.len(), 1, "{words}");
        assert_eq!(refusal.violations[0].field, field);
        let text = &refusal.violations[0].description;
        assert!(text.starts_with(words), "{text}");
        let remedy = text.rsplit(". ").next().expect("a last sentence");
        assert!(
            remedy.starts_with("Use") || remedy.starts_with("Send") || remedy == "Leave it out"
        );
    }
}

#[test]
fn the_ends_of_every_range_are_accepted() {
    for value in [-2.0, 2.0] {
        assert!(adjustments(presence(value)).is_some());
        assert!(adjustments(frequency(value)).is_some());
    }
    for value in [f32::MIN_POSITIVE, 100.0] {
        assert!(adjustments(repetition(value)).is_some());
    }
    let all = adjustments(bias((0..1024).map(|id| (id + 976, -100.0)))).expect("some");
    assert_eq!(all.logit_bias.len(), 1024);
    assert_eq!(all.logit_bias[1023], (TokenId(1999), -100.0));
}

#[test]
fn neutral_values_cost_nothing() {
    assert_eq!(adjustments(v1::SamplingParams::default()), None);
    let neutral = v1::SamplingParams {
        frequency_penalty: Some(-0.0),
        repetition_penalty: Some(1.0),
        ..bias([(7, 0.0)])
    };
    assert_eq!(adjustments(neutral), None);
}

#[test]
fn what_is_asked_arrives_with_biases_in_order() {
    let asked = v1::SamplingParams {
        presence_penalty: Some(0.5),
        frequency_penalty: Some(-1.5),
        ..bias([(9, 1.0), (3, -2.0), (5, 0.0)])
    };
    let expected = LogitAdjustments {
        presence_penalty: 0.5,
        frequency_penalty: -1.5,
        repetition_penalty: 1.0,
        logit_bias: vec![(TokenId(3), -2.0), (TokenId(9), 1.0)],
    };
    assert_eq!(adjustments(asked).as_deref(), Some(&expected));
}

#[test]
fn a_silent_request_gets_the_models_repetition_penalty_and_an_explicit_one_is_off() {
    let defaults = SamplingDefaults {
        repetition_penalty: 1.25,
        ..Default::default()
    };
    let silent = check_with(v1::SamplingParams::default(), defaults).expect("valid");
    let adjustments = silent.sampling.adjustments.expect("the model's");
    assert!((adjustments.repetition_penalty - 1.25).abs() < f32::EPSILON);
    let off = check_with(repetition(1.0), defaults).expect("valid");
    assert_eq!(off.sampling.adjustments, None);
}
