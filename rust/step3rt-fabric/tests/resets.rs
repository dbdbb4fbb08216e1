//! New links in the place of present ones, asked for by either end, with frames on their way.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on stops there")]

mod common;

use std::time::{Duration, Instant};

use common::{Fabric, Node, bind_with_device, frame, geometry, identity, linked, pattern};
use step3rt_core::ids::{InstanceId, LaneId};
use step3rt_fabric::contract::{DownReason, PushError, Side};
use step3rt_fabric::endpoint::{FabricEvent, LinkSummary};

const ATTENTION: InstanceId = InstanceId(1);
const FFN: InstanceId = InstanceId(2);
const LANE: LaneId = LaneId(0);
const WHY: &str = "lane 1: no sums of layer 17 within 1000 ms — the wait gave up";

/// What a reset may take.
const LIMIT: Duration = Duration::from_secs(1);

fn reset() -> DownReason {
    DownReason::Reset(WHY.to_owned())
}

/// Takes the old link's end and the new one from both ends' reports, which may begin with frames.
fn relinked(attention: &mut Node, ffn: &mut Node) -> [LinkSummary; 2] {
    [(attention, identity(2, 1)), (ffn, identity(1, 1))].map(|(node, peer)| {
        let down = loop {
            match node.next() {
                FabricEvent::Arrived { .. } => {}
                other => break other,
            }
        };
        let reason = reset();
        assert_eq!(down, FabricEvent::LinkDown { peer, reason });
        node.expect_up(peer)
    })
}

fn expect_asked(attention: &mut Node) {
    let asked = loop {
        match attention.next() {
            FabricEvent::Arrived { .. } => {}
            other => break other,
        }
    };
    let (peer, reason) = (identity(2, 1), WHY.to_owned());
    assert_eq!(asked, FabricEvent::ResetAsked { peer, reason });
}

macro_rules! on_every_connected_fabric {
    ($(fn $name:ident($fabric:ident: Fabric) $body:block)*) => {
        $(fn $name($fabric: Fabric) $body)*
        mod shm { $(#[test] fn $name() { super::$name(super::Fabric::Shm) })* }
        mod tcp { $(#[test] fn $name() { super::$name(super::Fabric::Tcp) })* }
        #[cfg(feature = "rdma")]
        mod rdma { $(
            #[test]
            #[ignore = "needs an RDMA device: make test-rdma"]
            fn $name() { super::$name(super::Fabric::Rdma) }
        )* }
    };
}

on_every_connected_fabric! {
    fn the_connecting_end_links_anew_and_both_are_told_why(fabric: Fabric) {
        let mut ffn = Node::ffn(fabric, 2, geometry(2, 64));
        let mut attention = Node::attention(fabric, 1, geometry(2, 64));
        let first = attention.endpoint.connect(&ffn.address()).unwrap().epoch;
        assert_eq!(ffn.expect_up(identity(1, 1)).epoch, first);
        let (mut last, mut fastest) = (first, Duration::MAX);
        for _ in 0..3 {
            // A frame on its way and a lane without credit: neither outlives the link.
            attention.push((FFN, LANE), 0, b"lost");
            let started = Instant::now();
            attention.endpoint.dial_again(ffn.address(), WHY).unwrap();
            let links = relinked(&mut attention, &mut ffn);
            fastest = fastest.min(started.elapsed());
            assert_eq!(links[0].epoch, links[1].epoch);
            assert!(links[0].epoch > last);
            last = links[0].epoch;
            attention.push((FFN, LANE), 1, b"anew");
            let (_, header) = ffn.expect_arrival();
            assert_eq!((header.sequence, ffn.payload(&header)), (1, b"anew".to_vec()));
            ffn.push((ATTENTION, LANE), 1, b"answer");
            assert_eq!(attention.expect_arrival().1.sequence, 1);
            attention.expect_nothing();
            ffn.expect_nothing();
        }
        // Of three, so that one hiccup of a busy machine does not count.
        assert!(fastest < LIMIT, "{fastest:?}");
    }

    fn the_accepting_end_asks_while_the_link_goes_on(fabric: Fabric) {
        let mut fastest = Duration::MAX;
        for _ in 0..3 {
            let (mut attention, mut ffn) = linked(fabric, geometry(2, 64));
            let started = Instant::now();
            ffn.endpoint.ask_reset(ATTENTION, WHY).unwrap();
            // Once is enough, and one does not hear it twice.
            ffn.endpoint.ask_reset(ATTENTION, "again").unwrap();
            expect_asked(&mut attention);
            attention.push((FFN, LANE), 0, b"still up");
            assert_eq!(ffn.expect_arrival().1.sequence, 1);
            attention.endpoint.dial_again(ffn.address(), WHY).unwrap();
            relinked(&mut attention, &mut ffn);
            fastest = fastest.min(started.elapsed());
            attention.expect_nothing();
            ffn.expect_nothing();
            let refused = ffn.endpoint.ask_reset(InstanceId(9), WHY);
            assert_eq!(refused, Err(PushError::NotLinked(InstanceId(9))));
        }
        // As above.
        assert!(fastest < LIMIT, "{fastest:?}");
    }

    fn lanes_under_load_start_from_one_and_links_to_others_stay(fabric: Fabric) {
        const BYTES: usize = 1 << 20;
        let sizes = geometry(2, BYTES);
        let (mut attention, mut ffn) = linked(fabric, sizes);
        let mut bystander = Node::attention(fabric, 3, sizes);
        bystander.link(fabric, &mut ffn);
        let payload = pattern(5, BYTES);
        for round in 0..5 {
            for lane in [LaneId(0), LaneId(1)] {
                attention.push((FFN, lane), 7, &payload);
            }
            bystander.push((FFN, LANE), round, b"not of this");
            if round % 2 == 0 {
                ffn.endpoint.ask_reset(ATTENTION, WHY).unwrap();
                expect_asked(&mut attention);
            }
            attention.endpoint.dial_again(ffn.address(), WHY).unwrap();
            attention_is_relinked(&mut attention);
            // What came of the bystander is whole, and answered over the link that it has.
            let (mut is_down, mut has_heard, mut is_up) = (false, false, false);
            while !(is_down && has_heard && is_up) {
                match ffn.next() {
                    FabricEvent::Arrived { peer, .. } if peer == ATTENTION => assert!(!is_down),
                    FabricEvent::Arrived { peer, header } => {
                        assert_eq!(ffn.payload(&header), b"not of this");
                        assert_eq!(header.sequence, round + 1);
                        ffn.push((peer, LANE), round, b"well");
                        has_heard = true;
                    }
                    FabricEvent::LinkDown { peer, reason } => {
                        assert_eq!((peer, reason), (identity(1, 1), reset()));
                        is_down = true;
                    }
                    FabricEvent::LinkUp(link) => {
                        assert_eq!(link.peer, identity(1, 1));
                        is_up = true;
                    }
                    other => panic!("{other:?}"),
                }
            }
            assert_eq!(bystander.expect_arrival().1.sequence, round + 1);
        }
        attention.push((FFN, LANE), 8, &payload);
        let (_, header) = ffn.expect_arrival();
        assert_eq!(header.sequence, 1);
        assert!(ffn.payload(&header) == payload);
    }

    fn a_peer_that_dies_after_a_reset_is_a_peer_that_died(fabric: Fabric) {
        let (mut attention, mut ffn) = linked(fabric, geometry(1, 64));
        attention.endpoint.dial_again(ffn.address(), WHY).unwrap();
        relinked(&mut attention, &mut ffn);
        drop(attention);
        assert_eq!(ffn.expect_down().1, DownReason::PeerClosed);
    }
}

fn attention_is_relinked(attention: &mut Node) {
    loop {
        match attention.next() {
            FabricEvent::LinkUp(_) => return,
            FabricEvent::Arrived { .. } | FabricEvent::LinkDown { .. } => {}
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_link_through_device_memory_exchanges_the_offers_anew() {
    for carrier in [Fabric::Shm, Fabric::Tcp] {
        let bind = |instance, side, offer: &[u8]| {
            bind_with_device((carrier, "auto"), instance, side, Some(offer))
        };
        let offers = [pattern(1, 4096), pattern(2, 4096)];
        let mut attention = bind(1, Side::Initiator, &offers[0]);
        let mut ffn = bind(2, Side::Responder, &offers[1]);
        let before = attention.endpoint.connect(&ffn.address()).unwrap();
        ffn.expect_up(identity(1, 1));
        // Device lanes count frames in device memory; these stand for what the carrier may carry.
        attention.push((FFN, LANE), 0, b"x");
        ffn.endpoint.ask_reset(ATTENTION, WHY).unwrap();
        expect_asked(&mut attention);
        attention.endpoint.dial_again(ffn.address(), WHY).unwrap();
        let [ours, theirs] = relinked(&mut attention, &mut ffn);
        assert_eq!(ours.device_offer.unwrap().as_bytes(), offers[1]);
        assert_eq!(theirs.device_offer.unwrap().as_bytes(), offers[0]);
        assert!(ours.epoch == theirs.epoch && ours.epoch > before.epoch);
        assert_eq!((ours.fabric, theirs.fabric), ("cuda_ipc", "cuda_ipc"));
    }
}

#[test]
fn a_simulated_end_asks_too() {
    let (mut attention, mut ffn) = linked(Fabric::Sim, geometry(1, 64));
    ffn.endpoint.ask_reset(ATTENTION, WHY).unwrap();
    expect_asked(&mut attention);
    let refused = attention.endpoint.push(FFN, LANE, frame(0, 65));
    assert!(matches!(refused, Err(PushError::TooLarge { .. })));
}

#[test]
fn a_dial_that_fails_leaves_the_present_link_as_it_was() {
    let (mut attention, mut ffn) = linked(Fabric::Tcp, geometry(1, 64));
    let mut wrong = ffn.address();
    wrong.addresses[0].address = "127.0.0.1:1".to_owned();
    attention.endpoint.dial_again(wrong, WHY).unwrap();
    assert!(matches!(attention.next(), FabricEvent::DialFailed { .. }));
    attention.push((FFN, LANE), 0, b"still up");
    assert_eq!(ffn.expect_arrival().1.sequence, 1);
}
