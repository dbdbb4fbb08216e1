//! What is refused, with which code, reason and advice; and that the cluster goes on serving.

use serde_json::json;
use step3rt_proto::v1;
use step3rt_proto::v1::generate_request::Prompt;
use tonic::{Code, Status};
use tonic_types::StatusExt;

use crate::cluster::{Cluster, generate, request};
use crate::node::{NodeOptions, continuation};

fn reason(status: &Status) -> String {
    status
        .get_details_error_info()
        .map_or_else(String::new, |info| info.reason)
}

fn changed(change: impl FnOnce(&mut v1::GenerateRequest)) -> v1::GenerateRequest {
    let mut asked = request(&[1, 2, 3], 4);
    change(&mut asked);
    asked
}

fn sampling(asked: &mut v1::GenerateRequest) -> &mut v1::SamplingParams {
    asked.sampling.as_mut().expect("set")
}

fn stopping(asked: &mut v1::GenerateRequest) -> &mut v1::StoppingCriteria {
    asked.stopping.as_mut().expect("set")
}

/// What is wrong, the request, and the reason and field that it is refused with.
type BadRequest = (
    &'static str,
    v1::GenerateRequest,
    &'static str,
    &'static str,
);

fn bad_requests() -> Vec<BadRequest> {
    let mut bad = bad_prompts();
    bad.extend(bad_parameters());
    bad
}

fn bad_prompts() -> Vec<BadRequest> {
    let prompt = |prompt| changed(move |asked| asked.prompt = prompt);
    let tokens = |ids: Vec<u32>| Some(Prompt::TokenIds(v1::TokenIds { ids }));
    vec![
        ("no prompt", prompt(None), "INVALID_PARAMETER", "prompt"),
        (
            "empty prompt",
            prompt(tokens(vec![])),
            "INVALID_PARAMETER",
            "prompt",
        ),
        (
            "empty text",
            prompt(Some(Prompt::Text(String::new()))),
            "INVALID_PARAMETER",
            "prompt",
        ),
        (
            "token out of range",
            prompt(tokens(vec![1, 259])),
            "INVALID_PARAMETER",
            "token_ids",
        ),
        (
            "prompt fills context",
            prompt(tokens(vec![1; 512])),
            "PROMPT_TOO_LONG",
            "token_ids",
        ),
        (
            "text fills context",
            prompt(Some(Prompt::Text("a ".repeat(400)))),
            "PROMPT_TOO_LONG",
            "prompt",
        ),
        (
            "text of a megabyte",
            prompt(Some(Prompt::Text("a".repeat(1 << 20)))),
            "PROMPT_TOO_LONG",
            "text",
        ),
    ]
}

fn bad_parameters() -> Vec<BadRequest> {
    vec![
        (
            "context overflow",
            changed(|asked| stopping(asked).max_tokens = Some(510)),
            "INVALID_PARAMETER",
            "stopping.max_tokens",
        ),
        (
            "negative max_tokens on the wire",
            changed(|asked| stopping(asked).max_tokens = Some(u32::MAX)),
            "INVALID_PARAMETER",
            "stopping.max_tokens",
        ),
        (
            "NaN temperature",
            changed(|asked| sampling(asked).temperature = Some(f32::NAN)),
            "INVALID_PARAMETER",
            "sampling.temperature",
        ),
        (
            "stop string of a megabyte",
            changed(|asked| stopping(asked).stop = vec!["x".repeat(1 << 20)]),
            "INVALID_PARAMETER",
            "stopping.stop",
        ),
        (
            "bad chat JSON",
            changed(|asked| {
                asked.prompt = Some(Prompt::Chat(v1::ChatPrompt {
                    messages_json: "{".to_owned(),
                    ..Default::default()
                }));
            }),
            "INVALID_PARAMETER",
            "chat",
        ),
        (
            "an image among texts",
            changed(|asked| {
                asked.prompt = Some(Prompt::Chat(v1::ChatPrompt {
                    messages_json: r#"[{"role": "user", "content": [{"type": "image"}]}]"#
                        .to_owned(),
                    ..Default::default()
                }));
            }),
            "UNSUPPORTED_FEATURE",
            "chat",
        ),
        (
            "bad request id",
            changed(|asked| asked.request_id.push_str("a b")),
            "INVALID_PARAMETER",
            "request_id",
        ),
        (
            "images",
            changed(|asked| asked.media = vec![v1::Media::default()]),
            "UNSUPPORTED_FEATURE",
            "media",
        ),
        (
            "penalty out of range",
            changed(|asked| sampling(asked).frequency_penalty = Some(2.5)),
            "INVALID_PARAMETER",
            "sampling.frequency_penalty",
        ),
        (
            "another model",
            changed(|asked| asked.model.push_str("gpt")),
            "MODEL_NOT_FOUND",
            "model",
        ),
    ]
}

#[tokio::test]
async fn bad_requests_get_one_clear_error_each_and_the_cluster_goes_on() {
    let (cluster, _attention, _ffn) = Cluster::serving(&json!({})).await;
    let mut client = cluster.client().await;
    for (name, asked, expected_reason, field) in bad_requests() {
        let status = generate(&mut client, asked).await.expect_err(name);
        let expected_code = match expected_reason {
            "MODEL_NOT_FOUND" => Code::NotFound,
            _ => Code::InvalidArgument,
        };
        assert_eq!(
            (status.code(), reason(&status).as_str()),
            (expected_code, expected_reason),
            "{name}"
        );
        let details = status.get_details_bad_request().expect(name);
        assert_eq!(details.field_violations[0].field, field, "{name}");
        assert!(status.message().len() < 600, "{name}: {}", status.message());
    }
    let stream = generate(&mut client, request(&[1, 2, 3], 4))
        .await
        .expect("goes on");
    assert_eq!(stream.token_ids, continuation(&[1, 2, 3], 4));
    cluster.wait_blocks_free().await;
}

/// Two bytes on the wire become a struct of 72 and more: 400 KB of them would be 14 MB.
#[tokio::test]
async fn a_flood_of_empty_elements_is_refused_before_it_takes_memory() {
    let (cluster, _attention, _ffn) = Cluster::serving(&json!({})).await;
    let mut client = cluster.client().await;
    let media = changed(|asked| asked.media = vec![v1::Media::default(); 200_000]);
    let stop = changed(|asked| stopping(asked).stop = vec![String::new(); 200_000]);
    for (asked, field) in [(media, "media"), (stop, "stop")] {
        let status = generate(&mut client, asked).await.expect_err(field);
        assert_eq!(status.code(), Code::InvalidArgument, "{status}");
        let details = status.get_details_bad_request().expect(field);
        assert_eq!(details.field_violations[0].field, field);
        assert!(status.message().contains("memory"), "{status}");
    }
    let stream = generate(&mut client, request(&[1, 2, 3], 4)).await;
    assert_eq!(
        stream.expect("goes on").token_ids,
        continuation(&[1, 2, 3], 4)
    );
}

#[tokio::test]
async fn an_abort_of_too_many_ids_is_refused() {
    let cluster = Cluster::start(&json!({}));
    let mut client = cluster.client().await;
    let ids = |count| v1::AbortRequest {
        request_ids: vec!["nobody".to_owned(); count],
    };
    assert!(client.abort(ids(4_096)).await.is_ok());
    for (count, text) in [(4_097, "4097 ids exceed"), (400_000, "memory")] {
        let status = client.abort(ids(count)).await.expect_err("too many");
        assert_eq!(reason(&status), "INVALID_PARAMETER");
        assert!(status.message().contains(text), "{status}");
    }
}

#[tokio::test]
async fn without_max_tokens_the_context_is_filled() {
    let (cluster, _attention, _ffn) = Cluster::serving(&json!({"max_model_len": 40})).await;
    let asked = changed(|asked| stopping(asked).max_tokens = None);
    let stream = generate(&mut cluster.client().await, asked)
        .await
        .expect("succeeds");
    assert_eq!(stream.token_ids.len(), 37);
}

#[tokio::test]
async fn a_request_that_the_kv_pool_cannot_hold_is_refused() {
    let cluster = Cluster::start(&json!({}));
    let _ffn = cluster.node(NodeOptions::ffn()).await;
    let small = NodeOptions {
        num_kv_blocks: 4,
        ..NodeOptions::attention()
    };
    let _attention = cluster.node(small).await;
    cluster.wait_serving(true).await;
    let mut client = cluster.client().await;
    let status = generate(&mut client, request(&[1; 60], 10))
        .await
        .expect_err("5 blocks of 4");
    assert_eq!(reason(&status), "PROMPT_TOO_LONG");
    assert!(generate(&mut client, request(&[1; 50], 10)).await.is_ok());

    // Without max_tokens it is asked for no more than the pool holds: 4 blocks of 16, and a last
    // token that needs no place.
    for (num_prompt, num_tokens) in [(50, 15), (63, 2), (64, 1)] {
        let mut asked = request(&vec![1; num_prompt], 1);
        stopping(&mut asked).max_tokens = None;
        let stream = generate(&mut client, asked).await.expect("fits");
        assert_eq!(stream.token_ids.len(), num_tokens);
        assert_eq!(
            stream.finished.expect("ends").reason(),
            v1::FinishReason::Length
        );
    }
    let mut too_long = request(&[1; 65], 1);
    stopping(&mut too_long).max_tokens = None;
    let status = generate(&mut client, too_long)
        .await
        .expect_err("the prompt alone needs 5 blocks");
    assert_eq!(reason(&status), "PROMPT_TOO_LONG");
}

#[tokio::test]
async fn a_live_request_id_is_refused_and_free_again_after_the_end() {
    let (cluster, _attention, _ffn) = Cluster::serving(&json!({})).await;
    let mut client = cluster.client().await;
    let named = changed(|asked| {
        asked.request_id = "one".to_owned();
        stopping(asked).max_tokens = Some(400);
    });
    let mut first = client
        .generate(named.clone())
        .await
        .expect("accepted")
        .into_inner();
    assert!(first.message().await.expect("starts").is_some());
    let status = generate(&mut client, named.clone())
        .await
        .expect_err("live");
    assert_eq!(status.code(), Code::AlreadyExists);
    assert_eq!(reason(&status), "DUPLICATE_REQUEST_ID");
    while first.message().await.expect("goes on").is_some() {}
    assert!(generate(&mut client, named).await.is_ok());
}

#[tokio::test]
async fn before_the_cluster_serves_requests_are_told_to_retry() {
    let cluster = Cluster::start(&json!({}));
    let status = generate(&mut cluster.client().await, request(&[1], 1))
        .await
        .expect_err("no instance");
    assert_eq!(
        (status.code(), reason(&status).as_str()),
        (Code::Unavailable, "ENGINE_NOT_READY")
    );
    assert!(
        status
            .get_details_retry_info()
            .expect("RetryInfo")
            .retry_delay
            .is_some()
    );
    assert!(
        status.message().contains("0 of 1 FFN ready"),
        "{}",
        status.message()
    );
}

#[tokio::test]
async fn a_full_queue_is_told_to_retry_later() {
    let settings = json!({"max_waiting_requests": 1, "max_sequences_per_lane": 1});
    let cluster = Cluster::start(&settings);
    let _ffn = cluster.node(NodeOptions::ffn()).await;
    let stuck = NodeOptions {
        is_stuck: true,
        ..NodeOptions::attention()
    };
    let _attention = cluster.node(stuck).await;
    cluster.wait_serving(true).await;
    let mut client = cluster.client().await;
    let mut streams = Vec::new();
    for _ in 0..3 {
        streams.push(
            client
                .generate(request(&[1], 1))
                .await
                .expect("2 places, 1 waits"),
        );
    }
    let status = generate(&mut client, request(&[1], 1))
        .await
        .expect_err("full");
    assert_eq!(
        (status.code(), reason(&status).as_str()),
        (Code::ResourceExhausted, "QUEUE_FULL")
    );
    assert!(status.get_details_retry_info().is_some());
}

#[tokio::test]
async fn corrupt_logits_fail_their_request_alone_with_an_id_for_the_log() {
    let cluster = Cluster::start(&json!({}));
    let _ffn = cluster.node(NodeOptions::ffn()).await;
    let corrupting = NodeOptions {
        corrupts: Some(66),
        ..NodeOptions::attention()
    };
    let _attention = cluster.node(corrupting).await;
    cluster.wait_serving(true).await;
    let mut client = cluster.client().await;
    let good = client.generate(request(&[1], 50)).await.expect("accepted");
    let status = generate(&mut client, request(&[66], 5))
        .await
        .expect_err("corrupt");
    assert_eq!(
        (status.code(), reason(&status).as_str()),
        (Code::Internal, "INTERNAL")
    );
    assert!(
        !status.message().contains("logits"),
        "diagnostics stay in the log"
    );
    let good = crate::cluster::collect(good.into_inner(), 1)
        .await
        .expect("not harmed");
    assert_eq!(good[0].token_ids, continuation(&[1], 50));
    cluster.wait_blocks_free().await;
}
