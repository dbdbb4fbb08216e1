//! Links follow the topology: real links over shared memory and TCP, under a scripted coordinator.

#![allow(clippy::unwrap_used, reason = "a test that cannot set up fails")]

mod scripted;

use std::time::{Duration, Instant};

use scripted::instance::{A2F_SLOT_BYTES, F2A_SLOT_BYTES, Instance, LANE, frame, linked_pair};
use scripted::{Coordinator, PATIENCE, ReservedPort};
use step3rt_core::ids::{Epoch, InstanceId, LaneId};
use step3rt_fabric::address::{DataAddress, FabricChoice, PeerAddress};
use step3rt_fabric::contract::{Geometry, LinkIdentity, Side};
use step3rt_fabric::endpoint::{Endpoint, EndpointConfig, FabricEvent, LinkSettings};
use step3rt_fabric::frame::Frame;
use step3rt_node::error::NodeErrorKind;
use step3rt_node::event::NodeEvent;
use step3rt_node::node::Node;
use step3rt_proto::v1;
use step3rt_proto::v1::session_request::Event;

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
            epoch,
            device_offer,
        } => {
            assert_eq!((peer, role_rank, chosen), (ffn.id(), 10, fabric));
            assert!(!reason.is_empty() && epoch.0 > 0);
            assert_eq!(device_offer, None);
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
    let status = loop {
        if let Some(Event::Heartbeat(beat)) = ffn.scripted.next_event()
            && beat.status.contains("linked")
        {
            break beat.status;
        }
    };
    assert_eq!(status, "ready, linked to 1 of 1 peers");
}

#[test]
fn a_peer_that_does_not_answer_holds_up_neither_the_loop_nor_other_peers() {
    let mut coordinator = Coordinator::start();
    let mut ffn = Instance::start(&mut coordinator, v1::Role::Ffn, 3, "tcp");
    let mut attention = Instance::start(&mut coordinator, v1::Role::Attention, 4, "tcp");
    // It accepts and says nothing: a handshake with it takes its whole time, which is 3 s.
    let mute = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let silent = |instance_id| v1::Peer {
        instance_id,
        epoch: 100,
        addresses: vec![v1::DataAddress {
            fabric: "tcp".to_owned(),
            address: mute.local_addr().unwrap().to_string(),
        }],
        ..ffn.peer.clone()
    };
    let started = Instant::now();
    attention.send_topology(7, &[&silent(1), &silent(2), &ffn.peer, &attention.peer]);
    ffn.send_topology(7, &[&ffn.peer, &attention.peer]);
    assert!(matches!(
        attention.event(),
        NodeEvent::LinkUp {
            peer: InstanceId(3),
            ..
        }
    ));
    attention.node.push(ffn.id(), LANE, frame(0, 0)).unwrap();
    assert!(matches!(ffn.events(2)[1], NodeEvent::Arrival { .. }));
    let elapsed = started.elapsed();
    assert!(elapsed < Duration::from_secs(2), "{elapsed:?}");
    // What was dialled in vain is dropped with the topology that named it.
    attention.send_topology(8, &[&ffn.peer, &attention.peer]);
    let deadline = Instant::now() + PATIENCE;
    let mut events = vec![];
    loop {
        let pause = Duration::from_millis(20);
        attention.node.poll(pause, &mut events).unwrap();
        if let Some(Event::LinksReady(ready)) = attention.scripted.try_next_report() {
            assert_eq!((ready.topology_version, ready.links.len()), (8, 1));
            break;
        }
        assert!(Instant::now() < deadline);
    }
    assert_eq!(events, []);
}

#[test]
fn a_lost_peer_does_not_come_back_with_its_old_epoch() {
    let mut coordinator = Coordinator::start();
    let mut ffn = Instance::start(&mut coordinator, v1::Role::Ffn, 1, "tcp");
    let identity = LinkIdentity {
        instance: InstanceId(2),
        epoch: Epoch(102),
    };
    let mut attention = Endpoint::bind(EndpointConfig {
        identity,
        side: Side::Initiator,
        geometry: Geometry {
            num_lanes: 2,
            a2f_slot_bytes: A2F_SLOT_BYTES,
            f2a_slot_bytes: F2A_SLOT_BYTES,
        },
        fabric: FabricChoice::Tcp,
        listen_shm: false,
        listen_tcp: None,
        advertise_host: None,
        settings: LinkSettings::default(),
    })
    .unwrap();
    let named = v1::Peer {
        instance_id: 2,
        role: v1::Role::Attention.into(),
        epoch: 102,
        ..ffn.peer.clone()
    };
    ffn.send_topology(7, &[&ffn.peer, &named]);
    let address = PeerAddress {
        identity: LinkIdentity {
            instance: InstanceId(1),
            epoch: Epoch(101),
        },
        boot_id: ffn.peer.boot_id.clone(),
        addresses: attention_view(&ffn.peer),
    };
    attention.connect(&address).unwrap();
    assert!(matches!(ffn.event(), NodeEvent::LinkUp { .. }));
    // The new link takes the place of the old one, which is lost with that.
    attention.connect(&address).unwrap();
    assert!(matches!(ffn.event(), NodeEvent::LinkDown { .. }));
    assert!(matches!(ffn.scripted.next_report(), Some(Event::PeerLost(lost)) if lost.epoch == 102));

    let (deadline, mut news, mut events) = (Instant::now() + PATIENCE, vec![], vec![]);
    let is_down = |event: &FabricEvent| matches!(event, FabricEvent::LinkDown { .. });
    while news.iter().filter(|event| is_down(event)).count() < 2 {
        assert!(Instant::now() < deadline, "only {news:?}");
        ffn.node
            .poll(Duration::from_millis(10), &mut events)
            .unwrap();
        attention.poll(&mut news);
    }
    assert_eq!(events, [], "the loop is not told of a link that is none");
}

fn attention_view(peer: &v1::Peer) -> Vec<DataAddress> {
    let addresses = peer.addresses.iter().cloned();
    addresses
        .map(|v1::DataAddress { fabric, address }| DataAddress { fabric, address })
        .collect()
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
        error.to_string().contains("lane 2 does not exist"),
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
