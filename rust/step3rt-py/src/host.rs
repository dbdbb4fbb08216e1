//! `host_capabilities`, for `step3rt doctor`.

use pyo3::prelude::*;
use pyo3::types::PyDict;
use step3rt_node::host;

use crate::detach::without_gil;

/// What this host's fabrics can do, by trying: name -> (usable, why).
#[pyfunction]
pub(crate) fn host_capabilities(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let found = PyDict::new(py);
    for capability in without_gil(py, host::capabilities) {
        found.set_item(capability.name, (capability.is_usable, capability.reason))?;
    }
    Ok(found)
}
