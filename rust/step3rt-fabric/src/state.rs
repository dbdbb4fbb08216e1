//! Whether a link is up, shared between the thread that owns it and those that see it die.

use std::sync::Arc;

use crate::contract::{Doorbell, DownReason, LinkEvent};
use crate::lane::Lanes;
use crate::sync::OnceLock;

/// Up until the first failure; that one is kept.
pub(crate) struct LinkState {
    down: OnceLock<DownReason>,
    /// The owner's doorbell.
    bell: Arc<dyn Doorbell>,
}

impl LinkState {
    pub(crate) fn new(bell: Arc<dyn Doorbell>) -> Self {
        Self {
            down: OnceLock::new(),
            bell,
        }
    }

    /// Takes the link down, unless it is down already, and wakes the owner.
    pub(crate) fn fail(&self, reason: DownReason) {
        if self.down.set(reason).is_ok() {
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
        let is_broken = |reason: &DownReason| matches!(reason, DownReason::Protocol(_));
        if let Some(reason) = self.down().filter(|reason| was_down || is_broken(reason)) {
            *is_down_reported = true;
            out.push(LinkEvent::Down(reason.clone()));
        }
    }
}
