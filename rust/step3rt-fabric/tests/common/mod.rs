//! Endpoints to test with, and waiting for what they report.

#![allow(dead_code, reason = "each test binary uses its own part")]

#[cfg(feature = "tls")]
#[path = "../../../step3rt-tls/tests/certs/mod.rs"]
pub(crate) mod certs;

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use step3rt_core::ids::{Epoch, InstanceId, LaneId};
use step3rt_fabric::Tls;
use step3rt_fabric::address::{FabricChoice, PeerAddress, boot_id};
use step3rt_fabric::contract::{DownReason, Geometry, LinkIdentity, Side};
use step3rt_fabric::device_offer::DeviceOffer;
use step3rt_fabric::endpoint::{Endpoint, EndpointConfig, FabricEvent, LinkSettings, LinkSummary};
use step3rt_fabric::frame::{Frame, FrameHeader};
use step3rt_fabric::sim::{self, SimConfig, SimEnd, SimFaults};

/// How long anything may take on a busy machine; never waited for in full by a passing test.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// What carries the links of a test.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fabric {
    Shm,
    Tcp,
    /// TCP that is encrypted.
    #[cfg(feature = "tls")]
    Tls,
    /// Needs a device, so that the tests of it are ignored unless asked for: `make test-rdma`.
    Rdma,
    Sim,
}

impl Fabric {
    /// Whether its listeners are TCP sockets.
    pub(crate) fn listens_on_tcp(self) -> bool {
        !matches!(self, Self::Shm | Self::Sim)
    }

    /// What an endpoint of it is bound with; all that a test makes trust each other.
    pub(crate) fn tls(self) -> Option<Tls> {
        match self {
            #[cfg(feature = "tls")]
            Self::Tls => {
                static MEMBER: std::sync::OnceLock<Tls> = std::sync::OnceLock::new();
                let member = || certs::Authority::new().member(certs::GOOD);
                Some(MEMBER.get_or_init(member).clone())
            }
            _ => None,
        }
    }

    pub(crate) fn choice(self) -> FabricChoice {
        match self {
            Self::Shm => FabricChoice::Shm,
            Self::Tcp => FabricChoice::Tcp,
            #[cfg(feature = "tls")]
            Self::Tls => FabricChoice::Tcp,
            Self::Rdma => FabricChoice::Rdma,
            Self::Sim => FabricChoice::Auto,
        }
    }
}

pub(crate) fn geometry(num_lanes: u8, slot_bytes: usize) -> Geometry {
    Geometry {
        num_lanes,
        a2f_slot_bytes: slot_bytes,
        f2a_slot_bytes: slot_bytes,
    }
}

pub(crate) const fn identity(instance: u32, epoch: u64) -> LinkIdentity {
    LinkIdentity {
        instance: InstanceId(instance),
        epoch: Epoch(epoch),
    }
}

pub(crate) fn frame(step: u64, payload_bytes: usize) -> Frame {
    Frame {
        step,
        layer: 3,
        num_tokens: 2,
        payload_bytes,
    }
}

/// Bytes that differ from those of any other seed at about every place.
pub(crate) fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut out = Vec::with_capacity(len + 8);
    while out.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        out.extend_from_slice(&state.to_le_bytes());
    }
    out.truncate(len);
    out
}

/// Patient with handshakes, which are long where the machine is busy with others' slots.
fn settings() -> LinkSettings {
    LinkSettings {
        handshake_timeout: PATIENCE,
        ..LinkSettings::default()
    }
}

/// An endpoint and what it reported but the test has not asked for yet.
pub(crate) struct Node {
    pub(crate) endpoint: Endpoint,
    pub(crate) events: VecDeque<FabricEvent>,
    batch: Vec<FabricEvent>,
}

impl Node {
    pub(crate) fn bind(
        fabric: Fabric,
        identity: LinkIdentity,
        side: Side,
        geometry: Geometry,
    ) -> Self {
        let is_responder = side == Side::Responder;
        let config = EndpointConfig {
            identity,
            side,
            geometry,
            fabric: fabric.choice(),
            listen_shm: is_responder && fabric == Fabric::Shm,
            listen_tcp: (is_responder && fabric.listens_on_tcp())
                .then(|| "127.0.0.1:0".parse().unwrap()),
            advertise_host: None,
            settings: settings(),
        };
        Self::new(Endpoint::bind_with(config, None, fabric.tls()).unwrap())
    }

    pub(crate) fn new(endpoint: Endpoint) -> Self {
        Self {
            endpoint,
            events: VecDeque::new(),
            batch: Vec::new(),
        }
    }

    pub(crate) fn attention(fabric: Fabric, instance: u32, geometry: Geometry) -> Self {
        Self::bind(fabric, identity(instance, 1), Side::Initiator, geometry)
    }

    pub(crate) fn ffn(fabric: Fabric, instance: u32, geometry: Geometry) -> Self {
        Self::bind(fabric, identity(instance, 1), Side::Responder, geometry)
    }

    pub(crate) fn identity(&self) -> LinkIdentity {
        self.endpoint.config().identity
    }

    pub(crate) fn instance(&self) -> InstanceId {
        self.identity().instance
    }

    pub(crate) fn address(&self) -> PeerAddress {
        PeerAddress {
            identity: self.identity(),
            boot_id: boot_id().unwrap(),
            addresses: self.endpoint.addresses().to_vec(),
        }
    }

    /// Links this node, an initiator, to another, and takes the other's report of it.
    pub(crate) fn link(&mut self, fabric: Fabric, ffn: &mut Self) {
        self.start_link(fabric, ffn);
        ffn.expect_up(self.identity());
    }

    /// Links this node to another, and leaves the other's report to be taken.
    pub(crate) fn start_link(&mut self, fabric: Fabric, ffn: &mut Self) {
        if fabric != Fabric::Sim {
            self.endpoint.connect(&ffn.address()).unwrap();
            return;
        }
        let ends = [&self.endpoint, &ffn.endpoint].map(|endpoint| SimEnd {
            identity: endpoint.config().identity,
            doorbell: endpoint.doorbell(),
        });
        let geometry = self.endpoint.config().geometry;
        let config = SimConfig {
            seed: 1,
            geometry,
            faults: SimFaults::default(),
        };
        let (ours, theirs) = sim::pair(config, &ends[0], &ends[1]).unwrap();
        self.endpoint.adopt(Box::new(ours)).unwrap();
        ffn.endpoint.adopt(Box::new(theirs)).unwrap();
        self.expect_up(ffn.identity());
    }

    /// The next report; panics when none comes.
    pub(crate) fn next(&mut self) -> FabricEvent {
        let doorbell = self.endpoint.doorbell();
        let started = Instant::now();
        loop {
            if let Some(event) = self.events.pop_front() {
                return event;
            }
            let seen = doorbell.current();
            self.endpoint.poll(&mut self.batch);
            self.events.extend(self.batch.drain(..));
            if self.events.is_empty() {
                let left = PATIENCE.saturating_sub(started.elapsed());
                assert!(
                    doorbell.wait(seen, left),
                    "nothing happened for {PATIENCE:?}"
                );
            }
        }
    }

    pub(crate) fn expect_up(&mut self, peer: LinkIdentity) -> LinkSummary {
        match self.next() {
            FabricEvent::LinkUp(summary) => {
                assert_eq!(summary.peer, peer);
                summary
            }
            other => panic!("{other:?} instead of a link"),
        }
    }

    pub(crate) fn expect_arrival(&mut self) -> (InstanceId, FrameHeader) {
        match self.next() {
            FabricEvent::Arrived { peer, header } => {
                assert_eq!(header.source, peer);
                (peer, header)
            }
            other => panic!("{other:?} instead of an arrival"),
        }
    }

    pub(crate) fn expect_down(&mut self) -> (LinkIdentity, DownReason) {
        match self.next() {
            FabricEvent::LinkDown { peer, reason } => (peer, reason),
            other => panic!("{other:?} instead of an end"),
        }
    }

    /// Asserts that nothing is to be reported at this moment.
    pub(crate) fn expect_nothing(&mut self) {
        self.endpoint.poll(&mut self.batch);
        self.events.extend(self.batch.drain(..));
        assert!(self.events.is_empty(), "{:?}", self.events);
    }

    pub(crate) fn push(&mut self, to: (InstanceId, LaneId), step: u64, payload: &[u8]) {
        let (peer, lane) = to;
        self.endpoint.send_slot(peer, lane).unwrap().write(payload);
        self.endpoint
            .push(peer, lane, frame(step, payload.len()))
            .unwrap();
    }

    pub(crate) fn payload(&self, header: &FrameHeader) -> Vec<u8> {
        let slot = self
            .endpoint
            .receive_slot(header.source, header.lane)
            .unwrap();
        let mut payload = vec![0; header.frame.payload_bytes];
        slot.read(&mut payload);
        payload
    }
}

/// An attention instance (1) and an FFN instance (2), linked.
pub(crate) fn linked(fabric: Fabric, geometry: Geometry) -> (Node, Node) {
    let mut attention = Node::attention(fabric, 1, geometry);
    let mut ffn = Node::ffn(fabric, 2, geometry);
    attention.link(fabric, &mut ffn);
    (attention, ffn)
}

/// A node of one carrier that offers `offer` of its device's memory.
pub(crate) fn bind_with_device(
    (carrier, setting): (Fabric, &str),
    instance: u32,
    side: Side,
    offer: Option<&[u8]>,
) -> Node {
    let mut config = EndpointConfig {
        identity: identity(instance, 1),
        side,
        geometry: geometry(2, 1 << 16),
        fabric: setting.parse().unwrap(),
        listen_shm: side == Side::Responder && carrier == Fabric::Shm,
        listen_tcp: None,
        advertise_host: None,
        settings: LinkSettings::default(),
    };
    if side == Side::Responder && carrier == Fabric::Tcp {
        config.listen_tcp = Some("127.0.0.1:0".parse().unwrap());
    }
    let offer = offer.map(|bytes| DeviceOffer::new(bytes).unwrap());
    Node::new(Endpoint::bind_with_device(config, offer).unwrap())
}
