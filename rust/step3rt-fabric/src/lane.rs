//! The alternation of each lane, and the checks that every frame must pass, whatever carries it.
//!
//! It never moves a payload and never waits.

use step3rt_core::ids::LaneId;

use crate::contract::{Geometry, LinkIdentity, PushError, Side};
use crate::frame::{Direction, Frame, FrameHeader, ProtocolError};
use crate::region::Region;

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

/// All lanes of one link at one end: their state and the slots of both directions.
pub(crate) struct Lanes {
    pub(crate) terms: LinkTerms,
    pub(crate) outgoing: Region,
    pub(crate) incoming: Region,
    alternations: Vec<Alternation>,
}

impl Lanes {
    pub(crate) fn new(terms: LinkTerms, outgoing: Region, incoming: Region) -> Self {
        let alternations = vec![Alternation::new(terms.side); terms.geometry.num_lanes.into()];
        Self {
            terms,
            outgoing,
            incoming,
            alternations,
        }
    }

    /// Checks a push, counts it and writes its header into the send slot's head, and returns its
    /// sequence number. What is left to the fabric is to bring it to the peer.
    pub(crate) fn begin_push(&mut self, lane: LaneId, frame: Frame) -> Result<u64, PushError> {
        let num_lanes = self.terms.geometry.num_lanes;
        let Some(alternation) = self.alternations.get_mut(usize::from(lane.0)) else {
            return Err(PushError::NoSuchLane { lane, num_lanes });
        };
        let (payload_bytes, slot_bytes) = (frame.payload_bytes, self.outgoing.slot_bytes());
        if payload_bytes > slot_bytes {
            return Err(PushError::TooLarge {
                payload_bytes,
                slot_bytes,
            });
        }
        if !alternation.has_credit() {
            return Err(PushError::NoCredit(lane));
        }
        alternation.pushed += 1;
        let checksum = || self.outgoing.payload_checksum(lane, payload_bytes);
        let header = FrameHeader {
            source: self.terms.local.instance,
            epoch: self.terms.local.epoch,
            direction: self.terms.side.sends(),
            lane,
            sequence: alternation.pushed,
            frame,
            payload_checksum: self.terms.payload_checksum.then(checksum),
        };
        self.outgoing.write_header(lane, &header.encode());
        Ok(alternation.pushed)
    }

    /// Takes the frame that was published to this end on a lane since the last call, if any.
    pub(crate) fn take(&mut self, lane: LaneId) -> Result<Option<FrameHeader>, ProtocolError> {
        let published = self.incoming.published(lane);
        let alternation = &mut self.alternations[usize::from(lane.0)];
        if published == alternation.received {
            return Ok(None);
        }
        let header = FrameHeader::decode(&self.incoming.read_header(lane))?;
        if header.lane != lane {
            return Err(ProtocolError::Lane {
                found: header.lane,
                expected: lane,
            });
        }
        if header.sequence != published {
            let (found, expected) = (header.sequence, published);
            return Err(ProtocolError::Sequence {
                lane,
                found,
                expected,
            });
        }
        self.terms.check_arrival(&header, alternation)?;
        self.incoming.verify_payload(&header)?;
        alternation.received += 1;
        Ok(Some(header))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credit_alternates_between_the_ends() {
        let mut attention = Alternation::new(Side::Initiator);
        let mut ffn = Alternation::new(Side::Responder);
        for sequence in 1..4 {
            assert!(attention.has_credit() && !ffn.has_credit());
            attention.pushed = sequence;
            assert!(!attention.has_credit());
            assert_eq!(ffn.check_arrival(LaneId(0), sequence), Ok(()));
            ffn.received = sequence;
            assert!(ffn.has_credit());
            ffn.pushed = sequence;
            assert!(!ffn.has_credit());
            assert_eq!(attention.check_arrival(LaneId(0), sequence), Ok(()));
            attention.received = sequence;
        }
    }

    #[test]
    fn an_arrival_out_of_turn_has_no_credit() {
        let lane = LaneId(1);
        let unasked = Alternation::new(Side::Initiator).check_arrival(lane, 1);
        assert_eq!(unasked, Err(ProtocolError::NoCredit { lane, found: 1 }));
        let unanswered = Alternation {
            side: Side::Responder,
            pushed: 4,
            received: 5,
        };
        let early = unanswered.check_arrival(lane, 6);
        assert_eq!(early, Err(ProtocolError::NoCredit { lane, found: 6 }));
        let repeated = unanswered.check_arrival(lane, 5);
        assert_eq!(
            repeated,
            Err(ProtocolError::Sequence {
                lane,
                found: 5,
                expected: 6
            })
        );
    }
}
