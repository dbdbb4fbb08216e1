//! Whether a link is up, shared between the thread that owns it and those that see it die.

use std::sync::{Arc, PoisonError};

use crate::contract::{Doorbell, DownReason, LinkEvent};
use crate::frame::ProtocolError;
use crate::lane::Lanes;
use crate::reset_ask::{Listener, NOTE_BYTES};
use crate::sync::{AtomicBool, Mutex, OnceLock, Ordering};

/// Up until the first failure; that one is kept.
pub(crate) struct LinkState {
    down: OnceLock<DownReason>,
    /// Why the peer asks for a new link in the place of this one, once it does.
    asked: OnceLock<String>,
    is_ask_reported: AtomicBool,
    /// What has come of that. Locked when a note comes, which is never on a link that is well.
    listener: Mutex<Listener>,
    /// The owner's doorbell.
    bell: Arc<dyn Doorbell>,
}

impl LinkState {
    pub(crate) fn new(bell: Arc<dyn Doorbell>) -> Self {
        Self {
            down: OnceLock::new(),
            asked: OnceLock::new(),
            is_ask_reported: AtomicBool::new(false),
            listener: Mutex::default(),
            bell,
        }
    }

    /// Takes the link down, unless it is down already, and wakes the owner.
    pub(crate) fn fail(&self, reason: DownReason) {
        if self.down.set(reason).is_ok() {
            self.bell.ring();
        }
    }

    /// Takes a note of the peer, which asks for a new link; whoever reads the socket brings it.
    pub(crate) fn hear(&self, note: &[u8; NOTE_BYTES]) -> Result<(), ProtocolError> {
        let mut listener = self.listener.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(reason) = listener.hear(note)? {
            self.ask_reset(reason);
        }
        Ok(())
    }

    /// Tells the owner, once, that the peer asks for a new link.
    pub(crate) fn ask_reset(&self, reason: String) {
        if self.asked.set(reason).is_ok() {
            self.bell.ring();
        }
    }

    /// Why the link is down, `None` while it is up. An atomic load.
    pub(crate) fn down(&self) -> Option<&DownReason> {
        self.down.get()
    }

    /// Wakes the owner.
    pub(crate) fn ring(&self) {
        self.bell.ring();
    }

    /// The body of every `poll`: reports what was published to this end, then, once, the end.
    pub(crate) fn poll_lanes(
        &self,
        lanes: &mut Lanes,
        is_down_reported: &mut bool,
        out: &mut Vec<LinkEvent>,
    ) {
        if *is_down_reported {
            return;
        }
        // Looked at before the lanes: what the peer published before it died is still reported.
        let was_down = self.down().is_some();
        for lane in lanes.incoming.lanes() {
            match lanes.take(lane) {
                Ok(Some(header)) => out.push(LinkEvent::Arrived(header)),
                Ok(None) => {}
                Err(error) => {
                    self.fail(DownReason::Protocol(error));
                    break;
                }
            }
        }
        if let Some(reason) = self.asked.get()
            && !self.is_ask_reported.swap(true, Ordering::Relaxed)
        {
            out.push(LinkEvent::ResetAsked(reason.clone()));
        }
        let is_broken = |reason: &DownReason| matches!(reason, DownReason::Protocol(_));
        if let Some(reason) = self.down().filter(|reason| was_down || is_broken(reason)) {
            *is_down_reported = true;
            out.push(LinkEvent::Down(reason.clone()));
        }
    }
}
