//! Owns who gets a place next and who loses one.
//!
//! It never plans: a sequence with a place is told to its instance with its first chunk.

use crate::cluster::Need;
use crate::draft::num_tokens_to_plan;
use crate::ids::{SequenceId, TimeNs};
use crate::instance::{Foresight, Place};
use crate::scheduler::Scheduler;
use crate::sequence::Sequence;
use crate::stay::AfterStep;

impl Scheduler {
    /// Lets those sequences lose their places that others, ranked before them, have grown into.
    pub(crate) fn evict(&mut self) {
        for instance in self.cluster.instances.values_mut() {
            while let Some(slot) = instance.overcommitted() {
                let sequence = &mut self.sequences[slot];
                self.num_preemptions += 1;
                if instance.leave(sequence, AfterStep::Waits) {
                    self.queue.insert(slot, sequence);
                }
            }
        }
    }

    /// Gives places: by priority, then to the tenant that was served least, then to the oldest.
    /// It stops at the first that finds no room, or a stream of short requests would keep a long
    /// one waiting for ever; those whom no present instance could ever serve wait for a recovery
    /// and hold nobody up.
    pub(crate) fn give_places(&mut self, now: TimeNs) {
        if !self.cluster.is_complete() {
            return;
        }
        let num_before = self.queue.num_requests();
        let mut placed = Vec::new();
        let mut turns = self.queue.turns();
        while let Some(slot) = turns.take_one(&self.fair_share) {
            let sequence = &self.sequences[slot];
            let need = Need::of(sequence, self.config.block_size_tokens);
            if !self.cluster.can_ever_hold(need) || self.awaits_sibling(sequence) {
                continue;
            }
            let foresight = Foresight {
                growth: &self.growth,
                sequences: &self.sequences,
                block_size_tokens: self.config.block_size_tokens,
            };
            let chosen = self.cluster.choose(sequence, &self.config, foresight);
            let Some((id, vacancy)) = chosen else {
                break;
            };
            let place = Place {
                id: SequenceId(self.num_stays),
                vacancy,
                block_size_tokens: self.config.block_size_tokens,
                is_assumed_computed: self.config.assumes_computed_prompts,
            };
            self.num_stays += 1;
            let instance = self.cluster.instances.get_mut(&id);
            let instance = instance.expect("choose names a present instance");
            let sequence = &mut self.sequences[slot];
            instance.join(slot, sequence, place);
            if !std::mem::replace(&mut sequence.details.is_charged, true) {
                let num_tokens = u64::from(num_tokens_to_plan(sequence));
                self.fair_share.charge_prompt(sequence.tenant, num_tokens);
            }
            placed.push(slot);
        }
        for slot in placed {
            self.queue.remove(slot, &self.sequences[slot]);
        }
        let num_waiting = self.queue.num_requests();
        let num_served = num_before - num_waiting;
        self.drain_rate.note(now, num_served, num_waiting > 0);
    }

    /// Whether another continuation of its request is computing the prompt, whose full blocks
    /// this one can then share instead of computing them beside it.
    fn awaits_sibling(&self, sequence: &Sequence) -> bool {
        let block_size_tokens = self.config.block_size_tokens;
        let num_shareable = (sequence.num_prompt_tokens() - 1) / block_size_tokens;
        let siblings = self.requests[&sequence.request].slots();
        let mut stays = siblings.filter_map(|slot| self.sequences[slot].stay.as_ref());
        stays.any(|stay| {
            let stays = stay.after_step == AfterStep::Stays;
            stays && stay.num_published_blocks(block_size_tokens) < num_shareable
        })
    }
}
