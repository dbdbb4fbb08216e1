//! Owns what a sequence has while it has a place: its blocks, and how far it is computed there.
//!
//! It never outlives the place; what a sequence keeps is in
//! [`Sequence`](crate::sequence::Sequence).

use crate::block_pool::NodeId;
use crate::ids::{BlockId, InstanceId, LaneId, SequenceId};

/// What a sequence has while it has a place.
#[derive(Debug)]
pub(crate) struct Stay {
    pub(crate) id: SequenceId,
    pub(crate) instance: InstanceId,
    pub(crate) lane: LaneId,
    /// Whether the instance has been told of it (a plan has it in `joined`).
    pub(crate) is_told: bool,
    /// Those whose K and V are in the cache.
    pub(crate) num_computed_tokens: u32,
    /// The same when all steps in flight have succeeded.
    pub(crate) num_planned_tokens: u32,
    /// Tokens that the steps in flight will sample: known to the instance before they are here.
    pub(crate) num_pending_samples: u32,
    /// In table order.
    pub(crate) blocks: Vec<BlockId>,
    /// Blocks that all plannable tokens need: what the lane counts for it, granted or not.
    pub(crate) num_demanded_blocks: u64,
    pub(crate) num_steps_in_flight: u32,
    pub(crate) after_step: AfterStep,
    pub(crate) num_prompt_logprobs: u32,
    /// How many of `blocks`, from the first on, are in the prefix cache, and the content that they
    /// have together.
    pub(crate) num_published_blocks: usize,
    pub(crate) node: NodeId,
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
    pub(crate) fn num_promised_blocks(&self) -> u64 {
        self.num_demanded_blocks - self.blocks.len() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::TenantId;

    impl Stay {
        /// Computed nothing yet, in a step, without blocks.
        pub(crate) fn for_tests(num_demanded_blocks: u64) -> Self {
            Self {
                id: SequenceId(1),
                instance: InstanceId(0),
                lane: LaneId(0),
                is_told: true,
                num_computed_tokens: 0,
                num_planned_tokens: 0,
                num_pending_samples: 0,
                blocks: Vec::new(),
                num_demanded_blocks,
                num_steps_in_flight: 1,
                after_step: AfterStep::Stays,
                num_prompt_logprobs: 0,
                num_published_blocks: 0,
                node: NodeId::Root(TenantId(0)),
                num_leaving_blocks: 0,
            }
        }
    }
}
