//! Streams of a healthy cluster.

use serde_json::json;
use step3rt_proto::v1;
use step3rt_proto::v1::finished::Matched;
use step3rt_proto::v1::generate_request::Prompt;

use crate::cluster::{Cluster, collect, generate, request};
use crate::node::continuation;

#[tokio::test]
async fn a_greedy_stream_has_every_token_once_and_its_text() {
    let (cluster, _attention, _ffn) = Cluster::serving(&json!({})).await;
    let prompt = [104, 101, 108];
    let stream = generate(&mut cluster.client().await, request(&prompt, 40))
        .await
        .expect("succeeds");
    let expected = continuation(&prompt, 40);
    assert_eq!(stream.token_ids, expected);
    let text: Vec<u8> = expected
        .iter()
        .map(|id| u8::try_from(*id).expect("byte"))
        .collect();
    assert_eq!(stream.text.as_bytes(), text);
    let finished = stream.finished.expect("finished");
    assert_eq!(finished.reason(), v1::FinishReason::Length);
    let usage = finished.usage.expect("usage");
    assert_eq!((usage.prompt_tokens, usage.completion_tokens), (3, 40));
    cluster.wait_blocks_free().await;
    assert_eq!(cluster.stop().await, 0);
}

#[tokio::test]
async fn a_long_prompt_is_computed_in_chunks_with_the_same_result() {
    let (cluster, _attention, _ffn) = Cluster::serving(&json!({})).await;
    let prompt: Vec<u32> = (0..300).map(|i| 97 + i % 26).collect();
    let mut asked = request(&prompt, 5);
    asked.output = Some(v1::OutputOptions {
        prompt_logprobs: Some(0),
        top_logprobs: Some(0),
        ..Default::default()
    });
    let stream = generate(&mut cluster.client().await, asked)
        .await
        .expect("succeeds");
    assert_eq!(stream.token_ids, continuation(&prompt, 5));
    assert_eq!(stream.logprobs.len(), 5);
    let ids: Vec<u32> = stream.prompt_logprobs.iter().map(|l| l.token_id).collect();
    assert_eq!(ids, prompt[1..]);
    assert!(
        stream
            .prompt_logprobs
            .iter()
            .all(|l| (l.logprob + 9999.0).abs() < 0.5)
    );
}

#[tokio::test]
async fn a_stop_string_ends_text_before_it_and_tokens_with_the_one_that_completed_it() {
    let (cluster, _attention, _ffn) = Cluster::serving(&json!({})).await;
    let prompt = [104, 105];
    let tokens = continuation(&prompt, 30);
    let text: String = tokens.iter().filter_map(|id| char::from_u32(*id)).collect();
    let stop = text[10..13].to_owned();
    let end = text.find(&stop).expect("there") + 3;
    let mut asked = request(&prompt, 30);
    asked.stopping.as_mut().expect("set").stop = vec!["never".to_owned(), stop.clone()];
    let mut client = cluster.client().await;
    let stream = generate(&mut client, asked.clone())
        .await
        .expect("succeeds");
    assert_eq!(stream.text, text[..end - 3]);
    assert_eq!(stream.token_ids, tokens[..end]);
    let finished = stream.finished.expect("finished");
    assert_eq!(finished.reason(), v1::FinishReason::Stop);
    assert_eq!(finished.matched, Some(Matched::StopString(stop)));
    assert_eq!(
        finished.usage.expect("usage").completion_tokens as usize,
        end
    );

    asked.stopping.as_mut().expect("set").include_stop = Some(true);
    let stream = generate(&mut client, asked).await.expect("succeeds");
    assert_eq!(stream.text, text[..end]);
    cluster.wait_blocks_free().await;
}

#[tokio::test]
async fn a_stop_id_ends_the_stream_and_is_its_last_token() {
    let (cluster, _attention, _ffn) = Cluster::serving(&json!({})).await;
    let prompt = [104, 105];
    let tokens = continuation(&prompt, 30);
    let stop = tokens[7];
    let end = tokens.iter().position(|id| *id == stop).expect("there") + 1;
    let mut asked = request(&prompt, 30);
    asked.stopping.as_mut().expect("set").stop_token_ids = vec![stop];
    let stream = generate(&mut cluster.client().await, asked)
        .await
        .expect("succeeds");
    assert_eq!(stream.token_ids, tokens[..end]);
    assert_eq!(stream.text.len(), end - 1);
    let finished = stream.finished.expect("finished");
    assert_eq!(finished.matched, Some(Matched::StopTokenId(stop)));
}

#[tokio::test]
async fn a_resumed_stream_goes_on_where_the_first_ended() {
    let (cluster, _attention, _ffn) = Cluster::serving(&json!({})).await;
    let prompt = [104, 105];
    let tokens = continuation(&prompt, 20);
    let mut asked = request(&prompt, 20);
    asked.resume_token_ids = Some(v1::TokenIds {
        ids: tokens[..12].to_vec(),
    });
    let mut stream = cluster
        .client()
        .await
        .generate(asked)
        .await
        .expect("accepted")
        .into_inner();
    let mut position = 12;
    let mut resumed = Vec::new();
    while let Some(response) = stream.message().await.expect("succeeds") {
        if let Some(v1::generate_response::Event::Delta(delta)) = response.event {
            assert_eq!(delta.sequence, position);
            position += delta.token_ids.len() as u64;
            resumed.extend(delta.token_ids);
        }
    }
    assert_eq!(resumed, tokens[12..]);
}

#[tokio::test]
async fn n_continuations_finish_each() {
    let (cluster, _attention, _ffn) = Cluster::serving(&json!({})).await;
    let mut asked = request(&[1, 2, 3], 9);
    asked.sampling.as_mut().expect("set").n = Some(5);
    let stream = cluster
        .client()
        .await
        .generate(asked)
        .await
        .expect("accepted");
    let collected = collect(stream.into_inner(), 5).await.expect("succeeds");
    for entry in collected {
        assert_eq!(entry.token_ids, continuation(&[1, 2, 3], 9));
        assert!(entry.finished.is_some());
    }
}

#[tokio::test]
async fn text_and_chat_prompts_are_tokenised() {
    let (cluster, _attention, _ffn) = Cluster::serving(&json!({})).await;
    let mut client = cluster.client().await;
    let mut asked = request(&[], 4);
    asked.prompt = Some(Prompt::Text("xyz".to_owned()));
    let stream = generate(&mut client, asked.clone())
        .await
        .expect("succeeds");
    assert_eq!(stream.token_ids, continuation(&[120, 121, 122], 4));

    let rendered = "<|BOT|>user\nhi<|EOT|><|BOT|>assistant\n";
    let tokenized = client
        .tokenize(v1::TokenizeRequest {
            text: rendered.to_owned(),
            add_special_tokens: Some(false),
        })
        .await
        .expect("tokenises")
        .into_inner();
    // The second one is long enough to be rendered on a thread of its own.
    for padding in ["", &" ".repeat(64 * 1024)] {
        asked.prompt = Some(Prompt::Chat(v1::ChatPrompt {
            messages_json: format!(r#"[{padding}{{"role": "user", "content": "hi"}}]"#),
            ..Default::default()
        }));
        let stream = generate(&mut client, asked.clone())
            .await
            .expect("succeeds");
        assert_eq!(stream.token_ids, continuation(&tokenized.token_ids, 4));
    }

    let text = client
        .detokenize(v1::DetokenizeRequest {
            token_ids: tokenized.token_ids,
            skip_special_tokens: Some(false),
        })
        .await
        .expect("detokenises")
        .into_inner()
        .text;
    assert_eq!(text, rendered);

    let refused = client
        .detokenize(v1::DetokenizeRequest {
            token_ids: vec![1, 1_000_000],
            skip_special_tokens: None,
        })
        .await
        .expect_err("an id of another model");
    assert_eq!(refused.code(), tonic::Code::InvalidArgument);
    assert!(
        refused.message().contains("id 1000000 at position 1"),
        "{refused}"
    );
}

#[tokio::test]
async fn output_options_leave_out_what_is_not_wanted() {
    let (cluster, _attention, _ffn) = Cluster::serving(&json!({})).await;
    let mut client = cluster.client().await;
    let mut asked = request(&[1, 2], 6);
    asked.output = Some(v1::OutputOptions {
        text: Some(false),
        ..Default::default()
    });
    let stream = generate(&mut client, asked.clone())
        .await
        .expect("succeeds");
    assert_eq!((stream.text.as_str(), stream.token_ids.len()), ("", 6));
    asked.output = Some(v1::OutputOptions {
        token_ids: Some(false),
        ..Default::default()
    });
    let stream = generate(&mut client, asked).await.expect("succeeds");
    assert_eq!((stream.text.len(), stream.token_ids.len()), (6, 0));
}

#[tokio::test]
async fn model_info_tells_limits_and_fingerprint() {
    let (cluster, _attention, _ffn) = Cluster::serving(&json!({"model_name": "nano"})).await;
    let info = cluster
        .client()
        .await
        .get_model_info(v1::GetModelInfoRequest {})
        .await
        .expect("told")
        .into_inner();
    assert_eq!(info.model, "nano");
    assert_eq!((info.vocab_size, info.max_model_len), (259, 512));
    assert_eq!(info.eos_token_ids, [257]);
    assert_eq!(info.checkpoint_sha256, "fingerprint");
    assert_eq!(info.limits.expect("limits").max_n, 128);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_hundred_concurrent_streams_are_all_correct_and_leak_no_block() {
    let (cluster, _attention, _ffn) = Cluster::serving(&json!({})).await;
    let client = cluster.client().await;
    let tasks: Vec<_> = (0..200_u32)
        .map(|i| {
            let mut client = client.clone();
            tokio::spawn(async move {
                let prompt: Vec<u32> = (0..=i % 40).map(|j| (i * 7 + j) % 250).collect();
                let num_tokens = 5 + i % 30;
                let stream = generate(&mut client, request(&prompt, num_tokens)).await;
                let expected = continuation(&prompt, num_tokens as usize);
                assert_eq!(stream.expect("succeeds").token_ids, expected);
            })
        })
        .collect();
    for task in tasks {
        task.await.expect("correct");
    }
    cluster.wait_blocks_free().await;
    assert_eq!(cluster.stop().await, 0);
}

#[tokio::test]
async fn a_tenant_finds_only_its_own_beginnings_in_the_cache() {
    let (cluster, _attention, _ffn) = Cluster::serving(&json!({})).await;
    let mut client = cluster.client().await;
    let prompt: Vec<u32> = (0..100).map(|i| 97 + i % 26).collect();
    for (tenant, num_cached) in [
        (None, 0),
        (Some("team-a"), 0),
        (Some("team-b"), 0),
        (Some("team-a"), 96),
        (None, 96),
        (Some(""), 96),
    ] {
        let mut asked = request(&prompt, 3);
        asked.tenant = tenant.map(str::to_owned);
        let mut stream = client.generate(asked).await.expect("succeeds").into_inner();
        let first = stream
            .message()
            .await
            .expect("a stream")
            .and_then(|m| m.event);
        let Some(v1::generate_response::Event::Started(started)) = first else {
            panic!("not {first:?}");
        };
        assert_eq!(started.cached_tokens, num_cached, "{tenant:?}");
        while stream.message().await.expect("a stream").is_some() {}
    }
}
