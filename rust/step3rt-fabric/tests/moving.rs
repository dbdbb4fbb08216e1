//! That frames move and ends are seen whatever the owners do: wait, compute, or both push at once.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on stops there")]

mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{Fabric, Node, PATIENCE, frame, geometry, identity, linked, pattern};
use step3rt_core::ids::{InstanceId, LaneId};
use step3rt_fabric::address::FabricChoice;
use step3rt_fabric::contract::Side;
use step3rt_fabric::endpoint::{Endpoint, EndpointConfig, FabricEvent, LinkSettings};

/// More than both buffers of a socket hold.
const LARGE_BYTES: usize = 28 << 20;

/// What an owner sees that computes and polls, and never waits.
fn next_without_waiting(nodes: &mut [&mut Node]) -> (usize, FabricEvent) {
    let started = Instant::now();
    let mut events = Vec::new();
    loop {
        for (at, node) in nodes.iter_mut().enumerate() {
            if let Some(event) = node.events.pop_front() {
                return (at, event);
            }
            node.endpoint.poll(&mut events);
            node.events.extend(events.drain(..));
        }
        assert!(started.elapsed() < PATIENCE, "nothing happened");
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// What moves bytes through a socket.
fn socket_fabrics() -> Vec<Fabric> {
    vec![
        Fabric::Tcp,
        #[cfg(feature = "tls")]
        Fabric::Tls,
    ]
}

#[test]
fn large_frames_cross_while_neither_owner_waits() {
    for fabric in socket_fabrics() {
        cross_while_neither_owner_waits(fabric);
    }
}

fn cross_while_neither_owner_waits(fabric: Fabric) {
    let (mut attention, mut ffn) = linked(fabric, geometry(2, LARGE_BYTES));
    let payloads = [0, 1].map(|seed| pattern(seed, LARGE_BYTES));
    attention.push((InstanceId(2), LaneId(0)), 0, &payloads[0]);
    let (_, event) = next_without_waiting(&mut [&mut ffn]);
    assert!(matches!(event, FabricEvent::Arrived { .. }), "{event:?}");
    // Both push 28 MiB, and neither has read a byte of the other's.
    ffn.push((InstanceId(1), LaneId(0)), 0, &payloads[1]);
    attention.push((InstanceId(2), LaneId(1)), 1, &payloads[0]);
    let mut arrived = [false; 2];
    while arrived != [true; 2] {
        let (at, event) = next_without_waiting(&mut [&mut attention, &mut ffn]);
        let FabricEvent::Arrived { header, .. } = event else {
            panic!("{event:?} instead of an arrival");
        };
        let payload = [&attention, &ffn][at].payload(&header);
        assert!(payload == payloads[1 - at], "end {at} got other bytes");
        arrived[at] = true;
    }
}

#[test]
fn large_frames_cross_while_both_owners_wait() {
    for fabric in socket_fabrics() {
        cross_while_both_owners_wait(fabric);
    }
}

fn cross_while_both_owners_wait(fabric: Fabric) {
    const STEPS: u64 = 4;
    let (mut attention, mut ffn) = linked(fabric, geometry(2, LARGE_BYTES));
    let answering = std::thread::spawn(move || {
        for _ in 0..2 * STEPS {
            let (peer, header) = ffn.expect_arrival();
            let echo = frame(header.frame.step, LARGE_BYTES);
            ffn.endpoint.push(peer, header.lane, echo).unwrap();
        }
        ffn
    });
    for lane in [LaneId(0), LaneId(1)] {
        let first = frame(0, LARGE_BYTES);
        attention.endpoint.push(InstanceId(2), lane, first).unwrap();
    }
    for _ in 0..2 * STEPS {
        let (peer, header) = attention.expect_arrival();
        if header.frame.step + 1 < STEPS {
            let next = frame(header.frame.step + 1, LARGE_BYTES);
            attention.endpoint.push(peer, header.lane, next).unwrap();
        }
    }
    answering.join().unwrap();
}

#[test]
fn frames_that_come_at_once_all_arrive() {
    // Many short frames fit what one system call takes from the socket, which then tells of nothing.
    const NUM_LANES: u8 = 8;
    for fabric in socket_fabrics() {
        let (mut attention, mut ffn) = linked(fabric, geometry(NUM_LANES, 4096));
        for step in 0..200 {
            for lane in 0..NUM_LANES {
                attention.push(
                    (InstanceId(2), LaneId(lane)),
                    step,
                    &pattern(lane.into(), 64),
                );
            }
            for _ in 0..NUM_LANES {
                let (peer, header) = match step % 2 {
                    0 => ffn.expect_arrival(),
                    _ => match next_without_waiting(&mut [&mut ffn]) {
                        (_, FabricEvent::Arrived { peer, header }) => (peer, header),
                        (_, event) => panic!("{event:?} instead of an arrival"),
                    },
                };
                assert!(ffn.payload(&header) == pattern(header.lane.0.into(), 64));
                ffn.push((peer, header.lane), step, b"done");
            }
            for _ in 0..NUM_LANES {
                attention.expect_arrival();
            }
        }
    }
}

#[test]
fn an_owner_that_only_computes_sees_the_end_of_a_link_within_a_second() {
    for fabric in [vec![Fabric::Shm], socket_fabrics()].concat() {
        let (attention, mut ffn) = linked(fabric, geometry(1, 4096));
        let closed = Instant::now();
        drop(attention);
        let (_, event) = next_without_waiting(&mut [&mut ffn]);
        assert!(matches!(event, FabricEvent::LinkDown { .. }), "{event:?}");
        assert!(closed.elapsed() < Duration::from_secs(1), "{fabric:?}");
    }
}

/// An FFN instance that is reached by both fabrics, and never spins.
fn ffn_of_both_fabrics() -> Node {
    Node::new(
        Endpoint::bind(EndpointConfig {
            identity: identity(9, 1),
            side: Side::Responder,
            geometry: geometry(1, 4096),
            fabric: FabricChoice::Auto,
            listen_shm: true,
            listen_tcp: Some("127.0.0.1:0".parse().unwrap()),
            advertise_host: None,
            settings: LinkSettings {
                spin_us: 0,
                ..LinkSettings::default()
            },
        })
        .unwrap(),
    )
}

#[test]
fn a_sleeping_owner_is_woken_by_peers_of_either_fabric() {
    // In both orders, and after one of them has left.
    for fabrics in [
        [Fabric::Shm, Fabric::Tcp],
        [Fabric::Tcp, Fabric::Shm],
        [Fabric::Tcp, Fabric::Tcp],
    ] {
        let mut ffn = ffn_of_both_fabrics();
        let mut peers = Vec::new();
        for (instance, fabric) in [1, 2].into_iter().zip(fabrics) {
            let mut attention = Node::attention(fabric, instance, geometry(1, 4096));
            attention.link(fabric, &mut ffn);
            peers.push(attention);
        }
        while let Some(mut last) = peers.pop() {
            for attention in peers.iter_mut().chain([&mut last]) {
                let asleep = std::thread::spawn(move || {
                    let (peer, header) = ffn.expect_arrival();
                    let payload = ffn.payload(&header);
                    ffn.push((peer, header.lane), header.frame.step, &payload);
                    ffn
                });
                std::thread::sleep(Duration::from_millis(5));
                attention.push((InstanceId(9), LaneId(0)), 0, b"hidden states");
                attention.expect_arrival();
                ffn = asleep.join().unwrap();
            }
            drop(last);
            ffn.expect_down();
        }
    }
}

#[test]
fn every_thread_that_waits_on_a_doorbell_is_woken() {
    let (mut attention, ffn) = linked(Fabric::Tcp, geometry(1, 4096));
    for step in 0..20 {
        let doorbell = ffn.endpoint.doorbell();
        let seen = doorbell.current();
        let waiters: Vec<_> = (0..3)
            .map(|_| {
                let doorbell = Arc::clone(&doorbell);
                std::thread::spawn(move || doorbell.wait(seen, PATIENCE))
            })
            .collect();
        std::thread::sleep(Duration::from_millis(2));
        if step == 0 {
            // Seen by the one who waits where the sockets are; then by nobody's socket.
            attention.push((InstanceId(2), LaneId(0)), step, b"hidden states");
        } else {
            doorbell.ring();
        }
        for waiter in waiters {
            assert!(waiter.join().unwrap(), "step {step}");
        }
    }
}
