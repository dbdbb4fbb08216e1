//! Sessions of instances: what they say, in any order, to the loop that owns registry and scheduler.
//!
//! Acts are bytes; some are honest, so that every state is reached, and some are whatever the
//! input's bytes decode to. The books must balance after each, and no client's stream may break.

mod messages;
mod receivers;
mod seeds;

use std::collections::BTreeMap;

use step3rt_core::ids::{InstanceId, RequestId, TenantId, TokenId};
use step3rt_core::scheduler::{Request, Scheduler};
use step3rt_core::step::SamplingState;
use step3rt_proto::v1::session_request::Event as SessionEvent;
use step3rt_proto::{Message as _, v1};
use tokio::sync::{mpsc, oneshot, watch};

use super::requests::{MAX_MODEL_LEN, VOCAB_SIZE, scheduler_config};
use super::{byte, part};
use crate::clock::Clock;
use crate::drive::{Drive, DriveParts};
use crate::drive_handle::{ClusterStatus, Message, Submission};
use crate::notify::Notifier;
use crate::outbox::max_unsent_tokens;
use crate::registry::{Registry, RegistryConfig};
use crate::sessions::COMMAND_BOUND;
use messages::{failed, hello, output, ready, spoil};
use receivers::{Session, Stream};
pub(super) use seeds::seeds;

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
                if let Some(session) = self.sessions.get(who) {
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
            Ok(admitted) => self.sessions.push(Session::new(admitted, receiver)),
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
        let (events, receiver) = mpsc::channel(max_unsent_tokens(1));
        let request = Request {
            id: RequestId(id),
            prompt: vec![TokenId(3); 1 + usize::from(size % 32)],
            resumed: Vec::new(),
            n: 1 + u32::from(options & 1),
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
            max_tokens: 1 + u32::from(options >> 1 & 15),
            priority: 0,
            tenant: TenantId(0),
            deadline: None,
        };
        self.streams.insert(id, Stream::new(receiver, &request));
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
