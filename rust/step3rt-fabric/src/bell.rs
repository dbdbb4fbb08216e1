//! What the owner of an endpoint waits on: a counter that all who have news for it increment, and the
//! sockets that its links go over.
//!
//! It holds no link, and knows no frame.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use crate::contract::Doorbell;
use crate::doorbell::FutexDoorbell;
use crate::sockets::{Attendance, Sockets};
use crate::sync::{AtomicUsize, Instant, Ordering, spin_loop};

/// Looks at the counter between two at the sockets, which are system calls.
const LOOKS_PER_SYSTEM_CALL: u32 = 8;

pub(crate) struct EndpointBell {
    counter: FutexDoorbell,
    sockets: Arc<Sockets>,
    /// Peers that ring from their own process, where they can wake a futex and nothing else.
    num_far_ringers: AtomicUsize,
}

/// Says that a peer rings from its own process, until dropped.
pub(crate) struct FarRinger {
    bell: Arc<EndpointBell>,
}

impl EndpointBell {
    /// Makes a bell and the memfd that peers need for ringing it.
    pub(crate) fn create(max_spin_us: u32) -> io::Result<(Self, OwnedFd)> {
        let (counter, fd) = FutexDoorbell::create(max_spin_us)?;
        let bell = Self {
            counter,
            sockets: Arc::new(Sockets::new()?),
            num_far_ringers: AtomicUsize::new(0),
        };
        Ok((bell, fd))
    }

    /// The sockets whose bytes a waiter moves.
    pub(crate) fn sockets(&self) -> &Arc<Sockets> {
        &self.sockets
    }

    /// To be held by a link whose peer rings from its own process.
    pub(crate) fn expect_far_ringer(self: &Arc<Self>) -> FarRinger {
        self.num_far_ringers.fetch_add(1, Ordering::SeqCst);
        // Who sleeps where the peer cannot wake it has to look again.
        self.ring();
        FarRinger {
            bell: Arc::clone(self),
        }
    }

    /// Moves bytes until it is rung, or for as long as spinning may pay; whether it was rung.
    fn spin(&self, attendance: &Attendance<'_>, seen: u32, limit: Duration) -> bool {
        let is_rung = || self.current() != seen;
        let mut progress_at = Instant::now();
        loop {
            if attendance.advance(is_rung) {
                progress_at = Instant::now();
            }
            for _ in 0..LOOKS_PER_SYSTEM_CALL {
                if is_rung() {
                    return true;
                }
                spin_loop();
            }
            if progress_at.elapsed() >= limit {
                return false;
            }
        }
    }

    /// Sleeps where the sockets are, and moves their bytes.
    fn sleep(&self, attendance: &Attendance<'_>, seen: u32, deadline: Deadline) -> bool {
        let is_rung = || self.current() != seen;
        loop {
            if is_rung() {
                return true;
            }
            let left = deadline.left();
            if left.is_zero() || self.num_far_ringers.load(Ordering::SeqCst) != 0 {
                return false;
            }
            attendance.sleep(left, is_rung);
        }
    }
}

#[derive(Clone, Copy)]
struct Deadline {
    started: Instant,
    timeout: Duration,
}

impl Deadline {
    fn left(self) -> Duration {
        self.timeout.saturating_sub(self.started.elapsed())
    }
}

impl Doorbell for EndpointBell {
    fn current(&self) -> u32 {
        self.counter.current()
    }

    fn ring(&self) {
        self.counter.ring();
        self.sockets.wake_sleeper();
    }

    fn wait(&self, seen: u32, timeout: Duration) -> bool {
        if self.sockets.is_empty() {
            return self.counter.wait(seen, timeout);
        }
        if self.current() != seen {
            return true;
        }
        let started = Instant::now();
        let deadline = Deadline { started, timeout };
        let Some(attendance) = self.sockets.attend() else {
            // Another thread waits where the sockets are.
            return self.counter.wait(seen, timeout);
        };
        if let Some(limit) = self.counter.may_spin() {
            let is_rung = self.spin(&attendance, seen, limit.min(timeout));
            self.counter.learn(is_rung);
            if is_rung {
                return true;
            }
        }
        if self.sleep(&attendance, seen, deadline) {
            return true;
        }
        // With a peer that can wake a futex only, the sockets are left to their thread.
        drop(attendance);
        self.counter.sleep(seen, started, timeout)
    }
}

impl Drop for FarRinger {
    fn drop(&mut self) {
        self.bell.num_far_ringers.fetch_sub(1, Ordering::SeqCst);
    }
}
