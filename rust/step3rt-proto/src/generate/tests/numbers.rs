//! Sampling parameters and stopping criteria, at their limits and beyond.

use super::*;
use crate::sampling::{
    MAX_N, MAX_STOP_STRING_BYTES, MAX_STOP_STRINGS, MAX_STOP_TOKEN_IDS, MAX_TOP_LOGPROBS,
};

#[test]
fn numbers_at_their_limits_are_valid() {
    let sampling = |temperature, top_p, min_p, n| {
        with_sampling(v1::SamplingParams {
            temperature: Some(temperature),
            top_p: Some(top_p),
            min_p: Some(min_p),
            n: Some(n),
            ..Default::default()
        })
    };
    let stopping = with_stopping(v1::StoppingCriteria {
        max_tokens: Some(3),
        min_tokens: Some(3),
        stop: vec!["a".repeat(MAX_STOP_STRING_BYTES); MAX_STOP_STRINGS],
        stop_token_ids: vec![99; MAX_STOP_TOKEN_IDS],
        ..Default::default()
    });
    let output = with_output(Some(MAX_TOP_LOGPROBS), Some(MAX_TOP_LOGPROBS));
    let most = sampling(100.0, 1.0, 1.0, MAX_N);
    let least = sampling(0.0, f32::MIN_POSITIVE, 0.0, 1);
    for request in [most, least, stopping, output] {
        let checked = check(request.clone(), &limits(), 7);
        assert!(checked.is_ok(), "{request:?}");
    }
}

#[test]
fn a_top_k_beyond_the_vocabulary_is_all_of_it() {
    let asked = with_sampling(v1::SamplingParams {
        top_k: Some(101),
        ..Default::default()
    });
    let params = check(asked, &limits(), 7).expect("valid");
    assert_eq!(params.sampling.top_k, 100);
}

fn with_output(top: Option<u32>, of_prompt: Option<u32>) -> v1::GenerateRequest {
    v1::GenerateRequest {
        output: Some(v1::OutputOptions {
            top_logprobs: top,
            prompt_logprobs: of_prompt,
            ..Default::default()
        }),
        ..request(&[1])
    }
}

#[test]
fn more_rivals_than_can_be_listed_are_refused() {
    let (kind, fields) = refused(with_output(Some(MAX_TOP_LOGPROBS + 1), Some(u32::MAX)));
    assert_eq!(kind, ErrorKind::InvalidParameter);
    assert_eq!(fields, ["output.top_logprobs", "output.prompt_logprobs"]);
}

#[test]
fn an_explicit_zero_is_a_value() {
    let params = check(
        with_sampling(v1::SamplingParams {
            temperature: Some(0.0),
            top_k: Some(0),
            seed: Some(-1),
            ..Default::default()
        }),
        &limits(),
        7,
    )
    .expect("valid");
    assert!(params.sampling.temperature.abs() < f32::EPSILON);
    assert_eq!(params.sampling.top_k, 0);
    assert_eq!(params.sampling.seed, u64::MAX);
}

#[test]
fn numbers_out_of_range_are_refused_by_field() {
    for (sampling, field) in [
        (
            v1::SamplingParams {
                temperature: Some(f32::NAN),
                ..Default::default()
            },
            "sampling.temperature",
        ),
        (
            v1::SamplingParams {
                temperature: Some(-0.1),
                ..Default::default()
            },
            "sampling.temperature",
        ),
        (
            v1::SamplingParams {
                temperature: Some(f32::INFINITY),
                ..Default::default()
            },
            "sampling.temperature",
        ),
        (
            v1::SamplingParams {
                top_p: Some(0.0),
                ..Default::default()
            },
            "sampling.top_p",
        ),
        (
            v1::SamplingParams {
                top_p: Some(1.01),
                ..Default::default()
            },
            "sampling.top_p",
        ),
        (
            v1::SamplingParams {
                min_p: Some(f32::NAN),
                ..Default::default()
            },
            "sampling.min_p",
        ),
        (
            v1::SamplingParams {
                n: Some(0),
                ..Default::default()
            },
            "sampling.n",
        ),
        (
            v1::SamplingParams {
                n: Some(u32::MAX),
                ..Default::default()
            },
            "sampling.n",
        ),
    ] {
        let expected = (ErrorKind::InvalidParameter, vec![field.to_owned()]);
        assert_eq!(refused(with_sampling(sampling)), expected);
    }
}

#[test]
fn stopping_criteria_out_of_range_are_refused_by_field() {
    for (stopping, field) in [
        (
            v1::StoppingCriteria {
                max_tokens: Some(0),
                ..Default::default()
            },
            "stopping.max_tokens",
        ),
        (
            v1::StoppingCriteria {
                max_tokens: Some(3),
                min_tokens: Some(4),
                ..Default::default()
            },
            "stopping.min_tokens",
        ),
        (
            v1::StoppingCriteria {
                stop: vec!["a".to_owned(); MAX_STOP_STRINGS + 1],
                ..Default::default()
            },
            "stopping.stop",
        ),
        (
            v1::StoppingCriteria {
                stop: vec![String::new()],
                ..Default::default()
            },
            "stopping.stop",
        ),
        (
            v1::StoppingCriteria {
                stop: vec!["a".repeat(MAX_STOP_STRING_BYTES + 1)],
                ..Default::default()
            },
            "stopping.stop",
        ),
        (
            v1::StoppingCriteria {
                stop_token_ids: vec![100],
                ..Default::default()
            },
            "stopping.stop_token_ids",
        ),
        (
            v1::StoppingCriteria {
                stop_token_ids: vec![1; MAX_STOP_TOKEN_IDS + 1],
                ..Default::default()
            },
            "stopping.stop_token_ids",
        ),
    ] {
        let expected = (ErrorKind::InvalidParameter, vec![field.to_owned()]);
        assert_eq!(refused(with_stopping(stopping)), expected);
    }
}

#[test]
fn min_tokens_must_leave_something_to_choose() {
    let everything = |min_tokens, ignore_eos| {
        with_stopping(v1::StoppingCriteria {
            min_tokens: Some(min_tokens),
            stop_token_ids: (0..100).filter(|id| *id != 2).collect(),
            ignore_eos: Some(ignore_eos),
            ..Default::default()
        })
    };
    assert_eq!(refused(everything(1, false)).1, ["stopping.min_tokens"]);
    for possible in [everything(0, false), everything(1, true)] {
        assert!(check(possible, &limits(), 7).is_ok());
    }
}
