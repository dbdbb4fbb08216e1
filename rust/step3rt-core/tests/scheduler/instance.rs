//! An attention instance without a model: it keeps tokens, block tables and KV memory as the wire
//! tells it to, and refuses (by panic) whatever a real one could not carry out.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use step3rt_core::config::SchedulerConfig;
use step3rt_core::ids::{BlockId, Epoch, LaneId, SequenceId, StepId, TokenId};
use step3rt_core::step::{
    SamplingState, SequenceChunk, SequenceJoin, SequenceOutput, StepPlan, TokenLogprob,
};

pub(crate) const VOCAB_SIZE: u32 = 50;

/// The token that the "model" continues `tokens` with: a function of everything before it, so
/// that a stream is right only if every token before it was known and computed.
pub(crate) fn next_token(seed: u64, tokens: &[TokenId]) -> TokenId {
    let hash = prefix_hash(tokens) ^ seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    TokenId(u32::try_from((hash >> 33) % u64::from(VOCAB_SIZE)).expect("below VOCAB_SIZE"))
}

fn prefix_hash(tokens: &[TokenId]) -> u64 {
    tokens.iter().fold(0xcbf2_9ce4_8422_2325, |hash, token| {
        extend_hash(hash, *token)
    })
}

fn extend_hash(hash: u64, token: TokenId) -> u64 {
    (hash ^ u64::from(token.0) ^ 0x5bd1).wrapping_mul(0x0000_0100_0000_01b3)
}

/// What the logprob of prompt token `index` is, for the tests to recognise it.
pub(crate) fn prompt_logprob(tokens: &[TokenId], index: usize) -> TokenLogprob {
    TokenLogprob {
        token: tokens[index],
        logprob: -1.0,
        top: Vec::new(),
    }
}

struct Known {
    lane: LaneId,
    tokens: Vec<TokenId>,
    num_prompt_tokens: usize,
    num_computed: usize,
    sampling: SamplingState,
    table: Vec<BlockId>,
}

pub(crate) struct Instance {
    pub(crate) epoch: Epoch,
    pub(crate) num_blocks: u32,
    config: SchedulerConfig,
    known: BTreeMap<SequenceId, Known>,
    ever_known: BTreeSet<SequenceId>,
    next_steps: HashMap<LaneId, u64>,
    /// What each KV slot holds: the hash of the prefix that ends at its token.
    memory: HashMap<(BlockId, usize), u64>,
}

impl Instance {
    pub(crate) fn new(config: SchedulerConfig, epoch: Epoch, num_blocks: u32) -> Self {
        Self {
            epoch,
            num_blocks,
            config,
            known: BTreeMap::new(),
            ever_known: BTreeSet::new(),
            next_steps: HashMap::new(),
            memory: HashMap::new(),
        }
    }

    /// Sequences that it has not been told to forget.
    pub(crate) fn num_known(&self) -> usize {
        self.known.len()
    }

    /// Takes a plan's deltas, when the steps of its lane before it are over.
    pub(crate) fn receive(&mut self, plan: &StepPlan) {
        let lane = plan.key.lane;
        let next = self.next_steps.entry(lane).or_default();
        assert_eq!(
            plan.key.step,
            StepId(*next),
            "a step is missing on lane {lane}"
        );
        *next += 1;
        assert!(
            !plan.chunks.is_empty() || !plan.left.is_empty(),
            "an empty plan"
        );
        for id in &plan.left {
            let known = self.known.remove(id).expect("only what is known can leave");
            assert_eq!(known.lane, lane, "sequence {id} leaves another lane");
        }
        for join in &plan.joined {
            let mut chunks = plan.chunks.iter();
            let first = chunks.find(|chunk| chunk.sequence == join.sequence);
            self.learn(lane, join, first.expect("a join comes with work"));
        }
        let num_tokens: u32 = plan.chunks.iter().map(|chunk| chunk.num_new_tokens).sum();
        assert!(num_tokens <= self.config.max_tokens_per_micro_batch);
        assert!(plan.chunks.len() <= self.config.max_sequences_per_lane as usize);
        let mut planned = BTreeSet::new();
        for chunk in &plan.chunks {
            assert!(planned.insert(chunk.sequence), "two chunks of a sequence");
            let known = self.known.get_mut(&chunk.sequence);
            let known = known.expect("only what is known can be computed");
            assert_eq!(known.lane, lane, "lanes are sticky");
            for block in &chunk.new_blocks {
                assert!(block.0 < self.num_blocks, "block {block} does not exist");
                assert!(
                    !known.table.contains(block),
                    "block {block} twice in a table"
                );
                known.table.push(*block);
            }
        }
        if self.config.assumes_computed_prompts {
            for join in &plan.joined {
                self.fill(join.sequence);
            }
        }
    }

    /// Puts the KV in place that a newcomer is assumed to have.
    fn fill(&mut self, id: SequenceId) {
        let block_size = self.config.block_size_tokens as usize;
        let known = &self.known[&id];
        let mut hash = prefix_hash(&[]);
        for (index, token) in known.tokens[..known.num_computed].iter().enumerate() {
            hash = extend_hash(hash, *token);
            let place = (known.table[index / block_size], index % block_size);
            self.memory.insert(place, hash);
        }
    }

    fn learn(&mut self, lane: LaneId, join: &SequenceJoin, first: &SequenceChunk) {
        let id = join.sequence;
        assert!(self.ever_known.insert(id), "sequence {id} joins twice");
        let known = Known {
            lane,
            tokens: join.tokens.clone(),
            num_prompt_tokens: join.num_prompt_tokens as usize,
            num_computed: first.num_computed_tokens as usize,
            sampling: join.sampling.clone(),
            table: Vec::new(),
        };
        self.known.insert(id, known);
    }

    /// Whether every chunk starts where its sequence is; if not, an earlier step failed.
    pub(crate) fn can_start(&self, plan: &StepPlan) -> bool {
        let mut chunks = plan.chunks.iter();
        chunks.all(|chunk| {
            let known = &self.known[&chunk.sequence];
            known.num_computed == chunk.num_computed_tokens as usize
        })
    }

    /// Carries a plan out, as late as its answer.
    pub(crate) fn compute(&mut self, plan: &StepPlan) -> Vec<SequenceOutput> {
        let outputs = plan.chunks.iter().map(|chunk| {
            let start = chunk.num_computed_tokens as usize;
            let known = self.write_kv(chunk.sequence, start, chunk.num_new_tokens as usize);
            let end = start + chunk.num_new_tokens as usize;
            known.num_computed = end;
            let samples = end == known.tokens.len();
            assert_eq!(
                samples, chunk.samples,
                "a chunk samples at the last known token"
            );
            let wants_prompt = known.sampling.prompt_logprobs.is_some();
            let prompt_end = end.min(known.num_prompt_tokens);
            let prompt_logprobs = (start.max(1)..prompt_end)
                .filter(|_| wants_prompt)
                .map(|index| prompt_logprob(&known.tokens, index))
                .collect();
            let token = samples.then(|| next_token(known.sampling.seed, &known.tokens));
            known.tokens.extend(token);
            SequenceOutput {
                sequence: chunk.sequence,
                token,
                logprob: None,
                prompt_logprobs,
                is_corrupt: false,
            }
        });
        outputs.collect()
    }

    /// Fails a plan half way: KV is written, and nothing else has happened.
    pub(crate) fn fail(&mut self, plan: &StepPlan) {
        for chunk in plan.chunks.iter().step_by(2) {
            let start = chunk.num_computed_tokens as usize;
            self.write_kv(chunk.sequence, start, chunk.num_new_tokens as usize);
        }
    }

    /// Checks that the cache holds exactly this sequence's past, then appends to it.
    fn write_kv(&mut self, id: SequenceId, start: usize, num_new: usize) -> &mut Known {
        let block_size = self.config.block_size_tokens as usize;
        let known = self.known.get_mut(&id).expect("checked when it arrived");
        assert_eq!(start, known.num_computed, "sequence {id} jumps");
        assert!(num_new >= 1 && start + num_new <= known.tokens.len());
        let mut hash = prefix_hash(&[]);
        for (index, token) in known.tokens[..start + num_new].iter().enumerate() {
            hash = extend_hash(hash, *token);
            let block = known.table[index / block_size];
            let place = (block, index % block_size);
            if index < start {
                let held = self.memory.get(&place);
                assert_eq!(held, Some(&hash), "sequence {id} lost its KV at {index}");
            } else {
                self.memory.insert(place, hash);
            }
        }
        known
    }
}
