//! Owns every sequence and decides what each lane computes next.
//!
//! It never waits, reads a clock or talks to anybody: the drive loop feeds it events with a time
//! and carries out what [`Scheduler::plan`] and [`Scheduler::take_events`] return.

use crate::config::SchedulerConfig;
use crate::error::RequestError;
use crate::ids::{Epoch, InstanceId, RequestId, TimeNs, TokenId};
use crate::step::{SamplingState, StepKey, StepOutput, StepPlan, TokenLogprob};

/// A validated request.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// The coordinator's number for it.
    pub id: RequestId,
    /// At least one token.
    pub prompt: Vec<TokenId>,
    /// Tokens generated earlier (a resumed stream); the first new token has this position.
    pub resumed: Vec<TokenId>,
    /// How many continuations.
    pub n: u32,
    /// How to sample; sequence `i` of `n` uses `seed + i`.
    pub sampling: SamplingState,
    /// Most tokens to generate per continuation, at least 1.
    pub max_tokens: u32,
    /// Lower runs first.
    pub priority: i32,
    /// When the client stops caring.
    pub deadline: Option<TimeNs>,
}

/// Something that happened.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// A client asks.
    Submit(Request),
    /// A client left or aborted. Unknown ids are ignored.
    Cancel(RequestId),
    /// A stop string matched in the text of continuation `index`: nothing after it is wanted.
    Stop {
        /// The request.
        request: RequestId,
        /// Which of `n`.
        index: u32,
    },
    /// An attention instance can run steps.
    AttentionReady {
        /// The instance.
        instance: InstanceId,
        /// Its incarnation.
        epoch: Epoch,
        /// The size of its KV pool.
        num_kv_blocks: u32,
    },
    /// An attention instance is gone; its sequences are computed again elsewhere.
    AttentionLost(InstanceId),
    /// Whether the FFN instances at hand hold every expert. Nothing is planned while they do not.
    ExpertsComplete(bool),
    /// A step gave results.
    StepDone(StepOutput),
    /// A step had no effect; it is planned again.
    StepFailed {
        /// Which step.
        key: StepKey,
        /// For the log.
        reason: String,
    },
    /// Accept nothing new; finish what is running.
    Drain,
}

/// What a client is told.
#[derive(Clone, Debug, PartialEq)]
pub enum RequestEvent {
    /// The request has a place and its first chunk is planned.
    Started,
    /// Prompt logprobs, in order, as chunks complete; `offset` counts from prompt token 1.
    PromptLogprobs {
        /// Index of `logprobs[0]`, 0 being the second prompt token.
        offset: u32,
        /// In order.
        logprobs: Vec<TokenLogprob>,
    },
    /// One generated token.
    Token {
        /// Which of `n`.
        index: u32,
        /// Position in this continuation, from 0, without gap or duplicate.
        position: u32,
        /// The token.
        token: TokenId,
        /// When asked for.
        logprob: Option<TokenLogprob>,
    },
    /// A continuation ended; nothing more comes for this index.
    Finished {
        /// Which of `n`.
        index: u32,
        /// Why.
        reason: FinishReason,
        /// What it took.
        usage: Usage,
    },
    /// The request ended early; nothing more comes.
    Failed(RequestError),
}

/// Why a continuation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// A stop id was sampled.
    StopToken(TokenId),
    /// A stop string matched (see [`Event::Stop`]).
    StopString,
    /// `max_tokens` or the context's end.
    Length,
}

/// Token counts of a continuation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Tokens generated.
    pub completion_tokens: u32,
    /// When it was submitted, first planned, got its first token, and ended.
    pub times: [TimeNs; 4],
}

/// A snapshot for metrics and tests.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SchedulerStats {
    /// Requests without a place.
    pub num_waiting: usize,
    /// Sequences with a place.
    pub num_running: usize,
    /// Per attention instance: free and total KV blocks.
    pub kv_blocks: Vec<(InstanceId, u32, u32)>,
    /// Steps planned and not answered.
    pub num_steps_in_flight: usize,
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Scheduler {
    config: SchedulerConfig,
}

impl Scheduler {
    /// An empty cluster.
    #[must_use]
    pub fn new(config: SchedulerConfig) -> Self {
        Self { config }
    }

    /// Takes one event into account. Refusals arrive as [`RequestEvent::Failed`].
    pub fn handle(&mut self, _now: TimeNs, _event: Event) {
        let _ = &self.config;
    }

    /// Plans every lane that has work and no step in flight.
    pub fn plan(&mut self, _now: TimeNs) -> Vec<StepPlan> {
        Vec::new()
    }

    /// Takes what clients must be told, in order.
    pub fn take_events(&mut self) -> Vec<(RequestId, RequestEvent)> {
        Vec::new()
    }

    /// The next time at which [`Self::plan`] must be called even if nothing happens (deadlines,
    /// recovery time-outs).
    pub fn next_timer(&self) -> Option<TimeNs> {
        None
    }

    /// A snapshot.
    pub fn stats(&self) -> SchedulerStats {
        SchedulerStats::default()
    }
}
