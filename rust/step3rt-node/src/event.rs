//! What an instance's loop learns from a poll. Data only; order is decided in [`crate::node`].

use step3rt_core::ids::InstanceId;
use step3rt_core::step::StepPlan;
use step3rt_fabric::device_offer::DeviceOffer;
use step3rt_fabric::frame::FrameHeader;
use step3rt_fabric::link_epoch::LinkEpoch;

/// One piece of news.
#[derive(Clone, Debug, PartialEq)]
pub enum NodeEvent {
    /// A lane's next step.
    StepPlan(StepPlan),
    /// A checked frame lies in the receive slot of its lane, until the next push there.
    Arrival {
        /// Who sent it.
        peer: InstanceId,
        /// What it says.
        header: FrameHeader,
    },
    /// A link to an instance of the topology is usable.
    LinkUp {
        /// The instance.
        peer: InstanceId,
        /// Its position in its role.
        role_rank: u32,
        /// What carries the link.
        fabric: &'static str,
        /// Why this fabric and no other.
        reason: String,
        /// Which incarnation of the link this is; equal at both ends, and above those before.
        epoch: LinkEpoch,
        /// What the peer offers of its device's memory, of a `"cuda_ipc"` link alone.
        device_offer: Option<DeviceOffer>,
    },
    /// A link that was up is over; what was in flight on it will not arrive.
    LinkDown {
        /// The instance.
        peer: InstanceId,
        /// Why.
        reason: String,
    },
    /// The coordinator or a signal asks to finish. Comes once.
    Drain,
    /// The coordinator is gone: every sequence is void. Comes once, and last.
    SessionLost {
        /// Why.
        reason: String,
    },
}
