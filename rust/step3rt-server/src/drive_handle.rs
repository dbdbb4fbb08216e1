//! How services speak to the drive loop: messages over one bounded channel.
//!
//! A handle owns no state of the cluster; dropping every handle ends the loop.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use step3rt_core::ids::{InstanceId, RequestId};
use step3rt_core::scheduler::{Request, RequestEvent, SchedulerStats};
use step3rt_proto::v1;
use step3rt_proto::v1::session_request::Event as SessionEvent;
use tokio::sync::{mpsc, oneshot};

use crate::registry::HelloError;
use crate::sessions::CommandSender;

/// Messages that may wait for the drive loop. It takes all of them at each turn, so this is the
/// burst of one turn; senders wait when it is full.
const MESSAGE_BOUND: usize = 1_024;

/// What the drive loop is told.
#[derive(Debug)]
pub enum Message {
    /// A checked request.
    Submit(Submission),
    /// The client left.
    Cancel(RequestId),
    /// A stop string matched.
    Stop {
        /// The request.
        request: RequestId,
        /// Which of `n`.
        index: u32,
    },
    /// Ends live requests by the clients' names for them; replies with those that were live.
    Abort {
        /// The clients' ids.
        client_ids: Vec<String>,
        /// Gets the ids that were live.
        reply: oneshot::Sender<Vec<String>>,
    },
    /// An instance asks to join.
    Hello {
        /// What it says of itself.
        hello: v1::Hello,
        /// Where its commands go.
        commands: CommandSender,
        /// Gets the admission.
        reply: oneshot::Sender<Result<Admitted, HelloError>>,
    },
    /// A message of a session.
    Session {
        /// Whose.
        instance: InstanceId,
        /// What it says.
        event: SessionEvent,
    },
    /// A session's stream ended.
    SessionEnded {
        /// Whose.
        instance: InstanceId,
        /// For the log.
        reason: String,
    },
    /// Asks for a snapshot.
    ListInstances(oneshot::Sender<v1::ListInstancesResponse>),
    /// The same, with the scheduler's state.
    Observe(oneshot::Sender<Observation>),
    /// Accept nothing new; resolves when no request is live.
    Drain(oneshot::Sender<()>),
    /// End every request and session; resolves when no session is open.
    CloseSessions(oneshot::Sender<()>),
}

/// A request on its way to the scheduler.
#[derive(Debug)]
pub struct Submission {
    /// The client's name for it.
    pub client_id: String,
    /// Whose request it is, by name; empty is the default tenant.
    pub tenant: String,
    /// Numbered by [`DriveHandle::next_request_id`]; the drive loop numbers the tenant.
    pub request: Request,
    /// Where its events go.
    pub events: mpsc::Sender<RequestEvent>,
}

/// What the cluster does at a time.
#[derive(Debug)]
pub struct Observation {
    /// Of the scheduler.
    pub stats: SchedulerStats,
    /// Of the registry.
    pub instances: v1::ListInstancesResponse,
}

/// An admitted session.
#[derive(Debug)]
pub struct Admitted {
    /// The instance's number.
    pub instance: InstanceId,
    /// Resolves when the coordinator has ended the session.
    pub stopped: oneshot::Receiver<()>,
}

/// What the outside may know of the cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ClusterStatus {
    /// Whether requests are served.
    pub is_serving: bool,
    /// For people.
    pub text: String,
    /// What the instances agree on; empty when there is none.
    pub model_fingerprint: String,
    /// Most tokens of a sequence that an instance has had KV blocks for; one that is gone may come
    /// back. `None` before the first.
    pub longest_sequence_tokens: Option<u32>,
}

/// The drive loop is gone, which happens at shutdown only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DriveGone;

/// Sends messages to the drive loop.
#[derive(Clone, Debug)]
pub struct DriveHandle {
    messages: mpsc::Sender<Message>,
    next_request: Arc<AtomicU64>,
}

impl DriveHandle {
    /// A handle, and the end that the loop reads.
    pub fn new() -> (Self, mpsc::Receiver<Message>) {
        let (messages, receiver) = mpsc::channel(MESSAGE_BOUND);
        let handle = Self {
            messages,
            next_request: Arc::new(AtomicU64::new(1)),
        };
        (handle, receiver)
    }

    /// A number that no other request has.
    pub fn next_request_id(&self) -> RequestId {
        RequestId(self.next_request.fetch_add(1, Ordering::Relaxed))
    }

    /// Sends `message`, waiting for room.
    pub async fn send(&self, message: Message) -> Result<(), DriveGone> {
        self.messages.send(message).await.map_err(|_| DriveGone)
    }

    /// Sends what `message` makes of a reply channel, and waits for the reply.
    pub async fn ask<T>(
        &self,
        message: impl FnOnce(oneshot::Sender<T>) -> Message,
    ) -> Result<T, DriveGone> {
        let (reply, answer) = oneshot::channel();
        self.send(message(reply)).await?;
        answer.await.map_err(|_| DriveGone)
    }
}
