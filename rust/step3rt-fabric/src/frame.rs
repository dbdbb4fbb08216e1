//! The 64-byte header that precedes every payload, on every fabric.
//!
//! It carries what is needed to refuse a frame of another incarnation, out of order or torn; it
//! never describes the payload beyond its length and number of tokens.

use step3rt_core::ids::{Epoch, InstanceId, LaneId};

/// What the producer says of a payload; the link adds the rest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame {
    /// The sender's step counter of this lane, echoed in replies.
    pub step: u64,
    /// Model layer, echoed in replies.
    pub layer: u16,
    /// Rows in the payload.
    pub num_tokens: u32,
    /// Bytes of the slot that are meant.
    pub payload_bytes: usize,
}

/// A received, checked header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameHeader {
    /// Which instance sent it.
    pub source: InstanceId,
    /// The sender's incarnation.
    pub epoch: Epoch,
    /// The lane it arrived on.
    pub lane: LaneId,
    /// Position in the lane's alternation, from 1.
    pub sequence: u64,
    /// As pushed.
    pub frame: Frame,
}
