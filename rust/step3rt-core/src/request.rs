//! What a client asks and what it is told.
//!
//! These types cross the crate's border in both directions; nothing is decided here.

use crate::error::RequestError;
use crate::ids::{RequestId, TenantId, TimeNs, TokenId};
use crate::step::{SamplingState, TokenLogprob};

/// A validated request.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// The coordinator's number for it.
    pub id: RequestId,
    /// At least one token.
    pub prompt: Vec<TokenId>,
    /// Tokens generated earlier (a resumed stream); the first new token has this position. They
    /// count towards `max_tokens`, so that a client resumes by repeating its request. Empty
    /// unless `n` is 1.
    pub resumed: Vec<TokenId>,
    /// How many continuations, 1 to [`MAX_CONTINUATIONS`].
    pub n: u32,
    /// How to sample; sequence `i` of `n` uses `seed + i`.
    pub sampling: SamplingState,
    /// Most tokens to generate per continuation, at least 1.
    pub max_tokens: u32,
    /// Lower runs first.
    pub priority: i32,
    /// Among requests of one priority, tenants get equal shares; and a tenant finds only its own
    /// beginnings in the prefix cache, so that nobody learns from timing what others ask. One and
    /// the same for all where tenants are not told apart.
    pub tenant: TenantId,
    /// When the client stops caring.
    pub deadline: Option<TimeNs>,
}

/// Most continuations of one request: what one request may claim of the cluster is bounded before
/// anything is allocated for it.
pub const MAX_CONTINUATIONS: u32 = 128;

/// What a client is told.
///
/// Per request: at most one `Started`; then, per continuation, tokens and exactly one end, which
/// is its `Finished` or the request's `Failed`.
#[derive(Clone, Debug, PartialEq)]
pub enum RequestEvent {
    /// The request has a place and its first chunk is planned.
    Started {
        /// Tokens at the beginning whose K and V were in the prefix cache.
        num_cached_tokens: u32,
    },
    /// Prompt logprobs, in order, as chunks complete; `offset` counts from prompt token 1. They
    /// come once per request, whatever `n`, before the first token of continuation 0.
    PromptLogprobs {
        /// Index of `logprobs[0]`, 0 being the second prompt token.
        offset: u32,
        /// In order.
        logprobs: Vec<TokenLogprob>,
    },
    /// One generated token. A stop id is a token like any other: it comes before its `Finished`.
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
    /// A stop string matched (see [`Event::Stop`](crate::scheduler::Event::Stop)).
    StopString,
    /// `max_tokens` or the context's end.
    Length,
}

/// Token counts of a continuation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Tokens generated, resumed ones and a stop id included.
    pub completion_tokens: u32,
    /// When it was submitted, first planned, got its first token, and ended; what never happened
    /// has the time of the end.
    pub times: [TimeNs; 4],
}
