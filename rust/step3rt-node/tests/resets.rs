//! Links through device memory, and new links in the place of present ones, as instances' loops see
//! them: under a scripted coordinator that hears nothing of a reset.

#![allow(clippy::unwrap_used, reason = "a test that cannot set up fails")]

mod scripted;

use std::time::{Duration, Instant};

use scripted::Coordinator;
use scripted::instance::{Instance, LANE, frame, linked_pair};
use step3rt_core::ids::InstanceId;
use step3rt_fabric::device_offer::DeviceOffer;
use step3rt_fabric::link_epoch::LinkEpoch;
use step3rt_node::error::NodeErrorKind;
use step3rt_node::event::NodeEvent;
use step3rt_proto::v1;
use step3rt_proto::v1::session_request::Event;

const WHY: &str = "lane 1: no sums of layer 17 within 1000 ms";
const LIMIT: Duration = Duration::from_secs(1);

/// Takes the end of a link by the reset; frames that were seen before it do not matter.
fn expect_down(instance: &mut Instance, peer: InstanceId) {
    loop {
        match instance.event() {
            NodeEvent::Arrival { .. } => {}
            NodeEvent::LinkDown { peer: of, reason } => {
                assert_eq!((of, reason), (peer, format!("reset: {WHY}")));
                return;
            }
            event => panic!("{event:?}"),
        }
    }
}

fn expect_up(instance: &mut Instance, peer: InstanceId) -> (LinkEpoch, Option<DeviceOffer>) {
    match instance.event() {
        NodeEvent::LinkUp {
            peer: of,
            epoch,
            device_offer,
            ..
        } => {
            assert_eq!(of, peer);
            (epoch, device_offer)
        }
        event => panic!("{event:?}"),
    }
}

/// Polls both until each has had one event after the other: neither has a thread of its own.
fn relink(first: &mut Instance, second: &mut Instance) {
    let (ids, mut news) = ([first.id(), second.id()], [vec![], vec![]]);
    let deadline = Instant::now() + scripted::PATIENCE;
    let is_up = |event: &NodeEvent| matches!(event, NodeEvent::LinkUp { .. });
    while !news.iter().all(|events| events.iter().any(is_up)) {
        assert!(Instant::now() < deadline, "only {news:?}");
        for (instance, events) in [&mut *first, &mut *second].into_iter().zip(&mut news) {
            let pause = Duration::from_millis(1);
            instance.node.poll(pause, events).unwrap();
        }
    }
    let mut epochs = vec![];
    for (events, peer) in news.iter_mut().zip([ids[1], ids[0]]) {
        events.retain(|event| !matches!(event, NodeEvent::Arrival { .. }));
        let [
            NodeEvent::LinkDown { reason, .. },
            NodeEvent::LinkUp {
                peer: of, epoch, ..
            },
        ] = &events[..]
        else {
            panic!("{events:?}");
        };
        assert_eq!((reason, *of), (&format!("reset: {WHY}"), peer));
        epochs.push(*epoch);
    }
    assert_eq!(epochs[0], epochs[1]);
}

fn exchange(attention: &mut Instance, ffn: &mut Instance) {
    let (attention_id, ffn_id) = (attention.id(), ffn.id());
    attention.node.push(ffn_id, LANE, frame(3, 1)).unwrap();
    let arrived = |instance: &mut Instance| match instance.event() {
        NodeEvent::Arrival { header, .. } => header.sequence,
        event => panic!("{event:?}"),
    };
    assert_eq!(arrived(ffn), 1);
    ffn.node.push(attention_id, LANE, frame(3, 1)).unwrap();
    assert_eq!(arrived(attention), 1);
}

fn check_reset(fabric: &str, is_asked_by_ffn: bool) {
    let mut coordinator = Coordinator::start();
    let (mut attention, mut ffn) = linked_pair(&mut coordinator, fabric);
    let mut fastest = Duration::MAX;
    for round in 0..3 {
        // A frame that is on its way is lost with its link, and its lane starts anew.
        attention
            .node
            .push(ffn.id(), LANE, frame(round, 0))
            .unwrap();
        let (asking, other) = if is_asked_by_ffn {
            (&mut ffn, &mut attention)
        } else {
            (&mut attention, &mut ffn)
        };
        let started = Instant::now();
        asking.node.reset_link(other.id(), WHY).unwrap();
        let again = asking.node.reset_link(other.id(), WHY).unwrap_err();
        assert_eq!(again.kind(), NodeErrorKind::Unavailable, "down already");
        let refused = asking.node.push(other.id(), LANE, frame(9, 9)).unwrap_err();
        assert_eq!(refused.kind(), NodeErrorKind::Unavailable);
        relink(asking, other);
        fastest = fastest.min(started.elapsed());
    }
    // Of three, so that one hiccup of a busy machine does not count.
    assert!(fastest < LIMIT, "{fastest:?}");
    exchange(&mut attention, &mut ffn);
    for scripted in [&mut attention.scripted, &mut ffn.scripted] {
        assert_eq!(scripted.try_next_report(), None, "nobody was lost");
    }
}

#[test]
fn a_link_is_reset_by_its_attention_instance_over_shm() {
    check_reset("shm", false);
}

#[test]
fn a_link_is_reset_by_its_attention_instance_over_tcp() {
    check_reset("tcp", false);
}

#[test]
fn a_link_is_reset_by_its_ffn_instance_over_shm() {
    check_reset("shm", true);
}

#[test]
fn a_link_is_reset_by_its_ffn_instance_over_tcp() {
    check_reset("tcp", true);
}

#[test]
fn both_ends_may_reset_a_link_at_once() {
    for fabric in ["shm", "tcp"] {
        let mut coordinator = Coordinator::start();
        let (mut attention, mut ffn) = linked_pair(&mut coordinator, fabric);
        for _ in 0..5 {
            ffn.node.reset_link(attention.id(), WHY).unwrap();
            attention.node.reset_link(ffn.id(), WHY).unwrap();
            relink(&mut attention, &mut ffn);
        }
        exchange(&mut attention, &mut ffn);
    }
}

#[test]
fn a_reset_of_a_link_that_its_peer_has_replaced_already_loses_nobody() {
    for fabric in ["shm", "tcp"] {
        let mut coordinator = Coordinator::start();
        let (mut attention, mut ffn) = linked_pair(&mut coordinator, fabric);
        attention.node.reset_link(ffn.id(), WHY).unwrap();
        expect_down(&mut attention, ffn.id());
        let (epoch, _) = expect_up(&mut attention, ffn.id());
        // Its loop has been busy, as during a step, and the socket to ask by is closed.
        ffn.node.reset_link(attention.id(), WHY).unwrap();
        let news = ffn.events(2);
        assert!(
            matches!(
                &news[..],
                [NodeEvent::LinkDown { reason, .. }, NodeEvent::LinkUp { epoch: of, .. }]
                    if *reason == format!("reset: {WHY}") && *of == epoch
            ),
            "{news:?}"
        );
        exchange(&mut attention, &mut ffn);
        for scripted in [&mut attention.scripted, &mut ffn.scripted] {
            assert_eq!(scripted.try_next_report(), None, "nobody was lost");
        }
    }
}

#[test]
fn devices_are_linked_with_their_offers_and_other_links_stay_when_one_is_reset() {
    for fabric in ["auto", "cuda_ipc"] {
        let mut coordinator = Coordinator::start();
        let mut start = |role, id, offer: &[u8]| {
            Instance::start_with_device(&mut coordinator, (role, id), fabric, Some(offer))
        };
        let mut ffn = start(v1::Role::Ffn, 1, b"ffn");
        let mut attention = start(v1::Role::Attention, 2, b"attention");
        let mut bystander = start(v1::Role::Attention, 3, b"bystander");
        let peers = [
            &ffn.peer.clone(),
            &attention.peer.clone(),
            &bystander.peer.clone(),
        ];
        ffn.send_topology(7, &peers);
        bystander.send_topology(7, &peers);
        let of_bystander = bystander.id();
        expect_up(&mut bystander, ffn.id());
        let (_, offer) = expect_up(&mut ffn, of_bystander);
        assert_eq!(offer.unwrap().as_bytes(), b"bystander");
        attention.send_topology(7, &peers);
        let before = expect_up(&mut attention, ffn.id());
        let (epoch, offer) = expect_up(&mut ffn, attention.id());
        assert_eq!(offer.unwrap().as_bytes(), b"attention");
        assert_eq!(before, (epoch, Some(DeviceOffer::new(b"ffn").unwrap())));
        let Some(Event::LinksReady(ready)) = attention.scripted.next_report() else {
            panic!("no LinksReady");
        };
        assert_eq!(ready.links[0].fabric, "cuda_ipc");

        ffn.node.reset_link(attention.id(), WHY).unwrap();
        expect_down(&mut ffn, attention.id());
        expect_down(&mut attention, ffn.id());
        let after = expect_up(&mut attention, ffn.id());
        assert_eq!(after, (expect_up(&mut ffn, attention.id()).0, before.1));
        assert!(after.0 > before.0);
        let mut events = vec![];
        bystander.node.poll(Duration::ZERO, &mut events).unwrap();
        assert_eq!(events, []);
    }
}

#[test]
fn a_peer_that_dies_instead_of_linking_anew_is_reported_lost() {
    for fabric in ["shm", "tcp"] {
        let mut coordinator = Coordinator::start();
        let (attention, mut ffn) = linked_pair(&mut coordinator, fabric);
        let attention_id = attention.id();
        ffn.node.reset_link(attention_id, WHY).unwrap();
        expect_down(&mut ffn, attention_id);
        drop(attention);
        let mut events = vec![];
        let deadline = Instant::now() + scripted::PATIENCE;
        let lost = loop {
            let pause = Duration::from_millis(5);
            ffn.node.poll(pause, &mut events).unwrap();
            match ffn.scripted.try_next_report() {
                Some(Event::PeerLost(lost)) => break lost,
                None => assert!(Instant::now() < deadline),
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(lost.instance_id, attention_id.0);
        assert_eq!(events, [], "the loop knew that the link was down");
    }
}

#[test]
fn a_peer_that_leaves_the_topology_during_a_reset_is_dropped() {
    let mut coordinator = Coordinator::start();
    let (mut attention, mut ffn) = linked_pair(&mut coordinator, "shm");
    let attention_id = attention.id();
    ffn.node.reset_link(attention_id, WHY).unwrap();
    expect_down(&mut ffn, attention_id);
    ffn.send_topology(8, &[&ffn.peer]);
    let mut events = vec![];
    let deadline = Instant::now() + scripted::PATIENCE;
    // The attention instance is told, as the old link ends under it.
    loop {
        ffn.node
            .poll(Duration::from_millis(5), &mut events)
            .unwrap();
        assert_eq!(events, []);
        let mut news = vec![];
        attention
            .node
            .poll(Duration::from_millis(5), &mut news)
            .unwrap();
        if news
            .iter()
            .any(|event| matches!(event, NodeEvent::LinkDown { .. }))
        {
            break;
        }
        assert!(Instant::now() < deadline);
    }
    assert_eq!(ffn.scripted.try_next_report(), None);
}
