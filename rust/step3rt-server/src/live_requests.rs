//! The requests that have not ended, and the channel of each.
//!
//! It never waits for a client: a channel that is full is cut.

use std::collections::HashMap;

use step3rt_core::error::RequestError;
use step3rt_core::ids::RequestId;
use step3rt_core::scheduler::RequestEvent;
use tokio::sync::mpsc;

use crate::drive_handle::Submission;

/// Events that may wait for a request's own task, which does nothing but move them on: several
/// steps of the most continuations there can be.
pub const EVENT_BOUND: usize = 1_024;

#[derive(Debug)]
struct LiveRequest {
    client_id: String,
    events: mpsc::Sender<RequestEvent>,
    num_unfinished: u32,
}

/// All live requests.
#[derive(Debug, Default)]
pub struct LiveRequests {
    requests: HashMap<RequestId, LiveRequest>,
    ids: HashMap<String, RequestId>,
}

/// The request's task is gone, or does not keep up: the request is forgotten and must be
/// cancelled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Undeliverable(pub RequestId);

impl LiveRequests {
    /// Adds the request of `submission`; false if its client id is live.
    pub fn insert(&mut self, submission: &Submission) -> bool {
        let (id, client_id) = (submission.request.id, &submission.client_id);
        if self.ids.contains_key(client_id) {
            return false;
        }
        self.ids.insert(client_id.clone(), id);
        self.requests.insert(
            id,
            LiveRequest {
                client_id: client_id.clone(),
                events: submission.events.clone(),
                num_unfinished: submission.request.n,
            },
        );
        true
    }

    /// The request that a client calls `client_id`.
    pub fn find(&self, client_id: &str) -> Option<RequestId> {
        self.ids.get(client_id).copied()
    }

    /// Tells the request's task. A request that this ends is forgotten; the events of a forgotten
    /// request go nowhere.
    pub fn deliver(&mut self, id: RequestId, event: RequestEvent) -> Result<(), Undeliverable> {
        let Some(request) = self.requests.get_mut(&id) else {
            return Ok(());
        };
        let has_ended = match &event {
            RequestEvent::Failed(_) => true,
            RequestEvent::Finished { .. } => {
                request.num_unfinished = request.num_unfinished.saturating_sub(1);
                request.num_unfinished == 0
            }
            _ => false,
        };
        let is_delivered = request.events.try_send(event).is_ok();
        if has_ended || !is_delivered {
            self.remove(id);
        }
        if is_delivered {
            Ok(())
        } else {
            Err(Undeliverable(id))
        }
    }

    /// Forgets a request.
    pub fn remove(&mut self, id: RequestId) {
        if let Some(request) = self.requests.remove(&id) {
            self.ids.remove(&request.client_id);
        }
    }

    /// Ends every request with `error`; returns which.
    pub fn fail_all(&mut self, error: &RequestError) -> Vec<RequestId> {
        let ids: Vec<_> = self.requests.keys().copied().collect();
        for id in &ids {
            // Undeliverable means that it ended by itself.
            let _ = self.deliver(*id, RequestEvent::Failed(error.clone()));
        }
        ids
    }

    /// Whether every request has ended.
    pub fn is_empty(&self) -> bool {
        self.requests.is_empty()
    }
}
