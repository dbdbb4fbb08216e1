//! That a scheduler in a steady state holds no more memory after ten thousand lane steps than after
//! one thousand, and what it allocates on the way.
//!
//! It has this file's process to itself: every allocation of the process is counted.

use std::alloc::System;

use stats_alloc::{INSTRUMENTED_SYSTEM, Region, Stats, StatsAlloc};
use step3rt_sim::workload::{Load, Workload};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

const LOAD: Load = Load {
    num_sequences: 1_536,
    num_attention: 4,
    num_lanes: 3,
};
const SEQUENCES_PER_LANE_STEP: usize = 512;
const NUM_STEPS: usize = 10_000;
/// Lane steps over which the most is taken, since how many end and begin differs from step to step.
const WINDOW: usize = 500;

#[derive(Clone, Copy, Debug, Default)]
struct Live {
    allocations: usize,
    bytes: usize,
}

impl Live {
    fn now() -> Self {
        let stats = ALLOCATOR.stats();
        Self {
            allocations: stats.allocations - stats.deallocations,
            bytes: stats.bytes_allocated - stats.bytes_deallocated,
        }
    }

    fn max(self, other: Self) -> Self {
        Self {
            allocations: self.allocations.max(other.allocations),
            bytes: self.bytes.max(other.bytes),
        }
    }
}

#[test]
#[expect(clippy::print_stdout, reason = "the figures are in docs/scheduler.md")]
fn ten_thousand_lane_steps_leave_no_more_allocated_than_one_thousand() {
    let mut workload = Workload::new(LOAD);
    let mut most = [Live::default(); NUM_STEPS / WINDOW];
    let mut num_allocations = 0;
    for step in 0..NUM_STEPS {
        let lane_step = workload.prepare(step % usize::from(LOAD.num_lanes));
        let region = Region::new(ALLOCATOR);
        let answers = workload.run(lane_step);
        let Stats {
            allocations,
            reallocations,
            ..
        } = region.change();
        num_allocations += allocations + reallocations;
        workload.note(answers);
        let window = &mut most[step / WINDOW];
        *window = window.max(Live::now());
    }
    let (early, late) = (most[1], most[most.len() - 1]);
    let per_step = num_allocations / NUM_STEPS;
    println!(
        "{early:?} after 1,000 lane steps, {late:?} after {NUM_STEPS}; {per_step} per lane step"
    );
    assert!(late.allocations <= early.allocations + early.allocations / 100);
    assert!(late.bytes <= early.bytes + early.bytes / 100);
    // A sequence that begins and ends allocates; one that goes on does not.
    let bound = 8 * LOAD.num_attention as usize + 20 * SEQUENCES_PER_LANE_STEP / 100;
    assert!(per_step <= bound, "{per_step} allocations per lane step");
}
