//! Why a peer could not be linked, in types and in words.

use std::io;

use step3rt_core::ids::InstanceId;
use thiserror::Error;

use crate::address::FabricKind;
use crate::choice::DeviceError;
use crate::contract::LinkIdentity;
use crate::link_epoch::MAX_LINK_EPOCH;
use crate::memory::MapError;
use crate::rdma_status::RdmaError;
use crate::refusal::{HandshakeError, Refusal};
use crate::tls::Fault;

/// Why a peer could not be linked. Nothing of the attempt is left.
#[derive(Debug, Error)]
pub enum ConnectError {
    /// Only the initiator connects, so that two ends never connect to each other at once.
    #[error(
        "a responder does not connect: its peers connect to it. Call this on the attention instance"
    )]
    WrongSide,
    /// All places for links are taken.
    #[error("this endpoint has no room for instance {instance}. Raise `max_peers`={max_peers}")]
    Full {
        /// Whom it was to link.
        instance: InstanceId,
        /// The setting.
        max_peers: usize,
    },
    /// A later incarnation of that instance was linked before.
    #[error(
        "instance {} was linked with an epoch later than {} before. The address is out of date; wait for the \
         next topology", .0.instance, .0.epoch
    )]
    Stale(LinkIdentity),
    /// Of two that were dialled, the later one was linked first.
    #[error(
        "instance {instance} was dialled more than once at a time, and its present link is a later \
         one, which the peer uses too. Use that link"
    )]
    Overtaken {
        /// Whom it was to link.
        instance: InstanceId,
    },
    /// The fabric that the setting asks for is not among the peer's addresses.
    #[error(
        "instance {instance} does not listen on {fabric}. Set `fabric` to \"auto\" or have it listen"
    )]
    NotOffered {
        /// Whom it was to link.
        instance: InstanceId,
        /// What was asked for.
        fabric: FabricKind,
    },
    /// Nobody answers there.
    #[error(
        "instance {instance} cannot be reached over {fabric} at {address}: {error}. See that it \
         runs and that nothing between the hosts blocks the port"
    )]
    Unreachable {
        /// Whom it was to link.
        instance: InstanceId,
        /// Tried last.
        fabric: FabricKind,
        /// Tried last.
        address: String,
        /// Of the operating system.
        error: io::Error,
    },
    /// Something answered that makes no sense.
    #[error(
        "instance {instance} answered over {fabric}, but not as a peer does: {error}. See that a \
         step3rt instance of this release listens there"
    )]
    Handshake {
        /// Whom it was to link.
        instance: InstanceId,
        /// Tried last.
        fabric: FabricKind,
        /// What is wrong.
        error: HandshakeError,
    },
    /// The connection failed after it was made.
    #[error(
        "instance {instance} did not finish the handshake over {fabric}: {error}. See its log, then \
         connect again"
    )]
    Interrupted {
        /// Whom it was to link.
        instance: InstanceId,
        /// Tried last.
        fabric: FabricKind,
        /// Of the operating system.
        error: io::Error,
    },
    /// The peer said no.
    #[error("instance {instance} refused the link: {refusal}")]
    Refused {
        /// Whom it was to link.
        instance: InstanceId,
        /// Why.
        refusal: Refusal,
    },
    /// The ends do not trust each other, or only one of them speaks TLS.
    #[error("instance {instance} is not linked over {fabric}: {fault}")]
    Tls {
        /// Whom it was to link.
        instance: InstanceId,
        /// Tried last.
        fabric: FabricKind,
        /// What is wrong, and what to do.
        fault: Fault,
    },
    /// The peer's memory is not what was agreed.
    #[error(
        "instance {instance} passed memory that cannot be used: {error}. Run one release everywhere"
    )]
    Memory {
        /// Whom it was to link.
        instance: InstanceId,
        /// What is wrong.
        error: MapError,
    },
    /// No link over RDMA came about.
    #[error("instance {instance} cannot be linked over rdma: {error}")]
    Rdma {
        /// Whom it was to link.
        instance: InstanceId,
        /// What is missing, and the fix.
        error: RdmaError,
    },
    /// No link through device memory is possible.
    #[error("instance {instance} cannot be linked by cuda_ipc: {error}")]
    Device {
        /// Whom it was to link.
        instance: InstanceId,
        /// What is missing, and the fix.
        error: DeviceError,
    },
    /// This process has no number left for a link.
    #[error(
        "this end has no number left for the link to instance {instance}: links are told apart by {MAX_LINK_EPOCH} \
         numbers, which are used up. Start all instances anew"
    )]
    NoEpoch {
        /// Whom it was to link.
        instance: InstanceId,
    },
    /// This end could not make the slots or threads of the link.
    #[error(
        "this end cannot make the link to instance {instance}: {error}. Raise its limit of memory, \
         descriptors or threads, or make the slots smaller with `max_tokens_per_micro_batch`"
    )]
    Resources {
        /// Whom it was to link.
        instance: InstanceId,
        /// Of the operating system.
        error: io::Error,
    },
}

impl ConnectError {
    /// Whether another fabric may do what this one could not.
    pub(crate) fn is_out_of_reach(&self) -> bool {
        matches!(
            self,
            Self::Unreachable { .. }
                | Self::Rdma { .. }
                | Self::Refused {
                    refusal: Refusal::NoRdma | Refusal::NoDeviceOffer,
                    ..
                }
        )
    }
}
