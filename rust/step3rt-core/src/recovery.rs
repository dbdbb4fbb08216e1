//! Owns what happens when the cluster loses what sequences need, and when it comes back.
//!
//! A loss is an ordinary event: nothing is thrown away but the KV that is gone. It never decides
//! that something is lost; leases and links do.

use crate::block_pool::BlockPool;
use crate::cluster::Need;
use crate::error::Failure;
use crate::ids::{Epoch, InstanceId, TimeNs};
use crate::instance::Instance;
use crate::scheduler::Scheduler;
use crate::sequence::Sequence;
use crate::sequence_table::Slot;
use crate::stay::AfterStep;

/// Whether everything that lives can be served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Health {
    /// The cluster was never complete, or did not recover in time. Requests are refused.
    Down,
    /// Every live sequence has, or can get, what it needs.
    Whole,
    /// Something is lost that some sequence needs. Requests wait with the others.
    Recovering {
        /// When those fail that still cannot be served.
        deadline: TimeNs,
    },
}

impl Health {
    pub(crate) fn deadline(self) -> Option<TimeNs> {
        match self {
            Self::Recovering { deadline } => Some(deadline),
            Self::Down | Self::Whole => None,
        }
    }
}

impl Scheduler {
    pub(crate) fn attention_ready(
        &mut self,
        now: TimeNs,
        (id, epoch): (InstanceId, Epoch),
        num_kv_blocks: u32,
    ) {
        if self.cluster.note_registration(id, epoch).is_err() {
            return; // stale, or said twice
        }
        self.attention_lost(now, id); // perhaps it came back before anybody missed it
        let pool = BlockPool::new(num_kv_blocks);
        let instance = Instance::new(id, epoch, pool, self.config.num_lanes);
        self.cluster.instances.insert(id, instance);
        self.review_health(now);
    }

    /// Sends the instance's sequences back to the line, with the tokens that they know.
    pub(crate) fn attention_lost(&mut self, now: TimeNs, id: InstanceId) {
        if self.cluster.instances.remove(&id).is_none() {
            return;
        }
        let stays_there = |(slot, sequence): (Slot, &Sequence)| {
            let stay = sequence.stay.as_ref()?;
            (stay.holding.instance == id).then_some((slot, stay.after_step))
        };
        let displaced: Vec<_> = self.sequences.iter().filter_map(stays_there).collect();
        for (slot, after) in displaced {
            if after == AfterStep::Ends {
                self.sequences.remove(slot);
                continue;
            }
            let sequence = &mut self.sequences[slot];
            sequence.stay = None; // its blocks went with the pool
            self.queue.insert(slot, sequence);
        }
        self.review_health(now);
    }

    pub(crate) fn experts_complete(&mut self, now: TimeNs, has_all_experts: bool) {
        self.cluster.has_all_experts = has_all_experts;
        if has_all_experts {
            // Steps that failed for want of experts are no sign against the lanes.
            let instances = self.cluster.instances.values_mut();
            for lane in instances.flat_map(|instance| &mut instance.lanes) {
                lane.note_success();
            }
        }
        self.review_health(now);
    }

    /// Fails those that the recovery came too late for.
    pub(crate) fn expire_recovery(&mut self, now: TimeNs) {
        if self.health.deadline().is_none_or(|deadline| deadline > now) {
            return;
        }
        let live = self.sequences.iter().map(|(_, sequence)| sequence);
        let given_up: Vec<_> = live
            .filter(|sequence| !self.can_serve(sequence))
            .map(|sequence| (sequence.request, self.why_given_up(sequence)))
            .collect();
        for (request, failure) in given_up {
            self.fail(request, failure);
        }
        self.health = Health::Down;
        self.review_health(now);
    }

    /// A second loss does not prolong the recovery that the first one started.
    fn review_health(&mut self, now: TimeNs) {
        let mut live = self.sequences.iter();
        self.health = if self.cluster.is_complete() && live.all(|(_, s)| self.can_serve(s)) {
            Health::Whole
        } else if self.health == Health::Whole {
            Health::Recovering {
                deadline: now.plus_ms(self.config.recovery_timeout_ms),
            }
        } else {
            self.health
        };
    }

    fn can_serve(&self, sequence: &Sequence) -> bool {
        let need = Need::of(sequence, self.config.block_size_tokens);
        let has_place = sequence.stay.is_some();
        self.cluster.has_all_experts && (has_place || self.cluster.can_ever_hold(need))
    }

    fn why_given_up(&self, sequence: &Sequence) -> Failure {
        if sequence.details.planned.is_some() {
            Failure::NotRecovered {
                recovery_timeout_ms: self.config.recovery_timeout_ms,
            }
        } else if self.cluster.is_complete() {
            self.exceeds_kv_pool(sequence)
        } else {
            self.not_ready()
        }
    }

    pub(crate) fn not_ready(&self) -> Failure {
        Failure::NotReady {
            num_attention: self.cluster.instances.len(),
            has_all_experts: self.cluster.has_all_experts,
        }
    }

    pub(crate) fn exceeds_kv_pool(&self, sequence: &Sequence) -> Failure {
        Failure::ExceedsKvPool {
            max_known_tokens: sequence.max_known_tokens,
            needed: Need::of(sequence, self.config.block_size_tokens).at_most,
            available: self.cluster.largest_pool_blocks(),
            block_size_tokens: self.config.block_size_tokens,
        }
    }
}
