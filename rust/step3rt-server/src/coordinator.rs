//! Puts the coordinator together, runs it, and takes it down in order.
//!
//! ```text
//!   signal 1: NOT_SERVING, no new requests ─▶ running ones end, at most drain_timeout
//!             ─▶ instances are told to leave ─▶ listeners close ─▶ exit 0
//!   signal 2, at any time: exit at once
//! ```

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use step3rt_core::scheduler::Scheduler;
use step3rt_proto::v1::inference_service_server::InferenceServiceServer;
use step3rt_proto::v1::node_service_server::NodeServiceServer;
use step3rt_proto::{
    FILE_DESCRIPTOR_SET, INFERENCE_SERVICE_NAME, MAX_CONTROL_MESSAGE_BYTES,
    MAX_RECEIVED_MESSAGE_BYTES, MAX_SENT_MESSAGE_BYTES,
};
use step3rt_tls::Identity;
use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::{self, JoinHandle};
use tokio::time::{sleep, timeout};
use tonic::transport::Server;
use tower::util::MapRequestLayer;
use tracing::{error, info, warn};

use crate::checkpoint::Checkpoint;
use crate::clock::Clock;
use crate::config::CoordinatorConfig;
use crate::control_runtime::ControlRuntime;
use crate::drive::{Drive, DriveParts};
use crate::drive_handle::{ClusterStatus, DriveHandle, Message};
use crate::health;
use crate::incoming::{Security, incoming};
use crate::inference_service::{InferenceServer, Model};
use crate::listeners::{Listeners, ReadyFile};
use crate::metrics::Metrics;
use crate::metrics_server;
use crate::node_service::NodeServer;
use crate::notify::{self, Notifier};
use crate::receiving;
use crate::registry::{Registry, RegistryConfig};
use crate::request_echo::Echoing;
use crate::shutdown::StopSignal;
use crate::start_error::StartError;
use crate::text::chat_template::ChatTemplate;
use crate::text::tokenizer::Tokenizer;

/// Streams of one connection: what one busy client may have open.
const MAX_CONCURRENT_STREAMS: u32 = 1_024;
/// Flow-control window of one stream. Requests are small; images will be some MiB.
const STREAM_WINDOW_BYTES: u32 = 1024 * 1024;
/// Most bytes of a request's headers.
const MAX_HEADER_LIST_BYTES: u32 = 16 * 1024;
/// How often an idle connection is probed, and how long it may take to answer.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(30);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long instances may take to leave, and connections to close, once there is no work left.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);

/// What those are told who speak plain HTTP/2 to a listener that speaks TLS.
const PUBLIC_ADVICE: &str = "This server speaks TLS only, and this client has no CA. Give the CA of \
     the server's certificate: Client(ca=...), --ca, or STEP3RT_CA in the environment";
const CONTROL_ADVICE: &str = "it speaks TLS only, and the caller has no certificate. Give the caller \
     tls_cert, tls_key and tls_ca of the cluster, too, or give them to neither";

/// A coordinator whose listeners are bound.
pub struct Coordinator {
    config: CoordinatorConfig,
    model: Arc<Model>,
    listeners: Listeners,
    tls: Option<Identity>,
}

impl Coordinator {
    /// Reads the checkpoint's description and binds the listeners.
    pub fn bind(config: CoordinatorConfig) -> Result<Self, StartError> {
        let checkpoint = Checkpoint::read(
            &config.model_path,
            config.model_name.as_deref(),
            config.max_model_len,
        )?;
        let limits = &checkpoint.limits;
        config.scheduler_config(limits.max_model_len).validate()?;
        let tokenizer =
            Tokenizer::read(&checkpoint.path, checkpoint.opening_token())?.map(Arc::new);
        if let Some(tokenizer) = &tokenizer
            && tokenizer.bytes().num_ids() > limits.vocab_size as usize
        {
            return Err(StartError::ForeignTokenizer {
                largest: tokenizer.bytes().num_ids() - 1,
                vocab_size: limits.vocab_size,
            });
        }
        let special_tokens = tokenizer
            .as_ref()
            .map_or_else(Vec::new, |tokenizer| tokenizer.special_tokens());
        let chat_template =
            ChatTemplate::new(&checkpoint, special_tokens).map_err(StartError::ChatTemplate)?;
        let tls = config.tls_files()?.map(Identity::follow).transpose()?;
        let listeners = Listeners::bind(&config)?;
        Ok(Self {
            config,
            model: Arc::new(Model {
                checkpoint,
                tokenizer,
                chat_template,
            }),
            listeners,
            tls,
        })
    }

    /// Where clients connect.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.listeners.address()
    }

    /// Where instances connect.
    pub fn control_address(&self) -> io::Result<SocketAddr> {
        self.listeners.control_address()
    }

    /// Where metrics are, if they are asked for.
    pub fn metrics_address(&self) -> io::Result<Option<SocketAddr>> {
        self.listeners.metrics_address()
    }

    /// Serves until a stop signal or a defect, and returns the process's exit code.
    pub async fn serve(self, mut stops: mpsc::Receiver<StopSignal>) -> Result<u8, StartError> {
        let (address, control_address) = (self.address()?, self.control_address()?);
        let metrics_address = self.metrics_address()?;
        let drain_timeout = Duration::from_secs_f64(self.config.drain_timeout_s);
        let is_tls = self.tls.is_some();
        let ready_file = self.config.ready_file.clone();
        // Before anything runs that would have to be ended if it cannot be written: who reads it may
        // connect, since the sockets are bound.
        let ready_file = ready_file
            .map(|path| ReadyFile::write(path, address, control_address, metrics_address));
        let _ready_file = ready_file.transpose()?;
        let mut running = self.start()?;
        notify::ready();
        info!(%address, %control_address, is_tls, "the coordinator listens");
        if let Some(address) = metrics_address {
            info!(url = format!("http://{address}/metrics"), "metrics");
        }

        let code = tokio::select! {
            stop = stops.recv() => match stop {
                Some(_) => running.stop(&mut stops, drain_timeout).await,
                None => 0,
            },
            failed = running.failed() => {
                error!(failed, "a part of the coordinator ended; it cannot go on");
                1
            }
        };
        running.end().await;
        Ok(code)
    }

    fn start(self) -> Result<Running, StartError> {
        let Self {
            config,
            model,
            listeners,
            tls,
        } = self;
        let public_security = tls.clone().map(|identity| Security {
            identity,
            config: |settings| &settings.public_server,
            advice: PUBLIC_ADVICE,
        });
        let control_security = tls.map(|identity| Security {
            identity,
            config: |settings| &settings.control_server,
            advice: CONTROL_ADVICE,
        });
        let clock = Clock::start();
        let (drive_handle, messages) = DriveHandle::new();
        let (status_sender, status) = watch::channel(ClusterStatus::default());
        let drive = Drive::new(drive_parts(&config, &model, clock, status_sender));
        let (reporter, health_service) = tonic_health::server::health_reporter();
        let inference = InferenceServer::new(
            Arc::clone(&model),
            drive_handle.clone(),
            clock,
            status.clone(),
        );
        let metrics = Metrics::new(&model.checkpoint.name, inference.metrics());
        let inference_service = InferenceServiceServer::new(Echoing(inference))
            .max_decoding_message_size(MAX_RECEIVED_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_SENT_MESSAGE_BYTES);
        let node_service = NodeServiceServer::new(NodeServer::new(drive_handle.clone()))
            .max_decoding_message_size(MAX_CONTROL_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_CONTROL_MESSAGE_BYTES);
        let reflection_v1 = config.reflection.then(|| reflection().build_v1());
        let reflection_v1 = reflection_v1.transpose().map_err(bad_descriptors)?;
        // What older tools ask for, grpcio's reflection client among them.
        let reflection_v1alpha = config.reflection.then(|| reflection().build_v1alpha());
        let reflection_v1alpha = reflection_v1alpha.transpose().map_err(bad_descriptors)?;

        let (close_sender, close) = watch::channel(false);
        let closing = close.clone();
        let public = server_builder()
            .layer(MapRequestLayer::new(receiving::counting()))
            .add_service(health_service)
            .add_service(inference_service)
            .add_optional_service(reflection_v1)
            .add_optional_service(reflection_v1alpha)
            .serve_with_incoming_shutdown(
                incoming(listeners.public, public_security)?,
                closed(close.clone()),
            );
        let control_runtime = ControlRuntime::start()?;
        let control = control_runtime.spawn(|| {
            let connections = incoming(listeners.control, control_security)?;
            let server = server_builder().add_service(node_service);
            Ok::<_, io::Error>(server.serve_with_incoming_shutdown(connections, closed(close)))
        })?;
        tokio::spawn(health::report(reporter, status));
        if let Some(listener) = listeners.metrics {
            metrics_server::serve(listener, metrics, drive_handle.clone(), closed(closing))?;
        }
        let (alive, is_over) = oneshot::channel();
        Ok(Running {
            drive: drive_handle,
            drive_task: on_own_thread(drive.run(messages), is_over),
            alive: Some(alive),
            public: tokio::spawn(public),
            control,
            _control_runtime: control_runtime,
            close: close_sender,
        })
    }
}

/// The drive loop's, with nothing in it yet.
fn drive_parts(
    config: &CoordinatorConfig,
    model: &Model,
    clock: Clock,
    status: watch::Sender<ClusterStatus>,
) -> DriveParts {
    let limits = &model.checkpoint.limits;
    DriveParts {
        clock,
        scheduler: Scheduler::new(config.scheduler_config(limits.max_model_len)),
        registry: Registry::new(RegistryConfig {
            ep_size: config.ep_size,
            num_attention: config.num_attention,
            lease_ms: config.lease_ms.into(),
            max_standstill_ms: config.step_timeout_ms,
            // A handshake takes time, however little is left for a recovery.
            max_unlinked_ms: config.recovery_timeout_ms.max(config.lease_ms.into()),
            vocab_size: limits.vocab_size,
            max_model_len: limits.max_model_len,
            first_epoch: unix_time_ms(),
        }),
        settings: config.cluster_settings(limits.max_model_len),
        // A standing FFN instance must be found before the steps that wait for it.
        step_timeout_ms: config
            .step_timeout_ms
            .saturating_add(config.lease_ms.into()),
        status,
        notifier: Notifier::from_env(),
    }
}

type ServerTask = JoinHandle<Result<(), tonic::transport::Error>>;

/// The tasks of a coordinator that serves.
struct Running {
    drive: DriveHandle,
    drive_task: JoinHandle<()>,
    /// The drive loop ends when it is dropped.
    alive: Option<oneshot::Sender<Infallible>>,
    public: ServerTask,
    control: ServerTask,
    _control_runtime: ControlRuntime,
    close: watch::Sender<bool>,
}

impl Running {
    /// Resolves when a part that must not end has ended.
    async fn failed(&mut self) -> String {
        tokio::select! {
            ended = &mut self.drive_task => format!("drive loop: {ended:?}"),
            ended = &mut self.public => format!("public server: {ended:?}"),
            ended = &mut self.control => format!("control server: {ended:?}"),
        }
    }

    /// Takes everything down in order; a second signal ends it at once.
    async fn stop(
        &mut self,
        stops: &mut mpsc::Receiver<StopSignal>,
        drain_timeout: Duration,
    ) -> u8 {
        notify::stopping(drain_timeout);
        tokio::select! {
            () = self.drain(drain_timeout) => {
                info!("stopped");
                0
            }
            Some(stop) = stops.recv() => {
                warn!("second stop signal: ending at once");
                stop.exit_code()
            }
        }
    }

    async fn drain(&mut self, drain_timeout: Duration) {
        tokio::select! {
            _ = self.drive.ask(Message::Drain) => {}
            () = sleep(drain_timeout) => warn!("drain_timeout_s is over; running requests end"),
        }
        if timeout(CLOSE_TIMEOUT, self.drive.ask(Message::CloseSessions))
            .await
            .is_err()
        {
            warn!("some instances did not leave in time");
        }
        self.close.send_replace(true);
        let servers = async { tokio::join!(&mut self.public, &mut self.control) };
        if timeout(CLOSE_TIMEOUT, servers).await.is_err() {
            warn!("some connections did not close in time");
        }
    }

    /// Ends the drive loop, which must not meet a runtime without timers: what may still send to it
    /// lives on another runtime, and may end later than this one.
    async fn end(mut self) {
        self.alive = None;
        if !self.drive_task.is_finished() {
            let _ = timeout(CLOSE_TIMEOUT, self.drive_task).await; // a panic has been reported
        }
    }
}

/// Runs the drive loop beside the runtime's workers. As a task of theirs it would queue behind the
/// hundreds of streams that it has just given a step's tokens, and the next step's plan with it.
fn on_own_thread(
    drive: impl Future<Output = ()> + Send + 'static,
    is_over: oneshot::Receiver<Infallible>,
) -> JoinHandle<()> {
    let runtime = Handle::current();
    let until_over = async move {
        tokio::select! {
            _ = is_over => {}
            () = drive => {}
        }
    };
    task::spawn_blocking(move || runtime.block_on(until_over))
}

fn server_builder() -> Server {
    Server::builder()
        .max_concurrent_streams(MAX_CONCURRENT_STREAMS)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .http2_max_header_list_size(MAX_HEADER_LIST_BYTES)
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
}

async fn closed(mut close: watch::Receiver<bool>) {
    // An error means that the coordinator is gone, which is a reason to close, too.
    let _ = close.wait_for(|is_closing| *is_closing).await;
}

fn reflection() -> tonic_reflection::server::Builder<'static> {
    tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        // `NodeService` is described in the same set and served elsewhere.
        .with_service_name(INFERENCE_SERVICE_NAME)
        .with_service_name("grpc.health.v1.Health")
}

fn bad_descriptors(error: tonic_reflection::server::Error) -> StartError {
    StartError::System(io::Error::other(error))
}

fn unix_time_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(1, |time| u64::try_from(time.as_millis()).unwrap_or(1))
}
