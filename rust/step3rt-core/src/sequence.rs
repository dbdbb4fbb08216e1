//! Owns what one continuation has become: its tokens, and how far it is computed where it stays.
//!
//! It never chooses: lanes plan it, and it takes what a step gave.
//!
//! ```text
//!   0           num_prompt_tokens                known          max_known_tokens
//!   |-- prompt ------|-- generated ----------------|                  |
//!   |-- computed: K and V are in the cache --|-- to compute --|
//! ```

use std::sync::Arc;

use crate::error::Failure;
use crate::ids::{BlockId, InstanceId, LaneId, RequestId, SequenceId, TimeNs, TokenId};
use crate::request::{FinishReason, RequestEvent, Usage};
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
    /// `None` while it waits for a place.
    pub(crate) stay: Option<Stay>,
}

/// What a sequence has while it has a place.
#[derive(Debug)]
pub(crate) struct Stay {
    pub(crate) id: SequenceId,
    pub(crate) instance: InstanceId,
    pub(crate) lane: LaneId,
    /// Whether the instance has been told of it (a plan has it in `joined`).
    pub(crate) is_told: bool,
    pub(crate) num_computed_tokens: u32,
    /// In table order.
    pub(crate) blocks: Vec<BlockId>,
    /// Blocks that all known tokens need: what the lane counts for it, granted or not.
    pub(crate) num_demanded_blocks: u64,
    pub(crate) is_in_flight: bool,
    pub(crate) after_step: AfterStep,
    pub(crate) num_prompt_logprobs: u32,
}

/// What happens when the step in flight ends; a step that runs cannot be recalled, so blocks that
/// it writes stay owned until then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AfterStep {
    /// It goes on.
    Stays,
    /// It lost its place to others and waits for a new one.
    Waits,
    /// Nobody wants it any more.
    Ends,
}

/// What a plan asked of a sequence.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Asked {
    pub(crate) sequence: SequenceId,
    pub(crate) num_new_tokens: u32,
    pub(crate) samples: bool,
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
        if output.token.is_some() != asked.samples {
            return Err(Failure::MismatchedOutput { index, position });
        }
        let stay = self
            .stay
            .as_mut()
            .expect("a sequence in a step has a place");
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
        let stay = self
            .stay
            .as_mut()
            .expect("a sequence in a step has a place");
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
