//! What the scheduler decides: the plan of one lane's next step, and what comes back.
//!
//! A plan holds deltas only: an attention instance keeps its sequences' tokens and block tables,
//! and the token a sequence sampled last never travels back to it. This module never decides
//! anything.

use std::sync::Arc;

use crate::ids::{BlockId, Epoch, InstanceId, LaneId, SequenceId, StepId, TokenId};

/// Names one step of one lane of one incarnation of an attention instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StepKey {
    /// The attention instance that runs the step.
    pub instance: InstanceId,
    /// Its incarnation; outputs of another one are stale and have no effect.
    pub epoch: Epoch,
    /// The micro-batch lane.
    pub lane: LaneId,
    /// The lane's step counter.
    pub step: StepId,
}

/// The next step of one lane.
///
/// Steps of a lane take place in their order; several may be on their way to the instance. Each is
/// applied in the order of its fields: forget `left`, learn `joined`, compute `chunks`. Every plan
/// is answered once, in order, with a [`StepOutput`] or a failure, also one that has only `left`.
///
/// **A step that fails.** `left`, `joined` and `new_blocks` take effect when a step's turn comes,
/// even if the compute then fails: a failed step leaves no sequence further than it was, but the
/// instance keeps what it was told. So every delta is sent exactly once, and the plan that redoes a
/// failed step has only the chunks again. This is safe because plans of one incarnation arrive in
/// order or the incarnation ends, and with it all that it was told.
///
/// **What follows it.** A step planned before the failure was known may have a chunk that starts
/// where its sequence is not. The instance fails such a step whole, and the scheduler plans
/// nothing on that lane until it has.
#[derive(Clone, Debug, PartialEq)]
pub struct StepPlan {
    /// Which step this is.
    pub key: StepKey,
    /// Sequences that the lane forgets. Their blocks may belong to others already: no chunk of
    /// theirs comes any more.
    pub left: Vec<SequenceId>,
    /// Sequences that the lane learns, with an empty block table; where a sequence is at first,
    /// its first chunk says, which is in the same plan. An id joins once in a coordinator's life.
    pub joined: Vec<SequenceJoin>,
    /// Work, in this order; never empty unless `left` is not.
    pub chunks: Vec<SequenceChunk>,
}

/// A sequence as an attention instance must know it before it can compute it.
#[derive(Clone, Debug, PartialEq)]
pub struct SequenceJoin {
    /// The sequence.
    pub sequence: SequenceId,
    /// All known tokens: the prompt, then what was generated before a preemption or a loss.
    pub tokens: Vec<TokenId>,
    /// How many of `tokens` are the prompt's.
    pub num_prompt_tokens: u32,
    /// How to sample it.
    pub sampling: SamplingState,
}

/// Computes tokens `[num_computed_tokens, num_computed_tokens + num_new_tokens)`, which the
/// instance knows when the step's turn comes; the step before may have sampled the last of them.
///
/// ```text
///   0          num_computed_tokens        known
///   |-- in KV ------------|-- this chunk ---|   samples when it ends at `known`
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SequenceChunk {
    /// The sequence.
    pub sequence: SequenceId,
    /// Tokens whose K and V are in the cache already: computed by earlier chunks or, at the start
    /// of its first chunk, by another sequence with the same beginning.
    pub num_computed_tokens: u32,
    /// Tokens to compute now, at least 1.
    pub num_new_tokens: u32,
    /// Blocks appended to the sequence's block table before the chunk is computed. Those that hold
    /// computed tokens may be shared with other sequences; they are full and never written again.
    pub new_blocks: Vec<BlockId>,
    /// Whether the chunk ends at the last known token, so that a token is sampled.
    pub samples: bool,
}

/// Validated sampling parameters with every default filled in.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingState {
    /// 0 is greedy.
    pub temperature: f32,
    /// 0 is off.
    pub top_k: u32,
    /// 1 is off.
    pub top_p: f32,
    /// 0 is off.
    pub min_p: f32,
    /// The noise of a token depends on (seed, position) alone, never on batch mates.
    pub seed: u64,
    /// `None`: no logprobs; 0: the sampled token's only.
    pub top_logprobs: Option<u32>,
    /// The same for prompt tokens.
    pub prompt_logprobs: Option<u32>,
    /// Stop ids are masked until this many tokens are generated.
    pub min_tokens: u32,
    /// Ids that end the sequence, eos included unless it is ignored.
    pub stop_tokens: Vec<TokenId>,
    /// What few requests ask for, kept apart so that the others do not carry it.
    pub adjustments: Option<Arc<LogitAdjustments>>,
}

/// What a request adds to logits before a token is chosen from them; at least one is not neutral.
///
/// Instances count tokens by themselves: a join tells prompt and generated tokens apart.
#[derive(Clone, Debug, PartialEq)]
pub struct LogitAdjustments {
    /// Taken off the logit of every token that was generated; 0 is off.
    pub presence_penalty: f32,
    /// Taken off as often as the token was generated; 0 is off.
    pub frequency_penalty: f32,
    /// Divides the positive and multiplies the negative logits of tokens of prompt and output; 1 is
    /// off.
    pub repetition_penalty: f32,
    /// Added to single logits first of all. Ids ascend.
    pub logit_bias: Vec<(TokenId, f32)>,
}

/// What a lane's step gave: one entry per chunk, in the plan's order.
#[derive(Clone, Debug, PartialEq)]
pub struct StepOutput {
    /// Which step this answers.
    pub key: StepKey,
    /// One per chunk of the plan, in its order.
    pub outputs: Vec<SequenceOutput>,
}

/// What a chunk gave.
#[derive(Clone, Debug, PartialEq)]
pub struct SequenceOutput {
    /// The sequence.
    pub sequence: SequenceId,
    /// The sampled token; present exactly when the chunk samples.
    pub token: Option<TokenId>,
    /// Its logprob, when asked for.
    pub logprob: Option<TokenLogprob>,
    /// Logprobs of the prompt tokens computed in this chunk, the very first token excluded.
    pub prompt_logprobs: Vec<TokenLogprob>,
    /// The logits were not finite: this sequence alone fails.
    pub is_corrupt: bool,
}

/// A token's log-probability and its most likely rivals.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprob {
    /// The token.
    pub token: TokenId,
    /// Natural logarithm of its probability under the model (before temperature).
    pub logprob: f32,
    /// The most likely tokens, most likely first.
    pub top: Vec<(TokenId, f32)>,
}
