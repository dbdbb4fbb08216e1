//! A link's two ends with small slots, and what models do with them.

use step3rt_core::ids::LaneId;

use crate::contract::{Link, Side};
use crate::lane::Lanes;
use crate::region::Region;
use crate::two_sides::pair::{End, Made, PAYLOAD_BYTES, frame, terms};

/// The attention instance's end and the FFN instance's.
pub(super) fn pair(num_lanes: u8) -> (End, End) {
    let sides = [Side::Initiator, Side::Responder];
    let [attention, ffn] = sides.map(|side| Made::new(terms(side, num_lanes)));
    (attention.meet(&ffn), ffn.meet(&attention))
}

impl End {
    /// Writes and pushes a payload of `value`'s bytes.
    pub(super) fn push(&mut self, lane: LaneId, value: u64) {
        let slot = self.link.send_slot(lane).unwrap();
        slot.write(&value.to_ne_bytes());
        self.link.push(lane, frame()).unwrap();
    }

    /// The payload of an arrival.
    pub(super) fn payload(&self, lane: LaneId) -> u64 {
        let mut bytes = [0; PAYLOAD_BYTES];
        self.link.receive_slot(lane).unwrap().read(&mut bytes);
        u64::from_ne_bytes(bytes)
    }
}

impl Made {
    /// As [`Made::meet`], but only the lanes, for a process that stops in the middle of a push.
    pub(super) fn lanes(&self, peer: &Self) -> Lanes {
        let geometry = &self.terms.geometry;
        let incoming = Region::open(&peer.fds[0], geometry, self.terms.side.receives()).unwrap();
        Lanes::new(self.terms, self.outgoing.clone(), incoming)
    }
}
