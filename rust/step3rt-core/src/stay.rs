//! Owns what a sequence has while it has a place: its blocks, and how far it is computed there.
//!
//! It never outlives the place; what a sequence keeps is in
//! [`Sequence`](crate::sequence::Sequence).

use crate::block_pool::NodeId;
use crate::ids::{BlockId, InstanceId, LaneId, SequenceId};

/// What a sequence has while it has a place. What most steps have no use for is in [`Holding`]; see
/// [`Sequence`](crate::sequence::Sequence).
#[derive(Debug)]
pub(crate) struct Stay {
    pub(crate) id: SequenceId,
    /// Whether the instance has been told of it (a plan has it in `joined`).
    pub(crate) is_told: bool,
    /// Those whose K and V are in the cache.
    pub(crate) num_computed_tokens: u32,
    /// The same when all steps in flight have succeeded.
    pub(crate) num_planned_tokens: u32,
    /// Tokens that the steps in flight will sample: known to the instance before they are here.
    pub(crate) num_pending_samples: u8,
    pub(crate) num_steps_in_flight: u8,
    pub(crate) after_step: AfterStep,
    /// Whether a step has sampled from it here.
    pub(crate) has_sampled: bool,
    /// Blocks that all plannable tokens need: what the lane counts for it, granted or not.
    pub(crate) num_demanded_blocks: u32,
    /// How many `blocks` it holds.
    pub(crate) num_granted_blocks: u32,
    pub(crate) holding: Box<Holding>,
}

/// Where a sequence stays, and the blocks that it has there.
#[derive(Debug)]
pub(crate) struct Holding {
    pub(crate) instance: InstanceId,
    pub(crate) lane: LaneId,
    /// In table order.
    pub(crate) blocks: Vec<BlockId>,
    /// The content of those `blocks` that are full and computed: they are in the prefix cache.
    pub(crate) node: NodeId,
    pub(crate) num_prompt_logprobs: u32,
    /// Blocks that all tokens that it may ever have need.
    pub(crate) num_blocks_at_most: u32,
    /// Blocks that return when the steps in flight end, while it is leaving.
    pub(crate) num_leaving_blocks: u64,
}

/// What happens when the steps in flight end; a step that runs cannot be recalled, so blocks that
/// it writes stay owned until then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AfterStep {
    /// It goes on.
    Stays,
    /// It lost its place to others and waits for a new one.
    Waits,
    /// Nobody wants it any more.
    Ends,
}

/// What a plan asked of a sequence.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Asked {
    pub(crate) sequence: SequenceId,
    /// Where the chunk starts.
    pub(crate) num_computed_tokens: u32,
    pub(crate) num_new_tokens: u32,
    pub(crate) samples: bool,
}

impl Stay {
    /// Blocks that it will still be granted.
    pub(crate) fn num_promised_blocks(&self) -> u32 {
        self.num_demanded_blocks - self.num_granted_blocks
    }

    /// Blocks that it has filled, which are in the prefix cache.
    pub(crate) fn num_published_blocks(&self, block_size_tokens: u32) -> u32 {
        self.num_computed_tokens / block_size_tokens
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::TenantId;

    impl Stay {
        /// Computed nothing yet, in a step, without blocks.
        pub(crate) fn for_tests(num_demanded_blocks: u32) -> Self {
            Self {
                id: SequenceId(1),
                is_told: true,
                num_computed_tokens: 0,
                num_planned_tokens: 0,
                num_pending_samples: 0,
                num_steps_in_flight: 1,
                after_step: AfterStep::Stays,
                has_sampled: false,
                num_demanded_blocks,
                num_granted_blocks: 0,
                holding: Box::new(Holding {
                    instance: InstanceId(0),
                    lane: LaneId(0),
                    blocks: Vec::new(),
                    node: NodeId::Root(TenantId(0)),
                    num_prompt_logprobs: 0,
                    num_blocks_at_most: num_demanded_blocks,
                    num_leaving_blocks: 0,
                }),
            }
        }
    }
}
