//! What every fabric promises. A fabric is chosen per peer pair at the handshake; nothing above
//! this contract can tell which one it got.

use std::sync::Arc;
use std::time::Duration;

use step3rt_core::ids::{Epoch, InstanceId, LaneId};
use thiserror::Error;

use crate::frame::{Frame, FrameHeader};

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

/// Which end of the alternation this is. Attention instances initiate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Pushes first on every lane.
    Initiator,
    /// Replies, once per arrival.
    Responder,
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

    /// The kind of fabric, for people: `"shm"`, `"tcp"`, `"sim"`.
    fn fabric(&self) -> &'static str;

    /// Where the next outgoing payload of `lane` is written. Written by the caller only while the
    /// lane has credit.
    fn send_slot(&self, lane: LaneId) -> Arc<dyn SlotMemory>;

    /// Where an arrived payload of `lane` lies, from [`LinkEvent::Arrived`] until the next
    /// [`Link::push`] on that lane.
    fn receive_slot(&self, lane: LaneId) -> Arc<dyn SlotMemory>;

    /// Publishes the first `frame.payload_bytes` bytes of the send slot to the peer.
    fn push(&mut self, lane: LaneId, frame: Frame) -> Result<(), PushError>;

    /// Appends what has happened since the last call. Never blocks. After `Down` it appends
    /// nothing more.
    fn poll(&mut self, out: &mut Vec<LinkEvent>);
}

/// What a link reports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LinkEvent {
    /// A checked frame lies in the receive slot of its lane.
    Arrived(FrameHeader),
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
    Protocol(String),
    /// The operating system reported a failure.
    #[error("transport failure: {0}")]
    Transport(String),
    /// This end closed it.
    #[error("closed by this end")]
    Closed,
}

/// Why a push was refused. The slot's content is untouched.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum PushError {
    /// The lane's last push is not answered yet (initiator), or nothing arrived to answer.
    #[error("lane {0} has no credit")]
    NoCredit(LaneId),
    /// The lane does not exist in the link's geometry.
    #[error("lane {lane} does not exist: the link has {num_lanes} lanes")]
    NoSuchLane {
        /// What was asked.
        lane: LaneId,
        /// What there is.
        num_lanes: u8,
    },
    /// More bytes than the slot holds.
    #[error("payload of {payload_bytes} bytes exceeds the slot of {slot_bytes}")]
    TooLarge {
        /// What was asked.
        payload_bytes: usize,
        /// What there is.
        slot_bytes: usize,
    },
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
    /// Sleeps until the counter differs from `seen` or `timeout` has passed; true if it differs.
    fn wait(&self, seen: u32, timeout: Duration) -> bool;
}
