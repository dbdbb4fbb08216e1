//! An equal beginning is computed once and kept once.

use step3rt_core::config::SchedulerConfig;
use step3rt_core::ids::{InstanceId, TokenId};
use step3rt_core::request::Request;
use step3rt_core::scheduler::Event;
use step3rt_core::step::StepPlan;

use crate::world::{World, config, request};

fn one_lane() -> SchedulerConfig {
    SchedulerConfig {
        num_lanes: 1,
        max_tokens_per_micro_batch: 32,
        ..config()
    }
}

/// A request whose prompt has `num_common` tokens that all of these have, and `num_own` others.
fn with_common(id: u64, num_common: u32, num_own: u32) -> Request {
    let mut new = request(id, num_common + num_own, 4);
    for token in &mut new.prompt[..num_common as usize] {
        *token = TokenId(1);
    }
    new
}

/// (computed, new) tokens of the chunks, and how many blocks were granted with each.
fn work(plans: &[StepPlan]) -> Vec<(u32, u32, usize)> {
    let chunks = plans.iter().flat_map(|plan| &plan.chunks);
    chunks
        .map(|c| (c.num_computed_tokens, c.num_new_tokens, c.new_blocks.len()))
        .collect()
}

fn num_used_blocks(world: &World) -> u32 {
    let (free, total) = world.kv_blocks();
    total - free
}

#[test]
fn a_cached_beginning_is_not_computed_again_and_takes_no_room() {
    let mut world = World::new(one_lane(), &[32]);
    world.submit(with_common(0, 9, 3));
    assert_eq!(work(&world.step()), [(0, 12, 3)]);
    world.submit(with_common(1, 9, 5));
    // Two full blocks of the common nine tokens are there; two more are granted.
    assert_eq!(work(&world.step()), [(12, 1, 1), (8, 6, 4)]);
    assert_eq!(num_used_blocks(&world), 6);
    world.run();
    world.check_done();
}

#[test]
fn what_others_hold_already_takes_no_room() {
    let mut world = World::new(one_lane(), &[10]);
    world.submit(with_common(0, 24, 0)); // six blocks, and one for what follows
    world.step();
    world.submit(with_common(1, 24, 2)); // six that are there, one of its own
    world.submit(request(2, 28, 1)); // seven
    world.step();
    let stats = world.scheduler.stats();
    assert_eq!((stats.num_running, stats.num_waiting), (2, 1));
    world.run();
    world.check_done();
}

#[test]
fn at_least_the_last_token_is_computed() {
    let mut world = World::new(one_lane(), &[32]);
    world.submit(with_common(0, 8, 0));
    world.run();
    world.submit(with_common(1, 8, 0));
    assert_eq!(work(&world.step()), [(4, 4, 2)]);
    world.run();
    world.check_done();
}

#[test]
fn the_next_turn_of_a_conversation_reuses_the_answer_too() {
    let mut world = World::new(one_lane(), &[32]);
    world.submit(request(0, 6, 8));
    world.run();
    let mut next = request(1, 3, 4);
    let stream = world.stream(0);
    next.prompt = [&stream.request.prompt[..], &stream.tokens[0], &next.prompt].concat();
    assert_eq!(next.prompt.len(), 17);
    world.submit(next);
    // 13 of the 14 tokens were computed; the last one never is.
    assert_eq!(work(&world.step()), [(12, 5, 5)]);
    world.run();
    world.check_done();
}

#[test]
fn continuations_wait_for_the_prompt_and_share_it() {
    let mut world = World::new(one_lane(), &[32]);
    let mut new = request(0, 22, 4);
    new.n = 3;
    world.submit(new);
    assert_eq!(work(&world.step()), [(0, 22, 6)]);
    assert_eq!(work(&world.step()), [(22, 1, 0), (20, 2, 6), (20, 2, 6)]);
    assert_eq!(num_used_blocks(&world), 5 + 3);
    world.run();
    world.check_done();
}

#[test]
fn continuations_of_a_prompt_without_a_block_to_share_start_together() {
    let mut world = World::new(one_lane(), &[32]);
    let mut new = request(0, 4, 4); // one block, of which the last token is always computed
    new.n = 2;
    world.submit(new);
    world.plan();
    assert_eq!(world.scheduler.stats().num_running, 2);
    world.run();
    world.check_done();
}

#[test]
fn continuations_do_not_wait_for_a_sibling_that_is_gone() {
    let mut world = World::new(one_lane(), &[32]);
    let mut new = request(0, 40, 4);
    new.n = 2;
    world.submit(new);
    world.step();
    world.lose(0);
    world.ready(0, 32);
    world.run();
    world.check_done();
    assert!(world.stream(0).error.is_none());
}

#[test]
fn a_newcomer_goes_where_its_beginning_is() {
    let mut world = World::new(one_lane(), &[32, 32]);
    world.submit(request(0, 4, 4)); // instance 0
    world.submit(with_common(1, 20, 1)); // instance 1
    world.step();
    world.submit(request(2, 16, 4)); // instance 0 has less to do
    world.submit(with_common(3, 20, 4));
    let plans = world.step();
    let joined = |id| {
        let plan = plans
            .iter()
            .find(|plan| plan.key.instance == InstanceId(id));
        let joined = &plan.expect("both have work").joined;
        joined
            .iter()
            .map(|join| join.sampling.seed)
            .collect::<Vec<_>>()
    };
    assert_eq!((joined(0), joined(1)), (vec![2], vec![3]));
    world.run();
    world.check_done();
}

#[test]
fn a_prompt_whose_logprobs_are_wanted_is_computed() {
    let mut world = World::new(one_lane(), &[32]);
    world.submit(with_common(0, 12, 0));
    world.run();
    let mut new = with_common(1, 12, 0);
    new.sampling.prompt_logprobs = Some(0);
    world.submit(new);
    assert_eq!(work(&world.step())[0].0, 0);
    world.run();
    world.check_done();
}

#[test]
fn nobody_starts_from_blocks_that_led_to_corrupt_logits() {
    let mut world = World::new(one_lane(), &[32]);
    world.submit(with_common(0, 36, 0)); // two chunks; the first one's blocks are published
    world.step();
    world.plan();
    let mut output = world.compute(0);
    output.outputs[0].is_corrupt = true;
    output.outputs[0].token = None;
    world.handle(Event::StepDone(output));
    world.submit(with_common(1, 36, 4));
    assert_eq!(work(&world.step()), [(0, 32, 8)]);
    world.run();
    world.check_done();
}

#[test]
fn idle_beginnings_make_way_for_work() {
    let mut world = World::new(one_lane(), &[12]);
    for id in 0..6 {
        world.submit(request(id, 30, 4));
        world.run();
        assert_eq!(world.kv_blocks(), (12, 12));
    }
    world.check_done();
}

#[test]
fn who_lost_its_place_finds_what_nobody_needed_meanwhile() {
    let mut world = World::new(one_lane(), &[7]);
    world.submit(request(0, 8, 16)); // takes six blocks in the end
    world.submit(request(1, 4, 12));
    let mut joins = Vec::new();
    for _ in 0..100 {
        for plan in world.step() {
            let starts = plan
                .chunks
                .iter()
                .map(|c| (c.sequence, c.num_computed_tokens));
            let starts: Vec<_> = starts.collect();
            for join in &plan.joined {
                let start = starts.iter().find(|(id, _)| *id == join.sequence);
                joins.push((join.tokens.len(), start.expect("it is planned").1));
            }
        }
    }
    world.check_done();
    let [(8, 0), (4, 0), (known, start)] = joins[..] else {
        panic!("unexpected joins: {joins:?}");
    };
    assert!(known > 4, "{joins:?}");
    assert_eq!(start, 4, "the beginning is forgotten last");
}
