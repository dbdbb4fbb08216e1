//! Checks by what would have happened that nobody is refused for a deadline that could be met.
//!
//! A history is played once as it is and, for each request that was told early that it could not
//! end in time, once more with that request's deadline taken away. It must then end too late.

use std::collections::{BTreeMap, BTreeSet};

use step3rt_core::config::SchedulerConfig;
use step3rt_core::ids::{LaneId, RequestId, TenantId, TimeNs, TokenId};
use step3rt_core::request::Request;
use step3rt_core::step::SamplingState;

use crate::policy::{CorePolicy, LanePlace, Policy, Started, Told};
use crate::rng::{Rng, mix};

struct History {
    config: SchedulerConfig,
    num_attention: u32,
    num_kv_blocks: u32,
    arrivals: Vec<(u64, Request)>,
    noise_seed: u64,
    constant_us: u64,
    token_us: u64,
}

impl History {
    fn draw(seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let mut now_us = 0;
        let mean_gap_us = rng.pick(&[2_000, 6_000, 20_000]);
        let mut draw = |id: u64| {
            now_us += u64::from(rng.within(0, 2 * mean_gap_us));
            // The first ones show how long steps take.
            let has_deadline = id > 20 && rng.chance(600);
            let within_us = u64::from(rng.within(1_000, 150_000));
            let num_prompt_tokens = rng.pick(&[5, 20, 60, 150]);
            let num_common = rng.within(0, num_prompt_tokens);
            let token = |i| {
                let own = if i < num_common { 0 } else { 1_000 + id };
                TokenId(i * 100_000 + u32::try_from(own).expect("few"))
            };
            let request = Request {
                id: RequestId(id),
                prompt: (0..num_prompt_tokens).map(token).collect(),
                resumed: Vec::new(),
                n: rng.pick(&[1, 1, 1, 2]),
                sampling: SamplingState {
                    temperature: 0.0,
                    top_k: 0,
                    top_p: 1.0,
                    min_p: 0.0,
                    seed: 0,
                    adjustments: None,
                    top_logprobs: None,
                    prompt_logprobs: rng.chance(200).then_some(0),
                    min_tokens: rng.pick(&[0, 4, 30]),
                    stop_tokens: vec![TokenId(0)], // what every step samples
                },
                max_tokens: rng.within(1, 40),
                priority: rng.pick(&[0, 0, 1]),
                tenant: TenantId(rng.pick(&[0, 0, 1])),
                deadline: has_deadline.then(|| TimeNs((now_us + within_us) * 1_000)),
            };
            (now_us * 1_000, request)
        };
        let arrivals = (0..120).map(&mut draw).collect();
        Self {
            config: SchedulerConfig {
                num_lanes: 2,
                block_size_tokens: 4,
                max_model_len: 256,
                max_tokens_per_micro_batch: rng.pick(&[16, 40]),
                max_steps_in_flight: 1,
                target_tpot_ms: rng.pick(&[4, 50]),
                max_sequences_per_lane: rng.pick(&[1, 2, 8]),
                max_waiting_requests: 200,
                recovery_timeout_ms: 1_000,
                assumes_computed_prompts: false,
            },
            num_attention: rng.within(1, 2),
            num_kv_blocks: rng.within(60, 200),
            arrivals,
            noise_seed: rng.next(),
            constant_us: u64::from(rng.within(300, 3_000)),
            token_us: u64::from(rng.within(20, 200)),
        }
    }

    /// A step's time depends on what is in it and on its place and number, not on the history.
    fn step_ns(&self, step: Started, number: u64) -> u64 {
        let (instance, LaneId(lane)) = step.place;
        let place = u64::from(instance.0) << 8 | u64::from(lane);
        let drawn = mix(self.noise_seed ^ place << 32 ^ number) % 201;
        let us = self.constant_us + self.token_us * u64::from(step.num_new_tokens);
        (us * 1_000 + step.num_context_tokens * 200) * (900 + drawn) / 1_000
    }

    /// When each request ended well, or was told that it would not.
    fn play(&self, spared: Option<RequestId>) -> BTreeMap<RequestId, (u64, bool)> {
        let config = self.config.clone();
        let mut policy = CorePolicy::new(config, self.num_attention, self.num_kv_blocks);
        let mut arrivals = self.arrivals.iter().peekable();
        let mut steps: BTreeSet<(u64, LanePlace)> = BTreeSet::new();
        let mut numbers: BTreeMap<LanePlace, u64> = BTreeMap::new();
        let mut ends = BTreeMap::new();
        loop {
            let arrival_ns = arrivals.peek().map(|&&(at_ns, _)| at_ns);
            let step_ns = steps.first().map(|&(at_ns, _)| at_ns);
            let timer_ns = policy.next_timer().map(|timer| timer.0);
            let times = [arrival_ns, step_ns, timer_ns].into_iter().flatten();
            let Some(now_ns) = times.min() else {
                return ends;
            };
            let now = TimeNs(now_ns);
            if step_ns == Some(now_ns) {
                let (_, place) = steps.pop_first().expect("it was seen");
                policy.step_done(now, place);
            } else if arrival_ns == Some(now_ns) {
                let (_, request) = arrivals.next().expect("it was seen");
                let mut request = request.clone();
                request.deadline = request.deadline.filter(|_| Some(request.id) != spared);
                policy.submit(now, request);
            }
            for started in policy.plan(now) {
                let number = numbers.entry(started.place).or_default();
                *number += 1;
                let ends_ns = now_ns + self.step_ns(started, *number);
                steps.insert((ends_ns, started.place));
            }
            for told in policy.take_told() {
                match told {
                    Told::Token(_) => {}
                    // Of the last one of several continuations.
                    Told::End(id) => drop(ends.insert(id, (now_ns, true))),
                    Told::Refused(id) => drop(ends.insert(id, (now_ns, false))),
                }
            }
        }
    }
}

#[test]
fn nobody_is_told_early_who_could_have_ended_in_time() {
    let (mut num_at_once, mut num_later, mut num_in_time) = (0, 0, 0);
    for seed in 0..60 {
        let history = History::draw(seed);
        let ends = history.play(None);
        for (arrived_ns, request) in &history.arrivals {
            let Some(deadline) = request.deadline else {
                continue;
            };
            let (ended_ns, is_well) = ends[&request.id];
            num_in_time += u64::from(is_well);
            if is_well || ended_ns >= deadline.0 {
                continue;
            }
            num_at_once += u64::from(ended_ns == *arrived_ns);
            num_later += u64::from(ended_ns > *arrived_ns);
            let spared = history.play(Some(request.id));
            let (would_end_ns, is_well) = spared[&request.id];
            assert!(is_well, "seed {seed}: request {} ends", request.id);
            assert!(
                would_end_ns > deadline.0,
                "seed {seed}: request {} was told {} us before its deadline that it would end too \
                 late, and would have ended {} us before it",
                request.id,
                (deadline.0 - ended_ns) / 1_000,
                (deadline.0 - would_end_ns) / 1_000,
            );
        }
    }
    assert!(num_in_time > 500, "{num_in_time} ended in time");
    assert!(num_at_once > 100, "{num_at_once} were told at once");
    assert!(num_later > 20, "{num_later} were told while they waited");
}
