//! Metrics, fetched as a collector does.

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tonic::Code;

use crate::cluster::{Cluster, collect, eventually, request};

/// The whole answer to `GET path`.
async fn get(address: &str, path: &str) -> String {
    let mut stream = TcpStream::connect(address).await.expect("listens");
    let head = format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    stream.write_all(head.as_bytes()).await.expect("sent");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.expect("text");
    answer
}

#[tokio::test]
async fn a_collector_reads_what_requests_and_instances_did() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let ready_file = directory.path().join("ready.json");
    let settings = json!({"metrics_listen": "127.0.0.1:0", "ready_file": ready_file});
    let (cluster, _attention, _ffn) = Cluster::serving(&settings).await;
    let ready = std::fs::read_to_string(&ready_file).expect("written");
    let ready: serde_json::Value = serde_json::from_str(&ready).expect("complete");
    let address = ready["metrics_address"].as_str().expect("an address");

    let mut client = cluster.client().await;
    let stream = client.generate(request(&[1, 2, 3], 4)).await;
    let outputs = collect(stream.expect("accepted").into_inner(), 1).await;
    assert_eq!(outputs.expect("served")[0].token_ids.len(), 4);
    let refused = client.generate(request(&[], 4)).await;
    assert_eq!(refused.expect_err("empty").code(), Code::InvalidArgument);

    eventually("the end of the stream's task", async || {
        get(address, "/metrics").await.contains("FINISHED")
    })
    .await;
    let answer = get(address, "/metrics").await;
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    assert!(answer.contains("application/openmetrics-text"), "{answer}");
    for line in [
        "step3rt_serving 1",
        "step3rt_requests_total{outcome=\"FINISHED\"} 1",
        "step3rt_requests_total{outcome=\"INVALID_PARAMETER\"} 1",
        "step3rt_outputs_total{reason=\"LENGTH\"} 1",
        "step3rt_prompt_tokens_total 3",
        "step3rt_generated_tokens_total 4",
        "step3rt_time_to_first_token_seconds_count 1",
        "step3rt_time_per_output_token_seconds_count 1",
        "step3rt_instances{role=\"attention\",state=\"ready\"} 1",
        "step3rt_instances{role=\"ffn\",state=\"ready\"} 1",
        "# EOF",
    ] {
        assert!(
            answer.lines().any(|found| found == line),
            "{line}: {answer}"
        );
    }
    let other = get(address, "/").await;
    assert!(other.starts_with("HTTP/1.1 404"), "{other}");
    assert_eq!(cluster.stop().await, 0);
}
