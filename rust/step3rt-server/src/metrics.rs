//! What the coordinator counts, in the text format of `OpenMetrics`, which Prometheus reads.
//!
//! Requests count themselves as they go; the state of the cluster is looked at when somebody asks. No
//! label has a user's text.

use std::fmt;
use std::sync::atomic::Ordering;

use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};
use step3rt_core::ids::TimeNs;
use step3rt_core::scheduler::SchedulerStats;
use step3rt_proto::v1;

use crate::drive_handle::Observation;
use crate::instance_list::role_name;

/// Upper bounds of waiting for a place and of the first token, in seconds.
const WAIT_BUCKETS_S: [f64; 20] = [
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0,
];
/// Of a token's time: finer about 50 ms, which Step-3 is served at.
const TOKEN_BUCKETS_S: [f64; 18] = [
    0.001, 0.005, 0.01, 0.015, 0.02, 0.025, 0.03, 0.035, 0.04, 0.045, 0.05, 0.055, 0.06, 0.08, 0.1,
    0.2, 0.5, 1.0,
];
/// Of a whole continuation.
const WHOLE_BUCKETS_S: [f64; 16] = [
    0.1, 0.3, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0,
    3840.0,
];

/// A request that was served to its end.
pub const FINISHED: &str = "FINISHED";
/// A request whose client left, or cancelled its call.
pub const CLIENT_LEFT: &str = "CLIENT_LEFT";

type Labels<const N: usize> = [(&'static str, String); N];

/// What requests count; clones count together.
#[derive(Clone, Debug)]
pub struct RequestMetrics {
    requests: Family<Labels<1>, Counter>,
    outputs: Family<Labels<1>, Counter>,
    prompt_tokens: Counter,
    cached_prompt_tokens: Counter,
    generated_tokens: Counter,
    queue_time: Histogram,
    time_to_first_token: Histogram,
    time_per_output_token: Histogram,
    output_time: Histogram,
}

impl Default for RequestMetrics {
    fn default() -> Self {
        Self {
            requests: Family::default(),
            outputs: Family::default(),
            prompt_tokens: Counter::default(),
            cached_prompt_tokens: Counter::default(),
            generated_tokens: Counter::default(),
            queue_time: Histogram::new(WAIT_BUCKETS_S),
            time_to_first_token: Histogram::new(WAIT_BUCKETS_S),
            time_per_output_token: Histogram::new(TOKEN_BUCKETS_S),
            output_time: Histogram::new(WHOLE_BUCKETS_S),
        }
    }
}

impl RequestMetrics {
    /// A request has a place: so many tokens of its prompt, so many of them cached.
    pub fn started(&self, num_prompt_tokens: u32, num_cached_tokens: u32) {
        self.prompt_tokens.inc_by(num_prompt_tokens.into());
        self.cached_prompt_tokens.inc_by(num_cached_tokens.into());
    }

    /// A token is the client's.
    pub fn generated(&self) {
        self.generated_tokens.inc();
    }

    /// A continuation ended for `reason` (of the wire), with `num_new_tokens`. `times` as in
    /// [`Usage::times`](step3rt_core::request::Usage::times).
    pub fn output_ended(
        &self,
        reason: v1::FinishReason,
        num_new_tokens: u32,
        [submitted, planned, first_token, ended]: [TimeNs; 4],
    ) {
        let name = reason.as_str_name().trim_start_matches("FINISH_REASON_");
        let labels = [("reason", name.to_owned())];
        self.outputs.get_or_create(&labels).inc();
        if num_new_tokens == 0 || reason == v1::FinishReason::Cancelled {
            return; // not all of its times are known
        }
        self.queue_time.observe(seconds(submitted, planned));
        self.time_to_first_token
            .observe(seconds(submitted, first_token));
        if num_new_tokens > 1 {
            let per_token = seconds(first_token, ended) / f64::from(num_new_tokens - 1);
            self.time_per_output_token.observe(per_token);
        }
        self.output_time.observe(seconds(submitted, ended));
    }

    /// A request is over: [`FINISHED`], [`CLIENT_LEFT`], or the reason of its error.
    pub fn ended(&self, outcome: &str) {
        let labels = [("outcome", outcome.to_owned())];
        self.requests.get_or_create(&labels).inc();
    }
}

#[expect(clippy::cast_precision_loss, reason = "under a nanosecond in 100 days")]
fn seconds(from: TimeNs, to: TimeNs) -> f64 {
    to.since_ns(from) as f64 / 1e9
}

/// Everything that is reported.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    cluster: ClusterMetrics,
}

#[derive(Debug, Default)]
struct ClusterMetrics {
    is_serving: Gauge,
    requests_waiting: Gauge,
    sequences_running: Gauge,
    steps_in_flight: Gauge,
    preemptions: Counter,
    kv_blocks: Family<Labels<1>, Gauge>,
    free_kv_blocks: Family<Labels<1>, Gauge>,
    instances: Family<Labels<2>, Gauge>,
}

impl Metrics {
    /// Of a coordinator that serves `model_name`, whose requests count in `requests`.
    pub fn new(model_name: &str, requests: &RequestMetrics) -> Self {
        let mut registry = Registry::with_prefix("step3rt");
        let cluster = ClusterMetrics::default();
        let build = [
            ("version", env!("CARGO_PKG_VERSION").to_owned()),
            ("model", model_name.to_owned()),
        ];
        registry.register("build", "What runs here", Info::new(build));
        register_cluster(&mut registry, &cluster);
        register_requests(&mut registry, requests);
        Self { registry, cluster }
    }

    /// The text, with the state of the cluster as `observed`.
    pub fn text(&mut self, observed: &Observation) -> Result<String, fmt::Error> {
        self.cluster.set(observed);
        let mut text = String::new();
        encode(&mut text, &self.registry)?;
        Ok(text)
    }
}

fn register_cluster(registry: &mut Registry, cluster: &ClusterMetrics) {
    registry.register(
        "serving",
        "1 while requests are served",
        cluster.is_serving.clone(),
    );
    registry.register(
        "requests_waiting",
        "Requests without a place",
        cluster.requests_waiting.clone(),
    );
    registry.register(
        "sequences_running",
        "Continuations that have a place",
        cluster.sequences_running.clone(),
    );
    registry.register(
        "steps_in_flight",
        "Steps planned and not answered, of all lanes",
        cluster.steps_in_flight.clone(),
    );
    registry.register(
        "preemptions",
        "How often a sequence has lost its place to others that had grown",
        cluster.preemptions.clone(),
    );
    registry.register(
        "kv_blocks",
        "KV blocks of an attention instance",
        cluster.kv_blocks.clone(),
    );
    registry.register(
        "free_kv_blocks",
        "Those that no sequence holds; they may hold cached beginnings of prompts",
        cluster.free_kv_blocks.clone(),
    );
    registry.register(
        "instances",
        "Instances in the cluster",
        cluster.instances.clone(),
    );
}

fn register_requests(registry: &mut Registry, requests: &RequestMetrics) {
    registry.register(
        "requests",
        "Requests that are over: FINISHED, CLIENT_LEFT, or the reason of their error",
        requests.requests.clone(),
    );
    registry.register(
        "outputs",
        "Continuations that ended, by finish reason",
        requests.outputs.clone(),
    );
    registry.register(
        "prompt_tokens",
        "Tokens of the prompts that were begun",
        requests.prompt_tokens.clone(),
    );
    registry.register(
        "cached_prompt_tokens",
        "Those of them whose K and V were in the prefix cache",
        requests.cached_prompt_tokens.clone(),
    );
    registry.register(
        "generated_tokens",
        "Tokens given to clients, without resumed ones",
        requests.generated_tokens.clone(),
    );
    for (name, help, histogram) in [
        (
            "queue_time",
            "From a request's arrival until it was planned",
            &requests.queue_time,
        ),
        (
            "time_to_first_token",
            "From a request's arrival until its first token",
            &requests.time_to_first_token,
        ),
        (
            "time_per_output_token",
            "From first token to end, by the tokens after the first",
            &requests.time_per_output_token,
        ),
        (
            "output_time",
            "From a request's arrival until a continuation's end",
            &requests.output_time,
        ),
    ] {
        registry.register_with_unit(name, help, Unit::Seconds, histogram.clone());
    }
}

impl ClusterMetrics {
    fn set(&self, Observation { stats, instances }: &Observation) {
        let SchedulerStats {
            num_waiting,
            num_running,
            kv_blocks,
            num_steps_in_flight,
            num_preemptions,
        } = stats;
        self.is_serving.set(instances.is_serving.into());
        for (gauge, number) in [
            (&self.requests_waiting, num_waiting),
            (&self.sequences_running, num_running),
            (&self.steps_in_flight, num_steps_in_flight),
        ] {
            gauge.set(i64::try_from(*number).unwrap_or(i64::MAX));
        }
        // It only grows, and nobody else counts it.
        self.preemptions
            .inner()
            .store(*num_preemptions, Ordering::Relaxed);
        // Those that are gone are not reported any more.
        self.kv_blocks.clear();
        self.free_kv_blocks.clear();
        self.instances.clear();
        for (instance, num_free, num_blocks) in kv_blocks {
            let labels = [("instance", instance.0.to_string())];
            let all = i64::from(*num_blocks);
            self.kv_blocks.get_or_create(&labels).set(all);
            let free = i64::from(*num_free);
            self.free_kv_blocks.get_or_create(&labels).set(free);
        }
        for info in &instances.instances {
            let labels = [
                ("role", role_name(info.role()).to_owned()),
                ("state", info.state.clone()),
            ];
            self.instances.get_or_create(&labels).inc();
        }
    }
}

#[cfg(test)]
mod tests;
