use super::*;

fn asked_for(prompt: &[u32], resumed: &[u32]) -> Continuation {
    let tokens = |ids: &[u32]| ids.iter().copied().map(TokenId).collect::<Vec<_>>();
    Continuation {
        request: RequestId(0),
        index: 0,
        tenant: TenantId(0),
        rank: Rank {
            priority: 0,
            arrival: 0,
        },
        prompt: tokens(prompt).into(),
        resumed: tokens(resumed),
        sampling: SamplingState {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            seed: 0,
            top_logprobs: None,
            prompt_logprobs: Some(0),
            min_tokens: 0,
            stop_tokens: Vec::new(),
            adjustments: None,
        },
        max_known_tokens: 100,
        submitted: TimeNs(0),
    }
}

impl Sequence {
    /// Waits; greedy, without stop ids, up to 100 tokens.
    pub(crate) fn for_tests(prompt: &[u32], generated: &[u32]) -> Self {
        Self::new(asked_for(prompt, generated))
    }

    fn moved_in(mut self) -> Self {
        self.stay = Some(Stay::for_tests(1));
        self
    }
}

fn output(token: Option<u32>, logprobs: &[u32]) -> SequenceOutput {
    let logprob = |&token: &u32| TokenLogprob {
        token: TokenId(token),
        logprob: -1.0,
        top: Vec::new(),
    };
    SequenceOutput {
        sequence: SequenceId(1),
        token: token.map(TokenId),
        logprob: None,
        prompt_logprobs: logprobs.iter().map(logprob).collect(),
        is_corrupt: false,
    }
}

fn asked(num_new_tokens: u32, samples: bool) -> Asked {
    Asked {
        sequence: SequenceId(1),
        num_computed_tokens: 0,
        num_new_tokens,
        samples,
    }
}

#[test]
fn blocks_run_across_the_prompts_end() {
    let sequence = Sequence::for_tests(&[1, 2, 3, 4, 5], &[6, 7, 8, 9]);
    let ids = |index| -> Vec<u32> {
        let block = sequence.full_block(index, 2);
        block.iter().map(|token| token.0).collect()
    };
    assert_eq!([ids(0), ids(2), ids(3)], [[1, 2], [5, 6], [7, 8]]);
}

#[test]
fn the_last_token_and_prompts_with_logprobs_are_always_computed() {
    let mut sequence = Sequence::for_tests(&[1, 2, 3, 4], &[]);
    assert_eq!(sequence.reusable_blocks(2).count(), 0);
    sequence.details.sampling.prompt_logprobs = None;
    assert_eq!(sequence.reusable_blocks(2).count(), 1);
    sequence.learn(TokenId(5));
    assert_eq!(sequence.reusable_blocks(2).count(), 2);
}

#[test]
fn a_sampled_token_is_known_and_not_yet_computed() {
    let mut sequence = Sequence::for_tests(&[1, 2, 3], &[]).moved_in();
    let mut events = Vec::new();
    let taken = (asked(3, true), Some(output(Some(9), &[])));
    assert_eq!(sequence.accept(TimeNs(4), taken, &mut events), Ok(None));
    assert_eq!(sequence.num_known_tokens(), 4);
    assert_eq!(
        sequence.stay.as_ref().map(|s| s.num_computed_tokens),
        Some(3)
    );
    assert_eq!(sequence.details.first_token, Some(TimeNs(4)));
    assert_eq!(events.len(), 1);
}

#[test]
fn nothing_is_taken_from_an_answer_that_does_not_fit() {
    let mut sequence = Sequence::for_tests(&[1, 2, 3], &[]).moved_in();
    let mut corrupt = output(Some(9), &[5]);
    corrupt.is_corrupt = true;
    let mut elsewhere = asked(2, true);
    elsewhere.num_computed_tokens = 1;
    let wrong = [
        (elsewhere, Some(output(Some(9), &[5]))),
        (asked(3, true), None),
        (asked(3, true), Some(output(None, &[5]))),
        (asked(2, false), Some(output(Some(9), &[5]))),
        (asked(3, true), Some(corrupt)),
    ];
    let mut events = Vec::new();
    for taken in wrong {
        assert!(sequence.accept(TimeNs(4), taken, &mut events).is_err());
    }
    assert_eq!(sequence.num_known_tokens(), 3);
    assert_eq!(
        sequence.stay.as_ref().map(|s| s.num_computed_tokens),
        Some(0)
    );
    assert!(events.is_empty());
}

#[test]
fn prompt_logprobs_that_come_again_are_sent_once() {
    let mut sequence = Sequence::for_tests(&[1, 2, 3, 4, 5], &[]).moved_in();
    let mut events = Vec::new();
    let taken = (asked(3, false), Some(output(None, &[2, 3])));
    assert_eq!(sequence.accept(TimeNs(1), taken, &mut events), Ok(None));
    let mut sequence = sequence.moved_in(); // it lost its place and got another
    for (start, logprobs) in (0..).zip([&[2][..], &[3, 4], &[5]]) {
        let mut asked = asked(1, false);
        asked.num_computed_tokens = start;
        let taken = (asked, Some(output(None, logprobs)));
        assert_eq!(sequence.accept(TimeNs(2), taken, &mut events), Ok(None));
    }
    let sent: Vec<(u32, Vec<u32>)> = events
        .into_iter()
        .map(|(_, event)| match event {
            RequestEvent::PromptLogprobs { offset, logprobs } => {
                (offset, logprobs.iter().map(|l| l.token.0).collect())
            }
            other => panic!("unexpected {other:?}"),
        })
        .collect();
    assert_eq!(sent, [(0, vec![2, 3]), (2, vec![4]), (3, vec![5])]);
}

#[test]
fn more_logprobs_than_the_prompt_has_are_no_answer() {
    let mut sequence = Sequence::for_tests(&[1, 2, 3], &[]).moved_in();
    let mut events = Vec::new();
    let taken = (asked(2, false), Some(output(None, &[2, 3])));
    assert_eq!(sequence.accept(TimeNs(1), taken, &mut events), Ok(None));
    let mut last = asked(1, true);
    last.num_computed_tokens = 2;
    let error = Err(Failure::MismatchedOutput {
        index: 0,
        position: 0,
    });
    let taken = (last, Some(output(Some(9), &[4])));
    assert_eq!(sequence.accept(TimeNs(2), taken, &mut events), error);
    let taken = (last, Some(output(Some(9), &[])));
    assert_eq!(sequence.accept(TimeNs(2), taken, &mut events), Ok(None));
}

#[test]
fn prompt_logprobs_that_nobody_asked_for_are_not_sent() {
    let mut sequence = Sequence::for_tests(&[1, 2, 3], &[]).moved_in();
    sequence.details.sampling.prompt_logprobs = None;
    let mut events = Vec::new();
    let taken = (asked(2, false), Some(output(None, &[2])));
    assert_eq!(sequence.accept(TimeNs(1), taken, &mut events), Ok(None));
    assert_eq!(events, []);
}

#[test]
fn the_last_token_decides_whether_a_sequence_is_finished() {
    let mut asked = asked_for(&[1, 2], &[7]);
    asked.sampling.stop_tokens = vec![TokenId(8), TokenId(7)];
    let mut sequence = Sequence::new(asked.clone());
    let stop = Some(FinishReason::StopToken(TokenId(7)));
    assert_eq!(sequence.finish_reason(), stop);
    sequence.details.sampling.min_tokens = 1;
    assert_eq!(sequence.finish_reason(), None);
    sequence.max_known_tokens = 3;
    assert_eq!(sequence.finish_reason(), Some(FinishReason::Length));
    asked.resumed.clear();
    assert_eq!(Sequence::new(asked).finish_reason(), None);
}

#[test]
fn a_token_that_only_resembles_a_stop_id_stops_nothing() {
    let mut asked = asked_for(&[1, 2], &[7 + 64]);
    asked.sampling.stop_tokens = vec![TokenId(7)];
    assert_eq!(Sequence::new(asked).finish_reason(), None);
}
