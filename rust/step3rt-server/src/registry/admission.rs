//! Who may join: the same protocol, the same model, and a free rank.
//!
//! It never looks at an instance that has joined, beyond what a newcomer must share with it.

use step3rt_core::ids::{Epoch, InstanceId, TimeNs};
use step3rt_proto::PROTOCOL_VERSION;
use step3rt_proto::v1;
use thiserror::Error;

use super::{Instance, Registry, Role, State};

/// A welcome.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Admission {
    /// The instance's number.
    pub instance: InstanceId,
    /// Its incarnation.
    pub epoch: Epoch,
    /// Its position in its role.
    pub role_rank: u32,
}

/// Why an instance may not join.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum HelloError {
    /// Other versions of step3rt.
    #[error(
        "the instance speaks protocol version {found} and the coordinator {PROTOCOL_VERSION}. \
         Install the same step3rt version on both"
    )]
    ProtocolVersion {
        /// The instance's.
        found: u32,
    },
    /// No role, or one of a later version.
    #[error("the instance names no role that exists. Start it as `attention` or `ffn`")]
    UnknownRole,
    /// No description of the model.
    #[error("the instance does not describe its model. Install the same step3rt version on both")]
    NoModel,
    /// Instances of one cluster must agree on the model.
    #[error(
        "the instance has model {found:?} (fingerprint {found_fingerprint}) and the cluster \
         {expected:?} ({expected_fingerprint}). Give every instance the same checkpoint"
    )]
    OtherModel {
        /// The instance's model.
        found: String,
        /// Its fingerprint.
        found_fingerprint: String,
        /// The cluster's model.
        expected: String,
        /// Its fingerprint.
        expected_fingerprint: String,
    },
    /// The coordinator checks requests against its own copy of config.json.
    #[error(
        "the instance's model has {key} = {found} and the coordinator's {expected}. Give both the \
         same checkpoint"
    )]
    OtherLimits {
        /// Which.
        key: &'static str,
        /// The instance's.
        found: u32,
        /// The coordinator's.
        expected: u32,
    },
    /// Every expert has its place.
    #[error(
        "all {ep_size} FFN ranks are taken. Stop one of the FFN instances, or start the \
         coordinator with a larger `--ffn`"
    )]
    NoFreeRank {
        /// How many there are.
        ep_size: u32,
    },
    /// The coordinator stops.
    #[error("the coordinator is draining and admits nobody. Try again when it is back")]
    Draining,
}

impl Registry {
    /// An instance asks to join.
    pub fn hello(&mut self, now: TimeNs, hello: v1::Hello) -> Result<Admission, HelloError> {
        let role = self.check_hello(&hello)?;
        let role_rank = match role {
            Role::Ffn => {
                self.free_rank(Role::Ffn, self.config.ep_size)
                    .ok_or(HelloError::NoFreeRank {
                        ep_size: self.config.ep_size,
                    })?
            }
            Role::Attention => self
                .free_rank(Role::Attention, u32::MAX)
                .ok_or(HelloError::Draining)?,
        };
        let instance = InstanceId(self.next_instance);
        let epoch = Epoch(self.next_epoch);
        self.next_instance += 1;
        self.next_epoch += 1;
        self.instances.insert(
            instance,
            Instance {
                role,
                role_rank,
                epoch,
                hello,
                state: State::Loading,
                status: String::new(),
                addresses: Vec::new(),
                num_kv_blocks: 0,
                links: Vec::new(),
                linked_version: 0,
                is_schedulable: false,
                unlinked_since: None,
                lease_end: now.plus_ms(self.config.lease_ms),
            },
        );
        Ok(Admission {
            instance,
            epoch,
            role_rank,
        })
    }

    fn check_hello(&self, hello: &v1::Hello) -> Result<Role, HelloError> {
        if self.is_draining {
            return Err(HelloError::Draining);
        }
        if hello.protocol_version != PROTOCOL_VERSION {
            return Err(HelloError::ProtocolVersion {
                found: hello.protocol_version,
            });
        }
        let role = match hello.role() {
            v1::Role::Attention => Role::Attention,
            v1::Role::Ffn => Role::Ffn,
            v1::Role::Unspecified => return Err(HelloError::UnknownRole),
        };
        let model = hello.model.as_ref().ok_or(HelloError::NoModel)?;
        if model.vocab_size != self.config.vocab_size {
            return Err(HelloError::OtherLimits {
                key: "vocab_size",
                found: model.vocab_size,
                expected: self.config.vocab_size,
            });
        }
        if model.max_model_len < self.config.max_model_len {
            return Err(HelloError::OtherLimits {
                key: "max_model_len",
                found: model.max_model_len,
                expected: self.config.max_model_len,
            });
        }
        // Those who are here already decide; the last to leave frees the choice.
        if let Some(other) = self.instances.values().next() {
            let name = |hello: &v1::Hello| hello.model.as_ref().map(|model| model.name.clone());
            // The name is that of a directory, which each host chooses.
            let sizes = |hello: &v1::Hello| {
                let model = hello.model.clone();
                model.map(|model| v1::ModelSummary {
                    name: String::new(),
                    ..model
                })
            };
            if other.hello.model_fingerprint != hello.model_fingerprint
                || sizes(&other.hello) != sizes(hello)
            {
                return Err(HelloError::OtherModel {
                    found: name(hello).unwrap_or_default(),
                    found_fingerprint: hello.model_fingerprint.clone(),
                    expected: name(&other.hello).unwrap_or_default(),
                    expected_fingerprint: other.hello.model_fingerprint.clone(),
                });
            }
        }
        Ok(role)
    }

    /// The lowest rank below `end` that no instance of `role` has.
    fn free_rank(&self, role: Role, end: u32) -> Option<u32> {
        (0..end).find(|rank| {
            !self
                .instances
                .values()
                .any(|instance| instance.role == role && instance.role_rank == *rank)
        })
    }
}
