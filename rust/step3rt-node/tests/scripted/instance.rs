//! Whole instances under a scripted coordinator.

use std::thread;
use std::time::{Duration, Instant};

use step3rt_core::ids::{InstanceId, LaneId};
use step3rt_fabric::frame::Frame;
use step3rt_node::event::NodeEvent;
use step3rt_node::node::Node;
use step3rt_proto::v1;
use step3rt_proto::v1::session_request::Event;
use step3rt_proto::v1::session_response::Command;

use super::{Coordinator, PATIENCE, ScriptedSession, options};

pub(crate) const LANE: LaneId = LaneId(1);
pub(crate) const A2F_SLOT_BYTES: usize = 4096;
pub(crate) const F2A_SLOT_BYTES: usize = 2048;

/// An instance, and its session from the coordinator's side.
pub(crate) struct Instance {
    pub(crate) node: Node,
    pub(crate) scripted: ScriptedSession,
    pub(crate) peer: v1::Peer,
}

impl Instance {
    /// Starts an instance and takes it as far as Ready.
    pub(crate) fn start(
        coordinator: &mut Coordinator,
        role: v1::Role,
        id: u32,
        fabric: &str,
    ) -> Self {
        Self::start_with_device(coordinator, (role, id), fabric, None)
    }

    /// The same, of an instance that offers device memory.
    pub(crate) fn start_with_device(
        coordinator: &mut Coordinator,
        (role, id): (v1::Role, u32),
        fabric: &str,
        device_offer: Option<&[u8]>,
    ) -> Self {
        let mut instance = Self::join(coordinator, role, id, fabric);
        let node = &mut instance.node;
        node.bind(A2F_SLOT_BYTES, F2A_SLOT_BYTES, device_offer)
            .unwrap();
        node.ready(5, false).unwrap();
        let Some(Event::Ready(ready)) = instance.scripted.next_report() else {
            panic!("no Ready");
        };
        assert_eq!(ready.num_kv_blocks, 5);
        instance.peer.addresses = ready.addresses;
        instance
    }

    /// Starts an instance and takes it as far as Welcome.
    pub(crate) fn join(
        coordinator: &mut Coordinator,
        role: v1::Role,
        id: u32,
        fabric: &str,
    ) -> Self {
        let name = match role {
            v1::Role::Attention => "attention",
            _ => "ffn",
        };
        let options = options(&coordinator.address.to_string(), name, 20.0);
        let epoch = u64::from(id) + 100;
        thread::scope(|scope| {
            let accepting = scope.spawn(|| {
                let mut scripted = coordinator.accept();
                let hello = scripted.welcome(id, epoch, fabric);
                (scripted, hello)
            });
            let node = Node::connect(options, &mut || false).unwrap();
            let (scripted, hello) = accepting.join().unwrap();
            let peer = v1::Peer {
                instance_id: id,
                role: role.into(),
                role_rank: id * 10,
                epoch,
                boot_id: hello.boot_id,
                addresses: vec![],
            };
            Self {
                node,
                scripted,
                peer,
            }
        })
    }

    pub(crate) fn id(&self) -> InstanceId {
        InstanceId(self.peer.instance_id)
    }

    pub(crate) fn send_topology(&self, version: u64, peers: &[&v1::Peer]) {
        self.scripted.send(Command::Topology(v1::Topology {
            version,
            peers: peers.iter().map(|&peer| peer.clone()).collect(),
        }));
    }

    /// Polls until `count` events have come.
    pub(crate) fn events(&mut self, count: usize) -> Vec<NodeEvent> {
        let deadline = Instant::now() + PATIENCE;
        let mut events = vec![];
        while events.len() < count {
            assert!(Instant::now() < deadline, "only {events:?} came");
            self.node.poll(Duration::from_secs(1), &mut events).unwrap();
        }
        assert_eq!(events.len(), count, "{events:?}");
        events
    }

    pub(crate) fn event(&mut self) -> NodeEvent {
        self.events(1).remove(0)
    }
}

/// An attention and an FFN instance that know each other.
pub(crate) fn linked_pair(coordinator: &mut Coordinator, fabric: &str) -> (Instance, Instance) {
    let mut ffn = Instance::start(coordinator, v1::Role::Ffn, 1, fabric);
    let mut attention = Instance::start(coordinator, v1::Role::Attention, 2, fabric);
    let peers = [&ffn.peer.clone(), &attention.peer.clone()];
    attention.send_topology(7, &peers);
    ffn.send_topology(7, &peers);
    assert!(matches!(attention.event(), NodeEvent::LinkUp { .. }));
    assert!(matches!(ffn.event(), NodeEvent::LinkUp { .. }));
    let Some(Event::LinksReady(_)) = attention.scripted.next_report() else {
        panic!("no LinksReady");
    };
    (attention, ffn)
}

pub(crate) fn frame(step: u64, layer: u16) -> Frame {
    Frame {
        step,
        layer,
        num_tokens: 3,
        payload_bytes: 96,
    }
}
