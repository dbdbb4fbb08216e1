//! What a link asks of its device, and what an answer means.
//!
//! Numbers and words only; `wire` posts, `progress` takes the completions.

use std::io;

use step3rt_core::ids::LaneId;

use crate::contract::DownReason;
use crate::rdma::layout::{self, Completion};

/// What a request was, as its completion tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Request {
    Frame(LaneId),
    Receive(LaneId),
    Probe(LaneId),
    /// Part of a frame before its last; reported only when it fails.
    Chunk(LaneId),
}

impl Request {
    /// What the device hands back with the completion.
    pub(crate) fn id(self) -> u64 {
        let (kind, lane) = match self {
            Self::Frame(lane) => (0, lane),
            Self::Receive(lane) => (1, lane),
            Self::Probe(lane) => (2, lane),
            Self::Chunk(lane) => (3, lane),
        };
        kind << 8 | u64::from(lane.0)
    }

    /// None for an id that nothing here has.
    pub(crate) fn of(completion: &Completion) -> Option<Self> {
        let lane = LaneId(u8::try_from(completion.wr_id & 0xff).ok()?);
        match completion.wr_id >> 8 {
            0 => Some(Self::Frame(lane)),
            1 => Some(Self::Receive(lane)),
            2 => Some(Self::Probe(lane)),
            3 => Some(Self::Chunk(lane)),
            _ => None,
        }
    }
}

/// Bits of a sequence that travel in the immediate, below the lane. What is wrong with a frame that
/// is 2^24 late shows in its header.
const SEQUENCE_BITS: u32 = 24;
/// The part of a sequence that an immediate has.
pub(crate) const SEQUENCE_MASK: u64 = (1 << SEQUENCE_BITS) - 1;

/// What tells the receiver which frame has come.
pub(crate) fn immediate(lane: LaneId, sequence: u64) -> u32 {
    let low = u32::try_from(sequence & SEQUENCE_MASK).expect("masked to 24 bits");
    u32::from(lane.0) << SEQUENCE_BITS | low
}

/// What a failed request means, in words and as an `errno`.
pub(crate) fn reason_of(status: u32) -> (&'static str, i32) {
    match status {
        layout::WC_RETRY_EXC_ERR => (
            "waiting for the peer's device to acknowledge",
            libc::ETIMEDOUT,
        ),
        layout::WC_RNR_RETRY_EXC_ERR => ("writing to a peer that expects nothing", libc::EPROTO),
        layout::WC_REM_ACCESS_ERR => ("writing to slots that the peer has withdrawn", libc::EACCES),
        layout::WC_WR_FLUSH_ERR => ("using a queue pair that is down", libc::ECONNABORTED),
        _ => ("writing to the peer's slots", libc::EIO),
    }
}

/// The end of a link that a refused call means.
pub(crate) fn failed(during: &'static str, error: &io::Error) -> DownReason {
    DownReason::Transport {
        during,
        os_error: error.raw_os_error().unwrap_or(libc::EIO),
    }
}
