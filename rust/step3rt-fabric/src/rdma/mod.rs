//! Links over RDMA: the sender's device writes into the receiver's slot, and no processor copies.
//!
//! One reliable connection (queue pair) per lane, so that a long frame of one lane holds up no other,
//! a lane's one frame on its way is its queue pair's whole load, and switches that spread
//! connections over cables spread lanes. A push is one `RDMA WRITE WITH IMMEDIATE` of header and
//! payload, which are contiguous, into the peer's slot of the same lane; its completion at the peer
//! sets the same flag that shared memory has, and from there on the fabrics are one.
//!
//! Everything that a link needs is told over its control connection, a TCP socket to the address
//! that the peer publishes; afterwards that socket is silent, and its end is the link's end. Of a
//! process's memory only the slots that the peer writes are open to the peer's device.
//!
//! Slots lie in host memory. Device memory would be registered in `wire`, by `ibv_reg_dmabuf_mr` or
//! by the plain call where the peer-memory module is loaded; nothing else here would differ, except
//! that who consumes an arrival on a GPU must order it after the device's writes.
//!
//! Like TCP, frames are neither encrypted nor authenticated: the network is trusted.

pub(crate) mod gid;
pub(crate) mod layout;
mod library;
mod link;
pub(crate) mod offer;
mod progress;
mod registered;
mod report;
pub(crate) mod request;
pub(crate) mod route;
mod setup;
#[cfg(test)]
mod tests;
mod timing;
mod wire;

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use crate::rdma::library::OpenDevice;
pub(crate) use crate::rdma::offer::OFFER_BYTES;
pub(crate) use crate::rdma::report::report;
pub(crate) use crate::rdma::setup::Prepared;
pub(crate) use crate::rdma_status::RdmaError;

/// The devices that an endpoint has opened: one each, however many links go over it.
#[derive(Default)]
pub(crate) struct Devices {
    open: Mutex<Vec<Arc<OpenDevice>>>,
}

impl Devices {
    fn open(&self, name: &str) -> Result<Arc<OpenDevice>, RdmaError> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(device) = open.iter().find(|device| device.name == name) {
            return Ok(Arc::clone(device));
        }
        let device = OpenDevice::open(name)?;
        open.push(Arc::clone(&device));
        Ok(device)
    }
}

/// Whether this host has a port that packets pass and the library that drives it. Opens nothing.
pub(crate) fn usable() -> Result<(), RdmaError> {
    let ports = gid::ports(Path::new(gid::SYSFS));
    if ports.is_empty() {
        return Err(RdmaError::NoDevice);
    }
    if !ports
        .iter()
        .any(|port| port.is_active() && !port.gids.is_empty())
    {
        let describe = |port: &gid::Port| {
            let (device, number, state) = (&port.device, port.number, &port.state);
            format!(
                "{device} port {number} is {state} with {} GIDs",
                port.gids.len()
            )
        };
        let ports: Vec<_> = ports.iter().map(describe).collect();
        return Err(RdmaError::NoActivePort(ports.join(", ")));
    }
    library::verbs().map(|_| ())
}
