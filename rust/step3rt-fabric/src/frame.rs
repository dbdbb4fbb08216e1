//! The 64-byte header that precedes every payload, on every fabric.
//!
//! It carries what is needed to refuse a frame of another incarnation, out of order or torn; it
//! never describes the payload beyond its length and number of tokens.
//!
//! ```text
//!  0     4   6   7   8      16        24    32             40          44      48     50     52   56    60   64
//!  │magic│ver│dir│lane│epoch│ sequence│ step│ payload_bytes│ num_tokens│ source│ layer│ flags│ crc│  0  │ crc│
//!                                                                                       payload┘  header┘
//! ```
//! Little-endian throughout.

use step3rt_core::ids::{Epoch, InstanceId, LaneId};
use thiserror::Error;

/// Size of an encoded header.
pub const HEADER_BYTES: usize = 64;

const MAGIC: u32 = u32::from_le_bytes(*b"S3FR");
const VERSION: u16 = 1;
const FLAG_PAYLOAD_CHECKSUM: u16 = 1;
const CRC_AT: usize = HEADER_BYTES - 4;

/// Which way a payload travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// Attention to FFN.
    A2f,
    /// FFN to attention.
    F2a,
}

/// What the producer says of a payload; the link adds the rest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame {
    /// The sender's step counter of this lane, echoed in replies.
    pub step: u64,
    /// Model layer, echoed in replies.
    pub layer: u16,
    /// Rows in the payload.
    pub num_tokens: u32,
    /// Bytes of the slot that are meant.
    pub payload_bytes: usize,
}

/// A received, checked header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameHeader {
    /// Which instance sent it.
    pub source: InstanceId,
    /// The sender's incarnation.
    pub epoch: Epoch,
    /// Which way it travels.
    pub direction: Direction,
    /// The lane it arrived on.
    pub lane: LaneId,
    /// Position in the lane's alternation, from 1.
    pub sequence: u64,
    /// As pushed.
    pub frame: Frame,
    /// CRC-32 of the payload, when the sender was set to compute it (for debugging: it costs a
    /// pass over the payload at both ends).
    pub payload_checksum: Option<u32>,
}

/// How a peer broke the protocol. Nothing of the offending frame was used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum ProtocolError {
    /// Not a header at all.
    #[error("frame starts with {0:#010x}, not with the magic of a header")]
    Magic(u32),
    /// A header of another version of the protocol.
    #[error("frame has version {0}, not {VERSION}")]
    Version(u16),
    /// The header was damaged.
    #[error("header checksum is {found:#010x}, its bytes give {computed:#010x}")]
    HeaderChecksum {
        /// As received.
        found: u32,
        /// Of the received bytes.
        computed: u32,
    },
    /// A field holds a value that nobody sends.
    #[error("header field `{field}` holds {value}")]
    Field {
        /// The field's name.
        field: &'static str,
        /// Its value.
        value: u64,
    },
    /// The frame travels the wrong way.
    #[error("frame travels {found:?}, this end receives {expected:?}")]
    Direction {
        /// As received.
        found: Direction,
        /// What this end receives.
        expected: Direction,
    },
    /// The frame lies in the slot of another lane, or its lane does not exist.
    #[error("frame of lane {found} where lane {expected} was expected")]
    Lane {
        /// As received.
        found: LaneId,
        /// Whose slot it is, or the number of lanes when there is no such lane.
        expected: LaneId,
    },
    /// Another instance's frame.
    #[error("frame from instance {found} on the link of instance {expected}")]
    Source {
        /// As received.
        found: InstanceId,
        /// The link's peer.
        expected: InstanceId,
    },
    /// A frame of another incarnation of the peer.
    #[error("frame of epoch {found} on a link of epoch {expected}")]
    Epoch {
        /// As received.
        found: Epoch,
        /// The link's epoch.
        expected: Epoch,
    },
    /// A frame was lost, repeated or reordered.
    #[error("lane {lane} has sequence {found} where {expected} comes next")]
    Sequence {
        /// The lane.
        lane: LaneId,
        /// As received.
        found: u64,
        /// What comes next.
        expected: u64,
    },
    /// A frame came before the last one on its lane was answered.
    #[error("lane {lane} has sequence {found} before this end answered the one before")]
    NoCredit {
        /// The lane.
        lane: LaneId,
        /// As received.
        found: u64,
    },
    /// The payload does not fit the slot.
    #[error("payload of {payload_bytes} bytes in a slot of {slot_bytes}")]
    Oversize {
        /// As received.
        payload_bytes: u64,
        /// What there is.
        slot_bytes: usize,
    },
    /// The link ended within a frame.
    #[error("link ended {found} bytes into a frame of {expected}")]
    ShortFrame {
        /// Bytes received.
        found: usize,
        /// Bytes announced.
        expected: usize,
    },
    /// The peer answered a frame before it could have had all of it.
    #[error("a frame was answered before all of it was sent")]
    EarlyReply,
    /// The payload was damaged.
    #[error("payload checksum is {found:#010x}, its bytes give {computed:#010x}")]
    PayloadChecksum {
        /// As received.
        found: u32,
        /// Of the received bytes.
        computed: u32,
    },
    /// Bytes on a socket that carries none after the handshake.
    #[error("bytes after the handshake on a socket that carries none")]
    Chatter,
}

impl FrameHeader {
    /// The header's bytes as they travel.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut out = [0; HEADER_BYTES];
        let flags = if self.payload_checksum.is_some() {
            FLAG_PAYLOAD_CHECKSUM
        } else {
            0
        };
        let direction = match self.direction {
            Direction::A2f => 0,
            Direction::F2a => 1,
        };
        out[0..4].copy_from_slice(&MAGIC.to_le_bytes());
        out[4..6].copy_from_slice(&VERSION.to_le_bytes());
        out[6] = direction;
        out[7] = self.lane.0;
        out[8..16].copy_from_slice(&self.epoch.0.to_le_bytes());
        out[16..24].copy_from_slice(&self.sequence.to_le_bytes());
        out[24..32].copy_from_slice(&self.frame.step.to_le_bytes());
        out[32..40].copy_from_slice(&(self.frame.payload_bytes as u64).to_le_bytes());
        out[40..44].copy_from_slice(&self.frame.num_tokens.to_le_bytes());
        out[44..48].copy_from_slice(&self.source.0.to_le_bytes());
        out[48..50].copy_from_slice(&self.frame.layer.to_le_bytes());
        out[50..52].copy_from_slice(&flags.to_le_bytes());
        out[52..56].copy_from_slice(&self.payload_checksum.unwrap_or(0).to_le_bytes());
        let crc = crc32fast::hash(&out[..CRC_AT]);
        out[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
        out
    }

    /// Reads a header back. Whether it fits the link it came by is checked elsewhere.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Self, ProtocolError> {
        let magic = u32_at(bytes, 0);
        if magic != MAGIC {
            return Err(ProtocolError::Magic(magic));
        }
        let version = u16_at(bytes, 4);
        if version != VERSION {
            return Err(ProtocolError::Version(version));
        }
        let found = u32_at(bytes, CRC_AT);
        let computed = crc32fast::hash(&bytes[..CRC_AT]);
        if found != computed {
            return Err(ProtocolError::HeaderChecksum { found, computed });
        }
        let direction = match bytes[6] {
            0 => Direction::A2f,
            1 => Direction::F2a,
            other => return Err(field("direction", other)),
        };
        let flags = u16_at(bytes, 50);
        if flags & !FLAG_PAYLOAD_CHECKSUM != 0 {
            return Err(field("flags", flags));
        }
        let crc = u32_at(bytes, 52);
        let payload_checksum = (flags & FLAG_PAYLOAD_CHECKSUM != 0).then_some(crc);
        if payload_checksum.is_none() && crc != 0 {
            return Err(field("payload_checksum", crc));
        }
        let reserved = u32_at(bytes, 56);
        if reserved != 0 {
            return Err(field("reserved", reserved));
        }
        let payload_bytes = u64_at(bytes, 32);
        Ok(Self {
            source: InstanceId(u32_at(bytes, 44)),
            epoch: Epoch(u64_at(bytes, 8)),
            direction,
            lane: LaneId(bytes[7]),
            sequence: u64_at(bytes, 16),
            frame: Frame {
                step: u64_at(bytes, 24),
                layer: u16_at(bytes, 48),
                num_tokens: u32_at(bytes, 40),
                payload_bytes: usize::try_from(payload_bytes)
                    .map_err(|_| field("payload_bytes", payload_bytes))?,
            },
            payload_checksum,
        })
    }
}

fn field(field: &'static str, value: impl Into<u64>) -> ProtocolError {
    ProtocolError::Field {
        field,
        value: value.into(),
    }
}

fn bytes_at<const N: usize>(bytes: &[u8; HEADER_BYTES], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[at..at + N]);
    out
}

fn u16_at(bytes: &[u8; HEADER_BYTES], at: usize) -> u16 {
    u16::from_le_bytes(bytes_at(bytes, at))
}

fn u32_at(bytes: &[u8; HEADER_BYTES], at: usize) -> u32 {
    u32::from_le_bytes(bytes_at(bytes, at))
}

fn u64_at(bytes: &[u8; HEADER_BYTES], at: usize) -> u64 {
    u64::from_le_bytes(bytes_at(bytes, at))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn header() -> FrameHeader {
        FrameHeader {
            source: InstanceId(7),
            epoch: Epoch(3),
            direction: Direction::F2a,
            lane: LaneId(2),
            sequence: 9,
            frame: Frame {
                step: 11,
                layer: 60,
                num_tokens: 128,
                payload_bytes: 917_504,
            },
            payload_checksum: None,
        }
    }

    fn with_crc(mut bytes: [u8; HEADER_BYTES]) -> [u8; HEADER_BYTES] {
        let crc = crc32fast::hash(&bytes[..CRC_AT]);
        bytes[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    #[test]
    fn the_layout_on_the_wire_does_not_change() {
        let expected: [&[u8]; 13] = [
            b"S3FR",
            &[1, 0],
            &[1],
            &[2],
            &[3, 0, 0, 0, 0, 0, 0, 0],
            &[9, 0, 0, 0, 0, 0, 0, 0],
            &[11, 0, 0, 0, 0, 0, 0, 0],
            &[0, 0, 14, 0, 0, 0, 0, 0],
            &[128, 0, 0, 0],
            &[7, 0, 0, 0],
            &[60, 0],
            &[0; 10],
            &crc32fast::hash(&header().encode()[..CRC_AT]).to_le_bytes(),
        ];
        assert_eq!(header().encode().as_slice(), expected.concat());
    }

    #[test]
    fn each_impossible_field_is_named() {
        for (at, name) in [
            (6, "direction"),
            (51, "flags"),
            (52, "payload_checksum"),
            (56, "reserved"),
        ] {
            let mut bytes = header().encode();
            bytes[at] = 9;
            let error = FrameHeader::decode(&with_crc(bytes)).unwrap_err();
            assert!(
                matches!(error, ProtocolError::Field { field, .. } if field == name),
                "{error}"
            );
        }
    }

    #[test]
    fn another_magic_or_version_is_refused_before_the_checksum() {
        let mut bytes = header().encode();
        bytes[4] = 2;
        assert_eq!(FrameHeader::decode(&bytes), Err(ProtocolError::Version(2)));
        bytes[0] = b'X';
        assert!(matches!(
            FrameHeader::decode(&bytes),
            Err(ProtocolError::Magic(_))
        ));
    }

    proptest! {
        #[test]
        fn every_header_comes_back_as_it_went(
            ids in any::<(u32, u64, bool, u8, u64)>(),
            frame in any::<(u64, u16, u32, u32)>(),
            payload_checksum in any::<Option<u32>>(),
        ) {
            let header = FrameHeader {
                source: InstanceId(ids.0),
                epoch: Epoch(ids.1),
                direction: if ids.2 { Direction::A2f } else { Direction::F2a },
                lane: LaneId(ids.3),
                sequence: ids.4,
                frame: Frame {
                    step: frame.0,
                    layer: frame.1,
                    num_tokens: frame.2,
                    payload_bytes: frame.3 as usize,
                },
                payload_checksum,
            };
            prop_assert_eq!(FrameHeader::decode(&header.encode()), Ok(header));
        }

        #[test]
        fn every_single_damaged_byte_is_noticed(at in 0..HEADER_BYTES, flip in 1..=255u8) {
            let mut bytes = header().encode();
            bytes[at] ^= flip;
            prop_assert!(FrameHeader::decode(&bytes).is_err());
        }

        #[test]
        fn arbitrary_bytes_with_a_right_checksum_never_panic(bytes in any::<[u8; HEADER_BYTES]>()) {
            let mut bytes = bytes;
            bytes[..6].copy_from_slice(&header().encode()[..6]);
            if let Ok(header) = FrameHeader::decode(&with_crc(bytes)) {
                prop_assert_eq!(header.encode(), with_crc(bytes));
            }
        }
    }
}
