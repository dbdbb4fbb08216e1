//! Why an instance cannot go on, or a call was refused. The binding reads [`NodeErrorKind`],
//! people read the text; this module never decides what happens next.

use std::time::Duration;

use step3rt_core::ids::{InstanceId, LaneId};
use step3rt_fabric::contract::PushError;
use step3rt_fabric::device_offer::DeviceOfferTooLong;
use step3rt_fabric::endpoint::BindError;
use step3rt_tls::{Fault, SetupError};
use thiserror::Error;

/// The closed list of reasons; each is one exception class in Python.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum NodeErrorKind {
    /// A setting is not usable: retrying is pointless until somebody changes it.
    Config,
    /// The caller asked for something that the contract does not allow.
    InvalidArgument,
    /// A peer or the coordinator is not there; a later attempt may succeed.
    Unavailable,
    /// A signal asked to stop first.
    Cancelled,
    /// The operating system failed.
    Internal,
}

/// An error of this crate.
#[derive(Debug, Error)]
pub enum NodeError {
    /// The options are not valid JSON of the expected form.
    #[error(
        "node options are not usable: {0}. They must be one JSON object as `step3rt node` writes it"
    )]
    Options(#[from] serde_json::Error),
    /// The coordinator's address has no usable form.
    #[error(
        "coordinator address is not usable: `{0}`. Only `host:port` and `unix:/absolute/path` are \
         understood. Set `coordinator` to the control address that `step3rt serve` prints"
    )]
    CoordinatorAddress(String),
    /// The address of the data listener is none of this host.
    #[error(
        "data_host is not usable: `{data_host}` ({why}). Peers connect to exactly this address. Set \
         `data_host` to an IP address of this host that they can reach"
    )]
    DataHost {
        /// As configured.
        data_host: String,
        /// What is wrong with it.
        why: String,
    },
    /// No listener can be had on the address for peers, which may not be this host's yet.
    #[error(
        "data_host = {data_host} cannot be bound: {why}. Peers connect to exactly this address. Wait \
         until its interface is up, or set `data_host` to another address of this host"
    )]
    DataHostUnbound {
        /// As configured.
        data_host: String,
        /// What is wrong with it.
        why: String,
    },
    /// A duration in the options is negative, not finite or too long to mean anything.
    #[error(
        "{field} is not usable: {value} s. It must be a number between 0 and {max_s}. Set `{field}` \
         within that range"
    )]
    DurationOutOfRange {
        /// The option.
        field: &'static str,
        /// As configured.
        value: f64,
        /// The limit.
        max_s: f64,
    },
    /// Certificate, key or CA cannot be used.
    #[error(transparent)]
    Tls(#[from] SetupError),
    /// This instance and the coordinator do not trust each other, or only one of them speaks TLS.
    #[error("the coordinator at {coordinator} and this instance cannot talk: {fault}")]
    Untrusted {
        /// Its address.
        coordinator: String,
        /// What is wrong, seen from here, and what to do.
        fault: Fault,
    },
    /// The coordinator does not want this instance.
    #[error("the coordinator at {coordinator} refused this instance: {message}")]
    Refused {
        /// Its address.
        coordinator: String,
        /// Its words.
        message: String,
    },
    /// The coordinator speaks, but not as this build expects.
    #[error(
        "the coordinator at {coordinator} broke the protocol: {found}. Instances and coordinator \
         must run the same release. Install the same version of step3rt on both"
    )]
    Protocol {
        /// Its address.
        coordinator: String,
        /// What came.
        found: String,
    },
    /// Nobody answered in time, or nobody had room.
    #[error(
        "no session with a coordinator at {coordinator} within {:.1} s (last attempt: {last}). An \
         instance cannot work without one. Start `step3rt serve`, correct `coordinator`, or do what \
         the last attempt says",
        waited.as_secs_f64()
    )]
    Unreachable {
        /// Where.
        coordinator: String,
        /// How long it was tried.
        waited: Duration,
        /// How the last attempt failed.
        last: String,
    },
    /// A signal came before the coordinator answered.
    #[error(
        "a signal asked to stop before the coordinator at {0} answered. Start the instance again to \
         join"
    )]
    Interrupted(String),
    /// A signal came while an instance that had served before loaded again.
    #[error("a signal asked to stop while this instance loaded. Start the instance again to join")]
    InterruptedLoading,
    /// The session ended; what was asked needs one.
    #[error("the session with the coordinator is over: {0}. Open a new session")]
    SessionOver(String),
    /// The endpoint could not be made.
    #[error("cannot make the links of this instance: {0}")]
    Bind(BindError),
    /// The device offer is too long.
    #[error(transparent)]
    DeviceOffer(#[from] DeviceOfferTooLong),
    /// A verb was used before the one that it needs, or twice.
    #[error("`{verb}` is not allowed now: {why}. Call bind, ready, poll and close in this order")]
    OutOfOrder {
        /// What was called.
        verb: &'static str,
        /// The rule.
        why: &'static str,
    },
    /// There is no such link.
    #[error(
        "instance {0} is not linked: no link_up event named it, or its link_down came since. Use \
         the peers of link_up events only"
    )]
    NotLinked(InstanceId),
    /// There is no such lane.
    #[error("lane {lane} does not exist: the cluster has {num_lanes}. Use lanes below that")]
    NoSuchLane {
        /// What was asked.
        lane: LaneId,
        /// What there is.
        num_lanes: u8,
    },
    /// The fabric refused a push.
    #[error("push to instance {peer} refused: {source}")]
    Push {
        /// To whom.
        peer: InstanceId,
        /// Why.
        source: PushError,
    },
    /// The operating system refused something that always works on a healthy host.
    #[error("cannot {action}: {source}. Check the limits of this process")]
    System {
        /// What was tried.
        action: &'static str,
        /// Its words.
        source: std::io::Error,
    },
}

impl NodeError {
    /// Which exception this is.
    pub fn kind(&self) -> NodeErrorKind {
        match self {
            Self::Options(_)
            | Self::CoordinatorAddress(_)
            | Self::DataHost { .. }
            | Self::DurationOutOfRange { .. }
            | Self::Tls(_)
            | Self::Untrusted { .. }
            | Self::Refused { .. }
            | Self::Protocol { .. }
            | Self::Bind(_) => NodeErrorKind::Config,
            Self::OutOfOrder { .. } | Self::NoSuchLane { .. } | Self::DeviceOffer(_) => {
                NodeErrorKind::InvalidArgument
            }
            Self::Push { source, .. } => match source {
                PushError::Down(_) | PushError::NotLinked(_) => NodeErrorKind::Unavailable,
                PushError::NoCredit(_)
                | PushError::NoSuchLane { .. }
                | PushError::TooLarge { .. } => NodeErrorKind::InvalidArgument,
            },
            Self::Unreachable { .. } | Self::SessionOver(_) | Self::NotLinked(_) => {
                NodeErrorKind::Unavailable
            }
            Self::Interrupted(_) | Self::InterruptedLoading => NodeErrorKind::Cancelled,
            // Not of the configuration alone, so whoever starts instances tries again.
            Self::DataHostUnbound { .. } | Self::System { .. } => NodeErrorKind::Internal,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fmt::Write as _;
    use std::io;

    use step3rt_fabric::contract::{DownReason, GeometryError};

    use super::*;

    fn one_of_each() -> Vec<NodeError> {
        let push = |source| NodeError::Push {
            peer: InstanceId(3),
            source,
        };
        vec![
            NodeError::Options(serde_json::from_str::<u32>("{").expect_err("no number")),
            NodeError::CoordinatorAddress("nowhere".to_owned()),
            NodeError::DataHost {
                data_host: "localhost".to_owned(),
                why: "invalid IP address syntax".to_owned(),
            },
            NodeError::DataHostUnbound {
                data_host: "10.0.0.7".to_owned(),
                why: "Cannot assign requested address".to_owned(),
            },
            NodeError::DurationOutOfRange {
                field: "connect_timeout_s",
                value: -1.0,
                max_s: 86_400.0,
            },
            NodeError::Tls(SetupError::Incomplete { missing: "tls_ca" }),
            NodeError::Untrusted {
                coordinator: "10.0.0.1:50052".to_owned(),
                fault: Fault::PeerOfAnotherCa,
            },
            NodeError::Refused {
                coordinator: "10.0.0.1:50052".to_owned(),
                message: "the cluster runs another model. Use its checkpoint".to_owned(),
            },
            NodeError::Protocol {
                coordinator: "10.0.0.1:50052".to_owned(),
                found: "the first response is not Welcome".to_owned(),
            },
            NodeError::Unreachable {
                coordinator: "10.0.0.1:50052".to_owned(),
                waited: Duration::from_millis(60_040),
                last: "connection refused".to_owned(),
            },
            NodeError::Interrupted("10.0.0.1:50052".to_owned()),
            NodeError::InterruptedLoading,
            NodeError::SessionOver("the coordinator ended it".to_owned()),
            NodeError::Bind(BindError::Geometry(GeometryError::SlotBytes(0))),
            NodeError::DeviceOffer(DeviceOfferTooLong(4097)),
            NodeError::OutOfOrder {
                verb: "ready",
                why: "it comes once, after bind",
            },
            NodeError::NotLinked(InstanceId(3)),
            NodeError::NoSuchLane {
                lane: LaneId(2),
                num_lanes: 2,
            },
            push(PushError::NoCredit(LaneId(1))),
            push(PushError::TooLarge {
                payload_bytes: 65,
                slot_bytes: 64,
            }),
            push(PushError::Down(DownReason::PeerClosed)),
            NodeError::System {
                action: "start the session thread",
                source: io::Error::from(io::ErrorKind::OutOfMemory),
            },
        ]
    }

    #[test]
    fn every_error_says_what_happened_why_and_what_to_do() {
        let mut text = String::new();
        for error in one_of_each() {
            writeln!(text, "{:?}: {error}", error.kind()).expect("a String takes everything");
        }
        insta::assert_snapshot!(text);
    }
}
