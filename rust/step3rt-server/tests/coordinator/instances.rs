//! Instances that come, go, die, lie or stand still.

use std::time::Duration;

use serde_json::json;
use step3rt_proto::v1;
use step3rt_proto::v1::session_request::Event;
use tonic::Code;
use tonic_health::pb::health_check_response::ServingStatus;

use crate::cluster::{Cluster, collect, eventually, generate, request};
use crate::node::{NodeOptions, connect, continuation, hello, send};

fn slow_attention() -> NodeOptions {
    NodeOptions {
        step_delay: Duration::from_millis(10),
        ..NodeOptions::attention()
    }
}

#[tokio::test]
async fn health_follows_the_instances_in_any_order() {
    let cluster = Cluster::start(&json!({"ep_size": 2, "num_attention": 1}));
    assert_eq!(cluster.health("").await, ServingStatus::NotServing);
    let _attention = cluster.node(NodeOptions::attention()).await;
    let _first = cluster.node(NodeOptions::ffn()).await;
    assert_eq!(cluster.health("").await, ServingStatus::NotServing);
    let second = cluster.node(NodeOptions::ffn()).await;
    assert_eq!(second.role_rank, 1);
    cluster.wait_serving(true).await;
    assert_eq!(cluster.health("").await, ServingStatus::Serving);
    second.crash();
    cluster.wait_serving(false).await;
    let third = cluster.node(NodeOptions::ffn()).await;
    assert_eq!(third.role_rank, 1, "the lowest free rank");
    assert!(third.epoch > second.epoch);
    cluster.wait_serving(true).await;
}

#[tokio::test]
async fn a_stream_survives_the_death_of_its_attention_instance() {
    let (cluster, _other, _ffn) = {
        let cluster = Cluster::start(&json!({"num_attention": 2}));
        let ffn = cluster.node(NodeOptions::ffn()).await;
        let other = cluster.node(slow_attention()).await;
        (cluster, other, ffn)
    };
    let dying = cluster.node(slow_attention()).await;
    cluster.wait_serving(true).await;
    let mut client = cluster.client().await;
    let mut streams = Vec::new();
    for i in 0..6 {
        streams.push(
            client
                .generate(request(&[i, 7], 60))
                .await
                .expect("accepted"),
        );
    }
    dying.wait_until(|seen| seen.num_steps > 10).await;
    dying.crash();
    for (i, stream) in (0..6).zip(streams) {
        let collected = collect(stream.into_inner(), 1).await.expect("survives");
        assert_eq!(collected[0].token_ids, continuation(&[i, 7], 60));
    }
    cluster.wait_blocks_free().await;
}

#[tokio::test]
async fn a_stream_survives_the_death_and_return_of_an_ffn_instance() {
    let cluster = Cluster::start(&json!({}));
    let ffn = cluster.node(NodeOptions::ffn()).await;
    let attention = cluster.node(slow_attention()).await;
    cluster.wait_serving(true).await;
    let stream = cluster
        .client()
        .await
        .generate(request(&[3], 60))
        .await
        .expect("accepted");
    attention.wait_until(|seen| seen.num_steps > 5).await;
    ffn.crash();
    cluster.wait_serving(false).await;
    let _back = cluster.node(NodeOptions::ffn()).await;
    let collected = collect(stream.into_inner(), 1).await.expect("survives");
    assert_eq!(collected[0].token_ids, continuation(&[3], 60));
    assert_eq!(attention.seen().joined_tokens, [1], "its KV was never lost");
}

#[tokio::test]
async fn streams_leave_an_instance_that_cannot_link_to_a_replaced_ffn_instance() {
    let settings = json!({"lease_ms": 2_000, "recovery_timeout_ms": 2_000});
    let cluster = Cluster::start(&settings);
    let ffn = cluster.node(NodeOptions::ffn()).await;
    let links_once = NodeOptions {
        links_once: true,
        ..slow_attention()
    };
    let unlinked = cluster.node(links_once).await;
    cluster.wait_serving(true).await;
    let mut client = cluster.client().await;
    let moved = client.generate(request(&[3], 60)).await.expect("accepted");
    unlinked.wait_until(|seen| seen.num_steps > 5).await;
    ffn.crash();
    cluster.wait_serving(false).await;
    let _back = cluster.node(NodeOptions::ffn()).await;
    let other = cluster.node(slow_attention()).await;
    let status = unlinked.exited().await.expect_err("closed");
    assert_eq!(status.code(), Code::Aborted);
    assert!(
        status
            .message()
            .contains("not linked to every FFN instance for 2000 ms"),
        "{status}"
    );
    let collected = collect(moved.into_inner(), 1).await.expect("moved");
    assert_eq!(collected[0].token_ids, continuation(&[3], 60));
    assert!(other.seen().joined_tokens[0] > 1, "generated tokens travel");
}

#[tokio::test]
async fn when_no_instance_can_link_to_a_replaced_ffn_instance_streams_end_as_node_lost() {
    let settings = json!({"lease_ms": 2_000, "recovery_timeout_ms": 2_000});
    let cluster = Cluster::start(&settings);
    let ffn = cluster.node(NodeOptions::ffn()).await;
    let links_once = NodeOptions {
        links_once: true,
        ..slow_attention()
    };
    let unlinked = cluster.node(links_once).await;
    cluster.wait_serving(true).await;
    let mut client = cluster.client().await;
    let stream = client.generate(request(&[3], 60)).await.expect("accepted");
    unlinked.wait_until(|seen| seen.num_steps > 5).await;
    ffn.crash();
    cluster.wait_serving(false).await;
    let _back = cluster.node(NodeOptions::ffn()).await;
    let status = collect(stream.into_inner(), 1).await.expect_err("lost");
    assert_eq!(status.code(), Code::Unavailable);
    assert!(status.message().contains("2000 ms"), "{}", status.message());
}

#[tokio::test]
async fn when_nobody_comes_back_streams_end_as_node_lost() {
    let cluster = Cluster::start(&json!({"recovery_timeout_ms": 300}));
    let _ffn = cluster.node(NodeOptions::ffn()).await;
    let attention = cluster.node(slow_attention()).await;
    cluster.wait_serving(true).await;
    let stream = cluster
        .client()
        .await
        .generate(request(&[3], 60))
        .await
        .expect("accepted");
    attention.wait_until(|seen| seen.num_steps > 5).await;
    attention.crash();
    let status = collect(stream.into_inner(), 1).await.expect_err("lost");
    assert_eq!(status.code(), Code::Unavailable);
    assert!(status.message().contains("300 ms"), "{}", status.message());
}

#[tokio::test]
async fn an_instance_without_heartbeats_is_lost_after_its_lease() {
    let cluster = Cluster::start(&json!({"lease_ms": 1_500}));
    let _ffn = cluster.node(NodeOptions::ffn()).await;
    let silent = cluster.node(NodeOptions::attention()).await;
    cluster.wait_serving(true).await;
    silent.fall_silent();
    let status = silent.exited().await.expect_err("closed");
    assert!(
        status
            .message()
            .contains("no heartbeat for lease_ms = 1500"),
        "{status}"
    );
    cluster.wait_serving(false).await;
}

#[tokio::test]
async fn so_many_steps_of_a_lane_are_sent_before_any_is_answered() {
    for max_steps_in_flight in [1, 2, 4] {
        let settings = json!({"max_steps_in_flight": max_steps_in_flight});
        let cluster = Cluster::start(&settings);
        let _ffn = cluster.node(NodeOptions::ffn()).await;
        let stuck = NodeOptions {
            is_stuck: true,
            ..NodeOptions::attention()
        };
        let stuck = cluster.node(stuck).await;
        cluster.wait_serving(true).await;
        let mut client = cluster.client().await;
        let stream = client.generate(request(&[3], 9)).await.expect("accepted");
        stuck
            .wait_until(|seen| seen.num_plans == max_steps_in_flight)
            .await;
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert_eq!(stuck.seen().num_plans, max_steps_in_flight);
        drop(stream);
    }
}

#[tokio::test]
async fn an_instance_that_does_not_answer_a_step_is_replaced() {
    let settings = json!({"lease_ms": 2_000, "step_timeout_ms": 2_000});
    let cluster = Cluster::start(&settings);
    let _ffn = cluster.node(NodeOptions::ffn()).await;
    let stuck = NodeOptions {
        is_stuck: true,
        ..NodeOptions::attention()
    };
    let stuck = cluster.node(stuck).await;
    cluster.wait_serving(true).await;
    let stream = cluster
        .client()
        .await
        .generate(request(&[3], 9))
        .await
        .expect("accepted");
    let status = stuck.exited().await.expect_err("closed");
    assert!(
        status.message().contains("did not answer a step"),
        "{status}"
    );
    let _good = cluster.node(NodeOptions::attention()).await;
    let collected = collect(stream.into_inner(), 1).await.expect("moved");
    assert_eq!(collected[0].token_ids, continuation(&[3], 9));
}

#[tokio::test]
async fn a_peer_reported_lost_must_register_again() {
    let (cluster, attention, ffn) = Cluster::serving(&json!({})).await;
    let stale = v1::PeerLost {
        instance_id: ffn.instance_id,
        epoch: ffn.epoch - 1,
        reason: "an old incarnation".to_owned(),
    };
    send(&attention.requests, Event::PeerLost(stale.clone())).await;
    generate(&mut cluster.client().await, request(&[1], 3))
        .await
        .expect("no effect");
    let current = v1::PeerLost {
        epoch: ffn.epoch,
        reason: "connection reset".to_owned(),
        ..stale
    };
    send(&attention.requests, Event::PeerLost(current)).await;
    let status = ffn.exited().await.expect_err("closed");
    assert!(status.message().contains("connection reset"), "{status}");
    let _back = cluster.node(NodeOptions::ffn()).await;
    cluster.wait_serving(true).await;
    generate(&mut cluster.client().await, request(&[1], 3))
        .await
        .expect("serves again");
}

#[tokio::test]
async fn a_leaving_attention_instance_hands_its_streams_over() {
    let cluster = Cluster::start(&json!({}));
    let _ffn = cluster.node(NodeOptions::ffn()).await;
    let leaving = cluster.node(slow_attention()).await;
    cluster.wait_serving(true).await;
    let stream = cluster
        .client()
        .await
        .generate(request(&[3], 60))
        .await
        .expect("accepted");
    leaving.wait_until(|seen| seen.num_steps > 5).await;
    let other = cluster.node(NodeOptions::attention()).await;
    send(&leaving.requests, Event::Leaving(v1::Leaving {})).await;
    let collected = collect(stream.into_inner(), 1).await.expect("survives");
    assert_eq!(collected[0].token_ids, continuation(&[3], 60));
    assert!(other.seen().joined_tokens[0] > 1, "generated tokens travel");
}

#[tokio::test]
async fn instances_that_do_not_fit_are_refused_with_the_reason() {
    let (cluster, _attention, _ffn) = Cluster::serving(&json!({})).await;
    let other_model = {
        let mut hello = hello(v1::Role::Attention);
        hello.model_fingerprint = "other".to_owned();
        hello
    };
    let other_vocab = {
        let mut hello = hello(v1::Role::Attention);
        hello.model.as_mut().expect("set").vocab_size = 7;
        hello
    };
    let other_version = v1::Hello {
        protocol_version: 999,
        ..hello(v1::Role::Attention)
    };
    for (bad, code, text) in [
        (other_model, Code::FailedPrecondition, "fingerprint other"),
        (other_vocab, Code::FailedPrecondition, "vocab_size = 7"),
        (
            other_version,
            Code::FailedPrecondition,
            "protocol version 999",
        ),
        (
            hello(v1::Role::Ffn),
            Code::ResourceExhausted,
            "all 1 FFN ranks are taken",
        ),
        (
            hello(v1::Role::Unspecified),
            Code::FailedPrecondition,
            "no role",
        ),
    ] {
        let status = connect(cluster.control_address, bad).await.expect_err(text);
        assert_eq!(status.code(), code, "{status}");
        assert!(status.message().contains(text), "{status}");
    }
    generate(&mut cluster.client().await, request(&[1], 3))
        .await
        .expect("serves on");
}

#[tokio::test]
async fn an_instance_that_sends_a_flood_of_empty_elements_loses_its_session_and_nobody_else_does() {
    let (cluster, attention, _ffn) = Cluster::serving(&json!({})).await;
    let broken = cluster.node(NodeOptions::attention()).await;
    let output = v1::StepOutput {
        epoch: broken.epoch,
        outputs: vec![v1::SequenceOutput::default(); 200_000],
        ..Default::default()
    };
    send(&broken.requests, Event::StepOutput(output)).await;
    eventually("the end of its session", async || {
        let listed = cluster.instances().await.instances;
        listed
            .iter()
            .all(|info| info.instance_id != broken.instance_id)
    })
    .await;
    let stream = generate(&mut cluster.client().await, request(&[1], 3)).await;
    assert_eq!(stream.expect("serves on").token_ids, continuation(&[1], 3));
    assert!(attention.seen().num_steps > 0);
}

#[tokio::test]
async fn list_instances_tells_states_links_and_free_blocks() {
    let cluster = Cluster::start(&json!({}));
    let _ffn = cluster.node(NodeOptions::ffn()).await;
    let attention = cluster.node(slow_attention()).await;
    cluster.wait_serving(true).await;
    let stream = cluster
        .client()
        .await
        .generate(request(&[1; 40], 100))
        .await
        .expect("accepted");
    attention.wait_until(|seen| seen.num_steps > 0).await;
    let listed = cluster.instances().await;
    assert!(listed.is_serving, "{}", listed.status);
    let info = listed
        .instances
        .iter()
        .find(|info| info.instance_id == attention.instance_id)
        .expect("listed");
    assert_eq!((info.state.as_str(), info.num_kv_blocks), ("ready", 64));
    assert!(
        (55..62).contains(&info.num_free_kv_blocks),
        "{}",
        info.num_free_kv_blocks
    );
    assert_eq!(
        (info.links.len(), info.links[0].fabric.as_str()),
        (1, "tcp")
    );
    drop(stream);
    cluster.wait_blocks_free().await;
    eventually("JSON", async || {
        let address = cluster.control_address.to_string();
        let asked = tokio::task::spawn_blocking(move || {
            step3rt_server::list_instances(&address, None, Duration::from_secs(5))
        });
        let text = asked.await.expect("no panic").expect("answers");
        let json: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        json["is_serving"] == true && json["instances"][0]["role"] == "ffn"
    })
    .await;
}
