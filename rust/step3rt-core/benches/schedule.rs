//! Measures what the scheduler costs per step: `cargo bench -p step3rt-core --bench schedule`.
//!
//! One lane step is one step of one lane on every attention instance. Measured is everything the
//! drive loop asks of the scheduler for it: taking the outputs, submitting as many requests as
//! ended (1 % of the sequences per step), planning the next step, and taking the events. Prints
//! one JSON object. Without the `--bench` that `cargo bench` passes it only runs a few steps, to be
//! kept working by `cargo test --benches`.

#![expect(
    clippy::print_stdout,
    reason = "printing the result is what a benchmark does"
)]

use std::time::Instant;

use step3rt_core::config::SchedulerConfig;
use step3rt_core::ids::{Epoch, InstanceId, RequestId, TenantId, TimeNs, TokenId};
use step3rt_core::request::{Request, RequestEvent};
use step3rt_core::scheduler::{Event, Scheduler};
use step3rt_core::step::{SamplingState, SequenceOutput, StepOutput, StepPlan};

const NUM_ATTENTION: u32 = 16;
const NUM_LANES: u8 = 3;
const NUM_PROMPT_TOKENS: u32 = 64;
/// Sequences live this many steps on average, so that 1 % end in each.
const MEAN_LIFE_STEPS: u32 = 100;
/// A sequence ends with at most four; the rest of the pool holds cached beginnings.
const BLOCKS_PER_SEQUENCE: u32 = 5;
/// The configuration whose cost is the headline.
const NUM_SEQUENCES: u32 = 6_144;

struct Bench {
    scheduler: Scheduler,
    /// Per lane, one plan per instance.
    in_flight: Vec<Vec<StepPlan>>,
    num_requests: u32,
    now: TimeNs,
}

impl Bench {
    /// `num_sequences` sequences that decode, at ages spread over their lives.
    fn new(num_sequences: u32) -> Self {
        let per_lane = num_sequences.div_ceil(NUM_ATTENTION * u32::from(NUM_LANES));
        let mut scheduler = Scheduler::new(SchedulerConfig {
            num_lanes: NUM_LANES,
            block_size_tokens: 64,
            max_model_len: 65_536,
            max_tokens_per_micro_batch: per_lane + 8 * NUM_PROMPT_TOKENS,
            max_steps_in_flight: 1,
            max_sequences_per_lane: per_lane + per_lane.div_ceil(8),
            max_waiting_requests: num_sequences,
            recovery_timeout_ms: 1_000,
        });
        let now = TimeNs(0);
        scheduler.handle(now, Event::ExpertsComplete(true));
        for id in 0..NUM_ATTENTION {
            let ready = Event::AttentionReady {
                instance: InstanceId(id),
                epoch: Epoch(1),
                num_kv_blocks: per_lane * u32::from(NUM_LANES) * BLOCKS_PER_SEQUENCE,
            };
            scheduler.handle(now, ready);
        }
        let mut bench = Self {
            scheduler,
            in_flight: vec![Vec::new(); usize::from(NUM_LANES)],
            num_requests: 0,
            now,
        };
        for _ in 0..num_sequences {
            bench.submit();
        }
        for _ in 0..3 * MEAN_LIFE_STEPS {
            for lane in 0..usize::from(NUM_LANES) {
                bench.lane_step(lane);
            }
        }
        bench
    }

    fn submit(&mut self) {
        let id = self.num_requests;
        self.num_requests += 1;
        // A fixed, well spread sequence of lives from half to one and a half of the mean.
        let life = MEAN_LIFE_STEPS / 2 + (id.wrapping_mul(2_654_435_769) >> 16) % MEAN_LIFE_STEPS;
        let request = Request {
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
            },
            max_tokens: life,
            priority: 0,
            tenant: TenantId(0),
            deadline: None,
        };
        self.scheduler.handle(self.now, Event::Submit(request));
    }

    /// One lane step; returns the microseconds that the scheduler took and the sequences in it.
    fn lane_step(&mut self, lane: usize) -> (f64, usize) {
        let answered = std::mem::take(&mut self.in_flight[lane]);
        let num_sequences = answered.iter().map(|plan| plan.chunks.len()).sum();
        let outputs: Vec<StepOutput> = answered.iter().map(answer).collect();
        self.now = self.now.plus_ms(1);
        let start = Instant::now();
        for output in outputs {
            self.scheduler.handle(self.now, Event::StepDone(output));
        }
        let events = self.scheduler.take_events();
        let is_end = |event: &RequestEvent| matches!(event, RequestEvent::Finished { .. });
        let num_ended = events.iter().filter(|(_, event)| is_end(event)).count();
        for _ in 0..num_ended {
            self.submit();
        }
        let plans = self.scheduler.plan(self.now);
        let elapsed_us = start.elapsed().as_secs_f64() * 1e6;
        drop(self.scheduler.take_events());
        for plan in plans {
            self.in_flight[usize::from(plan.key.lane.0)].push(plan);
        }
        (elapsed_us, num_sequences)
    }

    /// Sorted microseconds of `num_steps` lane steps, and the mean number of sequences in one.
    fn measure(&mut self, num_steps: usize) -> (Vec<f64>, usize) {
        let lanes = (0..usize::from(NUM_LANES)).cycle().take(num_steps);
        let (mut times, counts): (Vec<f64>, Vec<usize>) =
            lanes.map(|lane| self.lane_step(lane)).unzip();
        times.sort_by(f64::total_cmp);
        (times, counts.iter().sum::<usize>() / num_steps)
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

/// The value below which `per_mille` of the sorted `times` lie.
fn quantile(times: &[f64], per_mille: usize) -> f64 {
    times[(times.len() - 1) * per_mille / 1_000]
}

/// Resident memory of this process, from the kernel; 0 where there is no such file.
fn resident_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let number = line.and_then(|line| line.split_whitespace().next());
    number.and_then(|text| text.parse().ok()).unwrap_or(0)
}

fn cpu_name() -> String {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = cpuinfo.lines().find(|line| line.starts_with("model name"));
    let name = line.and_then(|line| line.split_once(": "));
    name.map_or_else(|| "unknown".to_owned(), |(_, name)| name.to_owned())
}

fn main() {
    let is_test = !std::env::args().any(|argument| argument == "--bench");
    let num_steps = if is_test { 30 } else { 10_000 };
    let mut bench = Bench::new(NUM_SEQUENCES);
    let before_kib = resident_kib();
    let (times, per_step) = bench.measure(num_steps);
    let growth_kib = resident_kib().saturating_sub(before_kib);
    drop(bench);
    let sizes: &[u32] = if is_test {
        &[256]
    } else {
        &[256, 1_024, 4_096, 16_384, 65_536]
    };
    let scaling = sizes.iter().map(|&num_sequences| {
        let (times, per_step) = Bench::new(num_sequences).measure(num_steps / 10);
        let p50 = quantile(&times, 500);
        let ns_per_sequence = p50 * 1e3 / f64::from(u32::try_from(per_step).unwrap_or(u32::MAX));
        format!(
            r#"{{"sequences":{num_sequences},"p50_us":{p50:.1},"ns_per_sequence":{ns_per_sequence:.0}}}"#
        )
    });
    let scaling: Vec<String> = scaling.collect();
    let [p50, p99, max] = [500, 990, 1_000].map(|per_mille| quantile(&times, per_mille));
    println!(
        r#"{{"schedule_apply_us":{{"p50":{p50:.1},"p99":{p99:.1},"max":{max:.1}}},"sequences_per_lane_step":{per_step},"steps":{num_steps},"resident_growth_kib":{growth_kib},"machine":"{}","scaling":[{}]}}"#,
        cpu_name(),
        scaling.join(",")
    );
}
