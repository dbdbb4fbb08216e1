//! The verbs objects of one link: protection domain, queue pairs, registered slots, completions.
//!
//! It never decides whether a frame is due. Queue pairs are destroyed before memory is
//! deregistered, and that before it is unmapped: after its queue pair is gone no device writes.

#![allow(
    unsafe_code,
    reason = "calls a C library; with `library`, all of the crate's verbs"
)]

use std::ffi::c_int;
use std::io;
use std::ops::Range;
use std::os::fd::{BorrowedFd, RawFd};
use std::ptr::{NonNull, null_mut};
use std::sync::Arc;

use step3rt_core::ids::LaneId;

use crate::rdma::RdmaError;
use crate::rdma::layout::{
    self, Completion, CompletionChannel, CompletionQueue, Context, MemoryRegion, ProtectionDomain,
    QueueDepths, QueuePair, QueuePairAttributes, QueuePairInit, ReceiveRequest, ScatterGather,
    SendRequest,
};
use crate::rdma::library::{OpenDevice, non_null, zero};
use crate::rdma::registered::Registered;
use crate::rdma::request::Request;
use crate::rdma::route::{INIT_MASK, RECEIVE_MASK, Route, SEND_MASK};

/// Receives that wait on a queue pair. A lane has one frame on its way at most; the second covers
/// the moment between an arrival and its receive being posted anew.
pub(crate) const RECEIVES_PER_LANE: u32 = 2;

/// Sends besides a frame's: a probe, and one to spare.
const SPARE_SENDS: u32 = 2;

/// What a link's objects are made for.
pub(crate) struct WireConfig {
    pub(crate) num_lanes: u8,
    /// Longest message of the port, in bytes; not 0.
    pub(crate) max_message_bytes: usize,
    /// Longest frame, header included.
    pub(crate) max_frame_bytes: usize,
    /// Read by this end's device.
    pub(crate) outgoing: Registered,
    /// Written by the peer's device.
    pub(crate) incoming: Registered,
}

/// All verbs objects of one link. Dropped in part when a later one cannot be made.
pub(crate) struct Wire {
    queue_pairs: Vec<NonNull<QueuePair>>,
    regions: Vec<NonNull<MemoryRegion>>,
    cq: Option<NonNull<CompletionQueue>>,
    channel: Option<NonNull<CompletionChannel>>,
    pd: NonNull<ProtectionDomain>,
    config: WireConfig,
    /// The peer's first slot and its key, from [`Wire::connect`].
    pub(super) remote: (u64, u32),
    device: Arc<OpenDevice>,
}

// SAFETY: verbs are thread-safe by the library's contract; the objects live until Drop, which needs
// the last owner.
unsafe impl Send for Wire {}
// SAFETY: as for Send.
unsafe impl Sync for Wire {}

impl Wire {
    /// Makes everything but the connection.
    pub(crate) fn new(device: Arc<OpenDevice>, config: WireConfig) -> Result<Self, RdmaError> {
        let verbs = device.verbs;
        // SAFETY: an open context.
        let pd = non_null(unsafe { (verbs.alloc_pd)(device.context.as_ptr()) })
            .map_err(|error| device.failed("making a protection domain", error))?;
        let mut wire = Self {
            queue_pairs: Vec::with_capacity(config.num_lanes.into()),
            regions: Vec::with_capacity(2),
            cq: None,
            channel: None,
            pd,
            config,
            remote: (0, 0),
            device,
        };
        wire.register()?;
        wire.create_queues()?;
        Ok(wire)
    }

    fn register(&mut self) -> Result<(), RdmaError> {
        let write = layout::ACCESS_LOCAL_WRITE | layout::ACCESS_REMOTE_WRITE;
        for (memory, access) in [(&self.config.outgoing, 0), (&self.config.incoming, write)] {
            let (start, len) = (memory.start(), memory.range.len());
            // SAFETY: `start` has checked the range, and `config` keeps it mapped until the region is
            // deregistered in Drop.
            let region = non_null(unsafe {
                (self.device.verbs.reg_mr)(self.pd.as_ptr(), start.cast(), len, access)
            });
            let region = region.map_err(|error| match error.raw_os_error() {
                Some(libc::ENOMEM | libc::EPERM) => RdmaError::Memlock {
                    len_bytes: len,
                    error,
                },
                _ => self.device.failed("registering slots", error),
            })?;
            self.regions.push(region);
        }
        Ok(())
    }

    fn create_queues(&mut self) -> Result<(), RdmaError> {
        let (verbs, context) = (self.device.verbs, self.device.context.as_ptr());
        // SAFETY: an open context.
        let channel = non_null(unsafe { (verbs.create_comp_channel)(context) })
            .map_err(|error| self.device.failed("making a completion channel", error))?;
        self.channel = Some(channel);
        rustix::io::ioctl_fionbio(self.fd(), true).map_err(|error| {
            self.device
                .failed("making a completion channel", error.into())
        })?;
        let sends = u32::try_from(self.num_chunks(self.config.max_frame_bytes)).unwrap_or(u32::MAX);
        let depths = QueueDepths {
            max_send_wr: sends.saturating_add(SPARE_SENDS),
            max_recv_wr: RECEIVES_PER_LANE,
            max_send_sge: 1,
            max_recv_sge: 1,
            max_inline_data: 0,
        };
        // Room for each request of each queue: all of them are reported when a queue fails.
        let num_requests = depths.max_send_wr.saturating_add(RECEIVES_PER_LANE);
        let num_completions = num_requests.saturating_mul(self.config.num_lanes.into());
        let num_completions = c_int::try_from(num_completions).unwrap_or(c_int::MAX);
        // SAFETY: an open context and its channel; no vector but the first is promised to exist.
        let cq = non_null(unsafe {
            (verbs.create_cq)(context, num_completions, null_mut(), channel.as_ptr(), 0)
        })
        .map_err(|error| self.device.failed("making a completion queue", error))?;
        self.cq = Some(cq);
        for _ in 0..self.config.num_lanes {
            let mut init = QueuePairInit {
                qp_context: null_mut(),
                send_cq: cq.as_ptr(),
                recv_cq: cq.as_ptr(),
                srq: null_mut(),
                cap: depths,
                qp_type: layout::QPT_RC,
                sq_sig_all: 0,
            };
            // SAFETY: objects of one context, all alive; `init` is read and its depths written.
            let queue_pair =
                non_null(unsafe { (verbs.create_qp)(self.pd.as_ptr(), &raw mut init) })
                    .map_err(|error| self.device.failed("making a queue pair", error))?;
            self.queue_pairs.push(queue_pair);
        }
        Ok(())
    }

    /// The number of each lane's queue pair.
    pub(crate) fn queue_pair_numbers(&self) -> impl Iterator<Item = u32> {
        // SAFETY: each is alive, and its number never changes.
        self.queue_pairs
            .iter()
            .map(|queue_pair| unsafe { queue_pair.as_ref() }.qp_num)
    }

    /// The address and key by which a peer writes into this end's slots.
    pub(crate) fn incoming_key(&self) -> (u64, u32) {
        let memory = &self.config.incoming;
        // SAFETY: alive until Drop; its key never changes.
        let key = unsafe { self.regions[1].as_ref() }.rkey;
        (memory.address(memory.range.start), key)
    }

    /// Connects each lane's queue pair with the peer's and posts its receives. The peer may write
    /// from now on.
    pub(crate) fn connect(
        &mut self,
        route: &Route,
        remote_queue_pairs: &[u32],
        remote: (u64, u32),
    ) -> Result<(), RdmaError> {
        self.remote = remote;
        for (at, &remote_number) in (0..self.config.num_lanes).zip(remote_queue_pairs) {
            let lane = LaneId(at);
            self.modify(lane, &route.to_init(), INIT_MASK)?;
            for _ in 0..RECEIVES_PER_LANE {
                self.post_receive(lane)
                    .map_err(|error| self.device.failed("posting a receive", error))?;
            }
            self.modify(lane, &route.to_receive(remote_number), RECEIVE_MASK)?;
            self.modify(lane, &route.to_send(), SEND_MASK)?;
        }
        Ok(())
    }

    fn modify(
        &self,
        lane: LaneId,
        attributes: &QueuePairAttributes,
        mask: c_int,
    ) -> Result<(), RdmaError> {
        let mut attributes = *attributes;
        // SAFETY: alive until Drop; `attributes` is only read.
        zero(unsafe {
            (self.device.verbs.modify_qp)(self.queue_pair(lane).as_ptr(), &raw mut attributes, mask)
        })
        .map_err(|error| self.device.failed("connecting a queue pair", error))
    }

    /// Takes every queue pair down: what was posted is reported as flushed, and nothing more is
    /// written or read by the device.
    pub(crate) fn take_down(&self) {
        for lane in (0..self.config.num_lanes).map(LaneId) {
            let attributes = QueuePairAttributes {
                qp_state: layout::QPS_ERR,
                ..QueuePairAttributes::default()
            };
            if let Err(error) = self.modify(lane, &attributes, layout::QP_STATE) {
                tracing::warn!(%error, "a queue pair cannot be taken down");
            }
        }
    }

    /// Waits for a frame of the peer. A write with immediate brings its own address.
    pub(crate) fn post_receive(&self, lane: LaneId) -> io::Result<()> {
        let mut request = ReceiveRequest {
            wr_id: Request::Receive(lane).id(),
            next: null_mut(),
            sg_list: null_mut(),
            num_sge: 0,
        };
        let queue_pair = self.queue_pair(lane).as_ptr();
        let post = self.ops().post_recv.ok_or(io::ErrorKind::Unsupported)?;
        let mut refused = null_mut();
        // SAFETY: the queue pair is alive; the request is copied before the call returns.
        zero(unsafe { post(queue_pair, &raw mut request, &raw mut refused) })
    }

    /// Writes `range` of the outgoing mapping into the peer's slots, at the same place from their
    /// start, and tells the peer `immediate` when all of it is there.
    pub(crate) fn post_frame(
        &self,
        lane: LaneId,
        mut range: Range<usize>,
        immediate: u32,
    ) -> io::Result<()> {
        self.config.outgoing.check(&range);
        // A queue pair keeps its order, so the last write arrives last and tells of all.
        while range.len() > self.config.max_message_bytes {
            let chunk = range.start..range.start + self.config.max_message_bytes;
            range.start = chunk.end;
            self.post_write(Request::Chunk(lane), &chunk, 0)?;
        }
        self.post_write(Request::Frame(lane), &range, immediate)
    }

    /// Writes nothing to the peer; completes if its device is there, whatever its process does.
    pub(crate) fn post_probe(&self, lane: LaneId) -> io::Result<()> {
        let start = self.config.outgoing.range.start;
        self.post_write(Request::Probe(lane), &(start..start), 0)
    }

    /// Posts one write of `range`; a frame's (last) one brings the peer `immediate`.
    fn post_write(&self, request: Request, range: &Range<usize>, immediate: u32) -> io::Result<()> {
        let (lane, opcode, send_flags) = match request {
            Request::Frame(lane) => (lane, layout::WR_RDMA_WRITE_WITH_IMM, layout::SEND_SIGNALED),
            Request::Chunk(lane) => (lane, layout::WR_RDMA_WRITE, 0),
            Request::Probe(lane) => (lane, layout::WR_RDMA_WRITE, layout::SEND_SIGNALED),
            Request::Receive(_) => return Err(io::ErrorKind::InvalidInput.into()),
        };
        let offset = (range.start - self.config.outgoing.range.start) as u64;
        let mut local = ScatterGather {
            addr: self.config.outgoing.address(range.start),
            length: u32::try_from(range.len()).map_err(|_| io::ErrorKind::InvalidInput)?,
            // SAFETY: alive until Drop; its key never changes.
            lkey: unsafe { self.regions[0].as_ref() }.lkey,
        };
        let mut send = SendRequest {
            wr_id: request.id(),
            next: null_mut(),
            sg_list: if range.is_empty() {
                null_mut()
            } else {
                &raw mut local
            },
            num_sge: c_int::from(!range.is_empty()),
            opcode,
            send_flags,
            imm_data: immediate.to_be(),
            // Whatever the peer said: its device refuses what is not its slots.
            remote_addr: self.remote.0.wrapping_add(offset),
            rkey: self.remote.1,
            unused: [0; 9],
        };
        let queue_pair = self.queue_pair(lane).as_ptr();
        let post = self.ops().post_send.ok_or(io::ErrorKind::Unsupported)?;
        let mut refused = null_mut();
        // SAFETY: the queue pair is alive; request and list are copied before the call returns; the
        // memory that they name is registered, which the device checks, and mapped until Drop.
        zero(unsafe { post(queue_pair, &raw mut send, &raw mut refused) })
    }

    /// Takes completions; how many. Never blocks.
    pub(crate) fn poll(&self, completions: &mut [Completion]) -> io::Result<usize> {
        let poll = self.ops().poll_cq.ok_or(io::ErrorKind::Unsupported)?;
        let room = c_int::try_from(completions.len()).unwrap_or(c_int::MAX);
        // SAFETY: the queue is alive, and there is room for as many as are asked for.
        let found = unsafe { poll(self.cq(), room, completions.as_mut_ptr()) };
        usize::try_from(found).map_err(|_| io::Error::from_raw_os_error(libc::EIO))
    }

    /// Makes the next completion an event of [`Wire::fd`]; one that is there already may not be.
    pub(crate) fn arm(&self) -> io::Result<()> {
        let arm = self.ops().req_notify_cq.ok_or(io::ErrorKind::Unsupported)?;
        // SAFETY: the queue is alive.
        zero(unsafe { arm(self.cq(), 0) })
    }

    /// Takes the event that made [`Wire::fd`] readable, if there is one.
    pub(crate) fn take_event(&self) {
        let Some(channel) = self.channel else { return };
        let (mut cq, mut cookie) = (null_mut(), null_mut());
        // SAFETY: the channel is alive and does not block; an event of the one queue that it has is
        // acknowledged at once, as destroying that queue requires.
        unsafe {
            let verbs = self.device.verbs;
            if (verbs.get_cq_event)(channel.as_ptr(), &raw mut cq, &raw mut cookie) == 0 {
                (verbs.ack_cq_events)(cq, 1);
            }
        }
    }

    /// Readable when a completion came after [`Wire::arm`].
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        let channel = self.channel.expect("made before anybody waits");
        // SAFETY: alive until Drop; the descriptor is the channel's and open as long.
        let fd: RawFd = unsafe { channel.as_ref() }.fd;
        // SAFETY: as above.
        unsafe { BorrowedFd::borrow_raw(fd) }
    }

    fn num_chunks(&self, frame_bytes: usize) -> usize {
        frame_bytes.div_ceil(self.config.max_message_bytes).max(1)
    }

    fn queue_pair(&self, lane: LaneId) -> NonNull<QueuePair> {
        self.queue_pairs[usize::from(lane.0)]
    }

    fn cq(&self) -> *mut CompletionQueue {
        self.cq.expect("made before anybody polls").as_ptr()
    }

    fn ops(&self) -> &layout::ContextOps {
        let context: *const Context = self.device.context.as_ptr();
        // SAFETY: open until the device's Drop, and the table is never written after opening.
        unsafe { &(*context).ops }
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        let verbs = self.device.verbs;
        let mut is_freed = true;
        let mut check = |what: &str, returned: c_int| {
            if let Err(error) = zero(returned) {
                is_freed = false;
                tracing::error!(device = self.device.name, %error, "{what} cannot be freed");
            }
        };
        // SAFETY: each was made once and is freed once, users before what they use; no request is
        // being posted, because that needs a borrow of this.
        unsafe {
            for queue_pair in &self.queue_pairs {
                check("a queue pair", (verbs.destroy_qp)(queue_pair.as_ptr()));
            }
            if let Some(cq) = self.cq {
                check("a completion queue", (verbs.destroy_cq)(cq.as_ptr()));
            }
            if let Some(channel) = self.channel {
                check(
                    "a completion channel",
                    (verbs.destroy_comp_channel)(channel.as_ptr()),
                );
            }
            for region in &self.regions {
                check("registered memory", (verbs.dereg_mr)(region.as_ptr()));
            }
            check("a protection domain", (verbs.dealloc_pd)(self.pd.as_ptr()));
        }
        if !is_freed {
            // The device may still write: what it knows of stays mapped for the process's life.
            for memory in [&self.config.outgoing, &self.config.incoming] {
                std::mem::forget(memory.mapping.clone());
            }
        }
    }
}
