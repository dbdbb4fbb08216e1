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
use crate::generated::Generated;
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
///
/// A lane step reads and writes one of these per sequence and waits for memory more than it
/// computes. So what every step needs is here, in three cache lines in this order, and the rest
/// behind pointers that a step follows only when something begins, ends or fills up. Planning
/// looks at the first line only.
///
/// ```text
///   0                            64                                64 * 2          64 * 3
///   | stay, how far, whose it is | prompt, settled tokens, stop ids | recent tokens |
/// ```
#[derive(Debug)]
#[repr(C, align(64))]
pub(crate) struct Sequence {
    /// `None` while it waits for a place.
    pub(crate) stay: Option<Stay>,
    pub(crate) request: RequestId,
    /// Which of the request's `n`.
    pub(crate) index: u32,
    num_prompt_tokens: u32,
    /// Of the prompt and generated.
    num_known_tokens: u32,
    /// Where `max_tokens` or the context ends it.
    pub(crate) max_known_tokens: u32,
    pub(crate) details: Box<Details>,
    pub(crate) tenant: TenantId,
    stop_filter: StopFilter,
    prompt: Arc<[TokenId]>,
    /// Starts with the resumed tokens.
    generated: Generated,
}

const _: () = assert!(size_of::<Option<Sequence>>() == 192, "three cache lines");

/// What a step that only decodes has no use for.
#[derive(Debug)]
pub(crate) struct Details {
    pub(crate) rank: Rank,
    pub(crate) sampling: SamplingState,
    pub(crate) submitted: TimeNs,
    pub(crate) planned: Option<TimeNs>,
    pub(crate) first_token: Option<TimeNs>,
    /// A recomputed prompt gives its logprobs again; the client gets them once.
    pub(crate) num_prompt_logprobs_sent: u32,
    /// Whether its tenant has paid for the prompt; computing it again is nobody's fault.
    pub(crate) is_charged: bool,
}

/// What a client asked, for one of its continuations.
#[derive(Clone, Debug)]
pub(crate) struct Continuation {
    pub(crate) request: RequestId,
    pub(crate) index: u32,
    pub(crate) tenant: TenantId,
    pub(crate) rank: Rank,
    pub(crate) prompt: Arc<[TokenId]>,
    pub(crate) resumed: Vec<TokenId>,
    pub(crate) sampling: SamplingState,
    pub(crate) max_known_tokens: u32,
    pub(crate) submitted: TimeNs,
}

/// The stop ids modulo 64, a bit each: tells most tokens from a stop id without the list.
#[derive(Clone, Copy, Debug)]
struct StopFilter(u64);

impl StopFilter {
    fn of(stop_tokens: &[TokenId]) -> Self {
        Self(stop_tokens.iter().fold(0, |bits, id| bits | Self::bit(*id)))
    }

    fn may_contain(self, token: TokenId) -> bool {
        self.0 & Self::bit(token) != 0
    }

    fn bit(token: TokenId) -> u64 {
        1 << (token.0 % u64::BITS)
    }
}

impl Sequence {
    /// Waits for a place, with nothing computed.
    pub(crate) fn new(asked: Continuation) -> Self {
        let num_prompt_tokens = num_tokens(&asked.prompt);
        Self {
            stay: None,
            request: asked.request,
            index: asked.index,
            num_prompt_tokens,
            num_known_tokens: num_prompt_tokens + num_tokens(&asked.resumed),
            max_known_tokens: asked.max_known_tokens,
            tenant: asked.tenant,
            stop_filter: StopFilter::of(&asked.sampling.stop_tokens),
            prompt: asked.prompt,
            generated: Generated::new(asked.resumed),
            details: Box::new(Details {
                rank: asked.rank,
                sampling: asked.sampling,
                submitted: asked.submitted,
                planned: None,
                first_token: None,
                num_prompt_logprobs_sent: 0,
                is_charged: false,
            }),
        }
    }

    /// Reads from each of its cache lines.
    pub(crate) fn touch(&self) -> usize {
        let last = self.generated.last().map_or(0, |token| token.0 as usize);
        self.num_known_tokens as usize + self.prompt.len() + last
    }

    pub(crate) fn num_prompt_tokens(&self) -> u32 {
        self.num_prompt_tokens
    }

    pub(crate) fn num_generated_tokens(&self) -> u32 {
        self.num_known_tokens - self.num_prompt_tokens
    }

    pub(crate) fn num_known_tokens(&self) -> u32 {
        self.num_known_tokens
    }

    /// Whether what is counted is what is there.
    pub(crate) fn counts_its_tokens(&self) -> bool {
        self.prompt.len() == self.num_prompt_tokens as usize
            && self.generated.len() == self.num_generated_tokens() as usize
    }

    /// How far it can be planned: to the last token that it knows or that a step in flight samples.
    /// Its very last token ends it and is never computed.
    pub(crate) fn num_plannable_tokens(&self) -> u32 {
        let stay = self.stay.as_ref();
        let pending = stay.map_or(0, |stay| u32::from(stay.num_pending_samples));
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
        let generated = start.saturating_sub(num_prompt)..end - num_prompt;
        let [settled, recent] = self.generated.parts(generated);
        Cow::Owned([prompt, settled, recent].concat())
    }

    /// The blocks that it may find in a cache instead of computing them. The last known token is
    /// always computed, since something must be sampled from; and so is a prompt whose logprobs
    /// are asked for.
    pub(crate) fn reusable_blocks(
        &self,
        block_size_tokens: u32,
    ) -> impl Iterator<Item = Cow<'_, [TokenId]>> {
        let num_blocks = match self.details.sampling.prompt_logprobs {
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
        let [settled, recent] = self.generated.parts(0..self.generated.len());
        SequenceJoin {
            sequence: id,
            tokens: [&self.prompt, settled, recent].concat(),
            num_prompt_tokens: self.num_prompt_tokens(),
            sampling: self.details.sampling.clone(),
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
        // The first token of a prompt follows nothing.
        let num_logprobs = stay.holding.num_prompt_logprobs as usize + output.prompt_logprobs.len();
        let has_too_many_logprobs = num_logprobs >= self.prompt.len();
        if !follows || output.token.is_some() != asked.samples || has_too_many_logprobs {
            return Err(Failure::MismatchedOutput { index, position });
        }
        stay.num_computed_tokens += asked.num_new_tokens;
        if output.token.is_some() && !std::mem::replace(&mut stay.has_sampled, true) {
            self.details.first_token.get_or_insert(now);
        }
        self.accept_prompt_logprobs(output.prompt_logprobs, events);
        let Some(token) = output.token else {
            return Ok(None);
        };
        self.learn(token);
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
        let last = self.generated.last()?;
        if self.stop_filter.may_contain(last) && self.is_stop(last) {
            return Some(FinishReason::StopToken(last));
        }
        (self.num_known_tokens() >= self.max_known_tokens).then_some(FinishReason::Length)
    }

    fn learn(&mut self, token: TokenId) {
        self.generated.push(token);
        self.num_known_tokens += 1;
    }

    fn is_stop(&self, last: TokenId) -> bool {
        let sampling = &self.details.sampling;
        self.num_generated_tokens() > sampling.min_tokens && sampling.stop_tokens.contains(&last)
    }

    pub(crate) fn usage(&self, ended: TimeNs) -> Usage {
        Usage {
            prompt_tokens: self.num_prompt_tokens(),
            completion_tokens: self.num_generated_tokens(),
            times: [
                self.details.submitted,
                self.details.planned.unwrap_or(ended),
                self.details.first_token.unwrap_or(ended),
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
        if logprobs.is_empty() || self.details.sampling.prompt_logprobs.is_none() {
            return;
        }
        let stay = self.stay.as_mut().expect("a sequence in a step stays");
        let before = stay.holding.num_prompt_logprobs;
        stay.holding.num_prompt_logprobs += num_tokens(&logprobs);
        let offset = self.details.num_prompt_logprobs_sent;
        let num_had = offset.saturating_sub(before) as usize;
        if num_had >= logprobs.len() {
            return;
        }
        logprobs.drain(..num_had);
        self.details.num_prompt_logprobs_sent += num_tokens(&logprobs);
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
mod tests;
