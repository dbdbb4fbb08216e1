//! What every fabric promises, checked on each of them with real sockets and memory.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on stops there")]

mod common;

use common::{Fabric, Node, PATIENCE, frame, geometry, identity, linked, pattern};
use step3rt_core::ids::{Epoch, InstanceId, LaneId};
use step3rt_fabric::contract::{DownReason, PushError, Side};
use step3rt_fabric::endpoint::FabricEvent;

const ATTENTION: InstanceId = InstanceId(1);
const FFN: InstanceId = InstanceId(2);
const LANE: LaneId = LaneId(0);

macro_rules! on_every_fabric {
    ($(fn $name:ident($fabric:ident: Fabric) $body:block)*) => {
        $(fn $name($fabric: Fabric) $body)*
        mod shm { $(#[test] fn $name() { super::$name(super::Fabric::Shm) })* }
        mod tcp { $(#[test] fn $name() { super::$name(super::Fabric::Tcp) })* }
        #[cfg(feature = "tls")]
        mod tls { $(#[test] fn $name() { super::$name(super::Fabric::Tls) })* }
        #[cfg(feature = "rdma")]
        mod rdma { $(
            #[test]
            #[ignore = "needs an RDMA device: make test-rdma"]
            fn $name() { super::$name(super::Fabric::Rdma) }
        )* }
        mod sim { $(#[test] fn $name() { super::$name(super::Fabric::Sim) })* }
    };
}

on_every_fabric! {
    fn frames_of_a_lane_arrive_in_order_with_header_and_payload(fabric: Fabric) {
        let (mut attention, mut ffn) = linked(fabric, geometry(1, 1000));
        for step in 0..100 {
            let payload = pattern(step, usize::try_from(step).unwrap() * 10);
            attention.push((FFN, LANE), step, &payload);
            let (peer, header) = ffn.expect_arrival();
            assert_eq!((peer, header.lane, header.sequence), (ATTENTION, LANE, step + 1));
            assert_eq!(header.frame, frame(step, payload.len()));
            assert_eq!((header.source, header.epoch), (ATTENTION, Epoch(1)));
            assert_eq!(ffn.payload(&header), payload);

            let reply = pattern(!step, 1000);
            ffn.push((ATTENTION, LANE), step, &reply);
            let (_, header) = attention.expect_arrival();
            assert_eq!((header.source, header.sequence), (FFN, step + 1));
            assert_eq!(attention.payload(&header), reply);
        }
        attention.expect_nothing();
        ffn.expect_nothing();
    }

    fn a_push_without_credit_is_refused_and_changes_nothing(fabric: Fabric) {
        let (mut attention, mut ffn) = linked(fabric, geometry(2, 64));
        let no_credit = Err(PushError::NoCredit(LANE));
        assert_eq!(ffn.endpoint.push(ATTENTION, LANE, frame(0, 1)), no_credit);
        attention.push((FFN, LANE), 0, b"first");
        assert_eq!(attention.endpoint.push(FFN, LANE, frame(1, 64)), no_credit);
        // Another lane has its own credit.
        attention.push((FFN, LaneId(1)), 0, b"other");
        let arrivals = [ffn.expect_arrival().1, ffn.expect_arrival().1];
        let first = arrivals.iter().find(|header| header.lane == LANE).unwrap();
        assert_eq!(ffn.payload(first), b"first");
        ffn.push((ATTENTION, LANE), 0, b"reply");
        assert_eq!(ffn.endpoint.push(ATTENTION, LANE, frame(0, 1)), no_credit);
        let (_, header) = attention.expect_arrival();
        assert_eq!(attention.payload(&header), b"reply");
        attention.push((FFN, LANE), 1, b"second");
        assert_eq!(ffn.expect_arrival().1.sequence, 2);
        ffn.expect_nothing();
    }

    fn a_push_that_cannot_be_is_refused_by_name(fabric: Fabric) {
        let (mut attention, mut ffn) = linked(fabric, geometry(2, 64));
        let lane = LaneId(2);
        let refused = attention.endpoint.push(FFN, lane, frame(0, 1));
        assert_eq!(refused, Err(PushError::NoSuchLane { lane, num_lanes: 2 }));
        let refused = attention.endpoint.push(FFN, LANE, frame(0, 65));
        assert_eq!(refused, Err(PushError::TooLarge { payload_bytes: 65, slot_bytes: 64 }));
        let refused = attention.endpoint.push(InstanceId(9), LANE, frame(0, 1));
        assert_eq!(refused, Err(PushError::NotLinked(InstanceId(9))));
        assert!(attention.endpoint.send_slot(FFN, lane).is_none());
        assert!(attention.endpoint.receive_slot(FFN, LaneId(255)).is_none());
        assert!(attention.endpoint.send_slot(InstanceId(9), LANE).is_none());
        // None of this cost the lane its credit.
        attention.push((FFN, LANE), 0, &[7; 64]);
        assert_eq!(ffn.expect_arrival().1.sequence, 1);
    }

    fn payloads_of_nothing_to_28_mib_arrive_whole(fabric: Fabric) {
        const MAX_BYTES: usize = 28 << 20;
        let (mut attention, mut ffn) = linked(fabric, geometry(1, MAX_BYTES));
        let sizes = [0, 1, 63, 64, 65, 4096, 917_504, 1_835_008, MAX_BYTES];
        for (step, len) in (0..).zip(sizes) {
            let payload = pattern(step, len);
            attention.push((FFN, LANE), step, &payload);
            let (_, header) = ffn.expect_arrival();
            assert!(ffn.payload(&header) == payload, "{len} bytes differ");
            ffn.push((ATTENTION, LANE), step, &payload[len / 2..]);
            let (_, header) = attention.expect_arrival();
            assert!(attention.payload(&header) == payload[len / 2..], "{len} bytes differ");
        }
    }

    fn lanes_advance_independently_of_each_other(fabric: Fabric) {
        const NUM_LANES: u8 = 8;
        let (mut attention, mut ffn) = linked(fabric, geometry(NUM_LANES, 5000));
        let payload = |lane: LaneId, step| pattern(u64::from(lane.0) << 32 | step, 5000);
        for step in 0..20 {
            for lane in (0..NUM_LANES).map(LaneId) {
                attention.push((FFN, lane), step, &payload(lane, step));
            }
            let mut arrived: Vec<_> = (0..NUM_LANES).map(|_| ffn.expect_arrival().1).collect();
            // Answered in another order than asked.
            arrived.sort_by_key(|header| std::cmp::Reverse(header.lane));
            for header in arrived {
                assert_eq!(header.sequence, step + 1);
                let echo = ffn.payload(&header);
                assert_eq!(echo, payload(header.lane, step));
                ffn.push((ATTENTION, header.lane), step, &echo);
            }
            for _ in 0..NUM_LANES {
                let (_, header) = attention.expect_arrival();
                assert_eq!(attention.payload(&header), payload(header.lane, step));
            }
        }
    }

    fn one_endpoint_serves_up_to_64_peers(fabric: Fabric) {
        for num_peers in [1, 2, 64] {
            let mut ffn = Node::ffn(fabric, 1000, geometry(2, 128));
            let mut peers: Vec<_> =
                (0..num_peers).map(|i| Node::attention(fabric, i, geometry(2, 128))).collect();
            for peer in &mut peers {
                peer.link(fabric, &mut ffn);
            }
            for step in 0..3 {
                for peer in &mut peers {
                    let text = format!("{step} of {}", peer.instance());
                    peer.push((InstanceId(1000), LaneId(1)), step, text.as_bytes());
                }
                for _ in 0..num_peers {
                    let (peer, header) = ffn.expect_arrival();
                    let text = ffn.payload(&header);
                    assert_eq!(text, format!("{step} of {peer}").into_bytes());
                    ffn.push((peer, LaneId(1)), step, &text);
                }
                for peer in &mut peers {
                    assert_eq!(peer.expect_arrival().1.frame.step, step);
                }
            }
        }
    }

    fn what_a_peer_published_before_it_closed_is_reported_before_the_end(fabric: Fabric) {
        let (mut attention, mut ffn) = linked(fabric, geometry(2, 1 << 16));
        let doorbell = ffn.endpoint.doorbell();
        let num_rings = doorbell.current();
        let payload = pattern(1, 1 << 16);
        attention.push((FFN, LaneId(0)), 0, &payload);
        attention.push((FFN, LaneId(1)), 0, &payload);
        let slots = [0, 1].map(|lane| ffn.endpoint.receive_slot(ATTENTION, LaneId(lane)).unwrap());
        drop(attention);
        // One for each frame and one for the end: all of it is there to be seen by the first poll.
        while doorbell.current() < num_rings + 3 {
            assert!(doorbell.wait(doorbell.current(), PATIENCE));
        }
        for _ in 0..2 {
            ffn.expect_arrival();
        }
        assert_eq!(ffn.expect_down(), (identity(1, 1), DownReason::PeerClosed));
        let refused = ffn.endpoint.push(ATTENTION, LANE, frame(0, 1));
        assert_eq!(refused, Err(PushError::Down(DownReason::PeerClosed)));
        ffn.expect_nothing();
        // The memory of a link that is gone stays as it was for whoever holds it.
        for slot in slots {
            let mut bytes = vec![0; slot.len()];
            slot.read(&mut bytes);
            assert_eq!(bytes, payload);
        }
        let refused = ffn.endpoint.push(ATTENTION, LANE, frame(0, 1));
        assert_eq!(refused, Err(PushError::NotLinked(ATTENTION)));
        assert!(ffn.endpoint.receive_slot(ATTENTION, LANE).is_none());
    }

    fn a_link_that_one_end_disconnects_ends_at_both(fabric: Fabric) {
        let (mut attention, mut ffn) = linked(fabric, geometry(1, 64));
        let slot = attention.endpoint.send_slot(FFN, LANE).unwrap();
        attention.endpoint.disconnect(FFN);
        assert_eq!(attention.expect_down(), (identity(2, 1), DownReason::Closed));
        assert_eq!(ffn.expect_down(), (identity(1, 1), DownReason::PeerClosed));
        attention.endpoint.disconnect(FFN);
        attention.expect_nothing();
        slot.write(b"still mapped");
    }

    fn a_peer_that_comes_back_gets_a_fresh_link(fabric: Fabric) {
        let (attention, mut ffn) = linked(fabric, geometry(1, 64));
        drop(attention);
        ffn.expect_down();
        for epoch in 2..5 {
            let returned = identity(1, epoch);
            let mut attention = Node::bind(fabric, returned, Side::Initiator, geometry(1, 64));
            attention.link(fabric, &mut ffn);
            attention.push((FFN, LANE), 0, b"again");
            let (_, header) = ffn.expect_arrival();
            assert_eq!((header.epoch, header.sequence), (Epoch(epoch), 1));
            drop(attention);
            assert_eq!(ffn.expect_down(), (returned, DownReason::PeerClosed));
        }
    }

    fn a_newer_incarnation_takes_the_place_of_an_older_one_that_still_lives(fabric: Fabric) {
        let (mut old, mut ffn) = linked(fabric, geometry(1, 64));
        let mut new = Node::bind(fabric, identity(1, 2), Side::Initiator, geometry(1, 64));
        let replaced = FabricEvent::LinkDown {
            peer: identity(1, 1),
            reason: DownReason::Replaced(Epoch(2)),
        };
        new.start_link(fabric, &mut ffn);
        assert_eq!(ffn.next(), replaced);
        ffn.expect_up(identity(1, 2));
        assert_eq!(old.expect_down(), (identity(2, 1), DownReason::PeerClosed));
        new.push((FFN, LANE), 0, b"mine");
        assert_eq!(ffn.expect_arrival().1.epoch, Epoch(2));
    }

    fn two_threads_that_sleep_on_their_doorbells_lose_no_frame(fabric: Fabric) {
        const NUM_LANES: u8 = 3;
        const NUM_STEPS: u64 = 300;
        let (mut attention, mut ffn) = linked(fabric, geometry(NUM_LANES, 3000));
        let payload = |lane: LaneId, step: u64| {
            pattern(u64::from(lane.0) << 32 | step, usize::try_from(step * 37 % 3000).unwrap())
        };
        let echo = std::thread::spawn(move || {
            for _ in 0..u64::from(NUM_LANES) * NUM_STEPS {
                let (peer, header) = ffn.expect_arrival();
                let payload = ffn.payload(&header);
                ffn.push((peer, header.lane), header.frame.step, &payload);
            }
            // Kept until the last reply is taken.
            assert_eq!(ffn.expect_down().1, DownReason::PeerClosed);
        });
        for lane in (0..NUM_LANES).map(LaneId) {
            attention.push((FFN, lane), 0, &payload(lane, 0));
        }
        for _ in 0..u64::from(NUM_LANES) * NUM_STEPS {
            let (_, header) = attention.expect_arrival();
            let (lane, step) = (header.lane, header.frame.step);
            assert_eq!(attention.payload(&header), payload(lane, step));
            if step + 1 < NUM_STEPS {
                attention.push((FFN, lane), step + 1, &payload(lane, step + 1));
            }
        }
        drop(attention);
        echo.join().unwrap();
    }
}
