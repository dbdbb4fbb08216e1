//! Owns every sequence and decides what each lane computes next.
//!
//! It never waits, reads a clock or talks to anybody: the drive loop feeds it events with a time
//! and carries out what [`Scheduler::plan`] and [`Scheduler::take_events`] return.
//!
//! There is one notion of work: a sequence's computed tokens chase its known tokens. A new prompt,
//! a prompt in chunks, a decode, a resumed stream, and what is computed again after a preemption
//! or a loss differ in how far apart the two counters are, and in nothing else.
//!
//! A sequence waits for its turn, stays on the (instance, lane) where the least KV is in use, and
//! leaves when it ends, when others that rank before it need its blocks, or when its instance is
//! lost. In the last two cases it keeps its tokens and waits again, so its stream goes on without a
//! gap.

use std::collections::{BTreeMap, BTreeSet};

use crate::admission::LiveRequest;
use crate::cluster::Cluster;
use crate::config::SchedulerConfig;
use crate::drain_rate::DrainRate;
use crate::error::Failure;
use crate::fair_share::{FairShare, TokenCount};
use crate::growth::Growth;
use crate::ids::{Epoch, InstanceId, RequestId, TimeNs};
use crate::lane::{InFlight, Lane};
use crate::queue::WaitingQueue;
use crate::recovery::Health;
use crate::sequence_table::{SequenceTable, Slot};
use crate::stay::{AfterStep, Asked};
use crate::step::{StepKey, StepOutput, StepPlan};

pub use crate::request::{FinishReason, Request, RequestEvent, Usage};

/// Something that happened.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// A client asks. The id must not be that of a live request; if it is, nothing happens.
    Submit(Request),
    /// A client left or aborted. Unknown ids are ignored.
    Cancel(RequestId),
    /// A stop string matched in the text of continuation `index`: nothing after it is wanted.
    Stop {
        /// The request.
        request: RequestId,
        /// Which of `n`.
        index: u32,
    },
    /// An attention instance can run steps. An epoch that is not above all that this instance was
    /// ready under before is stale and has no effect, also after a loss.
    AttentionReady {
        /// The instance.
        instance: InstanceId,
        /// Its incarnation.
        epoch: Epoch,
        /// The size of its KV pool.
        num_kv_blocks: u32,
    },
    /// An attention instance is gone; its sequences are computed again elsewhere.
    AttentionLost(InstanceId),
    /// Whether the FFN instances at hand hold every expert. Nothing is planned while they do not.
    ExpertsComplete(bool),
    /// A step gave results.
    StepDone(StepOutput),
    /// A step had no effect; it is planned again.
    StepFailed {
        /// Which step.
        key: StepKey,
        /// For the log.
        reason: String,
    },
    /// Accept nothing new; finish what is running.
    Drain,
}

/// A snapshot for metrics and tests.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SchedulerStats {
    /// Requests without a place.
    pub num_waiting: usize,
    /// Sequences with a place.
    pub num_running: usize,
    /// Per attention instance: free and total KV blocks. Free ones may hold cached beginnings.
    pub kv_blocks: Vec<(InstanceId, u32, u32)>,
    /// Steps planned and not answered.
    pub num_steps_in_flight: usize,
    /// How often a sequence has lost its place to others that had grown.
    pub num_preemptions: u64,
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Scheduler {
    pub(crate) config: SchedulerConfig,
    pub(crate) cluster: Cluster,
    pub(crate) sequences: SequenceTable,
    pub(crate) requests: BTreeMap<RequestId, LiveRequest>,
    pub(crate) queue: WaitingQueue,
    pub(crate) fair_share: FairShare,
    pub(crate) drain_rate: DrainRate,
    pub(crate) growth: Growth,
    pub(crate) num_preemptions: u64,
    pub(crate) deadlines: BTreeSet<(TimeNs, RequestId)>,
    /// See [`LiveRequest::latest_start`].
    pub(crate) latest_starts: BTreeSet<(TimeNs, RequestId)>,
    pub(crate) health: Health,
    pub(crate) is_draining: bool,
    pub(crate) num_arrivals: u64,
    pub(crate) num_stays: u64,
    pub(crate) events: Vec<(RequestId, RequestEvent)>,
}

impl Scheduler {
    /// An empty cluster. `config` has passed [`SchedulerConfig::validate`].
    #[must_use]
    pub fn new(config: SchedulerConfig) -> Self {
        debug_assert_eq!(config.validate(), Ok(()));
        Self {
            config,
            cluster: Cluster::default(),
            sequences: SequenceTable::default(),
            requests: BTreeMap::new(),
            queue: WaitingQueue::default(),
            fair_share: FairShare::default(),
            drain_rate: DrainRate::default(),
            growth: Growth::default(),
            num_preemptions: 0,
            deadlines: BTreeSet::new(),
            latest_starts: BTreeSet::new(),
            health: Health::Down,
            is_draining: false,
            num_arrivals: 0,
            num_stays: 0,
            events: Vec::new(),
        }
    }

    /// Takes one event into account. Refusals arrive as [`RequestEvent::Failed`].
    pub fn handle(&mut self, now: TimeNs, event: Event) {
        match event {
            Event::Submit(request) => self.submit(now, request),
            Event::Cancel(request) => self.fail(request, Failure::Cancelled),
            Event::Stop { request, index } => {
                self.finish(now, (request, index), FinishReason::StopString);
            }
            Event::AttentionReady {
                instance,
                epoch,
                num_kv_blocks,
            } => self.attention_ready(now, (instance, epoch), num_kv_blocks),
            Event::AttentionLost(instance) => self.attention_lost(now, instance),
            Event::ExpertsComplete(has_all_experts) => {
                self.experts_complete(now, has_all_experts);
            }
            Event::StepDone(output) => self.step_done(now, output),
            Event::StepFailed { key, reason: _ } => self.step_failed(now, key),
            Event::Drain => self.is_draining = true,
        }
    }

    /// Plans every lane that has work, up to `max_steps_in_flight` steps ahead of its results.
    pub fn plan(&mut self, now: TimeNs) -> Vec<StepPlan> {
        self.expire_deadlines(now);
        self.expire_hopeless(now);
        self.expire_recovery(now);
        if !self.cluster.is_complete() {
            return Vec::new();
        }
        let mut plans = Vec::new();
        for _ in 0..self.config.max_steps_in_flight {
            self.evict();
            self.give_places(now);
            let num_before = plans.len();
            self.plan_lanes(now, &mut plans);
            if plans.len() == num_before {
                break;
            }
        }
        plans
    }

    /// Takes what clients must be told, in order.
    pub fn take_events(&mut self) -> Vec<(RequestId, RequestEvent)> {
        // The next ones will be about as many: their memory need not grow from nothing.
        let next = Vec::with_capacity(self.events.len() + self.events.len() / 8);
        std::mem::replace(&mut self.events, next)
    }

    /// The next time at which [`Self::plan`] must be called even if nothing happens (deadlines,
    /// recovery time-outs, steps that are tried again).
    pub fn next_timer(&self) -> Option<TimeNs> {
        let deadline = self.deadlines.first().map(|&(time, _)| time);
        let hopeless = self.latest_starts.first();
        let hopeless = hopeless.map(|&(latest, _)| TimeNs(latest.0.saturating_add(1)));
        let lanes = self.cluster.instances.values().flat_map(|i| &i.lanes);
        let retry = lanes
            .filter(|_| self.cluster.is_complete())
            .filter_map(Lane::retry_at)
            .min();
        [deadline, hopeless, self.health.deadline(), retry]
            .into_iter()
            .flatten()
            .min()
    }

    /// A snapshot.
    pub fn stats(&self) -> SchedulerStats {
        let instances = self.cluster.instances.values();
        let lanes = instances.clone().flat_map(|instance| &instance.lanes);
        SchedulerStats {
            num_waiting: self.queue.num_requests(),
            num_running: lanes.clone().map(|lane| lane.running.len()).sum(),
            kv_blocks: instances
                .map(|i| (i.id, i.pool.num_free_blocks(), i.pool.num_blocks()))
                .collect(),
            num_steps_in_flight: lanes.map(|lane| lane.in_flight.len()).sum(),
            num_preemptions: self.num_preemptions,
        }
    }

    fn step_done(&mut self, now: TimeNs, output: StepOutput) {
        let key = output.key;
        let Some((in_flight, took_ns)) = self.take_step(now, key) else {
            return;
        };
        let instance = self.cluster.instances.get_mut(&key.instance);
        let instance = instance.expect("take_step found it");
        if !in_flight.chunks.is_empty() {
            instance.step_times.observe(in_flight.load, took_ns);
        }
        instance.lane_mut(key.lane).note_success();
        let mut outputs = output.outputs.into_iter();
        let mut ended = Vec::new();
        let mut generated = TokenCount::default();
        self.events.reserve(in_flight.chunks.len());
        let chunks = in_flight.chunks.iter();
        self.sequences.bring_near(chunks.map(|&(slot, _)| slot));
        for &(slot, asked) in &in_flight.chunks {
            let output = outputs.next();
            let sequence = &mut self.sequences[slot];
            if !sequence.is_wanted() {
                continue;
            }
            let end = sequence.accept(now, (asked, output), &mut self.events);
            if end.is_ok() {
                generated.count(sequence.tenant, u64::from(asked.samples));
                if !self.config.assumes_computed_prompts {
                    instance.publish_full_blocks(sequence, asked, self.config.block_size_tokens);
                }
            } else {
                instance.distrust(sequence);
            }
            let continuation = (sequence.request, sequence.index);
            match end {
                Ok(None) => {}
                Ok(Some(reason)) => ended.push((continuation, Ok(reason))),
                Err(failure) => ended.push((continuation, Err(failure))),
            }
        }
        self.fair_share.charge_generated(generated);
        self.end_step(key, in_flight.chunks, false);
        for (continuation, end) in ended {
            match end {
                Ok(reason) => self.finish(now, continuation, reason),
                Err(failure) => self.fail(continuation.0, failure),
            }
        }
    }

    fn step_failed(&mut self, now: TimeNs, key: StepKey) {
        let Some((in_flight, _)) = self.take_step(now, key) else {
            return;
        };
        self.end_step(key, in_flight.chunks, true);
        if in_flight.is_doomed {
            return; // it says no more than the failure before it
        }
        let instance = self.cluster.instances.get_mut(&key.instance);
        let lane = instance.expect("take_step found it").lane_mut(key.lane);
        let failing_since = lane.note_failure(now);
        let recovery_timeout_ms = self.config.recovery_timeout_ms;
        if failing_since.plus_ms(recovery_timeout_ms) > now {
            return;
        }
        let running = lane.running.iter().map(|&(_, slot)| slot);
        let requests: BTreeSet<_> = running.map(|slot| self.sequences[slot].request).collect();
        for request in requests {
            self.fail(
                request,
                Failure::StepsKeepFailing {
                    recovery_timeout_ms,
                },
            );
        }
    }

    /// The step in flight that `key` names, unless it is stale: of another incarnation, or
    /// answered before; and how many nanoseconds it took.
    fn take_step(&mut self, now: TimeNs, key: StepKey) -> Option<(InFlight, u64)> {
        let instance = self.cluster.incarnation(key)?;
        instance.lane_mut(key.lane).take_step(now, key.step)
    }

    /// Lets those go who were only waiting for this step to end.
    fn end_step(&mut self, key: StepKey, mut chunks: Vec<(Slot, Asked)>, has_failed: bool) {
        let instance = self.cluster.instances.get_mut(&key.instance);
        let instance = instance.expect("take_step found it");
        for (slot, asked) in chunks.drain(..) {
            let sequence = &mut self.sequences[slot];
            match instance.end_step_of(sequence, asked, has_failed) {
                AfterStep::Stays => {}
                AfterStep::Waits => self.queue.insert(slot, sequence),
                AfterStep::Ends => drop(self.sequences.remove(slot)),
            }
        }
        instance.lane_mut(key.lane).spare_chunks = chunks;
    }

    /// Plans one step of every lane that may have one.
    fn plan_lanes(&mut self, now: TimeNs, plans: &mut Vec<StepPlan>) {
        let mut newcomers = Vec::new();
        for instance in self.cluster.instances.values_mut() {
            for lane in instance.lane_ids() {
                let max_steps = self.config.max_steps_in_flight;
                if !instance.lane_mut(lane).is_ready(now, max_steps) {
                    continue;
                }
                let planned = instance.plan_lane((now, lane), &self.config, &mut self.sequences);
                let Some(planned) = planned else { continue };
                newcomers.extend(planned.newcomers);
                plans.push(planned.plan);
            }
        }
        for slot in newcomers {
            self.note_start(now, slot);
        }
    }

    fn note_start(&mut self, now: TimeNs, slot: Slot) {
        let sequence = &mut self.sequences[slot];
        sequence.details.planned.get_or_insert(now);
        let request = self.requests.get_mut(&sequence.request);
        let request = request.expect("a running sequence has a live request");
        if !std::mem::replace(&mut request.is_started, true) {
            // Nothing of it is computed yet but what was found in the cache.
            let stay = sequence.stay.as_ref().expect("a planned sequence stays");
            let started = RequestEvent::Started {
                num_cached_tokens: stay.num_computed_tokens,
            };
            self.events.push((sequence.request, started));
        }
    }
}
