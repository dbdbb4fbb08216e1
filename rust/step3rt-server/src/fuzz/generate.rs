//! Requests of clients: from bytes to a request of the core, and from there to an instance.

use std::cell::RefCell;
use std::time::Duration;

use step3rt_core::ids::{InstanceId, RequestId, TokenId};
use step3rt_proto::generate::{
    GenerateParams, MAX_REQUEST_ID_BYTES, MAX_TENANT_BYTES, ModelLimits, Prompt, SamplingDefaults,
    check,
};
use step3rt_proto::refusal::Refusal;
use step3rt_proto::sampling::{MAX_N, MAX_STOP_STRING_BYTES, MAX_STOP_STRINGS};
use step3rt_proto::step::plan_from_wire;
use step3rt_proto::{Message, v1};
use tonic::metadata::{MetadataMap, MetadataValue};
use tonic::{Code, Status};

use super::requests::Serving;
use super::{byte, requests};
use crate::deadline::grpc_timeout;

const REQUEST: u8 = 0;
const TIMEOUT: u8 = 1;

/// A client's library refuses the metadata of a longer error, and with it the reason. gRPC's own
/// default is 8 KiB; base64 and other headers take their part.
const MAX_ERROR_BYTES: usize = 5 * 1024;

pub(super) fn run(mut data: &[u8]) {
    match byte(&mut data) {
        REQUEST => request(data),
        TIMEOUT => timeout(data),
        _ => {}
    }
}

fn request(mut data: &[u8]) {
    // What the pool would hold, if anybody knows.
    let longest = Some(u32::from(byte(&mut data))).filter(|longest| *longest > 0);
    let Ok(request) = <v1::GenerateRequest as Message>::decode(data) else {
        return;
    };
    let limits = limits();
    match check(request.clone(), &limits, 5) {
        Ok(params) => {
            check_params(&params, &request, &limits);
            submit(params, longest, &limits);
        }
        Err(refusal) => check_refusal(refusal),
    }
}

/// The limits of a small model.
fn limits() -> ModelLimits {
    ModelLimits {
        vocab_size: requests::VOCAB_SIZE,
        max_model_len: requests::MAX_MODEL_LEN,
        eos_tokens: vec![TokenId(2)],
        defaults: SamplingDefaults {
            repetition_penalty: 1.1,
            ..SamplingDefaults::default()
        },
    }
}

fn check_params(params: &GenerateParams, request: &v1::GenerateRequest, limits: &ModelLimits) {
    assert!(params.request_id.len() <= MAX_REQUEST_ID_BYTES && params.request_id.is_ascii());
    assert!(params.tenant.len() <= MAX_TENANT_BYTES && params.tenant.is_ascii());
    assert!((1..=MAX_N).contains(&params.n));
    assert!(params.stop_strings.len() <= MAX_STOP_STRINGS);
    let is_usable = |stop: &String| (1..=MAX_STOP_STRING_BYTES).contains(&stop.len());
    assert!(params.stop_strings.iter().all(is_usable));
    let stop_tokens = &params.sampling.stop_tokens;
    assert!(stop_tokens.is_sorted_by(|a, b| a < b));
    let mut tokens = [&stop_tokens[..], &params.resumed].concat();
    if let Prompt::Tokens(prompt) = &params.prompt {
        tokens.extend(prompt);
    }
    assert!(tokens.iter().all(|token| token.0 < limits.vocab_size));
    assert!(request.media.is_empty(), "images were passed over");
    assert!(params.resumed.is_empty() || params.n == 1);
}

/// What was accepted can be computed, or is refused for its length alone.
fn submit(mut params: GenerateParams, longest: Option<u32>, limits: &ModelLimits) {
    let prompt = match &params.prompt {
        Prompt::Tokens(tokens) => tokens.clone(),
        // As long as the text: what a tokenizer of bytes makes of it.
        Prompt::Text(text) => vec![TokenId(1); text.len()],
        Prompt::Chat(chat) => vec![TokenId(1); chat.messages_json.len()],
    };
    params.fill_max_tokens(prompt.len(), longest, limits);
    let num_prompt = prompt.len();
    let min_tokens = params.sampling.min_tokens;
    let request = match params.into_request(RequestId(1), prompt, limits) {
        Ok(request) => request,
        Err(refusal) => return check_refusal(refusal),
    };
    assert_eq!((request.prompt.len(), num_prompt > 0), (num_prompt, true));
    assert!(request.max_tokens > 0 && request.resumed.len() <= request.max_tokens as usize);
    assert!(num_prompt + request.max_tokens as usize <= limits.max_model_len as usize);
    assert!(min_tokens <= limits.max_model_len);
    thread_local! {
        static SERVING: RefCell<Serving> = RefCell::new(Serving::new());
    }
    SERVING.with_borrow_mut(|serving| {
        for plan in serving.plans_of(request) {
            let instance: InstanceId = plan.key.instance;
            let wire = v1::StepPlan::from(plan.clone());
            assert_eq!(
                plan_from_wire(instance, wire),
                Ok(plan),
                "an instance refuses it"
            );
        }
    });
}

fn check_refusal(refusal: Refusal) {
    assert!(!refusal.violations.is_empty(), "{refusal:?} names no field");
    let status = Status::from(refusal);
    assert_eq!(status.code(), Code::InvalidArgument);
    let num_bytes = status.message().len() + status.details().len();
    assert!(
        num_bytes <= MAX_ERROR_BYTES,
        "an error of {num_bytes} bytes: {status:?}"
    );
}

/// The deadline's header.
fn timeout(data: &[u8]) {
    let Ok(value) = MetadataValue::try_from(data) else {
        return;
    };
    let mut metadata = MetadataMap::new();
    metadata.insert("grpc-timeout", value);
    let text = std::str::from_utf8(data).unwrap_or_default();
    let parsed = text.split_at_checked(text.len().saturating_sub(1));
    let expected = parsed.and_then(|(digits, unit)| {
        let is_number =
            (1..=8).contains(&digits.len()) && digits.bytes().all(|digit| digit.is_ascii_digit());
        let nanoseconds: u64 = match unit {
            "H" => 3_600_000_000_000,
            "M" => 60_000_000_000,
            "S" => 1_000_000_000,
            "m" => 1_000_000,
            "u" => 1_000,
            "n" => 1,
            _ => return None,
        };
        let value: u128 = is_number.then(|| digits.parse().expect("digits"))?;
        Some(value * u128::from(nanoseconds))
    });
    let found = grpc_timeout(&metadata);
    assert_eq!(found.is_ok(), expected.is_some(), "{text:?}");
    let found = found.ok().flatten().as_ref().map(Duration::as_nanos);
    assert_eq!(found, expected);
}

pub(super) fn seeds() -> Vec<Vec<u8>> {
    let timeouts = [
        "2H",
        "3M",
        "10S",
        "250m",
        "7u",
        "99999999n",
        "123456789S",
        "+5S",
        "S",
    ];
    let timeouts = timeouts.map(|text| [&[TIMEOUT], text.as_bytes()].concat());
    let requests = requests::examples().into_iter();
    let requests = requests.map(|request| {
        let longest = 40;
        [&[REQUEST, longest][..], &request.encode_to_vec()].concat()
    });
    requests.chain(timeouts).collect()
}
