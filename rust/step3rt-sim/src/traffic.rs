//! Owns what clients do: what they ask, when they lose interest, and when they ask again.
//!
//! It never looks at the scheduler; clients see their streams.

use step3rt_core::error::ErrorKind;
use step3rt_core::ids::{RequestId, TenantId, TimeNs, TokenId};
use step3rt_core::request::{MAX_CONTINUATIONS, Request};
use step3rt_core::scheduler::Event;
use step3rt_core::step::SamplingState;

use crate::clients::seed_of;
use crate::fault::Fault;
use crate::model::VOCAB_SIZE;
use crate::violation::{Violation, ensure};
use crate::world::{Happening, World};

impl World {
    pub(crate) fn submit_next(&mut self) -> Result<(), Violation> {
        if self.num_submitted == self.profile.num_requests {
            return Ok(()); // those who ask again were faster
        }
        let request = self.draw_request();
        self.submit(request)?;
        if self.num_submitted < self.profile.num_requests {
            let gap_us = self.traffic.within(0, 2 * self.profile.mean_gap_us);
            self.after_us(gap_us, Happening::Submit);
        }
        Ok(())
    }

    fn submit(&mut self, mut request: Request) -> Result<(), Violation> {
        let id = request.id;
        self.num_submitted += 1;
        if self.strikes(Fault::InvalidRequest) {
            self.counts.note(Fault::InvalidRequest);
            match self.traffic.below(4) {
                0 => request.prompt.clear(),
                1 => request.max_tokens = 0,
                2 => request.n = 0,
                _ => request.n = MAX_CONTINUATIONS + 1,
            }
        }
        self.note(|_| {
            format!(
                "client {id}: asks for {} tokens after {} + {}, n = {}, priority {}",
                request.max_tokens,
                request.prompt.len(),
                request.resumed.len(),
                request.n,
                request.priority
            )
        });
        self.draw_interest(&request);
        self.clients.submitted(request.clone());
        self.tell(Event::Submit(request.clone()))?;
        let is_live = !self.clients.streams[&id].has_ended();
        if is_live && self.strikes(Fault::RepeatedRequest) {
            self.counts.note(Fault::RepeatedRequest);
            self.tell_nothing(Event::Submit(request), "a request under a live one's id")?;
        }
        self.plan_soon()
    }

    /// Whether and when the client will have had enough.
    fn draw_interest(&mut self, request: &Request) {
        let id = request.id;
        if self.strikes(Fault::Cancel) {
            let delay_us = self.rng.within(0, 60_000);
            self.after_us(delay_us, Happening::Cancel(id));
        }
        if self.strikes(Fault::StopString) {
            let index = self.rng.within(0, request.n.clamp(1, 4) - 1);
            let delay_us = self.rng.within(0, 60_000);
            self.after_us(delay_us, Happening::Stop(id, index));
        }
    }

    pub(crate) fn cancel(&mut self, id: RequestId) -> Result<(), Violation> {
        let stream = self.clients.streams.get_mut(&id);
        let stream = stream.expect("it was submitted");
        if stream.has_ended() {
            return self.tell_nothing(Event::Cancel(id), "a cancel after the end");
        }
        stream.is_cancelled = true;
        self.counts.note(Fault::Cancel);
        self.note(|_| format!("client {id}: cancels"));
        self.tell(Event::Cancel(id))?;
        let has_ended = self.clients.streams[&id].has_ended();
        ensure!(has_ended, "request {id} goes on after its cancel");
        self.plan_soon()
    }

    pub(crate) fn stop(&mut self, id: RequestId, index: u32) -> Result<(), Violation> {
        let stream = self.clients.streams.get_mut(&id);
        let stream = stream.expect("it was submitted");
        if !stream.is_live(index) {
            let stop = Event::Stop { request: id, index };
            return self.tell_nothing(stop, "a stop after the end");
        }
        stream.stopped.insert(index);
        self.counts.note(Fault::StopString);
        self.note(|_| format!("client {id}: the text of {index} has a stop string"));
        self.tell(Event::Stop { request: id, index })?;
        let is_live = self.clients.streams[&id].is_live(index);
        ensure!(!is_live, "request {id} goes on after a stop string");
        self.plan_soon()
    }

    /// A client whose request failed for a reason that may pass asks for the rest of its stream.
    pub(crate) fn perhaps_ask_again(&mut self, id: RequestId, kind: ErrorKind) {
        let may_pass = matches!(
            kind,
            ErrorKind::NodeLost | ErrorKind::EngineNotReady | ErrorKind::QueueFull
        );
        if !may_pass || !self.traffic.chance(400) || self.profile.num_requests >= MAX_REQUESTS {
            return;
        }
        let stream = &self.clients.streams[&id];
        let mut request = stream.request.clone();
        if request.n == 1 {
            request.resumed = stream.generated().to_vec();
        }
        self.profile.num_requests += 1;
        self.asked_again.push_back(request);
        let delay_us = self.traffic.within(500, 30_000);
        self.after_us(delay_us, Happening::Submit);
    }

    fn draw_request(&mut self) -> Request {
        let id = RequestId(u64::from(self.num_submitted));
        if let Some(again) = self.asked_again.pop_front() {
            // Another seed: what it continues with is not what it would have been, and is known.
            let mut request = Request { id, ..again };
            request.sampling.seed = seed_of(id, request.tenant);
            return request;
        }
        let profile = &self.profile;
        let rng = &mut self.traffic;
        let num_prompt_tokens = rng.within(1, profile.max_prompt_tokens);
        // Documents that many ask about, so that beginnings are shared.
        let document = rng.within(0, 2);
        let num_common = rng.within(0, num_prompt_tokens);
        let prompt = (0..num_prompt_tokens).map(|index| {
            if index < num_common {
                TokenId((index * 7 + document) % VOCAB_SIZE)
            } else {
                TokenId(rng.within(0, VOCAB_SIZE - 1))
            }
        });
        let prompt = prompt.collect();
        let tenant = TenantId(rng.pick(&[0, 0, 1, 2]));
        let num_stop_tokens = rng.pick(&[0, 0, 1, 3]);
        let deadline_ms = rng.within(1, 150);
        let has_deadline = profile.rate(Fault::Deadline) > 0 && rng.chance(250);
        let now_ms = self.clock.last_ms();
        Request {
            id,
            prompt,
            resumed: Vec::new(),
            n: rng.pick(&[1, 1, 1, 2, 3]),
            sampling: SamplingState {
                temperature: 1.0,
                top_k: 0,
                top_p: 1.0,
                min_p: 0.0,
                seed: seed_of(id, tenant),
                top_logprobs: None,
                prompt_logprobs: rng.chance(200).then_some(0),
                min_tokens: rng.pick(&[0, 0, 3]),
                stop_tokens: (0..num_stop_tokens).map(TokenId).collect(),
                adjustments: None,
            },
            max_tokens: rng.within(1, profile.max_new_tokens),
            priority: i32::try_from(rng.within(0, 2)).expect("small") - 1,
            tenant,
            deadline: has_deadline.then(|| TimeNs(0).plus_ms(now_ms + u64::from(deadline_ms))),
        }
    }
}

/// The most requests of a seed, those that are asked again included.
const MAX_REQUESTS: u32 = 100;
