//! Clients that leave, wait too short a time, abort, or do not read.

use std::time::{Duration, Instant};

use serde_json::json;
use step3rt_proto::v1;
use step3rt_proto::v1::generate_response::Event;
use tonic::{Code, Request};
use tonic_types::StatusExt;

use crate::cluster::{Cluster, collect, eventually, generate, request};
use crate::node::{NodeOptions, TestNode, continuation};

async fn slow_cluster(step_delay: Duration) -> (Cluster, TestNode, TestNode) {
    let cluster = Cluster::start(&json!({}));
    let ffn = cluster.node(NodeOptions::ffn()).await;
    let slow = NodeOptions {
        step_delay,
        ..NodeOptions::attention()
    };
    let attention = cluster.node(slow).await;
    cluster.wait_serving(true).await;
    (cluster, attention, ffn)
}

#[tokio::test]
async fn leaving_a_stream_frees_its_blocks_and_stops_its_steps() {
    let (cluster, attention, _ffn) = slow_cluster(Duration::from_millis(5)).await;
    let mut stream = cluster
        .client()
        .await
        .generate(request(&[1; 100], 400))
        .await
        .expect("accepted")
        .into_inner();
    assert!(stream.message().await.expect("starts").is_some());
    attention.wait_until(|seen| seen.num_sequences == 1).await;
    drop(stream);
    attention.wait_until(|seen| seen.num_sequences == 0).await;
    cluster.wait_blocks_free().await;
    let num_steps = attention.seen().num_steps;
    assert!(
        num_steps < 100,
        "{num_steps} steps for a client that left after the first"
    );
}

#[tokio::test]
async fn a_deadline_ends_a_running_stream_with_the_count_of_its_tokens() {
    let (cluster, _attention, _ffn) = slow_cluster(Duration::from_millis(20)).await;
    let mut asked = Request::new(request(&[1], 400));
    // As a header, so that the client's own timer does not end the call first.
    asked
        .metadata_mut()
        .insert("grpc-timeout", "2000m".parse().expect("valid"));
    let started = Instant::now();
    let stream = cluster
        .client()
        .await
        .generate(asked)
        .await
        .expect("accepted");
    let status = collect(stream.into_inner(), 1).await.expect_err("too late");
    assert_eq!(status.code(), Code::DeadlineExceeded);
    let waited = started.elapsed();
    assert!((2_000..7_500).contains(&waited.as_millis()), "{waited:?}");
    let num_tokens = status
        .metadata()
        .get("step3rt-completion-tokens")
        .expect("counted");
    assert!(
        num_tokens
            .to_str()
            .expect("digits")
            .parse::<u32>()
            .expect("a number")
            > 0
    );
    cluster.wait_blocks_free().await;
}

#[tokio::test]
async fn abort_ends_a_stream_in_good_order_and_is_idempotent() {
    let (cluster, _attention, _ffn) = slow_cluster(Duration::from_millis(5)).await;
    let mut client = cluster.client().await;
    let mut asked = request(&[1, 2], 400);
    asked.request_id = "mine".to_owned();
    let mut stream = client.generate(asked).await.expect("accepted").into_inner();
    assert!(matches!(
        stream
            .message()
            .await
            .expect("starts")
            .and_then(|r| r.event),
        Some(Event::Started(_))
    ));
    let abort = v1::AbortRequest {
        request_ids: vec!["mine".to_owned(), "unknown".to_owned()],
    };
    let aborted = client
        .abort(abort.clone())
        .await
        .expect("succeeds")
        .into_inner();
    assert_eq!(aborted.aborted_request_ids, ["mine"]);
    let mut last = None;
    while let Some(response) = stream.message().await.expect("no error") {
        last = response.event;
    }
    let Some(Event::Finished(finished)) = last else {
        panic!("Finished is last, not {last:?}");
    };
    assert_eq!(finished.reason(), v1::FinishReason::Cancelled);
    let again = client.abort(abort).await.expect("succeeds").into_inner();
    assert!(again.aborted_request_ids.is_empty());
    cluster.wait_blocks_free().await;
}

#[tokio::test]
async fn a_client_that_does_not_read_is_cut_and_harms_nobody() {
    // Some thousand tokens per request at full speed, on a window of the smallest size.
    let settings = json!({"max_model_len": 512, "max_waiting_requests": 1024});
    let (cluster, _attention, _ffn) = Cluster::serving(&settings).await;
    let channel = tonic::transport::Endpoint::from_shared(format!("http://{}", cluster.address))
        .expect("an address")
        .initial_stream_window_size(1_u32)
        .connect()
        .await
        .expect("connects");
    let mut deaf = v1::inference_service_client::InferenceServiceClient::new(channel);
    let mut asked = request(&[1], 500);
    asked.sampling.as_mut().expect("set").n = Some(8);
    asked.request_id = "deaf".to_owned();
    let stream = deaf.generate(asked).await.expect("accepted").into_inner();

    let good = generate(&mut cluster.client().await, request(&[5], 300))
        .await
        .expect("not harmed");
    assert_eq!(good.token_ids, continuation(&[5], 300));
    // The request ends without being read, and holds nothing any more.
    cluster.wait_blocks_free().await;
    let mut client = cluster.client().await;
    eventually("the cut request is forgotten", async || {
        let abort = v1::AbortRequest {
            request_ids: vec!["deaf".to_owned()],
        };
        let aborted = client.abort(abort).await.expect("succeeds").into_inner();
        aborted.aborted_request_ids.is_empty()
    })
    .await;
    let status = collect(stream, 8).await.expect_err("cut");
    let reason = status.get_details_error_info().expect("ErrorInfo").reason;
    assert_eq!(
        (status.code(), reason.as_str()),
        (Code::ResourceExhausted, "SLOW_CONSUMER")
    );
}
