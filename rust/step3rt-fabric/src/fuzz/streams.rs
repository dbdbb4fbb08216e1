//! Frames as they come over a socket, through the receiver of the TCP fabric.

use std::io::Write;
use std::net::{Shutdown, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::{MEND, PEER, byte, bytes, frames, mend, terms};
use crate::contract::{DownReason, Side};
use crate::frame::{Direction, FrameHeader, HEADER_BYTES, ProtocolError};
use crate::lane::LinkTerms;
use crate::region::Region;
use crate::reset_ask::{self, Listener, MAX_REASON_BYTES, NOTE_BYTES};
use crate::stream::Stream;
use crate::tcp_receiver::{FrameReceiver, Received};
use crate::tcp_socket::FrameSocket;

pub(super) const SELECTOR: u8 = 1;

/// Fits a socket's buffer, so that one thread can write it and then read it.
const MAX_STREAM_BYTES: usize = 16 * 1024;

const IS_RESPONDER: u8 = 1;
const HAS_PUSHED: u8 = 2;
const ANSWERS: u8 = 4;

/// `flags`, how much of the stream comes first, and the stream, of which the rest comes once all of
/// that is read. Every frame that arrives is the next one and allowed; what ends the link is not, or
/// not whole. A request for a new link is heard as it was sent.
pub(super) fn run(mut data: &[u8]) {
    let flags = byte(&mut data);
    let cut = usize::from(u16::from_le_bytes(bytes(&mut data)));
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
    let mut link = Receiving::new(terms, &stream, cut, has_pushed);
    while link.advance(flags & ANSWERS != 0) {}
}

/// What must become of the bytes that are here, by the rules of the protocol.
#[derive(Debug, PartialEq)]
enum Verdict {
    /// There are none.
    End,
    Short {
        found: usize,
        expected: usize,
    },
    Refused,
    Frame(FrameHeader),
    Note,
}

struct Receiving<'a> {
    terms: LinkTerms,
    receiver: FrameReceiver,
    socket: FrameSocket,
    incoming: Region,
    far: UnixStream,
    stream: &'a [u8],
    /// What is sent and was not received as a whole yet.
    here: &'a [u8],
    /// What is not sent yet; once nothing is, the stream ends.
    to_come: Option<&'a [u8]>,
    pushed: Arc<[AtomicU64]>,
    received: Vec<u64>,
    listener: Listener,
    /// The reason so far, by the rules.
    heard: Vec<u8>,
}

impl<'a> Receiving<'a> {
    fn new(terms: LinkTerms, stream: &'a [u8], cut: usize, has_pushed: bool) -> Self {
        let (mut far, near) = UnixStream::pair().expect("a socket pair");
        let (here, to_come) = stream.split_at(cut.min(stream.len()));
        far.write_all(here).expect("fits the buffer");
        let num_lanes = terms.geometry.num_lanes;
        let pushed: Arc<[AtomicU64]> = (0..num_lanes)
            .map(|_| AtomicU64::new(u64::from(has_pushed)))
            .collect();
        let incoming = Region::private(&terms.geometry, terms.side.receives()).expect("memory");
        let near = Stream::Plain(TcpStream::from(OwnedFd::from(near)));
        Self {
            terms,
            receiver: FrameReceiver::new(terms, incoming.clone(), Arc::clone(&pushed)),
            socket: FrameSocket::without_options(near).expect("a socket"),
            incoming,
            far,
            stream,
            here,
            to_come: Some(to_come),
            pushed,
            received: vec![0; num_lanes.into()],
            listener: Listener::default(),
            heard: Vec::new(),
        }
    }

    /// Makes the receiver's next call; whether the link is up after it.
    fn advance(&mut self, answers: bool) -> bool {
        let verdict = self.verdict();
        let outcome = self.receiver.receive(&self.socket);
        match outcome {
            Ok(Received::Part) => {
                assert_ne!(verdict, Verdict::End, "bytes of nothing");
            }
            Ok(Received::Nothing) => self.has_waited(&verdict),
            Ok(Received::Frame) => self.has_arrived(&verdict, answers),
            Ok(Received::Note(note)) => return self.has_asked(&verdict, &note),
            Err(reason) => {
                self.has_ended(verdict, &reason);
                return false;
            }
        }
        self.check_flags();
        true
    }

    fn verdict(&self) -> Verdict {
        let found = self.here.len();
        let Some(header) = self.here.first_chunk::<HEADER_BYTES>() else {
            let expected = HEADER_BYTES;
            return match found {
                0 => Verdict::End,
                _ => Verdict::Short { found, expected },
            };
        };
        if header.starts_with(b"S3RA") {
            return Verdict::Note;
        }
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

    /// Nothing came: rightly, if what is here is no whole frame, and more may come.
    fn has_waited(&mut self, verdict: &Verdict) {
        assert!(
            matches!(verdict, Verdict::End | Verdict::Short { .. }),
            "nothing arrived where {verdict:?} was due"
        );
        let to_come = self.to_come.take();
        let to_come = to_come.expect("a stream that has ended is not awaited");
        self.far.write_all(to_come).expect("fits the buffer");
        self.far.shutdown(Shutdown::Write).expect("connected");
        // The two lie one behind the other.
        self.here = &self.stream[self.stream.len() - self.here.len() - to_come.len()..];
    }

    fn has_arrived(&mut self, verdict: &Verdict, answers: bool) {
        let Verdict::Frame(header) = verdict else {
            panic!("a frame arrived where {verdict:?} was due");
        };
        let lane = usize::from(header.lane.0);
        let (bytes, here) = self
            .here
            .split_at(HEADER_BYTES + header.frame.payload_bytes);
        self.here = here;
        let incoming = &self.incoming;
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
        if answers {
            self.pushed[lane].fetch_add(1, Ordering::Relaxed);
        }
    }

    /// A note came; whether the link is up after what it says.
    fn has_asked(&mut self, verdict: &Verdict, note: &[u8; NOTE_BYTES]) -> bool {
        assert_eq!(*verdict, Verdict::Note);
        let (bytes, here) = self.here.split_at(NOTE_BYTES);
        assert_eq!(note, bytes, "a note is as it was sent");
        self.here = here;
        self.check_flags();
        let due = self.hear(note);
        let outcome = self.listener.hear(note);
        match (&due, &outcome) {
            (Ok(due), Ok(reason)) => {
                assert_eq!(due, reason);
                true
            }
            (Err(is_damaged), Err(error)) => {
                let says_damaged = matches!(error, ProtocolError::HeaderChecksum { .. });
                assert!(says_damaged || *error == ProtocolError::Chatter);
                assert_eq!(*is_damaged, says_damaged);
                false
            }
            _ => panic!("{outcome:?} of a note where {due:?} was due"),
        }
    }

    /// What a note means by the rules: the reason, if it is the last part; or whether it is damaged,
    /// if it is not one that an end would send.
    fn hear(&mut self, note: &[u8; NOTE_BYTES]) -> Result<Option<String>, bool> {
        let (body, sum) = note.split_at(NOTE_BYTES - 4);
        if *sum != crc32fast::hash(body).to_le_bytes() {
            return Err(true);
        }
        let (more, len, text) = (body[4], usize::from(body[5]), &body[8..]);
        let has_room = self.heard.len() + len <= MAX_REASON_BYTES;
        if more > 1 || !(1..=text.len()).contains(&len) || !has_room {
            return Err(false);
        }
        self.heard.extend_from_slice(&text[..len]);
        if more == 1 {
            return Ok(None);
        }
        let reason = String::from_utf8(std::mem::take(&mut self.heard));
        reason.map(Some).map_err(|_| false)
    }

    fn has_ended(&self, verdict: Verdict, reason: &DownReason) {
        self.check_flags();
        let is_over = self.to_come.is_none();
        let is_right = match (verdict, reason) {
            (Verdict::End, DownReason::PeerClosed) => is_over,
            (
                Verdict::Short { found, expected },
                DownReason::Protocol(ProtocolError::ShortFrame {
                    found: said,
                    expected: awaited,
                }),
            ) => is_over && (found, expected) == (*said, *awaited),
            (Verdict::Refused, DownReason::Protocol(error)) => {
                !matches!(error, ProtocolError::ShortFrame { .. })
            }
            _ => false,
        };
        assert!(is_right, "the link ended with {reason} at {:?}", self.here);
    }

    /// Only a whole frame is ever published.
    fn check_flags(&self) {
        for lane in self.incoming.lanes() {
            let published = self.incoming.published(lane);
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
        if reset_ask::is_note(header) {
            at += NOTE_BYTES;
            continue;
        }
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
    let notes = reset_ask::encode(&"lane 1 timed out, ".repeat(20)).concat();
    let asking = [&replies[..88], &notes, &replies[88..]].concat();
    let mut damaged = notes.clone();
    damaged[9] ^= 1;
    let mut too_long = notes[..NOTE_BYTES].to_vec();
    too_long[5] = 53;
    let mut no_text = reset_ask::encode("no text").concat();
    no_text[8] = 0xff;
    let initiator = two_lanes | HAS_PUSHED | ANSWERS;
    [
        (responder | ANSWERS, u16::MAX, &honest[..]),
        (responder | ANSWERS | MEND, 30, &honest[..]),
        (responder | ANSWERS, 100, &honest[..]),
        (responder | ANSWERS, 80, &honest[..100]),
        (responder, 88, &early[..]),
        (initiator | MEND, 0, &replies[..]),
        (two_lanes | MEND, 0, &replies[..]),
        (IS_RESPONDER | ANSWERS | MEND, 0, &honest[..]),
        (initiator, 200, &asking[..]),
        (initiator | MEND, 0, &asking[..]),
        (initiator, 0, &damaged[..]),
        (initiator | MEND, 0, &damaged[..]),
        (initiator | MEND, 0, &too_long[..]),
        (initiator | MEND, 0, &no_text[..]),
        (initiator, 0, &[&notes[..], &notes].concat()[..]),
        (initiator | MEND, 0, &notes[..NOTE_BYTES].repeat(6)[..]),
    ]
    .map(|(flags, cut, stream)| {
        let [low, high] = u16::to_le_bytes(cut);
        [&[SELECTOR, flags, low, high][..], stream].concat()
    })
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
        let mut link = Receiving::new(terms(Side::Responder, 2), &stream, stream.len(), false);
        assert_eq!(link.verdict(), Verdict::Frame(header));
        while link.received == [0, 0] {
            assert!(link.advance(false));
        }
        assert_eq!(link.received, [0, 1]);
        assert_eq!(link.verdict(), Verdict::End);
        assert_eq!(LaneId(1), header.lane);
    }

    #[test]
    fn a_request_for_a_new_link_is_heard_between_frames() {
        let stream = reset_ask::encode("lane 1 timed out").concat();
        let mut link = Receiving::new(terms(Side::Responder, 2), &stream, 10, false);
        assert!(link.advance(false) && link.advance(false) && link.advance(false));
        assert!(link.here.is_empty() && link.heard.is_empty());
        assert!(!link.advance(false), "the stream has ended");
    }
}
