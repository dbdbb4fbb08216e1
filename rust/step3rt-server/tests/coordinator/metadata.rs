//! What travels beside the messages: the caller's `x-request-id` comes back with every answer.

use std::time::Duration;

use serde_json::json;
use step3rt_proto::v1;
use tonic::metadata::MetadataMap;
use tonic::{Code, Request, Status};
use tonic_types::StatusExt;

use crate::cluster::{Cluster, collect, request};
use crate::node::NodeOptions;

fn named<T>(message: T, id: &str) -> Request<T> {
    let mut request = Request::new(message);
    request
        .metadata_mut()
        .insert("x-request-id", id.parse().expect("ASCII"));
    request
}

fn echoed(metadata: &MetadataMap) -> Option<&str> {
    metadata
        .get("x-request-id")
        .map(|id| id.to_str().expect("ASCII"))
}

fn assert_names(status: &Status, id: &str) {
    let info = status.get_details_request_info().expect("RequestInfo");
    assert_eq!(info.request_id, id);
    assert_eq!(echoed(status.metadata()), Some(id));
    assert!(
        status.get_details_error_info().is_some(),
        "the reason stays"
    );
}

#[tokio::test]
async fn a_request_id_comes_back_with_the_answer() {
    let (cluster, _attention, _ffn) = Cluster::serving(&json!({})).await;
    let mut client = cluster.client().await;
    let response = client
        .generate(named(request(&[1], 3), "trace/1 \"a\""))
        .await
        .expect("accepted");
    assert_eq!(echoed(response.metadata()), Some("trace/1 \"a\""));
    assert!(collect(response.into_inner(), 1).await.is_ok());
    let info = client
        .get_model_info(named(v1::GetModelInfoRequest {}, "b"))
        .await
        .expect("told");
    assert_eq!(echoed(info.metadata()), Some("b"));
}

#[tokio::test]
async fn a_request_id_comes_back_with_a_refusal() {
    let (cluster, _attention, _ffn) = Cluster::serving(&json!({})).await;
    let mut client = cluster.client().await;
    let refused = client.generate(named(request(&[1], 0), "c")).await;
    let status = refused.expect_err("0 tokens");
    assert_names(&status, "c");
    assert!(
        status.get_details_bad_request().is_some(),
        "the field stays"
    );
    let text = "a".repeat(2 << 20);
    let tokenize = v1::TokenizeRequest {
        text,
        add_special_tokens: None,
    };
    let status = client.tokenize(named(tokenize, "d")).await;
    assert_names(&status.expect_err("too long"), "d");
}

#[tokio::test]
async fn a_request_id_comes_back_with_the_error_of_a_running_stream() {
    let cluster = Cluster::start(&json!({}));
    let _ffn = cluster.node(NodeOptions::ffn()).await;
    let slow = NodeOptions {
        step_delay: Duration::from_millis(20),
        ..NodeOptions::attention()
    };
    let _attention = cluster.node(slow).await;
    cluster.wait_serving(true).await;
    let mut asked = named(request(&[1], 400), "e");
    asked
        .metadata_mut()
        .insert("grpc-timeout", "2000m".parse().expect("ASCII"));
    let stream = cluster.client().await.generate(asked).await;
    let status = collect(stream.expect("accepted").into_inner(), 1)
        .await
        .expect_err("too late");
    assert_eq!(status.code(), Code::DeadlineExceeded);
    assert_names(&status, "e");
    assert!(status.metadata().get("step3rt-completion-tokens").is_some());
}

#[tokio::test]
async fn an_id_that_is_absent_empty_or_too_long_is_not_sent_back() {
    let (cluster, _attention, _ffn) = Cluster::serving(&json!({})).await;
    let mut client = cluster.client().await;
    for id in ["", &"x".repeat(129)] {
        let asked = named(v1::GetModelInfoRequest {}, id);
        let info = client.get_model_info(asked).await.expect("told");
        assert_eq!(echoed(info.metadata()), None);
    }
    let status = client
        .generate(request(&[1], 0))
        .await
        .expect_err("refused");
    assert!(status.get_details_request_info().is_none());
}
