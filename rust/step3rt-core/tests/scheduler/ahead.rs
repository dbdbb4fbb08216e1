//! A lane is planned ahead of its results, and what was planned in vain does no harm.

use std::collections::BTreeSet;

use step3rt_core::config::SchedulerConfig;
use step3rt_core::ids::RequestId;
use step3rt_core::scheduler::Event;
use step3rt_core::step::StepPlan;

use crate::world::{World, config, request};

fn one_ahead() -> SchedulerConfig {
    SchedulerConfig {
        num_lanes: 1,
        max_steps_in_flight: 2,
        ..config()
    }
}

/// Per plan, the (computed, new) tokens of its chunks.
fn work(plans: &[StepPlan]) -> Vec<Vec<(u32, u32)>> {
    let chunks = |plan: &StepPlan| {
        let chunks = plan.chunks.iter();
        chunks
            .map(|chunk| (chunk.num_computed_tokens, chunk.num_new_tokens))
            .collect()
    };
    plans.iter().map(chunks).collect()
}

#[test]
fn the_next_token_is_planned_before_the_last_one_is_back() {
    let mut world = World::new(one_ahead(), &[16]);
    world.submit(request(0, 11, 4));
    assert_eq!(work(&world.plan()), [[(0, 8)], [(8, 3)]]);
    world.answer(0);
    assert_eq!(work(&world.plan()), [[(11, 1)]]);
    assert!(
        world.stream(0).tokens[0].is_empty(),
        "token 11 is not known yet"
    );
    world.answer(0);
    assert_eq!(work(&world.plan()), [[(12, 1)]]);
    assert_eq!(world.stream(0).tokens[0].len(), 1);
    world.run();
    world.check_done();
}

#[test]
fn nothing_is_planned_beyond_the_last_token() {
    let mut world = World::new(one_ahead(), &[16]);
    world.submit(request(0, 6, 2));
    assert_eq!(work(&world.plan()), [[(0, 6)], [(6, 1)]]);
    world.answer(0);
    assert_eq!(world.plan(), []);
    world.answer(0);
    assert_eq!(world.stream(0).finished.len(), 1);
    world.run();
    world.check_done();
}

#[test]
fn the_overrun_token_of_a_stopped_sequence_is_dropped() {
    let mut new = request(0, 5, 20);
    let mut world = World::new(one_ahead(), &[16]);
    world.clients.submit(&new);
    new.sampling.stop_tokens = vec![world.stream(0).expected(0, 64).0[2]];
    world.submit(new);
    while world.stream(0).finished[0].is_none() {
        world.plan();
        world.answer(0);
    }
    assert_eq!(world.in_flight.len(), 1, "one step runs in vain");
    assert_ne!(world.kv_blocks().0, 16, "and writes to its blocks");
    world.answer(0);
    assert_eq!(world.kv_blocks(), (16, 16));
    world.run();
    world.check_done();
}

#[test]
fn a_failed_step_fails_the_one_planned_on_it_and_both_are_done_again() {
    let mut world = World::new(one_ahead(), &[16]);
    world.submit(request(0, 11, 4));
    assert_eq!(world.plan().len(), 2);
    world.fail(0);
    assert_eq!(
        world.plan(),
        [],
        "a step in flight has nothing to start from"
    );
    world.answer(0);
    assert_eq!(world.num_doomed, 1);
    let again = world.plan();
    assert_eq!(
        work(&again),
        [[(0, 8)], [(8, 3)]],
        "at once: it was one failure"
    );
    let deltas = |plan: &StepPlan| plan.joined.len() + plan.chunks[0].new_blocks.len();
    assert!(again.iter().all(|plan| deltas(plan) == 0), "all was told");
    world.run();
    world.check_done();
}

#[test]
fn a_later_step_of_other_sequences_survives_a_failure() {
    let mut world = World::new(one_ahead(), &[16]);
    world.submit(request(0, 8, 1)); // fills the first step's budget
    world.submit(request(1, 8, 1)); // the second step is its own
    assert_eq!(work(&world.plan()), [[(0, 8)], [(0, 8)]]);
    world.fail(0);
    world.answer(0);
    assert!(world.stream(1).finished[0].is_some());
    assert_eq!(work(&world.plan()), [[(0, 8)]]);
    world.run();
    world.check_done();
}

#[test]
fn a_sequence_that_loses_its_place_keeps_the_tokens_of_all_its_steps() {
    let config = SchedulerConfig {
        num_lanes: 2,
        ..one_ahead()
    };
    let mut world = World::new(config, &[6]);
    world.submit(request(0, 8, 16));
    world.submit(request(1, 8, 12));
    let lane = |world: &World, lane| {
        let mut plans = world.in_flight.iter();
        plans.position(|plan| plan.key.lane.0 == lane)
    };
    loop {
        world.plan();
        let Some(index) = lane(&world, 0) else { break };
        world.answer(index);
    }
    assert_eq!(world.in_flight.len(), 2, "lane 1 was kept waiting");
    world.answer(0);
    assert_ne!(world.kv_blocks().0, 6);
    world.answer(0);
    assert_eq!(world.stream(1).tokens[0].len(), 2);
    world.run();
    world.check_done();
}

#[test]
fn cancelling_frees_the_blocks_when_the_last_step_in_flight_ends() {
    let mut world = World::new(one_ahead(), &[16]);
    world.submit(request(0, 4, 20));
    world.step();
    assert_eq!(world.plan().len(), 2);
    world.handle(Event::Cancel(RequestId(0)));
    world.answer(0);
    assert_ne!(world.kv_blocks().0, 16);
    world.answer(0);
    assert_eq!(world.kv_blocks(), (16, 16));
    world.run();
    world.check_done();
}

#[test]
fn prompts_that_count_as_computed_begin_with_their_last_token_and_share_nothing() {
    let config = SchedulerConfig {
        assumes_computed_prompts: true,
        ..config()
    };
    let mut world = World::new(config, &[16]);
    world.submit(request(0, 11, 6));
    world.submit(request(50, 11, 6)); // the same prompt
    let plans = world.plan();
    assert_eq!(work(&plans), [[(10, 1)], [(10, 1)]]);
    let blocks = plans.iter().flat_map(|plan| &plan.chunks[0].new_blocks);
    let blocks: BTreeSet<_> = blocks.collect();
    assert_eq!(blocks.len(), 6, "for all 11 tokens of each");
    world.run();
    world.check_done();
}
