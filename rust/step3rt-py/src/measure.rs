//! `measure_link` and `echo_link`, for `step3rt bench link`.

use pyo3::prelude::*;
use step3rt_fabric::measure::{self, MeasureError, Plan};
use step3rt_tls::Identity;

use crate::detach::without_gil;
use crate::errors::{measure_error, setup_error};
use crate::tls::TlsPaths;

/// Measures rounds with the process at `address`: (one way in microseconds, of every round; CPU
/// microseconds of this process per round).
#[pyfunction]
#[pyo3(signature = (carrier, num_bytes, num_rounds, address, tls=None))]
pub(crate) fn measure_link(
    py: Python<'_>,
    carrier: &str,
    num_bytes: usize,
    num_rounds: usize,
    address: &str,
    tls: Option<TlsPaths>,
) -> PyResult<(Vec<f64>, f64)> {
    let tls = identity(py, tls)?;
    let measured = plan(carrier, num_bytes, num_rounds)
        .and_then(|plan| without_gil(py, || measure::measure(plan, tls, address)));
    let times = measured.map_err(|error| measure_error(py, &error))?;
    Ok((times.one_way_us, times.cpu_us_per_round))
}

/// The other process of `measure_link`; writes to standard output.
#[pyfunction]
#[pyo3(signature = (carrier, num_bytes, num_rounds, tls=None))]
pub(crate) fn echo_link(
    py: Python<'_>,
    carrier: &str,
    num_bytes: usize,
    num_rounds: usize,
    tls: Option<TlsPaths>,
) -> PyResult<()> {
    let tls = identity(py, tls)?;
    plan(carrier, num_bytes, num_rounds)
        .and_then(|plan| without_gil(py, || measure::echo(plan, tls, &mut std::io::stdout())))
        .map_err(|error| measure_error(py, &error))
}

fn identity(py: Python<'_>, tls: Option<TlsPaths>) -> PyResult<Option<Identity>> {
    let identity = tls.map(|paths| Identity::load(paths.into())).transpose();
    identity.map_err(|error| setup_error(py, &error))
}

fn plan(carrier: &str, num_bytes: usize, num_rounds: usize) -> Result<Plan, MeasureError> {
    Ok(Plan {
        carrier: carrier.parse()?,
        num_bytes,
        num_rounds,
    })
}
