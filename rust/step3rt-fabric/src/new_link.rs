//! A link on its way from a handshake to the endpoint's owner.

use crate::address::FabricKind;
use crate::contract::Link;
use crate::device_offer::DeviceOffer;
use crate::endpoint::LinkSummary;
use crate::link_epoch::LinkEpoch;

/// A link that came about, with what the handshake said of it.
pub(crate) struct NewLink {
    pub(crate) link: Box<dyn Link>,
    /// Why this fabric and no other.
    pub(crate) reason: String,
    /// Equal at both ends.
    pub(crate) epoch: LinkEpoch,
    /// The peer's, of a link through device memory.
    pub(crate) device_offer: Option<DeviceOffer>,
    /// Why it takes the place of the present link, if an end asked for that.
    pub(crate) reset: Option<String>,
}

impl NewLink {
    /// A link that no handshake made.
    pub(crate) fn adopted(link: Box<dyn Link>) -> Self {
        Self {
            link,
            reason: "adopted".to_owned(),
            epoch: LinkEpoch(0),
            device_offer: None,
            reset: None,
        }
    }

    /// What the owner is told.
    pub(crate) fn summary(&self) -> LinkSummary {
        let link = &self.link;
        let mut reason = self.reason.clone();
        let mut fabric = link.fabric();
        if self.device_offer.is_some() {
            reason = format!("{reason}; carried by {fabric}");
            fabric = FabricKind::CudaIpc.as_str();
        }
        if let Some(path) = link.path() {
            reason = format!("{reason}; {path}");
        }
        LinkSummary {
            peer: link.peer(),
            fabric,
            reason,
            epoch: self.epoch,
            device_offer: self.device_offer.clone(),
        }
    }
}
