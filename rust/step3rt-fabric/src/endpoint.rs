//! All links of one process: binds, connects, accepts, and reports what happens.
//!
//! It never blocks for a peer except in [`Endpoint::connect`] ([`Endpoint::dial`] does not), and never
//! looks into a payload.

mod dialling;

use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::thread::JoinHandle;

use step3rt_core::ids::{InstanceId, LaneId};

use crate::address::{DataAddress, FabricChoice, FabricKind, boot_id};
use crate::choice::DeviceError;
pub use crate::config::{BindError, EndpointConfig, LinkSettings};
pub use crate::connect_error::ConnectError;
use crate::contract::{Doorbell, DownReason, Link, LinkEvent, LinkIdentity, PushError, SlotMemory};
use crate::device_offer::DeviceOffer;
use crate::frame::{Frame, FrameHeader};
use crate::handshake::Introduction;
use crate::hub::Hub;
use crate::link_epoch::LinkEpoch;
use crate::new_link::NewLink;
use crate::rdma;
use crate::rdma_status::RdmaError;
use crate::reset_ask;
use crate::tls::Tls;
use crate::watcher::Watcher;
use dialling::Dialled;

/// A new link, for people and reports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinkSummary {
    /// Who is at the other end.
    pub peer: LinkIdentity,
    /// `"cuda_ipc"`, `"shm"`, `"rdma"`, `"tcp"` or `"sim"`.
    pub fabric: &'static str,
    /// Why this fabric and no other.
    pub reason: String,
    /// Which incarnation of the link this is; equal at both ends, and above those before.
    pub epoch: LinkEpoch,
    /// What the peer offers of its device's memory, of a `"cuda_ipc"` link alone. Such a link tells of
    /// the peer's end as any other does; its slots have one byte.
    pub device_offer: Option<DeviceOffer>,
}

/// What an endpoint reports. A peer's events are in order: up, arrivals, down.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FabricEvent {
    /// A peer connected to this endpoint, or was linked by [`Endpoint::dial`]. (What
    /// [`Endpoint::connect`] linked is its return value, not an event.)
    LinkUp(LinkSummary),
    /// [`Endpoint::dial`] did not link the peer; nothing of the attempt is left.
    DialFailed {
        /// Who was dialled.
        peer: LinkIdentity,
        /// [`ConnectError`]'s words.
        reason: String,
    },
    /// A checked frame lies in the receive slot of its lane.
    Arrived {
        /// Who sent it.
        peer: InstanceId,
        /// What it says.
        header: FrameHeader,
    },
    /// The peer of an initiator asks for a new link in the place of the present one, which goes on:
    /// see [`Endpoint::dial_again`].
    ResetAsked {
        /// Who asks.
        peer: LinkIdentity,
        /// Why.
        reason: String,
    },
    /// A link is over. It is forgotten at the next poll, so that what arrived with this event can
    /// still be read; slots that the caller holds stay mapped as long as it holds them.
    LinkDown {
        /// Who was at the other end, with the epoch of the link that ended.
        peer: LinkIdentity,
        /// Why.
        reason: DownReason,
    },
}

/// All links of one process. Owned by one thread, which may change.
pub struct Endpoint {
    config: EndpointConfig,
    boot_id: String,
    addresses: Vec<DataAddress>,
    links: Vec<Entry>,
    /// Events of this end's own doing, for the next poll.
    notices: Vec<FabricEvent>,
    /// Kept so that a poll does not allocate.
    scratch: Vec<LinkEvent>,
    hub: Arc<Hub>,
    watcher: Option<JoinHandle<()>>,
    /// What became of those dialled: from their threads to the next poll.
    dialled: (SyncSender<Dialled>, Receiver<Dialled>),
}

struct Entry {
    peer: LinkIdentity,
    epoch: LinkEpoch,
    link: Box<dyn Link>,
    /// Its end was reported; the next poll forgets it.
    is_over: bool,
}

impl Endpoint {
    /// Binds the listeners and starts the watcher thread, for an instance without device memory.
    pub fn bind(config: EndpointConfig) -> Result<Self, BindError> {
        Self::bind_with(config, None, None)
    }

    /// Binds the listeners and starts the watcher thread. The offer is the same for all peers.
    pub fn bind_with_device(
        config: EndpointConfig,
        device_offer: Option<DeviceOffer>,
    ) -> Result<Self, BindError> {
        Self::bind_with(config, device_offer, None)
    }

    /// Binds as the others do. With `tls`, links over TCP are encrypted, only peers with a certificate
    /// of the same CA are linked, and the control connections of links over RDMA are held to the
    /// same; what an RDMA device, shared memory or device memory moves is never encrypted.
    pub fn bind_with(
        config: EndpointConfig,
        device_offer: Option<DeviceOffer>,
        tls: Option<Tls>,
    ) -> Result<Self, BindError> {
        config.geometry.validate()?;
        let introduction = Introduction {
            identity: config.identity,
            side: config.side,
            geometry: config.geometry,
        };
        let has_rdma = has_rdma(config.fabric)?;
        let device_offer = usable_offer(config.fabric, device_offer)?;
        let (listeners, mut addresses) = config.listen(has_rdma)?;
        if device_offer.is_some() && !addresses.is_empty() {
            // Not a place of its own: the offers come with a handshake at one of the others.
            addresses.push(DataAddress {
                fabric: FabricKind::CudaIpc.as_str().to_owned(),
                address: String::new(),
            });
        }
        let mut hub = Hub::new(introduction, config.settings, has_rdma, tls)?;
        hub.device_offer = device_offer;
        let hub = Arc::new(hub);
        let watcher = Watcher::new(Arc::clone(&hub), listeners);
        let watcher = std::thread::Builder::new()
            .name("fabric-watch".to_owned())
            .spawn(move || watcher.run())?;
        Ok(Self {
            // A peer is dialled once at a time, so no thread waits to be heard.
            dialled: mpsc::sync_channel(config.settings.max_peers),
            // Unknown only where /proc is not mounted; then no host is the same host.
            boot_id: boot_id().unwrap_or_default(),
            config,
            addresses,
            links: Vec::new(),
            notices: Vec::new(),
            scratch: Vec::new(),
            hub,
            watcher: Some(watcher),
        })
    }

    /// Where peers reach this endpoint, to be published as they are.
    pub fn addresses(&self) -> &[DataAddress] {
        &self.addresses
    }

    /// What rings whenever [`Endpoint::poll`] has something new. May be waited on, and rung, by any
    /// thread, also after the endpoint is gone.
    pub fn doorbell(&self) -> Arc<dyn Doorbell> {
        Arc::clone(&self.hub.bell) as Arc<dyn Doorbell>
    }

    /// Asks a linked initiator for a new link in the place of the present one. Its answer is that link,
    /// before which the present one is reported over by [`DownReason::Reset`]. Never blocks.
    pub fn ask_reset(&mut self, peer: InstanceId, reason: &str) -> Result<(), PushError> {
        let at = self.position(peer).ok_or(PushError::NotLinked(peer))?;
        match self.links[at].link.ask_reset(&reason_text(reason)) {
            // The peer was quicker: it has the new link, has let go of this one, and the next poll says so.
            Err(_) if self.hub.reset_of(peer).is_some() => Ok(()),
            asked => asked.map_err(|error| {
                PushError::Down(DownReason::Transport {
                    during: "asking for a new link",
                    os_error: error.raw_os_error().unwrap_or(0),
                })
            }),
        }
    }

    /// Adopts a link made elsewhere, such as one end of a simulated pair, and reports it as up.
    pub fn adopt(&mut self, link: Box<dyn Link>) -> Result<(), ConnectError> {
        self.admit(link.peer())?;
        self.insert_and_report(NewLink::adopted(link));
        self.hub.bell.ring();
        Ok(())
    }

    /// Appends what has happened since the last call. Never blocks.
    pub fn poll(&mut self, out: &mut Vec<FabricEvent>) {
        while let Some(at) = self.links.iter().position(|entry| entry.is_over) {
            self.remove(at);
        }
        for link in self.hub.take_accepted() {
            self.insert_and_report(link);
        }
        self.take_dialled();
        out.append(&mut self.notices);
        for Entry {
            peer,
            link,
            is_over,
            ..
        } in &mut self.links
        {
            link.poll(&mut self.scratch);
            out.extend(self.scratch.drain(..).map(|event| match event {
                LinkEvent::Arrived(header) => FabricEvent::Arrived {
                    peer: peer.instance,
                    header,
                },
                LinkEvent::ResetAsked(reason) => FabricEvent::ResetAsked {
                    peer: *peer,
                    reason,
                },
                LinkEvent::Down(reason) => {
                    *is_over = true;
                    let (instance, epoch) = (peer.instance, peer.epoch);
                    // Its successor may exist already, and the peer have let go of this one.
                    let reset = self.hub.reset_of(instance);
                    let reason = reset.map_or(reason, DownReason::Reset);
                    tracing::info!(%instance, %epoch, %reason, "link down");
                    FabricEvent::LinkDown {
                        peer: *peer,
                        reason,
                    }
                }
            }));
        }
    }

    /// See [`Link::send_slot`]; `None` also when the peer is not linked.
    pub fn send_slot(&self, peer: InstanceId, lane: LaneId) -> Option<Arc<dyn SlotMemory>> {
        self.links[self.position(peer)?].link.send_slot(lane)
    }

    /// See [`Link::receive_slot`]; `None` also when the peer is not linked.
    pub fn receive_slot(&self, peer: InstanceId, lane: LaneId) -> Option<Arc<dyn SlotMemory>> {
        self.links[self.position(peer)?].link.receive_slot(lane)
    }

    /// See [`Link::push`].
    pub fn push(&mut self, peer: InstanceId, lane: LaneId, frame: Frame) -> Result<(), PushError> {
        let at = self.position(peer).ok_or(PushError::NotLinked(peer))?;
        self.links[at].link.push(lane, frame)
    }

    /// Closes the link to a peer; the next poll reports it down. Nothing if there is none.
    pub fn disconnect(&mut self, peer: InstanceId) {
        if let Some(at) = self.position(peer) {
            self.end(at, DownReason::Closed);
        }
    }

    /// What it was bound with.
    pub fn config(&self) -> &EndpointConfig {
        &self.config
    }

    /// A process has few peers, and their ids are contiguous in memory: no map is faster.
    fn position(&self, peer: InstanceId) -> Option<usize> {
        self.links
            .iter()
            .position(|entry| entry.peer.instance == peer)
    }

    fn insert_and_report(&mut self, link: NewLink) {
        let summary = self.insert(link);
        self.notices.push(FabricEvent::LinkUp(summary));
    }

    /// Adds a link, in place of an earlier one to the same instance.
    fn insert(&mut self, link: NewLink) -> LinkSummary {
        let mut summary = link.summary();
        if self.hub.tls.is_some() && summary.fabric == FabricKind::Rdma.as_str() {
            // Who sets TLS up expects the opposite.
            summary.reason += "; not encrypted, as rdma never is";
        }
        let NewLink { link, reset, .. } = link;
        let peer = link.peer();
        self.hub.confirm(peer);
        let is_reset = reset.is_some();
        if let Some(at) = self.position(peer.instance) {
            let reason = reset.map_or(DownReason::Replaced(peer.epoch), DownReason::Reset);
            self.end(at, reason);
        }
        if is_reset {
            self.hub.end_reset(peer.instance);
        }
        self.links.push(Entry {
            peer,
            epoch: summary.epoch,
            link,
            is_over: false,
        });
        let LinkSummary { fabric, reason, .. } = &summary;
        tracing::info!(
            instance = %peer.instance, epoch = %peer.epoch, link_epoch = %summary.epoch, fabric, reason,
            "linked"
        );
        summary
    }

    /// Ends a link from this side.
    fn end(&mut self, at: usize, reason: DownReason) {
        let Entry { peer, is_over, .. } = self.remove(at);
        if !is_over {
            self.notices.push(FabricEvent::LinkDown { peer, reason });
            self.hub.bell.ring();
        }
    }

    fn remove(&mut self, at: usize) -> Entry {
        let entry = self.links.swap_remove(at);
        self.hub.dismiss(entry.peer.instance);
        entry
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        self.hub.stop();
        if self
            .watcher
            .take()
            .is_some_and(|watcher| watcher.join().is_err())
        {
            tracing::error!("the fabric's watcher panicked");
        }
    }
}

/// Whether this end may offer and try RDMA. What the setting asks for must be there.
fn has_rdma(setting: FabricChoice) -> Result<bool, RdmaError> {
    if !matches!(setting, FabricChoice::Auto | FabricChoice::Rdma) {
        return Ok(false);
    }
    let Err(error) = rdma::usable() else {
        return Ok(true);
    };
    match error {
        error if setting == FabricChoice::Rdma => return Err(error),
        RdmaError::NoDevice | RdmaError::NotBuilt => {
            tracing::debug!(%error, "links to other hosts go over TCP");
        }
        error => tracing::warn!(%error, "there is an RDMA device that cannot be used"),
    }
    Ok(false)
}

/// What this end may offer of its device's memory. What the setting asks for must be there.
fn usable_offer(
    setting: FabricChoice,
    offer: Option<DeviceOffer>,
) -> Result<Option<DeviceOffer>, BindError> {
    match setting {
        FabricChoice::CudaIpc if offer.is_none() => Err(BindError::Device(DeviceError::NoOffer)),
        FabricChoice::Auto | FabricChoice::CudaIpc => Ok(offer),
        FabricChoice::Shm | FabricChoice::Tcp | FabricChoice::Rdma => Ok(None),
    }
}

/// A reason as the peer will read it.
fn reason_text(reason: &str) -> String {
    reset_ask::bounded(reason).to_owned()
}
