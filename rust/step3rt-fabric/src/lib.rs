//! Moves slots between instances, once per layer and micro-batch lane.
//!
//! This crate owns the data plane: slots, flags, frames, and the fabrics that carry them. It never
//! knows what a payload means; models and requests are unknown here.
//!
//! A transfer is a *slot* (a fixed buffer for one lane, direction and peer) and a *flag* (a
//! monotonic sequence number). The producer writes the slot, then publishes the number; the
//! consumer waits for the number, then reads. A lane strictly alternates, and that is the credit:
//!
//! ```text
//!   attention (initiator)                    FFN (responder)
//!   writes send slot, push s   ── A2F s ──▶  Arrived s, reads receive slot
//!   Arrived s, reads           ◀─ F2A s ──   writes send slot, push s   (frees its receive slot)
//!   push s+1                   ── A2F ──▶    ...                        (frees A's receive slot)
//! ```
//!
//! An [`endpoint::Endpoint`] has all links of a process. This is a whole exchange, with both ends
//! in one process:
//!
//! ```
//! use std::time::Duration;
//! use step3rt_core::ids::{Epoch, InstanceId, LaneId};
//! use step3rt_fabric::address::{PeerAddress, boot_id};
//! use step3rt_fabric::contract::{Geometry, LinkIdentity, Side};
//! use step3rt_fabric::endpoint::{Endpoint, EndpointConfig, FabricEvent, LinkSettings};
//! use step3rt_fabric::frame::Frame;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let config = |instance, side| EndpointConfig {
//!     identity: LinkIdentity { instance: InstanceId(instance), epoch: Epoch(1) },
//!     side,
//!     geometry: Geometry { num_lanes: 3, a2f_slot_bytes: 4096, f2a_slot_bytes: 4096 },
//!     fabric: "auto".parse().expect("a fabric setting"),
//!     listen_shm: side == Side::Responder,
//!     listen_tcp: None,
//!     advertise_host: None,
//!     settings: LinkSettings::default(),
//! };
//! let mut ffn = Endpoint::bind(config(2, Side::Responder))?;
//! let mut attention = Endpoint::bind(config(1, Side::Initiator))?;
//!
//! // The address travels by the control plane.
//! let address = PeerAddress {
//!     identity: ffn.config().identity,
//!     boot_id: boot_id()?,
//!     addresses: ffn.addresses().to_vec(),
//! };
//! let link = attention.connect(&address)?;
//! assert_eq!((link.fabric, link.reason.as_str()), ("shm", "both ends run on one host"));
//!
//! let lane = LaneId(0);
//! attention.send_slot(InstanceId(2), lane).expect("linked").write(b"hidden states");
//! let frame = Frame { step: 0, layer: 0, num_tokens: 1, payload_bytes: 13 };
//! attention.push(InstanceId(2), lane, frame)?;
//!
//! // The loop of every instance: note the counter, poll, and sleep only if nothing came.
//! let doorbell = ffn.doorbell();
//! let mut events = Vec::new();
//! let header = 'arrived: loop {
//!     let seen = doorbell.current();
//!     ffn.poll(&mut events);
//!     for event in events.drain(..) {
//!         if let FabricEvent::Arrived { header, .. } = event {
//!             break 'arrived header;
//!         }
//!     }
//!     doorbell.wait(seen, Duration::from_millis(100));
//! };
//! let mut payload = vec![0; header.frame.payload_bytes];
//! ffn.receive_slot(header.source, header.lane).expect("linked").read(&mut payload);
//! assert_eq!(payload, b"hidden states");
//! # Ok(())
//! # }
//! ```
//!
//! Reading order: [`contract`], [`frame`], [`endpoint`], then one fabric (`shm`, `tcp`, `rdma`,
//! [`sim`]).
//! What the fabrics share: `pages`, `memory` and `region` (where slots lie), `lane` (whose turn it is),
//! `state` (whether the link is up), `doorbell`, `bell` and `sockets` (where one waits), `stream` and
//! `tls` (a socket's bytes, encrypted or not), `sync` (what models replace). How links come about:
//! `handshake`, `choice`, `dialer`, `connect`, `accept`, `watcher`, `hub`; and how one takes the place
//! of another: `reset_ask`.
//!
//! Slots in device memory are not this crate's: of a `cuda_ipc` link it exchanges what each end offers
//! ([`device_offer`]), numbers the link ([`link_epoch`]), and says when the peer ends.

pub mod address;
pub mod contract;
pub mod device_offer;
pub mod endpoint;
pub mod frame;
pub mod link_epoch;
pub mod measure;
pub mod sim;

mod accept;
mod accept_error;
mod bell;
mod choice;
mod config;
mod connect;
mod connect_error;
mod credentials;
mod dialer;
mod doorbell;
mod handshake;
mod hub;
mod lane;
pub mod late_doorbell;
mod measure_flag;
mod memory;
#[cfg(loom)]
mod models;
mod new_link;
mod opening;
#[cfg(not(any(loom, miri)))]
mod pages;
#[cfg(any(loom, miri))]
#[path = "heap_pages.rs"]
mod pages;
#[cfg(feature = "rdma")]
mod rdma;
#[cfg(not(feature = "rdma"))]
#[path = "rdma_absent.rs"]
mod rdma;
mod rdma_status;
mod refusal;
mod region;
mod reset_ask;
mod shm;
mod sockets;
mod state;
mod stream;
mod sync;
mod tcp;
mod tcp_receiver;
mod tcp_socket;
#[cfg(feature = "tls")]
mod tls;
#[cfg(not(feature = "tls"))]
#[path = "tls_absent.rs"]
mod tls;
mod watcher;

#[cfg(any(test, fuzzing))]
pub mod fuzz;
#[cfg(test)]
mod hostile;
#[cfg(test)]
mod two_sides;

pub use choice::DeviceError;
pub use memory::MapError;
pub use rdma_status::{RdmaError, RdmaFinding, rdma_findings};
pub use refusal::{HandshakeError, Refusal};
pub use tls::{Fault, Tls};
