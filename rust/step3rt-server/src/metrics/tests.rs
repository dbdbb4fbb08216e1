//! The text, line by line.

use step3rt_core::ids::InstanceId;

use super::*;

const MS: u64 = 1_000_000;

fn observation(num_preemptions: u64, instances: Vec<v1::InstanceInfo>) -> Observation {
    let kv_blocks = instances
        .iter()
        .filter(|info| info.role() == v1::Role::Attention)
        .map(|info| (InstanceId(info.instance_id), 40, info.num_kv_blocks))
        .collect();
    Observation {
        stats: SchedulerStats {
            num_waiting: 7,
            num_running: 5,
            kv_blocks,
            num_steps_in_flight: 2,
            num_preemptions,
        },
        instances: v1::ListInstancesResponse {
            instances,
            is_serving: true,
            status: String::new(),
        },
    }
}

fn instance(instance_id: u32, role: v1::Role) -> v1::InstanceInfo {
    v1::InstanceInfo {
        instance_id,
        role: role.into(),
        state: "ready".to_owned(),
        num_kv_blocks: 64,
        ..Default::default()
    }
}

#[track_caller]
fn assert_has(text: &str, lines: &[&str]) {
    for line in lines {
        assert!(text.lines().any(|found| found == *line), "{line}\n{text}");
    }
}

#[test]
fn the_clusters_state_is_that_of_now() {
    let mut metrics = Metrics::new("a \"model\"", &RequestMetrics::default());
    let both = vec![
        instance(3, v1::Role::Attention),
        instance(4, v1::Role::Ffn),
        instance(5, v1::Role::Ffn),
    ];
    let text = metrics.text(&observation(1, both)).expect("fits");
    assert_has(
        &text,
        &[
            "step3rt_serving 1",
            "step3rt_requests_waiting 7",
            "step3rt_sequences_running 5",
            "step3rt_steps_in_flight 2",
            "step3rt_preemptions_total 1",
            "step3rt_kv_blocks{instance=\"3\"} 64",
            "step3rt_free_kv_blocks{instance=\"3\"} 40",
            "step3rt_instances{role=\"attention\",state=\"ready\"} 1",
            "step3rt_instances{role=\"ffn\",state=\"ready\"} 2",
            "# EOF",
        ],
    );
    assert!(text.contains(",model=\"a \\\"model\\\"\"} 1"), "{text}");
    let text = metrics.text(&observation(9, vec![])).expect("fits");
    assert_has(&text, &["step3rt_preemptions_total 9"]);
    assert!(!text.contains("step3rt_kv_blocks{"), "it is gone: {text}");
    assert!(!text.contains("step3rt_instances{"), "{text}");
}

#[test]
fn requests_count_tokens_times_and_ends() {
    let requests = RequestMetrics::default();
    let mut metrics = Metrics::new("m", &requests);
    requests.started(100, 64);
    for _ in 0..5 {
        requests.generated();
    }
    let times = [1, 11, 31, 191].map(|ms| TimeNs(ms * MS));
    requests.output_ended(v1::FinishReason::Length, 5, times);
    requests.ended(FINISHED);
    requests.ended("QUEUE_FULL");
    let text = metrics.text(&observation(0, vec![])).expect("fits");
    assert_has(
        &text,
        &[
            "step3rt_prompt_tokens_total 100",
            "step3rt_cached_prompt_tokens_total 64",
            "step3rt_generated_tokens_total 5",
            "step3rt_outputs_total{reason=\"LENGTH\"} 1",
            "step3rt_requests_total{outcome=\"FINISHED\"} 1",
            "step3rt_requests_total{outcome=\"QUEUE_FULL\"} 1",
            "step3rt_queue_time_seconds_sum 0.01",
            "step3rt_time_to_first_token_seconds_sum 0.03",
            "step3rt_time_per_output_token_seconds_sum 0.04",
            "step3rt_time_per_output_token_seconds_bucket{le=\"0.035\"} 0",
            "step3rt_time_per_output_token_seconds_bucket{le=\"0.04\"} 1",
            "step3rt_output_time_seconds_sum 0.19",
        ],
    );
}

#[test]
fn times_that_are_not_known_are_not_counted() {
    let requests = RequestMetrics::default();
    let mut metrics = Metrics::new("m", &requests);
    let never = [TimeNs(5 * MS); 4];
    requests.output_ended(v1::FinishReason::Stop, 0, never);
    requests.output_ended(v1::FinishReason::Cancelled, 3, never);
    requests.output_ended(v1::FinishReason::Stop, 1, never);
    let text = metrics.text(&observation(0, vec![])).expect("fits");
    assert_has(
        &text,
        &[
            "step3rt_outputs_total{reason=\"STOP\"} 2",
            "step3rt_outputs_total{reason=\"CANCELLED\"} 1",
            "step3rt_time_to_first_token_seconds_count 1",
            "step3rt_time_per_output_token_seconds_count 0",
        ],
    );
}
