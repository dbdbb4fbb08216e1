//! Checks that the scheduler's books agree with each other.
//!
//! It never repairs anything. It walks everything that lives, so it is for tests and simulators,
//! after every event, and not for the drive loop.

use std::collections::BTreeMap;

use crate::cluster::Need;
use crate::ids::{BlockId, TenantId};
use crate::instance::{Instance, num_blocks};
use crate::lane::Lane;
use crate::scheduler::Scheduler;
use crate::sequence::Sequence;
use crate::sequence_table::Slot;
use crate::stay::{AfterStep, Stay};

/// Returns from the enclosing function with a message unless the condition holds.
macro_rules! ensure {
    ($condition:expr, $($message:tt)+) => {
        if !$condition {
            return Err(format!($($message)+));
        }
    };
}

impl Scheduler {
    /// Says which invariant is broken, if one is:
    ///
    /// - per instance, free and used blocks are all blocks, and every block counts its owners;
    /// - a sequence computes no more than it knows, in blocks that it owns;
    /// - a sequence either waits or stays, on one lane, and belongs to a live request unless a
    ///   step in flight still holds its blocks;
    /// - a tenant's share counts the continuations of its live requests;
    /// - the demand that a lane counts is the demand of its sequences.
    pub fn audit(&self) -> Result<(), String> {
        let mut num_waiting = 0;
        for (slot, sequence) in self.sequences.iter() {
            let id = sequence.request;
            ensure!(
                sequence.counts_its_tokens(),
                "a sequence of request {id} has lost count of its tokens"
            );
            if let Some(stay) = &sequence.stay {
                self.audit_stay(slot, sequence, stay)?;
            } else {
                num_waiting += 1;
                ensure!(
                    self.queue.contains(slot, sequence),
                    "a sequence of request {id} neither waits nor stays"
                );
            }
            let live = self.requests.get(&id).and_then(|r| r.slot(sequence.index));
            ensure!(
                (live == Some(slot)) == sequence.is_wanted(),
                "a sequence of request {id} has outlived it, or the request has lost it"
            );
        }
        ensure!(
            num_waiting == self.queue.num_sequences(),
            "the queue has sequences that do not wait"
        );
        let mut num_live: BTreeMap<TenantId, u64> = BTreeMap::new();
        for (id, request) in &self.requests {
            ensure!(request.slots().next().is_some(), "request {id} has ended");
            for slot in request.slots() {
                *num_live.entry(self.sequences[slot].tenant).or_default() += 1;
            }
        }
        ensure!(
            self.fair_share.live_sequences().eq(num_live),
            "the shares have lost count of the sequences that live"
        );
        for instance in self.cluster.instances.values() {
            self.audit_instance(instance)?;
        }
        Ok(())
    }

    fn audit_stay(&self, slot: Slot, sequence: &Sequence, stay: &Stay) -> Result<(), String> {
        let (id, known) = (stay.id, sequence.num_known_tokens());
        let block_size_tokens = self.config.block_size_tokens;
        let instance = self.cluster.instances.get(&stay.holding.instance);
        let Some(instance) = instance else {
            return Err(format!("sequence {id} stays on a lost instance"));
        };
        let lane = &instance.lanes[usize::from(stay.holding.lane.0)];
        let runs = lane.running.contains(&(sequence.details.rank, slot));
        ensure!(
            runs == (stay.after_step == AfterStep::Stays),
            "sequence {id} runs and leaves, or neither"
        );
        ensure!(
            stay.num_computed_tokens <= known,
            "sequence {id} has computed {} of {known} tokens",
            stay.num_computed_tokens
        );
        // What is only assumed to be computed gets its blocks with the first plan.
        let is_assumed = self.config.assumes_computed_prompts && !stay.is_told;
        let num_filled = num_blocks(stay.num_computed_tokens, block_size_tokens);
        ensure!(
            (is_assumed || num_filled <= stay.num_granted_blocks)
                && stay.num_granted_blocks as usize == stay.holding.blocks.len(),
            "sequence {id} has computed tokens outside its blocks"
        );
        let plannable = sequence.num_plannable_tokens();
        ensure!(
            num_blocks(plannable, block_size_tokens) <= stay.num_demanded_blocks
                && stay.num_granted_blocks <= stay.num_demanded_blocks,
            "sequence {id} demands {} blocks for {plannable} tokens",
            stay.num_demanded_blocks
        );
        let at_most = Need::of(sequence, block_size_tokens).at_most;
        ensure!(
            u64::from(stay.holding.num_blocks_at_most) == at_most,
            "sequence {id} may need {at_most} blocks and counts {}",
            stay.holding.num_blocks_at_most
        );
        let in_flight = lane.in_flight.iter().flat_map(|step| &step.chunks);
        let held_by = in_flight.filter(|&&(other, _)| other == slot).count();
        ensure!(
            usize::from(stay.num_steps_in_flight) == held_by && (runs || held_by > 0),
            "sequence {id} does not know which steps hold it"
        );
        ensure!(
            held_by > 0
                || (stay.num_planned_tokens == stay.num_computed_tokens
                    && stay.num_pending_samples == 0),
            "sequence {id} waits for steps that are over"
        );
        Ok(())
    }

    fn audit_instance(&self, instance: &Instance) -> Result<(), String> {
        let id = instance.id;
        let stays = self.sequences.iter().filter_map(|(_, s)| s.stay.as_ref());
        let mut used: BTreeMap<BlockId, u32> = BTreeMap::new();
        let mut num_leaving_blocks = 0;
        for stay in stays.filter(|stay| stay.holding.instance == id) {
            num_leaving_blocks += stay.holding.num_leaving_blocks;
            for block in &stay.holding.blocks {
                *used.entry(*block).or_default() += 1;
            }
        }
        for (block, &num_owners) in &used {
            let counted = instance.pool.num_owners(*block);
            ensure!(
                counted == num_owners,
                "block {block} of {id} has {num_owners} owners and counts {counted}"
            );
        }
        ensure!(
            num_leaving_blocks == instance.num_leaving_blocks,
            "instance {id} has lost count of the blocks that are leaving"
        );
        let (free, total) = (instance.pool.num_free_blocks(), instance.pool.num_blocks());
        ensure!(
            used.len() + free as usize == total as usize,
            "instance {id} has {free} free and {} used of {total} blocks",
            used.len()
        );
        for lane in &instance.lanes {
            self.audit_lane(lane)?;
        }
        Ok(())
    }

    fn audit_lane(&self, lane: &Lane) -> Result<(), String> {
        ensure!(
            lane.running.is_sorted_by(|a, b| a.0 < b.0),
            "a lane is out of order"
        );
        ensure!(
            lane.running.len() <= self.config.max_sequences_per_lane as usize,
            "a lane has {} sequences",
            lane.running.len()
        );
        let stays = lane
            .running
            .iter()
            .filter_map(|&(_, slot)| self.sequences[slot].stay.as_ref());
        let loads = stays.map(|stay| {
            let promised = stay.num_promised_blocks();
            let at_most = stay.holding.num_blocks_at_most;
            [stay.num_demanded_blocks, promised, at_most].map(u64::from)
        });
        let sum = loads.fold([0; 3], |sum: [u64; 3], load| {
            std::array::from_fn(|index| sum[index] + load[index])
        });
        let counted = [
            lane.num_demanded_blocks,
            lane.num_promised_blocks,
            lane.num_blocks_at_most,
        ];
        ensure!(
            counted == sum,
            "a lane counts {counted:?} demanded, promised and most blocks and has {sum:?}"
        );
        Ok(())
    }
}
