//! Owns the way in: what a request may ask, whether there is room for it, and the sequences that
//! it becomes.
//!
//! It never gives places; an accepted request stands in line.

use std::sync::Arc;

use crate::cluster::Need;
use crate::config::SchedulerConfig;
use crate::error::Failure;
use crate::ids::{RequestId, TenantId, TimeNs};
use crate::recovery::Health;
use crate::request::{MAX_CONTINUATIONS, Request, RequestEvent};
use crate::scheduler::Scheduler;
use crate::sequence::{Continuation, Rank, Sequence, num_tokens};
use crate::sequence_table::Slot;

/// A request that has not ended.
#[derive(Debug)]
pub(crate) struct LiveRequest {
    /// By index; `None` has ended.
    pub(crate) continuations: Vec<Option<Slot>>,
    pub(crate) submitted: TimeNs,
    pub(crate) deadline: Option<TimeNs>,
    /// When it must have begun to be able to end in time, as far as that is known.
    pub(crate) latest_start: Option<TimeNs>,
    pub(crate) is_started: bool,
}

impl LiveRequest {
    pub(crate) fn slot(&self, index: u32) -> Option<Slot> {
        *self.continuations.get(index as usize)?
    }

    pub(crate) fn slots(&self) -> impl Iterator<Item = Slot> + '_ {
        self.continuations.iter().copied().flatten()
    }
}

impl Scheduler {
    pub(crate) fn submit(&mut self, now: TimeNs, request: Request) {
        if self.requests.contains_key(&request.id) {
            return; // ending it under this id would end the live request's stream
        }
        let id = request.id;
        if let Err(failure) = self.accept(now, request) {
            self.events.push((id, RequestEvent::Failed(failure.into())));
        }
    }

    fn accept(&mut self, now: TimeNs, request: Request) -> Result<(), Failure> {
        if self.is_draining {
            return Err(Failure::Draining);
        }
        check(&request, &self.config)?;
        let (id, deadline) = (request.id, request.deadline);
        if deadline.is_some_and(|deadline| deadline <= now) {
            return Err(Failure::DeadlinePassed { after_ms: 0 });
        }
        let when = (now, self.num_arrivals);
        let sequences = sequences_of(request, self.config.max_model_len, when);
        let first = &sequences[0];
        if let Some(reason) = first.finish_reason() {
            // The client resumes a stream of which only the end was lost.
            let finished = RequestEvent::Finished {
                index: 0,
                reason,
                usage: first.usage(now),
            };
            let started = RequestEvent::Started {
                num_cached_tokens: 0,
            };
            self.events.push((id, started));
            self.events.push((id, finished));
            return Ok(());
        }
        self.check_means(first)?;
        let latest_start = match deadline {
            Some(deadline) => self.check_deadline(now, first, deadline)?,
            None => None,
        };
        self.make_room(now, first.tenant)?;
        self.num_arrivals += sequences.len() as u64;
        self.fair_share.arrive(first.tenant, sequences.len() as u64);
        let mut live = LiveRequest {
            continuations: Vec::with_capacity(sequences.len()),
            submitted: now,
            deadline,
            latest_start: None,
            is_started: false,
        };
        for sequence in sequences {
            let slot = self.sequences.insert(sequence);
            self.queue.insert(slot, &self.sequences[slot]);
            live.continuations.push(Some(slot));
        }
        self.deadlines.extend(deadline.map(|time| (time, id)));
        self.requests.insert(id, live);
        self.note_latest_start(id, latest_start);
        Ok(())
    }

    /// The longest sequence, prompt and output together, that some instance here can hold; `None`
    /// where there is none. Its last token is never computed and needs no place.
    pub fn longest_sequence_tokens(&self) -> Option<u32> {
        let num_blocks = self.cluster.largest_pool_blocks();
        let num_tokens = num_blocks.saturating_mul(self.config.block_size_tokens);
        (num_blocks > 0).then(|| num_tokens.saturating_add(1).min(self.config.max_model_len))
    }

    /// Refuses what the cluster has no means for. While it recovers from a loss, requests wait with
    /// the others.
    fn check_means(&self, sequence: &Sequence) -> Result<(), Failure> {
        if self.health == Health::Down {
            return Err(self.not_ready());
        }
        let need = Need::of(sequence, self.config.block_size_tokens);
        if !self.cluster.instances.is_empty() && !self.cluster.can_ever_hold(need) {
            return Err(self.exceeds_kv_pool(sequence));
        }
        Ok(())
    }

    /// Refuses a newcomer that finds the line full; but no tenant may fill it for the others.
    fn make_room(&mut self, now: TimeNs, tenant: TenantId) -> Result<(), Failure> {
        let max = self.config.max_waiting_requests;
        if self.queue.num_requests() >= max as usize {
            self.give_places(now);
        }
        let waiting = self.queue.num_requests();
        if waiting < max as usize {
            return Ok(());
        }
        let retry_after_ms = self.retry_after_ms(now);
        let request_of = |slot: Slot| self.sequences[slot].request;
        let has_begun = |slot| self.requests[&request_of(slot)].is_started;
        let yields = self.queue.must_yield(tenant, max as usize, has_begun);
        let Some(request) = yields.map(request_of) else {
            return Err(Failure::QueueFull {
                waiting,
                max,
                retry_after_ms,
            });
        };
        self.fail(
            request,
            Failure::QueueShareExceeded {
                max,
                retry_after_ms,
            },
        );
        Ok(())
    }

    fn retry_after_ms(&mut self, now: TimeNs) -> u64 {
        let head = self.queue.turns().take_one(&self.fair_share);
        let head = head.expect("the queue is full");
        let head_waited_ns = now.since_ns(self.sequences[head].details.submitted);
        let num_waiting = self.queue.num_requests();
        self.drain_rate
            .retry_after_ms(now, num_waiting, head_waited_ns)
    }
}

/// Refuses what can never run, whatever the cluster.
fn check(request: &Request, config: &SchedulerConfig) -> Result<(), Failure> {
    if request.prompt.is_empty() {
        return Err(Failure::EmptyPrompt);
    }
    if request.max_tokens == 0 {
        return Err(Failure::NoTokensWanted);
    }
    if request.n == 0 || request.n > MAX_CONTINUATIONS {
        return Err(Failure::ContinuationCount {
            n: request.n,
            max: MAX_CONTINUATIONS,
        });
    }
    if request.n > 1 && !request.resumed.is_empty() {
        return Err(Failure::ResumesMany {
            n: request.n,
            resumed: request.resumed.len(),
        });
    }
    let max_model_len = config.max_model_len as usize;
    let known = request.prompt.len() + request.resumed.len();
    // A resumed stream may have reached the context's end; then only its end is missing.
    if request.prompt.len() >= max_model_len || known > max_model_len {
        return Err(Failure::PromptFillsContext {
            known,
            max_model_len: config.max_model_len,
        });
    }
    Ok(())
}

/// The `n` continuations of a request that passed [`check`], ranked from `first_arrival` on.
fn sequences_of(
    request: Request,
    max_model_len: u32,
    (now, first_arrival): (TimeNs, u64),
) -> Vec<Sequence> {
    let prompt: Arc<[_]> = request.prompt.into();
    let max_known_tokens = num_tokens(&prompt)
        .saturating_add(request.max_tokens)
        .min(max_model_len);
    let id: RequestId = request.id;
    let continuation = |index: u32| {
        let mut sampling = request.sampling.clone();
        sampling.seed = sampling.seed.wrapping_add(u64::from(index));
        if index > 0 {
            sampling.prompt_logprobs = None; // they are the same for all, and sent once
        }
        Sequence::new(Continuation {
            request: id,
            index,
            tenant: request.tenant,
            rank: Rank {
                priority: request.priority,
                arrival: first_arrival + u64::from(index),
            },
            prompt: Arc::clone(&prompt),
            resumed: request.resumed.clone(),
            sampling,
            max_known_tokens,
            submitted: now,
        })
    };
    (0..request.n).map(continuation).collect()
}
