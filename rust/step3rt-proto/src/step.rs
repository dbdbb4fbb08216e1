//! Steps on the wire: plans and outputs, to and from core types.
//!
//! Numbers from a peer are checked here and nowhere else; this module never trusts a length or an
//! id that it did not see in a decoded message.

use step3rt_core::ids::{BlockId, Epoch, InstanceId, LaneId, SequenceId, StepId, TokenId};
use step3rt_core::step::{
    SequenceChunk, SequenceJoin, SequenceOutput, StepKey, StepOutput, StepPlan, TokenLogprob,
};
use thiserror::Error;

use crate::sampling_wire::sampling_from_wire;
use crate::v1;

/// A message of a peer that this build cannot have sent.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum WireError {
    /// A lane number that no lane can have.
    #[error("lane {0} does not fit 8 bits: a cluster has at most 8 lanes")]
    LaneOutOfRange(u32),
    /// A message field that must be present is not.
    #[error("{message} arrived without {field}: the peer runs another version of the protocol")]
    MissingField {
        /// The message.
        message: &'static str,
        /// The field.
        field: &'static str,
    },
    /// A join that claims more prompt tokens than it has tokens.
    #[error(
        "sequence {sequence} joins with {num_prompt_tokens} prompt tokens of {num_tokens} known"
    )]
    PromptLongerThanTokens {
        /// The sequence.
        sequence: u64,
        /// As claimed.
        num_prompt_tokens: u32,
        /// As sent.
        num_tokens: usize,
    },
    /// A sampled token that the model does not have.
    #[error("sequence {sequence} sampled token {token}, and the vocabulary has {vocab_size}")]
    TokenOutOfVocabulary {
        /// The sequence.
        sequence: u64,
        /// As sent.
        token: u32,
        /// Ids are below it.
        vocab_size: u32,
    },
    /// A sampling number that is not finite, or that no arithmetic can bear.
    #[error("sequence {sequence} joins with a sampling parameter that is not usable: {field}")]
    UnusableSampling {
        /// The sequence.
        sequence: u64,
        /// The parameter.
        field: &'static str,
    },
}

/// The key of a wire step of `instance`.
pub fn key_from_wire(
    instance: InstanceId,
    epoch: u64,
    lane: u32,
    step: u64,
) -> Result<StepKey, WireError> {
    let lane = u8::try_from(lane).map_err(|_| WireError::LaneOutOfRange(lane))?;
    Ok(StepKey {
        instance,
        epoch: Epoch(epoch),
        lane: LaneId(lane),
        step: StepId(step),
    })
}

impl From<StepPlan> for v1::StepPlan {
    fn from(plan: StepPlan) -> Self {
        Self {
            epoch: plan.key.epoch.0,
            lane: plan.key.lane.0.into(),
            step: plan.key.step.0,
            left: plan.left.into_iter().map(|id| id.0).collect(),
            joined: plan.joined.into_iter().map(Into::into).collect(),
            chunks: plan.chunks.into_iter().map(Into::into).collect(),
        }
    }
}

/// The plan that `instance` received.
pub fn plan_from_wire(instance: InstanceId, plan: v1::StepPlan) -> Result<StepPlan, WireError> {
    Ok(StepPlan {
        key: key_from_wire(instance, plan.epoch, plan.lane, plan.step)?,
        left: plan.left.into_iter().map(SequenceId).collect(),
        joined: plan
            .joined
            .into_iter()
            .map(join_from_wire)
            .collect::<Result<_, _>>()?,
        chunks: plan.chunks.into_iter().map(chunk_from_wire).collect(),
    })
}

impl From<SequenceJoin> for v1::SequenceJoin {
    fn from(join: SequenceJoin) -> Self {
        Self {
            sequence_id: join.sequence.0,
            token_ids: ids_to_wire(join.tokens),
            num_prompt_tokens: join.num_prompt_tokens,
            sampling: Some(join.sampling.into()),
        }
    }
}

fn join_from_wire(join: v1::SequenceJoin) -> Result<SequenceJoin, WireError> {
    let sequence = join.sequence_id;
    let sampling = join.sampling.ok_or(WireError::MissingField {
        message: "SequenceJoin",
        field: "sampling",
    })?;
    if join.num_prompt_tokens as usize > join.token_ids.len() {
        return Err(WireError::PromptLongerThanTokens {
            sequence,
            num_prompt_tokens: join.num_prompt_tokens,
            num_tokens: join.token_ids.len(),
        });
    }
    Ok(SequenceJoin {
        sequence: SequenceId(sequence),
        tokens: ids_from_wire(join.token_ids),
        num_prompt_tokens: join.num_prompt_tokens,
        sampling: sampling_from_wire(sequence, sampling)?,
    })
}

impl From<SequenceChunk> for v1::SequenceChunk {
    fn from(chunk: SequenceChunk) -> Self {
        Self {
            sequence_id: chunk.sequence.0,
            num_computed_tokens: chunk.num_computed_tokens,
            num_new_tokens: chunk.num_new_tokens,
            new_block_ids: chunk.new_blocks.into_iter().map(|id| id.0).collect(),
            samples: chunk.samples,
        }
    }
}

fn chunk_from_wire(chunk: v1::SequenceChunk) -> SequenceChunk {
    SequenceChunk {
        sequence: SequenceId(chunk.sequence_id),
        num_computed_tokens: chunk.num_computed_tokens,
        num_new_tokens: chunk.num_new_tokens,
        new_blocks: chunk.new_block_ids.into_iter().map(BlockId).collect(),
        samples: chunk.samples,
    }
}

impl From<StepOutput> for v1::StepOutput {
    fn from(output: StepOutput) -> Self {
        Self {
            epoch: output.key.epoch.0,
            lane: output.key.lane.0.into(),
            step: output.key.step.0,
            outputs: output.outputs.into_iter().map(Into::into).collect(),
            timing: None,
        }
    }
}

/// The output that `instance` sent. Sampled tokens are ids of a vocabulary of `vocab_size`: they go to
/// clients, and to other instances when a sequence moves.
pub fn output_from_wire(
    instance: InstanceId,
    output: v1::StepOutput,
    vocab_size: u32,
) -> Result<StepOutput, WireError> {
    for output in &output.outputs {
        if let Some(token) = output.token_id.filter(|token| *token >= vocab_size) {
            return Err(WireError::TokenOutOfVocabulary {
                sequence: output.sequence_id,
                token,
                vocab_size,
            });
        }
    }
    Ok(StepOutput {
        key: key_from_wire(instance, output.epoch, output.lane, output.step)?,
        outputs: output
            .outputs
            .into_iter()
            .map(sequence_output_from_wire)
            .collect(),
    })
}

impl From<SequenceOutput> for v1::SequenceOutput {
    fn from(output: SequenceOutput) -> Self {
        Self {
            sequence_id: output.sequence.0,
            token_id: output.token.map(|token| token.0),
            logprob: output.logprob.map(Into::into),
            prompt_logprobs: output.prompt_logprobs.into_iter().map(Into::into).collect(),
            is_corrupt: output.is_corrupt,
        }
    }
}

fn sequence_output_from_wire(output: v1::SequenceOutput) -> SequenceOutput {
    SequenceOutput {
        sequence: SequenceId(output.sequence_id),
        token: output.token_id.map(TokenId),
        logprob: output.logprob.map(logprob_from_wire),
        prompt_logprobs: output
            .prompt_logprobs
            .into_iter()
            .map(logprob_from_wire)
            .collect(),
        is_corrupt: output.is_corrupt,
    }
}

impl From<TokenLogprob> for v1::TokenLogprob {
    fn from(logprob: TokenLogprob) -> Self {
        Self {
            token_id: logprob.token.0,
            logprob: logprob.logprob,
            top: logprob
                .top
                .into_iter()
                .map(|(token, logprob)| v1::TopLogprob {
                    token_id: token.0,
                    logprob,
                })
                .collect(),
        }
    }
}

fn logprob_from_wire(logprob: v1::TokenLogprob) -> TokenLogprob {
    TokenLogprob {
        token: TokenId(logprob.token_id),
        logprob: logprob.logprob,
        top: logprob
            .top
            .into_iter()
            .map(|top| (TokenId(top.token_id), top.logprob))
            .collect(),
    }
}

pub(crate) fn ids_to_wire(ids: Vec<TokenId>) -> Vec<u32> {
    ids.into_iter().map(|id| id.0).collect()
}

pub(crate) fn ids_from_wire(ids: Vec<u32>) -> Vec<TokenId> {
    ids.into_iter().map(TokenId).collect()
}

#[cfg(test)]
mod tests {
    use step3rt_core::step::SamplingState;

    use super::*;

    fn plan() -> StepPlan {
        StepPlan {
            key: StepKey {
                instance: InstanceId(4),
                epoch: Epoch(9),
                lane: LaneId(2),
                step: StepId(77),
            },
            left: vec![SequenceId(1)],
            joined: vec![SequenceJoin {
                sequence: SequenceId(2),
                tokens: vec![TokenId(5), TokenId(6), TokenId(7)],
                num_prompt_tokens: 2,
                sampling: SamplingState {
                    temperature: 0.5,
                    top_k: 3,
                    top_p: 0.9,
                    min_p: 0.1,
                    seed: u64::MAX,
                    top_logprobs: Some(0),
                    prompt_logprobs: None,
                    min_tokens: 1,
                    stop_tokens: vec![TokenId(2)],
                    adjustments: None,
                },
            }],
            chunks: vec![SequenceChunk {
                sequence: SequenceId(2),
                num_computed_tokens: 0,
                num_new_tokens: 3,
                new_blocks: vec![BlockId(0), BlockId(8)],
                samples: true,
            }],
        }
    }

    #[test]
    fn a_plan_survives_the_wire() {
        let mut plan = plan();
        for num_prompt_tokens in [2, 3] {
            plan.joined[0].num_prompt_tokens = num_prompt_tokens; // of the three that are known
            let back = plan_from_wire(InstanceId(4), plan.clone().into()).expect("valid");
            assert_eq!(back, plan);
        }
    }

    #[test]
    fn an_output_survives_the_wire() {
        let output = StepOutput {
            key: plan().key,
            outputs: vec![SequenceOutput {
                sequence: SequenceId(2),
                token: Some(TokenId(0)),
                logprob: Some(TokenLogprob {
                    token: TokenId(0),
                    logprob: -0.25,
                    top: vec![(TokenId(0), -0.25), (TokenId(3), -2.0)],
                }),
                prompt_logprobs: vec![TokenLogprob {
                    token: TokenId(6),
                    logprob: f32::NEG_INFINITY,
                    top: vec![],
                }],
                is_corrupt: false,
            }],
        };
        let back = output_from_wire(InstanceId(4), output.clone().into(), 4).expect("valid");
        assert_eq!(back, output);
    }

    #[test]
    fn a_token_beyond_the_vocabulary_is_refused() {
        let output = |token_id| v1::StepOutput {
            outputs: vec![v1::SequenceOutput {
                sequence_id: 2,
                token_id: Some(token_id),
                ..Default::default()
            }],
            ..Default::default()
        };
        assert!(output_from_wire(InstanceId(4), output(3), 4).is_ok());
        assert_eq!(
            output_from_wire(InstanceId(4), output(4), 4),
            Err(WireError::TokenOutOfVocabulary {
                sequence: 2,
                token: 4,
                vocab_size: 4
            })
        );
    }

    #[test]
    fn a_lane_beyond_8_bits_is_refused() {
        let mut wire = v1::StepPlan::from(plan());
        wire.lane = 256;
        assert_eq!(
            plan_from_wire(InstanceId(4), wire),
            Err(WireError::LaneOutOfRange(256))
        );
    }

    #[test]
    fn a_join_without_sampling_or_with_a_long_prompt_or_nan_is_refused() {
        let mut wire = v1::StepPlan::from(plan());
        wire.joined[0].sampling = None;
        assert!(matches!(
            plan_from_wire(InstanceId(4), wire),
            Err(WireError::MissingField { .. })
        ));

        let mut wire = v1::StepPlan::from(plan());
        wire.joined[0].num_prompt_tokens = 4;
        assert!(matches!(
            plan_from_wire(InstanceId(4), wire),
            Err(WireError::PromptLongerThanTokens { .. })
        ));

        let mut plan = plan();
        plan.joined[0].sampling.temperature = f32::NAN;
        assert_eq!(
            plan_from_wire(InstanceId(4), plan.into()),
            Err(WireError::UnusableSampling {
                sequence: 2,
                field: "temperature"
            })
        );
    }
}
