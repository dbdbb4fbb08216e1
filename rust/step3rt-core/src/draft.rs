//! Owns a lane's next step while it is put together: what fits the token budget and the blocks.
//!
//! It never chooses the order; sequences are added best first, and those that decode before all
//! others.

use crate::block_pool::BlockPool;
use crate::config::SchedulerConfig;
use crate::instance::num_blocks;
use crate::sequence::Sequence;
use crate::sequence_table::Slot;
use crate::stay::Asked;
use crate::step::{SequenceChunk, SequenceJoin};
use crate::step_time::{StepLoad, StepTimeModel};

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
    pub(crate) load: StepLoad,
    /// While sequences decode in this step: how much longer prompts may make it.
    prefill_room: Option<(&'a StepTimeModel, f64)>,
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
            load: StepLoad::default(),
            prefill_room: None,
        }
    }

    /// From now on, prompts get only what keeps this step within `target_tpot_ms`, if sequences
    /// decode in it and their instance's steps can be predicted.
    pub(crate) fn spare_decodes(&mut self, times: &'a StepTimeModel, target_tpot_ms: u32) {
        if self.load.num_decodes > 0 && times.is_fitted() {
            let target_us = f64::from(target_tpot_ms) * 1e3;
            let room_us = times.within_us(target_us) - times.predict_us(self.load);
            self.prefill_room = Some((times, room_us));
        }
    }

    /// Adds as much of `sequence` as budget and blocks allow; nothing if they allow nothing.
    pub(crate) fn add(&mut self, slot: Slot, sequence: &mut Sequence) {
        let num_to_plan = num_tokens_to_plan(sequence);
        let stay = sequence.stay.as_mut().expect("only who stays is planned");
        let start = stay.num_planned_tokens;
        let limit = self.budget_tokens.min(self.prefill_limit(start));
        let num_new_tokens = num_to_plan.min(limit);
        if num_new_tokens == 0 {
            return;
        }
        let end = start + num_new_tokens;
        // A failed step leaves its grants with the sequence, so there may be more than needed.
        let num_new_blocks =
            num_blocks(end, self.block_size_tokens).saturating_sub(stay.num_granted_blocks);
        let Some(mut new_blocks) = self.pool.allocate(num_new_blocks) else {
            return;
        };
        self.budget_tokens -= num_new_tokens;
        self.note_load(num_to_plan, (start, num_new_tokens));
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

    /// Most tokens of a prompt's chunk that starts at `num_computed_tokens`. The first prompt gets
    /// a block in every step, however long that takes, so that prompts get done beside decodes
    /// that fill the target alone.
    fn prefill_limit(&self, num_computed_tokens: u32) -> u32 {
        let Some((times, room_us)) = self.prefill_room else {
            return u32::MAX;
        };
        let fitting = times.prefill_tokens_within(room_us, num_computed_tokens);
        if self.load.num_prefill_tokens == 0 {
            fitting.max(self.block_size_tokens)
        } else {
            fitting
        }
    }

    fn note_load(&mut self, num_to_plan: u32, (start, num_new_tokens): (u32, u32)) {
        self.load.num_context_tokens += u64::from(start) + u64::from(num_new_tokens);
        if num_to_plan == 1 {
            self.load.num_decodes += 1;
            return;
        }
        self.load.num_prefill_tokens += num_new_tokens;
        if let Some((times, room_us)) = &mut self.prefill_room {
            *room_us -= times.prefill_us(num_new_tokens, start);
        }
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
