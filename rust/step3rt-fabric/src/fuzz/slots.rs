//! Slots that a peer writes at any time, as over shared memory: headers, payloads and flags.

use step3rt_core::ids::LaneId;

use super::{MEND, PEER, byte, bytes, frames, mend, terms};
use crate::contract::{PushError, Side};
use crate::frame::{Frame, FrameHeader, HEADER_BYTES};
use crate::lane::{Lanes, LinkTerms};
use crate::region::Region;

pub(super) const SELECTOR: u8 = 2;

/// More would only repeat what fewer do.
const MAX_ACTS: usize = 64;

const WRITE_BYTES: u8 = 0;
const WRITE_HONEST: u8 = 1;
const PUBLISH: u8 = 2;
const TAKE: u8 = 3;
const PUSH: u8 = 4;
const PAYLOAD: u8 = 5;

/// The peer acts, or the owner does; each act is a byte, of which the low bits are the kind, the
/// next the lane.
pub(super) fn run(mut data: &[u8]) {
    let side = match byte(&mut data) % 2 {
        0 => Side::Initiator,
        _ => Side::Responder,
    };
    let mut link = Shared::new(terms(side, 4));
    for _ in 0..MAX_ACTS {
        if data.is_empty() || link.is_down {
            break;
        }
        let act = byte(&mut data);
        link.act(act, &mut data);
    }
}

struct Shared {
    lanes: Lanes,
    /// The peer's end of the same memory.
    theirs: Region,
    pushed: [u64; 4],
    received: [u64; 4],
    is_down: bool,
}

impl Shared {
    fn new(terms: LinkTerms) -> Self {
        let (sends, receives) = (terms.side.sends(), terms.side.receives());
        let outgoing = Region::private(&terms.geometry, sends).expect("memory");
        let theirs = Region::private(&terms.geometry, receives).expect("memory");
        Self {
            lanes: Lanes::new(terms, outgoing, theirs.clone()),
            theirs,
            pushed: [0; 4],
            received: [0; 4],
            is_down: false,
        }
    }

    fn act(&mut self, act: u8, data: &mut &[u8]) {
        let (kind, lane) = (act & 7, LaneId(act >> 3 & 3));
        let at = usize::from(lane.0);
        match kind {
            WRITE_BYTES => {
                let mut header: [u8; HEADER_BYTES] = bytes(data);
                if act & MEND != 0 {
                    mend(&mut header);
                }
                self.theirs.write_header(lane, &header);
            }
            // An honest header but for what one byte changes.
            WRITE_HONEST => {
                let sequence = self.received[at] + 1;
                let direction = self.lanes.terms.side.receives();
                let mut header = frames::header(direction, lane.0, sequence);
                if act & MEND != 0 {
                    let sum = self.theirs.payload_checksum(lane, 24);
                    header.payload_checksum = Some(sum);
                }
                let mut header = header.encode();
                let place = usize::from(byte(data));
                if let Some(value) = header.get_mut(place) {
                    *value ^= byte(data);
                    mend(&mut header);
                }
                self.theirs.write_header(lane, &header);
                self.theirs.publish(lane, sequence);
            }
            PUBLISH => {
                let sequence = u64::from_le_bytes(bytes(data));
                self.theirs.publish(lane, sequence);
            }
            PAYLOAD => {
                let slot = self.theirs.slot(lane).expect("the lane exists");
                slot.write(&bytes::<16>(data));
            }
            TAKE => self.take(lane),
            PUSH => self.push(lane, usize::from(byte(data))),
            _ => {}
        }
    }

    fn take(&mut self, lane: LaneId) {
        let at = usize::from(lane.0);
        let published = self.theirs.published(lane);
        let header = FrameHeader::decode(&self.theirs.read_header(lane)).ok();
        let due = header.filter(|header| self.is_due(header, lane, published));
        match self.lanes.take(lane) {
            Ok(None) => assert_eq!(published, self.received[at], "a frame was passed over"),
            Ok(taken) => {
                assert!(taken.is_some() && taken == due, "{taken:?} was taken");
                self.received[at] += 1;
            }
            Err(error) => {
                assert_ne!(published, self.received[at], "{error} without a frame");
                assert_eq!(due, None, "{error}");
                self.is_down = true;
            }
        }
    }

    /// Whether the protocol allows this frame now.
    fn is_due(&self, header: &FrameHeader, lane: LaneId, published: u64) -> bool {
        let at = usize::from(lane.0);
        let (pushed, received) = (self.pushed[at], self.received[at]);
        let side = self.lanes.terms.side;
        let is_in_turn = match side {
            Side::Initiator => pushed == received + 1,
            Side::Responder => pushed == received,
        };
        let payload_bytes = header.frame.payload_bytes;
        (header.source, header.epoch) == (PEER.instance, PEER.epoch)
            && (header.direction, header.lane) == (side.receives(), lane)
            && (header.sequence, header.sequence) == (published, received + 1)
            && is_in_turn
            && payload_bytes <= self.theirs.slot_bytes()
            && header
                .payload_checksum
                .is_none_or(|sum| sum == self.theirs.payload_checksum(lane, payload_bytes))
    }

    fn push(&mut self, lane: LaneId, payload_bytes: usize) {
        let at = usize::from(lane.0);
        let frame = Frame {
            step: 0,
            layer: 0,
            num_tokens: 1,
            payload_bytes,
        };
        let may_push = match self.lanes.terms.side {
            Side::Initiator => self.pushed[at] == self.received[at],
            Side::Responder => self.pushed[at] + 1 == self.received[at],
        };
        let slot_bytes = self.lanes.outgoing.slot_bytes();
        match self.lanes.begin_push(lane, frame) {
            Ok(sequence) => {
                assert!(may_push && payload_bytes <= slot_bytes);
                self.pushed[at] += 1;
                assert_eq!(sequence, self.pushed[at]);
            }
            Err(PushError::NoCredit(_)) => assert!(!may_push),
            Err(PushError::TooLarge { .. }) => assert!(payload_bytes > slot_bytes),
            Err(error) => panic!("{error}"),
        }
    }
}

pub(super) fn seeds() -> Vec<Vec<u8>> {
    let nothing = u8::MAX; // no place in a header
    let answer = [WRITE_HONEST, nothing, TAKE, PUSH, 24];
    let ask = [PUSH, 24, WRITE_HONEST, nothing, TAKE];
    let summed = [
        PAYLOAD, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16,
    ];
    let header = frames::header(crate::frame::Direction::A2f, 0, 1).encode();
    let raw = [
        &[WRITE_BYTES | MEND][..],
        &header,
        &[PUBLISH, 1, 0, 0, 0, 0, 0, 0, 0, TAKE],
    ];
    vec![
        [&[SELECTOR, 1][..], &answer, &answer, &answer].concat(),
        [&[SELECTOR, 0][..], &ask, &ask, &ask].concat(),
        [
            &[SELECTOR, 1][..],
            &summed,
            &[WRITE_HONEST | MEND, nothing, TAKE],
        ]
        .concat(),
        [&[SELECTOR, 1][..], &raw.concat()].concat(),
        [&[SELECTOR, 1][..], &answer[..3], &answer].concat(), // comes before its turn
        vec![SELECTOR, 1, WRITE_HONEST, 32, 200, TAKE],       // too long
    ]
}
