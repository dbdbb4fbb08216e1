//! All links of one process: binds, connects, accepts, and reports what happens.
//!
//! It never blocks for a peer except in [`Endpoint::connect`] ([`Endpoint::dial`] does not), and never
//! looks into a payload.

use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::thread::JoinHandle;

use step3rt_core::ids::{InstanceId, LaneId};

use crate::address::{DataAddress, FabricChoice, FabricKind, PeerAddress, boot_id};
pub use crate::config::{BindError, EndpointConfig, LinkSettings};
pub use crate::connect::ConnectError;
use crate::connect::Dialer;
use crate::contract::{
    Doorbell, DownReason, Link, LinkEvent, LinkIdentity, PushError, Side, SlotMemory,
};
use crate::frame::{Frame, FrameHeader};
use crate::handshake::{Introduction, RefusalCode};
use crate::hub::{Accepted, Hub};
use crate::rdma;
use crate::rdma_status::RdmaError;
use crate::tls::Tls;
use crate::watcher::Watcher;

/// A new link, for people and reports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinkSummary {
    /// Who is at the other end.
    pub peer: LinkIdentity,
    /// `"shm"`, `"rdma"`, `"tcp"` or `"sim"`.
    pub fabric: &'static str,
    /// Why this fabric and no other.
    pub reason: String,
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

type Dialled = (LinkIdentity, Result<(Box<dyn Link>, String), ConnectError>);

struct Entry {
    peer: LinkIdentity,
    link: Box<dyn Link>,
    /// Its end was reported; the next poll forgets it.
    is_over: bool,
}

impl Endpoint {
    /// Binds the listeners and starts the watcher thread. Links over TCP are in clear text.
    pub fn bind(config: EndpointConfig) -> Result<Self, BindError> {
        Self::bind_with(config, None)
    }

    /// Binds as [`Endpoint::bind`] does. With `tls`, links over TCP are encrypted, only peers with a
    /// certificate of the same CA are linked, and the control connections of links over RDMA are
    /// held to the same; what an RDMA device or shared memory moves is never encrypted.
    pub fn bind_with(config: EndpointConfig, tls: Option<Tls>) -> Result<Self, BindError> {
        config.geometry.validate()?;
        let introduction = Introduction {
            identity: config.identity,
            side: config.side,
            geometry: config.geometry,
        };
        let has_rdma = has_rdma(config.fabric)?;
        let (listeners, addresses) = config.listen(has_rdma)?;
        let hub = Arc::new(Hub::new(introduction, config.settings, has_rdma, tls)?);
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

    /// Links to a peer; blocks for at most the handshake timeout per fabric tried. An existing link
    /// to that instance is replaced (its end is reported by [`Endpoint::poll`]).
    pub fn connect(&mut self, peer: &PeerAddress) -> Result<LinkSummary, ConnectError> {
        if self.config.side == Side::Responder {
            return Err(ConnectError::WrongSide);
        }
        let instance = peer.identity.instance;
        self.admit(peer.identity)?;
        match self.dialer().link(peer) {
            Ok((link, reason)) => {
                let reason = self.with_path(reason, &*link);
                let (peer, fabric) = (link.peer(), link.fabric());
                self.insert(link);
                tracing::info!(%instance, epoch = %peer.epoch, fabric, reason, "linked");
                Ok(LinkSummary {
                    peer,
                    fabric,
                    reason,
                })
            }
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
        if self.config.side == Side::Responder {
            return Err(ConnectError::WrongSide);
        }
        let instance = peer.identity.instance;
        self.admit(peer.identity)?;
        let (dialer, dialled) = (self.dialer(), self.dialled.0.clone());
        let dialling = move || {
            let outcome = dialer.link(&peer);
            // The endpoint may be gone; then the link is dropped here.
            let _ = dialled.send((peer.identity, outcome));
            dialer.hub.bell.ring();
        };
        let thread = std::thread::Builder::new().name("fabric-dial".to_owned());
        thread.spawn(dialling).map(drop).map_err(|error| {
            self.hub.dismiss(instance);
            ConnectError::Resources { instance, error }
        })
    }

    fn dialer(&self) -> Dialer {
        Dialer {
            hub: Arc::clone(&self.hub),
            fabric: self.config.fabric,
            boot_id: self.boot_id.clone(),
        }
    }

    fn take_dialled(&mut self) {
        while let Ok((peer, outcome)) = self.dialled.1.try_recv() {
            match outcome {
                Ok((link, reason)) => self.insert_and_report(link, reason),
                Err(error) => {
                    self.hub.dismiss(peer.instance);
                    let reason = error.to_string();
                    self.notices.push(FabricEvent::DialFailed { peer, reason });
                }
            }
        }
    }

    fn admit(&self, peer: LinkIdentity) -> Result<(), ConnectError> {
        self.hub.admit(peer).map_err(|code| match code {
            RefusalCode::Stale(_) => ConnectError::Stale(peer),
            // An admission fails for no other reason.
            _ => ConnectError::Full {
                instance: peer.instance,
                max_peers: self.config.settings.max_peers,
            },
        })
    }

    /// Adopts a link made elsewhere, such as one end of a simulated pair, and reports it as up.
    pub fn adopt(&mut self, link: Box<dyn Link>) -> Result<(), ConnectError> {
        self.admit(link.peer())?;
        self.insert_and_report(link, "adopted".to_owned());
        self.hub.bell.ring();
        Ok(())
    }

    /// Appends what has happened since the last call. Never blocks.
    pub fn poll(&mut self, out: &mut Vec<FabricEvent>) {
        while let Some(at) = self.links.iter().position(|entry| entry.is_over) {
            self.remove(at);
        }
        for Accepted { link, reason } in self.hub.take_accepted() {
            self.insert_and_report(link, reason);
        }
        self.take_dialled();
        out.append(&mut self.notices);
        for Entry {
            peer,
            link,
            is_over,
        } in &mut self.links
        {
            link.poll(&mut self.scratch);
            out.extend(self.scratch.drain(..).map(|event| match event {
                LinkEvent::Arrived(header) => FabricEvent::Arrived {
                    peer: peer.instance,
                    header,
                },
                LinkEvent::Down(reason) => {
                    *is_over = true;
                    let (instance, epoch) = (peer.instance, peer.epoch);
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

    fn with_path(&self, mut reason: String, link: &dyn Link) -> String {
        if let Some(path) = link.path() {
            reason = format!("{reason}; {path}");
        }
        if self.hub.tls.is_some() && link.fabric() == FabricKind::Rdma.as_str() {
            // Who sets TLS up expects the opposite.
            reason += "; not encrypted, as rdma never is";
        }
        reason
    }

    /// A process has few peers, and their ids are contiguous in memory: no map is faster.
    fn position(&self, peer: InstanceId) -> Option<usize> {
        self.links
            .iter()
            .position(|entry| entry.peer.instance == peer)
    }

    fn insert_and_report(&mut self, link: Box<dyn Link>, reason: String) {
        let reason = self.with_path(reason, &*link);
        let (peer, fabric) = (link.peer(), link.fabric());
        self.insert(link);
        tracing::info!(instance = %peer.instance, epoch = %peer.epoch, fabric, reason, "linked");
        self.notices.push(FabricEvent::LinkUp(LinkSummary {
            peer,
            fabric,
            reason,
        }));
    }

    /// Adds a link, in place of an earlier one to the same instance.
    fn insert(&mut self, link: Box<dyn Link>) {
        let peer = link.peer();
        self.hub.confirm(peer);
        if let Some(at) = self.position(peer.instance) {
            self.end(at, DownReason::Replaced(peer.epoch));
        }
        self.links.push(Entry {
            peer,
            link,
            is_over: false,
        });
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
    if matches!(setting, FabricChoice::Shm | FabricChoice::Tcp) {
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
