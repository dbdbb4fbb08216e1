//! Two ends of a link through shared memory, for models: what a handshake makes, without sockets
//! that block.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use step3rt_core::ids::{Epoch, InstanceId, LaneId};

use crate::contract::{Doorbell, Geometry, Link, LinkEvent, LinkIdentity, Side};
use crate::doorbell::FutexDoorbell;
use crate::frame::{Frame, FrameHeader};
use crate::lane::{Lanes, LinkTerms};
use crate::region::Region;
use crate::shm::{PeerMemory, ShmLink};
use crate::state::LinkState;

pub(super) const FOREVER: Duration = Duration::MAX;
pub(super) const PAYLOAD_BYTES: usize = 8;
pub(super) const LANE: LaneId = LaneId(0);

pub(super) const ATTENTION: LinkIdentity = LinkIdentity {
    instance: InstanceId(1),
    epoch: Epoch(5),
};
pub(super) const FFN: LinkIdentity = LinkIdentity {
    instance: InstanceId(2),
    epoch: Epoch(7),
};

/// One end, whose owner sleeps on `bell`, and whose watcher fails `state`.
pub(super) struct End {
    pub(super) link: ShmLink,
    pub(super) bell: Arc<FutexDoorbell>,
    pub(super) state: Arc<LinkState>,
}

/// What one end makes and passes to the other.
#[derive(Clone)]
pub(super) struct Made {
    pub(super) terms: LinkTerms,
    pub(super) outgoing: Region,
    pub(super) bell: Arc<FutexDoorbell>,
    pub(super) fds: Arc<[OwnedFd; 2]>,
}

pub(super) fn terms(side: Side, num_lanes: u8) -> LinkTerms {
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
    pub(super) fn new(terms: LinkTerms) -> Self {
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
    pub(super) fn meet(&self, peer: &Self) -> End {
        let memory = PeerMemory::open(&peer.fds, &self.terms).unwrap();
        let bell = Arc::clone(&self.bell);
        let state = Arc::new(LinkState::new(Arc::clone(&bell) as Arc<dyn Doorbell>));
        let (socket, _) = UnixStream::pair().unwrap();
        let socket = Arc::new(socket.into());
        let kept = (socket, Arc::clone(&state));
        let link = ShmLink::new(self.terms, self.outgoing.clone(), memory, kept);
        End { link, bell, state }
    }

    /// As [`Made::meet`], but only the lanes, for a process that stops in the middle of a push.
    pub(super) fn lanes(&self, peer: &Self) -> Lanes {
        let geometry = &self.terms.geometry;
        let incoming = Region::open(&peer.fds[0], geometry, self.terms.side.receives()).unwrap();
        Lanes::new(self.terms, self.outgoing.clone(), incoming)
    }
}

/// The attention instance's end and the FFN instance's.
pub(super) fn pair(num_lanes: u8) -> (End, End) {
    let sides = [Side::Initiator, Side::Responder];
    let [attention, ffn] = sides.map(|side| Made::new(terms(side, num_lanes)));
    (attention.meet(&ffn), ffn.meet(&attention))
}

impl End {
    /// Writes and pushes a payload of `value`'s bytes.
    pub(super) fn push(&mut self, lane: LaneId, value: u64) {
        let slot = self.link.send_slot(lane).unwrap();
        slot.write(&value.to_ne_bytes());
        self.link.push(lane, frame()).unwrap();
    }

    /// What the next poll with news says. Sleeps as the contract says one may.
    pub(super) fn next(&mut self) -> Vec<LinkEvent> {
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

    /// The payload of an arrival.
    pub(super) fn payload(&self, lane: LaneId) -> u64 {
        let mut bytes = [0; PAYLOAD_BYTES];
        self.link.receive_slot(lane).unwrap().read(&mut bytes);
        u64::from_ne_bytes(bytes)
    }
}

pub(super) fn frame() -> Frame {
    Frame {
        step: 0,
        layer: 0,
        num_tokens: 1,
        payload_bytes: PAYLOAD_BYTES,
    }
}

/// The header of an event that must be an arrival.
pub(super) fn arrival(event: &LinkEvent) -> &FrameHeader {
    match event {
        LinkEvent::Arrived(header) => header,
        LinkEvent::Down(reason) => panic!("no arrival: {reason}"),
    }
}
