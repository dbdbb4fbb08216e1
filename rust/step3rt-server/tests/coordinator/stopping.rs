//! The end of a coordinator: in order, in time, or at once.

use std::time::Duration;

use serde_json::json;
use step3rt_proto::v1::generate_response::Event;
use step3rt_server::config::CoordinatorConfig;
use step3rt_server::coordinator::Coordinator;
use step3rt_server::shutdown::StopSignal;
use tonic::Code;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_types::StatusExt;

use crate::cluster::{Cluster, MODEL, PATIENCE, collect, eventually, generate, request};
use crate::node::{NodeOptions, TestNode, continuation};

async fn slow_cluster(settings: &serde_json::Value) -> (Cluster, TestNode, TestNode) {
    let cluster = Cluster::start(settings);
    let ffn = cluster.node(NodeOptions::ffn()).await;
    let slow = NodeOptions {
        step_delay: Duration::from_millis(10),
        ..NodeOptions::attention()
    };
    let attention = cluster.node(slow).await;
    cluster.wait_serving(true).await;
    (cluster, attention, ffn)
}

#[tokio::test]
async fn a_stop_lets_running_streams_end_refuses_new_ones_and_dismisses_instances() {
    let (cluster, attention, ffn) = slow_cluster(&json!({})).await;
    let mut client = cluster.client().await;
    let stream = client.generate(request(&[4], 200)).await.expect("accepted");
    attention.wait_until(|seen| seen.num_steps > 2).await;
    cluster
        .stop
        .send(StopSignal::Terminate)
        .await
        .expect("running");
    eventually("NOT_SERVING", async || {
        cluster.health("").await == ServingStatus::NotServing
    })
    .await;
    let status = generate(&mut client, request(&[1], 1))
        .await
        .expect_err("draining");
    let reason = status.get_details_error_info().expect("ErrorInfo").reason;
    assert_eq!(
        (status.code(), reason.as_str()),
        (Code::Unavailable, "DRAINING")
    );
    let collected = collect(stream.into_inner(), 1).await.expect("ends well");
    assert_eq!(collected[0].token_ids, continuation(&[4], 200));
    assert!(attention.exited().await.is_ok() && ffn.exited().await.is_ok());
    let code = tokio::time::timeout(PATIENCE, cluster.exit)
        .await
        .expect("in time");
    assert_eq!(code.expect("no panic"), 0);
}

#[tokio::test]
async fn streams_that_outlast_the_drain_are_told_so() {
    let (cluster, attention, _ffn) = slow_cluster(&json!({"drain_timeout_s": 0.1})).await;
    let stream = cluster
        .client()
        .await
        .generate(request(&[4], 400))
        .await
        .expect("accepted");
    attention.wait_until(|seen| seen.num_steps > 2).await;
    let ended = tokio::spawn(collect(stream.into_inner(), 1));
    assert_eq!(cluster.stop().await, 0);
    let status = ended.await.expect("no panic").expect_err("cut off");
    assert_eq!(status.code(), Code::Unavailable);
    assert_eq!(
        status.get_details_error_info().expect("ErrorInfo").reason,
        "DRAINING"
    );
}

#[tokio::test]
async fn a_second_signal_ends_it_at_once() {
    let (cluster, attention, _ffn) = slow_cluster(&json!({})).await;
    let mut stream = cluster
        .client()
        .await
        .generate(request(&[4], 400))
        .await
        .expect("accepted")
        .into_inner();
    assert!(matches!(
        stream
            .message()
            .await
            .expect("starts")
            .and_then(|r| r.event),
        Some(Event::Started(_))
    ));
    attention.wait_until(|seen| seen.num_steps > 2).await;
    cluster
        .stop
        .send(StopSignal::Terminate)
        .await
        .expect("running");
    cluster
        .stop
        .send(StopSignal::Interrupt)
        .await
        .expect("running");
    let code = tokio::time::timeout(Duration::from_secs(3), cluster.exit).await;
    assert_eq!(code.expect("at once").expect("no panic"), 130);
}

#[tokio::test]
async fn the_ready_file_tells_both_addresses_and_goes_with_the_coordinator() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let path = directory.path().join("ready.json");
    let cluster = Cluster::start(&json!({"ready_file": path}));
    eventually("ready file", async || path.exists()).await;
    let text = std::fs::read_to_string(&path).expect("readable");
    let ready: serde_json::Value = serde_json::from_str(&text).expect("complete");
    assert_eq!(ready["address"], cluster.address.to_string());
    assert_eq!(
        ready["control_address"],
        cluster.control_address.to_string()
    );
    assert_eq!(ready["pid"], std::process::id());
    assert_eq!(cluster.stop().await, 0);
    assert!(!path.exists());
}

#[tokio::test]
async fn what_keeps_a_coordinator_from_starting_is_said_before_anything_listens() {
    let cluster = Cluster::start(&json!({}));
    let start = |settings: serde_json::Value| {
        let config = CoordinatorConfig::from_json(&settings.to_string()).expect("parses");
        Coordinator::bind(config)
            .err()
            .expect("refused")
            .to_string()
    };
    let taken = cluster.address.to_string();
    let local = "127.0.0.1:0";
    for (settings, text) in [
        (
            json!({"model_path": MODEL, "listen": taken}),
            "cannot be bound",
        ),
        (
            json!({"model_path": "/nowhere", "listen": local}),
            "config.json cannot be read",
        ),
        (
            json!({"model_path": MODEL, "listen": "0.0.0.0:0"}),
            "insecure_bind",
        ),
        (
            json!({"model_path": MODEL, "listen": local, "num_lanes": 9}),
            "num_lanes",
        ),
        (
            json!({"model_path": MODEL, "listen": local, "max_model_len": 9999}),
            "max_model_len",
        ),
    ] {
        let error = start(settings);
        assert!(error.contains(text), "{error}");
    }
    assert_eq!(cluster.stop().await, 0);
}

#[tokio::test]
async fn reflection_is_off_unless_it_is_asked_for() {
    use tonic_reflection::pb::v1::ServerReflectionRequest;
    use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
    use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
    for is_on in [false, true] {
        let cluster = Cluster::start(&json!({"reflection": is_on}));
        let channel =
            tonic::transport::Endpoint::from_shared(format!("http://{}", cluster.address))
                .expect("an address")
                .connect()
                .await
                .expect("connects");
        let request = ServerReflectionRequest {
            host: String::new(),
            message_request: Some(MessageRequest::FileContainingSymbol(
                "step3rt.v1.InferenceService".to_owned(),
            )),
        };
        let answer = ServerReflectionClient::new(channel)
            .server_reflection_info(tokio_stream::once(request))
            .await;
        assert_eq!(answer.is_ok(), is_on);
    }
}
