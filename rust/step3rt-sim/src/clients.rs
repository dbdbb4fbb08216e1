//! Owns what clients asked and were told, checked event by event.
//!
//! It never trusts: a token must be the one that the model gives, at the next position; an end
//! must come once, at once, and for a reason that was there.

use std::collections::{BTreeMap, BTreeSet};

use step3rt_core::error::{ErrorKind, RequestError};
use step3rt_core::ids::{RequestId, TenantId, TokenId};
use step3rt_core::request::{FinishReason, Request, RequestEvent, Usage};

use crate::instance::logprob_of;
use crate::model::Prefix;
use crate::violation::{Violation, ensure};

/// The seed of a request's first continuation, from which the request can be told: continuation
/// `i` has this seed plus `i`, and there are fewer than 256.
pub(crate) fn seed_of(request: RequestId, tenant: TenantId) -> u64 {
    request.0 << 16 | tenant.0 << 8
}

/// Whose continuation has this seed.
pub(crate) fn owner_of(seed: u64) -> (RequestId, TenantId) {
    (RequestId(seed >> 16), TenantId(seed >> 8 & 0xff))
}

/// One request as its client sees it.
#[derive(Debug)]
pub(crate) struct Stream {
    pub(crate) request: Request,
    pub(crate) is_started: bool,
    num_prompt_logprobs: usize,
    continuations: Vec<Continuation>,
    error: Option<ErrorKind>,
    pub(crate) is_cancelled: bool,
    /// Continuations whose text matched a stop string.
    pub(crate) stopped: BTreeSet<u32>,
    /// An instance gave a result that cannot be used.
    pub(crate) is_tainted: bool,
}

#[derive(Debug)]
struct Continuation {
    past: Prefix,
    generated: Vec<TokenId>,
    /// The reason for which the last token was the last one.
    due: Option<FinishReason>,
    has_ended: bool,
}

impl Stream {
    fn new(request: Request) -> Self {
        let known = [&request.prompt[..], &request.resumed[..]].concat();
        let continuation = |_| Continuation {
            past: Prefix::of(&known),
            generated: request.resumed.clone(),
            due: None,
            has_ended: false,
        };
        Self {
            is_started: false,
            num_prompt_logprobs: 0,
            // One that asks for none, or for too many, is refused, and ends once.
            continuations: (0..request.n.clamp(1, 4)).map(continuation).collect(),
            error: None,
            is_cancelled: false,
            stopped: BTreeSet::new(),
            is_tainted: false,
            request,
        }
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.error.is_some() || self.continuations.iter().all(|c| c.has_ended)
    }

    /// Whether continuation `index` is there and has not ended.
    pub(crate) fn is_live(&self, index: u32) -> bool {
        let continuation = self.continuations.get(index as usize);
        self.error.is_none() && continuation.is_some_and(|c| !c.has_ended)
    }

    /// What its first continuation has got.
    pub(crate) fn generated(&self) -> &[TokenId] {
        &self.continuations[0].generated
    }

    /// Prompt and generated tokens of each continuation.
    fn known(&self) -> Vec<Vec<TokenId>> {
        let prompt = &self.request.prompt[..];
        let continuations = self.continuations.iter();
        let known = continuations.map(|c| [prompt, &c.generated[..]].concat());
        known.collect()
    }

    fn take(&mut self, event: &RequestEvent, max_model_len: u32) -> Result<(), Violation> {
        ensure!(self.error.is_none(), "an event after the failure");
        match event {
            RequestEvent::Started { .. } => {
                ensure!(!self.is_started, "started twice");
                self.is_started = true;
            }
            RequestEvent::PromptLogprobs { offset, logprobs } => {
                let at = self.num_prompt_logprobs;
                ensure!(
                    *offset as usize == at,
                    "prompt logprobs at {offset}, not {at}"
                );
                ensure!(
                    self.continuations[0].generated.len() == self.request.resumed.len(),
                    "prompt logprobs after the first token"
                );
                let expected = self.request.prompt[1 + at..].iter().map(|&t| logprob_of(t));
                let expected: Vec<_> = expected.take(logprobs.len()).collect();
                ensure!(*logprobs == expected, "changed prompt logprobs at {at}");
                self.num_prompt_logprobs += logprobs.len();
            }
            &RequestEvent::Token {
                index,
                position,
                token,
                ..
            } => self.take_token((index, position), token, max_model_len)?,
            RequestEvent::Finished {
                index,
                reason,
                usage,
            } => self.take_end(*index, *reason, usage)?,
            RequestEvent::Failed(error) => {
                ensure!(!self.has_ended(), "a failure after the end");
                self.error = Some(error.kind);
            }
        }
        Ok(())
    }

    fn take_token(
        &mut self,
        (index, position): (u32, u32),
        token: TokenId,
        max_model_len: u32,
    ) -> Result<(), Violation> {
        ensure!(self.is_started, "a token before the start");
        let seed = self.request.sampling.seed.wrapping_add(u64::from(index));
        let continuation = &mut self.continuations[index as usize];
        ensure!(
            !continuation.has_ended && continuation.due.is_none(),
            "a token after the last one of continuation {index}"
        );
        let at = continuation.generated.len();
        ensure!(
            position as usize == at,
            "continuation {index} got token {position} in place of token {at}"
        );
        let expected = continuation.past.next_token(seed);
        ensure!(
            token == expected,
            "token {position} of continuation {index} is {token}, not {expected}"
        );
        if at == self.request.resumed.len() && self.request.sampling.prompt_logprobs.is_some() {
            let expected = self.request.prompt.len() - 1;
            ensure!(
                index > 0 || self.num_prompt_logprobs == expected,
                "{} of {expected} prompt logprobs before the first token",
                self.num_prompt_logprobs
            );
        }
        continuation.past = continuation.past.then(token);
        continuation.generated.push(token);
        let sampling = &self.request.sampling;
        let num_generated = continuation.generated.len();
        let num_known = self.request.prompt.len() + num_generated;
        let is_stop =
            num_generated > sampling.min_tokens as usize && sampling.stop_tokens.contains(&token);
        let is_full = num_generated >= self.request.max_tokens as usize
            || num_known >= max_model_len as usize;
        continuation.due = match (is_stop, is_full) {
            (true, _) => Some(FinishReason::StopToken(token)),
            (false, true) => Some(FinishReason::Length),
            (false, false) => None,
        };
        Ok(())
    }

    fn take_end(
        &mut self,
        index: u32,
        reason: FinishReason,
        usage: &Usage,
    ) -> Result<(), Violation> {
        let continuation = &mut self.continuations[index as usize];
        ensure!(!continuation.has_ended, "continuation {index} ends twice");
        continuation.has_ended = true;
        let due = continuation.due.take();
        // A resumed stream of which only the end was lost has no token to be due for.
        let is_resumed = continuation.generated.len() == self.request.resumed.len();
        let is_justified = match reason {
            FinishReason::StopString => due.is_none() && self.stopped.contains(&index),
            reason => due == Some(reason) || (is_resumed && !self.request.resumed.is_empty()),
        };
        ensure!(
            is_justified,
            "continuation {index} ends with {reason:?} and was due for {due:?}"
        );
        ensure!(
            usage.prompt_tokens as usize == self.request.prompt.len()
                && usage.completion_tokens as usize == continuation.generated.len()
                && usage.times.is_sorted(),
            "the usage of continuation {index} is {usage:?}"
        );
        Ok(())
    }
}

/// All streams.
#[derive(Debug)]
pub(crate) struct Clients {
    max_model_len: u32,
    pub(crate) streams: BTreeMap<RequestId, Stream>,
    num_live: usize,
    /// How continuations and requests have ended, by reason.
    pub(crate) ends: BTreeMap<String, u64>,
}

impl Clients {
    pub(crate) fn new(max_model_len: u32) -> Self {
        Self {
            max_model_len,
            streams: BTreeMap::new(),
            num_live: 0,
            ends: BTreeMap::new(),
        }
    }

    pub(crate) fn submitted(&mut self, request: Request) {
        self.streams.insert(request.id, Stream::new(request));
        self.num_live += 1;
    }

    /// Requests that have not ended.
    pub(crate) fn num_live(&self) -> usize {
        self.num_live
    }

    /// The first request that has not ended.
    pub(crate) fn first_live(&self) -> Option<RequestId> {
        let mut streams = self.streams.iter();
        streams.find_map(|(&id, stream)| (!stream.has_ended()).then_some(id))
    }

    /// Per continuation of a request that has not ended well: the tokens that must be computed
    /// before its next one, and how many must be generated, at the least. Nothing must be computed
    /// of a beginning of full blocks that another live request of the tenant has, or that `is_held`.
    pub(crate) fn least_needs(
        &self,
        id: RequestId,
        block_size_tokens: usize,
        is_held: impl Fn(&[TokenId]) -> bool,
    ) -> Vec<(u64, u64)> {
        let stream = &self.streams[&id];
        let others = self.streams.iter().filter(|&(&other, stream_of)| {
            let is_other = other != id && !stream_of.has_ended();
            is_other && stream_of.request.tenant == stream.request.tenant
        });
        let others: Vec<Vec<TokenId>> = others.flat_map(|(_, other)| other.known()).collect();
        let sampling = &stream.request.sampling;
        let least = sampling
            .min_tokens
            .clamp(1, stream.request.max_tokens.max(1)) as usize;
        let continuations = stream.continuations.iter().zip(stream.known()).enumerate();
        let live = continuations.filter(|(_, (continuation, _))| !continuation.has_ended);
        let needs = live.map(|(index, (continuation, known))| {
            let common = others.iter().map(|other| {
                let pairs = other.iter().zip(&known);
                pairs.take_while(|(a, b)| a == b).count()
            });
            let common = common.max().unwrap_or(0);
            let is_whole = index == 0 && sampling.prompt_logprobs.is_some();
            let num_reusable = if is_whole { 0 } else { known.len() - 1 };
            let num_blocks = num_reusable / block_size_tokens;
            let mut ends = (1..=num_blocks)
                .rev()
                .map(|block| block * block_size_tokens);
            let is_there = |&end: &usize| end <= common || is_held(&known[..end]);
            let num_cached = ends.find(is_there).unwrap_or(0);
            let num_new = least.saturating_sub(continuation.generated.len()).max(1);
            ((known.len() - num_cached) as u64, num_new as u64)
        });
        needs.collect()
    }

    /// Takes what clients are told at one time. Returns the failures for the world to judge.
    pub(crate) fn take(
        &mut self,
        events: Vec<(RequestId, RequestEvent)>,
    ) -> Result<Vec<(RequestId, RequestError)>, Violation> {
        let mut touched = BTreeSet::new();
        let mut failures = Vec::new();
        for (id, event) in events {
            let Some(stream) = self.streams.get_mut(&id) else {
                return Err(Violation(format!("request {id} was never made")));
            };
            let had_ended = stream.has_ended();
            let taken = stream.take(&event, self.max_model_len);
            taken.map_err(|Violation(what)| Violation(format!("request {id}: {what}")))?;
            self.num_live -= usize::from(!had_ended && stream.has_ended());
            touched.insert(id);
            match event {
                RequestEvent::Finished { .. } => {
                    *self.ends.entry("Finished".to_owned()).or_default() += 1;
                }
                RequestEvent::Failed(error) => {
                    *self.ends.entry(format!("{:?}", error.kind)).or_default() += 1;
                    failures.push((id, error));
                }
                _ => {}
            }
        }
        for id in touched {
            let stream = &self.streams[&id];
            let is_due = stream.continuations.iter().any(|c| c.due.is_some());
            ensure!(
                !is_due || stream.error.is_some(),
                "request {id}: a last token without its end"
            );
        }
        Ok(failures)
    }
}
