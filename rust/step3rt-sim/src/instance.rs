//! Owns what an attention instance keeps: sequences, tokens, block tables, and its KV memory.
//!
//! It has no model and no clock. It carries out plans exactly as `step3rt_core::step` says, and
//! says so when a plan asks what a real instance could not do. Each KV slot is tagged with the
//! position and the past that it was computed for, so that a wrong block table is seen.

use std::collections::{BTreeMap, BTreeSet};

use step3rt_core::config::SchedulerConfig;
use step3rt_core::ids::{BlockId, LaneId, SequenceId, StepId, TokenId};
use step3rt_core::step::{SamplingState, SequenceChunk, SequenceJoin, SequenceOutput, StepPlan};
use step3rt_core::step::{StepKey, StepOutput, TokenLogprob};

use crate::model::Prefix;
use crate::violation::{Violation, ensure};

/// One incarnation.
#[derive(Debug)]
pub(crate) struct SimInstance {
    config: SchedulerConfig,
    num_blocks: u32,
    known: BTreeMap<SequenceId, Known>,
    ever_known: BTreeSet<SequenceId>,
    next_steps: BTreeMap<LaneId, u64>,
    /// Steps below these may have been planned before a failure was known.
    first_due_steps: BTreeMap<LaneId, u64>,
    /// By block and offset; `None` was never written.
    memory: Vec<Option<Tag>>,
    /// Breaks it on purpose: a step's samples are taken over twice.
    pub(crate) applies_twice: bool,
}

#[derive(Debug)]
struct Known {
    lane: LaneId,
    tokens: Vec<TokenId>,
    /// `prefixes[i]` is of the first `i` tokens.
    prefixes: Vec<Prefix>,
    num_prompt_tokens: usize,
    num_computed: usize,
    sampling: SamplingState,
    table: Vec<BlockId>,
}

/// What a KV slot was computed for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Tag {
    position: usize,
    /// Of all tokens up to and with this one.
    past: Prefix,
}

/// How a step ended.
#[derive(Clone, Debug)]
pub(crate) enum Answer {
    Done(StepOutput),
    /// The step's chunks had no effect.
    Failed(String),
}

impl SimInstance {
    pub(crate) fn new(config: SchedulerConfig, num_blocks: u32) -> Self {
        let num_slots = num_blocks as usize * config.block_size_tokens as usize;
        Self {
            config,
            num_blocks,
            known: BTreeMap::new(),
            ever_known: BTreeSet::new(),
            next_steps: BTreeMap::new(),
            first_due_steps: BTreeMap::new(),
            memory: vec![None; num_slots],
            applies_twice: false,
        }
    }

    /// Sequences that it has not been told to forget.
    pub(crate) fn num_known(&self) -> usize {
        self.known.len()
    }

    /// The blocks whose memory has the last token of `beginning`, after all the others.
    pub(crate) fn blocks_with(&self, beginning: &[TokenId]) -> Vec<BlockId> {
        let tag = Tag {
            position: beginning.len() - 1,
            past: Prefix::of(beginning),
        };
        let slots = (0_u32..).zip(&self.memory);
        let held = slots.filter(|&(_, slot)| *slot == Some(tag));
        let blocks = held.map(|(slot, _)| BlockId(slot / self.config.block_size_tokens));
        blocks.collect()
    }

    /// The seed of a sequence that it knows.
    pub(crate) fn seed(&self, id: SequenceId) -> u64 {
        self.known[&id].sampling.seed
    }

    /// Carries a plan out, its deltas and its chunks, at the moment when the step ends: a block
    /// that was given away too early is written last by the one who should not.
    pub(crate) fn run(&mut self, plan: &StepPlan) -> Result<Answer, Violation> {
        self.take_deltas(plan)?;
        if !self.can_start(plan) {
            let StepKey { lane, step, .. } = plan.key;
            let first_due = self.first_due_steps.get(&lane).copied().unwrap_or(0);
            ensure!(
                step.0 < first_due,
                "step {step} of lane {lane} starts where its sequences are not, and none failed \
                 that it could have been planned on"
            );
            return Ok(Answer::Failed("an earlier step failed".to_owned()));
        }
        let outputs: Result<Vec<_>, _> = plan.chunks.iter().map(|c| self.compute(c)).collect();
        let (key, outputs) = (plan.key, outputs?);
        Ok(Answer::Done(StepOutput { key, outputs }))
    }

    /// Fails half way: deltas are taken, some KV is written, and nothing else has happened.
    pub(crate) fn fail(&mut self, plan: &StepPlan, reason: &str) -> Result<Answer, Violation> {
        self.take_deltas(plan)?;
        let StepKey { lane, step, .. } = plan.key;
        let first_due = step.0 + u64::from(self.config.max_steps_in_flight);
        self.first_due_steps.insert(lane, first_due);
        if self.can_start(plan) {
            for chunk in plan.chunks.iter().step_by(2) {
                self.write_kv(chunk)?;
            }
        }
        Ok(Answer::Failed(reason.to_owned()))
    }

    fn take_deltas(&mut self, plan: &StepPlan) -> Result<(), Violation> {
        let (lane, step) = (plan.key.lane, plan.key.step);
        let next = self.next_steps.entry(lane).or_default();
        ensure!(
            step == StepId(*next),
            "lane {lane} got step {step} in place of {next}"
        );
        *next += 1;
        for id in &plan.left {
            let Some(known) = self.known.remove(id) else {
                return Err(Violation(format!(
                    "sequence {id} leaves, which is not known"
                )));
            };
            ensure!(known.lane == lane, "sequence {id} leaves another's lane");
        }
        for join in &plan.joined {
            let id = join.sequence;
            let first = plan.chunks.iter().find(|chunk| chunk.sequence == id);
            let Some(first) = first else {
                return Err(Violation(format!("sequence {id} joins without work")));
            };
            self.learn(lane, join, first.num_computed_tokens as usize)?;
        }
        for chunk in &plan.chunks {
            self.extend_table(lane, chunk)?;
        }
        Ok(())
    }

    fn learn(
        &mut self,
        lane: LaneId,
        join: &SequenceJoin,
        num_computed: usize,
    ) -> Result<(), Violation> {
        let id = join.sequence;
        ensure!(self.ever_known.insert(id), "sequence {id} joins twice");
        let mut prefixes = vec![Prefix::EMPTY];
        for (index, &token) in join.tokens.iter().enumerate() {
            prefixes.push(prefixes[index].then(token));
        }
        let known = Known {
            lane,
            tokens: join.tokens.clone(),
            prefixes,
            num_prompt_tokens: join.num_prompt_tokens as usize,
            num_computed,
            sampling: join.sampling.clone(),
            table: Vec::new(),
        };
        self.known.insert(id, known);
        Ok(())
    }

    fn extend_table(&mut self, lane: LaneId, chunk: &SequenceChunk) -> Result<(), Violation> {
        let id = chunk.sequence;
        let Some(known) = self.known.get_mut(&id) else {
            return Err(Violation(format!("a chunk of sequence {id}, not known")));
        };
        ensure!(known.lane == lane, "sequence {id} computes on another lane");
        for &block in &chunk.new_blocks {
            ensure!(block.0 < self.num_blocks, "block {block} does not exist");
            ensure!(
                !known.table.contains(&block),
                "block {block} is twice in the table of sequence {id}"
            );
            known.table.push(block);
        }
        Ok(())
    }

    /// Whether every chunk starts where its sequence is; if not, an earlier step failed.
    fn can_start(&self, plan: &StepPlan) -> bool {
        let mut chunks = plan.chunks.iter();
        chunks.all(|chunk| {
            self.known[&chunk.sequence].num_computed == chunk.num_computed_tokens as usize
        })
    }

    fn compute(&mut self, chunk: &SequenceChunk) -> Result<SequenceOutput, Violation> {
        let applies_twice = self.applies_twice;
        let id = chunk.sequence;
        let known = self.write_kv(chunk)?;
        let start = known.num_computed;
        let end = start + chunk.num_new_tokens as usize;
        known.num_computed = end;
        ensure!(
            chunk.samples == (end == known.tokens.len()),
            "a chunk of sequence {id} ends at {end} of {} known tokens and has samples = {}",
            known.tokens.len(),
            chunk.samples
        );
        let mut token = None;
        for _ in 0..(usize::from(chunk.samples) << usize::from(applies_twice)) {
            let next = known.prefixes[known.tokens.len()].next_token(known.sampling.seed);
            known
                .prefixes
                .push(known.prefixes[known.tokens.len()].then(next));
            known.tokens.push(next);
            token.get_or_insert(next);
        }
        let wants_prompt = known.sampling.prompt_logprobs.is_some();
        let prompt_end = end.min(known.num_prompt_tokens);
        let of_prompt = (start.max(1)..prompt_end).filter(|_| wants_prompt);
        Ok(SequenceOutput {
            sequence: id,
            token,
            logprob: None,
            prompt_logprobs: of_prompt.map(|i| logprob_of(known.tokens[i])).collect(),
            is_corrupt: false,
        })
    }

    /// Checks that the cache holds exactly this sequence's past, then appends the chunk to it.
    fn write_kv(&mut self, chunk: &SequenceChunk) -> Result<&mut Known, Violation> {
        let block_size = self.config.block_size_tokens as usize;
        let id = chunk.sequence;
        let known = self.known.get_mut(&id).expect("extend_table found it");
        let start = known.num_computed;
        let end = start + chunk.num_new_tokens as usize;
        ensure!(start < end, "an empty chunk of sequence {id}");
        ensure!(
            end <= known.tokens.len(),
            "a chunk of sequence {id} ends at {end} of {} known tokens",
            known.tokens.len()
        );
        ensure!(
            end <= known.table.len() * block_size,
            "sequence {id} has {} blocks for {end} tokens",
            known.table.len()
        );
        for position in 0..end {
            let block = known.table[position / block_size];
            let slot = block.0 as usize * block_size + position % block_size;
            let past = known.prefixes[position + 1];
            let tag = Some(Tag { position, past });
            if position >= start {
                self.memory[slot] = tag;
            } else if self.memory[slot] != tag {
                let found = self.memory[slot].map(|tag| tag.position);
                return Err(Violation(format!(
                    "sequence {id} reads token {position} in block {block} and finds another's \
                     (position {found:?})"
                )));
            }
        }
        Ok(known)
    }
}

/// What the logprob of a prompt token is, for clients to recognise it.
pub(crate) fn logprob_of(token: TokenId) -> TokenLogprob {
    TokenLogprob {
        token,
        logprob: -1.0,
        top: Vec::new(),
    }
}
