//! Owns one incarnation of an attention instance: its KV pool, its lanes, and who stays on them.
//!
//! It never chooses between instances and never ends a sequence; it gives and takes places, and
//! plans one lane's next step.

use crate::block_pool::{BlockPool, CachedPrefix};
use crate::cluster::Vacancy;
use crate::config::SchedulerConfig;
use crate::draft::{Draft, num_tokens_to_plan};
use crate::growth::{Course, Growth, peak_blocks};
use crate::ids::{BlockId, Epoch, InstanceId, LaneId, SequenceId, TimeNs};
use crate::lane::{InFlight, Lane};
use crate::sequence::Sequence;
use crate::sequence_table::{SequenceTable, Slot};
use crate::stay::{AfterStep, Asked, Holding, Stay};
use crate::step::{StepKey, StepPlan};
use crate::step_time::StepTimeModel;

/// A newcomer leaves this share of the pool to those that grow, or it would take the last blocks
/// and lose its place, with all that was computed, a step later.
const HEADROOM_SHARE: u64 = 64;

#[derive(Debug)]
pub(crate) struct Instance {
    pub(crate) id: InstanceId,
    pub(crate) epoch: Epoch,
    pub(crate) pool: BlockPool,
    pub(crate) lanes: Vec<Lane>,
    /// Used blocks that return when steps in flight end, since their sequences are leaving.
    pub(crate) num_leaving_blocks: u64,
    pub(crate) step_times: StepTimeModel,
    num_leaves: u64,
    /// The last newcomer that found no room here, and how many had left by then.
    refused: Option<(u64, Course)>,
}

/// Somebody who asks for a place.
#[derive(Clone, Copy)]
pub(crate) struct Newcomer<'a> {
    pub(crate) sequence: &'a Sequence,
    /// That it adds now.
    pub(crate) num_blocks: u64,
    pub(crate) num_blocks_at_most: u64,
}

/// What tells how sequences grow.
#[derive(Clone, Copy)]
pub(crate) struct Foresight<'a> {
    pub(crate) growth: &'a Growth,
    pub(crate) sequences: &'a SequenceTable,
    pub(crate) block_size_tokens: u32,
}

/// What [`Instance::plan_lane`] decided.
pub(crate) struct LanePlan {
    pub(crate) plan: StepPlan,
    /// Sequences that are planned for the first time in their stay.
    pub(crate) newcomers: Vec<Slot>,
}

impl Instance {
    pub(crate) fn new(id: InstanceId, epoch: Epoch, pool: BlockPool, num_lanes: u8) -> Self {
        Self {
            id,
            epoch,
            pool,
            lanes: (0..num_lanes).map(|_| Lane::default()).collect(),
            num_leaving_blocks: 0,
            step_times: StepTimeModel::default(),
            num_leaves: 0,
            refused: None,
        }
    }

    pub(crate) fn lane_ids(&self) -> impl Iterator<Item = LaneId> + use<> {
        let num_lanes = u8::try_from(self.lanes.len()).expect("made from a u8");
        (0..num_lanes).map(LaneId)
    }

    pub(crate) fn lane_mut(&mut self, lane: LaneId) -> &mut Lane {
        &mut self.lanes[usize::from(lane.0)]
    }

    fn num_lanes_at_work_besides(&self, lane: LaneId) -> u32 {
        let others = self.lane_ids().zip(&self.lanes);
        let at_work = others.filter(|(id, other)| *id != lane && !other.running.is_empty());
        u32::try_from(at_work.count()).expect("there are few lanes")
    }

    /// Blocks that are in use, or will be for what its sequences can be planned to. Places are
    /// given so that this stays within the pool, and [`Self::overcommitted`] restores it when
    /// sequences have grown. A shared block counts once.
    pub(crate) fn num_demanded_blocks(&self) -> u64 {
        let lanes = self.lanes.iter();
        let promised: u64 = lanes.map(|lane| lane.num_promised_blocks).sum();
        u64::from(self.pool.num_used_blocks()) + promised - self.num_leaving_blocks
    }

    /// Whether a newcomer can stay without displacing anybody: now, and as far as lengths can be
    /// foreseen until all have ended.
    pub(crate) fn has_room_for(
        &mut self,
        newcomer: Newcomer<'_>,
        foresight: Foresight<'_>,
    ) -> bool {
        let total = u64::from(self.pool.num_blocks());
        let demanded = self.num_demanded_blocks();
        if demanded == 0 {
            return newcomer.num_blocks <= total;
        }
        let total = total - total / HEADROOM_SHARE;
        let now = demanded + newcomer.num_blocks;
        if now > total {
            return false;
        }
        let lanes = self.lanes.iter();
        let at_most: u64 = lanes.map(|lane| lane.num_blocks_at_most).sum();
        if at_most + newcomer.num_blocks_at_most <= total {
            return true; // nobody can ever be in the way
        }
        let course = Course {
            num_blocks: newcomer.num_blocks,
            num_tokens_to_come: foresight.growth.of(newcomer.sequence),
        };
        // Those who stay grow as was foreseen, or more: only one that leaves makes room.
        let asks_no_less = |refused: Course| {
            course.num_blocks >= refused.num_blocks
                && course.num_tokens_to_come >= refused.num_tokens_to_come
        };
        if let Some((num_leaves, refused)) = self.refused
            && num_leaves == self.num_leaves
            && asks_no_less(refused)
        {
            return false;
        }
        let mut courses = self.courses(foresight);
        courses.push(course);
        let has_room = peak_blocks(now, courses, foresight.block_size_tokens) <= total;
        if !has_room {
            self.refused = Some((self.num_leaves, course));
        }
        has_room
    }

    fn courses(&self, foresight: Foresight<'_>) -> Vec<Course> {
        let running = self.lanes.iter().flat_map(|lane| &lane.running);
        let courses = running.map(|&(_, slot)| {
            let sequence = &foresight.sequences[slot];
            let stay = sequence.stay.as_ref().expect("who runs stays");
            Course {
                num_blocks: stay.num_demanded_blocks.into(),
                num_tokens_to_come: foresight.growth.of(sequence),
            }
        });
        courses.collect()
    }

    /// Gives `sequence` a place on a lane; the instance is told when its first chunk is planned.
    /// What is cached of it counts as computed, or what its place says.
    pub(crate) fn join(&mut self, slot: Slot, sequence: &mut Sequence, place: Place) {
        let Vacancy { lane, prefix } = place.vacancy;
        let CachedPrefix { blocks, node, .. } = prefix;
        self.pool.share(&blocks);
        let num_granted_blocks = u32::try_from(blocks.len()).expect("ids of blocks are u32");
        let num_computed_tokens = if place.is_assumed_computed {
            sequence.num_known_tokens() - 1
        } else {
            num_granted_blocks * place.block_size_tokens
        };
        let stay = Stay {
            id: place.id,
            is_told: false,
            num_computed_tokens,
            num_planned_tokens: num_computed_tokens,
            num_pending_samples: 0,
            num_steps_in_flight: 0,
            after_step: AfterStep::Stays,
            has_sampled: false,
            num_demanded_blocks: num_blocks(sequence.num_known_tokens(), place.block_size_tokens),
            num_granted_blocks,
            holding: Box::new(Holding {
                instance: self.id,
                lane,
                blocks,
                node,
                num_prompt_logprobs: 0,
                num_blocks_at_most: num_blocks(
                    sequence.max_known_tokens - 1,
                    place.block_size_tokens,
                ),
                num_leaving_blocks: 0,
            }),
        };
        self.lane_mut(lane)
            .insert(sequence.details.rank, slot, &stay);
        sequence.stay = Some(stay);
    }

    /// Takes the place of `sequence` away. Its blocks return now or, if steps in flight use them,
    /// when those end; `after` says what becomes of it then. True if it is gone now.
    pub(crate) fn leave(&mut self, sequence: &mut Sequence, after: AfterStep) -> bool {
        let rank = sequence.details.rank;
        let stay = sequence.stay.as_mut().expect("only who stays can leave");
        if stay.after_step == AfterStep::Stays {
            let lane = &mut self.lanes[usize::from(stay.holding.lane.0)];
            lane.remove(rank, stay);
            self.num_leaves += 1;
            if stay.is_told {
                lane.left.push(stay.id);
            }
            if stay.num_steps_in_flight > 0 {
                let is_sole_owner = |block: &&BlockId| self.pool.num_owners(**block) == 1;
                let holding = &mut stay.holding;
                holding.num_leaving_blocks =
                    holding.blocks.iter().filter(is_sole_owner).count() as u64;
                self.num_leaving_blocks += holding.num_leaving_blocks;
            }
        }
        if stay.num_steps_in_flight > 0 {
            stay.after_step = after;
            return false;
        }
        self.end_stay(sequence);
        true
    }

    /// Notes that a step that asked `asked` of `sequence` is over. If that was the last one and
    /// the sequence was to leave, it is gone now, and what becomes of it is returned.
    pub(crate) fn end_step_of(
        &mut self,
        sequence: &mut Sequence,
        asked: Asked,
        has_failed: bool,
    ) -> AfterStep {
        let stay = sequence.stay.as_mut().expect("a sequence in a step stays");
        stay.num_steps_in_flight -= 1;
        stay.num_pending_samples -= u8::from(asked.samples);
        if has_failed {
            stay.num_planned_tokens = stay.num_planned_tokens.min(asked.num_computed_tokens);
        }
        let after = stay.after_step;
        if after != AfterStep::Stays && stay.num_steps_in_flight == 0 {
            self.end_stay(sequence);
            return after;
        }
        AfterStep::Stays
    }

    fn end_stay(&mut self, sequence: &mut Sequence) {
        let stay = sequence.stay.take().expect("checked by the callers");
        self.num_leaving_blocks -= stay.holding.num_leaving_blocks;
        self.pool.release(&stay.holding.blocks);
    }

    /// Lets others share the blocks that `sequence` has filled with what a step `asked` of it.
    pub(crate) fn publish_full_blocks(
        &mut self,
        sequence: &mut Sequence,
        asked: Asked,
        block_size_tokens: u32,
    ) {
        let stay = sequence.stay.as_ref().expect("only who stays progresses");
        let num_published = asked.num_computed_tokens / block_size_tokens;
        let num_full = stay.num_published_blocks(block_size_tokens);
        if num_published == num_full {
            return; // most steps fill no block
        }
        let Holding { blocks, node, .. } = &*stay.holding;
        let mut node = *node;
        let full = blocks.iter().enumerate().take(num_full as usize);
        for (index, &block) in full.skip(num_published as usize) {
            let tokens = sequence.full_block(index, block_size_tokens);
            node = self.pool.publish(node, &tokens, block);
        }
        let stay = sequence.stay.as_mut().expect("only who stays progresses");
        stay.holding.node = node;
    }

    /// Lets nobody start from what `sequence` has computed, since it went wrong.
    pub(crate) fn distrust(&mut self, sequence: &Sequence) {
        let stay = sequence.stay.as_ref().expect("it was in a step");
        self.pool.unpublish(&stay.holding.blocks);
    }

    /// The sequence that must leave next for the others to be able to grow: the youngest of the
    /// lowest priority. `None` when all demand can be met.
    ///
    /// The best-ranked sequence is never asked: alone it fits, since places are given only where
    /// the whole sequence fits. So it finishes, whatever the load, and the rest follow in turn.
    pub(crate) fn overcommitted(&self) -> Option<Slot> {
        let num_running: usize = self.lanes.iter().map(|lane| lane.running.len()).sum();
        let total = u64::from(self.pool.num_blocks());
        if num_running <= 1 || self.num_demanded_blocks() <= total {
            return None;
        }
        let last = self.lanes.iter().filter_map(|lane| lane.running.last());
        last.max().map(|&(_, slot)| slot)
    }

    /// The next step of `lane`: every sequence that decodes, then prefill chunks by rank until
    /// the token budget is spent or the decodes' step would take too long. `None` if there is
    /// nothing to compute and nothing to forget.
    ///
    /// A sequence whose blocks are not free yet sits this step out. They come: demand is within
    /// the pool, so whoever holds them is leaving when a step in flight ends.
    pub(crate) fn plan_lane(
        &mut self,
        (now, lane): (TimeNs, LaneId),
        config: &SchedulerConfig,
        sequences: &mut SequenceTable,
    ) -> Option<LanePlan> {
        let num_other_lanes = self.num_lanes_at_work_besides(lane);
        let Self {
            pool,
            lanes,
            step_times,
            ..
        } = self;
        let lane_state = &mut lanes[usize::from(lane.0)];
        let spare = std::mem::take(&mut lane_state.spare_chunks);
        let mut draft = Draft::new(pool, config, spare, lane_state.running.len());
        draft.load.num_other_lanes = num_other_lanes;
        // Two passes, since a look at many in a row waits for their memory once.
        let running = lane_state.running.iter().map(|&(_, slot)| slot);
        let prefills = running.clone();
        let prefills = prefills.filter(|&slot| num_tokens_to_plan(&sequences[slot]) > 1);
        let prefills: Vec<Slot> = prefills.collect();
        for slot in running {
            let sequence = &mut sequences[slot];
            if num_tokens_to_plan(sequence) == 1 {
                draft.add(slot, sequence);
            }
        }
        draft.spare_decodes(step_times, config.target_tpot_ms);
        for slot in prefills {
            draft.add(slot, &mut sequences[slot]);
        }
        if draft.chunks.is_empty() && lane_state.left.is_empty() {
            return None;
        }
        lane_state.num_demanded_blocks += draft.num_new_demanded_blocks;
        lane_state.num_promised_blocks += draft.num_new_demanded_blocks;
        lane_state.num_promised_blocks -= draft.num_granted_blocks;
        let step = lane_state.next_step();
        lane_state.in_flight.push_back(InFlight {
            step,
            chunks: draft.asked,
            planned: now,
            load: draft.load,
            is_doomed: false,
        });
        Some(LanePlan {
            newcomers: draft.newcomers,
            plan: StepPlan {
                key: StepKey {
                    instance: self.id,
                    epoch: self.epoch,
                    lane,
                    step,
                },
                left: std::mem::take(&mut lane_state.left),
                joined: draft.joined,
                chunks: draft.chunks,
            },
        })
    }
}

/// A place for one newcomer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) id: SequenceId,
    pub(crate) vacancy: Vacancy,
    pub(crate) block_size_tokens: u32,
    /// See [`SchedulerConfig::assumes_computed_prompts`].
    pub(crate) is_assumed_computed: bool,
}

/// Blocks that `num_tokens` tokens fill, the last one perhaps in part.
pub(crate) fn num_blocks(num_tokens: u32, block_size_tokens: u32) -> u32 {
    num_tokens.div_ceil(block_size_tokens)
}

#[cfg(test)]
mod tests;
