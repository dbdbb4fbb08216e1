//! How the accepting end of a link asks for a new one in its place, with the reason, over the socket
//! of the old one.
//!
//! The connecting end needs no such message: its next hello says it. A reason travels in notes of one
//! size, that of a frame's header, so that whoever reads headers can tell them apart and reads no byte
//! more.
//!
//! ```text
//!  0     4    5      8             60   64
//!  │magic│more│ len  │ part of text │ crc│
//! ```

use std::mem;

use crate::frame::{HEADER_BYTES, ProtocolError};

/// Size of a note.
pub(crate) const NOTE_BYTES: usize = HEADER_BYTES;

/// Longest reason that travels; of a longer one the beginning does. A hello has one byte for it.
pub(crate) const MAX_REASON_BYTES: usize = u8::MAX as usize;

const MAGIC: u32 = u32::from_le_bytes(*b"S3RA");
const TEXT_AT: usize = 8;
const CRC_AT: usize = NOTE_BYTES - 4;
const PART_BYTES: usize = CRC_AT - TEXT_AT;

/// Most notes of one request.
pub(crate) const MAX_NOTES: usize = MAX_REASON_BYTES.div_ceil(PART_BYTES);

/// What travels of a reason: never nothing, and whole characters.
pub(crate) fn bounded(reason: &str) -> &str {
    if reason.is_empty() {
        return "no reason given";
    }
    &reason[..reason.floor_char_boundary(MAX_REASON_BYTES)]
}

/// The notes of one request.
pub(crate) fn encode(reason: &str) -> Vec<[u8; NOTE_BYTES]> {
    let parts = bounded(reason).as_bytes().chunks(PART_BYTES);
    let last = parts.len() - 1;
    let note = |(i, part): (usize, &[u8])| {
        let mut note = [0; NOTE_BYTES];
        note[..4].copy_from_slice(&MAGIC.to_le_bytes());
        note[4] = u8::from(i < last);
        note[5] = u8::try_from(part.len()).expect("a part is short");
        note[TEXT_AT..TEXT_AT + part.len()].copy_from_slice(part);
        let crc = crc32fast::hash(&note[..CRC_AT]);
        note[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
        note
    };
    parts.enumerate().map(note).collect()
}

/// Whether bytes read as a header are a note.
pub(crate) fn is_note(bytes: &[u8; NOTE_BYTES]) -> bool {
    bytes[..4] == MAGIC.to_le_bytes()
}

/// Puts notes together.
#[derive(Default)]
pub(crate) struct Listener {
    heard: Vec<u8>,
}

impl Listener {
    /// Takes a note; the reason once it is complete.
    pub(crate) fn hear(
        &mut self,
        bytes: &[u8; NOTE_BYTES],
    ) -> Result<Option<String>, ProtocolError> {
        let u32_at = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four"));
        if u32_at(0) != MAGIC {
            return Err(ProtocolError::Chatter);
        }
        let (found, computed) = (u32_at(CRC_AT), crc32fast::hash(&bytes[..CRC_AT]));
        if found != computed {
            return Err(ProtocolError::HeaderChecksum { found, computed });
        }
        let (more, len) = (bytes[4], usize::from(bytes[5]));
        let is_too_long = self.heard.len() + len > MAX_REASON_BYTES;
        if more > 1 || len == 0 || len > PART_BYTES || is_too_long {
            return Err(ProtocolError::Chatter);
        }
        self.heard.extend_from_slice(&bytes[TEXT_AT..TEXT_AT + len]);
        if more == 1 {
            return Ok(None);
        }
        match String::from_utf8(mem::take(&mut self.heard)) {
            Ok(reason) => Ok(Some(reason)),
            Err(_) => Err(ProtocolError::Chatter),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn heard(notes: &[[u8; NOTE_BYTES]]) -> Option<String> {
        let mut listener = Listener::default();
        let (last, first) = notes.split_last().unwrap();
        for note in first {
            assert_eq!(listener.hear(note), Ok(None));
        }
        listener.hear(last).unwrap()
    }

    #[test]
    fn no_reason_is_a_reason_and_a_long_one_is_cut_between_characters() {
        assert_eq!(heard(&encode("")).unwrap(), "no reason given");
        let long = format!("{}é{}", "x".repeat(254), "y".repeat(99));
        assert_eq!(heard(&encode(&long)).unwrap(), "x".repeat(254));
        assert_eq!(encode(&long).len(), 5);
    }

    #[test]
    fn more_text_than_a_reason_has_is_refused() {
        let note = encode(&"x".repeat(255))[0];
        let mut listener = Listener::default();
        for _ in 0..4 {
            assert_eq!(listener.hear(&note), Ok(None));
        }
        assert_eq!(listener.hear(&note), Err(ProtocolError::Chatter));
    }

    proptest! {
        #[test]
        fn a_reason_comes_back_as_it_went(reason in "\\PC{1,80}") {
            let notes = encode(&reason);
            prop_assert_eq!(heard(&notes).unwrap(), bounded(&reason));
        }

        #[test]
        fn every_damaged_byte_is_noticed(at in 0..NOTE_BYTES, flip in 1..=255_u8) {
            let mut note = encode("lane 1 timed out")[0];
            note[at] ^= flip;
            prop_assert!(Listener::default().hear(&note).is_err());
        }

        #[test]
        fn arbitrary_notes_never_panic(
            bodies in proptest::collection::vec(any::<[u8; CRC_AT - 4]>(), 1..8),
        ) {
            let mut listener = Listener::default();
            for body in bodies {
                let mut note = [0; NOTE_BYTES];
                note[..4].copy_from_slice(&MAGIC.to_le_bytes());
                note[4..CRC_AT].copy_from_slice(&body);
                note[4] %= 3;
                note[5] %= 64;
                let crc = crc32fast::hash(&note[..CRC_AT]);
                note[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
                if let Ok(Some(reason)) = listener.hear(&note) {
                    prop_assert!(reason.len() <= MAX_REASON_BYTES);
                }
            }
        }
    }
}
