//! How two endpoints introduce themselves before a link exists, and why one refuses the other.
//!
//! One message each way, of one fixed size, so that nothing is allocated on a stranger's word. The
//! same bytes travel over Unix sockets (with file descriptors beside them) and TCP.
//!
//! ```text
//!  0     4   6    7    8        12    13         16    24       32       40              44   48
//!  │magic│ver│kind│side│instance│lanes│link epoch│epoch│a2f slot│f2a slot│other instance │code│
//!  48           56 57     58    60   64
//!  │ other epoch│by│reason│offer│ crc│
//! ```
//! "Other" is whom a hello wants to reach, and the epoch that a refusal holds against it. "Link epoch"
//! is what a hello proposes and a welcome says (see `link_epoch`). A "by" of 0 is a link that goes over
//! the socket that the hello came by, 1 is RDMA, 2 is device memory. Behind a hello follow as many bytes
//! of text as "reason" says, why it takes the place of the present link; then, by RDMA, an offer of
//! queue pairs, and by device memory the "offer" bytes of that. Behind a welcome follows the same
//! offer of the other end. Messages of every version have this size and the version at this place, so
//! that one of another version is told so.

use step3rt_core::ids::{Epoch, InstanceId};

use crate::choice::Choice;
use crate::contract::{Geometry, LinkIdentity, Side};
use crate::device_offer::{DeviceOffer, MAX_DEVICE_OFFER_BYTES};
use crate::link_epoch::LinkEpoch;
use crate::rdma::OFFER_BYTES;
use crate::refusal::HandshakeError;

/// Size of every message.
pub(crate) const MESSAGE_BYTES: usize = 64;

const MAGIC: u32 = u32::from_le_bytes(*b"S3HS");
/// Version of the handshake, and by it of the frames that follow.
pub(crate) const VERSION: u16 = 2;
/// Most bytes that follow a message.
pub(crate) const MAX_FOLLOWING_BYTES: usize = u8::MAX as usize + MAX_DEVICE_OFFER_BYTES;
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
        choice: Choice,
        /// What it proposes.
        epoch: LinkEpoch,
        by: By,
        /// Length of the text that says why the present link is to be replaced; 0 if none is.
        reason_bytes: u8,
    },
    /// The link exists. The queue pairs that follow one for RDMA are not announced: whoever asked for
    /// RDMA awaits them.
    Welcome { epoch: LinkEpoch, by: By },
    /// It does not.
    Refusal(RefusalCode),
}

/// What the slots of a link are moved by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum By {
    /// The fabric that the message travels by.
    Carrier,
    Rdma,
    /// The devices; an offer of so many bytes follows.
    Device {
        offer_bytes: u16,
    },
}

impl By {
    pub(crate) fn of_offer(offer: &DeviceOffer) -> Self {
        let offer_bytes = u16::try_from(offer.as_bytes().len()).expect("at most 4096");
        Self::Device { offer_bytes }
    }

    fn code(self) -> u8 {
        match self {
            Self::Carrier => 0,
            Self::Rdma => 1,
            Self::Device { .. } => 2,
        }
    }

    pub(crate) fn offer_bytes(self) -> usize {
        match self {
            Self::Carrier => 0,
            Self::Rdma => OFFER_BYTES,
            Self::Device { offer_bytes } => offer_bytes.into(),
        }
    }

    fn from_bytes(bytes: &[u8; MESSAGE_BYTES]) -> Result<Self, HandshakeError> {
        let offer_bytes = u16::from_le_bytes([bytes[58], bytes[59]]);
        let is_offer_good = match bytes[56] {
            2 => usize::from(offer_bytes) <= MAX_DEVICE_OFFER_BYTES,
            _ => offer_bytes == 0,
        };
        if !is_offer_good {
            return Err(field("offer_bytes", offer_bytes));
        }
        match bytes[56] {
            0 => Ok(Self::Carrier),
            1 => Ok(Self::Rdma),
            2 => Ok(Self::Device { offer_bytes }),
            by => Err(field("by", by)),
        }
    }
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
    NoDeviceOffer,
    NoEpoch,
    FarEpoch,
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
            Kind::Welcome { .. } => (1, 0, nobody),
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
            Kind::Refusal(RefusalCode::NoDeviceOffer) => (2, 10, nobody),
            Kind::Refusal(RefusalCode::NoEpoch) => (2, 11, nobody),
            Kind::Refusal(RefusalCode::FarEpoch) => (2, 12, nobody),
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
        let (link_epoch, by, reason_bytes) = match self.kind {
            Kind::Hello {
                epoch,
                by,
                reason_bytes,
                ..
            } => (epoch.0, by, reason_bytes),
            Kind::Welcome { epoch, by } => (epoch.0, by, 0),
            Kind::Refusal(_) => (0, By::Carrier, 0),
        };
        // The lanes are in the word's first byte, the link's epoch in the other three.
        out[12..16].copy_from_slice(&(link_epoch << 8).to_le_bytes());
        out[12] = geometry.num_lanes;
        out[16..24].copy_from_slice(&identity.epoch.0.to_le_bytes());
        out[24..32].copy_from_slice(&(geometry.a2f_slot_bytes as u64).to_le_bytes());
        out[32..40].copy_from_slice(&(geometry.f2a_slot_bytes as u64).to_le_bytes());
        out[40..44].copy_from_slice(&other.instance.0.to_le_bytes());
        out[44..48].copy_from_slice(&u32::to_le_bytes(code));
        out[48..56].copy_from_slice(&other.epoch.0.to_le_bytes());
        out[56] = by.code();
        out[57] = reason_bytes;
        if let By::Device { offer_bytes } = by {
            out[58..60].copy_from_slice(&offer_bytes.to_le_bytes());
        }
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
        let other = LinkIdentity {
            instance: InstanceId(u32_at(bytes, 40)),
            epoch: Epoch(u64_at(bytes, 48)),
        };
        Ok(Self {
            from: introduction(bytes)?,
            kind: kind(bytes, other)?,
        })
    }

    /// How many bytes follow this message.
    pub(crate) fn following_bytes(&self) -> usize {
        match self.kind {
            Kind::Hello {
                by, reason_bytes, ..
            } => usize::from(reason_bytes) + by.offer_bytes(),
            Kind::Welcome { by, .. } => by.offer_bytes(),
            Kind::Refusal(_) => 0,
        }
    }
}

fn kind(bytes: &[u8; MESSAGE_BYTES], other: LinkIdentity) -> Result<Kind, HandshakeError> {
    let (kind, code) = (bytes[6], u32_at(bytes, 44));
    let (by, reason_bytes) = (By::from_bytes(bytes)?, bytes[57]);
    let link_epoch = u32_at(bytes, 12) >> 8;
    let is_link = kind < 2;
    if (link_epoch == 0) == is_link {
        return Err(field("link_epoch", link_epoch));
    }
    let is_by_known = match kind {
        0 => true,
        1 => by != By::Rdma,
        _ => by == By::Carrier,
    };
    if !is_by_known {
        return Err(field("by", bytes[56]));
    }
    if reason_bytes > 0 && kind != 0 {
        return Err(field("reason_bytes", reason_bytes));
    }
    let epoch = LinkEpoch(link_epoch);
    match (kind, code) {
        (0, _) => match Choice::from_code(code) {
            Some(choice) => Ok(Kind::Hello {
                wanted: other,
                choice,
                epoch,
                by,
                reason_bytes,
            }),
            None => Err(field("choice", code)),
        },
        (1, 0) => Ok(Kind::Welcome { epoch, by }),
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
        (2, 10) => Ok(Kind::Refusal(RefusalCode::NoDeviceOffer)),
        (2, 11) => Ok(Kind::Refusal(RefusalCode::NoEpoch)),
        (2, 12) => Ok(Kind::Refusal(RefusalCode::FarEpoch)),
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
            num_lanes: bytes[12],
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
mod tests;
