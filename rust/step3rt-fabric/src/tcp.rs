//! Links over TCP, for peers that share no memory: own frames, blocking threads, no gRPC.
//!
//! A receiver thread reads each frame straight into its slot, then sets the same flag that shared
//! memory has; from there on the two fabrics are one. A push is one system call, because header and
//! payload are contiguous in the slot. What the socket does not take at once is left to a sender
//! thread, so that a push never waits for the peer.
//!
//! Frames are neither encrypted nor authenticated: as for RDMA, the network between instances is
//! trusted.

use std::io::{self, Read};
use std::net::TcpStream;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

use step3rt_core::ids::LaneId;

use crate::contract::{DownReason, Link, LinkEvent, LinkIdentity, PushError, SlotMemory};
use crate::frame::{Frame, FrameHeader, HEADER_BYTES, ProtocolError};
use crate::lane::{Alternation, Lanes, LinkTerms};
use crate::region::Region;
use crate::state::LinkState;
use crate::tcp_socket::down_reason;

/// The threads only make system calls; the default of 2 MiB each would be waste for 64 peers.
const THREAD_STACK_BYTES: usize = 256 * 1024;

/// The slots of one end, made before the other is promised a link.
pub(crate) struct TcpSlots {
    outgoing: Region,
    incoming: Region,
}

impl TcpSlots {
    pub(crate) fn new(terms: &LinkTerms) -> io::Result<Self> {
        Ok(Self {
            outgoing: Region::private(&terms.geometry, terms.side.sends())?,
            incoming: Region::private(&terms.geometry, terms.side.receives())?,
        })
    }
}

/// One end of a link over TCP.
pub(crate) struct TcpLink {
    lanes: Lanes,
    state: Arc<LinkState>,
    socket: Arc<TcpStream>,
    /// Per lane, the sequence of this end's last push: the receiver's knowledge of credit.
    pushed: Arc<[AtomicU64]>,
    /// None only while the link is dropped.
    backlog: Option<SyncSender<Range<usize>>>,
    /// Frames in `backlog` or in the sender's hands; a push may only send by itself at zero.
    num_in_backlog: Arc<AtomicUsize>,
    threads: Vec<JoinHandle<()>>,
    is_down_reported: bool,
}

impl TcpLink {
    /// Starts the threads of a link on a socket whose handshake is over and that is prepared.
    pub(crate) fn new(
        terms: LinkTerms,
        TcpSlots { outgoing, incoming }: TcpSlots,
        stream: TcpStream,
        state: Arc<LinkState>,
    ) -> io::Result<Self> {
        let num_lanes = usize::from(terms.geometry.num_lanes);
        // A lane has one frame on its way at most; the head may be sent and not yet taken off.
        let (backlog, frames) = sync_channel(num_lanes + 1);
        let receiver = FrameReceiver {
            terms,
            incoming: incoming.clone(),
            received: vec![0; num_lanes],
            pushed: (0..num_lanes).map(|_| AtomicU64::new(0)).collect(),
            socket: Arc::new(stream),
            state: Arc::clone(&state),
        };
        let sender = FrameSender {
            outgoing: outgoing.clone(),
            frames,
            num_in_backlog: Arc::new(AtomicUsize::new(0)),
            socket: Arc::clone(&receiver.socket),
            state: Arc::clone(&state),
        };
        let mut link = Self {
            lanes: Lanes::new(terms, outgoing, incoming),
            state,
            socket: Arc::clone(&receiver.socket),
            pushed: Arc::clone(&receiver.pushed),
            backlog: Some(backlog),
            num_in_backlog: Arc::clone(&sender.num_in_backlog),
            threads: Vec::with_capacity(2),
            is_down_reported: false,
        };
        let peer = terms.peer.instance;
        link.threads
            .push(spawn(format!("fabric-rx-{peer}"), move || receiver.run())?);
        link.threads
            .push(spawn(format!("fabric-tx-{peer}"), move || sender.run())?);
        Ok(link)
    }

    /// Sends what the socket takes at once and leaves the rest to the sender thread.
    fn send(&self, mut frame: Range<usize>) -> Result<(), DownReason> {
        if self.num_in_backlog.load(Ordering::Acquire) == 0 {
            let mapping = self.lanes.outgoing.mapping();
            while !frame.is_empty() {
                match mapping.send(&*self.socket, frame.clone(), libc::MSG_DONTWAIT) {
                    Ok(num_bytes) => frame.start += num_bytes,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    Err(error) => return Err(down_reason("sending a frame", &error)),
                }
            }
            if frame.is_empty() {
                return Ok(());
            }
        }
        self.num_in_backlog.fetch_add(1, Ordering::Relaxed);
        let backlog = self.backlog.as_ref().expect("set until drop");
        // Full only if the peer answered a frame before it had all of it, or with the sender gone,
        // which has then said why.
        backlog
            .try_send(frame)
            .map_err(|_| DownReason::Protocol(ProtocolError::EarlyReply))
    }
}

fn spawn(name: String, body: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    std::thread::Builder::new()
        .name(name)
        .stack_size(THREAD_STACK_BYTES)
        .spawn(body)
}

impl Link for TcpLink {
    fn peer(&self) -> LinkIdentity {
        self.lanes.terms.peer
    }

    fn fabric(&self) -> &'static str {
        "tcp"
    }

    fn send_slot(&self, lane: LaneId) -> Option<Arc<dyn SlotMemory>> {
        self.lanes.outgoing.slot(lane)
    }

    fn receive_slot(&self, lane: LaneId) -> Option<Arc<dyn SlotMemory>> {
        self.lanes.incoming.slot(lane)
    }

    fn push(&mut self, lane: LaneId, frame: Frame) -> Result<(), PushError> {
        if let Some(reason) = self.state.down() {
            return Err(PushError::Down(reason.clone()));
        }
        let sequence = self.lanes.begin_push(lane, frame)?;
        // Before the bytes: the reply may be here before the system call returns.
        self.pushed[usize::from(lane.0)].store(sequence, Ordering::Release);
        let range = self.lanes.outgoing.frame_range(lane, frame.payload_bytes);
        self.send(range).map_err(|reason| {
            self.state.fail(reason.clone());
            PushError::Down(self.state.down().cloned().unwrap_or(reason))
        })
    }

    fn poll(&mut self, out: &mut Vec<LinkEvent>) {
        self.state
            .poll_lanes(&mut self.lanes, &mut self.is_down_reported, out);
    }
}

impl Drop for TcpLink {
    fn drop(&mut self) {
        // Ends both threads' system calls. Fails only when the peer was first.
        let _ = self.socket.shutdown(std::net::Shutdown::Both);
        self.backlog = None;
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!(peer = %self.lanes.terms.peer.instance, "a link's thread panicked");
            }
        }
    }
}

/// Reads frames into slots until the link ends.
pub(crate) struct FrameReceiver {
    pub(crate) terms: LinkTerms,
    pub(crate) incoming: Region,
    /// Per lane, the sequence of the last frame.
    pub(crate) received: Vec<u64>,
    pub(crate) pushed: Arc<[AtomicU64]>,
    pub(crate) socket: Arc<TcpStream>,
    pub(crate) state: Arc<LinkState>,
}

impl FrameReceiver {
    fn run(mut self) {
        loop {
            if let Err(reason) = self.receive_frame() {
                self.state.fail(reason);
                return;
            }
        }
    }

    pub(crate) fn receive_frame(&mut self) -> Result<(), DownReason> {
        let bytes = self.receive_header()?;
        let header = self.check(&bytes).map_err(DownReason::Protocol)?;
        let lane = header.lane;
        self.receive_payload(lane, header.frame.payload_bytes)?;
        self.incoming.write_header(lane, &bytes);
        self.incoming.publish(lane, header.sequence);
        self.received[usize::from(lane.0)] = header.sequence;
        self.state.ring();
        Ok(())
    }

    fn receive_header(&self) -> Result<[u8; HEADER_BYTES], DownReason> {
        let mut bytes = [0; HEADER_BYTES];
        let mut found = 0;
        while found < HEADER_BYTES {
            match (&*self.socket).read(&mut bytes[found..]) {
                Ok(0) if found == 0 => return Err(DownReason::PeerClosed),
                Ok(0) => return Err(short_frame(found, HEADER_BYTES)),
                Ok(num_bytes) => found += num_bytes,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(down_reason("receiving a header", &error)),
            }
        }
        Ok(bytes)
    }

    /// Checks everything before a byte is written into the slot: the owner may still be reading it.
    fn check(&self, bytes: &[u8; HEADER_BYTES]) -> Result<FrameHeader, ProtocolError> {
        let header = FrameHeader::decode(bytes)?;
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

    fn receive_payload(&self, lane: LaneId, payload_bytes: usize) -> Result<(), DownReason> {
        let frame = self.incoming.frame_range(lane, payload_bytes);
        let mut missing = frame.start + HEADER_BYTES..frame.end;
        while !missing.is_empty() {
            match self
                .incoming
                .mapping()
                .receive(&*self.socket, missing.clone())
            {
                Ok(0) => {
                    let found = HEADER_BYTES + payload_bytes - missing.len();
                    return Err(short_frame(found, HEADER_BYTES + payload_bytes));
                }
                Ok(num_bytes) => missing.start += num_bytes,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(down_reason("receiving a payload", &error)),
            }
        }
        Ok(())
    }
}

fn short_frame(found: usize, expected: usize) -> DownReason {
    DownReason::Protocol(ProtocolError::ShortFrame { found, expected })
}

/// Sends the rest of frames that the socket did not take at once, in order.
struct FrameSender {
    outgoing: Region,
    frames: Receiver<Range<usize>>,
    num_in_backlog: Arc<AtomicUsize>,
    socket: Arc<TcpStream>,
    state: Arc<LinkState>,
}

impl FrameSender {
    fn run(self) {
        while let Ok(mut frame) = self.frames.recv() {
            while !frame.is_empty() {
                match self
                    .outgoing
                    .mapping()
                    .send(&*self.socket, frame.clone(), 0)
                {
                    Ok(num_bytes) => frame.start += num_bytes,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => {
                        self.state.fail(down_reason("sending a frame", &error));
                        return;
                    }
                }
            }
            self.num_in_backlog.fetch_sub(1, Ordering::Release);
        }
    }
}
