//! Which requests are refused, with which kind and field.

use super::*;
use crate::sampling::{
    MAX_N, MAX_STOP_STRING_BYTES, MAX_STOP_STRINGS, MAX_STOP_TOKEN_IDS, MAX_TOP_LOGPROBS,
};
use crate::v1::generate_request::Prompt as WirePrompt;
use crate::v1::sampling_params::StructuredOutput;

fn limits() -> ModelLimits {
    ModelLimits {
        vocab_size: 100,
        max_model_len: 16,
        eos_tokens: vec![TokenId(2)],
        defaults: SamplingDefaults {
            temperature: 0.7,
            top_p: 0.9,
            top_k: 40,
            min_p: 0.02,
            ..Default::default()
        },
    }
}

fn request(tokens: &[u32]) -> v1::GenerateRequest {
    v1::GenerateRequest {
        prompt: Some(WirePrompt::TokenIds(v1::TokenIds { ids: tokens.into() })),
        ..Default::default()
    }
}

fn with_sampling(sampling: v1::SamplingParams) -> v1::GenerateRequest {
    v1::GenerateRequest {
        sampling: Some(sampling),
        ..request(&[1])
    }
}

fn with_stopping(stopping: v1::StoppingCriteria) -> v1::GenerateRequest {
    v1::GenerateRequest {
        stopping: Some(stopping),
        ..request(&[1])
    }
}

fn refused(request: v1::GenerateRequest) -> (ErrorKind, Vec<String>) {
    let refusal = check(request, &limits(), 7).expect_err("must be refused");
    let fields = refusal.violations.into_iter().map(|v| v.field).collect();
    (refusal.error.kind, fields)
}

#[test]
fn a_silent_request_gets_the_models_defaults() {
    let params = check(request(&[1]), &limits(), 7).expect("valid");
    assert!((params.sampling.temperature - 0.7).abs() < f32::EPSILON);
    assert!((params.sampling.top_p - 0.9).abs() < f32::EPSILON);
    assert_eq!(params.sampling.top_k, 40);
    assert!((params.sampling.min_p - 0.02).abs() < f32::EPSILON);
    assert_eq!(params.sampling.seed, 7);
    assert_eq!(params.sampling.stop_tokens, [TokenId(2)]);
    assert!(params.output.text && params.output.token_ids);
    assert!(params.output.skip_special_tokens && !params.include_stop);
    assert_eq!((params.n, params.sampling.min_tokens), (1, 0));
    let mut plain = limits();
    plain.defaults = SamplingDefaults::default(); // of a model that recommends nothing
    let sampling = check(request(&[1]), &plain, 7).expect("valid").sampling;
    assert_eq!((sampling.top_k, sampling.adjustments), (0, None));
    assert!(sampling.top_p >= 1.0 && sampling.min_p <= 0.0);
}

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
fn a_request_id_is_plain_and_short_or_absent() {
    let with_id = |request_id: &str| v1::GenerateRequest {
        request_id: request_id.to_owned(),
        ..request(&[1])
    };
    let longest = "x".repeat(MAX_REQUEST_ID_BYTES);
    for id in ["", "a-B_9.:", &longest] {
        assert!(check(with_id(id), &limits(), 7).is_ok(), "{id:?}");
    }
    let too_long = "x".repeat(MAX_REQUEST_ID_BYTES + 1);
    for id in ["a b", "a/b", "\u{e4}", "a\n", &too_long] {
        assert_eq!(refused(with_id(id)).1, ["request_id"], "{id:?}");
    }
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
fn ignore_eos_keeps_only_the_requests_own_stop_ids() {
    let params = check(
        with_stopping(v1::StoppingCriteria {
            ignore_eos: Some(true),
            stop_token_ids: vec![9, 5, 9],
            ..Default::default()
        }),
        &limits(),
        7,
    )
    .expect("valid");
    assert_eq!(params.sampling.stop_tokens, [TokenId(5), TokenId(9)]);
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
fn features_of_later_builds_are_refused_as_unsupported() {
    for request in [
        v1::GenerateRequest {
            media: vec![v1::Media::default()],
            ..request(&[1])
        },
        with_sampling(v1::SamplingParams {
            structured_output: Some(StructuredOutput::Regex("a".to_owned())),
            ..Default::default()
        }),
    ] {
        assert_eq!(refused(request).0, ErrorKind::UnsupportedFeature);
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

#[test]
fn every_fault_of_a_request_is_told_at_once() {
    let mut request = with_sampling(v1::SamplingParams {
        temperature: Some(-1.0),
        top_p: Some(2.0),
        ..Default::default()
    });
    request.request_id = "a b".to_owned();
    assert_eq!(
        refused(request).1,
        ["request_id", "sampling.temperature", "sampling.top_p"]
    );
}

#[test]
fn prompts_that_cannot_be_are_refused() {
    assert_eq!(refused(v1::GenerateRequest::default()).1, ["prompt"]);
    assert_eq!(refused(request(&[99, 100])).1, ["token_ids"]);
    assert_eq!(refused(request(&[1; 16])).0, ErrorKind::PromptTooLong);
    let text = |text: &str| v1::GenerateRequest {
        prompt: Some(WirePrompt::Text(text.to_owned())),
        ..Default::default()
    };
    assert_eq!(refused(text("")).1, ["prompt"]);
    assert!(check(text("x"), &limits(), 7).is_ok());
}

fn resuming(tokens: &[u32], sampling: v1::SamplingParams) -> v1::GenerateRequest {
    v1::GenerateRequest {
        resume_token_ids: Some(v1::TokenIds { ids: tokens.into() }),
        ..with_sampling(sampling)
    }
}

#[test]
fn what_is_resumed_is_one_stream_of_the_models_tokens_that_fits_the_context() {
    let one = v1::SamplingParams::default;
    assert_eq!(refused(resuming(&[4, 100], one())).1, ["resume_token_ids"]);
    assert_eq!(
        refused(resuming(&[4; 16], one())).0,
        ErrorKind::PromptTooLong
    );
    let of = |n| v1::SamplingParams {
        n: Some(n),
        ..Default::default()
    };
    assert_eq!(refused(resuming(&[4], of(2))).1, ["resume_token_ids"]);
    assert!(check(resuming(&[4], of(1)), &limits(), 7).is_ok());
    // The prompt leaves room for a token, and resumed ones may fill the context of 16.
    for (num_prompt, num_resumed, fits) in [
        (6, 10, true),
        (7, 10, false),
        (15, 0, true),
        (15, 1, true),
        (16, 0, false),
    ] {
        let params = check(resuming(&vec![4; num_resumed], one()), &limits(), 7).expect("valid");
        let prompt = vec![TokenId(1); num_prompt];
        let made = params.into_request(RequestId(1), prompt, &limits());
        let kind = made.map_err(|refusal| refusal.error.kind).err();
        let expected = (!fits).then_some(ErrorKind::PromptTooLong);
        assert_eq!(kind, expected, "{num_prompt} and {num_resumed}");
    }
}

#[test]
fn without_max_tokens_the_rest_of_the_context_is_generated() {
    let params = check(request(&[1, 2, 3]), &limits(), 7).expect("valid");
    let request = params
        .into_request(RequestId(1), vec![TokenId(1); 3], &limits())
        .expect("fits");
    assert_eq!(request.max_tokens, 13);
}

#[test]
fn without_max_tokens_what_the_kv_pool_holds_is_generated() {
    let filled = |num_prompt, longest, min_tokens| {
        let mut params = check(request(&[1]), &limits(), 7).expect("valid");
        params.sampling.min_tokens = min_tokens;
        params.fill_max_tokens(num_prompt, longest, &limits());
        params.max_tokens.expect("filled")
    };
    assert_eq!(filled(3, None, 0), 13, "the context holds 16");
    assert_eq!(filled(3, Some(16), 0), 13);
    assert_eq!(filled(3, Some(9), 0), 6);
    assert_eq!(filled(3, Some(4), 0), 1);
    assert_eq!(filled(3, Some(3), 0), 1, "which the scheduler refuses");
    assert_eq!(filled(3, Some(9), 8), 8, "as this");
    assert_eq!(filled(3, Some(9), 16), 13);
    assert_eq!(filled(99, Some(9), 0), 1);

    let mut asked = check(request(&[1]), &limits(), 7).expect("valid");
    asked.max_tokens = Some(12);
    asked.fill_max_tokens(3, Some(9), &limits());
    assert_eq!(asked.max_tokens, Some(12), "what is asked stays");

    let mut resumed = check(request(&[1]), &limits(), 7).expect("valid");
    resumed.resumed = vec![TokenId(4); 8];
    resumed.fill_max_tokens(3, Some(9), &limits());
    assert_eq!(resumed.max_tokens, Some(8), "which the scheduler refuses");
}

#[test]
fn resumed_tokens_count_towards_max_tokens() {
    let resumed = v1::GenerateRequest {
        resume_token_ids: Some(v1::TokenIds { ids: vec![4, 5] }),
        ..with_stopping(v1::StoppingCriteria {
            max_tokens: Some(15),
            ..Default::default()
        })
    };
    let params = check(resumed.clone(), &limits(), 7).expect("valid");
    let request = params
        .into_request(RequestId(1), vec![TokenId(1)], &limits())
        .expect("fits");
    assert_eq!((request.max_tokens, request.resumed.len()), (15, 2));

    let mut done = resumed;
    done.stopping = Some(v1::StoppingCriteria {
        max_tokens: Some(1),
        ..Default::default()
    });
    assert_eq!(refused(done).1, ["stopping.max_tokens"]);
}

#[test]
fn more_tokens_than_the_context_holds_are_refused_with_the_most_that_fits() {
    let asked = with_stopping(v1::StoppingCriteria {
        max_tokens: Some(16),
        ..Default::default()
    });
    let refusal = check(asked, &limits(), 7)
        .expect("valid so far")
        .into_request(RequestId(1), vec![TokenId(1)], &limits())
        .expect_err("15 at most");
    assert_eq!(refusal.error.kind, ErrorKind::InvalidParameter);
    assert!(
        refusal.error.message.contains("at most 15"),
        "{}",
        refusal.error.message
    );
}

#[test]
fn an_empty_prompt_is_refused() {
    let refusal = check(request(&[]), &limits(), 7)
        .expect("valid so far")
        .into_request(RequestId(1), vec![], &limits())
        .expect_err("empty");
    assert_eq!(refusal.error.kind, ErrorKind::InvalidParameter);
}

fn with_tenant(tenant: &str) -> v1::GenerateRequest {
    v1::GenerateRequest {
        tenant: Some(tenant.to_owned()),
        ..request(&[1])
    }
}

#[test]
fn a_tenant_is_a_short_plain_name_or_absent() {
    let longest = "x".repeat(MAX_TENANT_BYTES);
    for name in ["", "team-a", "A.b_9", &longest] {
        let params = check(with_tenant(name), &limits(), 7).expect("valid");
        assert_eq!(params.tenant, name);
    }
    assert_eq!(
        check(request(&[1]), &limits(), 7).expect("valid").tenant,
        ""
    );
    let too_long = "x".repeat(MAX_TENANT_BYTES + 1);
    for name in ["a b", "a/b", "t\u{e4}st", "a\n", &too_long] {
        let (kind, fields) = refused(with_tenant(name));
        assert_eq!(kind, ErrorKind::InvalidParameter);
        assert_eq!(fields, ["tenant"]);
    }
}
