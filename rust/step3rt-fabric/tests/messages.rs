//! The words of errors: what happened, why it is not allowed, what to do.

use std::io;

use step3rt_core::ids::{Epoch, InstanceId, LaneId};
use step3rt_fabric::address::FabricKind;
use step3rt_fabric::contract::{DownReason, Geometry, LinkIdentity, PushError, Side};
use step3rt_fabric::endpoint::ConnectError;
use step3rt_fabric::frame::ProtocolError;
use step3rt_fabric::{HandshakeError, MapError, RdmaError, Refusal};

const INSTANCE: InstanceId = InstanceId(4);
const IDENTITY: LinkIdentity = LinkIdentity {
    instance: INSTANCE,
    epoch: Epoch(2),
};

#[test]
fn push_errors_say_when_a_push_is_possible() {
    let lane = LaneId(3);
    let texts = [
        (
            PushError::NoCredit(lane),
            "lane 3 has no credit: its last frame is not answered, or nothing arrived to answer. \
             Push after the next arrival on it",
        ),
        (
            PushError::NoSuchLane { lane, num_lanes: 2 },
            "lane 3 does not exist: the link has 2. Use one below 2",
        ),
        (
            PushError::TooLarge {
                payload_bytes: 65,
                slot_bytes: 64,
            },
            "payload of 65 bytes exceeds the slot of 64. Push fewer tokens or raise \
             `max_tokens_per_micro_batch`",
        ),
        (
            PushError::NotLinked(INSTANCE),
            "instance 4 is not linked. Connect it first",
        ),
        (
            PushError::Down(DownReason::PeerClosed),
            "link is down: peer closed the link",
        ),
    ];
    for (error, text) in texts {
        assert_eq!(error.to_string(), text);
    }
}

#[test]
fn reasons_of_an_end_name_the_value_that_was_wrong() {
    let late = ProtocolError::Epoch {
        found: Epoch(1),
        expected: Epoch(2),
    };
    let texts = [
        (
            DownReason::Protocol(late),
            "protocol violation by the peer: frame of epoch 1 on a link of epoch 2",
        ),
        (
            DownReason::Transport {
                during: "sending a frame",
                os_error: 110,
            },
            "transport failure while sending a frame: Connection timed out (os error 110)",
        ),
        (
            DownReason::Replaced(Epoch(3)),
            "replaced by a new link of epoch 3",
        ),
        (DownReason::Closed, "closed by this end"),
    ];
    for (reason, text) in texts {
        assert_eq!(reason.to_string(), text);
    }
}

#[test]
fn connect_errors_say_what_to_do() {
    let geometry = Geometry {
        num_lanes: 3,
        a2f_slot_bytes: 64,
        f2a_slot_bytes: 32,
    };
    let refused = |refusal| ConnectError::Refused {
        instance: INSTANCE,
        refusal,
    };
    let (instance, fabric) = (INSTANCE, FabricKind::Tcp);
    let texts = [
        (
            ConnectError::Unreachable {
                instance,
                fabric,
                address: "b:9".to_owned(),
                error: io::ErrorKind::TimedOut.into(),
            },
            "instance 4 cannot be reached over tcp at b:9: timed out. See that it runs and that \
             nothing between the hosts blocks the port",
        ),
        (
            ConnectError::Handshake {
                instance,
                fabric,
                error: HandshakeError::Magic(0x5050_4854),
            },
            "instance 4 answered over tcp, but not as a peer does: it starts with 0x50504854, \
             which is not this protocol. See that a step3rt instance of this release listens there",
        ),
        (
            ConnectError::Memory {
                instance,
                error: MapError::Size {
                    found: 1,
                    expected: 2,
                },
            },
            "instance 4 passed memory that cannot be used: shared memory has 1 bytes where 2 were \
             agreed. Run one release everywhere",
        ),
        (
            ConnectError::Overtaken { instance: INSTANCE },
            "instance 4 was dialled more than once at a time, and its present link is a later one, \
             which the peer uses too. Use that link",
        ),
        (
            ConnectError::Stale(IDENTITY),
            "instance 4 was linked with an epoch later than 2 before. The address is out of date; \
             wait for the next topology",
        ),
        (
            refused(Refusal::SameSide(Side::Initiator)),
            "instance 4 refused the link: both ends are Initiators. A link has one of each",
        ),
        (
            refused(Refusal::Geometry {
                theirs: geometry,
                ours: geometry,
            }),
            "instance 4 refused the link: its slots are 3 lanes of 64 bytes (A2F) and 32 bytes \
             (F2A), ours 3 lanes of 64 bytes (A2F) and 32 bytes (F2A). Both ends must have the \
             same settings",
        ),
    ];
    for (error, text) in texts {
        assert_eq!(error.to_string(), text);
    }
}

#[test]
fn errors_of_rdma_say_what_to_do() {
    let instance = INSTANCE;
    let texts = [
        (
            ConnectError::Rdma {
                instance,
                error: RdmaError::Memlock {
                    len_bytes: 4096,
                    error: io::Error::from_raw_os_error(12),
                },
            },
            "instance 4 cannot be linked over rdma: slots of 4096 bytes cannot be registered: Cannot \
             allocate memory (os error 12). Set LimitMEMLOCK=infinity in the unit, or `ulimit -l \
             unlimited`",
        ),
        (
            ConnectError::Rdma {
                instance,
                error: RdmaError::NoPath {
                    path: "mlx5_0 port 1, GID 3 10.0.0.1".to_owned(),
                    why: "waiting for the peer's device to acknowledge",
                },
            },
            "instance 4 cannot be linked over rdma: no packet came through by mlx5_0 port 1, GID 3 \
             10.0.0.1: waiting for the peer's device to acknowledge. See that both ends' RDMA ports \
             are on one network; `data_host` chooses the port",
        ),
    ];
    for (error, text) in texts {
        assert_eq!(error.to_string(), text);
    }
}
