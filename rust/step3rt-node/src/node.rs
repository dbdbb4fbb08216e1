//! One instance as its loop sees it: a place to sleep, news in order, slots, and reports.
//!
//! It joins the session and the links and adds signals and the service manager. It never computes,
//! and it never reports on its own what only the loop can know.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use step3rt_core::ids::{InstanceId, LaneId, StepId};
use step3rt_core::step::{StepKey, StepOutput};
use step3rt_fabric::address::{DataAddress, FabricChoice, boot_id};
use step3rt_fabric::contract::{Geometry, Side, SlotMemory};
use step3rt_fabric::device_offer::DeviceOffer;
use step3rt_fabric::endpoint::{BindError, Endpoint, EndpointConfig, LinkSettings};
use step3rt_fabric::frame::Frame;
use step3rt_proto::v1;
use step3rt_proto::v1::session_request::Event;

use crate::dialer::Welcome;
use crate::error::NodeError;
use crate::event::NodeEvent;
use crate::links::{LinkNews, Links};
use crate::options::{NodeOptions, Role};
use crate::session::{Command, Session};
use crate::signals;
use crate::supervisor::Supervisor;

/// Longest single sleep. Signals, the watchdog and heartbeats' idea of progress need the loop to
/// come round this often; everything else rings the doorbell.
const LONGEST_SLEEP: Duration = Duration::from_millis(200);

/// Longest time-out of a poll: an hour is for ever to a loop, and any `Instant` can bear it.
const LONGEST_POLL: Duration = Duration::from_hours(1);

/// Where the time of a step went, as `StepTiming` on the wire.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepTiming {
    /// Attention-side work.
    pub compute_ns: u64,
    /// Waiting for FFN replies with nothing else to do.
    pub wait_ns: u64,
    /// From the plan to the outputs.
    pub total_ns: u64,
}

/// An instance's session and links. Belongs to one thread at a time.
pub struct Node {
    options: NodeOptions,
    session: Session,
    supervisor: Supervisor,
    phase: Phase,
    /// Whether the loop has been told to drain.
    is_draining: bool,
    /// Why the session is over, once it is.
    lost: Option<String>,
    /// Reused by every poll.
    news: LinkNews,
}

/// How far the instance has come. What a phase lacks cannot be used in it.
enum Phase {
    /// Welcomed; sizes of the slots are not known yet.
    Joined,
    /// Listening for peers, which do not know it yet; weights are loading.
    Bound(Endpoint),
    /// In the topology.
    Ready(Links),
    /// Closed.
    Closed,
}

impl Node {
    /// Connects, retrying until the coordinator answers. `is_interrupted` is asked every now and
    /// then on the calling thread; true gives up.
    pub fn connect(
        options: NodeOptions,
        is_interrupted: &mut dyn FnMut() -> bool,
    ) -> Result<Self, NodeError> {
        let boot_id = boot_id().map_err(|source| NodeError::System {
            action: "read the boot id of this host",
            source,
        })?;
        let mut supervisor = Supervisor::from_environment();
        let waiting = format!(
            "looking for the coordinator at {}",
            options.coordinator.as_str()
        );
        supervisor.wait(Instant::now(), &waiting);
        let session = Session::connect(&options, boot_id, &mut || {
            supervisor.wait(Instant::now(), &waiting);
            signals::asked_to_stop() || is_interrupted()
        })?;
        // The next sign of life is that weights load, or that they did.
        supervisor.status("connected");
        Ok(Self {
            options,
            session,
            supervisor,
            phase: Phase::Joined,
            is_draining: false,
            lost: None,
            news: LinkNews::default(),
        })
    }

    /// Who this instance is, and the cluster's settings.
    pub fn welcome(&self) -> &Welcome {
        self.session.welcome()
    }

    /// Shows `text` to people; while weights load, also a sign of life.
    ///
    /// An error once a signal has asked to stop: what is loaded then would serve nobody.
    pub fn set_status(&mut self, text: &str) -> Result<(), NodeError> {
        if signals::asked_to_stop() {
            return Err(NodeError::InterruptedLoading);
        }
        let now = Instant::now();
        self.session.pulse().mark_progress(now);
        self.session.pulse().set_status(text);
        self.supervisor.status(text);
        self.supervisor.feed(now);
        Ok(())
    }

    /// Binds the data listeners for slots of these sizes. Once, after connecting.
    /// `device_offer` is what all peers are told of this instance's device memory.
    pub fn bind(
        &mut self,
        a2f_slot_bytes: usize,
        f2a_slot_bytes: usize,
        device_offer: Option<&[u8]>,
    ) -> Result<(), NodeError> {
        if !matches!(self.phase, Phase::Joined) {
            return Err(NodeError::OutOfOrder {
                verb: "bind",
                why: "it comes once, before ready",
            });
        }
        let device_offer = device_offer.map(DeviceOffer::new).transpose()?;
        let welcome = self.session.welcome();
        let data_host = self.options.data_host;
        let config = EndpointConfig {
            identity: welcome.identity(),
            side: match self.options.role {
                Role::Attention => Side::Initiator,
                Role::Ffn => Side::Responder,
            },
            geometry: Geometry {
                num_lanes: welcome.num_lanes,
                a2f_slot_bytes,
                f2a_slot_bytes,
            },
            fabric: welcome.fabric,
            // Attention instances connect; nobody connects to them.
            listen_shm: self.options.role == Role::Ffn && welcome.fabric != FabricChoice::Tcp,
            listen_tcp: (self.options.role == Role::Ffn && welcome.fabric != FabricChoice::Shm)
                .then(|| SocketAddr::new(data_host, 0)),
            advertise_host: None,
            settings: LinkSettings {
                spin_us: self.options.spin_us,
                ..LinkSettings::default()
            },
        };
        let tls = self.options.tls.clone();
        let endpoint =
            Endpoint::bind_with(config, device_offer, tls).map_err(|error| match error {
                BindError::Tcp { error, .. } => NodeError::DataHostUnbound {
                    data_host: data_host.to_string(),
                    why: error.to_string(),
                },
                error => NodeError::Bind(error),
            })?;
        self.session.ring(endpoint.doorbell());
        self.phase = Phase::Bound(endpoint);
        Ok(())
    }

    /// Tells the coordinator that weights are loaded and work may come. Once, after [`Self::bind`].
    ///
    /// With `takes_signals`, SIGTERM and SIGINT are a [`NodeEvent::Drain`] from here on; before,
    /// nothing is in flight, and a signal does what it does to any process.
    pub fn ready(&mut self, num_kv_blocks: u32, takes_signals: bool) -> Result<(), NodeError> {
        let Phase::Bound(endpoint) = &self.phase else {
            return Err(NodeError::OutOfOrder {
                verb: "ready",
                why: "it comes once, after bind",
            });
        };
        let addresses = endpoint.addresses().iter().map(address_to_wire).collect();
        if takes_signals {
            signals::take_over()?;
        }
        self.session.send(Event::Ready(v1::Ready {
            addresses,
            num_kv_blocks,
        }))?;
        if let Phase::Bound(endpoint) = std::mem::replace(&mut self.phase, Phase::Closed) {
            self.phase = Phase::Ready(Links::new(self.options.role, endpoint));
        }
        self.session.pulse().mark_progress(Instant::now());
        self.session.pulse().set_status("ready");
        self.supervisor.ready();
        Ok(())
    }

    /// Waits until there is news, at most `timeout` (and an hour), and appends all of it to `out`
    /// in this order: what the coordinator said, what links did, the loss of the session.
    pub fn poll(&mut self, timeout: Duration, out: &mut Vec<NodeEvent>) -> Result<(), NodeError> {
        let mut now = Instant::now();
        let deadline = now + timeout.min(LONGEST_POLL);
        loop {
            let Phase::Ready(links) = &self.phase else {
                return Err(NodeError::OutOfOrder {
                    verb: "poll",
                    why: "it comes after ready and before close",
                });
            };
            let doorbell = links.doorbell();
            let seen = doorbell.current();
            self.collect(now, out);
            if !out.is_empty() || now >= deadline {
                return Ok(());
            }
            doorbell.wait(seen, self.sleep_for(now, deadline));
            now = Instant::now();
        }
    }

    /// The slot for the next push to `peer` on `lane`.
    pub fn send_slot(
        &self,
        peer: InstanceId,
        lane: LaneId,
    ) -> Result<Arc<dyn SlotMemory>, NodeError> {
        self.slot(peer, lane, Endpoint::send_slot)
    }

    /// The slot where arrivals from `peer` on `lane` lie; not to be written.
    pub fn receive_slot(
        &self,
        peer: InstanceId,
        lane: LaneId,
    ) -> Result<Arc<dyn SlotMemory>, NodeError> {
        self.slot(peer, lane, Endpoint::receive_slot)
    }

    /// Publishes the first bytes of the send slot.
    pub fn push(&mut self, peer: InstanceId, lane: LaneId, frame: Frame) -> Result<(), NodeError> {
        let endpoint = match &mut self.phase {
            Phase::Ready(links) => links.endpoint_mut_of(peer),
            _ => None,
        };
        endpoint
            .ok_or(NodeError::NotLinked(peer))?
            .push(peer, lane, frame)
            .map_err(|source| NodeError::Push { peer, source })
    }

    /// Has the link to `peer` replaced by a new one. The next poll says that it is down with `reason`, as
    /// the peer's does, and a later one that it is up under a new epoch. Never waits.
    pub fn reset_link(&mut self, peer: InstanceId, reason: &str) -> Result<(), NodeError> {
        let reset = match &mut self.phase {
            Phase::Ready(links) => links.reset(peer, reason, &mut self.news),
            _ => None,
        };
        reset.ok_or(NodeError::NotLinked(peer))
    }

    /// Names a step of this incarnation of this instance.
    pub fn step_key(&self, lane: LaneId, step: StepId) -> StepKey {
        let welcome = self.session.welcome();
        StepKey {
            instance: welcome.instance,
            epoch: welcome.epoch,
            lane,
            step,
        }
    }

    /// Reports a step's outputs, one per chunk in the plan's order.
    pub fn complete_step(&self, output: StepOutput, timing: StepTiming) -> Result<(), NodeError> {
        let mut output = v1::StepOutput::from(output);
        output.timing = Some(v1::StepTiming {
            compute_ns: timing.compute_ns,
            wait_ns: timing.wait_ns,
            total_ns: timing.total_ns,
        });
        self.session.send(Event::StepOutput(output))
    }

    /// Reports that a step had no effect.
    pub fn fail_step(&self, key: StepKey, reason: String) -> Result<(), NodeError> {
        self.session.send(Event::StepFailed(v1::StepFailed {
            epoch: key.epoch.0,
            lane: key.lane.0.into(),
            step: key.step.0,
            reason,
        }))
    }

    /// Ends the session and every link; idempotent. What is reported already is sent first.
    pub fn close(&mut self) {
        self.session.close();
        self.phase = Phase::Closed;
    }

    /// Takes all news without waiting.
    fn collect(&mut self, now: Instant, out: &mut Vec<NodeEvent>) {
        self.session.pulse().mark_progress(now);
        self.supervisor.feed(now);
        if !self.is_draining && signals::asked_to_stop() {
            self.report(Event::Leaving(v1::Leaving {}));
            self.drain(out);
        }
        while let Some(command) = self.session.next_command() {
            match command {
                Command::StepPlan(plan) => out.push(NodeEvent::StepPlan(plan)),
                Command::Drain => self.drain(out),
                Command::Lost(reason) => self.lost = Some(reason),
                Command::Topology(topology) => {
                    if let Phase::Ready(links) = &mut self.phase {
                        links.follow(topology, now, &mut self.news);
                    }
                }
            }
        }
        if let Phase::Ready(links) = &mut self.phase {
            links.poll(now, &mut self.news);
        }
        self.pass_on_link_news(out);
        if let Some(reason) = self.lost.take() {
            out.push(NodeEvent::SessionLost { reason });
        }
    }

    fn drain(&mut self, out: &mut Vec<NodeEvent>) {
        if !self.is_draining {
            self.is_draining = true;
            self.supervisor.stopping();
            out.push(NodeEvent::Drain);
        }
    }

    fn pass_on_link_news(&mut self, out: &mut Vec<NodeEvent>) {
        out.append(&mut self.news.events);
        if let Some(status) = self.news.status.take() {
            self.session.pulse().set_status(&status);
            self.supervisor.status(&status);
        }
        for event in std::mem::take(&mut self.news.reports) {
            self.report(event);
        }
    }

    /// A report that nobody takes any more is no error here: the loss of the session is an event.
    fn report(&self, event: Event) {
        if let Err(error) = self.session.send(event) {
            tracing::debug!(%error, "a report was not sent");
        }
    }

    fn sleep_for(&self, now: Instant, deadline: Instant) -> Duration {
        let mut until = deadline.min(now + LONGEST_SLEEP);
        if let Phase::Ready(links) = &self.phase
            && let Some(attempt) = links.next_attempt()
        {
            until = until.min(attempt);
        }
        until.saturating_duration_since(now)
    }

    fn slot(
        &self,
        peer: InstanceId,
        lane: LaneId,
        find: impl Fn(&Endpoint, InstanceId, LaneId) -> Option<Arc<dyn SlotMemory>>,
    ) -> Result<Arc<dyn SlotMemory>, NodeError> {
        let num_lanes = self.session.welcome().num_lanes;
        if lane.0 >= num_lanes {
            return Err(NodeError::NoSuchLane { lane, num_lanes });
        }
        match &self.phase {
            Phase::Ready(links) => links
                .endpoint_of(peer)
                .and_then(|endpoint| find(endpoint, peer, lane)),
            _ => None,
        }
        .ok_or(NodeError::NotLinked(peer))
    }
}

fn address_to_wire(address: &DataAddress) -> v1::DataAddress {
    v1::DataAddress {
        fabric: address.fabric.clone(),
        address: address.address.clone(),
    }
}
