//! `step3rt._core`: binds the coordinator, the instance session and the fabric to Python.
//!
//! The only crate that knows `PyO3`. It converts and delegates; it never decides, waits with the
//! GIL, or keeps state of its own. Its contract is `python/step3rt/_core.pyi`.

#![expect(
    clippy::too_many_arguments,
    reason = "PyO3's own wrappers have five, and what Python calls takes keywords"
)]

mod detach;
mod errors;
mod events;
mod host;
mod measure;
mod outputs;
mod serve;
mod session;
mod signals;
mod sim;
mod slots;
mod tls;

/// The module; see the stub for what its members mean.
#[pyo3::pymodule]
mod _core {
    use pyo3::prelude::*;

    #[pymodule_export]
    use crate::events::{
        Arrival, Chunk, Drain, Join, LinkDown, LinkUp, LogitAdjustments, Sampling, SessionLost,
        StepPlan,
    };
    #[pymodule_export]
    use crate::host::{host_capabilities, rdma_findings, tls_findings};
    #[pymodule_export]
    use crate::measure::{echo_link, measure_link};
    #[pymodule_export]
    use crate::outputs::SequenceOutput;
    #[pymodule_export]
    use crate::serve::{list_instances, serve};
    #[pymodule_export]
    use crate::session::{NodeSession, Settings};

    #[pymodule_export]
    use crate::sim::{bench_scheduler, replay_traffic, simulate};

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("Event", crate::events::union(module.py())?)?;
        module.add("__version__", env!("CARGO_PKG_VERSION"))
    }
}
