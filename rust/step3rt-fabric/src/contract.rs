//! What every fabric promises. A fabric is chosen per peer pair at the handshake; nothing above
//! this contract can tell which one it got.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use step3rt_core::ids::{Epoch, InstanceId, LaneId};
use thiserror::Error;

use crate::frame::{Direction, Frame, FrameHeader, ProtocolError};

/// Most lanes a link has. Three hide RDMA and two hide `NVLink`; this leaves room and bounds a poll.
pub const MAX_LANES: u8 = 32;

/// Largest slot. A BF16 micro-batch of 2048 tokens takes 28 MiB; this is 36 times that.
pub const MAX_SLOT_BYTES: usize = 1 << 30;

/// The sizes that both ends of a link must agree on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Micro-batch lanes, each with one slot per direction.
    pub num_lanes: u8,
    /// Capacity of an attention-to-FFN slot.
    pub a2f_slot_bytes: usize,
    /// Capacity of an FFN-to-attention slot.
    pub f2a_slot_bytes: usize,
}

impl Geometry {
    /// Checks the sizes against [`MAX_LANES`] and [`MAX_SLOT_BYTES`].
    pub fn validate(&self) -> Result<(), GeometryError> {
        if !(1..=MAX_LANES).contains(&self.num_lanes) {
            return Err(GeometryError::NumLanes(self.num_lanes));
        }
        for bytes in [self.a2f_slot_bytes, self.f2a_slot_bytes] {
            if !(1..=MAX_SLOT_BYTES).contains(&bytes) {
                return Err(GeometryError::SlotBytes(bytes));
            }
        }
        Ok(())
    }

    /// The least that the contract allows for as many lanes: for links that carry no payloads.
    pub(crate) fn without_payloads(&self) -> Self {
        Self {
            num_lanes: self.num_lanes,
            a2f_slot_bytes: 1,
            f2a_slot_bytes: 1,
        }
    }

    /// Capacity of the slots of `direction`.
    pub fn slot_bytes(&self, direction: Direction) -> usize {
        match direction {
            Direction::A2f => self.a2f_slot_bytes,
            Direction::F2a => self.f2a_slot_bytes,
        }
    }
}

impl fmt::Display for Geometry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            num_lanes,
            a2f_slot_bytes,
            f2a_slot_bytes,
        } = self;
        write!(
            f,
            "{num_lanes} lanes of {a2f_slot_bytes} bytes (A2F) and {f2a_slot_bytes} bytes (F2A)"
        )
    }
}

/// Why a [`Geometry`] is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum GeometryError {
    /// No lane, or more than [`MAX_LANES`].
    #[error("a link of {0} lanes is not possible: it has 1 to {MAX_LANES}. Change `num_lanes`")]
    NumLanes(u8),
    /// No byte, or more than [`MAX_SLOT_BYTES`].
    #[error(
        "a slot of {0} bytes is not possible: it has 1 to {MAX_SLOT_BYTES} bytes. Change \
         `max_tokens_per_micro_batch`"
    )]
    SlotBytes(usize),
}

/// Which end of the alternation this is. Attention instances initiate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Pushes first on every lane.
    Initiator,
    /// Replies, once per arrival.
    Responder,
}

impl Side {
    /// The direction of what this end pushes.
    pub fn sends(self) -> Direction {
        match self {
            Self::Initiator => Direction::A2f,
            Self::Responder => Direction::F2a,
        }
    }

    /// The direction of what arrives at this end.
    pub fn receives(self) -> Direction {
        self.other().sends()
    }

    /// The peer's side.
    #[must_use]
    pub fn other(self) -> Self {
        match self {
            Self::Initiator => Self::Responder,
            Self::Responder => Self::Initiator,
        }
    }
}

/// Names one end of a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LinkIdentity {
    /// The instance.
    pub instance: InstanceId,
    /// Its incarnation.
    pub epoch: Epoch,
}

/// Bytes of one slot at a fixed address for the life of the link.
///
/// Implementors keep the memory mapped for as long as any clone of the `Arc` lives, also after
/// the link is down.
pub trait SlotMemory: Send + Sync {
    /// First byte; aligned to 64.
    fn as_ptr(&self) -> *mut u8;
    /// Capacity.
    fn len(&self) -> usize;
    /// Copies `bytes` to the start of the slot, for small payloads and tests: tensors are written
    /// where they lie. Panics when they do not fit, and on a receive slot that is the peer's memory.
    fn write(&self, bytes: &[u8]);
    /// Copies the start of the slot to `bytes`. Panics when it has fewer.
    fn read(&self, bytes: &mut [u8]);
    /// Whether the slot has no capacity.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// One established link to a peer: per lane one send slot and one receive slot.
///
/// Owned by one thread; no call blocks for the peer.
pub trait Link: Send {
    /// Who is at the other end.
    fn peer(&self) -> LinkIdentity;

    /// The kind of fabric, for people: `"shm"`, `"rdma"`, `"tcp"`, `"sim"`. (`"cuda_ipc"` is a link of
    /// one of these that carries no payloads.)
    fn fabric(&self) -> &'static str;

    /// By which of several devices and addresses it goes, and whether it is encrypted, for people.
    fn path(&self) -> Option<&str> {
        None
    }

    /// Where the next outgoing payload of `lane` is written. Written by the caller only while the
    /// lane has credit. `None` when the link has no such lane.
    fn send_slot(&self, lane: LaneId) -> Option<Arc<dyn SlotMemory>>;

    /// Where an arrived payload of `lane` lies, from [`LinkEvent::Arrived`] until the next
    /// [`Link::push`] on that lane. `None` when the link has no such lane.
    ///
    /// For reading only: over shared memory it is the peer's slot, mapped without the right to
    /// write, and a store into it is a segmentation fault.
    fn receive_slot(&self, lane: LaneId) -> Option<Arc<dyn SlotMemory>>;

    /// Publishes the first `frame.payload_bytes` bytes of the send slot to the peer.
    fn push(&mut self, lane: LaneId, frame: Frame) -> Result<(), PushError>;

    /// Asks the peer's owner to link anew; the link itself goes on. For the accepting end, which cannot
    /// connect. Never blocks.
    fn ask_reset(&mut self, reason: &str) -> io::Result<()> {
        let _ = reason;
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Appends what has happened since the last call. Never blocks. After `Down` it appends
    /// nothing more.
    fn poll(&mut self, out: &mut Vec<LinkEvent>);
}

/// What a link reports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LinkEvent {
    /// A checked frame lies in the receive slot of its lane.
    Arrived(FrameHeader),
    /// The peer's owner asks for a new link in the place of this one, and says why. Once at most.
    ResetAsked(String),
    /// The link is over; a new one needs a new handshake.
    Down(DownReason),
}

/// Why a link ended.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum DownReason {
    /// The peer's process ended or closed the link.
    #[error("peer closed the link")]
    PeerClosed,
    /// The peer broke the protocol; nothing of the offending frame was used.
    #[error("protocol violation by the peer: {0}")]
    Protocol(ProtocolError),
    /// The operating system reported a failure.
    #[error("transport failure while {during}: {}", std::io::Error::from_raw_os_error(*.os_error))]
    Transport {
        /// What was being done.
        during: &'static str,
        /// The `errno`.
        os_error: i32,
    },
    /// What came was not encrypted by the peer, or the keys are used up.
    #[error("the link's encryption failed: {0}")]
    Encryption(String),
    /// The peer came back, and its new link took the place of this one.
    #[error("replaced by a new link of epoch {0}")]
    Replaced(Epoch),
    /// One of the ends asked for a new link in its place, and said why.
    #[error("reset: {0}")]
    Reset(String),
    /// This end closed it.
    #[error("closed by this end")]
    Closed,
}

/// Why a push was refused. The slot's content is untouched.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum PushError {
    /// The lane's last push is not answered yet (initiator), or nothing arrived to answer.
    #[error(
        "lane {0} has no credit: its last frame is not answered, or nothing arrived to answer. Push \
         after the next arrival on it"
    )]
    NoCredit(LaneId),
    /// The lane does not exist in the link's geometry.
    #[error("lane {lane} does not exist: the link has {num_lanes}. Use one below {num_lanes}")]
    NoSuchLane {
        /// What was asked.
        lane: LaneId,
        /// What there is.
        num_lanes: u8,
    },
    /// More bytes than the slot holds.
    #[error(
        "payload of {payload_bytes} bytes exceeds the slot of {slot_bytes}. Push fewer tokens or raise \
         `max_tokens_per_micro_batch`"
    )]
    TooLarge {
        /// What was asked.
        payload_bytes: usize,
        /// What there is.
        slot_bytes: usize,
    },
    /// There is no link to this instance.
    #[error("instance {0} is not linked. Connect it first")]
    NotLinked(InstanceId),
    /// The link is down.
    #[error("link is down: {0}")]
    Down(DownReason),
}

/// Where one process sleeps until any of its links (or its control session) has news.
///
/// A counter that everybody who publishes something for this process increments. To lose no
/// wake-up: read [`Doorbell::current`], poll everything, then wait for the counter to leave the
/// value read.
pub trait Doorbell: Send + Sync {
    /// The counter.
    fn current(&self) -> u32;
    /// Increments the counter and wakes the sleeper.
    fn ring(&self);
    /// Sleeps until the counter differs from `seen` or `timeout` has passed; true if it differs. A
    /// signal does not end it: who must react to signals waits in slices.
    fn wait(&self, seen: u32, timeout: Duration) -> bool;
}
