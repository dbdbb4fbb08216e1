//! The connecting half of an endpoint: in place, on a thread of its own, and once more.

use std::sync::Arc;

use step3rt_core::ids::InstanceId;

use crate::address::PeerAddress;
use crate::connect_error::ConnectError;
use crate::contract::{Doorbell, LinkIdentity, Side};
use crate::dialer::Dialer;
use crate::endpoint::{Endpoint, FabricEvent, LinkSummary, reason_text};
use crate::handshake::RefusalCode;
use crate::new_link::NewLink;

/// Who was dialled, whether in the place of a present link, and what became of it.
pub(super) type Dialled = (LinkIdentity, bool, Result<NewLink, ConnectError>);

impl Endpoint {
    /// Links to a peer; blocks for at most the handshake timeout per fabric tried. An existing link
    /// to that instance is replaced (its end is reported by [`Endpoint::poll`]).
    pub fn connect(&mut self, peer: &PeerAddress) -> Result<LinkSummary, ConnectError> {
        if self.config.side == Side::Responder {
            return Err(ConnectError::WrongSide);
        }
        let instance = peer.identity.instance;
        self.admit(peer.identity)?;
        match self.dialer(None).link(peer) {
            Ok(link) => Ok(self.insert(link)),
            Err(error) => {
                self.hub.dismiss(instance);
                Err(error)
            }
        }
    }

    /// Links to a peer on a thread of its own, within the time that [`Endpoint::connect`] takes. A
    /// later poll, for which the doorbell rings, says [`FabricEvent::LinkUp`] or
    /// [`FabricEvent::DialFailed`].
    pub fn dial(&mut self, peer: PeerAddress) -> Result<(), ConnectError> {
        self.start_dialling(peer, None)
    }

    /// As [`Endpoint::dial`], to a peer that is linked, for a link in the place of the present one. That
    /// one stays until then, and both ends are told that it ended by [`DownReason::Reset`]. However it
    /// ends meanwhile, that is what this end is told; a peer that died is then not linked again.
    pub fn dial_again(&mut self, peer: PeerAddress, reason: &str) -> Result<(), ConnectError> {
        self.start_dialling(peer, Some(reason_text(reason)))
    }

    fn start_dialling(
        &mut self,
        peer: PeerAddress,
        reset: Option<String>,
    ) -> Result<(), ConnectError> {
        if self.config.side == Side::Responder {
            return Err(ConnectError::WrongSide);
        }
        let instance = peer.identity.instance;
        self.admit(peer.identity)?;
        if let Some(reason) = &reset {
            self.hub.begin_reset(instance, reason.clone());
        }
        let is_reset = reset.is_some();
        let (dialer, dialled) = (self.dialer(reset), self.dialled.0.clone());
        let dialling = move || {
            let outcome = dialer.link(&peer);
            // The endpoint may be gone; then the link is dropped here.
            let _ = dialled.send((peer.identity, is_reset, outcome));
            dialer.hub.bell.ring();
        };
        let thread = std::thread::Builder::new().name("fabric-dial".to_owned());
        thread.spawn(dialling).map(drop).map_err(|error| {
            self.forget_dialled(instance, is_reset);
            ConnectError::Resources { instance, error }
        })
    }

    /// Takes back what dialling noted, when no link came of it.
    fn forget_dialled(&self, instance: InstanceId, is_reset: bool) {
        if is_reset {
            self.hub.end_reset(instance);
        }
        self.hub.dismiss(instance);
    }

    fn dialer(&self, reset: Option<String>) -> Dialer {
        Dialer {
            hub: Arc::clone(&self.hub),
            fabric: self.config.fabric,
            boot_id: self.boot_id.clone(),
            reset,
        }
    }

    pub(super) fn take_dialled(&mut self) {
        while let Ok((peer, is_reset, outcome)) = self.dialled.1.try_recv() {
            match outcome.and_then(|link| self.unless_overtaken(link)) {
                Ok(link) => self.insert_and_report(link),
                Err(error) => {
                    self.forget_dialled(peer.instance, is_reset);
                    let reason = error.to_string();
                    self.notices.push(FabricEvent::DialFailed { peer, reason });
                }
            }
        }
    }

    /// A peer that is dialled twice at a time may be linked in another order than it accepted. It keeps
    /// the link that it accepted last, whose epochs are the higher ones.
    fn unless_overtaken(&self, new: NewLink) -> Result<NewLink, ConnectError> {
        let LinkIdentity { instance, epoch } = new.link.peer();
        let present = self.position(instance).map(|at| &self.links[at]);
        match present {
            Some(present) if (present.peer.epoch, present.epoch) > (epoch, new.epoch) => {
                Err(ConnectError::Overtaken { instance })
            }
            _ => Ok(new),
        }
    }

    pub(super) fn admit(&self, peer: LinkIdentity) -> Result<(), ConnectError> {
        self.hub.admit(peer).map_err(|code| match code {
            RefusalCode::Stale(_) => ConnectError::Stale(peer),
            // An admission fails for no other reason.
            _ => ConnectError::Full {
                instance: peer.instance,
                max_peers: self.config.settings.max_peers,
            },
        })
    }
}

#[cfg(test)]
mod tests;
