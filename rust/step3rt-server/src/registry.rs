//! Who is in the cluster, in which role, with which lease, and whether that is enough to serve.
//!
//! A pure state machine: events and a time go in, [`Action`]s come out. It never opens a socket,
//! reads a clock or schedules a step.
//!
//! ```text
//!   hello ──▶ Loading ──ready──▶ Ready ──links_ready──▶ (attention) Linked ──▶ gets steps
//!     any state ── stream ends, lease runs out, peers report it dead ──▶ gone; comes back with a
//!                                                          new hello, instance id and epoch
//! ```

use std::collections::BTreeMap;

use step3rt_core::ids::{Epoch, InstanceId, TimeNs};
use step3rt_proto::v1;

pub use self::admission::{Admission, HelloError};

mod admission;
#[cfg(test)]
mod histories;
mod overdue;
mod report;
#[cfg(test)]
mod tests;

/// What the registry is told once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegistryConfig {
    /// FFN instances that together hold all experts.
    pub ep_size: u32,
    /// Attention instances needed before the service is SERVING.
    pub num_attention: u32,
    /// Silence after which an instance is lost.
    pub lease_ms: u64,
    /// How long an instance's loop may stand still while its heartbeats go on.
    pub max_standstill_ms: u64,
    /// How long an attention instance that takes steps may be without links to a complete set of
    /// experts: its steps wait for them.
    pub max_unlinked_ms: u64,
    /// The vocabulary that requests are checked against.
    pub vocab_size: u32,
    /// The context that requests are checked against.
    pub max_model_len: u32,
    /// Epochs count up from here. Later than any epoch of an earlier coordinator, so that an
    /// instance that outlived it cannot be mistaken.
    pub first_epoch: u64,
}

/// What must be done because something changed, in order.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Send the topology to every instance.
    AnnounceTopology(v1::Topology),
    /// The scheduler may use the instance.
    AttentionReady {
        /// The instance.
        instance: InstanceId,
        /// Its incarnation.
        epoch: Epoch,
        /// The size of its KV pool.
        num_kv_blocks: u32,
    },
    /// The scheduler must not use the instance any more.
    AttentionLost(InstanceId),
    /// Whether the FFN instances that are ready hold every expert.
    ExpertsComplete(bool),
    /// End the session, telling the instance why.
    CloseSession {
        /// The instance.
        instance: InstanceId,
        /// For its log.
        reason: String,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Attention,
    Ffn,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum State {
    Loading,
    Ready,
    Draining,
}

#[derive(Debug)]
struct Instance {
    role: Role,
    role_rank: u32,
    epoch: Epoch,
    hello: v1::Hello,
    state: State,
    status: String,
    addresses: Vec<v1::DataAddress>,
    num_kv_blocks: u32,
    links: Vec<v1::LinkInfo>,
    /// The newest topology it has linked to.
    linked_version: u64,
    /// Whether the scheduler knows it.
    is_schedulable: bool,
    /// Since when its steps have been waiting for links that it could make.
    unlinked_since: Option<TimeNs>,
    lease_end: TimeNs,
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Registry {
    config: RegistryConfig,
    instances: BTreeMap<InstanceId, Instance>,
    next_instance: u32,
    next_epoch: u64,
    topology_version: u64,
    /// The version at which the set of FFN instances last changed: links made for an older one
    /// do not reach every expert.
    experts_version: u64,
    are_experts_complete: bool,
    is_draining: bool,
}

impl Registry {
    /// An empty cluster.
    pub fn new(config: RegistryConfig) -> Self {
        Self {
            next_epoch: config.first_epoch,
            config,
            instances: BTreeMap::new(),
            next_instance: 1,
            topology_version: 0,
            experts_version: 0,
            are_experts_complete: false,
            is_draining: false,
        }
    }

    /// Token ids of the model that is served are below it.
    pub fn vocab_size(&self) -> u32 {
        self.config.vocab_size
    }

    /// Any message of the instance renews its lease.
    pub fn renew(&mut self, now: TimeNs, instance: InstanceId) {
        if let Some(entry) = self.instances.get_mut(&instance) {
            entry.lease_end = now.plus_ms(self.config.lease_ms);
        }
    }

    /// A heartbeat: a word for people, and how long the instance's loop has stood still.
    pub fn heartbeat(&mut self, instance: InstanceId, heartbeat: v1::Heartbeat) -> Vec<Action> {
        let max_standstill_ms = self.config.max_standstill_ms;
        let Some(entry) = self.instances.get_mut(&instance) else {
            return Vec::new();
        };
        entry.status = heartbeat.status;
        let age_ms = heartbeat.last_progress_age_ms;
        if entry.state != State::Loading && age_ms > max_standstill_ms {
            let reason = format!(
                "its loop has stood still for {age_ms} ms, more than step_timeout_ms = \
                 {max_standstill_ms}"
            );
            return self.close(instance, &reason);
        }
        Vec::new()
    }

    /// The instance has its weights and its data listener.
    pub fn ready(&mut self, instance: InstanceId, ready: v1::Ready) -> Vec<Action> {
        let Some(entry) = self.instances.get_mut(&instance) else {
            return Vec::new();
        };
        if entry.state != State::Loading {
            return self.close(instance, "it reported ready twice in one session");
        }
        if entry.role == Role::Attention && ready.num_kv_blocks == 0 {
            return self.close(instance, "it has no KV block. Give it more KV memory");
        }
        entry.state = State::Ready;
        entry.addresses = ready.addresses;
        entry.num_kv_blocks = ready.num_kv_blocks;
        let is_ffn = entry.role == Role::Ffn;
        let mut actions = self.topology_changed(is_ffn);
        // Links may have been made while weights were loaded.
        actions.extend(self.schedulable_actions());
        actions
    }

    /// The attention instance is linked to every peer of a topology.
    pub fn links_ready(&mut self, instance: InstanceId, links: v1::LinksReady) -> Vec<Action> {
        let Some(entry) = self.instances.get_mut(&instance) else {
            return Vec::new();
        };
        if entry.role != Role::Attention {
            return self.close(instance, "it reported links, and FFN instances make none");
        }
        if links.topology_version > self.topology_version {
            return self.close(
                instance,
                "it reported links of a topology that does not exist",
            );
        }
        entry.linked_version = entry.linked_version.max(links.topology_version);
        entry.links = links.links;
        self.schedulable_actions()
    }

    /// `reporter` saw `peer` die on the data plane.
    pub fn peer_lost(&mut self, reporter: InstanceId, lost: &v1::PeerLost) -> Vec<Action> {
        let peer = InstanceId(lost.instance_id);
        let is_current = self
            .instances
            .get(&peer)
            .is_some_and(|entry| entry.epoch == Epoch(lost.epoch));
        if !is_current || !self.instances.contains_key(&reporter) {
            return Vec::new();
        }
        // Both views must agree: the peer comes back with a new session, or not at all.
        let reason = format!(
            "instance {reporter} lost its data link to it: {}",
            lost.reason
        );
        self.close(peer, &reason)
    }

    /// The instance got a stop signal: nothing new is placed on it.
    pub fn leaving(&mut self, instance: InstanceId) -> Vec<Action> {
        let Some(entry) = self.instances.get_mut(&instance) else {
            return Vec::new();
        };
        if entry.state == State::Loading {
            // It holds nothing yet, and must not count as one that does.
            return self.close(instance, "it leaves before it is ready");
        }
        entry.state = State::Draining;
        if std::mem::take(&mut entry.is_schedulable) {
            return vec![Action::AttentionLost(instance)];
        }
        Vec::new()
    }

    /// The instance's session is over.
    pub fn session_ended(&mut self, instance: InstanceId) -> Vec<Action> {
        let Some(entry) = self.instances.remove(&instance) else {
            return Vec::new();
        };
        let mut actions = Vec::new();
        if entry.is_schedulable {
            actions.push(Action::AttentionLost(instance));
        }
        if entry.state != State::Loading {
            actions.extend(self.topology_changed(entry.role == Role::Ffn));
        }
        actions
    }

    /// Ends the instance's session from this side.
    pub fn close(&mut self, instance: InstanceId, reason: &str) -> Vec<Action> {
        if !self.instances.contains_key(&instance) {
            return Vec::new();
        }
        let mut actions = vec![Action::CloseSession {
            instance,
            reason: reason.to_owned(),
        }];
        actions.extend(self.session_ended(instance));
        actions
    }

    /// Admits nobody any more.
    pub fn drain(&mut self) {
        self.is_draining = true;
    }

    /// What the instances at hand agree on; empty when there is none.
    pub fn model_fingerprint(&self) -> String {
        self.instances
            .values()
            .next()
            .map_or_else(String::new, |entry| entry.hello.model_fingerprint.clone())
    }

    fn topology_changed(&mut self, are_experts_concerned: bool) -> Vec<Action> {
        self.topology_version += 1;
        let mut actions = Vec::new();
        if are_experts_concerned {
            self.experts_version = self.topology_version;
            let num_ready = self
                .instances
                .values()
                .filter(|entry| entry.role == Role::Ffn && entry.state != State::Loading)
                .count();
            let are_complete = num_ready == self.config.ep_size as usize;
            if are_complete != self.are_experts_complete {
                self.are_experts_complete = are_complete;
                actions.push(Action::ExpertsComplete(are_complete));
            }
        }
        actions.push(Action::AnnounceTopology(self.topology()));
        actions
    }

    fn schedulable_actions(&mut self) -> Vec<Action> {
        let experts_version = self.experts_version;
        if !self.are_experts_complete {
            return Vec::new();
        }
        self.instances
            .iter_mut()
            .filter(|(_, entry)| {
                entry.role == Role::Attention
                    && entry.state == State::Ready
                    && !entry.is_schedulable
                    && entry.linked_version >= experts_version
            })
            .map(|(instance, entry)| {
                entry.is_schedulable = true;
                Action::AttentionReady {
                    instance: *instance,
                    epoch: entry.epoch,
                    num_kv_blocks: entry.num_kv_blocks,
                }
            })
            .collect()
    }

    /// All instances that are ready.
    pub fn topology(&self) -> v1::Topology {
        let peers = self
            .instances
            .iter()
            .filter(|(_, entry)| entry.state != State::Loading)
            .map(|(instance, entry)| v1::Peer {
                instance_id: instance.0,
                role: entry.hello.role,
                role_rank: entry.role_rank,
                epoch: entry.epoch.0,
                boot_id: entry.hello.boot_id.clone(),
                addresses: entry.addresses.clone(),
            })
            .collect();
        v1::Topology {
            version: self.topology_version,
            peers,
        }
    }

    /// Whether the attention instance reaches every expert now. Steps planned while it does not
    /// wait for its links.
    pub fn is_linked(&self, instance: InstanceId) -> bool {
        self.are_experts_complete
            && self
                .instances
                .get(&instance)
                .is_some_and(|entry| entry.linked_version >= self.experts_version)
    }

    /// Whether requests can be served.
    pub fn is_serving(&self) -> bool {
        !self.is_draining
            && self.are_experts_complete
            && self.num_linked() >= self.config.num_attention as usize
    }

    fn num_linked(&self) -> usize {
        self.instances
            .iter()
            .filter(|(instance, entry)| entry.is_schedulable && self.is_linked(**instance))
            .count()
    }
}
