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
