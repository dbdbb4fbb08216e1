//! Owns the attention instances that can run steps and chooses where a newcomer stays.
//!
//! It never moves a sequence: rebalancing happens at joins only, because a KV cache does not move.

use std::collections::BTreeMap;

use crate::config::SchedulerConfig;
use crate::ids::{InstanceId, LaneId};
use crate::instance::{Instance, num_blocks};
use crate::sequence::Sequence;
use crate::step::StepKey;

#[derive(Debug, Default)]
pub(crate) struct Cluster {
    pub(crate) instances: BTreeMap<InstanceId, Instance>,
    pub(crate) has_all_experts: bool,
}

impl Cluster {
    /// Whether steps can run at all.
    pub(crate) fn is_complete(&self) -> bool {
        self.has_all_experts && !self.instances.is_empty()
    }

    /// Whether a sequence can run to its end on some instance that is here.
    pub(crate) fn can_ever_hold(&self, need: Need) -> bool {
        need.at_most <= u64::from(self.largest_pool_blocks())
    }

    pub(crate) fn largest_pool_blocks(&self) -> u32 {
        let pools = self.instances.values().map(|i| i.pool.num_blocks());
        pools.max().unwrap_or(0)
    }

    /// The instance that a step's answer is about, unless the answer is of another incarnation.
    pub(crate) fn incarnation(&mut self, key: StepKey) -> Option<&mut Instance> {
        let instance = self.instances.get_mut(&key.instance)?;
        let is_current = instance.epoch == key.epoch && instance.lane_ids().any(|l| l == key.lane);
        is_current.then_some(instance)
    }

    /// The instance with the least KV in use that has room, and its lane with the least. KV bytes
    /// and not sequences are balanced, since attention time follows the bytes that it reads.
    pub(crate) fn choose(
        &mut self,
        need: Need,
        config: &SchedulerConfig,
    ) -> Option<(&mut Instance, LaneId)> {
        let max_sequences = config.max_sequences_per_lane as usize;
        let candidates = self.instances.values().filter(|instance| {
            need.at_most <= u64::from(instance.pool.num_blocks()) && instance.has_room_for(need.now)
        });
        let (_, _, _, id, lane) = candidates
            .flat_map(|instance| {
                let demanded = instance.num_demanded_blocks();
                let lanes = instance.lane_ids().zip(&instance.lanes);
                lanes
                    .filter(|(_, lane)| lane.running.len() < max_sequences)
                    .map(move |(id, lane)| {
                        let in_lane = (lane.num_demanded_blocks, lane.running.len());
                        (demanded, in_lane.0, in_lane.1, instance.id, id)
                    })
            })
            .min()?;
        Some((self.instances.get_mut(&id)?, lane))
    }
}

/// KV blocks that a newcomer needs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Need {
    /// For the tokens it has.
    pub(crate) now: u64,
    /// For all it may grow to; the last token is never computed and needs none.
    pub(crate) at_most: u64,
}

impl Need {
    pub(crate) fn of(sequence: &Sequence, block_size_tokens: u32) -> Self {
        Self {
            now: num_blocks(sequence.num_known_tokens(), block_size_tokens),
            at_most: num_blocks(sequence.max_known_tokens - 1, block_size_tokens),
        }
    }
}
