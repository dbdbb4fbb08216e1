//! One request's task: turns the scheduler's events into the client's responses.
//!
//! It never holds up the drive loop: events are taken as they come, responses wait in a bounded
//! [`Outbox`], and a client that neither reads nor leaves is cut.

use std::sync::Arc;
use std::time::Duration;

use step3rt_core::error::{ErrorKind, RequestError};
use step3rt_core::ids::{RequestId, TimeNs, TokenId};
use step3rt_core::scheduler::{FinishReason, RequestEvent, Usage};
use step3rt_core::step::TokenLogprob;
use step3rt_proto::status::{policy, to_status};
use step3rt_proto::v1;
use step3rt_proto::v1::generate_response::Event;
use step3rt_proto::v1::{FinishReason as WireReason, GenerateResponse, finished};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};
use tonic::Status;
use tonic::metadata::MetadataValue;
use tracing::debug;

use crate::drive_handle::{DriveHandle, Message};
use crate::internal_error::without_diagnostics;
use crate::metrics::{self, RequestMetrics};
use crate::outbox::{Outbox, Piece};
use crate::text::continuation::{Continuation, TextRules};

/// Responses that the transport may hold before it has room on the wire: enough to keep it busy,
/// few enough that waiting responses are merged.
pub const RESPONSE_BOUND: usize = 4;
/// A client that takes nothing for this long does not read.
const SLOW_CONSUMER_TIMEOUT: Duration = Duration::from_secs(30);
/// Trailer with the tokens that were generated before an error.
const COMPLETION_TOKENS_KEY: &str = "step3rt-completion-tokens";

/// Where a client's responses go.
pub type ResponseSender = mpsc::Sender<Result<GenerateResponse, Status>>;

/// What a request's task knows of its request.
pub struct StreamParts {
    /// The coordinator's number.
    pub id: RequestId,
    /// The client's name for it.
    pub client_id: String,
    /// How many continuations.
    pub n: u32,
    /// Tokens of the prompt.
    pub num_prompt_tokens: u32,
    /// Tokens that the client has already; the text state starts after them.
    pub resumed: Vec<TokenId>,
    /// How text is made.
    pub text_rules: TextRules,
    /// Whether deltas carry text.
    pub wants_text: bool,
    /// Whether deltas carry token ids.
    pub wants_token_ids: bool,
    /// Where stops and cancels go.
    pub drive: DriveHandle,
    /// Where it is counted.
    pub metrics: RequestMetrics,
}

/// See the module's documentation.
pub struct ResponseStream {
    parts: StreamParts,
    continuations: Vec<Progress>,
    outbox: Outbox,
    num_unfinished: u32,
    num_resumed_tokens: u32,
    /// Of the prompt; every continuation's usage says it, as `Started` did. `None` until then.
    num_cached_tokens: Option<u32>,
    /// Why the stream ends early, to be told after what waits.
    failure: Option<Status>,
}

struct Progress {
    text: Continuation,
    num_tokens: u32,
    matched: Option<String>,
    is_finished: bool,
}

impl ResponseStream {
    /// The stream of a request that is about to be submitted.
    pub fn new(mut parts: StreamParts) -> Self {
        let rules = Arc::new(parts.text_rules.clone());
        let mut continuations: Vec<_> = (0..parts.n)
            .map(|_| Progress {
                text: Continuation::new(Arc::clone(&rules)),
                num_tokens: 0,
                matched: None,
                is_finished: false,
            })
            .collect();
        // What the client has already is not sent again, but it may hold the first bytes of a
        // character or of a stop string.
        let mut already_sent = String::new();
        if let [only] = continuations.as_mut_slice() {
            for token in std::mem::take(&mut parts.resumed) {
                let found = only.text.push(only.num_tokens, token, &mut already_sent);
                only.num_tokens += 1;
                if let Some(found) = found {
                    only.matched = Some(found.stop);
                    break;
                }
            }
        }
        Self {
            num_unfinished: parts.n,
            num_resumed_tokens: continuations.first().map_or(0, |only| only.num_tokens),
            outbox: Outbox::new(parts.n),
            parts,
            continuations,
            num_cached_tokens: None,
            failure: None,
        }
    }

    /// Moves events to `responses` until the request ends or the client leaves.
    pub async fn run(
        mut self,
        mut events: mpsc::Receiver<RequestEvent>,
        responses: ResponseSender,
    ) {
        if self
            .continuations
            .first()
            .is_some_and(|only| only.matched.is_some())
        {
            self.stop(0).await; // the client resumes a stream that had ended
        }
        // Since when the client has taken nothing that it could have.
        let mut waiting_since = Instant::now();
        loop {
            let is_over = self.num_unfinished == 0 || self.failure.is_some();
            if is_over && self.outbox.is_empty() {
                break;
            }
            tokio::select! {
                biased;
                () = responses.closed() => {
                    // The client left; at shutdown the drive loop may have, too.
                    let _ = self.parts.drive.send(Message::Cancel(self.parts.id)).await;
                    self.parts.metrics.ended(metrics::CLIENT_LEFT);
                    return;
                }
                event = events.recv(), if !is_over => {
                    if self.outbox.is_overfull() {
                        self.cut().await;
                        break;
                    }
                    if self.outbox.is_empty() {
                        waiting_since = Instant::now();
                    }
                    self.take(event).await;
                }
                permit = responses.reserve(), if !self.outbox.is_empty() => {
                    if let (Ok(permit), Some(response)) = (permit, self.outbox.pop()) {
                        waiting_since = Instant::now();
                        permit.send(Ok(response));
                    }
                }
                () = sleep_until(waiting_since + SLOW_CONSUMER_TIMEOUT), if !self.outbox.is_empty() => {
                    self.cut().await;
                    break;
                }
            }
        }
        if let Some(status) = self.failure.take() {
            // A client that is gone does not need to know.
            let _ = responses.send(Err(status)).await;
        } else {
            self.parts.metrics.ended(metrics::FINISHED);
        }
    }

    async fn take(&mut self, event: Option<RequestEvent>) {
        match event {
            Some(RequestEvent::Started { num_cached_tokens }) => self.started(num_cached_tokens),
            Some(RequestEvent::PromptLogprobs { offset, logprobs }) => {
                self.outbox.push_prompt_logprobs(offset, logprobs);
            }
            Some(RequestEvent::Token {
                index,
                position,
                token,
                logprob,
            }) => self.token(index, position, (token, logprob)).await,
            Some(RequestEvent::Finished {
                index,
                reason,
                usage,
            }) => self.finished(index, Some(reason), usage),
            Some(RequestEvent::Failed(error)) if error.kind == ErrorKind::Cancelled => {
                self.aborted();
            }
            Some(RequestEvent::Failed(error)) => self.fail(error),
            // Without an end, the drive loop has cut this request: its channel was full.
            None => self.fail(slow_consumer()),
        }
    }

    fn started(&mut self, num_cached_tokens: u32) {
        self.num_cached_tokens = Some(num_cached_tokens);
        let num_prompt_tokens = self.parts.num_prompt_tokens;
        self.parts
            .metrics
            .started(num_prompt_tokens, num_cached_tokens);
        self.outbox.push(Event::Started(v1::Started {
            request_id: self.parts.client_id.clone(),
            prompt_tokens: self.parts.num_prompt_tokens,
            cached_tokens: num_cached_tokens,
        }));
    }

    async fn token(
        &mut self,
        index: u32,
        position: u32,
        (token, logprob): (TokenId, Option<TokenLogprob>),
    ) {
        let Some(progress) = self.continuations.get_mut(index as usize) else {
            return;
        };
        if progress.text.has_matched() {
            return; // generated before the scheduler heard of the stop
        }
        self.parts.metrics.generated();
        let mut text = String::new();
        let found = progress.text.push(position, token, &mut text);
        progress.num_tokens = position + 1;
        if !self.parts.wants_text {
            text.clear();
        }
        self.outbox.push_piece(Piece {
            index,
            position,
            token: self.parts.wants_token_ids.then_some(token.0),
            text,
            logprob,
        });
        if let Some(found) = found {
            progress.matched = Some(found.stop);
            self.stop(index).await;
        }
    }

    async fn stop(&self, index: u32) {
        let request = self.parts.id;
        // If the drive loop is gone, so is the request.
        let _ = self
            .parts
            .drive
            .send(Message::Stop { request, index })
            .await;
    }

    /// `reason` is `None` when the request was aborted.
    fn finished(&mut self, index: u32, reason: Option<FinishReason>, usage: Usage) {
        if self.num_cached_tokens.is_none() {
            self.started(0); // it ends before it had a place
        }
        let Some(progress) = self.continuations.get_mut(index as usize) else {
            return;
        };
        if std::mem::replace(&mut progress.is_finished, true) {
            return;
        }
        self.num_unfinished -= 1;
        let mut text = String::new();
        progress.text.finish(&mut text);
        if self.parts.wants_text {
            self.outbox.push_piece(Piece {
                index,
                position: progress.num_tokens,
                text,
                ..Piece::default()
            });
        }
        // The text ends with the stop string, whatever the tokens after it would have met.
        let (reason, matched) = match (progress.matched.take(), reason) {
            (Some(stop), _) => (WireReason::Stop, Some(finished::Matched::StopString(stop))),
            (None, Some(FinishReason::StopToken(token))) => {
                let matched = finished::Matched::StopTokenId(token.0);
                (WireReason::Stop, Some(matched))
            }
            (None, Some(FinishReason::StopString)) => (WireReason::Stop, None),
            (None, Some(FinishReason::Length)) => (WireReason::Length, None),
            (None, None) => (WireReason::Cancelled, None),
        };
        let num_new_tokens = progress.num_tokens.saturating_sub(self.num_resumed_tokens);
        self.parts
            .metrics
            .output_ended(reason, num_new_tokens, usage.times);
        let [submitted, planned, first_token, ended] = usage.times;
        debug!(
            request_id = self.parts.client_id,
            index,
            reason = reason.as_str_name(),
            prompt_tokens = self.parts.num_prompt_tokens,
            completion_tokens = progress.num_tokens,
            queue_ms = planned.since_ns(submitted) / 1_000_000,
            ttft_ms = first_token.since_ns(submitted) / 1_000_000,
            total_ms = ended.since_ns(submitted) / 1_000_000,
            "continuation ended"
        );
        self.outbox.push(Event::Finished(v1::Finished {
            index,
            reason: reason.into(),
            matched,
            usage: Some(v1::Usage {
                prompt_tokens: self.parts.num_prompt_tokens,
                completion_tokens: progress.num_tokens,
                cached_tokens: self.num_cached_tokens.unwrap_or(0),
                ..Default::default()
            }),
            timing: Some(timing(usage.times)),
        }));
    }

    /// Another call ended the request: the stream ends in good order, with what there is.
    fn aborted(&mut self) {
        for index in 0..self.parts.n {
            self.finished(index, None, Usage::default());
        }
    }

    fn fail(&mut self, error: RequestError) {
        let num_tokens: u32 = self.continuations.iter().map(|c| c.num_tokens).sum();
        debug!(request_id = self.parts.client_id, kind = ?error.kind, num_tokens, "request failed");
        self.parts.metrics.ended(policy(error.kind).reason);
        let mut status = to_status(&without_diagnostics(error));
        status
            .metadata_mut()
            .insert(COMPLETION_TOKENS_KEY, MetadataValue::from(num_tokens));
        self.failure = Some(status);
    }

    async fn cut(&mut self) {
        self.fail(slow_consumer());
        // If the drive loop is gone, so is the request.
        let _ = self.parts.drive.send(Message::Cancel(self.parts.id)).await;
    }
}

fn slow_consumer() -> RequestError {
    RequestError {
        kind: ErrorKind::SlowConsumer,
        message: "the client reads more slowly than tokens are generated, and what waits for it \
                  is bounded. Read the stream as it comes"
            .to_owned(),
        retry_after_ms: None,
    }
}

/// `times`: submitted, first planned, first token, ended.
fn timing([submitted, planned, first_token, ended]: [TimeNs; 4]) -> v1::Timing {
    let between = |from: TimeNs, to: TimeNs| {
        let duration = Duration::from_nanos(to.since_ns(from));
        prost_types::Duration::try_from(duration).ok()
    };
    v1::Timing {
        queue: between(submitted, planned),
        prefill: between(planned, first_token),
        decode: between(first_token, ended),
    }
}

#[cfg(test)]
mod tests;
