//! Sessions of instances: what they say, in any order, to the loop that owns registry and scheduler.
//!
//! Acts are bytes; some are honest, so that every state is reached, and some are whatever the
//! input's bytes decode to. The books must balance after each, and no client's stream may break.

use std::collections::{BTreeMap, VecDeque};

use step3rt_core::ids::{InstanceId, RequestId, TenantId, TokenId};
use step3rt_core::scheduler::{Request, RequestEvent, Scheduler};
use step3rt_core::step::SamplingState;
use step3rt_proto::step::plan_from_wire;
use step3rt_proto::v1::session_request::Event as SessionEvent;
use step3rt_proto::v1::session_response::Command;
use step3rt_proto::{Message as _, PROTOCOL_VERSION, v1};
use tokio::sync::{mpsc, oneshot, watch};
use tonic::Status;

use super::requests::{MAX_MODEL_LEN, VOCAB_SIZE, scheduler_config};
use super::{byte, part};
use crate::clock::Clock;
use crate::drive::{Drive, DriveParts};
use crate::drive_handle::{ClusterStatus, Message, Submission};
use crate::live_requests::EVENT_BOUND;
use crate::notify::Notifier;
use crate::registry::{Registry, RegistryConfig};
use crate::sessions::COMMAND_BOUND;

/// More would only repeat what fewer do.
const MAX_ACTS: usize = 64;

/// In place of a clock that runs out: nothing expires within a test.
const FOREVER_MS: u64 = 1 << 40;

const SERVES_AT_FIRST: u8 = 1;

const SAY: u8 = 0;
const HELLO: u8 = 1;
const JOIN_FFN: u8 = 2;
const JOIN_ATTENTION: u8 = 3;
const READY: u8 = 4;
const LINK: u8 = 5;
const SUBMIT: u8 = 6;
const ANSWER: u8 = 7;
const FAIL: u8 = 8;
const ANSWER_WRONG: u8 = 9;
const END: u8 = 10;
const CANCEL: u8 = 11;
const LEAVE: u8 = 12;
const LOSE_PEER: u8 = 13;

pub(super) fn run(mut data: &[u8]) {
    let mut cluster = Cluster::new();
    if byte(&mut data) & SERVES_AT_FIRST != 0 {
        cluster.serve();
    }
    for _ in 0..MAX_ACTS {
        if data.is_empty() {
            break;
        }
        let act = byte(&mut data);
        cluster.act(act & 15, usize::from(act >> 4), &mut data);
        cluster.drive.advance();
        cluster.look();
    }
}

/// An instance's session, seen from the instance.
struct Session {
    instance: InstanceId,
    epoch: u64,
    commands: mpsc::Receiver<Result<v1::SessionResponse, Status>>,
    topology_version: u64,
    /// Plans that came and are not answered.
    plans: VecDeque<v1::StepPlan>,
    is_over: bool,
    _stopped: oneshot::Receiver<()>,
}

/// A client's request, seen from the client.
struct Stream {
    events: mpsc::Receiver<RequestEvent>,
    num_prompt_tokens: usize,
    max_tokens: u32,
    is_started: bool,
    num_prompt_logprobs: usize,
    /// Per continuation: how many tokens came, and whether it ended.
    continuations: Vec<(u32, bool)>,
    has_failed: bool,
}

struct Cluster {
    drive: Drive,
    sessions: Vec<Session>,
    streams: BTreeMap<u64, Stream>,
}

impl Cluster {
    fn new() -> Self {
        let config = scheduler_config();
        let registry = Registry::new(RegistryConfig {
            ep_size: 1,
            num_attention: 1,
            lease_ms: FOREVER_MS,
            max_standstill_ms: 1_000,
            max_unlinked_ms: FOREVER_MS,
            vocab_size: VOCAB_SIZE,
            max_model_len: MAX_MODEL_LEN,
            first_epoch: 7,
        });
        let (status, _) = watch::channel(ClusterStatus::default());
        let drive = Drive::new(DriveParts {
            clock: Clock::start(),
            scheduler: Scheduler::new(config),
            registry,
            settings: v1::ClusterSettings::default(),
            step_timeout_ms: FOREVER_MS,
            status,
            notifier: Notifier::from_env(),
        });
        Self {
            drive,
            sessions: Vec::new(),
            streams: BTreeMap::new(),
        }
    }

    /// One instance of each role, ready and linked.
    fn serve(&mut self) {
        for act in [JOIN_FFN, JOIN_ATTENTION] {
            self.act(act, 0, &mut &[][..]);
            let newest = self.sessions.len() - 1;
            self.act(READY, newest, &mut &[8][..]);
        }
        self.drive.advance();
        self.look();
        self.act(LINK, 1, &mut &[][..]);
    }

    fn act(&mut self, kind: u8, who: usize, data: &mut &[u8]) {
        match kind {
            SAY => {
                let Ok(said) = v1::SessionRequest::decode(part(data)) else {
                    return;
                };
                if let Some(event) = said.event {
                    self.say(who, event);
                }
            }
            HELLO => {
                if let Ok(hello) = v1::Hello::decode(part(data)) {
                    self.join(hello);
                }
            }
            JOIN_FFN => self.join(hello(v1::Role::Ffn)),
            JOIN_ATTENTION => self.join(hello(v1::Role::Attention)),
            READY => {
                let num_kv_blocks = byte(data).into();
                self.say(who, SessionEvent::Ready(ready(num_kv_blocks)));
            }
            LINK => {
                let newest = self
                    .sessions
                    .get(who)
                    .map(|session| session.topology_version);
                let links = v1::LinksReady {
                    topology_version: newest.unwrap_or_default(),
                    links: Vec::new(),
                };
                self.say(who, SessionEvent::LinksReady(links));
            }
            SUBMIT => self.submit(byte(data), byte(data)),
            ANSWER | ANSWER_WRONG | FAIL => {
                let Some(plan) = self.next_plan(who) else {
                    return;
                };
                let event = match kind {
                    FAIL => SessionEvent::StepFailed(failed(&plan)),
                    ANSWER => SessionEvent::StepOutput(output(&plan, byte(data))),
                    _ => {
                        let mut output = output(&plan, byte(data));
                        spoil(&mut output, byte(data));
                        SessionEvent::StepOutput(output)
                    }
                };
                self.say(who, event);
            }
            END => {
                if let Some(session) = self.sessions.get_mut(who) {
                    session.is_over = true;
                    let instance = session.instance;
                    let reason = "the instance closed its session".to_owned();
                    self.drive.take(Message::SessionEnded { instance, reason });
                }
            }
            CANCEL => self.drive.take(Message::Cancel(RequestId(who as u64))),
            LEAVE => self.say(who, SessionEvent::Leaving(v1::Leaving {})),
            LOSE_PEER => {
                let peer = self.sessions.get(usize::from(byte(data)));
                let lost = peer.map(|peer| v1::PeerLost {
                    instance_id: peer.instance.0,
                    epoch: peer.epoch,
                    reason: String::new(),
                });
                self.say(who, SessionEvent::PeerLost(lost.unwrap_or_default()));
            }
            _ => {}
        }
    }

    fn join(&mut self, hello: v1::Hello) {
        let (commands, receiver) = mpsc::channel(COMMAND_BOUND);
        let (reply, mut answer) = oneshot::channel();
        self.drive.take(Message::Hello {
            hello,
            commands,
            reply,
        });
        let answer = answer.try_recv().expect("a hello is answered at once");
        match answer {
            Ok(admitted) => self.sessions.push(Session {
                instance: admitted.instance,
                epoch: 0,
                commands: receiver,
                topology_version: 0,
                plans: VecDeque::new(),
                is_over: false,
                _stopped: admitted.stopped,
            }),
            Err(error) => assert!(!error.to_string().is_empty()),
        }
    }

    /// Also after the session is over: what was on its way still comes.
    fn say(&mut self, who: usize, event: SessionEvent) {
        let session = self.sessions.get(who);
        // Also of one that never was.
        let instance = session.map_or(InstanceId(99), |session| session.instance);
        self.drive.take(Message::Session { instance, event });
    }

    fn next_plan(&mut self, who: usize) -> Option<v1::StepPlan> {
        self.sessions.get_mut(who)?.plans.pop_front()
    }

    fn submit(&mut self, size: u8, options: u8) {
        let id = self.streams.len() as u64;
        let (events, receiver) = mpsc::channel(EVENT_BOUND);
        let num_prompt_tokens = 1 + usize::from(size % 32);
        let n = 1 + u32::from(options & 1);
        let max_tokens = 1 + u32::from(options >> 1 & 15);
        self.streams.insert(
            id,
            Stream {
                events: receiver,
                num_prompt_tokens,
                max_tokens,
                is_started: false,
                num_prompt_logprobs: 0,
                continuations: vec![(0, false); n as usize],
                has_failed: false,
            },
        );
        let request = Request {
            id: RequestId(id),
            prompt: vec![TokenId(3); num_prompt_tokens],
            resumed: Vec::new(),
            n,
            sampling: SamplingState {
                temperature: 0.0,
                top_k: 0,
                top_p: 1.0,
                min_p: 0.0,
                seed: 0,
                top_logprobs: None,
                prompt_logprobs: (options >> 5 & 1 == 1).then_some(0),
                min_tokens: 0,
                stop_tokens: vec![TokenId(2)],
                adjustments: None,
            },
            max_tokens,
            priority: 0,
            tenant: TenantId(0),
            deadline: None,
        };
        self.drive.take(Message::Submit(Submission {
            client_id: format!("request-{id}"),
            tenant: String::new(),
            request,
            events,
        }));
    }

    /// Looks at everything that everybody was told.
    fn look(&mut self) {
        for session in &mut self.sessions {
            session.look();
        }
        for stream in self.streams.values_mut() {
            stream.look();
        }
        assert_eq!(self.drive.scheduler.audit(), Ok(()));
        let list = self.drive.list_instances();
        assert!(list.instances.len() <= self.sessions.len());
        for info in list.instances {
            assert!(info.num_free_kv_blocks <= info.num_kv_blocks);
        }
    }
}

impl Session {
    fn look(&mut self) {
        while let Ok(command) = self.commands.try_recv() {
            let Ok(response) = command else {
                self.is_over = true;
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

impl Stream {
    fn look(&mut self) {
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

fn hello(role: v1::Role) -> v1::Hello {
    v1::Hello {
        protocol_version: PROTOCOL_VERSION,
        role: role.into(),
        boot_id: "b".to_owned(),
        pid: 1,
        model_fingerprint: "f".to_owned(),
        model: Some(v1::ModelSummary {
            name: "m".to_owned(),
            vocab_size: VOCAB_SIZE,
            max_model_len: MAX_MODEL_LEN,
            ..Default::default()
        }),
    }
}

fn ready(num_kv_blocks: u32) -> v1::Ready {
    v1::Ready {
        addresses: vec![v1::DataAddress {
            fabric: "tcp".to_owned(),
            address: "h:1".to_owned(),
        }],
        num_kv_blocks,
    }
}

/// What an instance makes of a plan that chooses `token` wherever it samples.
fn output(plan: &v1::StepPlan, token: u8) -> v1::StepOutput {
    let outputs = plan.chunks.iter().map(|chunk| {
        let is_first = chunk.num_computed_tokens == 0;
        let num_logprobs = chunk.num_new_tokens - u32::from(is_first && chunk.num_new_tokens > 0);
        v1::SequenceOutput {
            sequence_id: chunk.sequence_id,
            token_id: chunk.samples.then_some(u32::from(token) % VOCAB_SIZE),
            logprob: None,
            prompt_logprobs: if token & 64 == 0 {
                Vec::new()
            } else {
                vec![v1::TokenLogprob::default(); num_logprobs as usize]
            },
            is_corrupt: false,
        }
    });
    v1::StepOutput {
        epoch: plan.epoch,
        lane: plan.lane,
        step: plan.step,
        outputs: outputs.collect(),
        timing: None,
    }
}

/// One thing that an answer may have wrong.
fn spoil(output: &mut v1::StepOutput, how: u8) {
    match how & 7 {
        0 => drop(output.outputs.pop()),
        1 => output.outputs.extend_from_within(..),
        2 => output.epoch = output.epoch.wrapping_sub(1),
        3 => output.lane += u32::from(how >> 3),
        4 => output.step = output.step.wrapping_add(u64::from(how >> 3)),
        5 => output.outputs.reverse(),
        _ => {}
    }
    let Some(first) = output.outputs.first_mut() else {
        return;
    };
    match how & 0x77 {
        0x06 => first.sequence_id ^= 1,
        0x16 => first.token_id = None,
        0x26 => first.token_id = Some(0),
        0x36 => first.token_id = Some(VOCAB_SIZE),
        0x46 => first.is_corrupt = true,
        0x56 => first.prompt_logprobs = vec![v1::TokenLogprob::default(); 40],
        _ => {}
    }
}

fn failed(plan: &v1::StepPlan) -> v1::StepFailed {
    v1::StepFailed {
        epoch: plan.epoch,
        lane: plan.lane,
        step: plan.step,
        reason: "why".to_owned(),
    }
}

/// What the first request of a cluster that serves becomes.
fn first_plan() -> v1::StepPlan {
    v1::StepPlan {
        epoch: 8,
        lane: 0,
        step: 1,
        chunks: vec![v1::SequenceChunk {
            sequence_id: 1,
            num_new_tokens: 5,
            samples: true,
            ..Default::default()
        }],
        ..Default::default()
    }
}

pub(super) fn seeds() -> Vec<Vec<u8>> {
    let said = |who: u8, event: SessionEvent| {
        let request = v1::SessionRequest { event: Some(event) };
        let bytes = request.encode_to_vec();
        let len = u8::try_from(bytes.len()).expect("short");
        [&[SAY | who << 4, len][..], &bytes].concat()
    };
    let (ffn, attention) = (0, 1 << 4);
    let plan = first_plan();
    let hello = hello(v1::Role::Attention).encode_to_vec();
    let hello_len = u8::try_from(hello.len()).expect("short");
    let heartbeat = v1::Heartbeat {
        status: "ready".to_owned(),
        last_progress_age_ms: 10,
    };
    let links = v1::LinksReady {
        topology_version: 2,
        links: vec![v1::LinkInfo {
            peer_instance_id: 1,
            fabric: "shm".to_owned(),
            reason: "both ends run on one host".to_owned(),
        }],
    };
    let lost = v1::PeerLost {
        instance_id: 1,
        epoch: 7,
        reason: "why".to_owned(),
    };
    let answer = ANSWER | attention;
    let wrong = ANSWER_WRONG | attention;
    let generation = [SUBMIT, 4, 4, answer, 7, answer, 7, answer, 2];
    let served = |acts: &[u8]| [&[SERVES_AT_FIRST], acts].concat();
    let mut seeds = vec![
        served(&generation),
        served(&[SUBMIT, 20, 0x27, answer, 0x47, answer, 0x47, answer, 0x47]),
        served(&[SUBMIT, 4, 4, FAIL | attention, answer, 7, END | attention]),
        served(&[
            SUBMIT,
            4,
            4,
            answer,
            7,
            END,
            JOIN_FFN,
            READY | 2 << 4,
            8,
            LINK | attention,
        ]),
        served(&[
            SUBMIT,
            4,
            30,
            JOIN_ATTENTION,
            READY | 2 << 4,
            8,
            LINK | 2 << 4,
            LEAVE | attention,
        ]),
        served(&[SUBMIT, 4, 4, CANCEL, answer, 7, LOSE_PEER | attention, 0]),
        served(&said(1, SessionEvent::StepOutput(output(&plan, 7)))),
        served(&said(1, SessionEvent::StepFailed(failed(&plan)))),
        served(&said(1, SessionEvent::Heartbeat(heartbeat))),
        served(&said(1, SessionEvent::LinksReady(links))),
        served(&said(1, SessionEvent::PeerLost(lost))),
        served(&said(0, SessionEvent::Ready(ready(0)))),
        [&[0, HELLO, hello_len][..], &hello, &[READY | ffn, 8, LINK]].concat(),
    ];
    for how in [0, 1, 2, 3, 4, 5, 6, 0x16, 0x26, 0x46] {
        seeds.push(served(&[SUBMIT, 4, 4, wrong, 7, how, answer, 7]));
    }
    seeds
}
