//! Owns the running set of one micro-batch lane and its steps in flight.
//!
//! It never touches sequences or blocks: [`Instance`](crate::instance::Instance) does.

use std::collections::VecDeque;

use crate::ids::{SequenceId, StepId, TimeNs};
use crate::sequence::Rank;
use crate::sequence_table::Slot;
use crate::stay::{Asked, Stay};
use crate::step_time::StepLoad;

/// How long a lane whose steps keep failing waits before the next try: short against a
/// recovery, long against a round trip, so that a broken peer is not hammered.
const STEP_RETRY_MS: u64 = 10;

#[derive(Debug, Default)]
pub(crate) struct Lane {
    /// Best rank first, so that work is planned from the front and places are lost from the back.
    pub(crate) running: Vec<(Rank, Slot)>,
    /// Sequences that the instance has yet to forget.
    pub(crate) left: Vec<SequenceId>,
    /// Blocks that all plannable tokens of the running set need.
    pub(crate) num_demanded_blocks: u64,
    /// Those of them that are not granted yet.
    pub(crate) num_promised_blocks: u64,
    /// Blocks that the running set needs if all become as long as they may.
    pub(crate) num_blocks_at_most: u64,
    /// Oldest first: an instance answers the steps of a lane in their order.
    pub(crate) in_flight: VecDeque<InFlight>,
    /// Empty: the memory of a step that is over, for the next to use.
    pub(crate) spare_chunks: Vec<(Slot, Asked)>,
    num_steps: u64,
    /// When its last step was answered.
    last_answer: TimeNs,
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
    pub(crate) planned: TimeNs,
    pub(crate) load: StepLoad,
    /// An earlier step failed, so this one has nothing to start from and will fail too.
    pub(crate) is_doomed: bool,
}

impl Lane {
    pub(crate) fn insert(&mut self, rank: Rank, slot: Slot, stay: &Stay) {
        let at = self.running.partition_point(|&(other, _)| other < rank);
        self.running.insert(at, (rank, slot));
        self.num_demanded_blocks += u64::from(stay.num_demanded_blocks);
        self.num_promised_blocks += u64::from(stay.num_promised_blocks());
        self.num_blocks_at_most += u64::from(stay.holding.num_blocks_at_most);
    }

    pub(crate) fn remove(&mut self, rank: Rank, stay: &Stay) {
        let at = self.running.binary_search_by_key(&rank, |&(rank, _)| rank);
        self.running
            .remove(at.expect("the sequence runs on this lane"));
        self.num_demanded_blocks -= u64::from(stay.num_demanded_blocks);
        self.num_promised_blocks -= u64::from(stay.num_promised_blocks());
        self.num_blocks_at_most -= u64::from(stay.holding.num_blocks_at_most);
    }

    /// Whether a step may be planned at `now`: not while a doomed one is in flight, because what
    /// its sequences start from is known again only when it has failed.
    pub(crate) fn is_ready(&mut self, now: TimeNs, max_steps_in_flight: u8) -> bool {
        if self.retry_at.is_some_and(|at| at <= now) {
            self.retry_at = None;
        }
        self.in_flight.len() < usize::from(max_steps_in_flight)
            && !self.in_flight.iter().any(|step| step.is_doomed)
            && self.retry_at.is_none()
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

    /// Ends the oldest step in flight if it is `step`, and says how many nanoseconds it took: an
    /// instance takes a step up when it has ended the one before, however early it was planned. An
    /// answer to any other step is stale.
    pub(crate) fn take_step(&mut self, now: TimeNs, step: StepId) -> Option<(InFlight, u64)> {
        let taken = self.in_flight.pop_front_if(|oldest| oldest.step == step)?;
        let started = taken.planned.max(self.last_answer);
        self.last_answer = now;
        Some((taken, now.since_ns(started)))
    }

    pub(crate) fn note_success(&mut self) {
        self.failing_since = None;
        self.retry_at = None;
    }

    /// Notes a failed step; returns since when steps have been failing. The first failure is
    /// retried at once (the cause may be gone), later ones after a pause.
    pub(crate) fn note_failure(&mut self, now: TimeNs) -> TimeNs {
        for later in &mut self.in_flight {
            later.is_doomed = true;
        }
        if self.failing_since.is_some() {
            self.retry_at = Some(now.plus_ms(STEP_RETRY_MS));
        }
        *self.failing_since.get_or_insert(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sequence::Sequence;
    use crate::sequence_table::SequenceTable;

    fn rank(priority: i32, arrival: u64) -> Rank {
        Rank { priority, arrival }
    }

    #[test]
    fn the_running_set_is_in_the_order_of_rank_whatever_the_order_of_joins() {
        let mut table = SequenceTable::default();
        let mut lane = Lane::default();
        for rank in [rank(0, 2), rank(1, 0), rank(-1, 3), rank(0, 1)] {
            let slot = table.insert(Sequence::for_tests(&[1], &[]));
            lane.insert(rank, slot, &Stay::for_tests(2));
        }
        lane.remove(rank(0, 2), &Stay::for_tests(2));
        let ranks: Vec<Rank> = lane.running.iter().map(|&(rank, _)| rank).collect();
        assert_eq!(ranks, [rank(-1, 3), rank(0, 1), rank(1, 0)]);
        assert_eq!((lane.num_demanded_blocks, lane.num_promised_blocks), (6, 6));
    }

    fn plan_step(lane: &mut Lane) -> StepId {
        let step = lane.next_step();
        lane.in_flight.push_back(InFlight {
            step,
            chunks: Vec::new(),
            planned: TimeNs(0),
            load: StepLoad::default(),
            is_doomed: false,
        });
        step
    }

    #[test]
    fn a_step_that_was_planned_ahead_starts_when_the_one_before_it_ends() {
        let mut lane = Lane::default();
        let first = plan_step(&mut lane);
        let second = plan_step(&mut lane);
        let taken = lane.take_step(TimeNs(30), first);
        assert_eq!(taken.map(|(_, took_ns)| took_ns), Some(30));
        let taken = lane.take_step(TimeNs(50), second);
        assert_eq!(taken.map(|(_, took_ns)| took_ns), Some(20));
        let third = plan_step(&mut lane);
        lane.in_flight[0].planned = TimeNs(80);
        let taken = lane.take_step(TimeNs(95), third);
        assert_eq!(taken.map(|(_, took_ns)| took_ns), Some(15));
    }

    #[test]
    fn only_the_oldest_step_in_flight_can_end_and_only_once() {
        let mut lane = Lane::default();
        let first = plan_step(&mut lane);
        assert!(!lane.is_ready(TimeNs(0), 1));
        assert!(lane.is_ready(TimeNs(0), 2));
        let second = plan_step(&mut lane);
        assert!(!lane.is_ready(TimeNs(0), 2));
        assert!(lane.take_step(TimeNs(1), second).is_none());
        assert!(lane.take_step(TimeNs(1), first).is_some());
        assert!(lane.take_step(TimeNs(1), first).is_none());
        assert!(lane.take_step(TimeNs(1), second).is_some());
        assert_eq!(lane.next_step(), StepId(2));
    }

    #[test]
    fn a_failure_dooms_the_later_steps_and_nothing_is_planned_on_them() {
        let mut lane = Lane::default();
        let first = plan_step(&mut lane);
        let second = plan_step(&mut lane);
        lane.take_step(TimeNs(1), first).unwrap();
        lane.note_failure(TimeNs(1));
        assert!(!lane.is_ready(TimeNs(1), 2));
        assert!(lane.take_step(TimeNs(1), second).unwrap().0.is_doomed);
        assert!(lane.is_ready(TimeNs(1), 2));
    }

    #[test]
    fn retries_after_the_first_wait_and_a_success_forgets_the_failures() {
        let mut lane = Lane::default();
        assert_eq!(lane.note_failure(TimeNs(5)), TimeNs(5));
        assert!(lane.is_ready(TimeNs(5), 1));
        assert_eq!(lane.note_failure(TimeNs(7)), TimeNs(5));
        assert_eq!(lane.retry_at(), Some(TimeNs(7).plus_ms(STEP_RETRY_MS)));
        assert!(!lane.is_ready(TimeNs(8), 1));
        assert!(lane.is_ready(TimeNs(7).plus_ms(STEP_RETRY_MS), 1));
        lane.note_failure(TimeNs(8));
        lane.note_success();
        assert!(lane.is_ready(TimeNs(8), 1));
        assert_eq!(lane.note_failure(TimeNs(9)), TimeNs(9));
    }
}
