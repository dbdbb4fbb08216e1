//! What happens when KV blocks run out.

use step3rt_core::config::SchedulerConfig;
use step3rt_core::ids::SequenceId;
use step3rt_core::step::StepPlan;

use crate::world::{World, config, request};

fn config_with(num_lanes: u8) -> SchedulerConfig {
    SchedulerConfig {
        num_lanes,
        ..config()
    }
}

fn joined(plans: &[StepPlan]) -> Vec<(u64, SequenceId, usize)> {
    let joins = plans.iter().flat_map(|plan| &plan.joined);
    joins
        .map(|join| (join.sampling.seed, join.sequence, join.tokens.len()))
        .collect()
}

#[test]
fn the_youngest_loses_its_place_and_comes_back_with_its_tokens() {
    let mut world = World::new(config_with(1), &[6]);
    world.submit(request(0, 8, 16)); // grows to 23 cached tokens, 6 blocks
    world.submit(request(1, 4, 12));
    let mut joins = Vec::new();
    let mut lefts = Vec::new();
    for _ in 0..100 {
        let plans = world.step();
        joins.extend(joined(&plans));
        lefts.extend(plans.iter().flat_map(|plan| plan.left.clone()));
    }
    world.check_done();
    let [(0, first, 8), (1, second, 4), (1, again, known)] = joins[..] else {
        panic!("unexpected joins: {joins:?}");
    };
    assert!(
        known > 4,
        "generated tokens are computed again, not sampled again"
    );
    assert_ne!(second, again, "a new stay has a new id");
    assert_eq!(lefts, [second, first, again]);
}

#[test]
fn a_lower_priority_loses_its_place_before_a_younger_request() {
    let mut world = World::new(config_with(1), &[6]);
    let mut unimportant = request(0, 4, 12);
    unimportant.priority = 1;
    world.submit(unimportant);
    world.submit(request(1, 8, 16));
    let mut joins = Vec::new();
    for _ in 0..100 {
        joins.extend(joined(&world.step()));
    }
    world.check_done();
    let who: Vec<u64> = joins.iter().map(|&(seed, _, _)| seed).collect();
    assert_eq!(who, [1, 0, 0]);
}

#[test]
fn a_sequence_in_flight_keeps_its_blocks_until_its_step_ends() {
    let mut world = World::new(config_with(2), &[6]);
    world.submit(request(0, 8, 16)); // lane 0
    world.submit(request(1, 8, 12)); // lane 1
    // Both decode until together they need seven blocks; lane 1 is kept in flight then.
    let mut used = Vec::new();
    for _ in 0..200 {
        world.plan();
        let lane_0 = world.in_flight.iter().position(|plan| plan.key.lane.0 == 0);
        let Some(lane_0) = lane_0 else { break };
        world.answer(lane_0);
        let (free, total) = world.kv_blocks();
        used.push(total - free);
    }
    assert!(used.iter().all(|&used| used <= 6));
    let before = world.stream(0).tokens[0].len();
    assert!(
        world.stream(0).finished[0].is_none(),
        "it waits for lane 1's blocks"
    );
    assert_eq!(world.in_flight.len(), 1);
    world.answer(0);
    assert_eq!(
        world.stream(1).tokens[0].len(),
        1,
        "the token of that step counts"
    );
    world.step();
    assert!(world.stream(0).tokens[0].len() > before);
    world.run();
    world.check_done();
}

#[test]
fn cancelling_a_sequence_that_is_about_to_lose_its_place_frees_it_once() {
    let mut world = World::new(config_with(2), &[6]);
    world.submit(request(0, 8, 16));
    world.submit(request(1, 8, 12));
    for _ in 0..200 {
        world.plan();
        let lane_0 = world.in_flight.iter().position(|plan| plan.key.lane.0 == 0);
        let Some(lane_0) = lane_0 else { break };
        world.answer(lane_0);
    }
    let request_1 = world.stream(1).request.id;
    world.handle(step3rt_core::scheduler::Event::Cancel(request_1));
    world.answer(0);
    assert!(
        world.stream(1).tokens[0].is_empty(),
        "its output is dropped"
    );
    world.run();
    world.check_done();
}

#[test]
fn many_sequences_that_outgrow_the_pool_together_all_finish() {
    let mut world = World::new(config_with(2), &[8, 9]);
    for id in 0..8 {
        world.submit(request(id, 2, 28));
    }
    world.run();
    world.check_done();
    for id in 0..8 {
        assert_eq!(world.stream(id).tokens[0].len(), 28);
    }
}

#[test]
fn a_newcomer_leaves_headroom_to_those_that_grow() {
    let config = SchedulerConfig {
        max_model_len: 1_024,
        max_tokens_per_micro_batch: 512,
        ..config_with(1)
    };
    let mut world = World::new(config, &[128]);
    world.submit(request(0, 252, 9)); // 63 blocks
    world.submit(request(1, 256, 9)); // 64 of the 65 that are free; two are kept free
    world.submit(request(2, 1, 1));
    world.step();
    assert_eq!(world.scheduler.stats().num_running, 1);
    world.run();
    world.check_done();
}

#[test]
fn one_that_is_leaving_already_makes_room_and_nobody_else_has_to() {
    let config = SchedulerConfig {
        max_tokens_per_micro_batch: 16,
        ..config_with(3)
    };
    let mut world = World::new(config, &[11]);
    world.submit(request(0, 8, 16)); // three blocks, with the token that comes next
    world.submit(request(1, 8, 16));
    world.submit(request(2, 16, 8)); // four, and a promised one
    world.plan();
    let mut num_running = Vec::new();
    // Lane 2 is kept in flight while the others grow by a block each.
    while let Some(other) = world.in_flight.iter().position(|p| p.key.lane.0 != 2) {
        world.answer(other);
        world.plan();
        num_running.push(world.scheduler.stats().num_running);
        if world.stream(0).tokens[0].len() == 6 {
            break;
        }
    }
    let (free, _) = world.kv_blocks();
    assert_eq!(free, 0, "the blocks of lane 2 are still in use");
    assert!(num_running.contains(&3) && num_running.iter().all(|&running| running >= 2));
    assert_eq!(world.scheduler.stats().num_preemptions, 1);
    world.run();
    world.check_done();
}

#[test]
fn one_that_is_alone_may_have_the_headroom_too() {
    let config = SchedulerConfig {
        max_model_len: 1_024,
        max_tokens_per_micro_batch: 512,
        ..config_with(1)
    };
    let mut world = World::new(config, &[128]);
    world.submit(request(0, 511, 2)); // all 128 blocks
    world.submit(request(1, 511, 2));
    world.step();
    let stats = world.scheduler.stats();
    assert_eq!((stats.num_running, stats.num_waiting), (1, 1));
    world.run();
    world.check_done();
    assert!([0, 1].iter().all(|&id| world.stream(id).error.is_none()));
}

/// Ends enough requests to teach that all use what they are allowed.
fn taught(pool: u32) -> World {
    let mut world = World::new(config_with(1), &[pool]);
    for id in 0..12 {
        world.submit(request(id, 2, 4));
        world.run();
    }
    world
}

#[test]
fn once_lengths_are_known_nobody_gets_a_place_that_it_would_lose() {
    let mut world = taught(8);
    // Each grows from two blocks to five: together they would need ten of eight.
    world.submit(request(90, 8, 12));
    world.submit(request(91, 8, 12));
    world.step();
    let stats = world.scheduler.stats();
    assert_eq!((stats.num_running, stats.num_waiting), (1, 1));
    world.run();
    world.check_done();
    assert_eq!(world.scheduler.stats().num_preemptions, 0);
}

#[test]
fn one_that_will_be_gone_before_the_other_has_grown_is_no_hindrance() {
    let mut world = taught(8);
    world.submit(request(90, 8, 12)); // from two blocks to five
    world.submit(request(91, 8, 4)); // from two to three, and gone after four tokens
    world.step();
    assert_eq!(
        world.scheduler.stats().num_running,
        2,
        "not more than seven at a time"
    );
    world.run();
    world.check_done();
    assert_eq!(world.scheduler.stats().num_preemptions, 0);
}

#[test]
fn one_that_needs_the_whole_pool_gets_it_when_it_is_empty() {
    let mut world = taught(8);
    world.submit(request(90, 8, 12));
    world.submit(request(91, 8, 25)); // 32 tokens, eight blocks
    world.submit(request(92, 4, 4));
    world.run();
    world.check_done();
    let started = |id| world.stream(id).finished[0].expect("it ends").1.times[1];
    assert!(started(91) <= started(92), "it is not overtaken");
    assert_eq!(world.scheduler.stats().num_preemptions, 0);
}

#[test]
fn a_wrong_guess_costs_a_place_and_no_token() {
    let mut world = World::new(config_with(1), &[8]);
    for id in 0..12 {
        let mut short = request(id, 2, 20);
        world.clients.submit(&short);
        let first = world.stream(id).expected(0, 64).0[0];
        short.sampling.stop_tokens = vec![first]; // ends with its first token
        world.submit(short);
        world.run();
    }
    for id in 90..93 {
        world.submit(request(id, 2, 20)); // go on to the end
    }
    world.step();
    assert_eq!(world.scheduler.stats().num_running, 3);
    world.run();
    world.check_done();
    assert!(world.scheduler.stats().num_preemptions > 0);
}
