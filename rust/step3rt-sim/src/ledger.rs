//! Owns what the plans say: which steps are unanswered, and who holds which KV block.
//!
//! It never asks the scheduler; it is the second book, kept from what left the scheduler alone, by
//! which the scheduler's own book is checked.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use step3rt_core::config::SchedulerConfig;
use step3rt_core::ids::{BlockId, Epoch, InstanceId, LaneId, SequenceId, TenantId};
use step3rt_core::scheduler::SchedulerStats;
use step3rt_core::step::{SequenceChunk, StepKey, StepPlan};

use crate::clients::owner_of;
use crate::violation::{Violation, ensure};

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Ledger {
    config: SchedulerConfig,
    /// The incarnations that the scheduler has been told of, with their pools.
    instances: BTreeMap<InstanceId, (Epoch, u32)>,
    last_epochs: BTreeMap<InstanceId, Epoch>,
    lanes: BTreeMap<(InstanceId, LaneId), VecDeque<Unanswered>>,
    holdings: BTreeMap<SequenceId, Holding>,
    /// Whose tokens a block was filled with last.
    tenants: BTreeMap<(InstanceId, BlockId), TenantId>,
    ever_joined: BTreeSet<SequenceId>,
    /// By the seed that names a continuation: where it stayed last.
    last_stays: BTreeMap<u64, (InstanceId, Epoch)>,
    num_preempted: u64,
}

#[derive(Debug)]
struct Unanswered {
    key: StepKey,
    sequences: Vec<SequenceId>,
    /// Tokens of chunks of more than one.
    num_prefill_tokens: u32,
    is_doomed: bool,
}

/// The blocks of a sequence where it stays.
#[derive(Debug)]
struct Holding {
    tenant: TenantId,
    instance: InstanceId,
    blocks: Vec<BlockId>,
    num_steps_in_flight: u32,
    has_left: bool,
    /// A block of its own was granted to another: no chunk of it may come any more.
    is_dispossessed: bool,
}

impl Ledger {
    pub(crate) fn new(config: SchedulerConfig) -> Self {
        Self {
            config,
            instances: BTreeMap::new(),
            last_epochs: BTreeMap::new(),
            lanes: BTreeMap::new(),
            holdings: BTreeMap::new(),
            tenants: BTreeMap::new(),
            ever_joined: BTreeSet::new(),
            last_stays: BTreeMap::new(),
            num_preempted: 0,
        }
    }

    /// An incarnation takes the place of any before it.
    pub(crate) fn ready(&mut self, id: InstanceId, epoch: Epoch, num_blocks: u32) {
        self.lost(id);
        self.instances.insert(id, (epoch, num_blocks));
        self.last_epochs.insert(id, epoch);
    }

    pub(crate) fn lost(&mut self, id: InstanceId) {
        self.instances.remove(&id);
        self.lanes.retain(|&(instance, _), _| instance != id);
        self.holdings.retain(|_, holding| holding.instance != id);
        self.tenants.retain(|&(instance, _), _| instance != id);
    }

    pub(crate) fn epoch(&self, id: InstanceId) -> Option<Epoch> {
        self.instances.get(&id).map(|&(epoch, _)| epoch)
    }

    /// Whether a registration of this incarnation comes too late.
    pub(crate) fn is_stale(&self, id: InstanceId, epoch: Epoch) -> bool {
        self.last_epochs.get(&id).is_some_and(|&last| last >= epoch)
    }

    pub(crate) fn num_instances(&self) -> usize {
        self.instances.len()
    }

    /// The KV blocks of each instance.
    pub(crate) fn pools(&self) -> impl Iterator<Item = u32> + '_ {
        self.instances.values().map(|&(_, num_blocks)| num_blocks)
    }

    pub(crate) fn largest_pool_blocks(&self) -> u32 {
        self.pools().max().unwrap_or(0)
    }

    /// Whether a sequence on `instance` has `block` in its table.
    pub(crate) fn is_held(&self, instance: InstanceId, block: BlockId) -> bool {
        let holdings = self.holdings.values();
        let mut there = holdings.filter(|holding| holding.instance == instance);
        there.any(|holding| holding.blocks.contains(&block))
    }

    /// Whether an answer to `key` is the one that the lane waits for; all others are stale.
    pub(crate) fn is_awaited(&self, key: StepKey) -> bool {
        let lane = self.lanes.get(&(key.instance, key.lane));
        lane.and_then(VecDeque::front)
            .is_some_and(|first| first.key == key)
    }

    /// Whether `key` has been planned and not answered.
    pub(crate) fn is_unanswered(&self, key: StepKey) -> bool {
        let lane = self.lanes.get(&(key.instance, key.lane));
        lane.is_some_and(|lane| lane.iter().any(|step| step.key == key))
    }

    pub(crate) fn num_unanswered(&self) -> usize {
        self.lanes.values().map(VecDeque::len).sum()
    }

    /// How many sequences came back on an incarnation that they had left though it is still there.
    pub(crate) fn num_preempted(&self) -> u64 {
        self.num_preempted
    }

    /// Takes the awaited answer into account. Returns how many tokens of prompts the step had.
    pub(crate) fn answered(&mut self, key: StepKey, has_failed: bool) -> u32 {
        let lane = self.lanes.get_mut(&(key.instance, key.lane));
        let lane = lane.expect("the answer is awaited");
        let step = lane.pop_front().expect("the answer is awaited");
        if has_failed {
            for later in lane.iter_mut() {
                later.is_doomed = true;
            }
        }
        for id in step.sequences {
            let holding = self.holdings.get_mut(&id).expect("a step holds it");
            holding.num_steps_in_flight -= 1;
            if holding.has_left && holding.num_steps_in_flight == 0 {
                self.holdings.remove(&id);
            }
        }
        step.num_prefill_tokens
    }

    /// Takes a plan into account, and checks it against all before it.
    pub(crate) fn planned(&mut self, plan: &StepPlan) -> Result<(), Violation> {
        let key = plan.key;
        ensure!(
            self.epoch(key.instance) == Some(key.epoch),
            "a plan for {}, epoch {}, which is not there",
            key.instance,
            key.epoch
        );
        self.check_budgets(plan)?;
        for id in &plan.left {
            let holding = self.holdings.get_mut(id);
            let holding = holding.filter(|h| h.instance == key.instance && !h.has_left);
            let Some(holding) = holding else {
                return Err(Violation(format!("sequence {id} leaves and was not there")));
            };
            holding.has_left = true;
            if holding.num_steps_in_flight == 0 {
                self.holdings.remove(id);
            }
        }
        for join in &plan.joined {
            let id = join.sequence;
            ensure!(self.ever_joined.insert(id), "sequence {id} joins twice");
            let place = (key.instance, key.epoch);
            let before = self.last_stays.insert(join.sampling.seed, place);
            let is_still_there = before.is_some_and(|(i, e)| self.epoch(i) == Some(e));
            self.num_preempted += u64::from(is_still_there);
            let holding = Holding {
                tenant: owner_of(join.sampling.seed).1,
                instance: key.instance,
                blocks: Vec::new(),
                num_steps_in_flight: 0,
                has_left: false,
                is_dispossessed: false,
            };
            self.holdings.insert(id, holding);
        }
        for chunk in &plan.chunks {
            let is_new = plan.joined.iter().any(|j| j.sequence == chunk.sequence);
            self.grant(key.instance, chunk, is_new)?;
        }
        let lane = self.lanes.entry((key.instance, key.lane)).or_default();
        lane.push_back(Unanswered {
            key,
            sequences: plan.chunks.iter().map(|chunk| chunk.sequence).collect(),
            num_prefill_tokens: {
                let new = plan.chunks.iter().map(|chunk| chunk.num_new_tokens);
                new.filter(|&num_new_tokens| num_new_tokens > 1).sum()
            },
            is_doomed: false,
        });
        Ok(())
    }

    fn check_budgets(&self, plan: &StepPlan) -> Result<(), Violation> {
        let key = plan.key;
        ensure!(
            !plan.chunks.is_empty() || !plan.left.is_empty(),
            "an empty plan"
        );
        let tokens = plan
            .chunks
            .iter()
            .map(|chunk| u64::from(chunk.num_new_tokens));
        let (tokens, max) = (tokens.sum::<u64>(), self.config.max_tokens_per_micro_batch);
        ensure!(
            tokens <= u64::from(max),
            "a step of {tokens} tokens, of {max} at most"
        );
        let (sequences, max) = (plan.chunks.len(), self.config.max_sequences_per_lane);
        ensure!(
            sequences <= max as usize,
            "a step of {sequences} sequences, of {max} at most"
        );
        let ids: BTreeSet<_> = plan.chunks.iter().map(|chunk| chunk.sequence).collect();
        ensure!(ids.len() == sequences, "two chunks of one sequence");
        if let Some(lane) = self.lanes.get(&(key.instance, key.lane)) {
            let max = usize::from(self.config.max_steps_in_flight);
            ensure!(
                lane.len() < max,
                "more than {max} steps on lane {}",
                key.lane
            );
            ensure!(
                lane.iter().all(|step| !step.is_doomed),
                "lane {} is planned on a step that will fail",
                key.lane
            );
        }
        Ok(())
    }

    /// Blocks of computed tokens may be shared; any other has one holder from now on.
    fn grant(
        &mut self,
        instance: InstanceId,
        chunk: &SequenceChunk,
        is_new: bool,
    ) -> Result<(), Violation> {
        let id = chunk.sequence;
        let block_size = self.config.block_size_tokens;
        let num_shared = if is_new {
            (chunk.num_computed_tokens / block_size) as usize
        } else {
            0
        };
        let Some(holding) = self.holdings.get_mut(&id) else {
            return Err(Violation(format!("a chunk of sequence {id}, not there")));
        };
        ensure!(
            holding.instance == instance && !holding.has_left && !holding.is_dispossessed,
            "a chunk of sequence {id}, which is elsewhere, has left or lost a block"
        );
        holding.num_steps_in_flight += 1;
        holding.blocks.extend(&chunk.new_blocks);
        let start = (chunk.num_computed_tokens / block_size) as usize;
        let end = chunk.num_computed_tokens + chunk.num_new_tokens;
        let end = end.div_ceil(block_size) as usize;
        ensure!(
            end <= holding.blocks.len(),
            "sequence {id} has {} blocks and writes to its block {end}",
            holding.blocks.len()
        );
        for &block in chunk.new_blocks.iter().take(num_shared) {
            let filled_by = self.tenants.get(&(instance, block));
            ensure!(
                filled_by == Some(&holding.tenant),
                "sequence {id} of tenant {} is given block {block} of {filled_by:?}",
                holding.tenant
            );
        }
        let written: Vec<BlockId> = holding.blocks[start..end].to_vec();
        let tenant = holding.tenant;
        let places = written.iter().map(|&block| ((instance, block), tenant));
        self.tenants.extend(places);
        let granted = chunk.new_blocks.iter().skip(num_shared).copied();
        let exclusive: BTreeSet<BlockId> = granted.chain(written).collect();
        let others = self.holdings.iter_mut().filter(|&(&other, ref holding)| {
            other != id && holding.instance == instance && !holding.is_dispossessed
        });
        for (other, holding) in others {
            let shared = holding
                .blocks
                .iter()
                .find(|block| exclusive.contains(block));
            let Some(block) = shared else { continue };
            ensure!(
                holding.num_steps_in_flight == 0,
                "block {block} is written by sequence {id} and held by {other} in a step"
            );
            holding.is_dispossessed = true;
        }
        Ok(())
    }

    /// Checks what the scheduler says of itself.
    pub(crate) fn check_stats(&self, stats: &SchedulerStats) -> Result<(), Violation> {
        ensure!(
            stats.num_steps_in_flight == self.num_unanswered(),
            "{} steps in flight and {} unanswered",
            stats.num_steps_in_flight,
            self.num_unanswered()
        );
        ensure!(
            stats.kv_blocks.len() == self.instances.len(),
            "{} instances are ready and {} known",
            self.instances.len(),
            stats.kv_blocks.len()
        );
        for &(id, free, total) in &stats.kv_blocks {
            let held = self.holdings.values();
            let held = held.filter(|h| h.instance == id && h.num_steps_in_flight > 0);
            let held: BTreeSet<_> = held.flat_map(|h| &h.blocks).collect();
            let expected = self.instances.get(&id).map(|&(_, num_blocks)| num_blocks);
            ensure!(
                Some(total) == expected && free <= total,
                "instance {id} has {free} of {total} blocks free and registered {expected:?}"
            );
            ensure!(
                held.len() <= (total - free) as usize,
                "instance {id} has {free} of {total} blocks free and steps hold {}",
                held.len()
            );
        }
        Ok(())
    }

    /// Checks that nothing is left behind.
    pub(crate) fn check_done(&self, stats: &SchedulerStats) -> Result<(), Violation> {
        self.check_stats(stats)?;
        ensure!(
            (stats.num_waiting, stats.num_running) == (0, 0),
            "{} requests wait and {} sequences run when all have ended",
            stats.num_waiting,
            stats.num_running
        );
        for &(id, free, total) in &stats.kv_blocks {
            ensure!(
                free == total,
                "{} blocks of instance {id} leaked",
                total - free
            );
        }
        let staying = self.holdings.values().filter(|holding| !holding.has_left);
        let num_staying = staying.count();
        ensure!(
            num_staying == 0,
            "{num_staying} sequences were never told to leave"
        );
        Ok(())
    }
}
