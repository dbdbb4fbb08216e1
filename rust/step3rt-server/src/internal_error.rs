//! Internal errors: the text goes to the log, and the client gets an id to find it by.
//!
//! It never changes an error that a client can do something about.

use step3rt_core::error::{ErrorKind, RequestError};
use tracing::error;

/// `error` as a client may see it.
pub fn without_diagnostics(error: RequestError) -> RequestError {
    if error.kind != ErrorKind::Internal {
        return error;
    }
    let id = format!("{:016x}", crate::random::u64());
    error!(error_id = id, error = error.message, "internal error");
    RequestError {
        message: format!(
            "Internal error {id}. Its details are in the server's log. Report it with this id"
        ),
        ..error
    }
}
