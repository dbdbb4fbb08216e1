//! Reads frames from a socket into slots, in whatever parts they come.
//!
//! It never blocks, and writes no byte into a slot before the frame's header is found good.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use step3rt_core::ids::LaneId;

use crate::contract::DownReason;
use crate::frame::{FrameHeader, HEADER_BYTES, ProtocolError};
use crate::lane::{Alternation, LinkTerms};
use crate::region::Region;
use crate::reset_ask::{self, NOTE_BYTES};
use crate::tcp_socket::{FrameSocket, down_reason};

/// What one call to [`FrameReceiver::receive`] has brought.
pub(crate) enum Received {
    /// No byte: all that came is read.
    Nothing,
    /// Bytes of a frame that is not complete.
    Part,
    /// The rest of a frame, which is published.
    Frame,
    /// Part of the peer's request for a new link.
    Note([u8; NOTE_BYTES]),
}

pub(crate) struct FrameReceiver {
    terms: LinkTerms,
    incoming: Region,
    /// Per lane, the sequence of the last frame.
    received: Vec<u64>,
    /// Per lane, the sequence of this end's last push.
    pushed: Arc<[AtomicU64]>,
    header: [u8; HEADER_BYTES],
    num_header_bytes: usize,
    /// Of the frame whose header is complete.
    payload: Option<Payload>,
}

struct Payload {
    header: FrameHeader,
    missing: Range<usize>,
}

impl FrameReceiver {
    pub(crate) fn new(terms: LinkTerms, incoming: Region, pushed: Arc<[AtomicU64]>) -> Self {
        Self {
            terms,
            incoming,
            received: vec![0; pushed.len()],
            pushed,
            header: [0; HEADER_BYTES],
            num_header_bytes: 0,
            payload: None,
        }
    }

    /// Makes one system call.
    pub(crate) fn receive(&mut self, socket: &FrameSocket) -> Result<Received, DownReason> {
        let received = match &self.payload {
            None => self.receive_header(socket)?,
            Some(_) => self.receive_payload(socket)?,
        };
        match &self.payload {
            Some(payload) if payload.missing.is_empty() => {
                let header = payload.header;
                self.publish(&header);
                Ok(Received::Frame)
            }
            _ => Ok(received),
        }
    }

    fn receive_header(&mut self, socket: &FrameSocket) -> Result<Received, DownReason> {
        let found = self.num_header_bytes;
        match socket.receive_header(&mut self.header[found..]) {
            Ok(0) if found == 0 => return Err(DownReason::PeerClosed),
            Ok(0) => return Err(short_frame(found, HEADER_BYTES)),
            Ok(num_bytes) => self.num_header_bytes += num_bytes,
            Err(error) => return nothing_yet("receiving a header", &error),
        }
        if self.num_header_bytes == HEADER_BYTES {
            if reset_ask::is_note(&self.header) {
                self.num_header_bytes = 0;
                return Ok(Received::Note(self.header));
            }
            let header = self.check().map_err(DownReason::Protocol)?;
            let payload_bytes = header.frame.payload_bytes;
            let frame = self.incoming.frame_range(header.lane, payload_bytes);
            let missing = frame.start + HEADER_BYTES..frame.end;
            self.payload = Some(Payload { header, missing });
        }
        Ok(Received::Part)
    }

    fn receive_payload(&mut self, socket: &FrameSocket) -> Result<Received, DownReason> {
        let Some(Payload { header, missing }) = &mut self.payload else {
            return Ok(Received::Nothing);
        };
        let expected = HEADER_BYTES + header.frame.payload_bytes;
        match socket.receive(self.incoming.mapping(), missing.clone()) {
            Ok(0) => Err(short_frame(expected - missing.len(), expected)),
            Ok(num_bytes) => {
                missing.start += num_bytes;
                Ok(Received::Part)
            }
            Err(error) => nothing_yet("receiving a payload", &error),
        }
    }

    /// Checks everything before a byte is written into the slot: the owner may still be reading it.
    fn check(&self) -> Result<FrameHeader, ProtocolError> {
        let header = FrameHeader::decode(&self.header)?;
        let lane = usize::from(header.lane.0);
        let Some(&received) = self.received.get(lane) else {
            let expected = LaneId(self.terms.geometry.num_lanes);
            return Err(ProtocolError::Lane {
                found: header.lane,
                expected,
            });
        };
        let pushed = self.pushed[lane].load(Ordering::Acquire);
        let alternation = Alternation {
            side: self.terms.side,
            pushed,
            received,
        };
        self.terms.check_arrival(&header, &alternation)?;
        Ok(header)
    }

    fn publish(&mut self, header: &FrameHeader) {
        self.incoming.write_header(header.lane, &self.header);
        self.incoming.publish(header.lane, header.sequence);
        self.received[usize::from(header.lane.0)] = header.sequence;
        self.num_header_bytes = 0;
        self.payload = None;
    }
}

fn nothing_yet(during: &'static str, error: &io::Error) -> Result<Received, DownReason> {
    match error.kind() {
        io::ErrorKind::WouldBlock => Ok(Received::Nothing),
        _ => Err(down_reason(during, error)),
    }
}

fn short_frame(found: usize, expected: usize) -> DownReason {
    DownReason::Protocol(ProtocolError::ShortFrame { found, expected })
}
