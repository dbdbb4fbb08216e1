//! The alternation of one lane, and the checks that every arriving frame must pass.
//!
//! Pure state; it never touches memory or sockets, so that all fabrics refuse the same things.

use step3rt_core::ids::LaneId;

use crate::contract::{Geometry, LinkIdentity, PushError, Side};
use crate::frame::{Direction, Frame, FrameHeader, ProtocolError};

/// How far a lane has come. The initiator's pushes and the responder's replies have the same
/// sequence numbers, from 1.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Alternation {
    pub(crate) side: Side,
    /// Sequence of the last push of this end.
    pub(crate) pushed: u64,
    /// Sequence of the last arrival at this end.
    pub(crate) received: u64,
}

impl Alternation {
    pub(crate) fn new(side: Side) -> Self {
        Self {
            side,
            pushed: 0,
            received: 0,
        }
    }

    /// Whether this end may push now.
    pub(crate) fn has_credit(&self) -> bool {
        match self.side {
            Side::Initiator => self.pushed == self.received,
            Side::Responder => self.pushed + 1 == self.received,
        }
    }

    /// Whether a frame of `sequence` may arrive now.
    fn check_arrival(&self, lane: LaneId, sequence: u64) -> Result<(), ProtocolError> {
        let expected = self.received + 1;
        if sequence != expected {
            return Err(ProtocolError::Sequence {
                lane,
                found: sequence,
                expected,
            });
        }
        // The initiator awaits a reply exactly when it has no credit. The responder may get the
        // next frame once it has answered the last one, that is also when it has no credit.
        if self.has_credit() {
            return Err(ProtocolError::NoCredit {
                lane,
                found: sequence,
            });
        }
        Ok(())
    }
}

/// What a link's two ends agreed on at the handshake.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LinkTerms {
    pub(crate) local: LinkIdentity,
    pub(crate) peer: LinkIdentity,
    pub(crate) side: Side,
    pub(crate) geometry: Geometry,
    pub(crate) payload_checksum: bool,
}

impl LinkTerms {
    /// Checks a push before anything is touched.
    pub(crate) fn check_push(
        &self,
        lane: LaneId,
        frame: &Frame,
        lanes: &[Alternation],
    ) -> Result<(), PushError> {
        let Some(alternation) = lanes.get(usize::from(lane.0)) else {
            return Err(PushError::NoSuchLane {
                lane,
                num_lanes: self.geometry.num_lanes,
            });
        };
        let slot_bytes = self.geometry.slot_bytes(self.side.sends());
        if frame.payload_bytes > slot_bytes {
            return Err(PushError::TooLarge {
                payload_bytes: frame.payload_bytes,
                slot_bytes,
            });
        }
        if alternation.has_credit() {
            Ok(())
        } else {
            Err(PushError::NoCredit(lane))
        }
    }

    /// The header of a push.
    pub(crate) fn header(&self, lane: LaneId, sequence: u64, frame: Frame) -> FrameHeader {
        FrameHeader {
            source: self.local.instance,
            epoch: self.local.epoch,
            direction: self.side.sends(),
            lane,
            sequence,
            frame,
            payload_checksum: None,
        }
    }

    /// Checks an arrived header in the order from "not for us" to "not now".
    pub(crate) fn check_arrival(
        &self,
        header: &FrameHeader,
        alternation: &Alternation,
    ) -> Result<(), ProtocolError> {
        let expected: Direction = self.side.receives();
        if header.direction != expected {
            return Err(ProtocolError::Direction {
                found: header.direction,
                expected,
            });
        }
        if header.source != self.peer.instance {
            let (found, expected) = (header.source, self.peer.instance);
            return Err(ProtocolError::Source { found, expected });
        }
        if header.epoch != self.peer.epoch {
            let (found, expected) = (header.epoch, self.peer.epoch);
            return Err(ProtocolError::Epoch { found, expected });
        }
        let slot_bytes = self.geometry.slot_bytes(expected);
        if header.frame.payload_bytes > slot_bytes {
            let payload_bytes = header.frame.payload_bytes as u64;
            return Err(ProtocolError::Oversize {
                payload_bytes,
                slot_bytes,
            });
        }
        alternation.check_arrival(header.lane, header.sequence)
    }
}
