//! Owns the running set of one micro-batch lane and its step in flight.
//!
//! It never touches sequences or blocks: [`Instance`](crate::instance::Instance) does.

use crate::ids::{SequenceId, StepId, TimeNs};
use crate::sequence::{Asked, Rank};
use crate::sequence_table::Slot;

/// How long a lane whose steps keep failing waits before the next try: short against a
/// recovery, long against a round trip, so that a broken peer is not hammered.
const STEP_RETRY_MS: u64 = 10;

#[derive(Debug, Default)]
pub(crate) struct Lane {
    /// Best rank first, so that work is planned from the front and places are lost from the back.
    pub(crate) running: Vec<(Rank, Slot)>,
    /// Sequences that the instance has yet to forget.
    pub(crate) left: Vec<SequenceId>,
    /// Blocks that all known tokens of the running set need.
    pub(crate) num_demanded_blocks: u64,
    pub(crate) in_flight: Option<InFlight>,
    num_steps: u64,
    /// Since when no step succeeded, if the last one failed.
    failing_since: Option<TimeNs>,
    retry_at: Option<TimeNs>,
}

/// A step that was planned and not answered.
#[derive(Debug)]
pub(crate) struct InFlight {
    pub(crate) step: StepId,
    /// In the plan's order.
    pub(crate) chunks: Vec<(Slot, Asked)>,
}

impl Lane {
    pub(crate) fn insert(&mut self, rank: Rank, slot: Slot, num_demanded_blocks: u64) {
        let at = self.running.partition_point(|&(other, _)| other < rank);
        self.running.insert(at, (rank, slot));
        self.num_demanded_blocks += num_demanded_blocks;
    }

    pub(crate) fn remove(&mut self, rank: Rank, num_demanded_blocks: u64) {
        let at = self.running.binary_search_by_key(&rank, |&(rank, _)| rank);
        self.running
            .remove(at.expect("the sequence runs on this lane"));
        self.num_demanded_blocks -= num_demanded_blocks;
    }

    /// Whether a step may be planned at `now`.
    pub(crate) fn is_ready(&mut self, now: TimeNs) -> bool {
        if self.retry_at.is_some_and(|at| at <= now) {
            self.retry_at = None;
        }
        self.in_flight.is_none() && self.retry_at.is_none()
    }

    /// When [`Self::is_ready`] turns true by itself.
    pub(crate) fn retry_at(&self) -> Option<TimeNs> {
        self.retry_at
    }

    /// The number of the step that is planned now.
    pub(crate) fn next_step(&mut self) -> StepId {
        let step = StepId(self.num_steps);
        self.num_steps += 1;
        step
    }

    /// Ends the step in flight if it is `step`: an answer to any other one is stale.
    pub(crate) fn take_step(&mut self, step: StepId) -> Option<InFlight> {
        self.in_flight.take_if(|in_flight| in_flight.step == step)
    }

    pub(crate) fn note_success(&mut self) {
        self.failing_since = None;
        self.retry_at = None;
    }

    /// Notes a failed step; returns since when steps have been failing. The first failure is
    /// retried at once (the cause may be gone), later ones after a pause.
    pub(crate) fn note_failure(&mut self, now: TimeNs) -> TimeNs {
        if self.failing_since.is_some() {
            self.retry_at = Some(now.plus_ms(STEP_RETRY_MS));
        }
        *self.failing_since.get_or_insert(now)
    }
}
