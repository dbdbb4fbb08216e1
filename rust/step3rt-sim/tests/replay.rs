//! The scheduler serves the traces better than first come, first served, and at no hidden price.

use serde_json::Value;
use step3rt_sim::options::replay_traffic;

fn replay(trace: &str) -> Value {
    let options = format!(
        r#"{{"trace": "{trace}", "seed": 1, "requests": 600, "attention": 2, "kv_blocks": 4096,
            "tpot_target_ms": 50.0}}"#
    );
    let report = replay_traffic(&options).expect("the options are right");
    serde_json::from_str(&report).expect("JSON")
}

fn number(report: &Value, path: &str) -> f64 {
    let value = report.pointer(path).and_then(Value::as_f64);
    value.expect("the report has it")
}

#[test]
fn long_answers_come_sooner_and_as_evenly() {
    let report = replay("reasoning");
    assert!(number(&report, "/goodput_ratio") >= 1.3);
    let ours = number(&report, "/step3rt/tpot_ms/p99");
    assert!(ours <= 1.15 * number(&report, "/fcfs/tpot_ms/p99"));
    assert!(number(&report, "/step3rt/preemptions") <= 6.0, "1 in 100");
    let ours = number(&report, "/step3rt/kv_utilisation");
    assert!(ours >= 1.3 * number(&report, "/fcfs/kv_utilisation"));
}

#[test]
fn bursts_and_mixed_traffic_lose_nothing() {
    for trace in ["bursty", "mixed"] {
        let report = replay(trace);
        assert!(number(&report, "/goodput_ratio") >= 1.03, "{trace}");
        let ours = number(&report, "/step3rt/tpot_ms/p99");
        assert!(ours <= number(&report, "/fcfs/tpot_ms/p99"), "{trace}");
        let ours = number(&report, "/step3rt/ttft_ms/p99");
        assert!(ours <= number(&report, "/fcfs/ttft_ms/p99"), "{trace}");
    }
}
