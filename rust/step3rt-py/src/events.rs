//! What `NodeSession.poll` returns, as frozen Python objects. Lists are made once, when the event
//! is; reading an attribute never converts one again.

use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyList};
use step3rt_core::step;
use step3rt_node::event::NodeEvent;

/// Converts a poll's news, in order.
pub(crate) fn to_python(py: Python<'_>, news: Vec<NodeEvent>) -> PyResult<Bound<'_, PyList>> {
    let list = PyList::empty(py);
    for event in news {
        list.append(event_to_python(py, event)?)?;
    }
    Ok(list)
}

fn event_to_python(py: Python<'_>, event: NodeEvent) -> PyResult<Bound<'_, PyAny>> {
    Ok(match event {
        NodeEvent::StepPlan(plan) => Bound::new(py, StepPlan::new(py, &plan)?)?.into_any(),
        NodeEvent::Arrival { peer, header } => {
            let arrival = Arrival {
                peer: peer.0,
                lane: header.lane.0,
                sequence: header.sequence,
                step: header.frame.step,
                layer: header.frame.layer,
                num_tokens: header.frame.num_tokens,
                payload_bytes: header.frame.payload_bytes,
            };
            Bound::new(py, arrival)?.into_any()
        }
        NodeEvent::LinkUp {
            peer,
            role_rank,
            fabric,
            reason,
            epoch,
            device_offer,
        } => {
            let offer = device_offer.as_ref();
            let link_up = LinkUp {
                peer: peer.0,
                role_rank,
                fabric,
                reason,
                epoch: epoch.0,
                device_offer: offer.map(|offer| PyBytes::new(py, offer.as_bytes()).unbind()),
            };
            Bound::new(py, link_up)?.into_any()
        }
        NodeEvent::LinkDown { peer, reason } => {
            let peer = peer.0;
            Bound::new(py, LinkDown { peer, reason })?.into_any()
        }
        NodeEvent::Drain => Bound::new(py, Drain)?.into_any(),
        NodeEvent::SessionLost { reason } => Bound::new(py, SessionLost { reason })?.into_any(),
    })
}

/// The type of an event: `StepPlan | Arrival | LinkUp | LinkDown | Drain | SessionLost`.
pub(crate) fn union(py: Python<'_>) -> PyResult<Bound<'_, PyAny>> {
    py.get_type::<StepPlan>()
        .bitor(py.get_type::<Arrival>())?
        .bitor(py.get_type::<LinkUp>())?
        .bitor(py.get_type::<LinkDown>())?
        .bitor(py.get_type::<Drain>())?
        .bitor(py.get_type::<SessionLost>())
}

/// Gives a flat event its discriminator and a readable form.
macro_rules! flat_event {
    ($name:ident, $kind:literal) => {
        #[pymethods]
        impl $name {
            #[classattr]
            fn kind() -> &'static str {
                $kind
            }

            fn __repr__(&self) -> String {
                format!("{self:?}")
            }
        }
    };
}

/// A checked frame lies in the receive slot of (peer, lane), until the next push there.
#[pyclass(frozen, get_all, module = "step3rt._core")]
#[derive(Debug)]
pub(crate) struct Arrival {
    peer: u32,
    lane: u8,
    sequence: u64,
    step: u64,
    layer: u16,
    num_tokens: u32,
    payload_bytes: usize,
}
flat_event!(Arrival, "arrival");

/// A link to `peer` is usable.
#[pyclass(frozen, get_all, module = "step3rt._core")]
#[derive(Debug)]
pub(crate) struct LinkUp {
    peer: u32,
    role_rank: u32,
    fabric: &'static str,
    reason: String,
    epoch: u32,
    device_offer: Option<Py<PyBytes>>,
}
flat_event!(LinkUp, "link_up");

/// The link to `peer` is over; what was in flight on it will not arrive.
#[pyclass(frozen, get_all, module = "step3rt._core")]
#[derive(Debug)]
pub(crate) struct LinkDown {
    peer: u32,
    reason: String,
}
flat_event!(LinkDown, "link_down");

/// The coordinator or a signal asks to finish.
#[pyclass(frozen, module = "step3rt._core")]
#[derive(Debug)]
pub(crate) struct Drain;
flat_event!(Drain, "drain");

/// The coordinator is gone.
#[pyclass(frozen, get_all, module = "step3rt._core")]
#[derive(Debug)]
pub(crate) struct SessionLost {
    reason: String,
}
flat_event!(SessionLost, "session_lost");

/// One lane's next step.
#[pyclass(frozen, get_all, module = "step3rt._core")]
pub(crate) struct StepPlan {
    lane: u8,
    step: u64,
    left: Py<PyList>,
    joined: Py<PyList>,
    chunks: Py<PyList>,
}

impl StepPlan {
    fn new(py: Python<'_>, plan: &step::StepPlan) -> PyResult<Self> {
        let joined = PyList::empty(py);
        for join in &plan.joined {
            joined.append(Join::new(py, join)?)?;
        }
        let chunks = PyList::empty(py);
        for chunk in &plan.chunks {
            chunks.append(Chunk::new(py, chunk)?)?;
        }
        Ok(Self {
            lane: plan.key.lane.0,
            step: plan.key.step.0,
            left: PyList::new(py, plan.left.iter().map(|id| id.0))?.unbind(),
            joined: joined.unbind(),
            chunks: chunks.unbind(),
        })
    }
}

#[pymethods]
impl StepPlan {
    #[classattr]
    fn kind() -> &'static str {
        "step_plan"
    }

    fn __repr__(&self, py: Python<'_>) -> String {
        format!(
            "StepPlan {{ lane: {}, step: {}, left: {}, joined: {}, chunks: {} }}",
            self.lane,
            self.step,
            self.left.bind(py).len(),
            self.joined.bind(py).len(),
            self.chunks.bind(py).len(),
        )
    }
}

/// A sequence that the lane learns.
#[pyclass(frozen, get_all, module = "step3rt._core")]
pub(crate) struct Join {
    sequence_id: u64,
    token_ids: Py<PyList>,
    num_prompt_tokens: u32,
    sampling: Py<Sampling>,
}

impl Join {
    fn new(py: Python<'_>, join: &step::SequenceJoin) -> PyResult<Self> {
        Ok(Self {
            sequence_id: join.sequence.0,
            token_ids: PyList::new(py, join.tokens.iter().map(|id| id.0))?.unbind(),
            num_prompt_tokens: join.num_prompt_tokens,
            sampling: Py::new(py, Sampling::new(py, &join.sampling)?)?,
        })
    }
}

/// Validated sampling parameters.
#[pyclass(frozen, get_all, module = "step3rt._core")]
pub(crate) struct Sampling {
    temperature: f32,
    top_k: u32,
    top_p: f32,
    min_p: f32,
    seed: u64,
    top_logprobs: Option<u32>,
    prompt_logprobs: Option<u32>,
    min_tokens: u32,
    stop_token_ids: Py<PyList>,
    adjustments: Option<Py<LogitAdjustments>>,
}

impl Sampling {
    fn new(py: Python<'_>, sampling: &step::SamplingState) -> PyResult<Self> {
        Ok(Self {
            temperature: sampling.temperature,
            top_k: sampling.top_k,
            top_p: sampling.top_p,
            min_p: sampling.min_p,
            seed: sampling.seed,
            top_logprobs: sampling.top_logprobs,
            prompt_logprobs: sampling.prompt_logprobs,
            min_tokens: sampling.min_tokens,
            stop_token_ids: PyList::new(py, sampling.stop_tokens.iter().map(|id| id.0))?.unbind(),
            adjustments: sampling
                .adjustments
                .as_deref()
                .map(|adjustments| Py::new(py, LogitAdjustments::new(py, adjustments)?))
                .transpose()?,
        })
    }
}

/// What is added to logits before a token is chosen.
#[pyclass(frozen, get_all, module = "step3rt._core")]
pub(crate) struct LogitAdjustments {
    presence_penalty: f32,
    frequency_penalty: f32,
    repetition_penalty: f32,
    bias_token_ids: Py<PyList>,
    biases: Py<PyList>,
}

impl LogitAdjustments {
    fn new(py: Python<'_>, adjustments: &step::LogitAdjustments) -> PyResult<Self> {
        let bias = &adjustments.logit_bias;
        Ok(Self {
            presence_penalty: adjustments.presence_penalty,
            frequency_penalty: adjustments.frequency_penalty,
            repetition_penalty: adjustments.repetition_penalty,
            bias_token_ids: PyList::new(py, bias.iter().map(|(token, _)| token.0))?.unbind(),
            biases: PyList::new(py, bias.iter().map(|(_, bias)| bias))?.unbind(),
        })
    }
}

/// Computes known tokens `[num_computed_tokens, num_computed_tokens + num_new_tokens)`.
#[pyclass(frozen, get_all, module = "step3rt._core")]
pub(crate) struct Chunk {
    sequence_id: u64,
    num_computed_tokens: u32,
    num_new_tokens: u32,
    new_block_ids: Py<PyList>,
    samples: bool,
}

impl Chunk {
    fn new(py: Python<'_>, chunk: &step::SequenceChunk) -> PyResult<Self> {
        Ok(Self {
            sequence_id: chunk.sequence.0,
            num_computed_tokens: chunk.num_computed_tokens,
            num_new_tokens: chunk.num_new_tokens,
            new_block_ids: PyList::new(py, chunk.new_blocks.iter().map(|id| id.0))?.unbind(),
            samples: chunk.samples,
        })
    }
}
