//! Whole instances in one process: real sessions, real links over shared memory and TCP, and a
//! scripted coordinator.

#![allow(clippy::unwrap_used, reason = "a test that cannot set up fails")]

mod scripted;

use std::thread;
use std::time::{Duration, Instant};

use scripted::{Coordinator, PATIENCE, ReservedPort, ScriptedSession, options};
use step3rt_core::ids::{InstanceId, LaneId, SequenceId, StepId, TokenId};
use step3rt_core::step::{SequenceOutput, StepOutput, TokenLogprob};
use step3rt_fabric::frame::Frame;
use step3rt_node::error::NodeErrorKind;
use step3rt_node::event::NodeEvent;
use step3rt_node::node::{Node, StepTiming};
use step3rt_proto::v1;
use step3rt_proto::v1::session_request::Event;
use step3rt_proto::v1::session_response::Command;

const LANE: LaneId = LaneId(1);
const A2F_SLOT_BYTES: usize = 4096;
const F2A_SLOT_BYTES: usize = 2048;

/// An instance, and its session from the coordinator's side.
struct Instance {
    node: Node,
    scripted: ScriptedSession,
    peer: v1::Peer,
}

impl Instance {
    /// Starts an instance and takes it as far as Ready.
    fn start(coordinator: &mut Coordinator, role: v1::Role, id: u32, fabric: &str) -> Self {
        let mut instance = Self::join(coordinator, role, id, fabric);
        let node = &mut instance.node;
        node.bind(A2F_SLOT_BYTES, F2A_SLOT_BYTES).unwrap();
        node.ready(5, false).unwrap();
        let Some(Event::Ready(ready)) = instance.scripted.next_report() else {
            panic!("no Ready");
        };
        assert_eq!(ready.num_kv_blocks, 5);
        instance.peer.addresses = ready.addresses;
        instance
    }

    /// Starts an instance and takes it as far as Welcome.
    fn join(coordinator: &mut Coordinator, role: v1::Role, id: u32, fabric: &str) -> Self {
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

    fn id(&self) -> InstanceId {
        InstanceId(self.peer.instance_id)
    }

    fn send_topology(&self, version: u64, peers: &[&v1::Peer]) {
        self.scripted.send(Command::Topology(v1::Topology {
            version,
            peers: peers.iter().map(|&peer| peer.clone()).collect(),
        }));
    }

    /// Polls until `count` events have come.
    fn events(&mut self, count: usize) -> Vec<NodeEvent> {
        let deadline = Instant::now() + PATIENCE;
        let mut events = vec![];
        while events.len() < count {
            assert!(Instant::now() < deadline, "only {events:?} came");
            self.node.poll(Duration::from_secs(1), &mut events).unwrap();
        }
        assert_eq!(events.len(), count, "{events:?}");
        events
    }

    fn event(&mut self) -> NodeEvent {
        self.events(1).remove(0)
    }
}

/// An attention and an FFN instance that know each other.
fn linked_pair(coordinator: &mut Coordinator, fabric: &str) -> (Instance, Instance) {
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

fn frame(step: u64, layer: u16) -> Frame {
    Frame {
        step,
        layer,
        num_tokens: 3,
        payload_bytes: 96,
    }
}

fn check_links_and_round_trip(fabric: &str) {
    let mut coordinator = Coordinator::start();
    let mut ffn = Instance::start(&mut coordinator, v1::Role::Ffn, 1, fabric);
    let mut attention = Instance::start(&mut coordinator, v1::Role::Attention, 2, fabric);
    assert_eq!(attention.peer.addresses, [], "nobody connects to attention");
    let peers = [&ffn.peer.clone(), &attention.peer.clone()];
    attention.send_topology(7, &peers);
    ffn.send_topology(7, &peers);

    match attention.event() {
        NodeEvent::LinkUp {
            peer,
            role_rank,
            fabric: chosen,
            reason,
        } => {
            assert_eq!((peer, role_rank, chosen), (ffn.id(), 10, fabric));
            assert!(!reason.is_empty());
        }
        event => panic!("{event:?}"),
    }
    match ffn.event() {
        NodeEvent::LinkUp {
            peer,
            role_rank,
            fabric: chosen,
            ..
        } => {
            assert_eq!((peer, role_rank, chosen), (attention.id(), 20, fabric));
        }
        event => panic!("{event:?}"),
    }
    match attention.scripted.next_report() {
        Some(Event::LinksReady(ready)) => {
            assert_eq!(ready.topology_version, 7);
            assert_eq!(ready.links.len(), 1);
            assert_eq!(ready.links[0].peer_instance_id, 1);
            assert_eq!(ready.links[0].fabric, fabric);
        }
        event => panic!("{event:?}"),
    }

    for (from, to, sequence) in [(true, false, 1), (false, true, 1), (true, false, 2)] {
        let (id_a, id_f) = (attention.id(), ffn.id());
        let (source, target) = if from { (id_a, id_f) } else { (id_f, id_a) };
        let sent = frame(40 + sequence, 3);
        let sender = if from { &mut attention } else { &mut ffn };
        sender.node.push(target, LANE, sent).unwrap();
        let receiver = if to { &mut attention } else { &mut ffn };
        match receiver.event() {
            NodeEvent::Arrival { peer, header } => {
                assert_eq!((peer, header.source), (source, source));
                assert_eq!((header.lane, header.sequence), (LANE, sequence));
                assert_eq!(header.frame, sent);
            }
            event => panic!("{event:?}"),
        }
    }
}

#[test]
fn instances_of_a_topology_link_and_exchange_frames_over_shared_memory() {
    check_links_and_round_trip("shm");
}

#[test]
fn instances_of_a_topology_link_and_exchange_frames_over_tcp() {
    check_links_and_round_trip("tcp");
}

#[test]
fn every_version_of_the_topology_is_reported_as_linked() {
    let mut coordinator = Coordinator::start();
    let (mut attention, ffn) = linked_pair(&mut coordinator, "shm");
    attention.send_topology(8, &[&ffn.peer, &attention.peer]);
    let mut events = vec![];
    attention.node.poll(Duration::ZERO, &mut events).unwrap();
    let deadline = Instant::now() + PATIENCE;
    let reported = loop {
        attention
            .node
            .poll(Duration::from_millis(20), &mut events)
            .unwrap();
        if let Some(Event::LinksReady(ready)) = attention.scripted.try_next_report() {
            break ready;
        }
        assert!(Instant::now() < deadline);
    };
    assert_eq!(reported.topology_version, 8);
    assert_eq!(events, []);
}

#[test]
fn a_peer_is_invisible_until_the_coordinator_names_it() {
    let mut coordinator = Coordinator::start();
    let mut ffn = Instance::start(&mut coordinator, v1::Role::Ffn, 1, "shm");
    let mut attention = Instance::start(&mut coordinator, v1::Role::Attention, 2, "shm");
    attention.send_topology(7, &[&ffn.peer, &attention.peer]);
    attention.event();
    attention.node.push(ffn.id(), LANE, frame(0, 0)).unwrap();

    let mut events = vec![];
    ffn.node
        .poll(Duration::from_millis(50), &mut events)
        .unwrap();
    assert_eq!(events, [], "the FFN instance has no topology yet");
    let error = ffn.node.receive_slot(attention.id(), LANE).err().unwrap();
    assert_eq!(error.kind(), NodeErrorKind::Unavailable);

    ffn.send_topology(7, &[&ffn.peer, &attention.peer]);
    let events = ffn.events(2);
    assert!(matches!(events[0], NodeEvent::LinkUp { .. }), "{events:?}");
    assert!(matches!(events[1], NodeEvent::Arrival { .. }), "{events:?}");
    assert_eq!(
        ffn.node.receive_slot(attention.id(), LANE).unwrap().len(),
        A2F_SLOT_BYTES
    );
}

#[test]
fn a_dead_peer_that_the_topology_still_names_is_reported_lost() {
    let mut coordinator = Coordinator::start();
    let (mut attention, ffn) = linked_pair(&mut coordinator, "shm");
    let ffn_id = ffn.id();
    drop(ffn);
    assert!(matches!(
        attention.event(),
        NodeEvent::LinkDown { peer, .. } if peer == ffn_id
    ));
    match attention.scripted.next_report() {
        Some(Event::PeerLost(lost)) => {
            assert_eq!((lost.instance_id, lost.epoch), (1, 101));
            assert!(!lost.reason.is_empty());
        }
        event => panic!("{event:?}"),
    }
    let error = attention.node.push(ffn_id, LANE, frame(1, 0)).unwrap_err();
    assert_eq!(error.kind(), NodeErrorKind::Unavailable);
}

#[test]
fn a_peer_that_comes_back_with_a_new_epoch_is_linked_again() {
    let mut coordinator = Coordinator::start();
    let (mut attention, ffn) = linked_pair(&mut coordinator, "tcp");
    drop(ffn);
    assert!(matches!(attention.event(), NodeEvent::LinkDown { .. }));
    let returned = Instance::start(&mut coordinator, v1::Role::Ffn, 3, "tcp");
    attention.send_topology(8, &[&attention.peer, &returned.peer]);
    assert!(matches!(
        attention.event(),
        NodeEvent::LinkUp {
            peer: InstanceId(3),
            ..
        }
    ));
}

#[test]
fn a_peer_that_leaves_the_topology_is_dropped_without_an_alarm() {
    let mut coordinator = Coordinator::start();
    let (mut attention, mut ffn) = linked_pair(&mut coordinator, "shm");
    attention.send_topology(8, &[&attention.peer]);
    match attention.event() {
        NodeEvent::LinkDown { peer, reason } => {
            assert_eq!(peer, ffn.id());
            assert!(reason.contains("out of the topology"), "{reason}");
        }
        event => panic!("{event:?}"),
    }
    match attention.scripted.next_report() {
        Some(Event::LinksReady(ready)) => {
            assert_eq!((ready.topology_version, ready.links.len()), (8, 0));
        }
        event => panic!("an alarm or nothing: {event:?}"),
    }
    assert!(matches!(ffn.event(), NodeEvent::LinkDown { .. }));
}

#[test]
fn an_unreachable_peer_is_tried_again_and_people_are_told() {
    let mut coordinator = Coordinator::start();
    let mut ffn = Instance::start(&mut coordinator, v1::Role::Ffn, 1, "tcp");
    let mut attention = Instance::start(&mut coordinator, v1::Role::Attention, 2, "tcp");
    let closed = ReservedPort::new();
    let mut elsewhere = ffn.peer.clone();
    elsewhere.addresses[0].address = closed.address.to_string();
    attention.send_topology(7, &[&elsewhere, &attention.peer]);

    let mut events = vec![];
    let deadline = Instant::now() + PATIENCE;
    loop {
        attention
            .node
            .poll(Duration::from_millis(50), &mut events)
            .unwrap();
        assert_eq!(events, []);
        match attention.scripted.try_next_event() {
            Some(Event::Heartbeat(beat)) if beat.status.starts_with("cannot link to FFN") => break,
            Some(Event::Heartbeat(_)) | None => {}
            event => panic!("{event:?}"),
        }
        assert!(Instant::now() < deadline);
    }
    attention.send_topology(8, &[&ffn.peer, &attention.peer]);
    assert!(matches!(attention.event(), NodeEvent::LinkUp { .. }));
    ffn.send_topology(8, &[&ffn.peer, &attention.peer]);
    assert!(matches!(ffn.event(), NodeEvent::LinkUp { .. }));
}

#[test]
fn verbs_out_of_order_are_refused_and_change_nothing() {
    let mut coordinator = Coordinator::start();
    let mut instance = Instance::join(&mut coordinator, v1::Role::Ffn, 1, "auto");
    let node = &mut instance.node;
    let mut events = vec![];
    let error = node.poll(Duration::ZERO, &mut events).unwrap_err();
    assert_eq!(error.kind(), NodeErrorKind::InvalidArgument);
    assert_eq!(
        node.ready(1, false).unwrap_err().to_string(),
        "`ready` is not allowed now: it comes once, after bind"
    );
    node.bind(64, 64).unwrap();
    assert_eq!(
        node.bind(64, 64).unwrap_err().to_string(),
        "`bind` is not allowed now: it comes once, before ready"
    );
    node.ready(1, false).unwrap();
    assert!(node.ready(1, false).is_err());
    node.poll(Duration::ZERO, &mut events).unwrap();
    node.close();
    node.close();
    assert!(node.poll(Duration::ZERO, &mut events).is_err());
}

#[test]
fn slots_of_no_size_are_refused() {
    let mut coordinator = Coordinator::start();
    let mut instance = Instance::join(&mut coordinator, v1::Role::Ffn, 1, "auto");
    let error = instance.node.bind(0, 64).unwrap_err();
    assert_eq!(error.kind(), NodeErrorKind::Config);
    assert!(error.to_string().contains("0 bytes"), "{error}");
    instance.node.bind(64, 64).unwrap();
}

#[test]
fn pushes_that_the_contract_does_not_allow_are_refused() {
    let mut coordinator = Coordinator::start();
    let (mut attention, mut ffn) = linked_pair(&mut coordinator, "shm");
    let (attention_id, ffn_id) = (attention.id(), ffn.id());
    let refused = |node: &mut Node, peer, lane, frame| node.push(peer, lane, frame).unwrap_err();

    let error = refused(&mut ffn.node, attention_id, LANE, frame(0, 0));
    assert_eq!(
        error.kind(),
        NodeErrorKind::InvalidArgument,
        "nothing to answer"
    );
    attention.node.push(ffn_id, LANE, frame(0, 0)).unwrap();
    let error = refused(&mut attention.node, ffn_id, LANE, frame(0, 1));
    assert_eq!(error.kind(), NodeErrorKind::InvalidArgument, "no credit");
    let error = refused(&mut attention.node, ffn_id, LaneId(2), frame(0, 0));
    assert!(
        error.to_string().contains("the link has 2 lanes"),
        "{error}"
    );
    let too_large = Frame {
        payload_bytes: A2F_SLOT_BYTES + 1,
        ..frame(0, 0)
    };
    let error = refused(&mut attention.node, ffn_id, LaneId(0), too_large);
    assert!(
        error.to_string().contains("exceeds the slot of 4096"),
        "{error}"
    );
    let error = refused(&mut attention.node, InstanceId(77), LANE, frame(0, 0));
    assert_eq!(error.kind(), NodeErrorKind::Unavailable);

    let no_lane = attention.node.send_slot(ffn_id, LaneId(2)).err().unwrap();
    assert_eq!(no_lane.kind(), NodeErrorKind::InvalidArgument);
    let slot = attention.node.send_slot(ffn_id, LANE).unwrap();
    assert_eq!(slot.len(), A2F_SLOT_BYTES);
    assert_eq!(
        slot.as_ptr(),
        attention.node.send_slot(ffn_id, LANE).unwrap().as_ptr()
    );
}

#[test]
fn outputs_and_failures_name_their_step_and_epoch() {
    let mut coordinator = Coordinator::start();
    let mut instance = Instance::start(&mut coordinator, v1::Role::Attention, 2, "auto");
    let key = instance.node.step_key(LANE, StepId(40));
    let output = SequenceOutput {
        sequence: SequenceId(5),
        token: Some(TokenId(3)),
        logprob: Some(TokenLogprob {
            token: TokenId(3),
            logprob: -0.5,
            top: vec![(TokenId(3), -0.5)],
        }),
        prompt_logprobs: vec![],
        is_corrupt: false,
    };
    let timing = StepTiming {
        compute_ns: 1,
        wait_ns: 2,
        total_ns: 3,
    };
    let outputs = vec![output];
    instance
        .node
        .complete_step(StepOutput { key, outputs }, timing)
        .unwrap();
    match instance.scripted.next_report() {
        Some(Event::StepOutput(output)) => {
            assert_eq!((output.epoch, output.lane, output.step), (102, 1, 40));
            assert_eq!(output.outputs[0].token_id, Some(3));
            assert_eq!(output.timing.unwrap().wait_ns, 2);
        }
        event => panic!("{event:?}"),
    }
    instance
        .node
        .fail_step(key, "FFN instance 1 died".to_owned())
        .unwrap();
    match instance.scripted.next_report() {
        Some(Event::StepFailed(failed)) => {
            assert_eq!((failed.epoch, failed.lane, failed.step), (102, 1, 40));
            assert_eq!(failed.reason, "FFN instance 1 died");
        }
        event => panic!("{event:?}"),
    }
}

#[test]
fn the_coordinator_asks_to_drain_once() {
    let mut coordinator = Coordinator::start();
    let mut instance = Instance::start(&mut coordinator, v1::Role::Ffn, 1, "auto");
    instance.scripted.send(Command::Drain(v1::Drain {}));
    assert_eq!(instance.event(), NodeEvent::Drain);
    instance.scripted.send(Command::Drain(v1::Drain {}));
    // Something that comes after the second Drain, so that it has been taken for sure.
    instance.scripted.send(Command::StepPlan(v1::StepPlan {
        epoch: 101,
        ..Default::default()
    }));
    assert!(matches!(instance.event(), NodeEvent::StepPlan(_)));
}

#[test]
fn a_sleeping_loop_wakes_when_the_coordinator_dies_and_hears_it_once() {
    let mut coordinator = Coordinator::start();
    let mut instance = Instance::start(&mut coordinator, v1::Role::Ffn, 1, "auto");
    let killer = thread::spawn(move || {
        thread::sleep(Duration::from_millis(50));
        drop(coordinator);
        Instant::now()
    });
    let mut events = vec![];
    instance.node.poll(PATIENCE, &mut events).unwrap();
    let noticed = killer.join().unwrap().elapsed();
    assert!(noticed < Duration::from_secs(1), "{noticed:?}");
    assert!(
        matches!(events[..], [NodeEvent::SessionLost { .. }]),
        "{events:?}"
    );
    events.clear();
    instance
        .node
        .poll(Duration::from_millis(10), &mut events)
        .unwrap();
    assert_eq!(events, []);
}

#[test]
fn a_poll_without_news_takes_its_time_and_not_much_more() {
    let mut coordinator = Coordinator::start();
    let mut instance = Instance::start(&mut coordinator, v1::Role::Ffn, 1, "auto");
    let mut events = vec![];
    let started = Instant::now();
    let timeout = Duration::from_millis(450);
    instance.node.poll(timeout, &mut events).unwrap();
    assert!(started.elapsed() >= timeout);
    assert!(started.elapsed() < PATIENCE);
    assert_eq!(events, []);
}
