//! Two ends of a link through shared memory in one process: what a handshake makes, without one.
//! For tests by threads, and for models.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use step3rt_core::ids::{Epoch, InstanceId, LaneId};

use crate::contract::{Doorbell, Geometry, Link, LinkEvent, LinkIdentity, Side};
use crate::doorbell::FutexDoorbell;
use crate::frame::{Frame, FrameHeader};
use crate::lane::LinkTerms;
use crate::region::Region;
use crate::shm::{PeerMemory, ShmLink};
use crate::state::LinkState;

/// Longer than any test; models sleep until they are woken.
pub(crate) const FOREVER: Duration = Duration::from_mins(10);
pub(crate) const PAYLOAD_BYTES: usize = 8;
pub(crate) const LANE: LaneId = LaneId(0);

pub(crate) const ATTENTION: LinkIdentity = LinkIdentity {
    instance: InstanceId(1),
    epoch: Epoch(5),
};
pub(crate) const FFN: LinkIdentity = LinkIdentity {
    instance: InstanceId(2),
    epoch: Epoch(7),
};

/// One end, whose owner sleeps on `bell`, and whose watcher fails `state`.
pub(crate) struct End {
    pub(crate) link: ShmLink,
    pub(crate) bell: Arc<FutexDoorbell>,
    pub(crate) state: Arc<LinkState>,
}

/// What one end makes and passes to the other.
#[derive(Clone)]
pub(crate) struct Made {
    pub(crate) terms: LinkTerms,
    pub(crate) outgoing: Region,
    pub(crate) bell: Arc<FutexDoorbell>,
    pub(crate) fds: Arc<[OwnedFd; 2]>,
}

pub(crate) fn terms(side: Side, num_lanes: u8) -> LinkTerms {
    let (local, peer) = match side {
        Side::Initiator => (ATTENTION, FFN),
        Side::Responder => (FFN, ATTENTION),
    };
    LinkTerms {
        local,
        peer,
        side,
        geometry: Geometry {
            num_lanes,
            a2f_slot_bytes: PAYLOAD_BYTES,
            f2a_slot_bytes: PAYLOAD_BYTES,
        },
        payload_checksum: false,
    }
}

impl Made {
    pub(crate) fn new(terms: LinkTerms) -> Self {
        let (outgoing, slots_fd) = Region::share(&terms.geometry, terms.side.sends()).unwrap();
        let (bell, bell_fd) = FutexDoorbell::create(0).unwrap();
        Self {
            terms,
            outgoing,
            bell: Arc::new(bell),
            fds: Arc::new([slots_fd, bell_fd]),
        }
    }

    /// The end that this and what the peer made come to.
    pub(crate) fn meet(&self, peer: &Self) -> End {
        let memory = PeerMemory::open(&peer.fds, &self.terms).unwrap();
        let bell = Arc::clone(&self.bell);
        let state = Arc::new(LinkState::new(Arc::clone(&bell) as Arc<dyn Doorbell>));
        let (socket, _) = UnixStream::pair().unwrap();
        let socket = Arc::new(socket.into());
        // Nobody here sleeps where sockets are.
        let kept = (socket, Arc::clone(&state), None);
        let link = ShmLink::new(self.terms, self.outgoing.clone(), memory, kept);
        End { link, bell, state }
    }
}

impl End {
    /// What the next poll with news says. Sleeps as the contract says one may.
    pub(crate) fn next(&mut self) -> Vec<LinkEvent> {
        let mut events = Vec::new();
        loop {
            let seen = self.bell.current();
            self.link.poll(&mut events);
            if !events.is_empty() {
                return events;
            }
            assert!(self.bell.wait(seen, FOREVER));
        }
    }
}

pub(crate) fn frame() -> Frame {
    Frame {
        step: 0,
        layer: 0,
        num_tokens: 1,
        payload_bytes: PAYLOAD_BYTES,
    }
}

/// The header of an event that must be an arrival.
pub(crate) fn arrival(event: &LinkEvent) -> &FrameHeader {
    match event {
        LinkEvent::Arrived(header) => header,
        other => panic!("no arrival: {other:?}"),
    }
}
