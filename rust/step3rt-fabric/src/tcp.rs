//! Links over TCP, for peers that share no memory: own frames, no gRPC.
//!
//! A frame is read straight into its slot, then the same flag is set that shared memory has; from
//! there on the two fabrics are one. A push is one system call, because header and payload are
//! contiguous in the slot. What the socket does not take at once follows when it has room, so that a
//! push never waits for the peer. Who reads and who sends the rest: see `sockets`.
//!
//! What lies between the frames and the socket, if anything, is the `stream`'s business. Without TLS
//! frames are neither encrypted nor authenticated: as for RDMA, the network is trusted.

use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, TryLockError};

use step3rt_core::ids::LaneId;

use crate::contract::{DownReason, Link, LinkEvent, LinkIdentity, PushError, SlotMemory};
use crate::frame::{Frame, ProtocolError};
use crate::lane::{Lanes, LinkTerms};
use crate::region::Region;
use crate::sockets::{Place, Sockets, Transfer};
use crate::state::LinkState;
use crate::tcp_receiver::{FrameReceiver, Received};
use crate::tcp_socket::{FrameSocket, down_reason};

/// System calls in one direction before the next socket has its turn. Some, because bytes come in
/// parts while the peer still sends; few, because whoever waits may have news already.
const MAX_CALLS_PER_TURN: usize = 4;

/// Names, among what waits for room, a request for a new link; no lane has this number.
const NOTES: LaneId = LaneId(u8::MAX);

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

/// One end of a link over TCP, as its owner has it.
pub(crate) struct TcpLink {
    lanes: Lanes,
    wire: Arc<Wire>,
    is_down_reported: bool,
}

/// What the owner of a link shares with the threads that move its bytes.
struct Wire {
    socket: FrameSocket,
    outgoing: Region,
    /// Per lane, the sequence of this end's last push: the receiver's knowledge of credit.
    pushed: Arc<[AtomicU64]>,
    receiver: Mutex<FrameReceiver>,
    backlog: Mutex<Backlog>,
    state: Arc<LinkState>,
    sockets: Arc<Sockets>,
    /// Set before the first push.
    place: OnceLock<Place>,
}

/// What is left of frames that the socket did not take at once, in order.
struct Backlog {
    frames: VecDeque<(LaneId, Range<usize>)>,
    /// Whether the backlog is sent on as soon as the socket has room.
    wants_room: bool,
}

impl TcpLink {
    /// A link on a socket whose handshake is over and that is prepared. Its bytes move with those of
    /// `sockets`.
    pub(crate) fn new(
        terms: LinkTerms,
        TcpSlots { outgoing, incoming }: TcpSlots,
        socket: FrameSocket,
        (state, sockets): (Arc<LinkState>, &Arc<Sockets>),
    ) -> io::Result<Self> {
        let num_lanes = usize::from(terms.geometry.num_lanes);
        let pushed: Arc<[_]> = (0..num_lanes).map(|_| AtomicU64::new(0)).collect();
        let receiver = FrameReceiver::new(terms, incoming.clone(), Arc::clone(&pushed));
        let backlog = Backlog {
            // A lane has one frame on its way at most, and there is one request for a new link.
            frames: VecDeque::with_capacity(num_lanes + 1),
            wants_room: false,
        };
        let wire = Arc::new(Wire {
            socket,
            outgoing: outgoing.clone(),
            pushed,
            receiver: Mutex::new(receiver),
            backlog: Mutex::new(backlog),
            state,
            sockets: Arc::clone(sockets),
            place: OnceLock::new(),
        });
        let place = sockets.add(&wire.socket, Arc::clone(&wire) as Arc<dyn Transfer>)?;
        wire.place.set(place).expect("set here and nowhere else");
        if wire.socket.holds_more() {
            // Came behind the handshake, and taken off the socket with it.
            wire.advance();
        }
        Ok(Self {
            lanes: Lanes::new(terms, outgoing, incoming),
            wire,
            is_down_reported: false,
        })
    }
}

impl Link for TcpLink {
    fn peer(&self) -> LinkIdentity {
        self.lanes.terms.peer
    }

    fn fabric(&self) -> &'static str {
        "tcp"
    }

    fn path(&self) -> Option<&str> {
        self.wire.socket.encryption()
    }

    fn send_slot(&self, lane: LaneId) -> Option<Arc<dyn SlotMemory>> {
        self.lanes.outgoing.slot(lane)
    }

    fn receive_slot(&self, lane: LaneId) -> Option<Arc<dyn SlotMemory>> {
        self.lanes.incoming.slot(lane)
    }

    fn push(&mut self, lane: LaneId, frame: Frame) -> Result<(), PushError> {
        let Wire { state, pushed, .. } = &*self.wire;
        if let Some(reason) = state.down() {
            return Err(PushError::Down(reason.clone()));
        }
        let sequence = self.lanes.begin_push(lane, frame)?;
        // Before the bytes: the reply may be here before the system call returns.
        pushed[usize::from(lane.0)].store(sequence, Ordering::Release);
        let range = self.lanes.outgoing.frame_range(lane, frame.payload_bytes);
        self.wire.send(lane, range).map_err(|reason| {
            state.fail(reason.clone());
            PushError::Down(state.down().cloned().unwrap_or(reason))
        })
    }

    fn ask_reset(&mut self, reason: &str) -> io::Result<()> {
        if let Some(notes) = self.lanes.outgoing.write_notes(reason) {
            // As a frame is: one that is on its way goes before.
            self.wire.send(NOTES, notes).map_err(io::Error::other)?;
        }
        Ok(())
    }

    fn poll(&mut self, out: &mut Vec<LinkEvent>) {
        let state = Arc::clone(&self.wire.state);
        state.poll_lanes(&mut self.lanes, &mut self.is_down_reported, out);
    }
}

impl Drop for TcpLink {
    fn drop(&mut self) {
        let Wire {
            socket,
            sockets,
            place,
            ..
        } = &*self.wire;
        sockets.remove(socket, *place.get().expect("set when the link was made"));
        // Now and not when the last thread lets go of the socket: the peer must see the end.
        socket.shut_down();
    }
}

impl Wire {
    /// Sends what the socket takes at once and leaves the rest for when it has room.
    fn send(&self, lane: LaneId, mut frame: Range<usize>) -> Result<(), DownReason> {
        let mut backlog = lock(&self.backlog);
        if backlog.frames.iter().any(|(other, _)| *other == lane) {
            // Credit without having had the frame.
            return Err(DownReason::Protocol(ProtocolError::EarlyReply));
        }
        if backlog.frames.is_empty() {
            while !frame.is_empty() && self.send_part(&mut frame)? {}
            if frame.is_empty() {
                return Ok(());
            }
        }
        backlog.frames.push_back((lane, frame));
        self.set_wants_room(&mut backlog, true)
    }

    /// Sends on what the socket did not take before, if anything.
    fn send_backlog(&self) -> Result<(), DownReason> {
        let Some(mut backlog) = try_lock(&self.backlog) else {
            return Ok(());
        };
        for _ in 0..MAX_CALLS_PER_TURN {
            let Some((_, frame)) = backlog.frames.front_mut() else {
                break;
            };
            if !self.send_part(frame)? {
                return Ok(());
            }
            if frame.start == frame.end {
                backlog.frames.pop_front();
            }
        }
        let wants_room = !backlog.frames.is_empty();
        self.set_wants_room(&mut backlog, wants_room)
    }

    /// Sends once; false when the socket has no room.
    fn send_part(&self, frame: &mut Range<usize>) -> Result<bool, DownReason> {
        match self.socket.send(self.outgoing.mapping(), frame.clone()) {
            Ok(num_bytes) => {
                frame.start += num_bytes;
                Ok(true)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(error) => Err(down_reason("sending a frame", &error)),
        }
    }

    fn set_wants_room(&self, backlog: &mut Backlog, wants_room: bool) -> Result<(), DownReason> {
        if backlog.wants_room == wants_room {
            return Ok(());
        }
        backlog.wants_room = wants_room;
        let place = *self.place.get().expect("set before the first push");
        let set = self.sockets.set_wants_room(&self.socket, place, wants_room);
        set.map_err(|error| down_reason("awaiting room for a frame", &error))
    }

    fn receive(&self) -> Result<(), DownReason> {
        let Some(mut receiver) = try_lock(&self.receiver) else {
            return Ok(());
        };
        // Whatever is here that the socket does not tell of is taken as well: nobody will be called for
        // it. That is less than one call takes from the socket.
        let mut is_turn_over = false;
        for call in 1.. {
            match receiver.receive(&self.socket)? {
                Received::Nothing => break,
                Received::Part => {}
                Received::Frame => {
                    self.state.ring();
                    is_turn_over = true;
                }
                Received::Note(note) => self.state.hear(&note).map_err(DownReason::Protocol)?,
            }
            is_turn_over |= call >= MAX_CALLS_PER_TURN;
            if is_turn_over && !self.socket.holds_more() {
                break;
            }
        }
        Ok(())
    }
}

impl Transfer for Wire {
    fn advance(&self) {
        // Received first: what the peer sent before it closed still arrives.
        let moved = match self.state.down() {
            Some(reason) => Err(reason.clone()),
            None => self.receive().and_then(|()| self.send_backlog()),
        };
        if let Err(reason) = moved {
            self.state.fail(reason);
            self.sockets.silence(&self.socket);
        }
    }
}

/// A panic elsewhere leaves a torn frame at worst, which the receiver or the peer finds.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// None while another thread is at it.
fn try_lock<T>(mutex: &Mutex<T>) -> Option<MutexGuard<'_, T>> {
    match mutex.try_lock() {
        Ok(guard) => Some(guard),
        Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
        Err(TryLockError::WouldBlock) => None,
    }
}
