//! `NodeSession`: an instance's session, links and slots, for the one thread that is its loop.
//!
//! It binds [`Node`] and adds nothing to what that decides.

use std::sync::{Mutex, MutexGuard, TryLockError};

use pyo3::prelude::*;
use pyo3::types::{PyList, PyMemoryView};
use step3rt_core::ids::{InstanceId, LaneId, StepId};
use step3rt_core::step::StepOutput;
use step3rt_fabric::frame::Frame;
use step3rt_node::error::NodeError;
use step3rt_node::node::{Node, StepTiming};
use step3rt_node::options::NodeOptions;
use step3rt_proto::v1;
use step3rt_server::config::LogFormat;

use crate::detach::{handle_signals, timeout_from_python, without_gil};
use crate::outputs::SequenceOutput;
use crate::signals::InterruptHandler;
use crate::{errors, events, slots};

/// The cluster's settings as the coordinator fixed them.
#[pyclass(frozen, get_all, module = "step3rt._core")]
pub(crate) struct Settings {
    num_lanes: u32,
    max_tokens_per_micro_batch: u32,
    block_size_tokens: u32,
    max_model_len: u32,
    ep_size: u32,
    /// At least 1.
    max_steps_in_flight: u32,
    compute_dtype: String,
    a2f_dtype: String,
    f2a_dtype: String,
    kv_dtype: String,
    fabric: String,
    /// 0 from a coordinator that does not say.
    num_attention: u32,
}

impl Settings {
    fn new(settings: &v1::ClusterSettings) -> Self {
        Self {
            num_lanes: settings.num_lanes,
            max_tokens_per_micro_batch: settings.max_tokens_per_micro_batch,
            block_size_tokens: settings.block_size_tokens,
            max_model_len: settings.max_model_len,
            ep_size: settings.ep_size,
            max_steps_in_flight: settings.max_steps_in_flight.max(1),
            compute_dtype: settings.compute_dtype.clone(),
            a2f_dtype: settings.a2f_dtype.clone(),
            f2a_dtype: settings.f2a_dtype.clone(),
            kv_dtype: settings.kv_dtype.clone(),
            fabric: settings.fabric.clone(),
            num_attention: settings.num_attention,
        }
    }
}

/// One instance's session with the coordinator, and its fabric endpoint.
#[pyclass(frozen, module = "step3rt._core")]
pub(crate) struct NodeSession {
    #[pyo3(get)]
    instance_id: u32,
    #[pyo3(get)]
    role_rank: u32,
    #[pyo3(get)]
    epoch: u64,
    #[pyo3(get)]
    settings: Py<Settings>,
    /// Never waited for: whoever finds it locked is the wrong thread.
    node: Mutex<Node>,
}

impl NodeSession {
    fn lock(&self) -> PyResult<MutexGuard<'_, Node>> {
        match self.node.try_lock() {
            Ok(node) => Ok(node),
            Err(TryLockError::Poisoned(poisoned)) => Ok(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => Err(errors::used_by_another_thread()),
        }
    }

    /// Runs `work` on the node without the GIL.
    fn detached<T: Send>(
        &self,
        py: Python<'_>,
        work: impl FnOnce(&mut Node) -> Result<T, NodeError> + Send,
    ) -> PyResult<T> {
        let node = &mut *self.lock()?;
        without_gil(py, || work(node)).map_err(|error| errors::node_error(py, &error))
    }
}

#[pymethods]
impl NodeSession {
    #[new]
    fn new(py: Python<'_>, options_json: &str) -> PyResult<Self> {
        let raise = |error: NodeError| errors::node_error(py, &error);
        let options = NodeOptions::from_json(options_json).map_err(raise)?;
        step3rt_server::telemetry::start(LogFormat::Text);
        let mut raised_by_signal = None;
        let connected = without_gil(py, || {
            Node::connect(options, &mut || match handle_signals() {
                Ok(()) => false,
                Err(exception) => {
                    raised_by_signal = Some(exception);
                    true
                }
            })
        });
        if let Some(exception) = raised_by_signal {
            return Err(exception);
        }
        let node = connected.map_err(raise)?;
        let welcome = node.welcome();
        Ok(Self {
            instance_id: welcome.instance.0,
            role_rank: welcome.role_rank,
            epoch: welcome.epoch.0,
            settings: Py::new(py, Settings::new(&welcome.settings))?,
            node: Mutex::new(node),
        })
    }

    fn set_status(&self, py: Python<'_>, text: &str) -> PyResult<()> {
        self.lock()?
            .set_status(text)
            .map_err(|error| errors::node_error(py, &error))
    }

    #[pyo3(signature = (a2f_slot_bytes, f2a_slot_bytes, device_offer=None))]
    fn bind(
        &self,
        py: Python<'_>,
        a2f_slot_bytes: usize,
        f2a_slot_bytes: usize,
        device_offer: Option<&[u8]>,
    ) -> PyResult<()> {
        self.detached(py, |node| {
            node.bind(a2f_slot_bytes, f2a_slot_bytes, device_offer)
        })
    }

    fn ready(&self, py: Python<'_>, num_kv_blocks: u32) -> PyResult<()> {
        let takes_signals = InterruptHandler::silence(py)?.is_some();
        self.detached(py, |node| node.ready(num_kv_blocks, takes_signals))
    }

    fn poll<'py>(&self, py: Python<'py>, timeout_s: f64) -> PyResult<Bound<'py, PyList>> {
        let timeout = timeout_from_python(timeout_s)?;
        let mut news = Vec::new();
        self.detached(py, |node| node.poll(timeout, &mut news))?;
        events::to_python(py, news)
    }

    fn send_slot<'py>(
        &self,
        py: Python<'py>,
        peer: u32,
        lane: u8,
    ) -> PyResult<Bound<'py, PyMemoryView>> {
        let slot = self
            .lock()?
            .send_slot(InstanceId(peer), LaneId(lane))
            .map_err(|error| errors::node_error(py, &error))?;
        slots::view_of(py, slot, true)
    }

    fn receive_slot<'py>(
        &self,
        py: Python<'py>,
        peer: u32,
        lane: u8,
    ) -> PyResult<Bound<'py, PyMemoryView>> {
        let slot = self
            .lock()?
            .receive_slot(InstanceId(peer), LaneId(lane))
            .map_err(|error| errors::node_error(py, &error))?;
        slots::view_of(py, slot, false)
    }

    fn push(
        &self,
        py: Python<'_>,
        peer: u32,
        lane: u8,
        step: u64,
        layer: u16,
        num_tokens: u32,
        payload_bytes: usize,
    ) -> PyResult<()> {
        let frame = Frame {
            step,
            layer,
            num_tokens,
            payload_bytes,
        };
        self.detached(py, |node| node.push(InstanceId(peer), LaneId(lane), frame))
    }

    fn reset_link(&self, py: Python<'_>, peer: u32, reason: &str) -> PyResult<()> {
        self.detached(py, |node| node.reset_link(InstanceId(peer), reason))
    }

    fn complete_step(
        &self,
        py: Python<'_>,
        lane: u8,
        step: u64,
        outputs: &Bound<'_, PyList>,
        compute_ns: u64,
        wait_ns: u64,
        total_ns: u64,
    ) -> PyResult<()> {
        let outputs = outputs
            .iter()
            .map(|output| Ok(output.cast::<SequenceOutput>()?.get().to_core()))
            .collect::<PyResult<_>>()?;
        let timing = StepTiming {
            compute_ns,
            wait_ns,
            total_ns,
        };
        let node = self.lock()?;
        let key = node.step_key(LaneId(lane), StepId(step));
        node.complete_step(StepOutput { key, outputs }, timing)
            .map_err(|error| errors::node_error(py, &error))
    }

    fn fail_step(&self, py: Python<'_>, lane: u8, step: u64, reason: String) -> PyResult<()> {
        let node = self.lock()?;
        node.fail_step(node.step_key(LaneId(lane), StepId(step)), reason)
            .map_err(|error| errors::node_error(py, &error))
    }

    fn close(&self, py: Python<'_>) -> PyResult<()> {
        self.detached(py, |node| {
            node.close();
            Ok(())
        })
    }
}
