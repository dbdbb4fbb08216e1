//! `host_capabilities`, `rdma_findings` and `tls_findings`, for `step3rt doctor`.

use pyo3::prelude::*;
use pyo3::types::PyDict;
use step3rt_fabric::RdmaFinding;
use step3rt_node::host;
use step3rt_tls::TlsFiles;
use step3rt_tls::findings::{self, Level};

use crate::detach::without_gil;
use crate::tls::TlsPaths;

/// What this host's fabrics can do, by trying: name -> (usable, why).
#[pyfunction]
pub(crate) fn host_capabilities(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let found = PyDict::new(py);
    for capability in without_gil(py, host::capabilities) {
        found.set_item(capability.name, (capability.is_usable, capability.reason))?;
    }
    Ok(found)
}

/// What decides whether this host can use RDMA, in the order in which to put it right: (as it must
/// be, what it is, what to do).
#[pyfunction]
pub(crate) fn rdma_findings(py: Python<'_>) -> Vec<(bool, String, String)> {
    let findings = without_gil(py, step3rt_fabric::rdma_findings);
    let fields = |finding: RdmaFinding| (finding.is_good, finding.found, finding.fix);
    findings.into_iter().map(fields).collect()
}

/// What is right and wrong with certificate, key and CA: ("ok", "note" or "missing", what it is, what to
/// do).
#[pyfunction]
pub(crate) fn tls_findings(py: Python<'_>, tls: TlsPaths) -> Vec<(&'static str, String, String)> {
    let files = TlsFiles::from(tls);
    let findings = without_gil(py, || findings::findings(files));
    let level = |level| match level {
        Level::Ok => "ok",
        Level::Note => "note",
        Level::Missing => "missing",
    };
    let fields = |finding: findings::Finding| (level(finding.level), finding.found, finding.fix);
    findings.into_iter().map(fields).collect()
}
