//! A request that is refused before it reaches the scheduler, with the fields at fault.
//!
//! It never refuses by itself: the checks are in [`crate::generate`] and in the services.

use step3rt_core::error::{ErrorKind, RequestError};
use tonic::Status;

use crate::status::{FieldViolation, to_status_with_violations};

/// Why a request is refused, and which of its fields are at fault.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Kind and text for the client.
    pub error: RequestError,
    /// One entry per field at fault; may be empty.
    pub violations: Vec<FieldViolation>,
}

impl Refusal {
    /// A refusal that no single field explains.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self {
            error: RequestError {
                kind,
                message: message.into(),
                retry_after_ms: None,
            },
            violations: Vec::new(),
        }
    }

    /// A refusal because of one field.
    pub fn of_field(kind: ErrorKind, field: &str, description: impl Into<String>) -> Self {
        let mut violations = Violations::default();
        violations.add(kind, field, description);
        violations.into_refusal(kind)
    }
}

impl From<Refusal> for Status {
    fn from(refusal: Refusal) -> Self {
        to_status_with_violations(&refusal.error, &refusal.violations)
    }
}

/// Collects everything that is wrong with a request, so that a client learns it in one go.
#[derive(Debug, Default)]
pub struct Violations {
    kind: Option<ErrorKind>,
    violations: Vec<FieldViolation>,
}

impl Violations {
    /// Notes that `field` is at fault. The first kind noted decides the status.
    pub fn add(&mut self, kind: ErrorKind, field: &str, description: impl Into<String>) {
        self.kind.get_or_insert(kind);
        self.violations.push(FieldViolation {
            field: field.to_owned(),
            description: description.into(),
        });
    }

    /// Notes that `field` is at fault unless `is_valid`.
    pub fn check(&mut self, is_valid: bool, field: &str, description: impl FnOnce() -> String) {
        if !is_valid {
            self.add(ErrorKind::InvalidParameter, field, description());
        }
    }

    /// Notes a feature that this build does not have, if the request asks for it.
    pub fn unsupported(&mut self, is_asked: bool, field: &str, description: &str) {
        if is_asked {
            self.add(ErrorKind::UnsupportedFeature, field, description);
        }
    }

    /// Ok when nothing was noted.
    pub fn into_result(self) -> Result<(), Refusal> {
        match self.kind {
            None => Ok(()),
            Some(kind) => Err(self.into_refusal(kind)),
        }
    }

    fn into_refusal(self, kind: ErrorKind) -> Refusal {
        let message = self
            .violations
            .iter()
            .map(|violation| format!("{}: {}", violation.field, violation.description))
            .collect::<Vec<_>>()
            .join(". ");
        Refusal {
            violations: self.violations,
            ..Refusal::new(kind, message)
        }
    }
}
