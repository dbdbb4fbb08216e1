//! `simulate`, `bench_scheduler` and `replay_traffic`, for `step3rt sim` and `step3rt bench`.

use pyo3::prelude::*;
use step3rt_sim::options;

use crate::detach::without_gil;
use crate::errors::invalid_argument;

/// Runs simulated seeds of the scheduler.
#[pyfunction]
pub(crate) fn simulate(py: Python<'_>, options_json: &str) -> PyResult<String> {
    without_gil(py, || options::simulate(options_json))
        .map_err(|message| invalid_argument(py, message))
}

/// Measures what the scheduler costs per lane step.
#[pyfunction]
pub(crate) fn bench_scheduler(py: Python<'_>, options_json: &str) -> PyResult<String> {
    without_gil(py, || options::bench_scheduler(options_json))
        .map_err(|message| invalid_argument(py, message))
}

/// Replays a trace of requests through the scheduler and a plain policy.
#[pyfunction]
pub(crate) fn replay_traffic(py: Python<'_>, options_json: &str) -> PyResult<String> {
    without_gil(py, || options::replay_traffic(options_json))
        .map_err(|message| invalid_argument(py, message))
}
