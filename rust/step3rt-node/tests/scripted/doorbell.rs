//! A doorbell that tests can look at.

use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use step3rt_fabric::contract::Doorbell;

use super::PATIENCE;

/// Counts its rings; the first one may panic on the session's thread, as a defect there would.
#[derive(Default)]
pub(crate) struct Counter {
    rings: AtomicU32,
    panics_first: bool,
}

impl Counter {
    pub(crate) fn panicking() -> Self {
        Self {
            panics_first: true,
            ..Self::default()
        }
    }

    pub(crate) fn wait_for(&self, rings: u32) {
        let deadline = Instant::now() + PATIENCE;
        while self.current() < rings {
            assert!(
                Instant::now() < deadline,
                "it rang {} times",
                self.current()
            );
            thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Doorbell for Counter {
    fn current(&self) -> u32 {
        self.rings.load(Ordering::SeqCst)
    }
    fn ring(&self) {
        let num_before = self.rings.fetch_add(1, Ordering::SeqCst);
        assert!(num_before > 0 || !self.panics_first, "made by a test");
    }
    fn wait(&self, _seen: u32, _timeout: Duration) -> bool {
        true
    }
}
