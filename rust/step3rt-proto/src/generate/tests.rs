//! Which requests are refused, with which kind and field.

mod lengths;
mod numbers;

use super::*;
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
