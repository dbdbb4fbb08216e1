//! Who is told something by the loop that owns registry and scheduler: instances and clients. Each looks
//! at all of it, and panics at what must not come.

use std::collections::VecDeque;

use step3rt_core::ids::{InstanceId, TokenId};
use step3rt_core::scheduler::{Request, RequestEvent};
use step3rt_proto::step::plan_from_wire;
use step3rt_proto::v1;
use step3rt_proto::v1::session_response::Command;
use tokio::sync::{mpsc, oneshot};
use tonic::Status;

use crate::drive_handle::Admitted;
use crate::fuzz::requests::{VOCAB_SIZE, scheduler_config};

/// An instance's session, seen from the instance.
pub(super) struct Session {
    pub(super) instance: InstanceId,
    pub(super) epoch: u64,
    commands: mpsc::Receiver<Result<v1::SessionResponse, Status>>,
    pub(super) topology_version: u64,
    /// Plans that came and are not answered.
    pub(super) plans: VecDeque<v1::StepPlan>,
    _stopped: oneshot::Receiver<()>,
}

impl Session {
    pub(super) fn new(
        admitted: Admitted,
        commands: mpsc::Receiver<Result<v1::SessionResponse, Status>>,
    ) -> Self {
        Self {
            instance: admitted.instance,
            epoch: 0,
            commands,
            topology_version: 0,
            plans: VecDeque::new(),
            _stopped: admitted.stopped,
        }
    }

    pub(super) fn look(&mut self) {
        while let Ok(command) = self.commands.try_recv() {
            let Ok(response) = command else {
                continue;
            };
            match response.command.expect("a response is a command") {
                Command::Welcome(welcome) => {
                    assert_eq!((welcome.instance_id, self.epoch), (self.instance.0, 0));
                    self.epoch = welcome.epoch;
                }
                Command::Topology(topology) => {
                    assert!(topology.version >= self.topology_version);
                    self.topology_version = topology.version;
                }
                Command::StepPlan(plan) => {
                    check_plan(self.instance, self.epoch, &plan);
                    self.plans.push_back(plan);
                }
                Command::Drain(_) => {}
            }
        }
    }
}

/// Whatever one instance says, another is told nothing that it could not do.
fn check_plan(instance: InstanceId, epoch: u64, plan: &v1::StepPlan) {
    let config = scheduler_config();
    assert_eq!(plan.epoch, epoch);
    assert!(plan.lane < config.num_lanes.into());
    let checked = plan_from_wire(instance, plan.clone()).expect("an instance takes it");
    let num_tokens: u32 = checked
        .chunks
        .iter()
        .map(|chunk| chunk.num_new_tokens)
        .sum();
    assert!(num_tokens <= config.max_tokens_per_micro_batch);
    assert!(checked.chunks.iter().all(|chunk| chunk.num_new_tokens > 0));
    for join in &checked.joined {
        assert!(join.tokens.len() < config.max_model_len as usize);
        let is_known = |token: &TokenId| token.0 < VOCAB_SIZE;
        assert!(join.tokens.iter().all(is_known), "{:?}", join.tokens);
    }
}

/// A client's request, seen from the client.
pub(super) struct Stream {
    events: mpsc::Receiver<RequestEvent>,
    num_prompt_tokens: usize,
    max_tokens: u32,
    is_started: bool,
    num_prompt_logprobs: usize,
    /// Per continuation: how many tokens came, and whether it ended.
    continuations: Vec<(u32, bool)>,
    has_failed: bool,
}

impl Stream {
    pub(super) fn new(events: mpsc::Receiver<RequestEvent>, request: &Request) -> Self {
        Self {
            events,
            num_prompt_tokens: request.prompt.len(),
            max_tokens: request.max_tokens,
            is_started: false,
            num_prompt_logprobs: 0,
            continuations: vec![(0, false); request.n as usize],
            has_failed: false,
        }
    }

    pub(super) fn look(&mut self) {
        while let Ok(event) = self.events.try_recv() {
            assert!(!self.is_over(), "{event:?} after the end");
            match event {
                RequestEvent::Started { num_cached_tokens } => {
                    assert!(!std::mem::replace(&mut self.is_started, true));
                    assert!((num_cached_tokens as usize) < self.num_prompt_tokens);
                }
                RequestEvent::PromptLogprobs { offset, logprobs } => {
                    assert_eq!(offset as usize, self.num_prompt_logprobs);
                    self.num_prompt_logprobs += logprobs.len();
                    assert!(self.num_prompt_logprobs < self.num_prompt_tokens);
                }
                RequestEvent::Token {
                    index,
                    position,
                    token,
                    ..
                } => {
                    let continuation = &mut self.continuations[index as usize];
                    assert_eq!(*continuation, (position, false));
                    continuation.0 += 1;
                    assert!(continuation.0 <= self.max_tokens);
                    assert!(token.0 < VOCAB_SIZE, "{token:?}");
                }
                RequestEvent::Finished { index, usage, .. } => {
                    let continuation = &mut self.continuations[index as usize];
                    assert!(!std::mem::replace(&mut continuation.1, true));
                    assert_eq!(usage.completion_tokens, continuation.0);
                }
                RequestEvent::Failed(_) => self.has_failed = true,
            }
        }
    }

    fn is_over(&self) -> bool {
        self.has_failed || self.continuations.iter().all(|(_, has_ended)| *has_ended)
    }
}
