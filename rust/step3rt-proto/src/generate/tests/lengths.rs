//! Prompts, resumed tokens and `max_tokens` against the context and the KV pool.

use super::*;

#[test]
fn prompts_that_cannot_be_are_refused() {
    assert_eq!(refused(v1::GenerateRequest::default()).1, ["prompt"]);
    assert_eq!(refused(request(&[99, 100])).1, ["token_ids"]);
    assert_eq!(refused(request(&[1; 16])).0, ErrorKind::PromptTooLong);
    let text = |text: &str| v1::GenerateRequest {
        prompt: Some(WirePrompt::Text(text.to_owned())),
        ..Default::default()
    };
    assert_eq!(refused(text("")).1, ["prompt"]);
    assert!(check(text("x"), &limits(), 7).is_ok());
}

#[test]
fn an_empty_prompt_is_refused() {
    let refusal = check(request(&[]), &limits(), 7)
        .expect("valid so far")
        .into_request(RequestId(1), vec![], &limits())
        .expect_err("empty");
    assert_eq!(refusal.error.kind, ErrorKind::InvalidParameter);
}

fn resuming(tokens: &[u32], sampling: v1::SamplingParams) -> v1::GenerateRequest {
    v1::GenerateRequest {
        resume_token_ids: Some(v1::TokenIds { ids: tokens.into() }),
        ..with_sampling(sampling)
    }
}

#[test]
fn what_is_resumed_is_one_stream_of_the_models_tokens_that_fits_the_context() {
    let one = v1::SamplingParams::default;
    assert_eq!(refused(resuming(&[4, 100], one())).1, ["resume_token_ids"]);
    assert_eq!(
        refused(resuming(&[4; 16], one())).0,
        ErrorKind::PromptTooLong
    );
    let of = |n| v1::SamplingParams {
        n: Some(n),
        ..Default::default()
    };
    assert_eq!(refused(resuming(&[4], of(2))).1, ["resume_token_ids"]);
    assert!(check(resuming(&[4], of(1)), &limits(), 7).is_ok());
    // The prompt leaves room for a token, and resumed ones may fill the context of 16.
    for (num_prompt, num_resumed, fits) in [
        (6, 10, true),
        (7, 10, false),
        (15, 0, true),
        (15, 1, true),
        (16, 0, false),
    ] {
        let params = check(resuming(&vec![4; num_resumed], one()), &limits(), 7).expect("valid");
        let prompt = vec![TokenId(1); num_prompt];
        let made = params.into_request(RequestId(1), prompt, &limits());
        let kind = made.map_err(|refusal| refusal.error.kind).err();
        let expected = (!fits).then_some(ErrorKind::PromptTooLong);
        assert_eq!(kind, expected, "{num_prompt} and {num_resumed}");
    }
}

#[test]
fn without_max_tokens_the_rest_of_the_context_is_generated() {
    let params = check(request(&[1, 2, 3]), &limits(), 7).expect("valid");
    let request = params
        .into_request(RequestId(1), vec![TokenId(1); 3], &limits())
        .expect("fits");
    assert_eq!(request.max_tokens, 13);
}

#[test]
fn without_max_tokens_what_the_kv_pool_holds_is_generated() {
    let filled = |num_prompt, longest, min_tokens| {
        let mut params = check(request(&[1]), &limits(), 7).expect("valid");
        params.sampling.min_tokens = min_tokens;
        params.fill_max_tokens(num_prompt, longest, &limits());
        params.max_tokens.expect("filled")
    };
    assert_eq!(filled(3, None, 0), 13, "the context holds 16");
    assert_eq!(filled(3, Some(16), 0), 13);
    assert_eq!(filled(3, Some(9), 0), 6);
    assert_eq!(filled(3, Some(4), 0), 1);
    assert_eq!(filled(3, Some(3), 0), 1, "which the scheduler refuses");
    assert_eq!(filled(3, Some(9), 8), 8, "as this");
    assert_eq!(filled(3, Some(9), 16), 13);
    assert_eq!(filled(99, Some(9), 0), 1);

    let mut asked = check(request(&[1]), &limits(), 7).expect("valid");
    asked.max_tokens = Some(12);
    asked.fill_max_tokens(3, Some(9), &limits());
    assert_eq!(asked.max_tokens, Some(12), "what is asked stays");

    let mut resumed = check(request(&[1]), &limits(), 7).expect("valid");
    resumed.resumed = vec![TokenId(4); 8];
    resumed.fill_max_tokens(3, Some(9), &limits());
    assert_eq!(resumed.max_tokens, Some(8), "which the scheduler refuses");
}

#[test]
fn resumed_tokens_count_towards_max_tokens() {
    let resumed = v1::GenerateRequest {
        resume_token_ids: Some(v1::TokenIds { ids: vec![4, 5] }),
        ..with_stopping(v1::StoppingCriteria {
            max_tokens: Some(15),
            ..Default::default()
        })
    };
    let params = check(resumed.clone(), &limits(), 7).expect("valid");
    let request = params
        .into_request(RequestId(1), vec![TokenId(1)], &limits())
        .expect("fits");
    assert_eq!((request.max_tokens, request.resumed.len()), (15, 2));

    let mut done = resumed;
    done.stopping = Some(v1::StoppingCriteria {
        max_tokens: Some(1),
        ..Default::default()
    });
    assert_eq!(refused(done).1, ["stopping.max_tokens"]);
}

#[test]
fn more_tokens_than_the_context_holds_are_refused_with_the_most_that_fits() {
    let asked = with_stopping(v1::StoppingCriteria {
        max_tokens: Some(16),
        ..Default::default()
    });
    let refusal = check(asked, &limits(), 7)
        .expect("valid so far")
        .into_request(RequestId(1), vec![TokenId(1)], &limits())
        .expect_err("15 at most");
    assert_eq!(refusal.error.kind, ErrorKind::InvalidParameter);
    assert!(
        refusal.error.message.contains("at most 15"),
        "{}",
        refusal.error.message
    );
}
