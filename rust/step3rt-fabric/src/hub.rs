//! What an endpoint's owner shares with its watcher thread: who is linked, and news for each other.
//!
//! Touched when links come and go; a push or a poll without such news takes no lock.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, PoisonError};

use step3rt_core::ids::{Epoch, InstanceId};

use crate::bell::EndpointBell;
use crate::config::LinkSettings;
use crate::contract::{Doorbell, LinkIdentity};
use crate::device_offer::DeviceOffer;
use crate::handshake::{By, Introduction, Kind, MESSAGE_BYTES, Message, RefusalCode};
use crate::lane::LinkTerms;
use crate::link_epoch::{self, UsedEpochs};
use crate::new_link::NewLink;
use crate::rdma;
use crate::state::LinkState;
use crate::sync::{AtomicBool, AtomicUsize, Event, Mutex, MutexGuard, Ordering};
use crate::tls::Tls;

/// Epochs remembered of instances that are not linked now. A cluster has far fewer instances, so
/// what is forgotten is long gone.
const MAX_REMEMBERED_EPOCHS: usize = 4096;

/// A socket whose hang-up is the end of a link.
pub(crate) struct Watch {
    pub(crate) socket: Arc<OwnedFd>,
    pub(crate) process: Option<OwnedFd>,
    pub(crate) state: Arc<LinkState>,
}

#[derive(Default)]
struct Registry {
    /// The last epoch seen of each instance.
    epochs: HashMap<InstanceId, Epoch>,
    /// Links of each linked instance: more than one while a new one takes the place of the last.
    num_links: HashMap<InstanceId, usize>,
    /// Instances whose new link is about to take the place of the present one, as an end asked for:
    /// how many such links there are, and why the last one.
    resets: HashMap<InstanceId, (usize, String)>,
}

pub(crate) struct Hub {
    pub(crate) introduction: Introduction,
    pub(crate) settings: LinkSettings,
    pub(crate) bell: Arc<EndpointBell>,
    /// Whether this end offers RDMA, and tries it.
    pub(crate) has_rdma: bool,
    pub(crate) rdma_devices: rdma::Devices,
    /// With it, every connection over TCP begins with a TLS handshake.
    pub(crate) tls: Option<Tls>,
    /// What this end offers of its device's memory, where the setting allows that.
    pub(crate) device_offer: Option<DeviceOffer>,
    pub(crate) used_epochs: &'static UsedEpochs,
    bell_fd: OwnedFd,
    registry: Mutex<Registry>,
    accepted: Mutex<Vec<NewLink>>,
    num_accepted: AtomicUsize,
    new_watches: Mutex<Vec<Watch>>,
    wake: Event,
    is_stopping: AtomicBool,
}

impl Hub {
    pub(crate) fn new(
        introduction: Introduction,
        settings: LinkSettings,
        has_rdma: bool,
        tls: Option<Tls>,
    ) -> io::Result<Self> {
        let (bell, bell_fd) = EndpointBell::create(settings.spin_us)?;
        Ok(Self {
            introduction,
            settings,
            bell: Arc::new(bell),
            has_rdma,
            rdma_devices: rdma::Devices::default(),
            tls,
            device_offer: None,
            used_epochs: &link_epoch::OF_PROCESS,
            bell_fd,
            registry: Mutex::default(),
            accepted: Mutex::default(),
            num_accepted: AtomicUsize::new(0),
            new_watches: Mutex::default(),
            wake: Event::new()?,
            is_stopping: AtomicBool::new(false),
        })
    }

    /// What peers need for ringing this process.
    pub(crate) fn bell_fd(&self) -> BorrowedFd<'_> {
        self.bell_fd.as_fd()
    }

    /// One of this end's handshake messages.
    pub(crate) fn message(&self, kind: Kind) -> [u8; MESSAGE_BYTES] {
        Message {
            from: self.introduction,
            kind,
        }
        .encode()
    }

    /// What follows a hello or welcome that says `by` of this end's device memory.
    pub(crate) fn offer_by(&self, by: By) -> &[u8] {
        match (by, &self.device_offer) {
            (By::Device { .. }, Some(offer)) => offer.as_bytes(),
            _ => &[],
        }
    }

    /// The terms of a link to a peer whose introduction was found good.
    pub(crate) fn terms(&self, peer: LinkIdentity, by: By) -> LinkTerms {
        let geometry = self.introduction.geometry;
        LinkTerms {
            local: self.introduction.identity,
            peer,
            side: self.introduction.side,
            geometry: match by {
                // Payloads lie in the devices' memory.
                By::Device { .. } => geometry.without_payloads(),
                By::Carrier | By::Rdma => geometry,
            },
            payload_checksum: self.settings.payload_checksum,
        }
    }

    /// The state of a new link.
    pub(crate) fn new_state(&self) -> Arc<LinkState> {
        Arc::new(LinkState::new(Arc::clone(&self.bell) as Arc<dyn Doorbell>))
    }

    /// Counts a link to a peer, if there may be one. When it exists, [`Hub::confirm`] follows; when
    /// it is dropped or fails to come into being, [`Hub::dismiss`].
    pub(crate) fn admit(&self, peer: LinkIdentity) -> Result<(), RefusalCode> {
        let mut registry = lock(&self.registry);
        let known = registry.epochs.get(&peer.instance).copied();
        if let Some(known) = known.filter(|known| *known > peer.epoch) {
            return Err(RefusalCode::Stale(known));
        }
        let is_linked = registry.num_links.contains_key(&peer.instance);
        if !is_linked && registry.num_links.len() >= self.settings.max_peers {
            return Err(RefusalCode::Full);
        }
        *registry.num_links.entry(peer.instance).or_default() += 1;
        Ok(())
    }

    /// Remembers the epoch of a peer that was linked: earlier ones are refused from now on.
    pub(crate) fn confirm(&self, peer: LinkIdentity) {
        lock(&self.registry).remember(peer);
    }

    /// Counts a link less.
    pub(crate) fn dismiss(&self, peer: InstanceId) {
        let mut registry = lock(&self.registry);
        if let Some(num_links) = registry.num_links.get_mut(&peer) {
            *num_links -= 1;
            if *num_links == 0 {
                registry.num_links.remove(&peer);
            }
        }
    }

    /// Notes that a new link is about to take the place of the present one. Before the peer knows that
    /// there is one: from then on it may close the old one, whose end is then no loss of a peer.
    pub(crate) fn begin_reset(&self, peer: InstanceId, reason: String) {
        let mut registry = lock(&self.registry);
        let num_before = registry.resets.get(&peer).map_or(0, |(num, _)| *num);
        registry.resets.insert(peer, (num_before + 1, reason));
    }

    /// Why the link to a peer is being replaced, if it is.
    pub(crate) fn reset_of(&self, peer: InstanceId) -> Option<String> {
        let registry = lock(&self.registry);
        registry.resets.get(&peer).map(|(_, reason)| reason.clone())
    }

    /// Takes [`Hub::begin_reset`] back: the link was replaced, or will not be.
    pub(crate) fn end_reset(&self, peer: InstanceId) {
        let mut registry = lock(&self.registry);
        if let Some((num, _)) = registry.resets.get_mut(&peer) {
            *num -= 1;
            if *num == 0 {
                registry.resets.remove(&peer);
            }
        }
    }

    /// Hands a link to the owner. One of the same instance that it has not taken yet is dropped.
    pub(crate) fn deliver(&self, link: NewLink) {
        let mut accepted = lock(&self.accepted);
        let instance = link.link.peer().instance;
        let earlier = accepted
            .iter()
            .position(|earlier| earlier.link.peer().instance == instance);
        let earlier = earlier.map(|at| accepted.remove(at));
        accepted.push(link);
        self.num_accepted.store(accepted.len(), Ordering::Release);
        drop(accepted);
        if let Some(earlier) = earlier {
            if earlier.reset.is_some() {
                self.end_reset(instance);
            }
            self.dismiss(instance);
        }
        self.bell.ring();
    }

    /// The links accepted since the last call; no lock when there are none.
    pub(crate) fn take_accepted(&self) -> Vec<NewLink> {
        if self.num_accepted.load(Ordering::Acquire) == 0 {
            return Vec::new();
        }
        let mut accepted = lock(&self.accepted);
        self.num_accepted.store(0, Ordering::Release);
        std::mem::take(&mut *accepted)
    }

    /// Has the watcher thread look after a socket.
    pub(crate) fn watch(&self, watch: Watch) {
        lock(&self.new_watches).push(watch);
        self.wake.set();
    }

    /// For the watcher: sockets to look after since the last call.
    pub(crate) fn take_new_watches(&self) -> Vec<Watch> {
        // Before looking, so that what comes after the look is seen by the next one.
        self.wake.clear();
        std::mem::take(&mut *lock(&self.new_watches))
    }

    /// For the watcher: readable when it is wanted.
    pub(crate) fn wake(&self) -> &Event {
        &self.wake
    }

    /// Ends the watcher, and the thread of the sockets.
    pub(crate) fn stop(&self) {
        self.is_stopping.store(true, Ordering::Release);
        self.bell.sockets().stop();
        self.wake.set();
    }

    pub(crate) fn is_stopping(&self) -> bool {
        self.is_stopping.load(Ordering::Acquire)
    }
}

impl Registry {
    fn remember(&mut self, peer: LinkIdentity) {
        // The owner confirms a link again when it takes it; the watcher may have accepted the
        // successor by then.
        let known = self.epochs.entry(peer.instance).or_insert(peer.epoch);
        *known = (*known).max(peer.epoch);
        if self.epochs.len() > MAX_REMEMBERED_EPOCHS {
            let unlinked = self
                .epochs
                .iter()
                .filter(|(instance, _)| !self.num_links.contains_key(instance));
            let oldest = unlinked
                .min_by_key(|(_, epoch)| **epoch)
                .map(|(instance, _)| *instance);
            if let Some(oldest) = oldest {
                self.epochs.remove(&oldest);
            }
        }
    }
}

/// A panic elsewhere does not make these values wrong: each is changed in one step.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::contract::{Geometry, Side};

    fn hub(max_peers: usize) -> Hub {
        let introduction = Introduction {
            identity: identity(0, 0),
            side: Side::Responder,
            geometry: Geometry {
                num_lanes: 1,
                a2f_slot_bytes: 1,
                f2a_slot_bytes: 1,
            },
        };
        Hub::new(
            introduction,
            LinkSettings {
                max_peers,
                ..LinkSettings::default()
            },
            false,
            None,
        )
        .unwrap()
    }

    fn identity(instance: u32, epoch: u64) -> LinkIdentity {
        LinkIdentity {
            instance: InstanceId(instance),
            epoch: Epoch(epoch),
        }
    }

    #[test]
    fn an_older_epoch_is_refused_also_after_its_successor_has_left() {
        let hub = hub(4);
        hub.admit(identity(1, 5)).unwrap();
        hub.confirm(identity(1, 5));
        hub.dismiss(InstanceId(1));
        assert_eq!(hub.admit(identity(1, 4)), Err(RefusalCode::Stale(Epoch(5))));
        assert!(hub.admit(identity(1, 5)).is_ok());
        assert!(hub.admit(identity(1, 6)).is_ok());
    }

    #[test]
    fn a_late_confirmation_does_not_make_its_successor_forgotten() {
        let hub = hub(4);
        for epoch in [5, 6] {
            hub.admit(identity(1, epoch)).unwrap();
            hub.confirm(identity(1, epoch));
        }
        hub.confirm(identity(1, 5));
        assert_eq!(hub.admit(identity(1, 5)), Err(RefusalCode::Stale(Epoch(6))));
    }

    #[test]
    fn an_epoch_that_was_never_linked_is_not_remembered() {
        let hub = hub(4);
        hub.admit(identity(1, 9)).unwrap();
        hub.dismiss(InstanceId(1));
        assert!(hub.admit(identity(1, 5)).is_ok());
    }

    #[test]
    fn a_full_endpoint_refuses_strangers_but_lets_its_peers_come_back() {
        let hub = hub(1);
        hub.admit(identity(1, 1)).unwrap();
        assert_eq!(hub.admit(identity(2, 2)), Err(RefusalCode::Full));
        hub.admit(identity(1, 3)).unwrap();
        hub.dismiss(InstanceId(1));
        assert_eq!(hub.admit(identity(2, 2)), Err(RefusalCode::Full));
        hub.dismiss(InstanceId(1));
        assert!(hub.admit(identity(2, 2)).is_ok());
    }

    #[test]
    fn a_link_is_being_replaced_until_the_last_that_was_to_take_its_place_has() {
        let (hub, peer) = (hub(4), InstanceId(1));
        hub.end_reset(peer);
        assert_eq!(hub.reset_of(peer), None);
        hub.begin_reset(peer, "first".to_owned());
        hub.begin_reset(peer, "second".to_owned());
        hub.end_reset(peer);
        assert_eq!(hub.reset_of(peer).as_deref(), Some("second"));
        assert_eq!(hub.reset_of(InstanceId(2)), None);
        hub.end_reset(peer);
        assert_eq!(hub.reset_of(peer), None);
    }

    #[test]
    fn memory_of_the_departed_is_bounded() {
        let hub = hub(2);
        let last = u32::try_from(MAX_REMEMBERED_EPOCHS + 10).unwrap();
        for instance in 1..=last {
            hub.admit(identity(instance, instance.into())).unwrap();
            hub.confirm(identity(instance, instance.into()));
            hub.dismiss(InstanceId(instance));
        }
        let registry = lock(&hub.registry);
        assert_eq!(registry.epochs.len(), MAX_REMEMBERED_EPOCHS);
        assert!(registry.epochs.contains_key(&InstanceId(last)));
        assert!(!registry.epochs.contains_key(&InstanceId(1)));
    }
}
