//! An instance that speaks the control plane over a real socket and "computes" with a formula.

use std::collections::HashMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::time::Duration;

use step3rt_proto::PROTOCOL_VERSION;
use step3rt_proto::v1;
use step3rt_proto::v1::node_service_client::NodeServiceClient;
use step3rt_proto::v1::session_request::Event;
use step3rt_proto::v1::session_response::Command;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::{interval, sleep};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Status, Streaming};

/// Tokens come from these, so that text is ASCII and no end token appears by chance.
const FIRST_TOKEN: u32 = 97;
const NUM_TOKENS: u32 = 26;

/// The token that follows `tokens`, whoever computes it.
pub(crate) fn next_token(tokens: &[u32]) -> u32 {
    let hash = tokens.iter().fold(7_u32, |hash, token| {
        hash.wrapping_mul(31).wrapping_add(*token)
    });
    FIRST_TOKEN + hash % NUM_TOKENS
}

/// The continuation of `prompt` by `num_tokens` tokens.
pub(crate) fn continuation(prompt: &[u32], num_tokens: usize) -> Vec<u32> {
    let mut tokens = prompt.to_vec();
    for _ in 0..num_tokens {
        tokens.push(next_token(&tokens));
    }
    tokens.split_off(prompt.len())
}

/// How an instance behaves.
#[derive(Clone, Debug)]
pub(crate) struct NodeOptions {
    pub(crate) role: v1::Role,
    pub(crate) num_kv_blocks: u32,
    /// How long a step takes.
    pub(crate) step_delay: Duration,
    /// Never answers a step.
    pub(crate) is_stuck: bool,
    /// Links to the first FFN instances it hears of, and to none that replaces one.
    pub(crate) links_once: bool,
    /// Logits are not finite for sequences with this token.
    pub(crate) corrupts: Option<u32>,
}

impl NodeOptions {
    pub(crate) fn attention() -> Self {
        Self {
            role: v1::Role::Attention,
            num_kv_blocks: 64,
            step_delay: Duration::ZERO,
            is_stuck: false,
            links_once: false,
            corrupts: None,
        }
    }

    pub(crate) fn ffn() -> Self {
        Self {
            role: v1::Role::Ffn,
            num_kv_blocks: 0,
            ..Self::attention()
        }
    }
}

/// What the hello says unless a test changes it.
pub(crate) fn hello(role: v1::Role) -> v1::Hello {
    v1::Hello {
        protocol_version: PROTOCOL_VERSION,
        role: role.into(),
        boot_id: "test".to_owned(),
        pid: std::process::id(),
        model_fingerprint: "fingerprint".to_owned(),
        model: Some(v1::ModelSummary {
            name: "byte_model".to_owned(),
            vocab_size: 259,
            max_model_len: 512,
            num_layers: 2,
            hidden_size: 8,
            num_experts: 4,
            num_experts_per_token: 2,
            eos_token_ids: vec![257],
            bos_token_id: 0,
        }),
    }
}

/// What a session begins with, both directions of what follows, and what ends it when it is dropped,
/// whoever else may still send.
pub(crate) type Session = (
    v1::Welcome,
    mpsc::Sender<v1::SessionRequest>,
    Streaming<v1::SessionResponse>,
    oneshot::Sender<Infallible>,
);

/// Opens a session and waits for the first command.
pub(crate) async fn connect(
    control_address: SocketAddr,
    hello: v1::Hello,
) -> Result<Session, Status> {
    let channel = Channel::from_shared(format!("http://{control_address}"))
        .expect("an address")
        .connect()
        .await
        .expect("the control listener accepts");
    connect_by(channel, hello).await
}

/// As [`connect`], by a connection that is there already.
pub(crate) async fn connect_by(channel: Channel, hello: v1::Hello) -> Result<Session, Status> {
    let mut client = NodeServiceClient::new(channel)
        .max_decoding_message_size(step3rt_proto::MAX_CONTROL_MESSAGE_BYTES);
    let (requests, mut sent) = mpsc::channel(64);
    let (alive, dead) = oneshot::channel();
    let (wire, outgoing) = mpsc::channel(64);
    tokio::spawn(async move {
        let pass_on = async {
            while let Some(request) = sent.recv().await {
                let _ = wire.send(request).await; // a session that is over does not mind
            }
        };
        tokio::select! {
            () = pass_on => {}
            _ = dead => {}
        }
    });
    send(&requests, Event::Hello(hello)).await;
    let mut responses = client
        .session(ReceiverStream::new(outgoing))
        .await?
        .into_inner();
    match responses.message().await?.and_then(|r| r.command) {
        Some(Command::Welcome(welcome)) => Ok((welcome, requests, responses, alive)),
        other => panic!("the first command must be Welcome, got {other:?}"),
    }
}

/// Sends `event`; a session that is over does not mind.
pub(crate) async fn send(requests: &mpsc::Sender<v1::SessionRequest>, event: Event) {
    let _ = requests
        .send(v1::SessionRequest { event: Some(event) })
        .await;
}

/// A running instance. Dropping it is a crash.
pub(crate) struct TestNode {
    pub(crate) instance_id: u32,
    pub(crate) role_rank: u32,
    pub(crate) epoch: u64,
    pub(crate) requests: mpsc::Sender<v1::SessionRequest>,
    task: JoinHandle<Result<(), Status>>,
    seen: watch::Receiver<Seen>,
    is_silent: watch::Sender<bool>,
}

/// What an instance has been sent.
#[derive(Clone, Debug, Default)]
pub(crate) struct Seen {
    pub(crate) topology: v1::Topology,
    /// Sequences learnt and not left.
    pub(crate) num_sequences: usize,
    pub(crate) num_steps: usize,
    /// Steps that it was given, answered or not.
    pub(crate) num_plans: usize,
    /// For every sequence joined: how many known tokens it came with.
    pub(crate) joined_tokens: Vec<usize>,
}

impl TestNode {
    pub(crate) async fn start(control_address: SocketAddr, options: NodeOptions) -> Self {
        let session = connect(control_address, hello(options.role)).await;
        Self::begin(session.expect("admitted"), options).await
    }

    /// Goes on with a session that has begun.
    pub(crate) async fn begin(session: Session, options: NodeOptions) -> Self {
        let (welcome, requests, responses, alive) = session;
        let settings = welcome.settings.expect("settings");
        let ready = v1::Ready {
            addresses: vec![v1::DataAddress {
                fabric: "tcp".to_owned(),
                address: "127.0.0.1:1".to_owned(),
            }],
            num_kv_blocks: options.num_kv_blocks,
        };
        send(&requests, Event::Ready(ready)).await;
        let (seen_sender, seen) = watch::channel(Seen::default());
        let (is_silent, silence) = watch::channel(false);
        let worker = Worker {
            options,
            requests: requests.clone(),
            sequences: HashMap::new(),
            seen: seen_sender,
            ep_size: settings.ep_size,
            has_linked: false,
            is_silent: silence,
            _alive: alive,
        };
        let lease = Duration::from_millis(settings.lease_ms.into());
        Self {
            instance_id: welcome.instance_id,
            role_rank: welcome.role_rank,
            epoch: welcome.epoch,
            requests,
            task: tokio::spawn(worker.run(responses, lease / 3)),
            seen,
            is_silent,
        }
    }

    /// Sends no heartbeats from now on.
    pub(crate) fn fall_silent(&self) {
        self.is_silent.send_replace(true);
    }

    /// Ends the connection without a word.
    pub(crate) fn crash(&self) {
        self.task.abort();
    }

    /// The instance's exit: Ok after Drain, the status if the coordinator closed the session.
    pub(crate) async fn exited(self) -> Result<(), Status> {
        drop(self.requests);
        self.task.await.expect("not aborted")
    }

    pub(crate) fn seen(&self) -> Seen {
        self.seen.borrow().clone()
    }

    pub(crate) async fn wait_until(&self, is_so: impl FnMut(&Seen) -> bool) {
        self.seen
            .clone()
            .wait_for(is_so)
            .await
            .expect("the instance lives");
    }
}

struct Worker {
    options: NodeOptions,
    requests: mpsc::Sender<v1::SessionRequest>,
    sequences: HashMap<u64, SequenceState>,
    seen: watch::Sender<Seen>,
    ep_size: u32,
    has_linked: bool,
    is_silent: watch::Receiver<bool>,
    _alive: oneshot::Sender<Infallible>,
}

struct SequenceState {
    tokens: Vec<u32>,
    num_prompt_tokens: usize,
    sampling: v1::SamplingState,
}

impl Worker {
    async fn run(
        mut self,
        mut responses: Streaming<v1::SessionResponse>,
        heartbeat_interval: Duration,
    ) -> Result<(), Status> {
        let mut heartbeats = interval(heartbeat_interval);
        loop {
            let response = tokio::select! {
                response = responses.message() => response?,
                _ = heartbeats.tick() => {
                    if !*self.is_silent.borrow() {
                        send(&self.requests, Event::Heartbeat(v1::Heartbeat::default())).await;
                    }
                    continue;
                }
            };
            match response.and_then(|response| response.command) {
                None | Some(Command::Drain(_)) => return Ok(()),
                Some(Command::Welcome(_)) => panic!("Welcome comes once"),
                Some(Command::Topology(topology)) => self.link(topology).await,
                Some(Command::StepPlan(plan)) => {
                    self.seen.send_modify(|seen| seen.num_plans += 1);
                    if self.options.is_stuck {
                        continue;
                    }
                    sleep(self.options.step_delay).await;
                    let output = self.compute(plan);
                    send(&self.requests, Event::StepOutput(output)).await;
                }
            }
        }
    }

    async fn link(&mut self, topology: v1::Topology) {
        let ffn: Vec<_> = topology
            .peers
            .iter()
            .filter(|peer| peer.role() == v1::Role::Ffn)
            .collect();
        let is_complete = ffn.len() == self.ep_size as usize;
        let can_link = !(self.options.links_once && self.has_linked);
        if self.options.role == v1::Role::Attention && is_complete && can_link {
            self.has_linked = true;
            let links = ffn
                .iter()
                .map(|peer| v1::LinkInfo {
                    peer_instance_id: peer.instance_id,
                    fabric: "tcp".to_owned(),
                    reason: "test".to_owned(),
                })
                .collect();
            let links_ready = v1::LinksReady {
                topology_version: topology.version,
                links,
            };
            send(&self.requests, Event::LinksReady(links_ready)).await;
        }
        self.seen.send_modify(|seen| seen.topology = topology);
    }

    fn compute(&mut self, plan: v1::StepPlan) -> v1::StepOutput {
        for left in &plan.left {
            self.sequences.remove(left);
        }
        for join in plan.joined {
            self.seen
                .send_modify(|seen| seen.joined_tokens.push(join.token_ids.len()));
            self.sequences.insert(
                join.sequence_id,
                SequenceState {
                    tokens: join.token_ids,
                    num_prompt_tokens: join.num_prompt_tokens as usize,
                    sampling: join.sampling.expect("sampling"),
                },
            );
        }
        let outputs = plan
            .chunks
            .iter()
            .map(|chunk| self.compute_chunk(chunk))
            .collect();
        let num_sequences = self.sequences.len();
        self.seen.send_modify(|seen| {
            seen.num_sequences = num_sequences;
            seen.num_steps += 1;
        });
        v1::StepOutput {
            epoch: plan.epoch,
            lane: plan.lane,
            step: plan.step,
            outputs,
            timing: None,
        }
    }

    fn compute_chunk(&mut self, chunk: &v1::SequenceChunk) -> v1::SequenceOutput {
        let sequence = self
            .sequences
            .get_mut(&chunk.sequence_id)
            .expect("chunks are of sequences that joined");
        let start = chunk.num_computed_tokens as usize;
        let end = start + chunk.num_new_tokens as usize;
        let mut output = v1::SequenceOutput {
            sequence_id: chunk.sequence_id,
            ..Default::default()
        };
        if self
            .options
            .corrupts
            .is_some_and(|token| sequence.tokens.contains(&token))
        {
            output.is_corrupt = true;
        }
        if sequence.sampling.prompt_logprobs.is_some() {
            output.prompt_logprobs = sequence.tokens[..sequence.num_prompt_tokens.min(end)]
                .iter()
                .skip(start.max(1))
                .map(|token| v1::TokenLogprob {
                    token_id: *token,
                    logprob: f32::NEG_INFINITY,
                    top: vec![],
                })
                .collect();
        }
        if chunk.samples {
            assert_eq!(
                end,
                sequence.tokens.len(),
                "sampling needs all known tokens"
            );
            let token = next_token(&sequence.tokens);
            sequence.tokens.push(token);
            output.token_id = Some(token);
            output.logprob = sequence.sampling.top_logprobs.map(|_| v1::TokenLogprob {
                token_id: token,
                logprob: -0.5,
                top: vec![],
            });
        }
        output
    }
}
