//! Links one peer: the fabrics that may do it, one after the other.

use std::sync::Arc;

use crate::address::{FabricChoice, PeerAddress};
use crate::choice::{self, LocalEnd};
use crate::connect::{Abandoned, Attempt};
use crate::connect_error::ConnectError;
use crate::hub::Hub;
use crate::new_link::NewLink;

/// What an endpoint needs to link peers, in place or on a thread.
pub(crate) struct Dialer {
    pub(crate) hub: Arc<Hub>,
    pub(crate) fabric: FabricChoice,
    pub(crate) boot_id: String,
    /// Why the present link to the peer is to be replaced, if it is.
    pub(crate) reset: Option<String>,
}

impl Dialer {
    /// Tries the fabrics in order; the next one only when a peer is out of reach by the one before.
    pub(crate) fn link(&self, peer: &PeerAddress) -> Result<NewLink, ConnectError> {
        let local = LocalEnd {
            boot_id: &self.boot_id,
            has_rdma: self.hub.has_rdma,
            has_device_offer: self.hub.device_offer.is_some(),
        };
        let candidates = choice::candidates(self.fabric, local, peer).map_err(|error| {
            let instance = peer.identity.instance;
            ConnectError::Device { instance, error }
        })?;
        let mut candidates = candidates.into_iter();
        let mut next = candidates.next();
        let mut unreachable: Option<ConnectError> = None;
        let abandoned = Abandoned::default();
        while let Some(candidate) = next {
            next = candidates.next();
            match (Attempt {
                hub: &self.hub,
                peer,
                candidate,
                reset: self.reset.as_deref(),
                abandoned: &abandoned,
            })
            .run()
            {
                Ok(mut link) => {
                    if let Some(error) = unreachable {
                        link.reason = format!("{}: {error}", link.reason);
                    }
                    return Ok(link);
                }
                Err(error) if next.is_some() && error.is_out_of_reach() => {
                    unreachable = Some(error);
                }
                // That the last resort is not even offered says less than why the first failed.
                Err(ConnectError::NotOffered { .. }) if unreachable.is_some() => break,
                Err(error) => return Err(error),
            }
        }
        Err(unreachable.expect("there is a candidate, and the last one returns its error"))
    }
}
