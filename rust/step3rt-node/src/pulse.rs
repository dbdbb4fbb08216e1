//! What the session thread and the instance's loop share: signs of life one way, the doorbell the
//! other. Nobody ever waits for a lock here.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use step3rt_fabric::contract::Doorbell;
use step3rt_fabric::late_doorbell::LateDoorbell;
use step3rt_proto::v1;

/// An instance's signs of life.
pub struct Pulse {
    origin: Instant,
    /// Milliseconds since `origin` when the loop last came round.
    last_progress_ms: AtomicU64,
    status: Mutex<String>,
    doorbell: LateDoorbell,
}

impl Pulse {
    /// Alive as of now, without a doorbell.
    #[expect(
        clippy::new_without_default,
        reason = "the moment of the call is its meaning"
    )]
    pub fn new() -> Self {
        Self {
            origin: Instant::now(),
            last_progress_ms: AtomicU64::new(0),
            status: Mutex::new("starting".to_owned()),
            doorbell: LateDoorbell::default(),
        }
    }

    /// The loop came round at `now`.
    pub fn mark_progress(&self, now: Instant) {
        self.last_progress_ms
            .store(self.ms_since_origin(now), Ordering::Relaxed);
    }

    /// Shows `text` in heartbeats.
    pub fn set_status(&self, text: &str) {
        let mut status = self.status.lock().unwrap_or_else(PoisonError::into_inner);
        text.clone_into(&mut status);
    }

    /// What a heartbeat says now.
    pub fn heartbeat(&self) -> v1::Heartbeat {
        let last = self.last_progress_ms.load(Ordering::Relaxed);
        let status = self.status.lock().unwrap_or_else(PoisonError::into_inner);
        v1::Heartbeat {
            status: status.clone(),
            last_progress_age_ms: self.ms_since_origin(Instant::now()).saturating_sub(last),
        }
    }

    /// Where the loop sleeps. The first one stays: a session has one endpoint for its whole life.
    pub fn set_doorbell(&self, doorbell: Arc<dyn Doorbell>) {
        self.doorbell.set(doorbell);
    }

    /// Wakes the loop, if it can sleep already.
    pub fn ring(&self) {
        self.doorbell.ring();
    }

    fn ms_since_origin(&self, now: Instant) -> u64 {
        u64::try_from((now - self.origin).as_millis()).unwrap_or(u64::MAX)
    }
}
