//! The requests that have not ended, and the channel of each.
//!
//! It never waits for a client: a channel that is full is cut.

use std::collections::HashMap;

use step3rt_core::error::RequestError;
use step3rt_core::ids::{RequestId, TenantId};
use step3rt_core::scheduler::RequestEvent;
use tokio::sync::mpsc;

use crate::drive_handle::Submission;
use crate::tenants::Tenants;

#[derive(Debug)]
struct LiveRequest {
    client_id: String,
    tenant: String,
    events: mpsc::Sender<RequestEvent>,
    num_unfinished: u32,
}

/// All live requests.
#[derive(Debug, Default)]
pub struct LiveRequests {
    requests: HashMap<RequestId, LiveRequest>,
    ids: HashMap<String, RequestId>,
    tenants: Tenants,
}

/// The request's task is gone, or does not keep up: the request is forgotten and must be
/// cancelled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Undeliverable(pub RequestId);

impl LiveRequests {
    /// Adds the request of `submission` and returns its tenant's number; `None` if its client id is
    /// live.
    pub fn insert(&mut self, submission: &Submission) -> Option<TenantId> {
        let (id, client_id) = (submission.request.id, &submission.client_id);
        if self.ids.contains_key(client_id) {
            return None;
        }
        self.ids.insert(client_id.clone(), id);
        self.requests.insert(
            id,
            LiveRequest {
                client_id: client_id.clone(),
                tenant: submission.tenant.clone(),
                events: submission.events.clone(),
                num_unfinished: submission.request.n,
            },
        );
        Some(self.tenants.enter(&submission.tenant))
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
            self.tenants.leave(&request.tenant);
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

#[cfg(test)]
mod tests {
    use step3rt_core::error::ErrorKind;
    use step3rt_core::ids::{TenantId, TokenId};
    use step3rt_core::scheduler::{FinishReason, Request, Usage};
    use step3rt_core::step::SamplingState;

    use super::*;

    const ID: RequestId = RequestId(1);
    const STARTED: RequestEvent = RequestEvent::Started {
        num_cached_tokens: 0,
    };

    fn submission(
        id: RequestId,
        n: u32,
        bound: usize,
    ) -> (Submission, mpsc::Receiver<RequestEvent>) {
        let (events, receiver) = mpsc::channel(bound);
        let request = Request {
            id,
            prompt: vec![TokenId(1)],
            resumed: vec![],
            n,
            sampling: SamplingState {
                temperature: 0.0,
                top_k: 0,
                top_p: 1.0,
                min_p: 0.0,
                seed: 0,
                top_logprobs: None,
                prompt_logprobs: None,
                min_tokens: 0,
                stop_tokens: vec![],
                adjustments: None,
            },
            max_tokens: 1,
            priority: 0,
            tenant: TenantId(0),
            deadline: None,
        };
        let submission = Submission {
            client_id: "name".to_owned(),
            tenant: String::new(),
            request,
            events,
        };
        (submission, receiver)
    }

    fn finished(index: u32) -> RequestEvent {
        RequestEvent::Finished {
            index,
            reason: FinishReason::Length,
            usage: Usage::default(),
        }
    }

    #[test]
    fn a_request_is_live_until_its_last_continuation_has_finished() {
        let mut requests = LiveRequests::default();
        let (first, _events) = submission(ID, 2, 8);
        assert!(requests.insert(&first).is_some());
        requests.deliver(ID, finished(1)).expect("room");
        assert_eq!(requests.find("name"), Some(ID));
        requests.deliver(ID, finished(0)).expect("room");
        assert!(requests.is_empty() && requests.find("name").is_none());
        requests.deliver(ID, finished(0)).expect("goes nowhere");
    }

    #[test]
    fn a_live_name_is_not_given_twice() {
        let mut requests = LiveRequests::default();
        let (first, _events) = submission(ID, 1, 8);
        let (second, _other_events) = submission(RequestId(2), 1, 8);
        assert!(requests.insert(&first).is_some() && requests.insert(&second).is_none());
        requests.remove(ID);
        assert!(requests.insert(&second).is_some());
    }

    #[test]
    fn a_full_channel_ends_the_request() {
        let mut requests = LiveRequests::default();
        let (first, mut events) = submission(ID, 1, 1);
        requests.insert(&first);
        drop(first);
        requests.deliver(ID, STARTED).expect("room");
        let full = requests.deliver(ID, STARTED);
        assert_eq!(full, Err(Undeliverable(ID)));
        assert!(requests.is_empty());
        assert_eq!(events.blocking_recv(), Some(STARTED));
        assert_eq!(
            events.blocking_recv(),
            None,
            "the channel closes: it was cut"
        );
    }

    #[test]
    fn all_can_be_failed_at_once() {
        let mut requests = LiveRequests::default();
        let (first, mut events) = submission(ID, 3, 8);
        requests.insert(&first);
        let error = RequestError {
            kind: ErrorKind::Draining,
            message: String::new(),
            retry_after_ms: None,
        };
        assert_eq!(requests.fail_all(&error), [ID]);
        assert_eq!(events.blocking_recv(), Some(RequestEvent::Failed(error)));
        assert!(requests.is_empty());
    }
}
