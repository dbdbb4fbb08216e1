//! One task owns the scheduler and the registry; everybody else sends it bounded messages.
//!
//! It carries out what the two decide. It never waits for a client or an instance, so that none
//! of them can hold up another.
//!
//! ```text
//!   services ── Message ──▶ drive: handle → plan → take_events ──▶ sessions (plans)
//!                                                              └──▶ live requests (events)
//! ```

use std::time::Duration;

use step3rt_core::error::{ErrorKind, RequestError};
use step3rt_core::ids::{RequestId, TimeNs};
use step3rt_core::scheduler::{Event, RequestEvent, Scheduler};
use step3rt_proto::v1;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::sleep_until;
use tracing::{debug, info, warn};

use crate::clock::Clock;
use crate::drive_handle::{Admitted, ClusterStatus, Message, Observation, Submission};
use crate::live_requests::{LiveRequests, Undeliverable};
use crate::notify::Notifier;
use crate::registry::Registry;
use crate::sessions::Sessions;

mod instances;

/// Messages taken before the next plan: enough to gather a step's worth of arrivals, few enough
/// that a flood of requests does not hold up the lanes.
const MAX_BATCH: usize = 256;
/// The loop comes round at least this often, for the watchdog.
const MAX_SLEEP: Duration = Duration::from_secs(5);

/// What the drive loop owns.
#[derive(Debug)]
pub struct Drive {
    clock: Clock,
    pub(crate) scheduler: Scheduler,
    registry: Registry,
    sessions: Sessions,
    requests: LiveRequests,
    settings: v1::ClusterSettings,
    status: watch::Sender<ClusterStatus>,
    notifier: Notifier,
    has_served: bool,
    /// Resolved when no request is live.
    drained: Option<oneshot::Sender<()>>,
    /// Resolved when no session is open.
    closed: Option<oneshot::Sender<()>>,
}

/// The parts that a [`Drive`] is made of.
#[derive(Debug)]
pub struct DriveParts {
    /// The coordinator's clock.
    pub clock: Clock,
    /// With no instance and no request.
    pub scheduler: Scheduler,
    /// With no instance.
    pub registry: Registry,
    /// Sent with every welcome.
    pub settings: v1::ClusterSettings,
    /// How long a step may take.
    pub step_timeout_ms: u64,
    /// Where the cluster's status is published.
    pub status: watch::Sender<ClusterStatus>,
    /// The service manager.
    pub notifier: Notifier,
}

impl Drive {
    /// A drive with no sessions and no requests.
    pub fn new(parts: DriveParts) -> Self {
        Self {
            clock: parts.clock,
            scheduler: parts.scheduler,
            registry: parts.registry,
            sessions: Sessions::new(parts.step_timeout_ms),
            requests: LiveRequests::default(),
            settings: parts.settings,
            status: parts.status,
            notifier: parts.notifier,
            has_served: false,
            drained: None,
            closed: None,
        }
    }

    /// Runs until every handle is dropped.
    pub async fn run(mut self, mut messages: mpsc::Receiver<Message>) {
        self.publish_status();
        loop {
            let wake = self.next_wake();
            tokio::select! {
                // Timers are looked at after every message anyway.
                biased;
                message = messages.recv() => match message {
                    Some(message) => self.take(message),
                    None => return,
                },
                () = sleep_until(wake) => {}
            }
            for _ in 1..MAX_BATCH {
                match messages.try_recv() {
                    Ok(message) => self.take(message),
                    Err(_) => break,
                }
            }
            self.advance();
            self.notifier.feed_watchdog();
        }
    }

    fn next_wake(&self) -> tokio::time::Instant {
        let timers = [
            self.scheduler.next_timer(),
            self.registry.next_timer(),
            self.sessions.next_timer(),
        ];
        let latest = tokio::time::Instant::now() + MAX_SLEEP.min(self.notifier.watchdog_interval());
        timers
            .into_iter()
            .flatten()
            .map(|time| self.clock.instant(time))
            .fold(latest, std::cmp::Ord::min)
    }

    /// Takes one message into account.
    pub(crate) fn take(&mut self, message: Message) {
        let now = self.clock.now();
        match message {
            Message::Submit(submission) => self.submit(now, submission),
            Message::Cancel(id) => self.cancel(now, id),
            Message::Stop { request, index } => {
                self.scheduler.handle(now, Event::Stop { request, index });
            }
            Message::Abort { client_ids, reply } => {
                let aborted = client_ids
                    .into_iter()
                    .filter(|client_id| self.abort(now, client_id))
                    .collect();
                let _ = reply.send(aborted); // the caller may have left
            }
            Message::Hello {
                hello,
                commands,
                reply,
            } => {
                let admitted = self.hello(now, hello, commands);
                if let Err(Ok(Admitted { instance, .. })) = reply.send(admitted) {
                    // It hung up before its Welcome: nobody reads this session.
                    self.sessions.close(instance, None);
                    let actions = self.registry.session_ended(instance);
                    self.carry_out(now, actions);
                }
            }
            Message::Session { instance, event } => self.session_event(now, instance, event),
            Message::SessionEnded { instance, reason } => {
                let was_open = self.sessions.close(instance, None);
                if was_open && self.closed.is_some() {
                    info!(%instance, reason, "instance gone, as it was told");
                } else if was_open {
                    warn!(%instance, reason, "instance gone");
                }
                let actions = self.registry.session_ended(instance);
                self.carry_out(now, actions);
            }
            Message::ListInstances(reply) => {
                let _ = reply.send(self.list_instances()); // the caller may have left
            }
            Message::Observe(reply) => {
                let observation = Observation {
                    stats: self.scheduler.stats(),
                    instances: self.list_instances(),
                };
                let _ = reply.send(observation); // the caller may have left
            }
            Message::Drain(drained) => {
                info!("draining: no new requests; running ones go on");
                self.registry.drain();
                self.scheduler.handle(now, Event::Drain);
                self.drained = Some(drained);
            }
            Message::CloseSessions(closed) => {
                self.close_sessions(now);
                self.closed = Some(closed);
            }
        }
    }

    fn submit(&mut self, now: TimeNs, mut submission: Submission) {
        // Once it has served, the scheduler knows best: it lets requests wait for a recovery.
        let refusal = if !self.has_served {
            not_ready(&self.registry)
        } else if let Some(tenant) = self.requests.insert(&submission) {
            submission.request.tenant = tenant;
            self.scheduler
                .handle(now, Event::Submit(submission.request));
            return;
        } else {
            RequestError {
                kind: ErrorKind::DuplicateRequestId,
                message: format!(
                    "a request with id {:?} is live, and ids name streams. Use a new id",
                    submission.client_id
                ),
                retry_after_ms: None,
            }
        };
        let refused = RequestEvent::Failed(refusal);
        let _ = submission.events.try_send(refused); // a new channel has room
    }

    fn cancel(&mut self, now: TimeNs, id: RequestId) {
        self.requests.remove(id);
        self.scheduler.handle(now, Event::Cancel(id));
    }

    fn abort(&mut self, now: TimeNs, client_id: &str) -> bool {
        let Some(id) = self.requests.find(client_id) else {
            return false;
        };
        self.scheduler.handle(now, Event::Cancel(id));
        true
    }

    /// Timers, then plans and events until there are none.
    pub(crate) fn advance(&mut self) {
        let now = self.clock.now();
        let mut actions = self.registry.expire(now);
        for instance in self.sessions.overdue(now) {
            actions.extend(
                self.registry
                    .close(instance, "it did not answer a step in time"),
            );
        }
        self.carry_out(now, actions);
        loop {
            let plans = self.scheduler.plan(now);
            let events = self.scheduler.take_events();
            if plans.is_empty() && events.is_empty() {
                break;
            }
            for plan in plans {
                let is_linked = self.registry.is_linked(plan.key.instance);
                if let Err(not_taken) = self.sessions.dispatch(now, plan, is_linked) {
                    self.not_taken(now, not_taken);
                }
            }
            for (id, event) in events {
                if let Err(Undeliverable(id)) = self.requests.deliver(id, event) {
                    debug!(%id, "client gone or too slow");
                    self.scheduler.handle(now, Event::Cancel(id));
                }
            }
        }
        if self.requests.is_empty()
            && let Some(drained) = self.drained.take()
        {
            let _ = drained.send(()); // shutdown may have given up waiting
        }
        if self.sessions.is_empty()
            && let Some(closed) = self.closed.take()
        {
            let _ = closed.send(()); // shutdown may have given up waiting
        }
        self.publish_status();
    }

    fn publish_status(&mut self) {
        let is_serving = self.registry.is_serving();
        self.has_served |= is_serving;
        let status = ClusterStatus {
            is_serving,
            text: self.registry.status(),
            model_fingerprint: self.registry.model_fingerprint(),
            longest_sequence_tokens: self
                .scheduler
                .longest_sequence_tokens()
                .or(self.status.borrow().longest_sequence_tokens),
        };
        let has_changed = self.status.send_if_modified(|published| {
            let has_changed = *published != status;
            if has_changed {
                published.clone_from(&status);
            }
            has_changed
        });
        if has_changed {
            info!(status = status.text, "cluster");
            self.notifier.status(&status.text);
        }
    }

    fn close_sessions(&mut self, now: TimeNs) {
        let error = RequestError {
            kind: ErrorKind::Draining,
            message: "the server shut down before the request was done. Retry elsewhere".to_owned(),
            retry_after_ms: None,
        };
        for id in self.requests.fail_all(&error) {
            self.scheduler.handle(now, Event::Cancel(id));
        }
        for not_taken in self.sessions.drain() {
            self.not_taken(now, not_taken);
        }
    }
}

fn not_ready(registry: &Registry) -> RequestError {
    RequestError {
        kind: ErrorKind::EngineNotReady,
        message: format!(
            "the cluster does not serve yet ({}). Start the missing instances, or retry later",
            registry.status()
        ),
        retry_after_ms: None,
    }
}
