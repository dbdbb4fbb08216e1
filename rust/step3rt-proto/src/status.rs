//! Turns errors into gRPC statuses with `google.rpc` details, in one `match`.
//!
//! It never decides policy by text: code, reason and retry follow from [`ErrorKind`] alone.

use std::collections::HashMap;
use std::time::Duration;

use step3rt_core::error::{ErrorKind, RequestError};
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

/// `google.rpc.ErrorInfo.domain` of every error of this project.
pub const ERROR_DOMAIN: &str = "step3rt.dev";

/// Wait before a retry when the error itself gives no hint.
const DEFAULT_RETRY_AFTER_MS: u64 = 1_000;

/// What clients are told of an [`ErrorKind`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// The gRPC code.
    pub code: Code,
    /// `google.rpc.ErrorInfo.reason`.
    pub reason: &'static str,
    /// Whether the same request may succeed later, unchanged.
    pub is_retryable: bool,
}

/// One field of a request that was refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FieldViolation {
    /// Path of the field, as in the .proto: `sampling.temperature`.
    pub field: String,
    /// What was found, why it is not allowed, what to do.
    pub description: String,
}

/// The one mapping from errors to gRPC.
#[must_use]
pub fn policy(kind: ErrorKind) -> Policy {
    let (code, reason, is_retryable) = match kind {
        ErrorKind::InvalidParameter => (Code::InvalidArgument, "INVALID_PARAMETER", false),
        ErrorKind::PromptTooLong => (Code::InvalidArgument, "PROMPT_TOO_LONG", false),
        ErrorKind::UnsupportedFeature => (Code::InvalidArgument, "UNSUPPORTED_FEATURE", false),
        ErrorKind::ModelNotFound => (Code::NotFound, "MODEL_NOT_FOUND", false),
        ErrorKind::DuplicateRequestId => (Code::AlreadyExists, "DUPLICATE_REQUEST_ID", false),
        ErrorKind::QueueFull => (Code::ResourceExhausted, "QUEUE_FULL", true),
        ErrorKind::SlowConsumer => (Code::ResourceExhausted, "SLOW_CONSUMER", false),
        ErrorKind::Draining => (Code::Unavailable, "DRAINING", true),
        ErrorKind::NodeLost => (Code::Unavailable, "NODE_LOST", true),
        ErrorKind::EngineNotReady => (Code::Unavailable, "ENGINE_NOT_READY", true),
        ErrorKind::DeadlineExceeded => (Code::DeadlineExceeded, "DEADLINE_EXCEEDED", false),
        ErrorKind::Cancelled => (Code::Cancelled, "CANCELLED", false),
        ErrorKind::Internal => (Code::Internal, "INTERNAL", false),
    };
    Policy {
        code,
        reason,
        is_retryable,
    }
}

/// The status of `error`, with `ErrorInfo`, and `RetryInfo` when a retry may help.
///
/// The message goes out as it is: for [`ErrorKind::Internal`] the caller must have replaced
/// diagnostics by an id.
#[must_use]
pub fn to_status(error: &RequestError) -> Status {
    to_status_with_violations(error, &[])
}

/// As [`to_status`], with one `BadRequest.FieldViolation` per entry of `violations`.
#[must_use]
pub fn to_status_with_violations(error: &RequestError, violations: &[FieldViolation]) -> Status {
    let policy = policy(error.kind);
    let mut details = ErrorDetails::with_error_info(
        policy.reason,
        ERROR_DOMAIN,
        HashMap::<String, String>::new(),
    );
    if policy.is_retryable {
        let retry_after_ms = error.retry_after_ms.unwrap_or(DEFAULT_RETRY_AFTER_MS);
        details.set_retry_info(Some(Duration::from_millis(retry_after_ms)));
    }
    for violation in violations {
        details.add_bad_request_violation(&violation.field, &violation.description);
    }
    Status::with_error_details(policy.code, &error.message, details)
}

/// The same status, with `google.rpc.RequestInfo` of `request_id` among its details.
#[must_use]
pub fn with_request_id(status: &Status, request_id: &str) -> Status {
    let mut details = status.get_error_details();
    details.set_request_info(request_id, "");
    let metadata = status.metadata().clone();
    Status::with_error_details_and_metadata(status.code(), status.message(), details, metadata)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL_KINDS: [ErrorKind; 13] = [
        ErrorKind::InvalidParameter,
        ErrorKind::PromptTooLong,
        ErrorKind::UnsupportedFeature,
        ErrorKind::ModelNotFound,
        ErrorKind::DuplicateRequestId,
        ErrorKind::QueueFull,
        ErrorKind::SlowConsumer,
        ErrorKind::Draining,
        ErrorKind::NodeLost,
        ErrorKind::EngineNotReady,
        ErrorKind::DeadlineExceeded,
        ErrorKind::Cancelled,
        ErrorKind::Internal,
    ];

    fn error(kind: ErrorKind, retry_after_ms: Option<u64>) -> RequestError {
        RequestError {
            kind,
            message: "text".to_owned(),
            retry_after_ms,
        }
    }

    #[test]
    fn every_kind_carries_its_reason_and_our_domain() {
        for kind in ALL_KINDS {
            let status = to_status(&error(kind, None));
            let info = status.get_details_error_info().expect("ErrorInfo");
            assert_eq!(info.reason, policy(kind).reason);
            assert_eq!(info.domain, ERROR_DOMAIN);
            assert_eq!(status.code(), policy(kind).code);
        }
    }

    #[test]
    fn a_client_may_try_again_where_time_heals() {
        let retryable = ALL_KINDS.iter().filter(|kind| policy(**kind).is_retryable);
        let expected = [
            ErrorKind::QueueFull,
            ErrorKind::Draining,
            ErrorKind::NodeLost,
            ErrorKind::EngineNotReady,
        ];
        assert!(retryable.eq(&expected));
    }

    #[test]
    fn retry_info_is_present_exactly_when_a_retry_may_help() {
        for kind in ALL_KINDS {
            let status = to_status(&error(kind, Some(250)));
            let delay = status
                .get_details_retry_info()
                .and_then(|info| info.retry_delay);
            let expected = policy(kind)
                .is_retryable
                .then_some(Duration::from_millis(250));
            assert_eq!(delay, expected, "{kind:?}");
        }
    }

    #[test]
    fn a_request_id_is_added_and_nothing_else_changes() {
        let mut status = to_status(&error(ErrorKind::QueueFull, Some(250)));
        status
            .metadata_mut()
            .insert("a-key", "value".parse().expect("ASCII"));
        let named = with_request_id(&status, "r-1");
        let info = named.get_details_request_info().expect("RequestInfo");
        assert_eq!(info.request_id, "r-1");
        let reason = named.get_details_error_info().expect("kept").reason;
        assert_eq!(reason, "QUEUE_FULL");
        let retry = named.get_details_retry_info().expect("kept");
        assert_eq!(retry.retry_delay, Some(Duration::from_millis(250)));
        assert_eq!(
            (named.code(), named.message()),
            (status.code(), status.message())
        );
        assert_eq!(named.metadata().get("a-key").expect("kept"), "value");
    }

    #[test]
    fn reasons_are_distinct() {
        let reasons: std::collections::HashSet<_> =
            ALL_KINDS.iter().map(|kind| policy(*kind).reason).collect();
        assert_eq!(reasons.len(), ALL_KINDS.len());
    }

    #[test]
    fn field_violations_travel_in_order() {
        let violations = ["a", "b"].map(|field| FieldViolation {
            field: field.to_owned(),
            description: "why".to_owned(),
        });
        let status =
            to_status_with_violations(&error(ErrorKind::InvalidParameter, None), &violations);
        let sent = status.get_details_bad_request().expect("BadRequest");
        let fields: Vec<_> = sent.field_violations.iter().map(|v| &v.field).collect();
        assert_eq!(fields, ["a", "b"]);
    }
}
