//! A scheduler with its instances and clients: what a coordinator's drive loop does, by hand.

use std::collections::BTreeMap;

use step3rt_core::config::SchedulerConfig;
use step3rt_core::ids::{Epoch, InstanceId, LaneId, RequestId, TenantId, TimeNs, TokenId};
use step3rt_core::request::Request;
use step3rt_core::scheduler::{Event, Scheduler};
use step3rt_core::step::{SamplingState, SequenceChunk, StepKey, StepOutput, StepPlan};

use crate::clients::{Clients, Stream};
use crate::instance::Instance;

pub(crate) struct World {
    pub(crate) scheduler: Scheduler,
    pub(crate) config: SchedulerConfig,
    pub(crate) now: TimeNs,
    pub(crate) clients: Clients,
    pub(crate) instances: BTreeMap<InstanceId, Instance>,
    /// Plans that arrived and are not answered, oldest first.
    pub(crate) in_flight: Vec<StepPlan>,
    /// Whether the step computed last had nothing to start from.
    is_doomed: bool,
    pub(crate) num_doomed: usize,
    pub(crate) num_joins: usize,
    /// Joins of sequences whose beginning was in the cache.
    pub(crate) num_shared_joins: usize,
    next_epoch: u64,
}

pub(crate) fn config() -> SchedulerConfig {
    SchedulerConfig {
        num_lanes: 2,
        block_size_tokens: 4,
        max_model_len: 64,
        max_tokens_per_micro_batch: 8,
        max_steps_in_flight: 1,
        target_tpot_ms: 50,
        max_sequences_per_lane: 4,
        max_waiting_requests: 8,
        recovery_timeout_ms: 1_000,
        assumes_computed_prompts: false,
    }
}

/// A greedy request for `max_tokens` tokens after a prompt of `num_prompt_tokens`.
pub(crate) fn request(id: u64, num_prompt_tokens: u32, max_tokens: u32) -> Request {
    let id_token = u32::try_from(id % 50).expect("below 50");
    let prompt = (0..num_prompt_tokens).map(|i| TokenId((i * 7 + id_token) % 50));
    Request {
        id: RequestId(id),
        prompt: prompt.collect(),
        resumed: Vec::new(),
        n: 1,
        sampling: SamplingState {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            seed: id,
            top_logprobs: None,
            prompt_logprobs: None,
            min_tokens: 0,
            stop_tokens: Vec::new(),
            adjustments: None,
        },
        max_tokens,
        priority: 0,
        tenant: TenantId(0),
        deadline: None,
    }
}

fn lane_of(plan: &StepPlan) -> (InstanceId, LaneId) {
    (plan.key.instance, plan.key.lane)
}

impl World {
    /// No instance, no experts.
    pub(crate) fn empty(config: SchedulerConfig) -> Self {
        Self {
            scheduler: Scheduler::new(config.clone()),
            config,
            now: TimeNs(1),
            clients: Clients::default(),
            instances: BTreeMap::new(),
            in_flight: Vec::new(),
            is_doomed: false,
            num_doomed: 0,
            num_joins: 0,
            num_shared_joins: 0,
            next_epoch: 1,
        }
    }

    /// All experts, and an instance per pool size, from instance 0 on.
    pub(crate) fn new(config: SchedulerConfig, pools: &[u32]) -> Self {
        let mut world = Self::empty(config);
        world.handle(Event::ExpertsComplete(true));
        for (id, num_blocks) in (0..).zip(pools) {
            world.ready(id, *num_blocks);
        }
        world
    }

    pub(crate) fn handle(&mut self, event: Event) {
        self.scheduler.handle(self.now, event);
        self.check();
    }

    pub(crate) fn submit(&mut self, request: Request) {
        self.clients.submit(&request);
        self.handle(Event::Submit(request));
    }

    pub(crate) fn ready(&mut self, id: u32, num_kv_blocks: u32) {
        let (instance, epoch) = (InstanceId(id), Epoch(self.next_epoch));
        self.next_epoch += 1;
        self.in_flight.retain(|plan| plan.key.instance != instance);
        let new = Instance::new(self.config.clone(), epoch, num_kv_blocks);
        self.instances.insert(instance, new);
        self.handle(Event::AttentionReady {
            instance,
            epoch,
            num_kv_blocks,
        });
    }

    pub(crate) fn lose(&mut self, id: u32) {
        self.instances.remove(&InstanceId(id));
        self.in_flight
            .retain(|plan| plan.key.instance != InstanceId(id));
        self.handle(Event::AttentionLost(InstanceId(id)));
    }

    /// Plans and delivers; returns what was planned.
    pub(crate) fn plan(&mut self) -> Vec<StepPlan> {
        let plans = self.scheduler.plan(self.now);
        self.check();
        for plan in &plans {
            let key = plan.key;
            let on_lane = |other: &&StepPlan| lane_of(other) == lane_of(plan);
            let num_before = self.in_flight.iter().filter(on_lane).count();
            assert!(
                num_before < usize::from(self.config.max_steps_in_flight),
                "too many steps on a lane"
            );
            let instance = self.instances.get(&key.instance);
            let instance = instance.expect("plans go to present instances");
            assert_eq!(instance.epoch, key.epoch);
            let is_new = |id| plan.joined.iter().any(|join| join.sequence == id);
            let is_shared =
                |chunk: &&SequenceChunk| chunk.num_computed_tokens > 0 && is_new(chunk.sequence);
            self.num_joins += plan.joined.len();
            self.num_shared_joins += plan.chunks.iter().filter(is_shared).count();
            self.in_flight.push(plan.clone());
        }
        plans
    }

    /// Lets the step at `index` of those in flight end, or an older one of its lane; returns its
    /// output. One that has nothing to start from fails, as an instance would let it.
    pub(crate) fn answer(&mut self, index: usize) -> StepOutput {
        let output = self.compute(index);
        self.tell(&output);
        output
    }

    /// The same with an output that lost its last entry.
    pub(crate) fn answer_torn(&mut self, index: usize) {
        let mut output = self.compute(index);
        output.outputs.pop();
        self.tell(&output);
    }

    /// The same with an output whose last logits were not finite.
    pub(crate) fn answer_corrupt(&mut self, index: usize) {
        let mut output = self.compute(index);
        if let Some(last) = output.outputs.last_mut() {
            last.is_corrupt = true;
            last.token = None;
        }
        self.tell(&output);
    }

    fn tell(&mut self, output: &StepOutput) {
        if self.is_doomed {
            let key = output.key;
            let reason = "an earlier step failed".to_owned();
            self.handle(Event::StepFailed { key, reason });
        } else {
            self.handle(Event::StepDone(output.clone()));
        }
    }

    /// The same without telling the scheduler.
    pub(crate) fn compute(&mut self, index: usize) -> StepOutput {
        let (plan, instance) = self.take(index);
        let is_doomed = !instance.can_start(&plan);
        let outputs = if is_doomed {
            Vec::new()
        } else {
            instance.compute(&plan)
        };
        self.is_doomed = is_doomed;
        self.num_doomed += usize::from(is_doomed);
        StepOutput {
            key: plan.key,
            outputs,
        }
    }

    pub(crate) fn fail(&mut self, index: usize) -> StepKey {
        let (plan, instance) = self.take(index);
        if instance.can_start(&plan) {
            instance.fail(&plan);
        }
        let key = plan.key;
        self.handle(Event::StepFailed {
            key,
            reason: "a peer went away".to_owned(),
        });
        key
    }

    /// Takes the oldest step of a lane in flight, and lets the instance take its deltas.
    fn take(&mut self, index: usize) -> (StepPlan, &mut Instance) {
        let lane = lane_of(&self.in_flight[index]);
        let oldest = self.in_flight.iter().position(|plan| lane_of(plan) == lane);
        let plan = self.in_flight.remove(oldest.expect("it is there itself"));
        let instance = self.instances.get_mut(&plan.key.instance);
        let instance = instance.expect("steps end with their instance");
        instance.receive(&plan);
        (plan, instance)
    }

    /// Plans once and answers everything in flight, oldest first; returns what was planned.
    pub(crate) fn step(&mut self) -> Vec<StepPlan> {
        let plans = self.plan();
        while !self.in_flight.is_empty() {
            self.answer(0);
        }
        plans
    }

    /// Steps until nothing is left to do.
    pub(crate) fn run(&mut self) {
        for _ in 0..5_000 {
            let was_idle = self.in_flight.is_empty();
            if self.step().is_empty() && was_idle {
                return;
            }
            self.now = self.now.plus_ms(1);
        }
        panic!("the scheduler never gets done");
    }

    pub(crate) fn stream(&self, id: u64) -> &Stream {
        &self.clients.streams[&RequestId(id)]
    }

    /// Free KV blocks of all instances, and all KV blocks.
    pub(crate) fn kv_blocks(&self) -> (u32, u32) {
        let blocks = self.scheduler.stats().kv_blocks;
        let sum = |sum: (u32, u32), (_, free, total)| (sum.0 + free, sum.1 + total);
        blocks.into_iter().fold((0, 0), sum)
    }

    /// Everything has ended as it should, and nothing is left behind.
    pub(crate) fn check_done(&self) {
        for (id, stream) in &self.clients.streams {
            assert!(stream.has_ended(), "request {id} never ends");
        }
        self.clients.check_contents(self.config.max_model_len);
        let (free, total) = self.kv_blocks();
        assert_eq!(free, total, "blocks leaked");
        let stats = self.scheduler.stats();
        assert_eq!((stats.num_waiting, stats.num_running), (0, 0));
        assert_eq!(stats.num_steps_in_flight, 0);
        for instance in self.instances.values() {
            assert_eq!(instance.num_known(), 0, "an instance still knows sequences");
        }
        assert_eq!(self.scheduler.next_timer(), None);
    }

    fn check(&mut self) {
        self.scheduler.audit().expect("the books agree");
        self.clients.note(self.scheduler.take_events());
    }
}
