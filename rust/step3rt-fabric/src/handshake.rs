//! How two endpoints introduce themselves before a link exists, and why one refuses the other.
//!
//! One message each way, of one fixed size, so that nothing is allocated on a stranger's word. The
//! same bytes travel over Unix sockets (with file descriptors beside them) and TCP.
//!
//! ```text
//!  0     4   6    7    8        12    16    24       32       40              44   48           56   60   64
//!  │magic│ver│kind│side│instance│lanes│epoch│a2f slot│f2a slot│other instance │code│ other epoch│ by │ crc│
//! ```
//! "Other" is whom a hello wants to reach, and the epoch that a refusal holds against it. Where a
//! "by" stands as 0, the link goes over the socket that the hello came by; 1 is RDMA, and then an
//! offer of queue pairs follows the hello and the welcome.

use step3rt_core::ids::{Epoch, InstanceId};

use crate::address::ChoiceReason;
use crate::contract::{Geometry, LinkIdentity, Side};
use crate::refusal::HandshakeError;

/// Size of every message.
pub(crate) const MESSAGE_BYTES: usize = 64;

const MAGIC: u32 = u32::from_le_bytes(*b"S3HS");
/// Version of the handshake, and by it of the frames that follow.
pub(crate) const VERSION: u16 = 1;
const CRC_AT: usize = MESSAGE_BYTES - 4;

/// What an endpoint says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Introduction {
    pub(crate) identity: LinkIdentity,
    pub(crate) side: Side,
    pub(crate) geometry: Geometry,
}

/// What a message means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// From the connecting end: whom it wants, and why by this fabric.
    Hello {
        wanted: LinkIdentity,
        choice: ChoiceReason,
        is_for_rdma: bool,
    },
    /// The link exists.
    Welcome,
    /// It does not.
    Refusal(RefusalCode),
}

/// The part of a [`crate::Refusal`] that travels; the message's introduction has the rest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RefusalCode {
    Version,
    NotMe,
    SameSide,
    Geometry,
    Stale(Epoch),
    Full,
    Resources,
    NoRdma,
    NeedsTls,
    NoTls,
}

/// One message of the handshake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Message {
    pub(crate) from: Introduction,
    pub(crate) kind: Kind,
}

impl Message {
    /// A refusal that says nothing of the end that refuses: it goes in clear text to anybody.
    pub(crate) fn anonymous_refusal(code: RefusalCode) -> [u8; MESSAGE_BYTES] {
        let identity = LinkIdentity {
            instance: InstanceId(0),
            epoch: Epoch(0),
        };
        let geometry = Geometry {
            num_lanes: 0,
            a2f_slot_bytes: 0,
            f2a_slot_bytes: 0,
        };
        Self {
            from: Introduction {
                identity,
                side: Side::Responder,
                geometry,
            },
            kind: Kind::Refusal(code),
        }
        .encode()
    }

    pub(crate) fn encode(&self) -> [u8; MESSAGE_BYTES] {
        let nobody = LinkIdentity {
            instance: InstanceId(0),
            epoch: Epoch(0),
        };
        let (kind, code, other) = match self.kind {
            Kind::Hello { wanted, choice, .. } => (0, choice.code(), wanted),
            Kind::Welcome => (1, 0, nobody),
            Kind::Refusal(RefusalCode::Version) => (2, 0, nobody),
            Kind::Refusal(RefusalCode::NotMe) => (2, 1, nobody),
            Kind::Refusal(RefusalCode::SameSide) => (2, 2, nobody),
            Kind::Refusal(RefusalCode::Geometry) => (2, 3, nobody),
            Kind::Refusal(RefusalCode::Stale(epoch)) => (2, 4, LinkIdentity { epoch, ..nobody }),
            Kind::Refusal(RefusalCode::Full) => (2, 5, nobody),
            Kind::Refusal(RefusalCode::Resources) => (2, 6, nobody),
            Kind::Refusal(RefusalCode::NoRdma) => (2, 7, nobody),
            Kind::Refusal(RefusalCode::NeedsTls) => (2, 8, nobody),
            Kind::Refusal(RefusalCode::NoTls) => (2, 9, nobody),
        };
        let side: u8 = match self.from.side {
            Side::Initiator => 0,
            Side::Responder => 1,
        };
        let Introduction {
            identity, geometry, ..
        } = self.from;
        let mut out = [0; MESSAGE_BYTES];
        out[0..4].copy_from_slice(&MAGIC.to_le_bytes());
        out[4..6].copy_from_slice(&VERSION.to_le_bytes());
        out[6] = kind;
        out[7] = side;
        out[8..12].copy_from_slice(&identity.instance.0.to_le_bytes());
        out[12..16].copy_from_slice(&u32::from(geometry.num_lanes).to_le_bytes());
        out[16..24].copy_from_slice(&identity.epoch.0.to_le_bytes());
        out[24..32].copy_from_slice(&(geometry.a2f_slot_bytes as u64).to_le_bytes());
        out[32..40].copy_from_slice(&(geometry.f2a_slot_bytes as u64).to_le_bytes());
        out[40..44].copy_from_slice(&other.instance.0.to_le_bytes());
        out[44..48].copy_from_slice(&u32::to_le_bytes(code));
        out[48..56].copy_from_slice(&other.epoch.0.to_le_bytes());
        let is_for_rdma = matches!(
            self.kind,
            Kind::Hello {
                is_for_rdma: true,
                ..
            }
        );
        out[56..60].copy_from_slice(&u32::from(is_for_rdma).to_le_bytes());
        let crc = crc32fast::hash(&out[..CRC_AT]);
        out[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
        out
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, HandshakeError> {
        let bytes: &[u8; MESSAGE_BYTES] = bytes
            .try_into()
            .map_err(|_| HandshakeError::Size(bytes.len()))?;
        let magic = u32_at(bytes, 0);
        if magic != MAGIC {
            return Err(HandshakeError::Magic(magic));
        }
        let version = u16::from_le_bytes([bytes[4], bytes[5]]);
        if version != VERSION {
            return Err(HandshakeError::Version(version));
        }
        if u32_at(bytes, CRC_AT) != crc32fast::hash(&bytes[..CRC_AT]) {
            return Err(HandshakeError::Checksum);
        }
        let by = u32_at(bytes, 56);
        let is_hello = bytes[6] == 0;
        if by > u32::from(is_hello) {
            return Err(field("by", by));
        }
        let other = LinkIdentity {
            instance: InstanceId(u32_at(bytes, 40)),
            epoch: Epoch(u64_at(bytes, 48)),
        };
        Ok(Self {
            from: introduction(bytes)?,
            kind: kind(bytes[6], u32_at(bytes, 44), (other, by == 1))?,
        })
    }
}

fn kind(
    kind: u8,
    code: u32,
    (other, is_for_rdma): (LinkIdentity, bool),
) -> Result<Kind, HandshakeError> {
    match (kind, code) {
        (0, _) => match ChoiceReason::from_code(code) {
            Some(choice) => Ok(Kind::Hello {
                wanted: other,
                choice,
                is_for_rdma,
            }),
            None => Err(field("choice", code)),
        },
        (1, 0) => Ok(Kind::Welcome),
        (2, 0) => Ok(Kind::Refusal(RefusalCode::Version)),
        (2, 1) => Ok(Kind::Refusal(RefusalCode::NotMe)),
        (2, 2) => Ok(Kind::Refusal(RefusalCode::SameSide)),
        (2, 3) => Ok(Kind::Refusal(RefusalCode::Geometry)),
        (2, 4) => Ok(Kind::Refusal(RefusalCode::Stale(other.epoch))),
        (2, 5) => Ok(Kind::Refusal(RefusalCode::Full)),
        (2, 6) => Ok(Kind::Refusal(RefusalCode::Resources)),
        (2, 7) => Ok(Kind::Refusal(RefusalCode::NoRdma)),
        (2, 8) => Ok(Kind::Refusal(RefusalCode::NeedsTls)),
        (2, 9) => Ok(Kind::Refusal(RefusalCode::NoTls)),
        (1 | 2, _) => Err(field("code", code)),
        _ => Err(field("kind", kind)),
    }
}

fn introduction(bytes: &[u8; MESSAGE_BYTES]) -> Result<Introduction, HandshakeError> {
    let side = match bytes[7] {
        0 => Side::Initiator,
        1 => Side::Responder,
        other => return Err(field("side", other)),
    };
    let num_lanes = u32_at(bytes, 12);
    let slot_bytes = |at, name| {
        let value = u64_at(bytes, at);
        usize::try_from(value).map_err(|_| field(name, value))
    };
    Ok(Introduction {
        identity: LinkIdentity {
            instance: InstanceId(u32_at(bytes, 8)),
            epoch: Epoch(u64_at(bytes, 16)),
        },
        side,
        geometry: Geometry {
            num_lanes: u8::try_from(num_lanes).map_err(|_| field("num_lanes", num_lanes))?,
            a2f_slot_bytes: slot_bytes(24, "a2f_slot_bytes")?,
            f2a_slot_bytes: slot_bytes(32, "f2a_slot_bytes")?,
        },
    })
}

fn field(field: &'static str, value: impl Into<u64>) -> HandshakeError {
    HandshakeError::Field {
        field,
        value: value.into(),
    }
}

fn u32_at(bytes: &[u8; MESSAGE_BYTES], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8; MESSAGE_BYTES], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

impl Introduction {
    /// The accepting end's verdict on a hello; epochs and room are the endpoint's business.
    pub(crate) fn judge(&self, from: &Self, wanted: LinkIdentity) -> Result<(), RefusalCode> {
        if wanted != self.identity {
            Err(RefusalCode::NotMe)
        } else if from.side == self.side {
            Err(RefusalCode::SameSide)
        } else if from.geometry != self.geometry {
            Err(RefusalCode::Geometry)
        } else {
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn introduction(side: Side) -> Introduction {
        Introduction {
            identity: LinkIdentity {
                instance: InstanceId(3),
                epoch: Epoch(8),
            },
            side,
            geometry: Geometry {
                num_lanes: 3,
                a2f_slot_bytes: 1 << 20,
                f2a_slot_bytes: 1 << 21,
            },
        }
    }

    fn kinds() -> Vec<Kind> {
        let wanted = LinkIdentity {
            instance: InstanceId(1),
            epoch: Epoch(2),
        };
        let hello = |choice, is_for_rdma| Kind::Hello {
            wanted,
            choice,
            is_for_rdma,
        };
        let hellos = [false, true].map(|by| ChoiceReason::ALL.map(|choice| hello(choice, by)));
        let refusals = [
            RefusalCode::Version,
            RefusalCode::NotMe,
            RefusalCode::SameSide,
            RefusalCode::Geometry,
            RefusalCode::Stale(Epoch(9)),
            RefusalCode::Full,
            RefusalCode::Resources,
            RefusalCode::NoRdma,
            RefusalCode::NeedsTls,
            RefusalCode::NoTls,
        ];
        let refusals = refusals.map(Kind::Refusal);
        [&hellos.concat()[..], &[Kind::Welcome], &refusals].concat()
    }

    #[test]
    fn every_message_comes_back_as_it_went() {
        for kind in kinds() {
            for side in [Side::Initiator, Side::Responder] {
                let message = Message {
                    from: introduction(side),
                    kind,
                };
                assert_eq!(Message::decode(&message.encode()), Ok(message));
            }
        }
    }

    #[test]
    fn a_message_of_another_size_or_version_is_refused() {
        let bytes = Message {
            from: introduction(Side::Initiator),
            kind: Kind::Welcome,
        }
        .encode();
        assert_eq!(Message::decode(&bytes[..63]), Err(HandshakeError::Size(63)));
        assert_eq!(Message::decode(&[]), Err(HandshakeError::Size(0)));
        let mut newer = bytes;
        newer[4] = 7;
        assert_eq!(Message::decode(&newer), Err(HandshakeError::Version(7)));
    }

    #[test]
    fn each_disagreement_has_its_own_refusal() {
        let ours = introduction(Side::Responder);
        let theirs = introduction(Side::Initiator);
        let stale = LinkIdentity {
            epoch: Epoch(7),
            ..ours.identity
        };
        let mut wide = theirs;
        wide.geometry.f2a_slot_bytes += 1;
        assert_eq!(ours.judge(&theirs, ours.identity), Ok(()));
        assert_eq!(ours.judge(&theirs, stale), Err(RefusalCode::NotMe));
        assert_eq!(ours.judge(&ours, ours.identity), Err(RefusalCode::SameSide));
        assert_eq!(ours.judge(&wide, ours.identity), Err(RefusalCode::Geometry));
    }

    proptest! {
        #[test]
        fn arbitrary_fields_with_a_right_checksum_never_panic(
            body in proptest::collection::vec(any::<u8>(), MESSAGE_BYTES - 10),
        ) {
            let mut bytes = [0; MESSAGE_BYTES];
            bytes[0..4].copy_from_slice(&MAGIC.to_le_bytes());
            bytes[4..6].copy_from_slice(&VERSION.to_le_bytes());
            bytes[6..CRC_AT].copy_from_slice(&body);
            bytes[6] %= 4;
            bytes[7] %= 3;
            bytes[13..16].fill(0);
            bytes[45..48].fill(0);
            bytes[44] %= 12;
            bytes[56] %= 3;
            bytes[57..60].fill(0);
            let crc = crc32fast::hash(&bytes[..CRC_AT]);
            bytes[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
            if let Ok(message) = Message::decode(&bytes) {
                prop_assert_eq!(Message::decode(&message.encode()), Ok(message));
            }
        }

        #[test]
        fn arbitrary_bytes_are_no_message(bytes in proptest::collection::vec(any::<u8>(), 0..130)) {
            prop_assert!(Message::decode(&bytes).is_err());
        }
    }
}
