//! Owns how requests and their continuations end: once, and with everything given back.
//!
//! It never decides that one ends.

use crate::admission::LiveRequest;
use crate::error::Failure;
use crate::ids::{RequestId, TimeNs};
use crate::request::{FinishReason, RequestEvent};
use crate::scheduler::Scheduler;
use crate::sequence_table::Slot;
use crate::stay::AfterStep;

impl Scheduler {
    /// Fails those that nobody waits for any more.
    pub(crate) fn expire_deadlines(&mut self, now: TimeNs) {
        while let Some(&(deadline, request)) = self.deadlines.first()
            && deadline <= now
        {
            let after_ms = now.since_ns(self.requests[&request].submitted) / 1_000_000;
            self.fail(request, Failure::DeadlinePassed { after_ms });
        }
    }

    /// Ends one continuation well. Nothing happens if it has ended already.
    pub(crate) fn finish(
        &mut self,
        now: TimeNs,
        (id, index): (RequestId, u32),
        reason: FinishReason,
    ) {
        let Some(request) = self.requests.get_mut(&id) else {
            return;
        };
        let Some(slot) = request.slot(index) else {
            return;
        };
        request.continuations[index as usize] = None;
        if request.slots().next().is_none() {
            self.forget_request(id);
        }
        let sequence = &self.sequences[slot];
        let num_allowed = sequence.max_known_tokens - sequence.num_prompt_tokens();
        self.growth
            .note_end(num_allowed, sequence.num_generated_tokens());
        let usage = sequence.usage(now);
        self.drop_sequence(slot);
        let finished = RequestEvent::Finished {
            index,
            reason,
            usage,
        };
        self.events.push((id, finished));
    }

    /// Ends a request early. Nothing happens if it has ended already.
    pub(crate) fn fail(&mut self, id: RequestId, failure: Failure) {
        let Some(request) = self.forget_request(id) else {
            return;
        };
        for slot in request.slots() {
            self.drop_sequence(slot);
        }
        self.events.push((id, RequestEvent::Failed(failure.into())));
    }

    fn forget_request(&mut self, id: RequestId) -> Option<LiveRequest> {
        let request = self.requests.remove(&id)?;
        if let Some(deadline) = request.deadline {
            self.deadlines.remove(&(deadline, id));
        }
        if let Some(latest) = request.latest_start {
            self.latest_starts.remove(&(latest, id));
        }
        Some(request)
    }

    fn drop_sequence(&mut self, slot: Slot) {
        let sequence = &mut self.sequences[slot];
        let is_gone = if let Some(stay) = &sequence.stay {
            let instance = self.cluster.instances.get_mut(&stay.holding.instance);
            let instance = instance.expect("stays end with their instance");
            instance.leave(sequence, AfterStep::Ends)
        } else {
            self.queue.remove(slot, sequence);
            true
        };
        self.fair_share.depart(sequence.tenant);
        if is_gone {
            self.sequences.remove(slot);
        }
    }
}
