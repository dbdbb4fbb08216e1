//! Keeps Python out of SIGINT while Rust handles it: a `KeyboardInterrupt` in the middle of a step,
//! or after the coordinator has drained because of that very signal, would be wrong.

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

/// Python's handler of SIGINT, put aside.
pub(crate) struct InterruptHandler {
    handler: Py<PyAny>,
}

impl InterruptHandler {
    /// Gives SIGINT back to the system, for Rust to take over. Only the main thread may; `None`
    /// elsewhere.
    pub(crate) fn silence(py: Python<'_>) -> PyResult<Option<Self>> {
        let default = py.import("signal")?.getattr("SIG_DFL")?;
        match set_interrupt_handler(&default) {
            Ok(handler) => Ok(Some(Self {
                handler: handler.unbind(),
            })),
            Err(error) if error.is_instance_of::<PyValueError>(py) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Puts it back.
    pub(crate) fn restore(self, py: Python<'_>) -> PyResult<()> {
        set_interrupt_handler(self.handler.bind(py)).map(drop)
    }
}

/// Returns the handler before. A `ValueError` means that this is not the main thread.
fn set_interrupt_handler<'py>(handler: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
    let signal = handler.py().import("signal")?;
    signal.call_method1("signal", (signal.getattr("SIGINT")?, handler))
}
