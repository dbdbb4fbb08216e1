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
use step3rt_core::ids::{InstanceId, RequestId, TimeNs};
use step3rt_core::scheduler::{Event, RequestEvent, Scheduler};
use step3rt_proto::step::{key_from_wire, output_from_wire};
use step3rt_proto::v1;
use step3rt_proto::v1::session_request::Event as SessionEvent;
use step3rt_proto::v1::session_response::Command;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::sleep_until;
use tonic::Status;
use tracing::{debug, info, warn};

use crate::clock::Clock;
use crate::drive_handle::{Admitted, ClusterStatus, Message, Submission};
use crate::live_requests::{LiveRequests, Undeliverable};
use crate::notify::Notifier;
use crate::registry::{Action, HelloError, Registry};
use crate::sessions::{CommandSender, NotTaken, Sessions};

/// Messages taken before the next plan: enough to gather a step's worth of arrivals, few enough
/// that a flood of requests does not hold up the lanes.
const MAX_BATCH: usize = 256;
/// The loop comes round at least this often, for the watchdog.
const MAX_SLEEP: Duration = Duration::from_secs(5);

/// What the drive loop owns.
#[derive(Debug)]
pub struct Drive {
    clock: Clock,
    scheduler: Scheduler,
    registry: Registry,
    sessions: Sessions,
    requests: LiveRequests,
    settings: v1::ClusterSettings,
    status: watch::Sender<ClusterStatus>,
    notifier: Notifier,
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
            drained: None,
            closed: None,
        }
    }

    /// Runs until every handle is dropped.
    pub async fn run(mut self, mut messages: mpsc::Receiver<Message>) {
        loop {
            let wake = self.next_wake();
            tokio::select! {
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

    fn take(&mut self, message: Message) {
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
                let _ = reply.send(admitted); // its reader then ends the session
            }
            Message::Session { instance, event } => self.session_event(now, instance, event),
            Message::SessionEnded { instance, reason } => {
                self.sessions.close(instance, None);
                let actions = self.registry.session_ended(instance);
                if !actions.is_empty() {
                    warn!(%instance, reason, "instance lost");
                }
                self.carry_out(now, actions);
            }
            Message::ListInstances(reply) => {
                let _ = reply.send(self.list_instances()); // the caller may have left
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

    fn submit(&mut self, now: TimeNs, submission: Submission) {
        let refusal = if !self.registry.is_serving() {
            not_serving(&self.registry)
        } else if self.requests.insert(&submission) {
            self.scheduler
                .handle(now, Event::Submit(submission.request));
            return;
        } else {
            RequestError {
                kind: ErrorKind::DuplicateRequestId,
                message: format!(
                    "a request with id {:?} is live, and ids name streams. Use a new id.",
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

    fn hello(
        &mut self,
        now: TimeNs,
        hello: v1::Hello,
        commands: CommandSender,
    ) -> Result<Admitted, HelloError> {
        let role = hello.role();
        let admission = self.registry.hello(now, hello)?;
        let instance = admission.instance;
        info!(%instance, role = role.as_str_name(), role_rank = admission.role_rank, "instance joins");
        let stopped = self.sessions.open(instance, commands);
        let welcome = Command::Welcome(v1::Welcome {
            instance_id: instance.0,
            role_rank: admission.role_rank,
            epoch: admission.epoch.0,
            settings: Some(self.settings.clone()),
        });
        let topology = Command::Topology(self.registry.topology());
        for command in [welcome, topology] {
            if self.sessions.send(instance, command).is_err() {
                self.not_taken(now, NotTaken(instance));
            }
        }
        Ok(Admitted { instance, stopped })
    }

    fn session_event(&mut self, now: TimeNs, instance: InstanceId, event: SessionEvent) {
        self.registry.renew(now, instance);
        let actions = match event {
            SessionEvent::Hello(_) => self.registry.close(instance, "it sent Hello twice"),
            SessionEvent::Heartbeat(heartbeat) => self.registry.heartbeat(instance, heartbeat),
            SessionEvent::Ready(ready) => self.registry.ready(instance, ready),
            SessionEvent::LinksReady(links) => {
                for link in &links.links {
                    let (fabric, reason) = (&link.fabric, &link.reason);
                    info!(%instance, peer = link.peer_instance_id, fabric, reason, "linked");
                }
                self.registry.links_ready(instance, links)
            }
            SessionEvent::PeerLost(lost) => {
                warn!(%instance, peer = lost.instance_id, reason = lost.reason, "peer lost");
                self.registry.peer_lost(instance, &lost)
            }
            SessionEvent::Leaving(_) => {
                info!(%instance, "instance leaves");
                self.registry.leaving(instance)
            }
            SessionEvent::StepOutput(output) => self.step_output(now, instance, output),
            SessionEvent::StepFailed(failed) => self.step_failed(now, instance, failed),
        };
        self.carry_out(now, actions);
        if self.registry.is_linked(instance)
            && let Err(not_taken) = self.sessions.release(now, instance)
        {
            self.not_taken(now, not_taken);
        }
    }

    fn step_output(
        &mut self,
        now: TimeNs,
        instance: InstanceId,
        output: v1::StepOutput,
    ) -> Vec<Action> {
        if let Some(timing) = &output.timing {
            debug!(
                %instance, lane = output.lane, step = output.step,
                compute_ns = timing.compute_ns, wait_ns = timing.wait_ns, total_ns = timing.total_ns,
                "step done"
            );
        }
        match output_from_wire(instance, output) {
            Ok(output) => {
                let key = output.key;
                self.sessions.step_answered(instance, key.lane, key.step);
                self.scheduler.handle(now, Event::StepDone(output));
                Vec::new()
            }
            Err(error) => self.registry.close(instance, &error.to_string()),
        }
    }

    fn step_failed(
        &mut self,
        now: TimeNs,
        instance: InstanceId,
        failed: v1::StepFailed,
    ) -> Vec<Action> {
        match key_from_wire(instance, failed.epoch, failed.lane, failed.step) {
            Ok(key) => {
                warn!(%instance, lane = failed.lane, step = failed.step, reason = failed.reason, "step failed");
                self.sessions.step_answered(instance, key.lane, key.step);
                let reason = failed.reason;
                self.scheduler
                    .handle(now, Event::StepFailed { key, reason });
                Vec::new()
            }
            Err(error) => self.registry.close(instance, &error.to_string()),
        }
    }

    fn carry_out(&mut self, now: TimeNs, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::AnnounceTopology(topology) => {
                    for not_taken in self.sessions.announce(&topology) {
                        self.not_taken(now, not_taken);
                    }
                }
                Action::AttentionReady {
                    instance,
                    epoch,
                    num_kv_blocks,
                } => {
                    info!(%instance, num_kv_blocks, "attention instance takes steps");
                    let event = Event::AttentionReady {
                        instance,
                        epoch,
                        num_kv_blocks,
                    };
                    self.scheduler.handle(now, event);
                }
                Action::AttentionLost(instance) => {
                    self.scheduler.handle(now, Event::AttentionLost(instance));
                }
                Action::ExpertsComplete(are_complete) => {
                    info!(are_complete, "experts");
                    self.scheduler
                        .handle(now, Event::ExpertsComplete(are_complete));
                }
                Action::CloseSession { instance, reason } => {
                    warn!(%instance, reason, "session closed by the coordinator");
                    let status =
                        Status::aborted(format!("the coordinator ended the session: {reason}"));
                    self.sessions.close(instance, Some(status));
                }
            }
        }
    }

    /// An instance that does not take its commands is as good as dead.
    fn not_taken(&mut self, now: TimeNs, NotTaken(instance): NotTaken) {
        let actions = self
            .registry
            .close(instance, "it does not take its commands");
        self.carry_out(now, actions);
    }

    /// Timers, then plans and events until there are none.
    fn advance(&mut self) {
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
        let status = ClusterStatus {
            is_serving: self.registry.is_serving(),
            text: self.registry.status(),
            model_fingerprint: self.registry.model_fingerprint(),
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
            message: "the server shut down before the request was done. Retry elsewhere."
                .to_owned(),
            retry_after_ms: None,
        };
        for id in self.requests.fail_all(&error) {
            self.scheduler.handle(now, Event::Cancel(id));
        }
        for not_taken in self.sessions.drain() {
            self.not_taken(now, not_taken);
        }
    }

    fn list_instances(&self) -> v1::ListInstancesResponse {
        let stats = self.scheduler.stats();
        let mut instances = self.registry.instances();
        for info in &mut instances {
            let blocks = stats
                .kv_blocks
                .iter()
                .find(|(instance, ..)| instance.0 == info.instance_id);
            if let Some((_, num_free, _)) = blocks {
                info.num_free_kv_blocks = *num_free;
            }
        }
        v1::ListInstancesResponse {
            instances,
            is_serving: self.registry.is_serving(),
            status: self.registry.status(),
        }
    }
}

fn not_serving(registry: &Registry) -> RequestError {
    let (kind, advice) = if registry.is_draining() {
        (ErrorKind::Draining, "Retry elsewhere.")
    } else {
        (
            ErrorKind::EngineNotReady,
            "Start the missing instances, or retry later.",
        )
    };
    RequestError {
        kind,
        message: format!(
            "the cluster does not serve yet ({}). {advice}",
            registry.status()
        ),
        retry_after_ms: None,
    }
}
