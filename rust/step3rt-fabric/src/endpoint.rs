//! All links of one process: binds, connects, accepts, and reports what happens.
//!
//! It never blocks for a peer except in [`Endpoint::connect`], and never looks into a payload.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use step3rt_core::ids::{InstanceId, LaneId};
use thiserror::Error;

use crate::address::{DataAddress, FabricChoice, PeerAddress};
use crate::contract::{
    Doorbell, DownReason, Geometry, GeometryError, Link, LinkIdentity, PushError, Side, SlotMemory,
};
use crate::frame::{Frame, FrameHeader};

/// What an endpoint is and where it listens.
#[derive(Clone, Debug)]
pub struct EndpointConfig {
    /// Who this process is.
    pub identity: LinkIdentity,
    /// Attention instances initiate and connect; FFN instances respond and listen.
    pub side: Side,
    /// Must be equal at both ends of every link.
    pub geometry: Geometry,
    /// Which fabrics [`Endpoint::connect`] may use.
    pub fabric: FabricChoice,
    /// Whether to accept links over shared memory.
    pub listen_shm: bool,
    /// Where to accept links over TCP; port 0 lets the system choose. None: nowhere.
    pub listen_tcp: Option<SocketAddr>,
    /// The host name or address that peers use for `listen_tcp`. Needed when that is a wildcard.
    pub advertise_host: Option<String>,
    /// What every link and the doorbell are set to.
    pub settings: LinkSettings,
}

/// Settings of links, with sound defaults.
#[derive(Clone, Copy, Debug)]
pub struct LinkSettings {
    /// Longest busy wait before the doorbell sleeps, at most 50; 0 when the ranks of this host
    /// outnumber its cores, where spinning costs milliseconds instead of saving microseconds.
    pub spin_us: u32,
    /// How long connecting, and accepting, may take.
    pub handshake_timeout: Duration,
    /// How long a TCP peer's host may be silent before the link is down.
    pub peer_timeout: Duration,
    /// Whether pushes carry a CRC-32 of their payload, for debugging.
    pub payload_checksum: bool,
    /// Most peers linked at once.
    pub max_peers: usize,
}

impl Default for LinkSettings {
    fn default() -> Self {
        Self {
            spin_us: 50,
            handshake_timeout: Duration::from_secs(3),
            peer_timeout: Duration::from_secs(3),
            payload_checksum: false,
            max_peers: 256,
        }
    }
}

/// A new link, for people and reports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinkSummary {
    /// Who is at the other end.
    pub peer: LinkIdentity,
    /// `"shm"`, `"tcp"` or `"sim"`.
    pub fabric: &'static str,
    /// Why this fabric and no other.
    pub reason: String,
}

/// What an endpoint reports. A peer's events are in order: up, arrivals, down.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FabricEvent {
    /// A peer connected to this endpoint. (What [`Endpoint::connect`] linked is its return value,
    /// not an event.)
    LinkUp(LinkSummary),
    /// A checked frame lies in the receive slot of its lane.
    Arrived {
        /// Who sent it.
        peer: InstanceId,
        /// What it says.
        header: FrameHeader,
    },
    /// A link is over and forgotten; slots that the caller still holds stay mapped.
    LinkDown {
        /// Who was at the other end, with the epoch of the link that ended.
        peer: LinkIdentity,
        /// Why.
        reason: DownReason,
    },
}

/// Why an endpoint could not be made.
#[derive(Debug, Error)]
pub enum BindError {
    /// Sizes that no link can have.
    #[error(transparent)]
    Geometry(#[from] GeometryError),
}

/// Why a peer could not be linked. Nothing of the attempt is left.
#[derive(Debug, Error)]
pub enum ConnectError {
    /// Only the initiator connects, so that two ends never connect to each other at once.
    #[error("a responder does not connect: its peers do. Call this on the attention instance")]
    WrongSide,
}

/// All links of one process. Owned by one thread, which may change.
pub struct Endpoint {
    config: EndpointConfig,
}

impl Endpoint {
    /// Binds the listeners and starts the watcher thread.
    pub fn bind(_config: EndpointConfig) -> Result<Self, BindError> {
        unimplemented!()
    }

    /// Where peers reach this endpoint, to be published as they are.
    pub fn addresses(&self) -> &[DataAddress] {
        unimplemented!()
    }

    /// What rings whenever [`Endpoint::poll`] has something new. May be waited on, and rung, by any
    /// thread, also after the endpoint is gone.
    pub fn doorbell(&self) -> Arc<dyn Doorbell> {
        unimplemented!()
    }

    /// Links to a peer; blocks for at most the handshake timeout per fabric tried. An existing link
    /// to that instance is replaced (its end is reported by [`Endpoint::poll`]).
    pub fn connect(&mut self, _peer: &PeerAddress) -> Result<LinkSummary, ConnectError> {
        unimplemented!()
    }

    /// Adopts a link made elsewhere, such as one end of a simulated pair.
    pub fn adopt(&mut self, _link: Box<dyn Link>) {
        unimplemented!()
    }

    /// Appends what has happened since the last call. Never blocks.
    pub fn poll(&mut self, _out: &mut Vec<FabricEvent>) {
        unimplemented!()
    }

    /// See [`Link::send_slot`]; `None` also when the peer is not linked.
    pub fn send_slot(&self, _peer: InstanceId, _lane: LaneId) -> Option<Arc<dyn SlotMemory>> {
        unimplemented!()
    }

    /// See [`Link::receive_slot`]; `None` also when the peer is not linked.
    pub fn receive_slot(&self, _peer: InstanceId, _lane: LaneId) -> Option<Arc<dyn SlotMemory>> {
        unimplemented!()
    }

    /// See [`Link::push`].
    pub fn push(
        &mut self,
        _peer: InstanceId,
        _lane: LaneId,
        _frame: Frame,
    ) -> Result<(), PushError> {
        unimplemented!()
    }

    /// Closes the link to a peer; the next poll reports it down. Nothing if there is none.
    pub fn disconnect(&mut self, _peer: InstanceId) {
        unimplemented!()
    }

    /// What it was bound with.
    pub fn config(&self) -> &EndpointConfig {
        &self.config
    }
}
