//! That links leave no descriptor, thread, mapping or socket behind.
//!
//! Each the only test of its process, because it counts what the process has.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on stops there")]

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::net::TcpStream;
use std::time::Instant;

use common::{Fabric, Node, PATIENCE, geometry, identity, linked};
use step3rt_core::ids::{InstanceId, LaneId};
use step3rt_fabric::contract::Side;

/// How many of what this process has.
type Holdings = BTreeMap<&'static str, usize>;

fn holdings() -> Holdings {
    let entries = |path: &str| fs::read_dir(path).unwrap().count();
    let lines = |path: &str, needle: &str| {
        fs::read_to_string(path)
            .unwrap()
            .lines()
            .filter(|line| line.contains(needle))
            .count()
    };
    let socket_name = format!("step3rt-{}-", std::process::id());
    BTreeMap::from([
        ("descriptors", entries("/proc/self/fd")),
        ("threads", entries("/proc/self/task")),
        ("mappings", lines("/proc/self/maps", "step3rt-")),
        ("sockets", lines("/proc/net/unix", &socket_name)),
    ])
}

fn live_and_die(fabric: Fabric) {
    let (mut attention, mut ffn) = linked(fabric, geometry(2, 4096));
    attention.push((InstanceId(2), LaneId(0)), 0, b"one");
    ffn.expect_arrival();
    ffn.push((InstanceId(1), LaneId(0)), 0, b"two");
    attention.expect_arrival();

    // Replaced, refused, unreachable, disconnected, half-open.
    let mut newer = Node::bind(fabric, identity(1, 2), Side::Initiator, geometry(2, 4096));
    newer.start_link(fabric, &mut ffn);
    ffn.expect_down();
    ffn.expect_up(newer.identity());
    attention.expect_down();
    if fabric != Fabric::Sim {
        attention.endpoint.connect(&ffn.address()).unwrap_err();
        let mut unfit = Node::attention(fabric, 3, geometry(1, 4096));
        unfit.endpoint.connect(&ffn.address()).unwrap_err();
        let gone = Node::ffn(fabric, 4, geometry(2, 4096)).address();
        newer.endpoint.connect(&gone).unwrap_err();
    }
    let _half_open = fabric
        .listens_on_tcp()
        .then(|| TcpStream::connect(&ffn.endpoint.addresses()[0].address).unwrap());
    newer.endpoint.disconnect(InstanceId(2));
    newer.expect_down();
}

#[test]
fn links_leave_nothing_behind() {
    check(&[Fabric::Shm, Fabric::Tcp, Fabric::Sim]);
}

#[test]
#[ignore = "needs an RDMA device: make test-rdma"]
fn links_over_rdma_leave_nothing_behind() {
    check(&[Fabric::Rdma]);
}

fn check(fabrics: &[Fabric]) {
    // Once before counting: the standard library and libc keep a little for themselves.
    let threads = holdings()["threads"];
    for &fabric in fabrics {
        live_and_die(fabric);
    }
    // The thread of an endpoint's sockets is told to end, and not waited for.
    let mut before = holdings();
    let started = Instant::now();
    while before["threads"] != threads && started.elapsed() < PATIENCE {
        std::thread::yield_now();
        before = holdings();
    }
    assert_eq!((before["mappings"], before["sockets"]), (0, 0));
    for _ in 0..5 {
        for &fabric in fabrics {
            live_and_die(fabric);
        }
    }
    // A joined thread is listed a moment longer.
    let started = Instant::now();
    while holdings() != before && started.elapsed() < PATIENCE {
        std::thread::yield_now();
    }
    assert_eq!(holdings(), before);
}
