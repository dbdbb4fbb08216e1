//! Why something did not happen. Policy reads [`ErrorKind`], people read the text.

use thiserror::Error;

/// The closed list of reasons that leave this crate. The gRPC code, the HTTP status and whether a
/// client may retry follow from it alone (one `match`, in `step3rt-proto`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// A parameter is out of its range.
    InvalidParameter,
    /// The prompt does not fit the context or the KV pool.
    PromptTooLong,
    /// A known feature that this build or model does not have.
    UnsupportedFeature,
    /// The request names another model.
    ModelNotFound,
    /// A request with this id is live.
    DuplicateRequestId,
    /// The waiting queue is full; retry later.
    QueueFull,
    /// The client does not read what it asked for.
    SlowConsumer,
    /// The server shuts down; retry elsewhere.
    Draining,
    /// An instance died and did not come back in time; retry.
    NodeLost,
    /// The cluster has not enough instances yet; retry.
    EngineNotReady,
    /// The request's deadline passed.
    DeadlineExceeded,
    /// The client cancelled.
    Cancelled,
    /// A defect or a corrupt result.
    Internal,
}

/// An error that ends one request and harms no other.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{message}")]
pub struct RequestError {
    /// Decides code and retry.
    pub kind: ErrorKind,
    /// What happened, why it is not allowed, what to do.
    pub message: String,
    /// A hint for retryable kinds.
    pub retry_after_ms: Option<u64>,
}

/// How long a client waits before it asks a cluster again that drains, starts or recovers: about
/// the time an instance needs to register.
const UNAVAILABLE_RETRY_MS: u64 = 1_000;

/// Why the scheduler ends a request early: the data from which [`RequestError`] is made.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub(crate) enum Failure {
    #[error(
        "The prompt has no tokens. A model continues at least one token. Send a prompt, or the \
         beginning-of-sequence token alone"
    )]
    EmptyPrompt,
    #[error(
        "`max_tokens` is 0. A request generates at least one token per continuation. Set \
         `max_tokens` to 1 or more"
    )]
    NoTokensWanted,
    #[error(
        "`n` is {n}. A request has 1 to {max} continuations, because each takes a place and KV \
         blocks of its own. Set `n` within this range and send more requests"
    )]
    ContinuationCount { n: u32, max: u32 },
    #[error(
        "`n` is {n} and the request resumes {resumed} tokens. The tokens of one continuation \
         cannot resume several. Resume every continuation with a request of its own"
    )]
    ResumesMany { n: u32, resumed: usize },
    #[error(
        "The prompt has {known} tokens, resumed ones included. The context holds {max_model_len} \
         tokens, prompt and output together. Shorten the prompt to at most {} tokens",
        max_model_len - 1
    )]
    PromptFillsContext { known: usize, max_model_len: u32 },
    #[error(
        "The request may grow to {max_known_tokens} tokens, which need {needed} KV blocks. The \
         largest attention instance has {available} blocks of {block_size_tokens} tokens. \
         Shorten the prompt, lower `max_tokens`, or give the instances more KV memory"
    )]
    ExceedsKvPool {
        max_known_tokens: u32,
        needed: u64,
        available: u32,
        block_size_tokens: u32,
    },
    #[error(
        "{waiting} requests wait for a place already. The queue is bounded by \
         `max_waiting_requests` = {max}. Retry in {retry_after_ms} ms"
    )]
    QueueFull {
        waiting: usize,
        max: u32,
        retry_after_ms: u64,
    },
    #[error(
        "The request gave its place in the queue to another tenant. The queue is bounded by \
         `max_waiting_requests` = {max} and full, and this tenant had more than an equal share of \
         it. Retry in {retry_after_ms} ms, or send fewer requests at a time"
    )]
    QueueShareExceeded { max: u32, retry_after_ms: u64 },
    #[error(
        "The server is draining. It finishes what it has and accepts nothing new. Send the \
         request to another server"
    )]
    Draining,
    #[error(
        "The cluster cannot compute: {num_attention} attention instances are ready and the FFN \
         instances {} every expert. A step needs both. Retry when the missing instances have \
         registered",
        if *has_all_experts { "hold" } else { "do not hold" }
    )]
    NotReady {
        num_attention: usize,
        has_all_experts: bool,
    },
    #[error(
        "The instance that ran this request was lost and no replacement came within \
         {recovery_timeout_ms} ms. The tokens sent so far are valid. Retry, resuming them"
    )]
    NotRecovered { recovery_timeout_ms: u64 },
    #[error(
        "Every step of this request has failed for {recovery_timeout_ms} ms. The tokens sent so \
         far are valid. Retry, resuming them"
    )]
    StepsKeepFailing { recovery_timeout_ms: u64 },
    #[error(
        "The deadline passed {after_ms} ms after the request came. Nothing is computed for a client \
         that has stopped waiting. Set a later deadline or lower `max_tokens`"
    )]
    DeadlinePassed { after_ms: u64 },
    #[error(
        "The request cannot end within its deadline: it would take {least_ms} ms at the least \
         ({num_prompt_tokens} tokens to compute first, {num_new_tokens} to generate, and those who \
         wait before it), and {left_ms} ms are left. Nothing is computed for an answer that comes \
         too late. Set a later deadline, shorten the prompt, or lower `min_tokens`"
    )]
    DeadlineOutOfReach {
        least_ms: u64,
        left_ms: u64,
        num_prompt_tokens: u32,
        num_new_tokens: u32,
    },
    #[error("The request was cancelled. Nothing more is computed for it")]
    Cancelled,
    #[error(
        "The logits of continuation {index} at token {position} were not finite. Sampling from \
         them would be noise. Report this with the prompt; other requests are not affected"
    )]
    CorruptLogits { index: u32, position: u32 },
    #[error(
        "The answer to a step does not match its plan for continuation {index} at token \
         {position}. Guessing would corrupt the stream. Report this; other requests are not \
         affected"
    )]
    MismatchedOutput { index: u32, position: u32 },
}

impl Failure {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::EmptyPrompt
            | Self::NoTokensWanted
            | Self::ContinuationCount { .. }
            | Self::ResumesMany { .. } => ErrorKind::InvalidParameter,
            Self::PromptFillsContext { .. } | Self::ExceedsKvPool { .. } => {
                ErrorKind::PromptTooLong
            }
            Self::QueueFull { .. } | Self::QueueShareExceeded { .. } => ErrorKind::QueueFull,
            Self::Draining => ErrorKind::Draining,
            Self::NotReady { .. } => ErrorKind::EngineNotReady,
            Self::NotRecovered { .. } | Self::StepsKeepFailing { .. } => ErrorKind::NodeLost,
            Self::DeadlinePassed { .. } | Self::DeadlineOutOfReach { .. } => {
                ErrorKind::DeadlineExceeded
            }
            Self::Cancelled => ErrorKind::Cancelled,
            Self::CorruptLogits { .. } | Self::MismatchedOutput { .. } => ErrorKind::Internal,
        }
    }

    fn retry_after_ms(&self) -> Option<u64> {
        match self {
            Self::QueueFull { retry_after_ms, .. }
            | Self::QueueShareExceeded { retry_after_ms, .. } => Some(*retry_after_ms),
            Self::Draining
            | Self::NotReady { .. }
            | Self::NotRecovered { .. }
            | Self::StepsKeepFailing { .. } => Some(UNAVAILABLE_RETRY_MS),
            _ => None,
        }
    }
}

impl From<Failure> for RequestError {
    fn from(failure: Failure) -> Self {
        Self {
            kind: failure.kind(),
            message: failure.to_string(),
            retry_after_ms: failure.retry_after_ms(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_failure_says_what_why_and_what_to_do() {
        let failures = [
            Failure::EmptyPrompt,
            Failure::NoTokensWanted,
            Failure::ContinuationCount { n: 129, max: 128 },
            Failure::ResumesMany { n: 2, resumed: 5 },
            Failure::PromptFillsContext {
                known: 4096,
                max_model_len: 4096,
            },
            Failure::ExceedsKvPool {
                max_known_tokens: 40_960,
                needed: 640,
                available: 512,
                block_size_tokens: 64,
            },
            Failure::QueueFull {
                waiting: 100,
                max: 100,
                retry_after_ms: 250,
            },
            Failure::QueueShareExceeded {
                max: 100,
                retry_after_ms: 250,
            },
            Failure::Draining,
            Failure::NotReady {
                num_attention: 0,
                has_all_experts: true,
            },
            Failure::NotReady {
                num_attention: 2,
                has_all_experts: false,
            },
            Failure::NotRecovered {
                recovery_timeout_ms: 10_000,
            },
            Failure::StepsKeepFailing {
                recovery_timeout_ms: 10_000,
            },
            Failure::DeadlinePassed { after_ms: 1_500 },
            Failure::DeadlineOutOfReach {
                least_ms: 2_400,
                left_ms: 1_000,
                num_prompt_tokens: 9_000,
                num_new_tokens: 16,
            },
            Failure::Cancelled,
            Failure::CorruptLogits {
                index: 0,
                position: 7,
            },
            Failure::MismatchedOutput {
                index: 1,
                position: 0,
            },
        ];
        let lines: Vec<String> = failures
            .into_iter()
            .map(|failure| {
                let error = RequestError::from(failure);
                let retry = error
                    .retry_after_ms
                    .map_or(String::new(), |ms| format!(" (retry after {ms} ms)"));
                format!("{:?}{retry}: {error}", error.kind)
            })
            .collect();
        insta::assert_snapshot!(lines.join("\n"));
    }
}
