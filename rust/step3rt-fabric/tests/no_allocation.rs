//! That carrying a frame allocates nothing, in any thread.
//!
//! Each the only test of its process, because it counts what the process allocates.

#![allow(unsafe_code, reason = "an allocator that counts")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on stops there")]

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use common::{Fabric, Node, PATIENCE, frame, geometry, linked};
use step3rt_core::ids::{InstanceId, LaneId};
use step3rt_fabric::endpoint::FabricEvent;

struct Counting;

static NUM_ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: hands every call on to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        NUM_ALLOCATIONS.fetch_add(1, Ordering::SeqCst);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn await_frame(node: &mut Node, events: &mut Vec<FabricEvent>) {
    let doorbell = node.endpoint.doorbell();
    while events.is_empty() {
        let seen = doorbell.current();
        node.endpoint.poll(events);
        assert!(
            !events.is_empty() || doorbell.wait(seen, PATIENCE),
            "nothing happened"
        );
    }
    assert!(
        matches!(events[..], [FabricEvent::Arrived { .. }]),
        "{events:?}"
    );
    events.clear();
}

#[test]
fn a_frame_is_carried_without_an_allocation() {
    // The larger one does not fit a socket's buffer, so that a part of it is left for later.
    check(&[
        (Fabric::Shm, 4096),
        (Fabric::Tcp, 4096),
        (Fabric::Tcp, 16 << 20),
    ]);
}

#[test]
#[ignore = "needs an RDMA device: make test-rdma"]
fn a_frame_is_carried_over_rdma_without_an_allocation() {
    check(&[(Fabric::Rdma, 4096), (Fabric::Rdma, 4 << 20)]);
}

const FRAMES_PER_WINDOW: u64 = 20;
const NUM_WINDOWS: u64 = 4;

/// The first window, in which buffers get their size, does not count. A frame that allocates does so in
/// every window; a thread that linked the two and ends later, or the test harness, in one.
fn check(cases: &[(Fabric, usize)]) {
    for &(fabric, payload_bytes) in cases {
        let (mut attention, mut ffn) = linked(fabric, geometry(1, payload_bytes));
        let mut events = Vec::with_capacity(4);
        let mut fewest = usize::MAX;
        for window in 0..=NUM_WINDOWS {
            let before = NUM_ALLOCATIONS.load(Ordering::SeqCst);
            for place in 0..FRAMES_PER_WINDOW {
                let frame = frame(window * FRAMES_PER_WINDOW + place, payload_bytes);
                attention
                    .endpoint
                    .push(InstanceId(2), LaneId(0), frame)
                    .unwrap();
                await_frame(&mut ffn, &mut events);
                ffn.endpoint.push(InstanceId(1), LaneId(0), frame).unwrap();
                await_frame(&mut attention, &mut events);
            }
            if window > 0 {
                fewest = fewest.min(NUM_ALLOCATIONS.load(Ordering::SeqCst) - before);
            }
        }
        assert_eq!(fewest, 0, "{fabric:?} with {payload_bytes} bytes");
    }
}
