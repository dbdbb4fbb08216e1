//! The thread of a link that takes completions: arrivals become flags, failures the link's end.
//!
//! It spins while that pays and sleeps on the completion channel otherwise. It never looks into a
//! slot: whether a frame is good is for the owner's poll to say.
//!
//! An arrival is shown to the owner only when the device has reported the owner's own last frame of
//! that lane as sent: the answer proves that the peer has it, but not that the device will not read
//! the slot once more to repeat a packet whose acknowledgement was lost.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::net::{RecvFlags, Shutdown};
use step3rt_core::ids::LaneId;

use crate::config::LinkSettings;
use crate::contract::{DownReason, Side};
use crate::doorbell::{MAX_SPIN_US, SpinPatience};
use crate::frame::ProtocolError;
use crate::lane::Lanes;
use crate::rdma::layout::{self, Completion};
use crate::rdma::link::Shared;
use crate::rdma::request::{Request, SEQUENCE_MASK, failed, immediate, reason_of};
use crate::rdma::timing::{CLOSING_GRACE, DRAIN_TIMEOUT, PROBE_INTERVAL, SLOWEST_BYTES_PER_S};
use crate::rdma::wire::RECEIVES_PER_LANE;
use crate::region::Region;
use crate::reset_ask::NOTE_BYTES;
use crate::watcher::timespec;

/// Completions taken by one call; a link has few lanes with news at one time.
const COMPLETIONS_PER_POLL: usize = 16;

/// How far a lane has come.
#[derive(Clone, Copy)]
struct LaneProgress {
    /// Sequence of the last arrival.
    received: u64,
    /// The last arrival is here but not shown, because `sent` is behind.
    is_held: bool,
    /// Sequence of the last frame that the device has reported as sent.
    sent: u64,
    /// Since when `sent` is behind what was pushed, at the first look that found it so.
    behind_since: Option<(u64, Instant)>,
    /// Receives that the device has.
    num_receives: u32,
}

/// The state of a completion thread.
pub(crate) struct Progress {
    shared: Arc<Shared>,
    incoming: Region,
    lanes: Vec<LaneProgress>,
    spin: Duration,
    patience: SpinPatience,
    /// A frame that is not sent after so long never will be.
    frame_deadline: Duration,
    next_probe: Instant,
    is_probing: bool,
}

impl Progress {
    pub(crate) fn new(shared: Arc<Shared>, lanes: &Lanes, settings: &LinkSettings) -> Self {
        let lane = LaneProgress {
            received: 0,
            is_held: false,
            sent: 0,
            behind_since: None,
            num_receives: RECEIVES_PER_LANE,
        };
        let frame_s = lanes.outgoing.max_frame_bytes() / SLOWEST_BYTES_PER_S;
        // The connecting end is ready before the accepting end hears of it, and not the other way
        // round: that one leaves it the time that a handshake may take.
        let first_probe = match lanes.terms.side {
            Side::Initiator => PROBE_INTERVAL,
            Side::Responder => settings.handshake_timeout,
        };
        Self {
            shared,
            incoming: lanes.incoming.clone(),
            lanes: vec![lane; lanes.terms.geometry.num_lanes.into()],
            spin: Duration::from_micros(settings.spin_us.min(MAX_SPIN_US).into()),
            patience: SpinPatience::default(),
            frame_deadline: settings.peer_timeout + Duration::from_secs(frame_s as u64),
            next_probe: Instant::now() + first_probe,
            is_probing: false,
        }
    }

    /// Runs until the link fails or its owner drops it; afterwards the device has let go of
    /// everything.
    pub(crate) fn run(mut self) {
        if let Err(reason) = self.carry() {
            self.shared.state.fail(reason);
        }
        // After the last frame was sent, and before anything is taken down: the peer sees an end,
        // not a failure.
        let _ = rustix::net::shutdown(&self.shared.control, Shutdown::Both);
        self.shared.wire.take_down();
        self.drain();
    }

    /// Carries frames. Ok when the owner wants the end.
    fn carry(&mut self) -> Result<(), DownReason> {
        while self.shared.state.down().is_none() {
            if self.take()? > 0 || self.spin()? {
                continue;
            }
            self.shared
                .wire
                .arm()
                .map_err(|error| failed("waiting for completions", &error))?;
            // What came before arming is no event.
            if self.take()? == 0 && self.sleep()? == Wake::Stop {
                return self.linger();
            }
            self.check_frames()?;
            self.probe()?;
        }
        Ok(())
    }

    /// Takes what the device reports; how many reports.
    fn take(&mut self) -> Result<usize, DownReason> {
        let mut completions = [Completion::default(); COMPLETIONS_PER_POLL];
        let found = self
            .shared
            .wire
            .poll(&mut completions)
            .map_err(|error| failed("taking completions", &error))?;
        for completion in &completions[..found] {
            self.handle(completion)?;
        }
        Ok(found)
    }

    fn handle(&mut self, completion: &Completion) -> Result<(), DownReason> {
        let Some(request) = Request::of(completion) else {
            return Err(failed(
                "taking completions",
                &io::ErrorKind::InvalidData.into(),
            ));
        };
        self.count(request);
        if completion.status != layout::WC_SUCCESS {
            return Err(self.failure(completion.status));
        }
        match request {
            Request::Receive(lane) => self.arrive(lane, completion)?,
            Request::Frame(lane) if self.lanes[usize::from(lane.0)].is_held => self.show(lane),
            Request::Frame(_) | Request::Probe(_) | Request::Chunk(_) => {}
        }
        Ok(())
    }

    /// Notes that a request is no longer the device's, however it ended.
    fn count(&mut self, request: Request) {
        match request {
            Request::Frame(lane) => self.lanes[usize::from(lane.0)].sent += 1,
            Request::Receive(lane) => self.lanes[usize::from(lane.0)].num_receives -= 1,
            Request::Probe(_) => self.is_probing = false,
            Request::Chunk(_) => {}
        }
    }

    fn arrive(&mut self, lane: LaneId, completion: &Completion) -> Result<(), DownReason> {
        if completion.opcode != layout::WC_RECV_RDMA_WITH_IMM {
            return Err(DownReason::Protocol(ProtocolError::Chatter));
        }
        let at = usize::from(lane.0);
        let pushed = self.shared.pushed[at].load(Ordering::Acquire);
        let progress = &mut self.lanes[at];
        let (found, expected) = (u32::from_be(completion.imm_data), progress.received + 1);
        if found != immediate(lane, expected) {
            return Err(DownReason::Protocol(ProtocolError::Sequence {
                lane,
                found: u64::from(found) & SEQUENCE_MASK,
                expected,
            }));
        }
        progress.received = expected;
        self.shared
            .wire
            .post_receive(lane)
            .map_err(|error| failed("posting a receive", &error))?;
        progress.num_receives += 1;
        progress.is_held = progress.sent < pushed;
        if !progress.is_held {
            self.show(lane);
        }
        Ok(())
    }

    /// Shows the last arrival of a lane to the owner.
    fn show(&mut self, lane: LaneId) {
        let progress = &mut self.lanes[usize::from(lane.0)];
        progress.is_held = false;
        self.incoming.publish(lane, progress.received);
        self.shared.state.ring();
    }

    /// The reason of the end, when a request has failed: that the peer ended, if it says so.
    fn failure(&mut self, status: u32) -> DownReason {
        let mut fds = [PollFd::new(&self.shared.control, PollFlags::IN)];
        let _ = rustix::event::poll(&mut fds, Some(&timespec(CLOSING_GRACE)));
        if let Some(reason) = self.control_end() {
            return reason;
        }
        let (during, os_error) = reason_of(status);
        DownReason::Transport { during, os_error }
    }

    fn spin(&mut self) -> Result<bool, DownReason> {
        if self.spin.is_zero() || !self.patience.may_spin() {
            return Ok(false);
        }
        let started = Instant::now();
        let mut has_paid = false;
        while !has_paid && started.elapsed() < self.spin {
            has_paid = self.take()? > 0;
            std::hint::spin_loop();
        }
        self.patience.learn(has_paid);
        Ok(has_paid)
    }

    /// Sleeps until there is a completion, an end, or something to look after.
    fn sleep(&mut self) -> Result<Wake, DownReason> {
        let shared = Arc::clone(&self.shared);
        let channel = shared.wire.fd();
        let mut fds = [
            PollFd::from_borrowed_fd(channel, PollFlags::IN),
            PollFd::new(&shared.stop, PollFlags::IN),
            PollFd::new(&shared.control, PollFlags::IN),
        ];
        let left = self.next_probe.saturating_duration_since(Instant::now());
        match rustix::event::poll(&mut fds, Some(&timespec(left))) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(failed("waiting for completions", &error.into())),
        }
        let [has_event, is_stopping, has_control] = fds.map(|fd| !fd.revents().is_empty());
        if has_event {
            shared.wire.take_event();
        }
        if is_stopping {
            return Ok(Wake::Stop);
        }
        if has_control && let Some(reason) = self.control_end() {
            return Err(reason);
        }
        Ok(Wake::Look)
    }

    /// What the control socket says of the peer, if it says anything. What the peer sent before it
    /// ended is shown first.
    fn control_end(&mut self) -> Option<DownReason> {
        let mut note = [0; NOTE_BYTES];
        let reason = match rustix::net::recv(&self.shared.control, &mut note, RecvFlags::DONTWAIT) {
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return None,
            Ok((0, _)) | Err(_) => DownReason::PeerClosed,
            // Notes are sent by one call, and so are not torn.
            Ok((NOTE_BYTES, _)) => {
                return self
                    .shared
                    .state
                    .hear(&note)
                    .err()
                    .map(DownReason::Protocol);
            }
            Ok(_) => return Some(DownReason::Protocol(ProtocolError::Chatter)),
        };
        let mut completions = [Completion::default(); COMPLETIONS_PER_POLL];
        while let Ok(found @ 1..) = self.shared.wire.poll(&mut completions) {
            for completion in &completions[..found] {
                let Some(request) = Request::of(completion) else {
                    continue;
                };
                self.count(request);
                if let (layout::WC_SUCCESS, Request::Receive(lane)) = (completion.status, request)
                    && let Err(reason) = self.arrive(lane, completion)
                {
                    return Some(reason);
                }
            }
        }
        // The peer has answered these; no acknowledgement comes from it any more.
        for lane in self.incoming.lanes() {
            if self.lanes[usize::from(lane.0)].is_held {
                self.show(lane);
            }
        }
        Some(reason)
    }

    /// Fails the link when a frame stays unsent beyond any repetition: the device itself is stuck.
    fn check_frames(&mut self) -> Result<(), DownReason> {
        for (progress, pushed) in self.lanes.iter_mut().zip(&self.shared.pushed) {
            if progress.sent == pushed.load(Ordering::Acquire) {
                progress.behind_since = None;
                continue;
            }
            match progress.behind_since {
                Some((sent, since)) if sent == progress.sent => {
                    if since.elapsed() > self.frame_deadline {
                        let error = io::Error::from_raw_os_error(libc::ETIMEDOUT);
                        return Err(failed("waiting for the device to send a frame", &error));
                    }
                }
                _ => progress.behind_since = Some((progress.sent, Instant::now())),
            }
        }
        Ok(())
    }

    /// Sees that the peer's device is there, when no frame on its way would show it.
    fn probe(&mut self) -> Result<(), DownReason> {
        let now = Instant::now();
        if now < self.next_probe {
            return Ok(());
        }
        self.next_probe = now + PROBE_INTERVAL;
        let is_idle = self.lanes[0].sent == self.shared.pushed[0].load(Ordering::Acquire);
        if is_idle && !self.is_probing {
            self.shared
                .wire
                .post_probe(LaneId(0))
                .map_err(|error| failed("posting a probe", &error))?;
            self.is_probing = true;
        }
        Ok(())
    }

    /// Waits until the last frames are sent, as the owner has pushed them.
    fn linger(&mut self) -> Result<(), DownReason> {
        let started = Instant::now();
        while self.has_unsent() && started.elapsed() < DRAIN_TIMEOUT {
            if self.take()? == 0 {
                std::thread::yield_now();
            }
        }
        Ok(())
    }

    fn has_unsent(&self) -> bool {
        let pushed = self
            .shared
            .pushed
            .iter()
            .map(|pushed| pushed.load(Ordering::Acquire));
        self.lanes
            .iter()
            .zip(pushed)
            .any(|(lane, pushed)| lane.sent < pushed)
    }

    /// Waits until the device has reported everything that it was given.
    fn drain(&mut self) {
        let started = Instant::now();
        let mut completions = [Completion::default(); COMPLETIONS_PER_POLL];
        while self.is_probing
            || self.has_unsent()
            || self.lanes.iter().any(|lane| lane.num_receives > 0)
        {
            match self.shared.wire.poll(&mut completions) {
                Ok(0) if started.elapsed() > DRAIN_TIMEOUT => {
                    tracing::warn!("an RDMA device has not reported all that was flushed");
                    return;
                }
                Ok(0) => std::thread::yield_now(),
                Ok(found) => {
                    let requests = completions[..found].iter().filter_map(Request::of);
                    requests.for_each(|request| self.count(request));
                }
                Err(error) => {
                    tracing::warn!(%error, "an RDMA device does not report what was flushed");
                    return;
                }
            }
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Wake {
    Look,
    Stop,
}
