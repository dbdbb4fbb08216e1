//! What an endpoint's owner shares with its watcher thread: who is linked, and news for each other.
//!
//! Touched when links come and go; a push or a poll without such news takes no lock.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::EventfdFlags;
use step3rt_core::ids::{Epoch, InstanceId};

use crate::config::LinkSettings;
use crate::contract::{Doorbell, Link, LinkIdentity};
use crate::doorbell::FutexDoorbell;
use crate::handshake::{Introduction, Kind, MESSAGE_BYTES, Message, RefusalCode};
use crate::lane::LinkTerms;
use crate::rdma;
use crate::state::LinkState;
use crate::tls::Tls;

/// Epochs remembered of instances that are not linked now. A cluster has far fewer instances, so
/// what is forgotten is long gone.
const MAX_REMEMBERED_EPOCHS: usize = 4096;

/// A link that the watcher accepted, on its way to the owner.
pub(crate) struct Accepted {
    pub(crate) link: Box<dyn Link>,
    pub(crate) reason: String,
}

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
}

pub(crate) struct Hub {
    pub(crate) introduction: Introduction,
    pub(crate) settings: LinkSettings,
    pub(crate) bell: Arc<FutexDoorbell>,
    /// Whether this end offers RDMA, and tries it.
    pub(crate) has_rdma: bool,
    pub(crate) rdma_devices: rdma::Devices,
    /// With it, every connection over TCP begins with a TLS handshake.
    pub(crate) tls: Option<Tls>,
    bell_fd: OwnedFd,
    registry: Mutex<Registry>,
    accepted: Mutex<Vec<Accepted>>,
    num_accepted: AtomicUsize,
    new_watches: Mutex<Vec<Watch>>,
    wake: OwnedFd,
    is_stopping: AtomicBool,
}

impl Hub {
    pub(crate) fn new(
        introduction: Introduction,
        settings: LinkSettings,
        has_rdma: bool,
        tls: Option<Tls>,
    ) -> io::Result<Self> {
        let (bell, bell_fd) = FutexDoorbell::create(settings.spin_us)?;
        let wake = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self {
            introduction,
            settings,
            bell: Arc::new(bell),
            has_rdma,
            rdma_devices: rdma::Devices::default(),
            tls,
            bell_fd,
            registry: Mutex::default(),
            accepted: Mutex::default(),
            num_accepted: AtomicUsize::new(0),
            new_watches: Mutex::default(),
            wake,
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

    /// The terms of a link to a peer whose introduction was found good.
    pub(crate) fn terms(&self, peer: LinkIdentity) -> LinkTerms {
        LinkTerms {
            local: self.introduction.identity,
            peer,
            side: self.introduction.side,
            geometry: self.introduction.geometry,
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

    /// Hands a link to the owner. One of the same instance that it has not taken yet is dropped.
    pub(crate) fn deliver(&self, link: Accepted) {
        let mut accepted = lock(&self.accepted);
        let instance = link.link.peer().instance;
        let earlier = accepted
            .iter()
            .position(|earlier| earlier.link.peer().instance == instance);
        let earlier = earlier.map(|at| accepted.remove(at));
        accepted.push(link);
        self.num_accepted.store(accepted.len(), Ordering::Release);
        drop(accepted);
        if earlier.is_some() {
            self.dismiss(instance);
        }
        self.bell.ring();
    }

    /// The links accepted since the last call; no lock when there are none.
    pub(crate) fn take_accepted(&self) -> Vec<Accepted> {
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
        self.wake_watcher();
    }

    /// For the watcher: sockets to look after since the last call.
    pub(crate) fn take_new_watches(&self) -> Vec<Watch> {
        // The eventfd only says "look"; that it is empty already is no news.
        let _ = rustix::io::read(&self.wake, &mut [0; 8]);
        std::mem::take(&mut *lock(&self.new_watches))
    }

    /// For the watcher: readable when it is wanted.
    pub(crate) fn wake(&self) -> &OwnedFd {
        &self.wake
    }

    /// Ends the watcher.
    pub(crate) fn stop(&self) {
        self.is_stopping.store(true, Ordering::Release);
        self.wake_watcher();
    }

    pub(crate) fn is_stopping(&self) -> bool {
        self.is_stopping.load(Ordering::Acquire)
    }

    fn wake_watcher(&self) {
        // Fails only when the counter is full, which wakes as well.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
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
