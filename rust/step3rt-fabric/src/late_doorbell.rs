//! A doorbell that is made after those who ring it are running. It never waits.

use std::sync::Arc;

use crate::contract::Doorbell;
use crate::sync::{OnceLock, Ordering, fence};

/// Rings what it was given, once it was given it.
///
/// What is made known before a ring is seen by whoever polls after [`LateDoorbell::set`], or else
/// the ring arrives: either the ringer finds the doorbell, or the poll finds the news.
#[derive(Default)]
pub struct LateDoorbell(OnceLock<Arc<dyn Doorbell>>);

impl LateDoorbell {
    /// What [`LateDoorbell::ring`] rings from now on. The first one stays. Poll after this and
    /// before the first wait: earlier rings went nowhere.
    pub fn set(&self, doorbell: Arc<dyn Doorbell>) {
        let _ = self.0.set(doorbell);
        // Two threads each write (news, doorbell), then read what the other wrote. Without a fence on
        // both sides each may miss the other's.
        fence(Ordering::SeqCst);
    }

    /// Wakes whoever waits on the doorbell, if it is there.
    pub fn ring(&self) {
        fence(Ordering::SeqCst);
        if let Some(doorbell) = self.0.get() {
            doorbell.ring();
        }
    }
}
