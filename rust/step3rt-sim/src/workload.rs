//! Owns the benchmark's load: sequences that decode, of which one in a hundred ends per step.
//!
//! It never measures. The lives of the sequences are a formula, so that a scheduler in another
//! language can be given the same trace: `python/step3rt/bench/scheduler.py` has it again.

use step3rt_core::config::SchedulerConfig;
use step3rt_core::ids::{Epoch, InstanceId, RequestId, TenantId, TimeNs, TokenId};
use step3rt_core::request::{Request, RequestEvent};
use step3rt_core::scheduler::{Event, Scheduler};
use step3rt_core::step::{SamplingState, SequenceOutput, StepOutput, StepPlan};

/// Tokens of every prompt: one KV block, so that joining costs what it costs beside a cache.
pub(crate) const NUM_PROMPT_TOKENS: u32 = 64;
/// Sequences live this many steps on average, so that 1 % end in each.
pub(crate) const MEAN_LIFE_STEPS: u32 = 100;
/// A sequence ends with at most four; the rest of the pool holds cached beginnings.
const BLOCKS_PER_SEQUENCE: u32 = 5;

/// How many tokens request `id` generates: from half to one and a half of the mean, well spread.
pub(crate) fn life_steps(id: u32) -> u32 {
    MEAN_LIFE_STEPS / 2 + (id.wrapping_mul(2_654_435_769) >> 16) % MEAN_LIFE_STEPS
}

/// The size of the load.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// That run at a time, all lanes together.
    pub num_sequences: u32,
    /// Attention instances.
    pub num_attention: u32,
    /// Micro-batch lanes per instance.
    pub num_lanes: u8,
}

impl Load {
    pub(crate) fn sequences_per_lane(self) -> u32 {
        let num_lanes = self.num_attention * u32::from(self.num_lanes);
        self.num_sequences.div_ceil(num_lanes)
    }
}

/// The scheduler in a steady state, with instances that answer whatever they are asked.
#[derive(Debug)]
pub struct Workload {
    scheduler: Scheduler,
    /// Per lane, one plan per instance.
    in_flight: Vec<Vec<StepPlan>>,
    /// How many sequences ended in the last lane step; as many join in the next.
    num_ended: usize,
    num_requests: u32,
    now: TimeNs,
}

/// What instances and clients ask in one lane step, prepared outside of what is measured.
#[derive(Debug)]
pub struct LaneStep {
    outputs: Vec<StepOutput>,
    requests: Vec<Request>,
    /// How many sequences it is one step of.
    pub num_sequences: usize,
}

/// What they get in one lane step; looked at outside of what is measured.
#[derive(Debug)]
pub struct Answers {
    plans: Vec<StepPlan>,
    events: Vec<(RequestId, RequestEvent)>,
}

impl Workload {
    /// Sequences at ages spread over their lives.
    pub fn new(load: Load) -> Self {
        let per_lane = load.sequences_per_lane();
        let mut scheduler = Scheduler::new(SchedulerConfig {
            num_lanes: load.num_lanes,
            block_size_tokens: 64,
            max_model_len: 65_536,
            // Room for the prompts of far more than the one in a hundred that join.
            max_tokens_per_micro_batch: per_lane + NUM_PROMPT_TOKENS * (8 + per_lane / 16),
            max_steps_in_flight: 1,
            target_tpot_ms: 50,
            max_sequences_per_lane: per_lane + per_lane.div_ceil(8),
            max_waiting_requests: load.num_sequences,
            recovery_timeout_ms: 1_000,
            assumes_computed_prompts: false,
        });
        let now = TimeNs(0);
        scheduler.handle(now, Event::ExpertsComplete(true));
        for id in 0..load.num_attention {
            let ready = Event::AttentionReady {
                instance: InstanceId(id),
                epoch: Epoch(1),
                num_kv_blocks: per_lane * u32::from(load.num_lanes) * BLOCKS_PER_SEQUENCE,
            };
            scheduler.handle(now, ready);
        }
        let mut workload = Self {
            scheduler,
            in_flight: vec![Vec::new(); usize::from(load.num_lanes)],
            num_ended: 0,
            num_requests: 0,
            now,
        };
        for _ in 0..load.num_sequences {
            let request = workload.next_request();
            workload.scheduler.handle(now, Event::Submit(request));
        }
        for _ in 0..3 * MEAN_LIFE_STEPS {
            for lane in 0..usize::from(load.num_lanes) {
                let step = workload.prepare(lane);
                let answers = workload.run(step);
                workload.note(answers);
            }
        }
        workload
    }

    /// What the instances answer to lane `lane`'s steps in flight, one per instance.
    pub fn prepare(&mut self, lane: usize) -> LaneStep {
        let answered = std::mem::take(&mut self.in_flight[lane]);
        let num_sequences = answered.iter().map(|plan| plan.chunks.len()).sum();
        self.now = self.now.plus_ms(1);
        LaneStep {
            outputs: answered.iter().map(answer).collect(),
            requests: (0..self.num_ended).map(|_| self.next_request()).collect(),
            num_sequences,
        }
    }

    /// Everything that the drive loop asks of the scheduler for one lane step: take the outputs and
    /// as many requests as ended in the step before, plan, and take the events.
    pub fn run(&mut self, step: LaneStep) -> Answers {
        for output in step.outputs {
            self.scheduler.handle(self.now, Event::StepDone(output));
        }
        for request in step.requests {
            self.scheduler.handle(self.now, Event::Submit(request));
        }
        Answers {
            plans: self.scheduler.plan(self.now),
            events: self.scheduler.take_events(),
        }
    }

    /// Keeps in mind what the next lane steps start from.
    pub fn note(&mut self, answers: Answers) {
        let is_end = |event: &RequestEvent| matches!(event, RequestEvent::Finished { .. });
        let ends = answers.events.iter().filter(|(_, event)| is_end(event));
        self.num_ended = ends.count();
        for plan in answers.plans {
            self.in_flight[usize::from(plan.key.lane.0)].push(plan);
        }
    }

    fn next_request(&mut self) -> Request {
        let id = self.num_requests;
        self.num_requests = self.num_requests.wrapping_add(1);
        Request {
            id: RequestId(u64::from(id)),
            prompt: vec![TokenId(id); NUM_PROMPT_TOKENS as usize],
            resumed: Vec::new(),
            n: 1,
            sampling: SamplingState {
                temperature: 0.0,
                top_k: 0,
                top_p: 1.0,
                min_p: 0.0,
                seed: 0,
                top_logprobs: None,
                prompt_logprobs: None,
                min_tokens: 0,
                stop_tokens: vec![TokenId(u32::MAX)],
                adjustments: None,
            },
            max_tokens: life_steps(id),
            priority: 0,
            tenant: TenantId(0),
            deadline: None,
        }
    }
}

/// What an instance that samples token 1 everywhere would answer.
fn answer(plan: &StepPlan) -> StepOutput {
    let outputs = plan.chunks.iter().map(|chunk| SequenceOutput {
        sequence: chunk.sequence,
        token: chunk.samples.then_some(TokenId(1)),
        logprob: None,
        prompt_logprobs: Vec::new(),
        is_corrupt: false,
    });
    StepOutput {
        key: plan.key,
        outputs: outputs.collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lives_are_those_that_the_python_side_computes() {
        let lives = [0, 1, 2, 3, 1_000, 99_999].map(life_steps);
        assert_eq!(lives, [50, 53, 120, 124, 77, 122]);
    }

    #[test]
    fn a_lane_step_has_its_share_of_the_sequences_on_all_instances() {
        let load = Load {
            num_sequences: 96,
            num_attention: 4,
            num_lanes: 2,
        };
        let mut workload = Workload::new(load);
        let counts = (0..200).map(|step| {
            let step = workload.prepare(step % 2);
            let num_sequences = step.num_sequences;
            let answers = workload.run(step);
            workload.note(answers);
            num_sequences
        });
        let counts: Vec<usize> = counts.collect();
        assert!(counts.iter().all(|count| (40..=56).contains(count)));
        assert!(counts.iter().any(|count| *count != counts[0]), "none ends");
    }
}
