//! What the fuzzer of `fuzz/` runs on messages before anything knows what they say, and what it begins
//! with.
//!
//! It is in the crate's tests, which replay the committed corpus, and in builds with
//! `--cfg fuzzing`; never in a release. A target panics when a promise is broken.

#[cfg(test)]
#[path = "../../../fuzz/src/replay.rs"]
mod replay;

use tonic::Code;

use crate::codec::{Bounded, decode};
use crate::decoded_size::{COPIES, Fault, GROWTH, element_bytes};
use crate::{Message, v1};

/// A target: its folder in `fuzz/corpus`, and what is run on its inputs.
pub type Target = (&'static str, fn(&[u8]));

/// The crate's targets.
pub const TARGETS: [Target; 1] = [("wire", run)];

/// A message that is not decoded leaves a status, and what its beginning was decoded to.
const STATUS_BYTES: usize = 16 * 1024;
const MOST_PER_BYTE_IN_PART: usize = 1024;

/// What may be done with the bytes of one kind of message.
struct Kind {
    check: fn(&[u8]),
    count: fn(&[u8]) -> Result<usize, Fault>,
}

const fn kind<T: Bounded>() -> Kind {
    Kind {
        check: check::<T>,
        count: |wire| element_bytes(T::SHAPE, wire, usize::MAX),
    }
}

/// By the first byte of an input.
static KINDS: [Kind; 7] = [
    kind::<v1::GenerateRequest>(),
    kind::<v1::SessionRequest>(),
    kind::<v1::SessionResponse>(),
    kind::<v1::AbortRequest>(),
    kind::<v1::DetokenizeRequest>(),
    kind::<v1::ListInstancesResponse>(),
    kind::<v1::GenerateResponse>(),
];

fn split(data: &[u8]) -> Option<(&'static Kind, &[u8])> {
    let (first, wire) = data.split_first()?;
    Some((KINDS.get(usize::from(*first))?, wire))
}

fn run(data: &[u8]) {
    if let Some((kind, wire)) = split(data) {
        (kind.check)(wire);
    }
}

/// The bytes that [`run`] may hold at a time: what the count of an input's elements promises.
#[must_use]
pub fn most_bytes(data: &[u8]) -> usize {
    let counted = split(data).map(|(kind, wire)| (kind.count)(wire));
    let elements = match counted {
        Some(Ok(num_bytes)) => GROWTH * num_bytes + COPIES * data.len(),
        _ => MOST_PER_BYTE_IN_PART * data.len(),
    };
    STATUS_BYTES + elements
}

fn check<T: Bounded>(wire: &[u8]) {
    let is_message = <T as Message>::decode(wire).is_ok();
    let most_bytes = T::ALLOWANCE.of_message(wire.len());
    let counted = element_bytes(T::SHAPE, wire, usize::MAX);
    let decoded = decode::<T>(wire);
    let code = decoded.as_ref().map_err(tonic::Status::code);
    match counted {
        Ok(num_bytes) if num_bytes > most_bytes => {
            assert_eq!(code.err(), Some(Code::InvalidArgument));
        }
        Ok(_) => assert_eq!(code.is_ok(), is_message, "a limit is in the way"),
        Err(Fault::Malformed) => assert!(!is_message, "a message is taken for none"),
        Err(Fault::Group) => assert!(code.is_err()),
        Err(Fault::TooLarge { .. }) => panic!("there was no limit"),
    }
}

/// Inputs made of messages as this build writes them, each with its target's name.
#[must_use]
pub fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let abort = v1::AbortRequest {
        request_ids: vec!["a".to_owned()],
    };
    let detokenize = v1::DetokenizeRequest {
        token_ids: TOKENS.into(),
        skip_special_tokens: Some(true),
    };
    let instances = v1::ListInstancesResponse {
        instances: vec![v1::InstanceInfo {
            links: vec![v1::LinkInfo::default()],
            ..Default::default()
        }],
        ..Default::default()
    };
    let delta = v1::Delta {
        token_ids: vec![1],
        logprobs: vec![logprob()],
        ..Default::default()
    };
    let delta = v1::GenerateResponse {
        event: Some(v1::generate_response::Event::Delta(delta)),
    };
    let messages = [
        generate().encode_to_vec(),
        output().encode_to_vec(),
        plan().encode_to_vec(),
        abort.encode_to_vec(),
        detokenize.encode_to_vec(),
        instances.encode_to_vec(),
        delta.encode_to_vec(),
    ];
    let seeds = (0..).zip(messages).map(|(kind, mut message)| {
        message.insert(0, kind);
        ("wire", message)
    });
    // What two bytes can become.
    let flood = [&[0][..], &[0x32, 0].repeat(1_000)].concat();
    seeds.chain([("wire", flood)]).collect()
}

const TOKENS: [u32; 3] = [1, 300, u32::MAX];

fn generate() -> v1::GenerateRequest {
    let tokens = v1::TokenIds { ids: TOKENS.into() };
    v1::GenerateRequest {
        request_id: "a".to_owned(),
        prompt: Some(v1::generate_request::Prompt::TokenIds(tokens.clone())),
        media: vec![
            v1::Media::default(),
            v1::Media {
                source: Some(v1::media::Source::Inline(vec![1, 2, 3])),
                mime_type: "image/png".to_owned(),
                content_hash: String::new(),
            },
        ],
        sampling: Some(v1::SamplingParams {
            temperature: Some(0.5),
            logit_bias: [(3, -1.0)].into(),
            ..Default::default()
        }),
        stopping: Some(v1::StoppingCriteria {
            stop: vec![String::new(), "stop".to_owned()],
            stop_token_ids: vec![2, 3],
            ..Default::default()
        }),
        resume_token_ids: Some(tokens),
        ..Default::default()
    }
}

fn logprob() -> v1::TokenLogprob {
    v1::TokenLogprob {
        token_id: 1,
        logprob: -0.5,
        top: vec![v1::TopLogprob::default()],
    }
}

fn output() -> v1::SessionRequest {
    let output = v1::StepOutput {
        outputs: vec![v1::SequenceOutput {
            logprob: Some(logprob()),
            prompt_logprobs: vec![logprob()],
            ..Default::default()
        }],
        ..Default::default()
    };
    v1::SessionRequest {
        event: Some(v1::session_request::Event::StepOutput(output)),
    }
}

fn plan() -> v1::SessionResponse {
    let plan = v1::StepPlan {
        left: vec![1, 300],
        joined: vec![v1::SequenceJoin {
            token_ids: TOKENS.into(),
            sampling: Some(v1::SamplingState {
                adjustments: Some(v1::LogitAdjustments {
                    bias_token_ids: vec![7],
                    biases: vec![0.5],
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        }],
        chunks: vec![v1::SequenceChunk::default()],
        ..Default::default()
    };
    v1::SessionResponse {
        command: Some(v1::session_response::Command::StepPlan(plan)),
    }
}
