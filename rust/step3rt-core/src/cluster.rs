//! Owns the attention instances that can run steps and chooses where a newcomer stays.
//!
//! It never moves a sequence: rebalancing happens at joins only, because a KV cache does not move.

use std::collections::BTreeMap;

use crate::block_pool::CachedPrefix;
use crate::config::SchedulerConfig;
use crate::ids::{Epoch, InstanceId, LaneId};
use crate::instance::{Foresight, Instance, Newcomer, num_blocks};
use crate::sequence::Sequence;
use crate::step::StepKey;

/// Incarnations remembered of instances that are not here now. A message is late by some others at
/// most, so that what is forgotten is long gone.
const MAX_REMEMBERED_EPOCHS: usize = 4096;

/// A registration that has no meaning any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Late;

#[derive(Debug, Default)]
pub(crate) struct Cluster {
    pub(crate) instances: BTreeMap<InstanceId, Instance>,
    /// The last incarnation of every instance that is here, and of others that were.
    last_epochs: BTreeMap<InstanceId, Epoch>,
    pub(crate) has_all_experts: bool,
}

impl Cluster {
    /// Whether steps can run at all.
    pub(crate) fn is_complete(&self) -> bool {
        self.has_all_experts && !self.instances.is_empty()
    }

    /// Takes note of a registration, unless it is late: one of an older incarnation than was here, or
    /// of that one again after its loss.
    pub(crate) fn note_registration(&mut self, id: InstanceId, epoch: Epoch) -> Result<(), Late> {
        let last = self.last_epochs.get(&id);
        if last.is_some_and(|&last| last >= epoch) {
            return Err(Late);
        }
        self.last_epochs.insert(id, epoch);
        if self.last_epochs.len() > self.instances.len() + MAX_REMEMBERED_EPOCHS {
            // A process that starts again has a new id, so that without a bound they would pile up.
            let gone = self.last_epochs.iter();
            let gone =
                gone.filter(|(other, _)| **other != id && !self.instances.contains_key(other));
            let oldest = gone.min_by_key(|(_, epoch)| **epoch).map(|(id, _)| *id);
            oldest.map(|oldest| self.last_epochs.remove(&oldest));
        }
        Ok(())
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

    /// The instance with room that has the least KV in use and to compute for `sequence`, so that
    /// a cached beginning attracts; and its lane with the least KV. KV bytes and not sequences are
    /// balanced, since attention time follows the bytes that it reads.
    pub(crate) fn choose(
        &mut self,
        sequence: &Sequence,
        config: &SchedulerConfig,
        foresight: Foresight<'_>,
    ) -> Option<(InstanceId, Vacancy)> {
        let instances = self.instances.values_mut();
        let vacancies = instances.filter_map(|instance| {
            let (cost, vacancy) = Self::vacancy(instance, sequence, config, foresight)?;
            Some((cost, instance.id, vacancy))
        });
        let (_, id, vacancy) = vacancies.min_by_key(|&(cost, id, _)| (cost, id))?;
        Some((id, vacancy))
    }

    /// What `instance` has to offer, and its KV in use and to compute with the newcomer.
    fn vacancy(
        instance: &mut Instance,
        sequence: &Sequence,
        config: &SchedulerConfig,
        foresight: Foresight<'_>,
    ) -> Option<(u64, Vacancy)> {
        let need = Need::of(sequence, config.block_size_tokens);
        if need.at_most > u64::from(instance.pool.num_blocks()) {
            return None;
        }
        let max_sequences = config.max_sequences_per_lane as usize;
        let lanes = instance.lane_ids().zip(&instance.lanes);
        let (lane, _) = lanes
            .filter(|(_, lane)| lane.running.len() < max_sequences)
            .min_by_key(|(id, lane)| (lane.num_demanded_blocks, lane.running.len(), *id))?;
        let blocks = sequence.reusable_blocks(config.block_size_tokens);
        let prefix = instance.pool.find_prefix(sequence.tenant, blocks);
        let newcomer = Newcomer {
            sequence,
            num_blocks: need.now - prefix.num_used_blocks,
            num_blocks_at_most: need.at_most,
        };
        if !instance.has_room_for(newcomer, foresight) {
            return None;
        }
        let to_compute = need.now - prefix.blocks.len() as u64;
        let cost = instance.num_demanded_blocks() + to_compute;
        Some((cost, Vacancy { lane, prefix }))
    }
}

/// Where on an instance a newcomer can stay, and what is cached of it there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Vacancy {
    pub(crate) lane: LaneId,
    pub(crate) prefix: CachedPrefix,
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
            now: num_blocks(sequence.num_known_tokens(), block_size_tokens).into(),
            at_most: num_blocks(sequence.max_known_tokens - 1, block_size_tokens).into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block_pool::BlockPool;
    use crate::growth::Growth;
    use crate::ids::{Epoch, SequenceId, StepId};
    use crate::instance::Place;
    use crate::sequence_table::SequenceTable;

    fn config() -> SchedulerConfig {
        SchedulerConfig {
            num_lanes: 2,
            block_size_tokens: 4,
            max_model_len: 64,
            max_tokens_per_micro_batch: 8,
            max_steps_in_flight: 1,
            target_tpot_ms: 50,
            max_sequences_per_lane: 2,
            max_waiting_requests: 8,
            recovery_timeout_ms: 1_000,
            assumes_computed_prompts: false,
        }
    }

    fn cluster(pools: &[u32]) -> Cluster {
        let instances = (0..).map(InstanceId).zip(pools).map(|(id, &num_blocks)| {
            let pool = BlockPool::new(num_blocks);
            (id, Instance::new(id, Epoch(1), pool, 2))
        });
        Cluster {
            instances: instances.collect(),
            has_all_experts: true,
            ..Cluster::default()
        }
    }

    /// Gives places to newcomers that need so many blocks each and eight at most; says which.
    fn place_all(cluster: &mut Cluster, needs: &[usize]) -> Vec<Option<(u32, u8)>> {
        let mut table = SequenceTable::default();
        let mut arrival = 0;
        let place_one = |&num_blocks: &usize| {
            arrival += 1;
            let prompt = vec![u32::try_from(arrival).unwrap(); num_blocks * 4];
            let mut sequence = Sequence::for_tests(&prompt, &[]);
            sequence.details.rank.arrival = arrival;
            sequence.max_known_tokens = 33;
            let foresight = Foresight {
                growth: &Growth::default(),
                sequences: &table,
                block_size_tokens: 4,
            };
            let (id, vacancy) = cluster.choose(&sequence, &config(), foresight)?;
            let place = Place {
                id: SequenceId(arrival),
                vacancy: vacancy.clone(),
                block_size_tokens: 4,
                is_assumed_computed: false,
            };
            let slot = table.insert(sequence);
            let instance = cluster.instances.get_mut(&id)?;
            instance.join(slot, &mut table[slot], place);
            Some((id.0, vacancy.lane.0))
        };
        needs.iter().map(place_one).collect()
    }

    #[test]
    fn memory_of_departed_instances_is_bounded_and_that_of_present_ones_is_kept() {
        let mut cluster = Cluster::default();
        let present = InstanceId(0);
        assert_eq!(cluster.note_registration(present, Epoch(1)), Ok(()));
        let instance = Instance::new(present, Epoch(1), BlockPool::new(1), 1);
        cluster.instances.insert(present, instance);
        let last = u32::try_from(MAX_REMEMBERED_EPOCHS + 10).unwrap();
        for id in 1..=last {
            let noted = cluster.note_registration(InstanceId(id), Epoch(u64::from(id) + 1));
            assert_eq!(noted, Ok(()));
        }
        assert_eq!(cluster.last_epochs.len(), 1 + MAX_REMEMBERED_EPOCHS);
        for (id, epoch) in [(present, Epoch(1)), (InstanceId(last), Epoch(1))] {
            assert_eq!(cluster.note_registration(id, epoch), Err(Late));
        }
        // The first that went is forgotten, and never the one that has just come.
        for noted in [Ok(()), Err(Late)] {
            assert_eq!(cluster.note_registration(InstanceId(1), Epoch(1)), noted);
        }
    }

    #[test]
    fn equal_newcomers_spread_over_instances_and_then_lanes() {
        let mut cluster = cluster(&[20, 20]);
        let places = place_all(&mut cluster, &[1; 5]).into_iter().flatten();
        let places: Vec<_> = places.collect();
        assert_eq!(places, [(0, 0), (1, 0), (0, 1), (1, 1), (0, 0)]);
    }

    #[test]
    fn a_heavy_sequence_outweighs_many_light_ones() {
        let mut cluster = cluster(&[20, 20]);
        let places = place_all(&mut cluster, &[6, 1, 1, 1]).into_iter().flatten();
        let places: Vec<_> = places.collect();
        assert_eq!(places, [(0, 0), (1, 0), (1, 1), (1, 0)]);
    }

    #[test]
    fn nobody_is_placed_where_it_could_not_finish() {
        let mut cluster = cluster(&[7, 9]);
        let places = place_all(&mut cluster, &[1, 1, 7, 8]);
        assert_eq!(places, [Some((1, 0)), Some((1, 1)), Some((1, 0)), None]);
        assert!(cluster.can_ever_hold(Need { now: 1, at_most: 9 }));
        assert!(!cluster.can_ever_hold(Need {
            now: 1,
            at_most: 10
        }));
    }

    #[test]
    fn answers_of_another_incarnation_or_lane_find_no_instance() {
        let mut cluster = cluster(&[8]);
        let key = StepKey {
            instance: InstanceId(0),
            epoch: Epoch(1),
            lane: LaneId(1),
            step: StepId(0),
        };
        assert!(cluster.incarnation(key).is_some());
        let epoch = Epoch(2);
        assert!(cluster.incarnation(StepKey { epoch, ..key }).is_none());
        let lane = LaneId(2);
        assert!(cluster.incarnation(StepKey { lane, ..key }).is_none());
        let instance = InstanceId(1);
        assert!(cluster.incarnation(StepKey { instance, ..key }).is_none());
    }
}
