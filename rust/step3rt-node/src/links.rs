//! Keeps an instance's links equal to the topology.
//!
//! Attention instances connect to every FFN instance; FFN instances accept, and let the loop see
//! only peers that the coordinator has named. Links never decide what a lost peer means for a step.
//!
//! ```text
//!   topology names it    not linked ──dial──▶ up ──down──▶ lost (told to the coordinator;
//!                            ▲ │               │ │          only a new epoch comes back)
//!                            └─┘ retry         │ └─ topology drops it ──▶ gone
//!                             ▲                │
//!                             └──── reset ─────┘ (told to the loop, not to the coordinator)
//! ```
//! A reset, which either end's loop may ask for, replaces a link whose both ends live. The old link
//! stays in the endpoint until the new one takes its place, and nothing of it reaches the loop any more.

mod dialling;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use step3rt_core::ids::InstanceId;
use step3rt_fabric::contract::{Doorbell, DownReason, LinkIdentity};
use step3rt_fabric::endpoint::{Endpoint, FabricEvent, LinkSummary};
use step3rt_proto::v1;
use step3rt_proto::v1::session_request::Event;

use crate::event::NodeEvent;
use crate::options::Role;
use crate::topology::Topology;

/// Why a link that the topology no longer wants ends.
const DROPPED: &str = "the coordinator took the peer out of the topology";

/// What links have to say, to be passed on in this order.
#[derive(Debug, Default)]
pub struct LinkNews {
    /// For the instance's loop.
    pub events: Vec<NodeEvent>,
    /// For the coordinator: `LinksReady` and `PeerLost`.
    pub reports: Vec<Event>,
    /// For people, when it changed.
    pub status: Option<String>,
}

/// The links of one instance.
pub struct Links {
    role: Role,
    endpoint: Endpoint,
    topology: Topology,
    peers: BTreeMap<InstanceId, PeerState>,
    /// What came from peers that the topology does not name yet, in order. The fabric bounds it: a
    /// peer can send one frame per lane before it is answered.
    unnamed: Vec<FabricEvent>,
    reported_version: Option<u64>,
    /// Reused by every poll.
    news: Vec<FabricEvent>,
}

/// A peer of the other role that the topology names.
struct PeerState {
    identity: LinkIdentity,
    role_rank: u32,
    link: LinkState,
    /// Why the present link is to be replaced, from the reset to the new link.
    reset: Option<String>,
}

enum LinkState {
    /// To be dialled, not before `at`.
    Wanted { at: Instant, pause: Duration },
    /// Being dialled; if that fails, again after `pause`.
    Dialling { pause: Duration },
    /// To be accepted. With a reset the peer was asked to connect, and the old link is its life sign.
    Awaited,
    /// Usable.
    Up {
        fabric: &'static str,
        reason: String,
    },
    /// It was up and died. A lost peer must register again, so that nothing of the old link counts.
    Lost,
}

impl Links {
    /// No links yet.
    pub fn new(role: Role, endpoint: Endpoint) -> Self {
        Self {
            role,
            endpoint,
            topology: Topology::default(),
            peers: BTreeMap::new(),
            unnamed: Vec::new(),
            reported_version: None,
            news: Vec::new(),
        }
    }

    /// What rings whenever there is something to poll.
    pub fn doorbell(&self) -> Arc<dyn Doorbell> {
        self.endpoint.doorbell()
    }

    /// The endpoint, to reach the slots of a peer that the loop has been told of.
    pub fn endpoint_of(&self, peer: InstanceId) -> Option<&Endpoint> {
        self.is_up(peer).then_some(&self.endpoint)
    }

    /// The endpoint, to push to a peer that the loop has been told of.
    pub fn endpoint_mut_of(&mut self, peer: InstanceId) -> Option<&mut Endpoint> {
        self.is_up(peer).then_some(&mut self.endpoint)
    }

    /// Whether the loop has been told of a link to `peer`, and of no end of it.
    fn is_up(&self, peer: InstanceId) -> bool {
        self.peers
            .get(&peer)
            .is_some_and(|state| matches!(state.link, LinkState::Up { .. }))
    }

    /// Follows a new topology: drops links to peers that are gone, wants links to new ones.
    pub fn follow(&mut self, topology: Topology, now: Instant, out: &mut LinkNews) {
        if topology.version < self.topology.version {
            return;
        }
        self.topology = topology;
        let gone: Vec<LinkIdentity> = self
            .peers
            .values()
            .map(|state| state.identity)
            .filter(|&identity| self.topology.find(identity).is_none())
            .collect();
        for identity in gone {
            self.drop_peer(identity, out);
        }
        for peer in &self.topology.peers {
            if peer.role == self.role {
                continue;
            }
            let identity = peer.address.identity;
            self.peers.entry(identity.instance).or_insert(PeerState {
                identity,
                role_rank: peer.role_rank,
                link: LinkState::begin(self.role, now),
                reset: None,
            });
        }
        // What came early from a peer that is named now comes in its order.
        for event in std::mem::take(&mut self.unnamed) {
            self.take(event, out);
        }
    }

    /// Dials what is wanted and due, and takes what the fabric reports.
    pub fn poll(&mut self, now: Instant, out: &mut LinkNews) {
        self.take_news(out);
        if self.role == Role::Attention {
            self.dial_due(now, out);
            self.report_ready(out);
        }
        if out.status.is_none() && out.events.iter().any(is_about_a_link) {
            out.status = Some(self.describe());
        }
    }

    /// Has the link to `peer` replaced by a new one, because of `reason`; both ends' loops are told that
    /// it is down, and then that it is up. Other links are not touched.
    pub fn reset(&mut self, peer: InstanceId, reason: &str, out: &mut LinkNews) -> Option<()> {
        if !self.is_up(peer) {
            return None;
        }
        let asked = match self.role {
            Role::Attention => Ok(()),
            Role::Ffn => self.endpoint.ask_reset(peer, reason),
        };
        match asked {
            Ok(()) => self.begin_reset(peer, reason, out),
            Err(error) => {
                // Without a word with the peer there is no agreement: it is lost, and comes back.
                self.endpoint.disconnect(peer);
                let reason =
                    format!("{reason}; the peer could not be asked for a new link: {error}");
                self.lose(peer, reason, out);
            }
        }
        Some(())
    }

    /// From here on the loop does not use the present link. An attention instance connects anew.
    fn begin_reset(&mut self, peer: InstanceId, reason: &str, out: &mut LinkNews) {
        let Some(state) = self.peers.get_mut(&peer) else {
            return;
        };
        state.reset = Some(reason.to_owned());
        state.link = LinkState::begin(self.role, Instant::now());
        let reason = DownReason::Reset(reason.to_owned()).to_string();
        out.events.push(NodeEvent::LinkDown { peer, reason });
    }

    fn describe(&self) -> String {
        let num_up = self.peers.keys().filter(|&&peer| self.is_up(peer)).count();
        format!("ready, linked to {num_up} of {} peers", self.peers.len())
    }

    /// Ends the link to a peer that the topology no longer names.
    fn drop_peer(&mut self, identity: LinkIdentity, out: &mut LinkNews) {
        let Some(state) = self.peers.remove(&identity.instance) else {
            return;
        };
        let is_up = matches!(state.link, LinkState::Up { .. });
        if is_up || state.reset.is_some() {
            self.endpoint.disconnect(identity.instance);
        }
        if is_up {
            out.events.push(NodeEvent::LinkDown {
                peer: identity.instance,
                reason: DROPPED.to_owned(),
            });
        }
    }

    fn take_news(&mut self, out: &mut LinkNews) {
        let mut news = std::mem::take(&mut self.news);
        self.endpoint.poll(&mut news);
        for event in news.drain(..) {
            self.take(event, out);
        }
        self.news = news;
    }

    fn take(&mut self, event: FabricEvent, out: &mut LinkNews) {
        match event {
            FabricEvent::Arrived { peer, header } => match self.peers.get(&peer) {
                Some(state) if matches!(state.link, LinkState::Up { .. }) => {
                    out.events.push(NodeEvent::Arrival { peer, header });
                }
                // Over a link that the loop was told is down.
                Some(state) if state.reset.is_some() => {}
                _ => self.unnamed.push(event),
            },
            FabricEvent::LinkUp(link) => self.take_up(link, out),
            FabricEvent::ResetAsked { peer, reason } => {
                if self.role == Role::Attention && self.is_up(peer.instance) {
                    self.begin_reset(peer.instance, &reason, out);
                }
            }
            FabricEvent::DialFailed { peer, reason } => self.retry(peer, &reason, out),
            FabricEvent::LinkDown { peer, reason } => self.take_down(peer, &reason, out),
        }
    }

    fn take_up(&mut self, link: LinkSummary, out: &mut LinkNews) {
        let instance = link.peer.instance;
        match self.peers.get_mut(&instance) {
            Some(state) if state.identity == link.peer => match state.link {
                LinkState::Awaited | LinkState::Dialling { .. } => {
                    out.events.push(NodeEvent::LinkUp {
                        peer: instance,
                        role_rank: state.role_rank,
                        fabric: link.fabric,
                        reason: link.reason.clone(),
                        epoch: link.epoch,
                        device_offer: link.device_offer,
                    });
                    state.reset = None;
                    state.link = LinkState::Up {
                        fabric: link.fabric,
                        reason: link.reason,
                    };
                }
                // A lost peer was reported and must register again. Were it to come up as it was,
                // this instance would believe in a link whose other end the coordinator ends.
                _ => self.endpoint.disconnect(instance),
            },
            // The topology has dropped it since it was dialled.
            _ if self.role == Role::Attention => self.endpoint.disconnect(instance),
            _ => self.unnamed.push(FabricEvent::LinkUp(link)),
        }
    }

    fn take_down(&mut self, peer: LinkIdentity, reason: &DownReason, out: &mut LinkNews) {
        self.unnamed.retain(|event| match event {
            FabricEvent::LinkUp(link) => link.peer != peer,
            FabricEvent::Arrived {
                peer: source,
                header,
            } => (*source, header.epoch) != (peer.instance, peer.epoch),
            FabricEvent::LinkDown { .. }
            | FabricEvent::DialFailed { .. }
            | FabricEvent::ResetAsked { .. } => true,
        });
        let instance = peer.instance;
        let Some(state) = self.peers.get(&instance) else {
            return;
        };
        if state.identity != peer {
            return;
        }
        match (&state.link, reason) {
            // Its successor comes.
            (LinkState::Up { .. }, DownReason::Reset(why)) => self.begin_reset(instance, why, out),
            (LinkState::Up { .. }, _) => self.lose(instance, reason.to_string(), out),
            (LinkState::Awaited, DownReason::Reset(_)) => {}
            // It died instead of connecting anew, as it was asked to.
            (LinkState::Awaited, _) if state.reset.is_some() => {
                self.lose(instance, reason.to_string(), out);
            }
            _ => {}
        }
    }

    /// Gives a peer up, and tells whoever believes in it.
    fn lose(&mut self, peer: InstanceId, reason: String, out: &mut LinkNews) {
        let Some(state) = self.peers.get_mut(&peer) else {
            return;
        };
        out.reports.push(Event::PeerLost(v1::PeerLost {
            instance_id: peer.0,
            epoch: state.identity.epoch.0,
            reason: reason.clone(),
        }));
        if matches!(state.link, LinkState::Up { .. }) {
            out.events.push(NodeEvent::LinkDown { peer, reason });
        }
        state.link = LinkState::Lost;
        state.reset = None;
    }

    /// Reports each version of the topology once, as soon as all its peers are linked.
    fn report_ready(&mut self, out: &mut LinkNews) {
        if self.topology.version == 0 || self.reported_version == Some(self.topology.version) {
            return;
        }
        let mut links = Vec::with_capacity(self.peers.len());
        for state in self.peers.values() {
            let LinkState::Up { fabric, reason } = &state.link else {
                return;
            };
            links.push(v1::LinkInfo {
                peer_instance_id: state.identity.instance.0,
                fabric: (*fabric).to_owned(),
                reason: reason.clone(),
            });
        }
        self.reported_version = Some(self.topology.version);
        out.reports.push(Event::LinksReady(v1::LinksReady {
            topology_version: self.topology.version,
            links,
        }));
    }
}

fn is_about_a_link(event: &NodeEvent) -> bool {
    matches!(event, NodeEvent::LinkUp { .. } | NodeEvent::LinkDown { .. })
}
