//! A coordinator that does what a test says, over the real wire: a gRPC server of `NodeService`
//! whose sessions the test reads and answers message by message.

#![allow(dead_code, reason = "each test binary uses its part of this module")]
#![allow(clippy::unwrap_used, reason = "a test that cannot set up fails")]

pub(crate) mod doorbell;
pub(crate) mod instance;

use std::net::SocketAddr;
use std::pin::Pin;
use std::time::Duration;

use step3rt_node::options::NodeOptions;
use step3rt_proto::v1;
use step3rt_proto::v1::node_service_server::{NodeService, NodeServiceServer};
use step3rt_proto::v1::session_request::Event;
use step3rt_proto::v1::session_response::Command;
use tokio::net::TcpSocket;
use tokio::runtime::{Handle, Runtime};
use tokio::sync::mpsc;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status, Streaming};

/// Longer than anything takes on a busy machine; reached only when a test fails.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// A short lease, so that a test sees several heartbeats.
pub(crate) const LEASE_MS: u32 = 300;

/// So that an instance that nobody reads from runs into flow control soon.
const MAX_UNREAD_REQUESTS: usize = 64;

/// A running coordinator. Dropped, it ends as a killed process does: every connection breaks.
pub(crate) struct Coordinator {
    pub(crate) address: SocketAddr,
    sessions: mpsc::Receiver<ScriptedSession>,
    runtime: Option<Runtime>,
}

impl Coordinator {
    /// Listens on a free port.
    pub(crate) fn start() -> Self {
        Self::start_on(ReservedPort::new())
    }

    /// Listens on a port that was refusing connections until now.
    pub(crate) fn start_on(port: ReservedPort) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let address = port.address;
        let listener = runtime.block_on(async { port.socket.listen(16) }).unwrap();
        let (sessions_tx, sessions) = mpsc::channel(16);
        let service = NodeServiceServer::new(Script {
            sessions: sessions_tx,
        });
        runtime.spawn(
            tonic::transport::Server::builder()
                .add_service(service)
                .serve_with_incoming(TcpListenerStream::new(listener)),
        );
        Self {
            address,
            sessions,
            runtime: Some(runtime),
        }
    }

    /// The next session that an instance opens; Hello is its first event.
    pub(crate) fn accept(&mut self) -> ScriptedSession {
        let runtime = self.runtime.as_ref().unwrap().handle();
        wait(runtime, self.sessions.recv()).expect("the coordinator has stopped")
    }
}

impl Drop for Coordinator {
    fn drop(&mut self) {
        self.runtime.take().unwrap().shutdown_background();
    }
}

/// A port that refuses connections and that nobody else can take.
pub(crate) struct ReservedPort {
    pub(crate) address: SocketAddr,
    socket: TcpSocket,
}

impl ReservedPort {
    pub(crate) fn new() -> Self {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        Self {
            address: socket.local_addr().unwrap(),
            socket,
        }
    }
}

/// One instance's session, from the coordinator's side.
pub(crate) struct ScriptedSession {
    requests: mpsc::Receiver<Event>,
    responses: mpsc::Sender<Result<v1::SessionResponse, Status>>,
    runtime: Handle,
}

impl ScriptedSession {
    /// The next event, heartbeats included; `None` once the instance has closed the stream.
    pub(crate) fn next_event(&mut self) -> Option<Event> {
        wait(&self.runtime, self.requests.recv())
    }

    /// The next event that is no heartbeat.
    pub(crate) fn next_report(&mut self) -> Option<Event> {
        loop {
            match self.next_event() {
                Some(Event::Heartbeat(_)) => {}
                event => return event,
            }
        }
    }

    /// What has come already, heartbeats included.
    pub(crate) fn try_next_event(&mut self) -> Option<Event> {
        self.requests.try_recv().ok()
    }

    /// What has come already, heartbeats excluded.
    pub(crate) fn try_next_report(&mut self) -> Option<Event> {
        loop {
            match self.try_next_event() {
                Some(Event::Heartbeat(_)) => {}
                event => return event,
            }
        }
    }

    /// Sends a command.
    pub(crate) fn send(&self, command: Command) {
        let response = v1::SessionResponse {
            command: Some(command),
        };
        wait(&self.runtime, self.responses.send(Ok(response))).unwrap();
    }

    /// Ends the session with an error.
    pub(crate) fn refuse(self, status: Status) {
        wait(&self.runtime, self.responses.send(Err(status))).unwrap();
    }

    /// Takes Hello and answers it.
    pub(crate) fn welcome(&mut self, instance_id: u32, epoch: u64, fabric: &str) -> v1::Hello {
        let Some(Event::Hello(hello)) = self.next_event() else {
            panic!("the first event is not Hello");
        };
        self.send(Command::Welcome(welcome(instance_id, epoch, fabric)));
        hello
    }
}

/// A Welcome of a two-lane cluster.
pub(crate) fn welcome(instance_id: u32, epoch: u64, fabric: &str) -> v1::Welcome {
    v1::Welcome {
        instance_id,
        role_rank: 0,
        epoch,
        settings: Some(v1::ClusterSettings {
            num_lanes: 2,
            max_tokens_per_micro_batch: 8,
            block_size_tokens: 64,
            max_model_len: 256,
            ep_size: 1,
            lease_ms: LEASE_MS,
            compute_dtype: "float32".to_owned(),
            a2f_dtype: "float32".to_owned(),
            f2a_dtype: "float32".to_owned(),
            kv_dtype: "float32".to_owned(),
            fabric: fabric.to_owned(),
            max_steps_in_flight: 2,
            num_attention: 1,
        }),
    }
}

/// Options of an instance whose coordinator is at `coordinator`.
pub(crate) fn options(coordinator: &str, role: &str, connect_timeout_s: f64) -> NodeOptions {
    let json = format!(
        r#"{{"coordinator": "{coordinator}", "role": "{role}", "data_host": "127.0.0.1",
            "connect_timeout_s": {connect_timeout_s}, "spin_us": 0, "model_fingerprint": "f00d",
            "model": {{"name": "m", "vocab_size": 8, "max_model_len": 256, "num_layers": 2,
            "hidden_size": 128, "num_experts": 4, "num_experts_per_token": 2,
            "eos_token_ids": [1], "bos_token_id": 0}}}}"#
    );
    NodeOptions::from_json(&json).unwrap()
}

fn wait<T>(runtime: &Handle, future: impl Future<Output = T>) -> T {
    runtime
        .block_on(async { tokio::time::timeout(PATIENCE, future).await })
        .expect("nothing happened for a long time")
}

struct Script {
    sessions: mpsc::Sender<ScriptedSession>,
}

#[tonic::async_trait]
impl NodeService for Script {
    type SessionStream =
        Pin<Box<dyn Stream<Item = Result<v1::SessionResponse, Status>> + Send + 'static>>;

    async fn session(
        &self,
        request: Request<Streaming<v1::SessionRequest>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let mut inbound = request.into_inner();
        let (requests_tx, requests) = mpsc::channel(MAX_UNREAD_REQUESTS);
        let (responses, mut responses_rx) = mpsc::channel(1024);
        let (outbound, outbound_rx) = mpsc::channel(1);
        let reading = async move {
            while let Some(Ok(request)) = inbound.next().await {
                let event = request.event.expect("an empty request");
                // A test may have seen enough; the stream is still read to its end.
                let _ = requests_tx.send(event).await;
            }
        };
        let writing = async move {
            while let Some(response) = responses_rx.recv().await {
                let _ = outbound.send(response).await;
            }
        };
        // As a coordinator does: when either side has ended the session, the other one ends too.
        tokio::spawn(async {
            tokio::select! {
                () = reading => {}
                () = writing => {}
            }
        });
        let session = ScriptedSession {
            requests,
            responses,
            runtime: Handle::current(),
        };
        let _ = self.sessions.send(session).await;
        Ok(Response::new(Box::pin(ReceiverStream::new(outbound_rx))))
    }

    async fn list_instances(
        &self,
        _request: Request<v1::ListInstancesRequest>,
    ) -> Result<Response<v1::ListInstancesResponse>, Status> {
        Err(Status::unimplemented("no test asks"))
    }
}
