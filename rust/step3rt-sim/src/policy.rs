//! The scheduler and the plain first-come-first-served policy behind one face, for replays.
//!
//! Neither knows how long a step takes.

use std::collections::{BTreeMap, VecDeque};

use step3rt_core::config::SchedulerConfig;
use step3rt_core::ids::{Epoch, InstanceId, LaneId, RequestId, TimeNs, TokenId};
use step3rt_core::request::{Request, RequestEvent};
use step3rt_core::scheduler::{Event, Scheduler};
use step3rt_core::step::{SequenceOutput, StepOutput, StepPlan};

/// A place where steps run one after another.
pub(crate) type LanePlace = (InstanceId, LaneId);

/// A step that starts now: what decides how long it takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Started {
    pub(crate) place: LanePlace,
    pub(crate) num_new_tokens: u32,
    /// Tokens whose K and V attention reads.
    pub(crate) num_context_tokens: u64,
}

/// What a client was told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Told {
    Token(RequestId),
    End(RequestId),
    Refused(RequestId),
}

/// Decides what runs.
pub(crate) trait Policy {
    fn submit(&mut self, now: TimeNs, request: Request);
    /// Steps that start now, on lanes that are idle.
    fn plan(&mut self, now: TimeNs) -> Vec<Started>;
    /// The step of a lane is over.
    fn step_done(&mut self, now: TimeNs, place: LanePlace);
    fn take_told(&mut self) -> Vec<Told>;
    /// Used and all KV blocks.
    fn kv_blocks(&self) -> (u64, u64);
    /// How often a sequence has lost its place and what was computed of it.
    fn num_preemptions(&self) -> u64;
}

/// The real scheduler.
pub(crate) struct CorePolicy {
    scheduler: Scheduler,
    running: BTreeMap<LanePlace, StepPlan>,
}

impl CorePolicy {
    pub(crate) fn new(config: SchedulerConfig, num_attention: u32, num_kv_blocks: u32) -> Self {
        let mut scheduler = Scheduler::new(config);
        scheduler.handle(TimeNs(0), Event::ExpertsComplete(true));
        for id in 0..num_attention {
            let ready = Event::AttentionReady {
                instance: InstanceId(id),
                epoch: Epoch(1),
                num_kv_blocks,
            };
            scheduler.handle(TimeNs(0), ready);
        }
        Self {
            scheduler,
            running: BTreeMap::new(),
        }
    }
}

#[cfg(test)]
impl CorePolicy {
    pub(crate) fn next_timer(&self) -> Option<TimeNs> {
        self.scheduler.next_timer()
    }
}

impl Policy for CorePolicy {
    fn submit(&mut self, now: TimeNs, request: Request) {
        self.scheduler.handle(now, Event::Submit(request));
    }

    fn plan(&mut self, now: TimeNs) -> Vec<Started> {
        let plans = self.scheduler.plan(now);
        let started = plans.into_iter().map(|plan| {
            let place = (plan.key.instance, plan.key.lane);
            let new = plan.chunks.iter().map(|chunk| chunk.num_new_tokens);
            let context = plan.chunks.iter();
            let context = context.map(|c| u64::from(c.num_computed_tokens + c.num_new_tokens));
            let started = Started {
                place,
                num_new_tokens: new.sum(),
                num_context_tokens: context.sum(),
            };
            self.running.insert(place, plan);
            started
        });
        started.collect()
    }

    fn step_done(&mut self, now: TimeNs, place: LanePlace) {
        let plan = self.running.remove(&place).expect("a step ran there");
        let outputs = plan.chunks.iter().map(|chunk| SequenceOutput {
            sequence: chunk.sequence,
            token: chunk.samples.then_some(TokenId(0)),
            logprob: None,
            prompt_logprobs: Vec::new(),
            is_corrupt: false,
        });
        let output = StepOutput {
            key: plan.key,
            outputs: outputs.collect(),
        };
        self.scheduler.handle(now, Event::StepDone(output));
    }

    fn take_told(&mut self) -> Vec<Told> {
        let events = self.scheduler.take_events().into_iter();
        let told = events.filter_map(|(id, event)| match event {
            RequestEvent::Token { .. } => Some(Told::Token(id)),
            RequestEvent::Finished { .. } => Some(Told::End(id)),
            RequestEvent::Failed(_) => Some(Told::Refused(id)),
            RequestEvent::Started { .. } | RequestEvent::PromptLogprobs { .. } => None,
        });
        told.collect()
    }

    fn kv_blocks(&self) -> (u64, u64) {
        let blocks = self.scheduler.stats().kv_blocks.into_iter();
        blocks.fold((0, 0), |(used, all), (_, free, total)| {
            (used + u64::from(total - free), all + u64::from(total))
        })
    }

    fn num_preemptions(&self) -> u64 {
        self.scheduler.stats().num_preemptions
    }
}

/// First come, first served: no priorities, no tenants, no cache, no chunks. A request gets a
/// place when all the KV that it may ever need is free, so nothing is ever preempted; prompts are
/// computed whole, before anybody decodes.
pub(crate) struct FcfsPolicy {
    config: SchedulerConfig,
    waiting: VecDeque<Request>,
    lanes: BTreeMap<LanePlace, FcfsLane>,
    free_blocks: BTreeMap<InstanceId, u64>,
    num_blocks: u64,
    told: Vec<Told>,
}

#[derive(Default)]
struct FcfsLane {
    /// In a step now; their places in `sequences`.
    running: Vec<RequestId>,
    sequences: BTreeMap<RequestId, FcfsSequence>,
}

struct FcfsSequence {
    num_computed_tokens: u32,
    num_known_tokens: u32,
    left_tokens: u32,
    reserved_blocks: u64,
}

impl FcfsPolicy {
    pub(crate) fn new(config: SchedulerConfig, num_attention: u32, num_kv_blocks: u32) -> Self {
        let ids = (0..num_attention).map(InstanceId);
        let lanes = ids.clone().flat_map(|id| {
            let lanes = (0..config.num_lanes).map(LaneId);
            lanes.map(move |lane| ((id, lane), FcfsLane::default()))
        });
        Self {
            lanes: lanes.collect(),
            waiting: VecDeque::new(),
            free_blocks: ids.map(|id| (id, u64::from(num_kv_blocks))).collect(),
            num_blocks: u64::from(num_kv_blocks) * u64::from(num_attention),
            told: Vec::new(),
            config,
        }
    }

    /// Gives places in the order of arrival, until the first that finds none.
    fn give_places(&mut self) {
        let max_sequences = self.config.max_sequences_per_lane as usize;
        while let Some(first) = self.waiting.front() {
            let num_prompt_tokens = u32::try_from(first.prompt.len()).expect("prompts are bounded");
            let most = num_prompt_tokens + first.max_tokens - 1;
            let num_blocks = u64::from(most.div_ceil(self.config.block_size_tokens));
            let free_blocks = &self.free_blocks;
            let lanes = self.lanes.iter_mut().filter(|(place, lane)| {
                lane.sequences.len() < max_sequences && free_blocks[&place.0] >= num_blocks
            });
            let best = lanes.min_by_key(|(_, lane)| lane.sequences.len());
            let Some((place, lane)) = best else { return };
            let sequence = FcfsSequence {
                num_computed_tokens: 0,
                num_known_tokens: num_prompt_tokens,
                left_tokens: first.max_tokens,
                reserved_blocks: num_blocks,
            };
            lane.sequences.insert(first.id, sequence);
            *self.free_blocks.entry(place.0).or_default() -= num_blocks;
            self.waiting.pop_front();
        }
    }
}

impl Policy for FcfsPolicy {
    fn submit(&mut self, _now: TimeNs, request: Request) {
        self.waiting.push_back(request);
    }

    fn plan(&mut self, _now: TimeNs) -> Vec<Started> {
        self.give_places();
        let budget = self.config.max_tokens_per_micro_batch;
        let mut started = Vec::new();
        for (&place, lane) in &mut self.lanes {
            if !lane.running.is_empty() || lane.sequences.is_empty() {
                continue;
            }
            let mut num_new_tokens = 0;
            for (&id, sequence) in &lane.sequences {
                let num_prompt = sequence.num_known_tokens - sequence.num_computed_tokens;
                if num_prompt > 1 && (num_new_tokens == 0 || num_new_tokens + num_prompt <= budget)
                {
                    num_new_tokens += num_prompt;
                    lane.running.push(id);
                }
            }
            if lane.running.is_empty() {
                lane.running.extend(lane.sequences.keys());
                num_new_tokens = u32::try_from(lane.running.len()).expect("lanes are bounded");
            }
            let running = lane.running.iter().map(|id| &lane.sequences[id]);
            started.push(Started {
                place,
                num_new_tokens,
                num_context_tokens: running.map(|s| u64::from(s.num_known_tokens)).sum(),
            });
        }
        started
    }

    fn step_done(&mut self, _now: TimeNs, place: LanePlace) {
        let lane = self.lanes.get_mut(&place).expect("a step ran there");
        for id in std::mem::take(&mut lane.running) {
            let sequence = lane.sequences.get_mut(&id).expect("it ran");
            sequence.num_computed_tokens = sequence.num_known_tokens;
            sequence.num_known_tokens += 1;
            sequence.left_tokens -= 1;
            self.told.push(Told::Token(id));
            if sequence.left_tokens == 0 {
                *self.free_blocks.entry(place.0).or_default() += sequence.reserved_blocks;
                lane.sequences.remove(&id);
                self.told.push(Told::End(id));
            }
        }
    }

    fn take_told(&mut self) -> Vec<Told> {
        std::mem::take(&mut self.told)
    }

    fn kv_blocks(&self) -> (u64, u64) {
        let free: u64 = self.free_blocks.values().sum();
        // What is reserved and not filled is not in use: a fair figure counts tokens.
        let block_size = self.config.block_size_tokens;
        let sequences = self.lanes.values().flat_map(|lane| lane.sequences.values());
        let filled = sequences.map(|s| u64::from(s.num_computed_tokens.div_ceil(block_size)));
        (
            filled.sum::<u64>().min(self.num_blocks - free),
            self.num_blocks,
        )
    }
    fn num_preemptions(&self) -> u64 {
        0
    }
}
