//! Opens sessions: from an address to Welcome, again and again until it works or cannot.
//!
//! Runs on the session's thread; it never reads past Welcome.

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use step3rt_core::ids::{Epoch, InstanceId};
use step3rt_fabric::address::{FabricChoice, UnknownFabric};
use step3rt_fabric::contract::{LinkIdentity, MAX_LANES};
use step3rt_proto::v1::node_service_client::NodeServiceClient;
use step3rt_proto::v1::session_request::Event;
use step3rt_proto::v1::session_response;
use step3rt_proto::{PROTOCOL_VERSION, channel, v1};
use step3rt_tls::{Fault, Identity};
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Endpoint;
use tonic::{Code, Status, Streaming};

use crate::error::NodeError;
use crate::options::NodeOptions;

/// Most reports that wait for the network: an output or a failure per lane, a heartbeat, and a
/// `PeerLost` per peer. A coordinator that leaves this many unread is gone.
const MAX_QUEUED_REPORTS: usize = 256;

/// A plan carries all tokens of every sequence that joins: 256 sequences of 65,536 tokens at three
/// bytes each are 48 MiB.
const MAX_COMMAND_BYTES: usize = 64 * 1024 * 1024;

/// First and longest pause between attempts to connect.
const FIRST_RETRY: Duration = Duration::from_millis(50);
const LONGEST_RETRY: Duration = Duration::from_secs(1);

/// Longest one attempt, from opening the connection to Welcome. A healthy coordinator takes
/// milliseconds.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(5);

/// A coordinator's host that answers no ping for this long is gone.
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(2);
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(3);

/// A lease is lost after this many missed heartbeats.
pub(crate) const HEARTBEATS_PER_LEASE: u32 = 3;

/// What the coordinator says first.
#[derive(Clone, Debug, PartialEq)]
pub struct Welcome {
    /// This instance.
    pub instance: InstanceId,
    /// Its position in its role.
    pub role_rank: u32,
    /// Its incarnation.
    pub epoch: Epoch,
    /// Micro-batch lanes; the checked form of `settings.num_lanes`.
    pub num_lanes: u8,
    /// Which fabrics may be used; the checked form of `settings.fabric`.
    pub fabric: FabricChoice,
    /// The cluster's settings, as sent.
    pub settings: v1::ClusterSettings,
}

impl Welcome {
    /// This instance as its peers know it.
    pub fn identity(&self) -> LinkIdentity {
        LinkIdentity {
            instance: self.instance,
            epoch: self.epoch,
        }
    }
}

/// Opens sessions.
pub(crate) struct Dialer {
    coordinator: String,
    uri: String,
    tls: Option<Identity>,
    connect_timeout: Duration,
    hello: v1::Hello,
}

/// A stream on which Welcome has arrived.
pub(crate) struct Connection {
    pub(crate) welcome: Welcome,
    pub(crate) reports: mpsc::Sender<v1::SessionRequest>,
    pub(crate) inbound: Streaming<v1::SessionResponse>,
}

/// Why one attempt failed.
enum Failure {
    /// Another attempt may succeed.
    Passing(String),
    /// None will.
    Final(NodeError),
}

impl Dialer {
    /// Opens sessions for the instance that `options` describe.
    pub(crate) fn new(options: &NodeOptions, boot_id: String) -> Self {
        Self {
            coordinator: options.coordinator.as_str().to_owned(),
            uri: options.coordinator.uri().to_owned(),
            tls: options.tls.clone(),
            connect_timeout: options.connect_timeout,
            hello: v1::Hello {
                protocol_version: PROTOCOL_VERSION,
                role: options.role.to_wire().into(),
                boot_id,
                pid: std::process::id(),
                model_fingerprint: options.model_fingerprint.clone(),
                model: Some(options.model.clone()),
            },
        }
    }

    /// Tries until the coordinator answers or the time is over.
    pub(crate) async fn dial(&self) -> Result<Connection, NodeError> {
        let started = Instant::now();
        let mut pause = FIRST_RETRY;
        let mut told = String::new();
        loop {
            let last = match timeout(ATTEMPT_TIMEOUT, self.attempt()).await {
                Ok(Ok(connection)) => return Ok(connection),
                Ok(Err(Failure::Final(error))) => return Err(error),
                Ok(Err(Failure::Passing(text))) => text,
                Err(_) => format!("no Welcome within {} s", ATTEMPT_TIMEOUT.as_secs()),
            };
            let waited = started.elapsed();
            if waited + pause > self.connect_timeout {
                return Err(NodeError::Unreachable {
                    coordinator: self.coordinator.clone(),
                    waited,
                    last,
                });
            }
            // Each reason once: nobody may be there, or one who has no place for this instance.
            if last != told {
                tracing::info!(
                    coordinator = self.coordinator,
                    error = last,
                    "not connected yet"
                );
                told = last;
            }
            sleep(pause).await;
            pause = (pause * 2).min(LONGEST_RETRY);
        }
    }

    async fn attempt(&self) -> Result<Connection, Failure> {
        let endpoint = Endpoint::from_shared(self.uri.clone())
            .map_err(|_| Failure::Final(NodeError::CoordinatorAddress(self.coordinator.clone())))?
            .connect_timeout(ATTEMPT_TIMEOUT)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(KEEP_ALIVE_INTERVAL)
            .keep_alive_timeout(KEEP_ALIVE_TIMEOUT)
            .keep_alive_while_idle(true);
        let channel = channel::connect(&endpoint, self.tls.as_ref()).await;
        let channel = channel.map_err(|error| match channel::fault_of(&error) {
            Some(fault) => self.untrusted(fault),
            None => Failure::Passing(with_causes(&error)),
        })?;
        let mut client =
            NodeServiceClient::new(channel).max_decoding_message_size(MAX_COMMAND_BYTES);
        let (reports, queue) = mpsc::channel(MAX_QUEUED_REPORTS);
        let hello = v1::SessionRequest {
            event: Some(Event::Hello(self.hello.clone())),
        };
        reports
            .try_send(hello)
            .expect("a new queue has room for its first message");
        let mut inbound = client
            .session(ReceiverStream::new(queue))
            .await
            .map_err(|status| self.classify(&status))?
            .into_inner();
        let first = inbound
            .message()
            .await
            .map_err(|status| self.classify(&status))?;
        let Some(response) = first else {
            return Err(Failure::Passing(
                "the session ended before Welcome".to_owned(),
            ));
        };
        let Some(session_response::Command::Welcome(welcome)) = response.command else {
            return Err(self.protocol("the first response is not Welcome".to_owned()));
        };
        Ok(Connection {
            welcome: check_welcome(welcome).map_err(|found| self.protocol(found))?,
            reports,
            inbound,
        })
    }

    fn protocol(&self, found: String) -> Failure {
        Failure::Final(NodeError::Protocol {
            coordinator: self.coordinator.clone(),
            found,
        })
    }

    /// What the coordinator's side can put right is waited for.
    fn untrusted(&self, fault: Fault) -> Failure {
        if !fault.is_for_this_end() {
            return Failure::Passing(fault.to_string());
        }
        Failure::Final(NodeError::Untrusted {
            coordinator: self.coordinator.clone(),
            fault,
        })
    }

    /// A coordinator that says why it does not want this instance is not asked again; one that
    /// cannot take it now, or that died while answering, is.
    fn classify(&self, status: &Status) -> Failure {
        if let Some(fault) = channel::fault_of(status) {
            return self.untrusted(fault);
        }
        match status.code() {
            Code::InvalidArgument
            | Code::FailedPrecondition
            | Code::AlreadyExists
            | Code::NotFound
            | Code::OutOfRange
            | Code::PermissionDenied
            | Code::Unauthenticated
            | Code::Unimplemented => Failure::Final(NodeError::Refused {
                coordinator: self.coordinator.clone(),
                message: describe(status),
            }),
            _ => Failure::Passing(describe(status)),
        }
    }
}

/// Checks what the coordinator says first; the error says what is wrong with it.
pub(crate) fn check_welcome(welcome: v1::Welcome) -> Result<Welcome, String> {
    let settings = welcome.settings.ok_or("Welcome carries no settings")?;
    let num_lanes = u8::try_from(settings.num_lanes)
        .ok()
        .filter(|lanes| (1..=MAX_LANES).contains(lanes))
        .ok_or_else(|| {
            format!(
                "{} lanes; 1 to {MAX_LANES} are possible",
                settings.num_lanes
            )
        })?;
    if settings.lease_ms < HEARTBEATS_PER_LEASE {
        return Err(format!("a lease of {} ms", settings.lease_ms));
    }
    let fabric = settings
        .fabric
        .parse()
        .map_err(|error: UnknownFabric| error.to_string())?;
    Ok(Welcome {
        instance: InstanceId(welcome.instance_id),
        role_rank: welcome.role_rank,
        epoch: Epoch(welcome.epoch),
        num_lanes,
        fabric,
        settings,
    })
}

const NO_NODE_SERVICE: &str = "that port takes no instances. It may be the one for clients, or of \
                               another version. Give the address of its --control-listen";

/// A status in its sender's words.
pub(crate) fn describe(status: &Status) -> String {
    match (status.message(), status.code()) {
        // What tonic says of a service that it does not have.
        ("", Code::Unimplemented) => NO_NODE_SERVICE.to_owned(),
        ("", code) => format!("the session failed with {code:?}"),
        (message, _) => message.to_owned(),
    }
}

/// gRPC's own text is "transport error"; the cause is what helps.
fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        write!(text, ": {error}").expect("writing to a String cannot fail");
        cause = error.source();
    }
    text
}
