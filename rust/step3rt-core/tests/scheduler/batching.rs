//! What goes into a step, and where sequences stay.

use std::collections::BTreeMap;

use step3rt_core::config::SchedulerConfig;
use step3rt_core::ids::{BlockId, InstanceId, LaneId, TenantId};
use step3rt_core::step::StepPlan;

use crate::world::{World, config, request};

/// Instance, lane, and the (computed, new) tokens of the chunks.
type Shape = (u32, u8, Vec<(u32, u32)>);

fn shape(plans: &[StepPlan]) -> Vec<Shape> {
    let chunks = |plan: &StepPlan| {
        let chunks = plan.chunks.iter();
        chunks
            .map(|chunk| (chunk.num_computed_tokens, chunk.num_new_tokens))
            .collect()
    };
    let plans = plans.iter();
    plans
        .map(|plan| (plan.key.instance.0, plan.key.lane.0, chunks(plan)))
        .collect()
}

fn one_lane() -> SchedulerConfig {
    SchedulerConfig {
        num_lanes: 1,
        ..config()
    }
}

#[test]
fn a_long_prompt_is_computed_in_chunks_of_the_token_budget() {
    let mut world = World::new(one_lane(), &[16]);
    world.submit(request(0, 19, 2));
    assert_eq!(shape(&world.step()), [(0, 0, vec![(0, 8)])]);
    assert_eq!(shape(&world.step()), [(0, 0, vec![(8, 8)])]);
    assert!(world.stream(0).tokens[0].is_empty());
    assert_eq!(shape(&world.step()), [(0, 0, vec![(16, 3)])]);
    assert_eq!(world.stream(0).tokens[0].len(), 1);
    assert_eq!(shape(&world.step()), [(0, 0, vec![(19, 1)])]);
    world.run();
    world.check_done();
}

#[test]
fn decodes_come_first_and_prefill_takes_the_rest_of_the_budget() {
    let mut world = World::new(one_lane(), &[32]);
    world.submit(request(0, 3, 10));
    world.submit(request(1, 4, 10));
    world.step();
    world.submit(request(2, 20, 4));
    assert_eq!(shape(&world.step()), [(0, 0, vec![(3, 1), (4, 1), (0, 6)])]);
    assert_eq!(shape(&world.step()), [(0, 0, vec![(4, 1), (5, 1), (6, 6)])]);
    world.run();
    world.check_done();
}

#[test]
fn blocks_are_granted_as_chunks_need_them_and_no_earlier() {
    let mut world = World::new(one_lane(), &[16]);
    world.submit(request(0, 10, 4));
    let grants = |plans: Vec<StepPlan>| plans[0].chunks[0].new_blocks.clone();
    assert_eq!(grants(world.step()), [BlockId(0), BlockId(1)]);
    assert_eq!(grants(world.step()), [BlockId(2)]);
    assert_eq!(grants(world.step()), []); // token 10 lies in the third block
    assert_eq!(grants(world.step()), []);
    assert_eq!(grants(world.step()), [BlockId(3)]);
}

#[test]
fn a_sequence_is_told_once_and_then_only_by_deltas() {
    let mut world = World::new(one_lane(), &[16]);
    world.submit(request(0, 3, 3));
    let first = world.step();
    assert_eq!(first[0].joined.len(), 1);
    assert_eq!(first[0].joined[0].tokens, world.stream(0).request.prompt);
    assert_eq!(first[0].joined[0].num_prompt_tokens, 3);
    for _ in 0..2 {
        let next = world.step();
        assert!(next[0].joined.is_empty() && next[0].left.is_empty());
    }
    let last = world.step();
    assert_eq!(last[0].left, [first[0].joined[0].sequence]);
    assert!(last[0].chunks.is_empty(), "a plan may only say who left");
    assert!(world.step().is_empty());
    world.check_done();
}

#[test]
fn one_step_per_lane_is_in_flight_and_lanes_do_not_wait_for_each_other() {
    let mut world = World::new(config(), &[32]);
    world.submit(request(0, 4, 5));
    world.submit(request(1, 4, 5));
    assert_eq!(
        shape(&world.plan()),
        [(0, 0, vec![(0, 4)]), (0, 1, vec![(0, 4)])]
    );
    assert!(world.plan().is_empty());
    world.answer(1);
    assert_eq!(shape(&world.plan()), [(0, 1, vec![(4, 1)])]);
    world.answer(1);
    assert_eq!(shape(&world.plan()), [(0, 1, vec![(5, 1)])]);
    assert!(world.stream(0).tokens[0].is_empty());
}

#[test]
fn newcomers_stay_where_the_least_kv_is_in_use() {
    let mut world = World::new(config(), &[32, 32]);
    world.submit(request(0, 24, 2)); // six blocks: instance 0, lane 0
    world.submit(request(1, 4, 2)); // instance 1 is empty
    world.submit(request(2, 4, 2)); // still the emptier instance, its other lane
    world.submit(request(3, 4, 2)); // two blocks there, six on instance 0
    let places: Vec<_> = world
        .plan()
        .into_iter()
        .map(|plan| (plan.key.instance, plan.key.lane, plan.joined.len()))
        .collect();
    assert_eq!(
        places,
        [
            (InstanceId(0), LaneId(0), 1),
            (InstanceId(1), LaneId(0), 2),
            (InstanceId(1), LaneId(1), 1),
        ]
    );
}

#[test]
fn a_full_lane_takes_nobody_even_with_blocks_to_spare() {
    let mut world = World::new(one_lane(), &[64]);
    for id in 0..6 {
        world.submit(request(id, 1, 8));
    }
    let plans = world.step();
    assert_eq!(plans[0].chunks.len(), 4);
    assert_eq!(world.scheduler.stats().num_waiting, 2);
    world.run();
    world.check_done();
}

#[test]
fn lower_priority_numbers_go_first_and_the_older_within_them() {
    let mut world = World::new(one_lane(), &[64]);
    for (id, priority) in [(0, 5), (1, 0), (2, 5), (3, -3)] {
        let mut new = request(id, 2, 1);
        new.priority = priority;
        world.submit(new);
    }
    let plans = world.plan();
    let seeds: Vec<_> = plans[0]
        .joined
        .iter()
        .map(|join| join.sampling.seed)
        .collect();
    assert_eq!(seeds, [3, 1, 0, 2], "the seed of a test request is its id");
}

#[test]
fn continuations_of_a_request_are_sequences_with_seeds_of_their_own() {
    let mut world = World::new(config(), &[64]);
    let mut new = request(7, 5, 6);
    new.n = 3;
    new.sampling.prompt_logprobs = Some(0);
    world.submit(new);
    let plans = [world.step(), world.step()].concat();
    let joins = plans.into_iter().flat_map(|plan| plan.joined);
    let joins: BTreeMap<_, _> = joins
        .map(|join| (join.sampling.seed, join.sampling.prompt_logprobs))
        .collect();
    assert_eq!(joins, BTreeMap::from([(7, Some(0)), (8, None), (9, None)]));
    world.run();
    world.check_done();
    assert_eq!(world.stream(7).prompt_logprobs.len(), 4);
    assert_ne!(world.stream(7).tokens[0], world.stream(7).tokens[1]);
}

#[test]
fn a_tenant_with_many_requests_does_not_keep_another_waiting() {
    let config = SchedulerConfig {
        max_waiting_requests: 16,
        ..one_lane()
    };
    let mut world = World::new(config, &[64]);
    for id in 0..9 {
        let mut new = request(id, 2, 4);
        new.tenant = TenantId(u64::from(id >= 8));
        world.submit(new);
    }
    let seeds: Vec<u64> = world.plan()[0]
        .joined
        .iter()
        .map(|join| join.sampling.seed)
        .collect();
    assert_eq!(
        seeds,
        [0, 1, 2, 8],
        "four places, one of them for the other tenant"
    );
    world.run();
    world.check_done();
}

#[test]
fn nobody_pays_for_a_prompt_that_is_computed_again() {
    let config = SchedulerConfig {
        max_sequences_per_lane: 1,
        ..one_lane()
    };
    let mut world = World::new(config, &[64]);
    for (id, tenant) in [(0, 1), (1, 2), (2, 1), (3, 2)] {
        let mut new = request(id, 8, 2);
        new.tenant = TenantId(tenant);
        world.submit(new);
    }
    world.step(); // of request 0; now it is the other tenant's turn
    world.lose(0);
    world.ready(0, 64);
    world.run();
    world.check_done();
    // When 0 and 1 have ended, both have had 8 + 2 * 2, and the older goes first.
    let started = |id| world.stream(id).finished[0].expect("it ends").1.times[1];
    assert!(started(2) < started(3));
}

#[test]
fn tenants_share_by_tokens_and_not_by_requests() {
    let mut world = World::new(
        SchedulerConfig {
            max_sequences_per_lane: 1,
            max_waiting_requests: 32,
            ..one_lane()
        },
        &[64],
    );
    for id in 0..24 {
        let (tenant, max_tokens) = if id < 8 { (0, 22) } else { (1, 6) };
        let mut new = request(id, 2, max_tokens);
        new.tenant = TenantId(tenant);
        world.submit(new);
    }
    // A request of tenant 0 costs 2 + 2 * 22, one of tenant 1 costs 2 + 2 * 6.
    while world.stream(3).finished[0].is_none() {
        world.step();
        let cost = |id: u64| {
            let stream = world.stream(id);
            let num_prompt_tokens = if stream.is_started { 2 } else { 0 };
            num_prompt_tokens + 2 * stream.tokens[0].len()
        };
        let costs: [usize; 2] = [(0..8).map(cost).sum(), (8..24).map(cost).sum()];
        assert!(costs[0].abs_diff(costs[1]) <= 46, "{costs:?}");
    }
    world.run();
    world.check_done();
}

#[test]
fn a_prompt_of_better_rank_does_not_displace_a_decode() {
    let mut world = World::new(one_lane(), &[32]);
    let mut unimportant = request(0, 3, 10);
    unimportant.priority = 1;
    world.submit(unimportant);
    world.step();
    world.submit(request(1, 20, 4));
    assert_eq!(shape(&world.step()), [(0, 0, vec![(3, 1), (0, 7)])]);
    assert_eq!(shape(&world.step()), [(0, 0, vec![(4, 1), (7, 7)])]);
    world.run();
    world.check_done();
}
