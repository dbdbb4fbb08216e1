//! Replays a trace of requests through a policy and a model of how long steps take.
//!
//! It measures decisions and not hardware: both policies get the same trace, the same cluster and
//! the same step times.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use step3rt_core::config::SchedulerConfig;
use step3rt_core::ids::{RequestId, TimeNs};

use crate::policy::{CorePolicy, FcfsPolicy, LanePlace, Policy, Started, Told};
use crate::stats::{fairness, quantile, to_f64};
use crate::traces::{TraceKind, requests};

/// What to replay.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReplayOptions {
    /// The trace.
    pub trace: TraceKind,
    /// Makes another trace of the same kind.
    pub seed: u64,
    /// Its length.
    pub requests: u32,
    /// Attention instances.
    pub attention: u32,
    /// KV blocks of 64 tokens of each.
    pub kv_blocks: u32,
    /// The mean time per later token that a request must not exceed to count as good.
    pub tpot_target_ms: f64,
}

/// What both policies made of it.
#[derive(Clone, Debug, Serialize)]
pub struct ReplayReport {
    /// The scheduler of `step3rt-core`.
    pub step3rt: PolicyReport,
    /// First come, first served.
    pub fcfs: PolicyReport,
    /// Goodput of the first by that of the second.
    pub goodput_ratio: f64,
}

/// What one policy made of it.
#[derive(Clone, Debug, Serialize)]
pub struct PolicyReport {
    /// Requests that got all their tokens.
    pub completed: u64,
    /// Requests that were turned away.
    pub refused: u64,
    /// Until the last token, in simulated time.
    pub seconds: f64,
    /// Tokens per second of requests within the TPOT target.
    pub goodput_tokens_per_s: f64,
    /// The share of completed requests within the TPOT target.
    pub within_target: f64,
    /// Time to the first token.
    pub ttft_ms: Quantiles,
    /// The same by priority, the most urgent first.
    pub ttft_ms_by_priority: BTreeMap<i32, Quantiles>,
    /// Mean time per later token of a request.
    pub tpot_ms: Quantiles,
    /// The share of KV blocks that hold tokens, over the time.
    pub kv_utilisation: f64,
    /// How often a sequence has lost its place and was computed again.
    pub preemptions: u64,
    /// Jain's index over tenants of tokens per second of waiting and running: 1 is even.
    pub fairness: f64,
}

/// Where values lie.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Quantiles {
    /// Half are below.
    pub p50: f64,
    /// One in a hundred is above.
    pub p99: f64,
}

/// A step's fixed cost: 61 layers, each passed in a pipeline of three stages of 70 us. A model,
/// not a measurement, as are the two slopes.
const STEP_US: f64 = 12_800.0;
/// Prompt tokens are computed at about 40,000 per second and instance.
const TOKEN_US: f64 = 25.0;
/// K and V of a token and 61 layers are read in about this time.
const CONTEXT_TOKEN_US: f64 = 0.02;

const NUM_LANES: u8 = 3;
const BLOCK_SIZE_TOKENS: u32 = 64;

/// Replays as `options` say.
///
/// # Errors
/// If a count is 0 or the pools cannot hold the longest request.
pub fn run(options: &ReplayOptions) -> Result<ReplayReport, String> {
    let config = SchedulerConfig {
        num_lanes: NUM_LANES,
        block_size_tokens: BLOCK_SIZE_TOKENS,
        max_model_len: 65_536,
        max_tokens_per_micro_batch: 512,
        max_steps_in_flight: 1,
        target_tpot_ms: 50,
        max_sequences_per_lane: 64,
        max_waiting_requests: u32::MAX,
        recovery_timeout_ms: 1_000,
        assumes_computed_prompts: false,
    };
    let ReplayOptions {
        attention,
        kv_blocks,
        requests,
        ..
    } = *options;
    if attention == 0 || requests == 0 || kv_blocks < MIN_KV_BLOCKS {
        return Err(format!(
            "attention = {attention}, requests = {requests}, kv_blocks = {kv_blocks} cannot be \
             replayed. The longest request needs {MIN_KV_BLOCKS} blocks, and there must be one \
             request and one instance. Raise what is too small"
        ));
    }
    let step3rt = play(
        options,
        CorePolicy::new(config.clone(), attention, kv_blocks),
    );
    let fcfs = play(options, FcfsPolicy::new(config, attention, kv_blocks));
    Ok(ReplayReport {
        goodput_ratio: step3rt.goodput_tokens_per_s / fcfs.goodput_tokens_per_s.max(1e-9),
        step3rt,
        fcfs,
    })
}

/// 8,000 tokens of prompt and 32,768 of answer, with some room.
const MIN_KV_BLOCKS: u32 = 700;

/// What a client saw.
struct Seen {
    arrived_ns: u64,
    tenant: u64,
    priority: i32,
    first_ns: u64,
    last_ns: u64,
    num_tokens: u64,
    has_ended: bool,
    is_refused: bool,
}

fn play(options: &ReplayOptions, mut policy: impl Policy) -> PolicyReport {
    let trace = requests(options.trace, options.seed, options.requests);
    let mut seen: BTreeMap<RequestId, Seen> = BTreeMap::new();
    let mut arrivals = trace.into_iter().peekable();
    let mut steps: BTreeSet<(u64, LanePlace)> = BTreeSet::new();
    let (mut now_ns, mut used_block_ns, mut num_blocks) = (0, 0.0, 1);
    loop {
        let arrival_ns = arrivals.peek().map(|&(at_ns, _)| at_ns);
        let step_ns = steps.first().map(|&(at_ns, _)| at_ns);
        let Some(next_ns) = [arrival_ns, step_ns].into_iter().flatten().min() else {
            break;
        };
        let (used, all) = policy.kv_blocks();
        used_block_ns += to_f64(used) * to_f64(next_ns - now_ns);
        (now_ns, num_blocks) = (next_ns, all);
        if step_ns == Some(now_ns) {
            let (_, place) = steps.pop_first().expect("it was seen");
            policy.step_done(TimeNs(now_ns), place);
        } else if let Some((_, request)) = arrivals.next() {
            seen.insert(request.id, Seen::of(now_ns, &request));
            policy.submit(TimeNs(now_ns), request);
        }
        for started in policy.plan(TimeNs(now_ns)) {
            steps.insert((now_ns + step_time_ns(started), started.place));
        }
        for told in policy.take_told() {
            note(&mut seen, now_ns, told);
        }
    }
    let utilisation = used_block_ns / (to_f64(num_blocks) * to_f64(now_ns).max(1.0));
    let mut report = summarise(seen.into_values(), options.tpot_target_ms, utilisation);
    report.preemptions = policy.num_preemptions();
    report
}

fn step_time_ns(step: Started) -> u64 {
    let us = STEP_US
        + TOKEN_US * f64::from(step.num_new_tokens)
        + CONTEXT_TOKEN_US * to_f64(step.num_context_tokens);
    u64::try_from(std::time::Duration::from_secs_f64(us / 1e6).as_nanos()).expect("seconds")
}

fn note(seen: &mut BTreeMap<RequestId, Seen>, now_ns: u64, told: Told) {
    let (Told::Token(id) | Told::End(id) | Told::Refused(id)) = told;
    let seen = seen.get_mut(&id).expect("it was submitted");
    match told {
        Told::Token(_) => {
            if seen.num_tokens == 0 {
                seen.first_ns = now_ns;
            }
            seen.num_tokens += 1;
            seen.last_ns = now_ns;
        }
        Told::End(_) => seen.has_ended = true,
        Told::Refused(_) => seen.is_refused = true,
    }
}

impl Seen {
    fn of(arrived_ns: u64, request: &step3rt_core::request::Request) -> Self {
        Self {
            arrived_ns,
            tenant: request.tenant.0,
            priority: request.priority,
            first_ns: 0,
            last_ns: 0,
            num_tokens: 0,
            has_ended: false,
            is_refused: false,
        }
    }

    fn ttft_ms(&self) -> f64 {
        to_f64(self.first_ns - self.arrived_ns) / 1e6
    }

    /// 0 for a request of one token.
    fn tpot_ms(&self) -> f64 {
        let later = self.num_tokens - 1;
        to_f64(self.last_ns - self.first_ns) / 1e6 / to_f64(later.max(1))
    }
}

fn summarise(
    seen: impl Iterator<Item = Seen>,
    tpot_target_ms: f64,
    kv_utilisation: f64,
) -> PolicyReport {
    let (completed, others): (Vec<Seen>, Vec<Seen>) = seen.partition(|seen| seen.has_ended);
    let start_ns = completed.iter().map(|seen| seen.arrived_ns).min();
    let end_ns = completed.iter().map(|seen| seen.last_ns).max();
    let seconds = to_f64(end_ns.unwrap_or(0) - start_ns.unwrap_or(0)) / 1e9;
    let good = completed.iter().filter(|s| s.tpot_ms() <= tpot_target_ms);
    let num_good_tokens: u64 = good.clone().map(|seen| seen.num_tokens).sum();
    let mut by_priority: BTreeMap<i32, Vec<f64>> = BTreeMap::new();
    let mut tenants: BTreeMap<u64, (f64, f64)> = BTreeMap::new();
    for seen in &completed {
        let of_priority = by_priority.entry(seen.priority).or_default();
        of_priority.push(seen.ttft_ms());
        let (tokens, seconds) = tenants.entry(seen.tenant).or_default();
        *tokens += to_f64(seen.num_tokens);
        *seconds += to_f64(seen.last_ns - seen.arrived_ns) / 1e9;
    }
    let rates: Vec<f64> = tenants.values().map(|(t, s)| t / s.max(1e-9)).collect();
    let num_completed = completed.len() as u64;
    PolicyReport {
        completed: num_completed,
        refused: others.iter().filter(|seen| seen.is_refused).count() as u64,
        seconds,
        goodput_tokens_per_s: to_f64(num_good_tokens) / seconds.max(1e-9),
        within_target: to_f64(good.count() as u64) / to_f64(num_completed.max(1)),
        ttft_ms: Quantiles::of(completed.iter().map(Seen::ttft_ms).collect()),
        ttft_ms_by_priority: by_priority
            .into_iter()
            .map(|(priority, values)| (priority, Quantiles::of(values)))
            .collect(),
        tpot_ms: Quantiles::of(completed.iter().map(Seen::tpot_ms).collect()),
        kv_utilisation,
        preemptions: 0,
        fairness: fairness(&rates),
    }
}

impl Quantiles {
    fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        Self {
            p50: quantile(&values, 500),
            p99: quantile(&values, 990),
        }
    }
}
