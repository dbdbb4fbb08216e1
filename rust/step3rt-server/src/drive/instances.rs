//! The drive loop's instance side: sessions, steps that come back, and what the registry decides.
//!
//! It never plans.

use step3rt_core::ids::{InstanceId, TimeNs};
use step3rt_core::scheduler::Event;
use step3rt_proto::step::{key_from_wire, output_from_wire};
use step3rt_proto::v1;
use step3rt_proto::v1::session_request::Event as SessionEvent;
use step3rt_proto::v1::session_response::Command;
use tonic::Status;
use tracing::{debug, info, warn};

use super::Drive;
use crate::drive_handle::Admitted;
use crate::instance_list::role_name;
use crate::registry::{Action, HelloError};
use crate::sessions::{CommandSender, NotTaken};

impl Drive {
    pub(super) fn hello(
        &mut self,
        now: TimeNs,
        hello: v1::Hello,
        commands: CommandSender,
    ) -> Result<Admitted, HelloError> {
        let role = hello.role();
        let admission = self.registry.hello(now, hello)?;
        let instance = admission.instance;
        info!(%instance, role = role_name(role), role_rank = admission.role_rank, "instance joins");
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

    pub(super) fn session_event(&mut self, now: TimeNs, instance: InstanceId, event: SessionEvent) {
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
            let is_sampled = |output: &&v1::SequenceOutput| output.token_id.is_some();
            let num_tokens = output.outputs.iter().filter(is_sampled).count();
            debug!(
                instance = instance.0,
                lane = output.lane,
                step = output.step,
                num_tokens,
                at_ns = now.0,
                compute_ns = timing.compute_ns,
                wait_ns = timing.wait_ns,
                total_ns = timing.total_ns,
                "step done"
            );
        }
        match output_from_wire(instance, output, self.registry.vocab_size()) {
            Ok(output) => {
                self.sessions.step_answered(now, output.key);
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
                self.sessions.step_answered(now, key);
                let reason = failed.reason;
                self.scheduler
                    .handle(now, Event::StepFailed { key, reason });
                Vec::new()
            }
            Err(error) => self.registry.close(instance, &error.to_string()),
        }
    }

    pub(super) fn carry_out(&mut self, now: TimeNs, actions: Vec<Action>) {
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
    pub(super) fn not_taken(&mut self, now: TimeNs, NotTaken(instance): NotTaken) {
        let actions = self
            .registry
            .close(instance, "it does not take its commands");
        self.carry_out(now, actions);
    }

    pub(crate) fn list_instances(&self) -> v1::ListInstancesResponse {
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
