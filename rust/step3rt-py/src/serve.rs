//! The coordinator, run and asked from Python.

use pyo3::prelude::*;
use step3rt_server::run;

use crate::detach::{timeout_from_python, without_gil};
use crate::errors;
use crate::signals::InterruptHandler;

/// Runs the coordinator until SIGTERM, SIGINT or a fatal error, and returns the exit code.
#[pyfunction]
pub(crate) fn serve(py: Python<'_>, config_json: &str) -> PyResult<u8> {
    let handler = InterruptHandler::silence(py)?;
    let code = without_gil(py, || run(config_json));
    if let Some(handler) = handler {
        handler.restore(py)?;
    }
    code.map_err(|error| errors::start_error(py, &error))
}

/// `ListInstances` of the coordinator at `control_address`, as JSON.
#[pyfunction]
pub(crate) fn list_instances(
    py: Python<'_>,
    control_address: &str,
    timeout_s: f64,
) -> PyResult<String> {
    let timeout = timeout_from_python(timeout_s)?;
    without_gil(py, || {
        step3rt_server::list_instances(control_address, timeout)
    })
    .map_err(|error| errors::list_error(py, &error))
}
