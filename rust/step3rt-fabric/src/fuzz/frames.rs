//! Single headers.

use step3rt_core::ids::LaneId;

use super::{MEND, PEER, byte, bytes, mend};
use crate::frame::{Direction, Frame, FrameHeader, HEADER_BYTES, ProtocolError};

pub(super) const SELECTOR: u8 = 0;

/// A header that was taken is the one that its bytes say; one that was refused, rightly.
pub(super) fn run(mut data: &[u8]) {
    let flags = byte(&mut data);
    let mut header: [u8; HEADER_BYTES] = bytes(&mut data);
    if flags & MEND != 0 {
        mend(&mut header);
    }
    match FrameHeader::decode(&header) {
        Ok(found) => {
            assert_eq!(found.encode(), header, "a header has one form");
            assert_eq!(FrameHeader::decode(&found.encode()), Ok(found));
        }
        Err(error) => assert!(is_justified(error, &header), "{error} of {header:?}"),
    }
}

fn is_justified(error: ProtocolError, header: &[u8; HEADER_BYTES]) -> bool {
    let at = |range: std::ops::Range<usize>| {
        let value = header[range].iter().rev();
        value.fold(0, |sum: u64, byte| sum << 8 | u64::from(*byte))
    };
    match error {
        ProtocolError::Magic(found) => u64::from(found) == at(0..4) && &header[..4] != b"S3FR",
        ProtocolError::Version(found) => u64::from(found) == at(4..6) && found != 1,
        ProtocolError::HeaderChecksum { found, computed } => {
            u64::from(found) == at(60..64)
                && computed == crc32fast::hash(&header[..60])
                && found != computed
        }
        ProtocolError::Field { field, value } => match field {
            "direction" => value == at(6..7) && value > 1,
            "flags" => value == at(50..52) && value > 1,
            "payload_checksum" => value == at(52..56) && value > 0 && at(50..52) == 0,
            "reserved" => value == at(56..60) && value > 0,
            _ => false,
        },
        _ => false, // not for a header alone to say
    }
}

/// A header that the other end of a link of these tests could send.
pub(super) fn header(direction: Direction, lane: u8, sequence: u64) -> FrameHeader {
    FrameHeader {
        source: PEER.instance,
        epoch: PEER.epoch,
        direction,
        lane: LaneId(lane),
        sequence,
        frame: Frame {
            step: 11,
            layer: 60,
            num_tokens: 1,
            payload_bytes: 24,
        },
        payload_checksum: None,
    }
}

pub(super) fn seeds() -> Vec<Vec<u8>> {
    let plain = header(Direction::A2f, 1, 9);
    let summed = FrameHeader {
        payload_checksum: Some(crc32fast::hash(&[0; 24])),
        ..header(Direction::F2a, 0, 1)
    };
    let seed = |flags, header: FrameHeader| [&[SELECTOR, flags][..], &header.encode()].concat();
    let mut seeds = vec![seed(0, plain), seed(MEND, plain), seed(MEND, summed)];
    // Each impossible field behind a right checksum.
    for at in [0, 4, 6, 50, 52, 56] {
        let mut spoiled = seed(MEND, plain);
        spoiled[2 + at] = 9;
        seeds.push(spoiled);
    }
    seeds
}
