//! The only place where an error becomes a Python exception. Classes live in `step3rt.errors`;
//! this module never defines one.

use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyType;
use step3rt_fabric::endpoint::BindError;
use step3rt_fabric::measure::MeasureError;
use step3rt_node::error::{NodeError, NodeErrorKind};
use step3rt_server::ListError;
use step3rt_server::listeners::ListenError;
use step3rt_server::start_error::StartError;
use step3rt_tls::SetupError;

/// A class of `step3rt.errors`, looked up at its first use so that importing this module stays
/// fast.
struct ErrorClass {
    name: &'static str,
    class: PyOnceLock<Py<PyType>>,
}

impl ErrorClass {
    const fn new(name: &'static str) -> Self {
        Self {
            name,
            class: PyOnceLock::new(),
        }
    }

    fn raise(&self, py: Python<'_>, message: String) -> PyErr {
        match self.class.import(py, "step3rt.errors", self.name) {
            Ok(class) => PyErr::from_type(class.clone(), (message,)),
            Err(broken_installation) => broken_installation,
        }
    }
}

static CONFIG_ERROR: ErrorClass = ErrorClass::new("ConfigError");
static INVALID_ARGUMENT: ErrorClass = ErrorClass::new("InvalidArgument");
static UNAVAILABLE: ErrorClass = ErrorClass::new("Unavailable");
static CANCELLED: ErrorClass = ErrorClass::new("Cancelled");
static INTERNAL: ErrorClass = ErrorClass::new("Internal");

/// The exception for an error of an instance's session or links.
pub(crate) fn node_error(py: Python<'_>, error: &NodeError) -> PyErr {
    let class = match error.kind() {
        NodeErrorKind::Config => &CONFIG_ERROR,
        NodeErrorKind::InvalidArgument => &INVALID_ARGUMENT,
        NodeErrorKind::Unavailable => &UNAVAILABLE,
        NodeErrorKind::Cancelled => &CANCELLED,
        NodeErrorKind::Internal => &INTERNAL,
    };
    class.raise(py, error.to_string())
}

/// The exception for a coordinator that does not start.
pub(crate) fn start_error(py: Python<'_>, error: &StartError) -> PyErr {
    let class = match error {
        StartError::System(_) => &INTERNAL,
        // Another program may leave the port, and the address may come: not for ever, as a setting.
        StartError::Listen(ListenError::Bind { .. }) => &UNAVAILABLE,
        StartError::Config(_)
        | StartError::Scheduler(_)
        | StartError::Checkpoint(_)
        | StartError::Tokenizer(_)
        | StartError::ForeignTokenizer { .. }
        | StartError::ChatTemplate(_)
        | StartError::Listen(_)
        | StartError::Tls(_) => &CONFIG_ERROR,
    };
    class.raise(py, error.to_string())
}

/// The exception for a coordinator that does not answer.
pub(crate) fn list_error(py: Python<'_>, error: &ListError) -> PyErr {
    let class = match error {
        ListError::Unreachable { .. } => &UNAVAILABLE,
        ListError::Tls(_) => &CONFIG_ERROR,
        ListError::System(_) => &INTERNAL,
    };
    class.raise(py, error.to_string())
}

/// The exception for a link that could not be measured.
pub(crate) fn measure_error(py: Python<'_>, error: &MeasureError) -> PyErr {
    let class = match error {
        MeasureError::Carrier(_)
        | MeasureError::Nothing { .. }
        | MeasureError::Bind(BindError::Geometry(_)) => &INVALID_ARGUMENT,
        MeasureError::Bind(_)
        | MeasureError::Connect(_)
        | MeasureError::Push(_)
        | MeasureError::Ended
        | MeasureError::System(_) => &UNAVAILABLE,
    };
    class.raise(py, error.to_string())
}

/// The exception for certificate, key or CA that cannot be used.
pub(crate) fn setup_error(py: Python<'_>, error: &SetupError) -> PyErr {
    CONFIG_ERROR.raise(py, error.to_string())
}

/// The exception for an argument that the contract does not allow.
pub(crate) fn invalid_argument(py: Python<'_>, message: String) -> PyErr {
    INVALID_ARGUMENT.raise(py, message)
}

/// The exception for a session that two threads use at once.
pub(crate) fn used_by_another_thread() -> PyErr {
    PyRuntimeError::new_err(
        "NodeSession is in use by another thread: it belongs to one thread, the instance's loop. \
         Call it from that thread only",
    )
}
