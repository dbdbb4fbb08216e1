//! Single messages of the handshake.

use step3rt_core::ids::Epoch;

use super::{GEOMETRY, LOCAL, MEND, PEER, byte, introduction, mend};
use crate::address::ChoiceReason;
use crate::choice::{Choice, DeviceNote};
use crate::contract::Side;
use crate::handshake::{By, Kind, MAX_FOLLOWING_BYTES, MESSAGE_BYTES, Message, RefusalCode};
use crate::link_epoch::LinkEpoch;
use crate::rdma::OFFER_BYTES;
use crate::refusal::HandshakeError;

pub(super) const SELECTOR: u8 = 0;

/// What each end of these tests proposes.
pub(super) const PROPOSED: LinkEpoch = LinkEpoch(3);

pub(super) const CHOICE: Choice = Choice {
    reason: ChoiceReason::SameHost,
    device: DeviceNote::Nothing,
};

/// What the connecting end of these tests awaits.
pub(super) fn welcome(by: By) -> Message {
    Message {
        from: introduction(PEER, Side::Responder),
        kind: Kind::Welcome {
            epoch: PROPOSED,
            by,
        },
    }
}

pub(super) fn hello(by: By, reason: &str) -> Message {
    Message {
        from: introduction(PEER, Side::Initiator),
        kind: Kind::Hello {
            wanted: LOCAL,
            choice: CHOICE,
            epoch: PROPOSED,
            by,
            reason_bytes: reason.len().try_into().expect("short"),
        },
    }
}

/// One message. What is understood is possible, comes back as it went, and is judged by its fields
/// alone.
pub(super) fn run(mut data: &[u8]) {
    let flags = byte(&mut data);
    let mut bytes = data[..data.len().min(2 * MESSAGE_BYTES)].to_vec();
    if flags & MEND != 0 && bytes.len() == MESSAGE_BYTES {
        mend(&mut bytes);
    }
    match Message::decode(&bytes) {
        Ok(message) => {
            assert_eq!(bytes.len(), MESSAGE_BYTES);
            assert!(is_possible(&bytes), "{message:?} of {bytes:?}");
            assert_eq!(Message::decode(&message.encode()), Ok(message));
            check_judgement(&message);
        }
        Err(HandshakeError::Size(found)) => {
            assert_eq!(found, bytes.len());
            assert_ne!(found, MESSAGE_BYTES);
        }
        Err(HandshakeError::Magic(_)) => assert_ne!(&bytes[..4], b"S3HS"),
        Err(HandshakeError::Version(_)) => assert_ne!(bytes[4..6], [2, 0]),
        Err(HandshakeError::Checksum) => {
            let crc = crc32fast::hash(&bytes[..60]);
            assert_ne!(bytes[60..], crc.to_le_bytes());
        }
        Err(HandshakeError::Field { field, .. }) => {
            assert!(!is_possible(&bytes), "{field} of {bytes:?}");
        }
        Err(error) => panic!("{error} of a message alone"),
    }
}

/// Whether every field holds what an end could send, by what the protocol says of the places.
fn is_possible(bytes: &[u8]) -> bool {
    let (kind, side, by, reason_bytes) = (bytes[6], bytes[7], bytes[56], bytes[57]);
    let offer_bytes = u16::from_le_bytes([bytes[58], bytes[59]]);
    let code = u32::from_le_bytes(bytes[44..48].try_into().expect("four"));
    let has_link_epoch = bytes[13..16] != [0; 3];
    let (is_by_good, is_code_good) = match kind {
        0 => (by <= 2, code & 0xff < 10 && code >> 8 < 4),
        1 => (by == 0 || by == 2, code == 0),
        2 => (by == 0, code <= 12),
        _ => return false,
    };
    let most = if by == 2 { 4096 } else { 0 };
    side < 2
        && has_link_epoch == (kind < 2)
        && is_by_good
        && is_code_good
        && offer_bytes <= most
        && (reason_bytes == 0 || kind == 0)
}

fn check_judgement(message: &Message) {
    let ours = introduction(LOCAL, Side::Responder);
    match message.kind {
        Kind::Hello {
            wanted,
            by,
            reason_bytes,
            ..
        } => {
            let verdict = ours.judge(&message.from, wanted);
            assert_eq!(verdict.is_ok(), fault(message).is_none(), "{message:?}");
            let following = usize::from(reason_bytes) + offer_bytes(by);
            assert_eq!(message.following_bytes(), following);
            assert!(following <= MAX_FOLLOWING_BYTES);
        }
        Kind::Refusal(code) => {
            let refusal = ours.explain(&message.from, PEER, code);
            assert!(!refusal.to_string().is_empty());
            assert_eq!(message.following_bytes(), 0);
        }
        Kind::Welcome { by, .. } => assert_eq!(message.following_bytes(), offer_bytes(by)),
    }
}

pub(super) fn offer_bytes(by: By) -> usize {
    match by {
        By::Carrier => 0,
        By::Rdma => OFFER_BYTES,
        By::Device { offer_bytes } => offer_bytes.into(),
    }
}

/// Why the accepting end of these tests may not link the sender of a hello, whatever it has.
pub(super) fn fault(hello: &Message) -> Option<RefusalCode> {
    let Kind::Hello { wanted, .. } = hello.kind else {
        return None;
    };
    let from = hello.from;
    if wanted != LOCAL {
        Some(RefusalCode::NotMe)
    } else if from.side != Side::Initiator {
        Some(RefusalCode::SameSide)
    } else if from.geometry != GEOMETRY {
        Some(RefusalCode::Geometry)
    } else {
        None
    }
}

/// Keeps the number of a link below 2^16: numbers are of the process, and one that is near the last
/// would leave none to what runs after it.
pub(super) fn lower_link_epoch(message: &mut [u8; MESSAGE_BYTES]) {
    message[15] = 0;
}

/// Each kind of message.
pub(super) fn each() -> Vec<Message> {
    let codes = [
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
        RefusalCode::NoDeviceOffer,
        RefusalCode::NoEpoch,
        RefusalCode::FarEpoch,
    ];
    let refusals = codes.map(|code| Message {
        kind: Kind::Refusal(code),
        ..welcome(By::Carrier)
    });
    let device = By::Device { offer_bytes: 7 };
    let others = [
        hello(By::Carrier, ""),
        hello(By::Rdma, "it stands still"),
        hello(device, ""),
        welcome(By::Carrier),
        welcome(device),
    ];
    [&others[..], &refusals].concat()
}

pub(super) fn seeds() -> Vec<Vec<u8>> {
    let seed = |flags: u8, message: &[u8]| [&[SELECTOR, flags], message].concat();
    let mut seeds: Vec<_> = each().iter().map(|m| seed(MEND, &m.encode())).collect();
    let plain = hello(By::Carrier, "").encode();
    seeds.push(seed(0, &plain));
    seeds.push(seed(0, &[&[0], &plain[..]].concat())); // a byte too long
    // Each impossible field behind a right checksum.
    for at in [6, 7, 13, 44, 45, 56, 57, 58, 59] {
        for message in each() {
            let mut bytes = message.encode();
            bytes[at] ^= 0x43;
            seeds.push(seed(MEND, &bytes));
        }
    }
    seeds
}
