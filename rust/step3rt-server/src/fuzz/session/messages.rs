//! What instances say: as they say it, and with one thing wrong.

use step3rt_proto::{PROTOCOL_VERSION, v1};

use crate::fuzz::requests::{MAX_MODEL_LEN, VOCAB_SIZE};

pub(super) fn hello(role: v1::Role) -> v1::Hello {
    v1::Hello {
        protocol_version: PROTOCOL_VERSION,
        role: role.into(),
        boot_id: "b".to_owned(),
        pid: 1,
        model_fingerprint: "f".to_owned(),
        model: Some(v1::ModelSummary {
            name: "m".to_owned(),
            vocab_size: VOCAB_SIZE,
            max_model_len: MAX_MODEL_LEN,
            ..Default::default()
        }),
    }
}

pub(super) fn ready(num_kv_blocks: u32) -> v1::Ready {
    v1::Ready {
        addresses: vec![v1::DataAddress {
            fabric: "tcp".to_owned(),
            address: "h:1".to_owned(),
        }],
        num_kv_blocks,
    }
}

/// What an instance makes of a plan that chooses `token` wherever it samples.
pub(super) fn output(plan: &v1::StepPlan, token: u8) -> v1::StepOutput {
    let outputs = plan.chunks.iter().map(|chunk| {
        let is_first = chunk.num_computed_tokens == 0;
        let num_logprobs = chunk.num_new_tokens - u32::from(is_first && chunk.num_new_tokens > 0);
        v1::SequenceOutput {
            sequence_id: chunk.sequence_id,
            token_id: chunk.samples.then_some(u32::from(token) % VOCAB_SIZE),
            logprob: None,
            prompt_logprobs: if token & 64 == 0 {
                Vec::new()
            } else {
                vec![v1::TokenLogprob::default(); num_logprobs as usize]
            },
            is_corrupt: false,
        }
    });
    v1::StepOutput {
        epoch: plan.epoch,
        lane: plan.lane,
        step: plan.step,
        outputs: outputs.collect(),
        timing: None,
    }
}

/// One thing that an answer may have wrong.
pub(super) fn spoil(output: &mut v1::StepOutput, how: u8) {
    match how & 7 {
        0 => drop(output.outputs.pop()),
        1 => output.outputs.extend_from_within(..),
        2 => output.epoch = output.epoch.wrapping_sub(1),
        3 => output.lane += u32::from(how >> 3),
        4 => output.step = output.step.wrapping_add(u64::from(how >> 3)),
        5 => output.outputs.reverse(),
        _ => {}
    }
    let Some(first) = output.outputs.first_mut() else {
        return;
    };
    match how & 0x77 {
        0x06 => first.sequence_id ^= 1,
        0x16 => first.token_id = None,
        0x26 => first.token_id = Some(0),
        0x36 => first.token_id = Some(VOCAB_SIZE),
        0x46 => first.is_corrupt = true,
        0x56 => first.prompt_logprobs = vec![v1::TokenLogprob::default(); 40],
        _ => {}
    }
}

pub(super) fn failed(plan: &v1::StepPlan) -> v1::StepFailed {
    v1::StepFailed {
        epoch: plan.epoch,
        lane: plan.lane,
        step: plan.step,
        reason: "why".to_owned(),
    }
}
