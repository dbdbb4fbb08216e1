//! Owns a lane's next step while it is put together: what fits the token budget and the blocks.
//!
//! It never chooses the order; sequences are added best first.

use crate::block_pool::BlockPool;
use crate::config::SchedulerConfig;
use crate::instance::num_blocks;
use crate::sequence::Sequence;
use crate::sequence_table::Slot;
use crate::stay::Asked;
use crate::step::{SequenceChunk, SequenceJoin};

/// See the module's documentation.
pub(crate) struct Draft<'a> {
    pool: &'a mut BlockPool,
    block_size_tokens: u32,
    budget_tokens: u32,
    pub(crate) asked: Vec<(Slot, Asked)>,
    pub(crate) chunks: Vec<SequenceChunk>,
    pub(crate) joined: Vec<SequenceJoin>,
    /// Sequences that are planned for the first time in their stay.
    pub(crate) newcomers: Vec<Slot>,
    pub(crate) num_granted_blocks: u64,
    /// What the tokens that this step samples will need.
    pub(crate) num_new_demanded_blocks: u64,
}

impl<'a> Draft<'a> {
    /// Nothing yet; `asked` is empty and has memory to use again.
    pub(crate) fn new(
        pool: &'a mut BlockPool,
        config: &SchedulerConfig,
        asked: Vec<(Slot, Asked)>,
        max_sequences: usize,
    ) -> Self {
        Self {
            pool,
            block_size_tokens: config.block_size_tokens,
            budget_tokens: config.max_tokens_per_micro_batch,
            asked,
            chunks: Vec::with_capacity(max_sequences),
            joined: Vec::new(),
            newcomers: Vec::new(),
            num_granted_blocks: 0,
            num_new_demanded_blocks: 0,
        }
    }

    /// Adds as much of `sequence` as budget and blocks allow; nothing if they allow nothing.
    pub(crate) fn add(&mut self, slot: Slot, sequence: &mut Sequence) {
        let num_to_plan = num_tokens_to_plan(sequence);
        let num_new_tokens = num_to_plan.min(self.budget_tokens);
        if num_new_tokens == 0 {
            return;
        }
        let stay = sequence.stay.as_mut().expect("only who stays is planned");
        let start = stay.num_planned_tokens;
        let end = start + num_new_tokens;
        // A failed step leaves its grants with the sequence, so there may be more than needed.
        let num_new_blocks =
            num_blocks(end, self.block_size_tokens).saturating_sub(stay.num_granted_blocks);
        let Some(mut new_blocks) = self.pool.allocate(num_new_blocks) else {
            return;
        };
        self.budget_tokens -= num_new_tokens;
        self.num_granted_blocks += u64::from(num_new_blocks);
        if num_new_blocks > 0 {
            stay.num_granted_blocks += num_new_blocks;
            stay.holding.blocks.extend_from_slice(&new_blocks);
        }
        stay.num_planned_tokens = end;
        stay.num_steps_in_flight += 1;
        let asked = Asked {
            sequence: stay.id,
            num_computed_tokens: start,
            num_new_tokens,
            samples: num_new_tokens == num_to_plan,
        };
        stay.num_pending_samples += u8::from(asked.samples);
        if !stay.is_told {
            stay.is_told = true;
            new_blocks.clone_from(&stay.holding.blocks); // those of a cached beginning too
            let id = stay.id;
            self.newcomers.push(slot);
            self.joined.push(sequence.join(id));
        }
        if asked.samples {
            self.note_growth(sequence);
        }
        self.asked.push((slot, asked));
        self.chunks.push(SequenceChunk {
            sequence: asked.sequence,
            num_computed_tokens: start,
            num_new_tokens,
            new_blocks,
            samples: asked.samples,
        });
    }

    /// Counts the block that the token sampled now may need.
    fn note_growth(&mut self, sequence: &mut Sequence) {
        let num_blocks = num_blocks(sequence.num_plannable_tokens(), self.block_size_tokens);
        let stay = sequence.stay.as_mut().expect("only who stays is planned");
        if num_blocks > stay.num_demanded_blocks {
            self.num_new_demanded_blocks += u64::from(num_blocks - stay.num_demanded_blocks);
            stay.num_demanded_blocks = num_blocks;
        }
    }
}

/// Tokens between what is computed, or will be by the steps in flight, and what can be planned.
pub(crate) fn num_tokens_to_plan(sequence: &Sequence) -> u32 {
    let stay = sequence.stay.as_ref().expect("only who stays is planned");
    sequence.num_plannable_tokens() - stay.num_planned_tokens
}
