//! One end of a link over RDMA: pushes post writes, polls look at flags.
//!
//! What the device reports is the completion thread's business.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;

use rustix::event::EventfdFlags;
use rustix::net::SendFlags;
use step3rt_core::ids::LaneId;

use crate::config::LinkSettings;
use crate::contract::{DownReason, Link, LinkEvent, LinkIdentity, PushError, SlotMemory};
use crate::frame::Frame;
use crate::lane::Lanes;
use crate::rdma::progress::Progress;
use crate::rdma::request::immediate;
use crate::rdma::wire::Wire;
use crate::reset_ask;
use crate::state::LinkState;

/// The thread only polls and makes system calls.
const THREAD_STACK_BYTES: usize = 256 * 1024;

/// What a link and its completion thread share. Freed with the last of them, so that neither uses
/// a queue pair that is gone.
pub(crate) struct Shared {
    pub(crate) wire: Wire,
    pub(crate) state: Arc<LinkState>,
    /// Says that the peer ended by ending itself.
    pub(crate) control: OwnedFd,
    /// Readable when the thread is to end.
    pub(crate) stop: OwnedFd,
    /// Per lane, the sequence of this end's last push.
    pub(crate) pushed: Box<[AtomicU64]>,
}

/// One end of a link over RDMA.
pub(crate) struct RdmaLink {
    lanes: Lanes,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    path: String,
    is_down_reported: bool,
}

impl RdmaLink {
    /// Starts the completion thread of a connected wire. One a link, as it sleeps while nothing
    /// comes and so costs a stack, and as a link then ends without a word to any other. It is left
    /// to the scheduler: an operator who isolates cores pins it by its name, `fabric-cq-…`.
    pub(crate) fn new(
        lanes: Lanes,
        (wire, path): (Wire, String),
        (control, state): (OwnedFd, Arc<LinkState>),
        settings: &LinkSettings,
    ) -> io::Result<Self> {
        let num_lanes = usize::from(lanes.terms.geometry.num_lanes);
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let shared = Arc::new(Shared {
            wire,
            state,
            control,
            stop: rustix::event::eventfd(0, flags)?,
            pushed: (0..num_lanes).map(|_| AtomicU64::new(0)).collect(),
        });
        let progress = Progress::new(Arc::clone(&shared), &lanes, settings);
        let thread = std::thread::Builder::new()
            .name(format!("fabric-cq-{}", lanes.terms.peer.instance))
            .stack_size(THREAD_STACK_BYTES)
            .spawn(move || progress.run())?;
        Ok(Self {
            lanes,
            shared,
            thread: Some(thread),
            path,
            is_down_reported: false,
        })
    }
}

impl Link for RdmaLink {
    fn peer(&self) -> LinkIdentity {
        self.lanes.terms.peer
    }

    fn fabric(&self) -> &'static str {
        "rdma"
    }

    fn path(&self) -> Option<&str> {
        Some(&self.path)
    }

    fn send_slot(&self, lane: LaneId) -> Option<Arc<dyn SlotMemory>> {
        self.lanes.outgoing.slot(lane)
    }

    fn receive_slot(&self, lane: LaneId) -> Option<Arc<dyn SlotMemory>> {
        self.lanes.incoming.slot(lane)
    }

    fn push(&mut self, lane: LaneId, frame: Frame) -> Result<(), PushError> {
        let Shared {
            wire,
            state,
            pushed,
            ..
        } = &*self.shared;
        if let Some(reason) = state.down() {
            return Err(PushError::Down(reason.clone()));
        }
        let sequence = self.lanes.begin_push(lane, frame)?;
        // Before the write: the reply may be here before the call returns.
        pushed[usize::from(lane.0)].store(sequence, Ordering::Release);
        let range = self.lanes.outgoing.frame_range(lane, frame.payload_bytes);
        wire.post_frame(lane, range, immediate(lane, sequence))
            .map_err(|error| {
                let reason = DownReason::Transport {
                    during: "posting a write",
                    os_error: error.raw_os_error().unwrap_or(0),
                };
                state.fail(reason.clone());
                PushError::Down(state.down().cloned().unwrap_or(reason))
            })
    }

    fn ask_reset(&mut self, reason: &str) -> io::Result<()> {
        let notes = reset_ask::encode(reason).concat();
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        match rustix::net::send(&self.shared.control, &notes, flags)? {
            sent if sent == notes.len() => Ok(()),
            _ => Err(io::ErrorKind::WouldBlock.into()),
        }
    }

    fn poll(&mut self, out: &mut Vec<LinkEvent>) {
        self.shared
            .state
            .poll_lanes(&mut self.lanes, &mut self.is_down_reported, out);
    }
}

impl Drop for RdmaLink {
    /// Waits until the last frames are acknowledged: at once, or, when the peer's host is gone, as long
    /// as the device repeats them, half a second.
    fn drop(&mut self) {
        // Fails only when the counter is full, which is readable as well.
        let _ = rustix::io::write(&self.shared.stop, &1_u64.to_ne_bytes());
        if self
            .thread
            .take()
            .is_some_and(|thread| thread.join().is_err())
        {
            tracing::error!(peer = %self.lanes.terms.peer.instance, "a link's thread panicked");
        }
    }
}
