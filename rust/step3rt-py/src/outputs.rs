//! What an instance's loop reports of a step, taken from Python and checked. It never keeps a
//! Python object.

use pyo3::prelude::*;
use step3rt_core::ids::{SequenceId, TokenId};
use step3rt_core::step;

use crate::errors;

/// A token id and its logprob.
type TopPair = (u32, f32);

/// What a chunk gave.
#[pyclass(frozen, module = "step3rt._core")]
pub(crate) struct SequenceOutput {
    output: step::SequenceOutput,
}

impl SequenceOutput {
    /// The checked output.
    pub(crate) fn to_core(&self) -> step::SequenceOutput {
        self.output.clone()
    }
}

#[pymethods]
impl SequenceOutput {
    #[new]
    #[pyo3(signature = (
        sequence_id, token_id=None, logprob=None, top=None, prompt_logprobs=None, is_corrupt=false
    ))]
    fn new(
        py: Python<'_>,
        sequence_id: u64,
        token_id: Option<u32>,
        logprob: Option<f32>,
        top: Option<Vec<TopPair>>,
        prompt_logprobs: Option<Vec<(u32, f32, Vec<TopPair>)>>,
        is_corrupt: bool,
    ) -> PyResult<Self> {
        let token = token_id.map(TokenId);
        let logprob = match (token, logprob, top) {
            (Some(token), Some(logprob), top) => Some(step::TokenLogprob {
                token,
                logprob,
                top: top_from_python(top.unwrap_or_default()),
            }),
            (_, None, None) => None,
            _ => {
                return Err(errors::invalid_argument(
                    py,
                    format!(
                        "the output of sequence {sequence_id} is not consistent: `logprob` needs \
                         `token_id`, and `top` needs both. Pass them together"
                    ),
                ));
            }
        };
        let prompt_logprobs = prompt_logprobs
            .unwrap_or_default()
            .into_iter()
            .map(|(token, logprob, top)| step::TokenLogprob {
                token: TokenId(token),
                logprob,
                top: top_from_python(top),
            })
            .collect();
        Ok(Self {
            output: step::SequenceOutput {
                sequence: SequenceId(sequence_id),
                token,
                logprob,
                prompt_logprobs,
                is_corrupt,
            },
        })
    }

    fn __repr__(&self) -> String {
        format!("{:?}", self.output)
    }
}

fn top_from_python(top: Vec<TopPair>) -> Vec<(TokenId, f32)> {
    top.into_iter()
        .map(|(token, logprob)| (TokenId(token), logprob))
        .collect()
}
