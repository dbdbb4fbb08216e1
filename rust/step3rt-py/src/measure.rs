//! `measure_link` and `echo_link`, for `step3rt bench link`.

use pyo3::prelude::*;
use step3rt_fabric::measure::{self, MeasureError, Plan};

use crate::detach::without_gil;
use crate::errors::measure_error;

/// Measures rounds with the process at `address`: (one way in microseconds, of every round; CPU
/// microseconds of this process per round).
#[pyfunction]
pub(crate) fn measure_link(
    py: Python<'_>,
    carrier: &str,
    num_bytes: usize,
    num_rounds: usize,
    address: &str,
) -> PyResult<(Vec<f64>, f64)> {
    let measured = plan(carrier, num_bytes, num_rounds)
        .and_then(|plan| without_gil(py, || measure::measure(plan, address)));
    let times = measured.map_err(|error| measure_error(py, &error))?;
    Ok((times.one_way_us, times.cpu_us_per_round))
}

/// The other process of `measure_link`; writes to standard output.
#[pyfunction]
pub(crate) fn echo_link(
    py: Python<'_>,
    carrier: &str,
    num_bytes: usize,
    num_rounds: usize,
) -> PyResult<()> {
    plan(carrier, num_bytes, num_rounds)
        .and_then(|plan| without_gil(py, || measure::echo(plan, &mut std::io::stdout())))
        .map_err(|error| measure_error(py, &error))
}

fn plan(carrier: &str, num_bytes: usize, num_rounds: usize) -> Result<Plan, MeasureError> {
    Ok(Plan {
        carrier: carrier.parse()?,
        num_bytes,
        num_rounds,
    })
}
