//! What an instance offers its peers of its device's memory: bytes that only the peer's device code
//! reads.

use std::fmt;
use std::sync::Arc;

use thiserror::Error;

/// Most bytes of an offer. A CUDA IPC handle has 64, and one for each lane and direction fits.
pub const MAX_DEVICE_OFFER_BYTES: usize = 4096;

/// An opaque offer, exchanged in the handshake of a `cuda_ipc` link. May be empty.
#[derive(Clone, PartialEq, Eq)]
pub struct DeviceOffer(Arc<[u8]>);

/// An offer that is too long.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error(
    "a device offer of {0} bytes is not possible: it has at most {MAX_DEVICE_OFFER_BYTES}. Put handles \
     into it, and not what they lead to"
)]
pub struct DeviceOfferTooLong(pub usize);

impl DeviceOffer {
    /// Takes an offer of at most [`MAX_DEVICE_OFFER_BYTES`].
    pub fn new(bytes: &[u8]) -> Result<Self, DeviceOfferTooLong> {
        if bytes.len() > MAX_DEVICE_OFFER_BYTES {
            return Err(DeviceOfferTooLong(bytes.len()));
        }
        Ok(Self(bytes.into()))
    }

    /// The bytes, as the offering instance gave them.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

/// Handles are no use to people.
impl fmt::Debug for DeviceOffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DeviceOffer({} bytes)", self.0.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_offer_has_up_to_4096_bytes() {
        for len in [0, 1, MAX_DEVICE_OFFER_BYTES] {
            let offer = DeviceOffer::new(&vec![7; len]).unwrap();
            assert_eq!(offer.as_bytes(), vec![7; len]);
            assert_eq!(format!("{offer:?}"), format!("DeviceOffer({len} bytes)"));
        }
        let len = MAX_DEVICE_OFFER_BYTES + 1;
        assert_eq!(
            DeviceOffer::new(&vec![7; len]),
            Err(DeviceOfferTooLong(len))
        );
    }
}
