//! `NodeService`: one stream per instance, between its socket and the drive loop.
//!
//! It never decides who may join, and keeps nothing beyond the stream.

use std::time::Duration;

use step3rt_core::ids::InstanceId;
use step3rt_proto::v1::node_service_server::NodeService;
use step3rt_proto::v1::session_request::Event as SessionEvent;
use step3rt_proto::v1::{
    Hello, ListInstancesRequest, ListInstancesResponse, SessionRequest, SessionResponse,
};
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::drive_handle::{DriveGone, DriveHandle, Message};
use crate::registry::HelloError;
use crate::sessions::COMMAND_BOUND;

/// A peer that says nothing for this long after connecting is not an instance.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);

/// Serves `NodeService` for a drive loop.
#[derive(Clone, Debug)]
pub struct NodeServer {
    drive: DriveHandle,
}

impl NodeServer {
    /// A server whose instances are `drive`'s.
    pub fn new(drive: DriveHandle) -> Self {
        Self { drive }
    }
}

#[tonic::async_trait]
impl NodeService for NodeServer {
    type SessionStream = ReceiverStream<Result<SessionResponse, Status>>;

    async fn session(
        &self,
        request: Request<Streaming<SessionRequest>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let mut requests = request.into_inner();
        let hello = receive_hello(&mut requests).await?;
        let (commands, responses) = mpsc::channel(COMMAND_BOUND);
        let admitted = self
            .drive
            .ask(|reply| Message::Hello {
                hello,
                commands,
                reply,
            })
            .await??;
        let drive = self.drive.clone();
        tokio::spawn(async move {
            let instance = admitted.instance;
            let reason = read_session(&drive, instance, requests, admitted.stopped).await;
            // At shutdown nobody needs to know any more.
            let _ = drive.send(Message::SessionEnded { instance, reason }).await;
        });
        Ok(Response::new(ReceiverStream::new(responses)))
    }

    async fn list_instances(
        &self,
        _request: Request<ListInstancesRequest>,
    ) -> Result<Response<ListInstancesResponse>, Status> {
        Ok(Response::new(self.drive.ask(Message::ListInstances).await?))
    }
}

async fn receive_hello(requests: &mut Streaming<SessionRequest>) -> Result<Hello, Status> {
    let first = timeout(HELLO_TIMEOUT, requests.message())
        .await
        .map_err(|_| Status::deadline_exceeded("no Hello arrived within 10 s of connecting"))??;
    match first.and_then(|request| request.event) {
        Some(SessionEvent::Hello(hello)) => Ok(hello),
        _ => Err(Status::invalid_argument(
            "the first message of a session must be Hello",
        )),
    }
}

/// Passes messages on until the stream ends, by either side; returns why it did.
async fn read_session(
    drive: &DriveHandle,
    instance: InstanceId,
    mut requests: Streaming<SessionRequest>,
    mut stopped: oneshot::Receiver<()>,
) -> String {
    loop {
        let message = tokio::select! {
            message = requests.message() => message,
            _ = &mut stopped => return "closed by the coordinator".to_owned(),
        };
        let event = match message {
            Ok(Some(SessionRequest { event: Some(event) })) => event,
            // A message of a later version that this build does not know.
            Ok(Some(SessionRequest { event: None })) => continue,
            Ok(None) => return "the instance closed its session".to_owned(),
            Err(status) => return format!("the stream broke: {}", status.message()),
        };
        if drive
            .send(Message::Session { instance, event })
            .await
            .is_err()
        {
            return "the coordinator stops".to_owned();
        }
    }
}

impl From<DriveGone> for Status {
    fn from(DriveGone: DriveGone) -> Self {
        Self::unavailable("the coordinator stops")
    }
}

impl From<HelloError> for Status {
    fn from(error: HelloError) -> Self {
        let text = error.to_string();
        match error {
            HelloError::ProtocolVersion { .. }
            | HelloError::UnknownRole
            | HelloError::NoModel
            | HelloError::OtherModel { .. }
            | HelloError::OtherLimits { .. } => Self::failed_precondition(text),
            // The rank may be that of a dead instance whose lease still runs.
            HelloError::NoFreeRank { .. } => Self::resource_exhausted(text),
            HelloError::Draining => Self::unavailable(text),
        }
    }
}
