//! Owns what one continuation has become: its tokens, and how far it is computed where it stays.
//!
//! It never chooses: lanes plan it, and it takes what a step gave.
//!
//! ```text
//!   0           num_prompt_tokens                known          max_known_tokens
//!   |-- prompt ------|-- generated ----------------|                  |
//!   |-- computed: K and V are in the cache --|-- to compute --|
//! ```

use std::borrow::Cow;
use std::sync::Arc;

use crate::error::Failure;
use crate::ids::{RequestId, SequenceId, TenantId, TimeNs, TokenId};
use crate::request::{FinishReason, RequestEvent, Usage};
use crate::stay::{AfterStep, Asked, Stay};
use crate::step::{SamplingState, SequenceJoin, SequenceOutput, TokenLogprob};

/// Who goes first. Less is served earlier and loses its place later: lower priority numbers
/// first, then the older.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Rank {
    pub(crate) priority: i32,
    /// Unique, in the order of submission.
    pub(crate) arrival: u64,
}

/// One of a request's continuations.
#[derive(Debug)]
pub(crate) struct Sequence {
    pub(crate) request: RequestId,
    /// Which of the request's `n`.
    pub(crate) index: u32,
    pub(crate) tenant: TenantId,
    pub(crate) rank: Rank,
    pub(crate) prompt: Arc<[TokenId]>,
    /// Starts with the resumed tokens.
    pub(crate) generated: Vec<TokenId>,
    pub(crate) sampling: SamplingState,
    /// Where `max_tokens` or the context ends it.
    pub(crate) max_known_tokens: u32,
    pub(crate) submitted: TimeNs,
    pub(crate) planned: Option<TimeNs>,
    pub(crate) first_token: Option<TimeNs>,
    /// A recomputed prompt gives its logprobs again; the client gets them once.
    pub(crate) num_prompt_logprobs_sent: u32,
    /// Whether its tenant has paid for the prompt; computing it again is nobody's fault.
    pub(crate) is_charged: bool,
    /// `None` while it waits for a place.
    pub(crate) stay: Option<Stay>,
}

impl Sequence {
    pub(crate) fn num_prompt_tokens(&self) -> u32 {
        num_tokens(&self.prompt)
    }

    pub(crate) fn num_generated_tokens(&self) -> u32 {
        num_tokens(&self.generated)
    }

    pub(crate) fn num_known_tokens(&self) -> u32 {
        self.num_prompt_tokens() + self.num_generated_tokens()
    }

    /// How far it can be planned: to the last token that it knows or that a step in flight samples.
    /// Its very last token ends it and is never computed.
    pub(crate) fn num_plannable_tokens(&self) -> u32 {
        let pending = self
            .stay
            .as_ref()
            .map_or(0, |stay| stay.num_pending_samples);
        (self.num_known_tokens() + pending).min(self.max_known_tokens - 1)
    }

    /// The tokens of its block `index`, which is full.
    pub(crate) fn full_block(&self, index: usize, block_size_tokens: u32) -> Cow<'_, [TokenId]> {
        let start = index * block_size_tokens as usize;
        let end = start + block_size_tokens as usize;
        let num_prompt = self.prompt.len();
        if end <= num_prompt {
            return Cow::Borrowed(&self.prompt[start..end]);
        }
        let prompt = &self.prompt[start.min(num_prompt)..];
        let generated = &self.generated[start.saturating_sub(num_prompt)..end - num_prompt];
        Cow::Owned([prompt, generated].concat())
    }

    /// The blocks that it may find in a cache instead of computing them. The last known token is
    /// always computed, since something must be sampled from; and so is a prompt whose logprobs
    /// are asked for.
    pub(crate) fn reusable_blocks(
        &self,
        block_size_tokens: u32,
    ) -> impl Iterator<Item = Cow<'_, [TokenId]>> {
        let num_blocks = match self.sampling.prompt_logprobs {
            Some(_) => 0,
            None => (self.num_known_tokens() - 1) / block_size_tokens,
        };
        (0..num_blocks as usize).map(move |index| self.full_block(index, block_size_tokens))
    }

    /// Whether anybody still wants its tokens.
    pub(crate) fn is_wanted(&self) -> bool {
        let ends = |stay: &Stay| stay.after_step == AfterStep::Ends;
        !self.stay.as_ref().is_some_and(ends)
    }

    /// What an instance must know before it can compute the sequence.
    pub(crate) fn join(&self, id: SequenceId) -> SequenceJoin {
        SequenceJoin {
            sequence: id,
            tokens: [&self.prompt[..], &self.generated[..]].concat(),
            num_prompt_tokens: self.num_prompt_tokens(),
            sampling: self.sampling.clone(),
        }
    }

    /// Takes what a step gave for this sequence. Says why the sequence ends, if it does.
    ///
    /// Nothing is taken from an output that does not answer `asked`.
    pub(crate) fn accept(
        &mut self,
        now: TimeNs,
        (asked, output): (Asked, Option<SequenceOutput>),
        events: &mut Vec<(RequestId, RequestEvent)>,
    ) -> Result<Option<FinishReason>, Failure> {
        let (index, position) = (self.index, self.num_generated_tokens());
        let output = output
            .filter(|output| output.sequence == asked.sequence)
            .ok_or(Failure::MismatchedOutput { index, position })?;
        if output.is_corrupt {
            return Err(Failure::CorruptLogits { index, position });
        }
        let stay = self.stay.as_mut().expect("a sequence in a step stays");
        let follows = stay.num_computed_tokens == asked.num_computed_tokens;
        if !follows || output.token.is_some() != asked.samples {
            return Err(Failure::MismatchedOutput { index, position });
        }
        stay.num_computed_tokens += asked.num_new_tokens;
        self.accept_prompt_logprobs(output.prompt_logprobs, events);
        let Some(token) = output.token else {
            return Ok(None);
        };
        self.generated.push(token);
        self.first_token.get_or_insert(now);
        let event = RequestEvent::Token {
            index,
            position,
            token,
            logprob: output.logprob,
        };
        events.push((self.request, event));
        Ok(self.finish_reason())
    }

    /// Why nothing may follow the last generated token, if so.
    pub(crate) fn finish_reason(&self) -> Option<FinishReason> {
        let &last = self.generated.last()?;
        let may_stop = self.num_generated_tokens() > self.sampling.min_tokens;
        if may_stop && self.sampling.stop_tokens.contains(&last) {
            return Some(FinishReason::StopToken(last));
        }
        (self.num_known_tokens() >= self.max_known_tokens).then_some(FinishReason::Length)
    }

    pub(crate) fn usage(&self, ended: TimeNs) -> Usage {
        Usage {
            prompt_tokens: self.num_prompt_tokens(),
            completion_tokens: self.num_generated_tokens(),
            times: [
                self.submitted,
                self.planned.unwrap_or(ended),
                self.first_token.unwrap_or(ended),
                ended,
            ],
        }
    }

    /// Passes on what the client has not had yet.
    ///
    /// ```text
    ///   received in this stay   |---- before ----|---- logprobs ----|
    ///   sent in any stay        |------ sent ---------|
    ///   passed on                                     |-------------|
    /// ```
    fn accept_prompt_logprobs(
        &mut self,
        mut logprobs: Vec<TokenLogprob>,
        events: &mut Vec<(RequestId, RequestEvent)>,
    ) {
        if self.sampling.prompt_logprobs.is_none() || logprobs.is_empty() {
            return;
        }
        let stay = self.stay.as_mut().expect("a sequence in a step stays");
        let before = stay.num_prompt_logprobs;
        stay.num_prompt_logprobs += num_tokens(&logprobs);
        let offset = self.num_prompt_logprobs_sent;
        let num_had = offset.saturating_sub(before) as usize;
        if num_had >= logprobs.len() {
            return;
        }
        logprobs.drain(..num_had);
        self.num_prompt_logprobs_sent += num_tokens(&logprobs);
        events.push((
            self.request,
            RequestEvent::PromptLogprobs { offset, logprobs },
        ));
    }
}

/// How many tokens `items` stands for, one each.
pub(crate) fn num_tokens<T>(items: &[T]) -> u32 {
    u32::try_from(items.len()).expect("admission bounds every sequence by max_model_len")
}

#[cfg(test)]
mod tests {
    use super::*;

    impl Sequence {
        /// Waits; greedy, without stop ids, up to 100 tokens.
        pub(crate) fn for_tests(prompt: &[u32], generated: &[u32]) -> Self {
            let tokens = |ids: &[u32]| ids.iter().copied().map(TokenId).collect::<Vec<_>>();
            Self {
                request: RequestId(0),
                index: 0,
                tenant: TenantId(0),
                rank: Rank {
                    priority: 0,
                    arrival: 0,
                },
                prompt: tokens(prompt).into(),
                generated: tokens(generated),
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
                planned: None,
                first_token: None,
                num_prompt_logprobs_sent: 0,
                is_charged: false,
                stay: None,
            }
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
        sequence.sampling.prompt_logprobs = None;
        assert_eq!(sequence.reusable_blocks(2).count(), 1);
        sequence.generated.push(TokenId(5));
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
        assert_eq!(sequence.first_token, Some(TimeNs(4)));
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
    fn prompt_logprobs_that_nobody_asked_for_are_not_sent() {
        let mut sequence = Sequence::for_tests(&[1, 2, 3], &[]).moved_in();
        sequence.sampling.prompt_logprobs = None;
        let mut events = Vec::new();
        let taken = (asked(2, false), Some(output(None, &[2])));
        assert_eq!(sequence.accept(TimeNs(1), taken, &mut events), Ok(None));
        assert_eq!(events, []);
    }

    #[test]
    fn the_last_token_decides_whether_a_sequence_is_finished() {
        let mut sequence = Sequence::for_tests(&[1, 2], &[7]);
        sequence.sampling.stop_tokens = vec![TokenId(7)];
        let stop = Some(FinishReason::StopToken(TokenId(7)));
        assert_eq!(sequence.finish_reason(), stop);
        sequence.sampling.min_tokens = 1;
        assert_eq!(sequence.finish_reason(), None);
        sequence.max_known_tokens = 3;
        assert_eq!(sequence.finish_reason(), Some(FinishReason::Length));
        sequence.generated.clear();
        assert_eq!(sequence.finish_reason(), None);
    }
}
