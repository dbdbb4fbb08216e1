//! The only place that releases the GIL. Nothing that holds it may wait on another process.

use std::time::Duration;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

/// Runs `work` without the GIL.
pub(crate) fn without_gil<T: Send>(py: Python<'_>, work: impl FnOnce() -> T + Send) -> T {
    py.detach(work)
}

/// From inside [`without_gil`], on the thread that called it: lets Python handle the signals that
/// have come. The error is what a handler raised, such as `KeyboardInterrupt`.
#[expect(
    clippy::redundant_closure_for_method_calls,
    reason = "the method itself is not general enough over Python's lifetime"
)]
pub(crate) fn handle_signals() -> PyResult<()> {
    Python::attach(|py| py.check_signals())
}

/// A waiting time that a Python caller named.
pub(crate) fn timeout_from_python(timeout_s: f64) -> PyResult<Duration> {
    Duration::try_from_secs_f64(timeout_s)
        .map_err(|_| PyValueError::new_err(format!("timeout_s must not be {timeout_s}")))
}
