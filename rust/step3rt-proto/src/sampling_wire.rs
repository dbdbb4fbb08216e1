//! Sampling parameters on their way to an instance.
//!
//! What a peer sends is checked for what arithmetic can bear, never for what clients may ask: that
//! is [`crate::sampling`]'s.

use std::sync::Arc;

use step3rt_core::ids::TokenId;
use step3rt_core::step::{LogitAdjustments, SamplingState};

use crate::step::{WireError, ids_from_wire, ids_to_wire};
use crate::v1;

impl From<SamplingState> for v1::SamplingState {
    fn from(sampling: SamplingState) -> Self {
        Self {
            temperature: sampling.temperature,
            top_k: sampling.top_k,
            top_p: sampling.top_p,
            min_p: sampling.min_p,
            seed: sampling.seed,
            top_logprobs: sampling.top_logprobs,
            prompt_logprobs: sampling.prompt_logprobs,
            min_tokens: sampling.min_tokens,
            stop_token_ids: ids_to_wire(sampling.stop_tokens),
            adjustments: sampling.adjustments.as_deref().map(Into::into),
        }
    }
}

impl From<&LogitAdjustments> for v1::LogitAdjustments {
    fn from(adjustments: &LogitAdjustments) -> Self {
        let (ids, biases) = adjustments
            .logit_bias
            .iter()
            .map(|(token, bias)| (token.0, *bias))
            .unzip();
        Self {
            presence_penalty: adjustments.presence_penalty,
            frequency_penalty: adjustments.frequency_penalty,
            repetition_penalty: adjustments.repetition_penalty,
            bias_token_ids: ids,
            biases,
        }
    }
}

/// The parameters that `sequence` joins with.
pub(crate) fn sampling_from_wire(
    sequence: u64,
    sampling: v1::SamplingState,
) -> Result<SamplingState, WireError> {
    let check = |is_usable: bool, field| {
        let error = WireError::UnusableSampling { sequence, field };
        is_usable.then_some(()).ok_or(error)
    };
    check(sampling.temperature.is_finite(), "temperature")?;
    check(sampling.top_p.is_finite(), "top_p")?;
    check(sampling.min_p.is_finite(), "min_p")?;
    let adjustments = sampling.adjustments.map(|wire| {
        let repetition_penalty = wire.repetition_penalty;
        check(wire.presence_penalty.is_finite(), "presence_penalty")?;
        check(wire.frequency_penalty.is_finite(), "frequency_penalty")?;
        check(
            repetition_penalty.is_finite() && repetition_penalty > 0.0,
            "repetition_penalty",
        )?;
        check(wire.biases.iter().all(|bias| bias.is_finite()), "biases")?;
        check(
            wire.biases.len() == wire.bias_token_ids.len(),
            "bias_token_ids",
        )?;
        let ids = wire.bias_token_ids.into_iter().map(TokenId);
        Ok(Arc::new(LogitAdjustments {
            presence_penalty: wire.presence_penalty,
            frequency_penalty: wire.frequency_penalty,
            repetition_penalty,
            logit_bias: ids.zip(wire.biases).collect(),
        }))
    });
    Ok(SamplingState {
        temperature: sampling.temperature,
        top_k: sampling.top_k,
        top_p: sampling.top_p,
        min_p: sampling.min_p,
        seed: sampling.seed,
        top_logprobs: sampling.top_logprobs,
        prompt_logprobs: sampling.prompt_logprobs,
        min_tokens: sampling.min_tokens,
        stop_tokens: ids_from_wire(sampling.stop_token_ids),
        adjustments: adjustments.transpose()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> SamplingState {
        SamplingState {
            temperature: 0.5,
            top_k: 3,
            top_p: 0.9,
            min_p: 0.1,
            seed: u64::MAX,
            top_logprobs: Some(0),
            prompt_logprobs: None,
            min_tokens: 1,
            stop_tokens: vec![TokenId(2)],
            adjustments: Some(Arc::new(LogitAdjustments {
                presence_penalty: -2.0,
                frequency_penalty: 0.25,
                repetition_penalty: 1.5,
                logit_bias: vec![(TokenId(0), -100.0), (TokenId(7), 0.5)],
            })),
        }
    }

    #[test]
    fn adjustments_survive_the_wire_and_so_does_their_absence() {
        let back = sampling_from_wire(1, state().into()).expect("valid");
        assert_eq!(back, state());
        let mut neutral = state();
        neutral.adjustments = None;
        let wire = v1::SamplingState::from(neutral.clone());
        assert_eq!(wire.adjustments, None);
        assert_eq!(sampling_from_wire(1, wire), Ok(neutral));
    }

    #[test]
    fn adjustments_that_arithmetic_cannot_bear_are_refused() {
        type Spoil = fn(&mut v1::LogitAdjustments);
        let cases: [(&str, Spoil); 7] = [
            ("presence_penalty", |a| a.presence_penalty = f32::NAN),
            ("frequency_penalty", |a| a.frequency_penalty = f32::INFINITY),
            ("repetition_penalty", |a| a.repetition_penalty = 0.0),
            ("repetition_penalty", |a| a.repetition_penalty = f32::NAN),
            ("repetition_penalty", |a| {
                a.repetition_penalty = f32::INFINITY;
            }),
            ("biases", |a| a.biases[1] = f32::NEG_INFINITY),
            ("bias_token_ids", |a| a.bias_token_ids.push(9)),
        ];
        for (field, spoil) in cases {
            let mut wire = v1::SamplingState::from(state());
            spoil(wire.adjustments.as_mut().expect("set"));
            let error = WireError::UnusableSampling { sequence: 1, field };
            assert_eq!(sampling_from_wire(1, wire), Err(error));
        }
        type SpoilState = fn(&mut v1::SamplingState);
        let cases: [(&str, SpoilState); 3] = [
            ("temperature", |s| s.temperature = f32::INFINITY),
            ("top_p", |s| s.top_p = f32::NAN),
            ("min_p", |s| s.min_p = f32::NAN),
        ];
        for (field, spoil) in cases {
            let mut wire = v1::SamplingState::from(state());
            spoil(&mut wire);
            let error = WireError::UnusableSampling { sequence: 1, field };
            assert_eq!(sampling_from_wire(1, wire), Err(error));
        }
    }
}
