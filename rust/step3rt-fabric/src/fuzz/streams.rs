//! Frames as they come over a socket, through the receiver of the TCP fabric.

use std::io::Write;
use std::net::{Shutdown, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::{MEND, PEER, byte, frames, mend, terms};
use crate::contract::{DownReason, Side};
use crate::doorbell::FutexDoorbell;
use crate::frame::{Direction, FrameHeader, HEADER_BYTES, ProtocolError};
use crate::lane::LinkTerms;
use crate::region::Region;
use crate::state::LinkState;
use crate::tcp::FrameReceiver;

pub(super) const SELECTOR: u8 = 1;

/// Fits a socket's buffer, so that one thread can write it and then read it.
const MAX_STREAM_BYTES: usize = 16 * 1024;

const IS_RESPONDER: u8 = 1;
const HAS_PUSHED: u8 = 2;
const ANSWERS: u8 = 4;

/// Every frame that arrives is the next one of the stream and allowed; the one that ends the link is
/// not, or not whole.
pub(super) fn run(mut data: &[u8]) {
    let flags = byte(&mut data);
    let side = if flags & IS_RESPONDER == 0 {
        Side::Initiator
    } else {
        Side::Responder
    };
    let terms = terms(side, 1 + (flags >> 3) % 4);
    let mut stream = data[..data.len().min(MAX_STREAM_BYTES)].to_vec();
    if flags & MEND != 0 {
        mend_headers(&mut stream, &terms);
    }
    // A responder has pushed nothing before it has received.
    let has_pushed = side == Side::Initiator && flags & HAS_PUSHED != 0;
    let mut link = Receiving::new(terms, &stream, has_pushed);
    loop {
        let verdict = link.verdict();
        match link.receiver.receive_frame() {
            Ok(()) => link.has_arrived(&verdict, flags & ANSWERS != 0),
            Err(reason) => return link.has_ended(verdict, &reason),
        }
    }
}

/// What must become of the next bytes, by the rules of the protocol.
#[derive(Debug, PartialEq)]
enum Verdict {
    End,
    Short { found: usize, expected: usize },
    Refused,
    Frame(FrameHeader),
}

struct Receiving<'a> {
    terms: LinkTerms,
    receiver: FrameReceiver,
    rest: &'a [u8],
    pushed: Arc<[AtomicU64]>,
    received: Vec<u64>,
}

impl<'a> Receiving<'a> {
    fn new(terms: LinkTerms, stream: &'a [u8], has_pushed: bool) -> Self {
        let (mut far, near) = UnixStream::pair().expect("a socket pair");
        far.write_all(stream).expect("fits the buffer");
        far.shutdown(Shutdown::Write).expect("connected");
        let num_lanes = terms.geometry.num_lanes;
        let pushed: Arc<[AtomicU64]> = (0..num_lanes)
            .map(|_| AtomicU64::new(u64::from(has_pushed)))
            .collect();
        let incoming = Region::private(&terms.geometry, terms.side.receives()).expect("memory");
        let (bell, _fd) = FutexDoorbell::create(0).expect("memory");
        let received = vec![0; num_lanes.into()];
        Self {
            terms,
            receiver: FrameReceiver {
                terms,
                incoming,
                received: received.clone(),
                pushed: Arc::clone(&pushed),
                // The receiver makes no call that only TCP understands.
                socket: Arc::new(TcpStream::from(OwnedFd::from(near))),
                state: Arc::new(LinkState::new(Arc::new(bell))),
            },
            rest: stream,
            pushed,
            received,
        }
    }

    fn verdict(&self) -> Verdict {
        let found = self.rest.len();
        let Some(header) = self.rest.first_chunk::<HEADER_BYTES>() else {
            let expected = HEADER_BYTES;
            return match found {
                0 => Verdict::End,
                _ => Verdict::Short { found, expected },
            };
        };
        let Ok(header) = FrameHeader::decode(header) else {
            return Verdict::Refused;
        };
        if !self.is_allowed(&header) {
            return Verdict::Refused;
        }
        let expected = HEADER_BYTES + header.frame.payload_bytes;
        if found < expected {
            return Verdict::Short { found, expected };
        }
        Verdict::Frame(header)
    }

    fn is_allowed(&self, header: &FrameHeader) -> bool {
        let Some(&received) = self.received.get(usize::from(header.lane.0)) else {
            return false;
        };
        let pushed = self.pushed[usize::from(header.lane.0)].load(Ordering::Relaxed);
        let (slot_bytes, is_due) = match self.terms.side {
            Side::Initiator => (self.terms.geometry.f2a_slot_bytes, pushed == received + 1),
            Side::Responder => (self.terms.geometry.a2f_slot_bytes, pushed == received),
        };
        let comes_from_the_peer = header.source == PEER.instance
            && header.epoch == PEER.epoch
            && header.direction == self.terms.side.receives();
        comes_from_the_peer
            && header.frame.payload_bytes <= slot_bytes
            && header.sequence == received + 1
            && is_due
    }

    fn has_arrived(&mut self, verdict: &Verdict, answers: bool) {
        let Verdict::Frame(header) = verdict else {
            panic!("a frame arrived where {verdict:?} was due");
        };
        let lane = usize::from(header.lane.0);
        let (bytes, rest) = self
            .rest
            .split_at(HEADER_BYTES + header.frame.payload_bytes);
        self.rest = rest;
        let incoming = &self.receiver.incoming;
        assert_eq!(incoming.read_header(header.lane), bytes[..HEADER_BYTES]);
        let mut payload = vec![0; header.frame.payload_bytes];
        let slot = incoming.slot(header.lane).expect("the lane exists");
        slot.read(&mut payload);
        assert_eq!(
            payload,
            bytes[HEADER_BYTES..],
            "a payload is as it was sent"
        );
        self.received[lane] += 1;
        self.check_flags();
        if answers {
            self.pushed[lane].fetch_add(1, Ordering::Relaxed);
        }
    }

    fn has_ended(&self, verdict: Verdict, reason: &DownReason) {
        self.check_flags();
        let is_right = match (verdict, reason) {
            (Verdict::End, DownReason::PeerClosed) => true,
            (
                Verdict::Short { found, expected },
                DownReason::Protocol(ProtocolError::ShortFrame {
                    found: said,
                    expected: awaited,
                }),
            ) => (found, expected) == (*said, *awaited),
            (Verdict::Refused, DownReason::Protocol(error)) => {
                !matches!(error, ProtocolError::ShortFrame { .. })
            }
            _ => false,
        };
        assert!(is_right, "the link ended with {reason} at {:?}", self.rest);
    }

    /// Only a whole frame is ever published.
    fn check_flags(&self) {
        for lane in self.receiver.incoming.lanes() {
            let published = self.receiver.incoming.published(lane);
            assert_eq!(published, self.received[usize::from(lane.0)]);
        }
    }
}

/// Rights the checksum of every header, as far as their lengths lead from one to the next.
fn mend_headers(stream: &mut [u8], terms: &LinkTerms) {
    let mut at = 0;
    while let Some(header) = stream
        .get_mut(at..)
        .and_then(<[u8]>::first_chunk_mut::<HEADER_BYTES>)
    {
        mend(header);
        let Ok(header) = FrameHeader::decode(header) else {
            return;
        };
        let payload_bytes = header.frame.payload_bytes;
        if payload_bytes > terms.geometry.slot_bytes(terms.side.receives()) {
            return;
        }
        at += HEADER_BYTES + payload_bytes;
    }
}

pub(super) fn seeds() -> Vec<Vec<u8>> {
    let stream = |direction, sequences: &[(u8, u64)]| {
        let frames = sequences.iter().map(|&(lane, sequence)| {
            let header = frames::header(direction, lane, sequence);
            [&header.encode()[..], &[0xa5; 24]].concat()
        });
        frames.collect::<Vec<_>>().concat()
    };
    let two_lanes = 1 << 3;
    let honest = stream(Direction::A2f, &[(0, 1), (1, 1), (0, 2), (1, 2)]);
    let replies = stream(Direction::F2a, &[(0, 1), (1, 1), (0, 2)]);
    let early = stream(Direction::A2f, &[(1, 1), (1, 2)]);
    let responder = two_lanes | IS_RESPONDER;
    [
        (responder | ANSWERS, &honest[..]),
        (responder | ANSWERS | MEND, &honest[..]),
        (responder | ANSWERS, &honest[..100]),
        (responder, &early[..]),
        (two_lanes | HAS_PUSHED | ANSWERS | MEND, &replies[..]),
        (two_lanes | MEND, &replies[..]),
        (IS_RESPONDER | ANSWERS | MEND, &honest[..]),
    ]
    .map(|(flags, stream)| [&[SELECTOR, flags][..], stream].concat())
    .to_vec()
}

#[cfg(test)]
mod tests {
    use step3rt_core::ids::LaneId;

    use super::*;

    #[test]
    fn an_honest_stream_arrives_whole() {
        let header = frames::header(Direction::A2f, 1, 1);
        let stream = [&header.encode()[..], &[7; 24]].concat();
        let mut link = Receiving::new(terms(Side::Responder, 2), &stream, false);
        assert_eq!(link.verdict(), Verdict::Frame(header));
        link.receiver.receive_frame().unwrap();
        link.has_arrived(&link.verdict(), false);
        assert_eq!(link.received, [0, 1]);
        assert_eq!(link.verdict(), Verdict::End);
        assert_eq!(LaneId(1), header.lane);
    }
}
