//! The coordinator, run and asked from Python.

use pyo3::prelude::*;
use step3rt_server::run;
use step3rt_tls::TlsFiles;

use crate::detach::{timeout_from_python, without_gil};
use crate::errors;
use crate::signals::InterruptHandler;
use crate::tls::TlsPaths;

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
#[pyo3(signature = (control_address, timeout_s, tls=None))]
pub(crate) fn list_instances(
    py: Python<'_>,
    control_address: &str,
    timeout_s: f64,
    tls: Option<TlsPaths>,
) -> PyResult<String> {
    let timeout = timeout_from_python(timeout_s)?;
    let tls = tls.map(TlsFiles::from);
    without_gil(py, || {
        step3rt_server::list_instances(control_address, tls, timeout)
    })
    .map_err(|error| errors::list_error(py, &error))
}
