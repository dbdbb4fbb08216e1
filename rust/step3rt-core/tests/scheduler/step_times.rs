//! What prompts get of a step once it is known how long steps take.

use step3rt_core::config::SchedulerConfig;
use step3rt_core::ids::TimeNs;
use step3rt_core::step::StepPlan;

use crate::world::{World, config, request};

/// One lane with room for 64 tokens in a step, and a target of 20 ms.
pub(crate) fn timed() -> SchedulerConfig {
    SchedulerConfig {
        num_lanes: 1,
        max_model_len: 1_024,
        max_tokens_per_micro_batch: 64,
        max_sequences_per_lane: 8,
        max_waiting_requests: 20,
        target_tpot_ms: 20,
        ..config()
    }
}

/// 5 ms, 0.5 ms per decode, 0.5 ms per token of a prompt.
fn took_us(plan: &StepPlan) -> u64 {
    let chunks = plan.chunks.iter();
    let tokens: u64 = chunks.map(|chunk| u64::from(chunk.num_new_tokens)).sum();
    5_000 + 500 * tokens
}

/// Plans once and lets every step take its time; returns what was planned.
pub(crate) fn step(world: &mut World) -> Vec<StepPlan> {
    let plans = world.plan();
    for plan in &plans {
        world.now = TimeNs(world.now.0 + took_us(plan) * 1_000);
        world.answer(0);
    }
    plans
}

/// A world that has computed prompts of many lengths, alone and beside decodes.
pub(crate) fn fitted() -> World {
    fitted_with(timed())
}

/// The same with other settings.
pub(crate) fn fitted_with(config: SchedulerConfig) -> World {
    let mut world = World::new(config, &[2_000]);
    for id in 0..40_u32 {
        world.submit(request(id.into(), 2 + id * 13 % 50, 6));
        for _ in 0..3 {
            step(&mut world);
        }
    }
    while !step(&mut world).is_empty() {}
    world
}

/// The new tokens of a plan's chunks.
fn tokens(plans: &[StepPlan]) -> Vec<u32> {
    let chunks = plans.iter().flat_map(|plan| &plan.chunks);
    chunks.map(|chunk| chunk.num_new_tokens).collect()
}

#[test]
fn beside_decodes_a_prompt_gets_what_the_target_leaves() {
    let mut world = fitted();
    world.submit(request(90, 3, 200));
    step(&mut world);
    world.submit(request(91, 400, 5));
    for _ in 0..8 {
        let plans = step(&mut world);
        let [1, prefill] = tokens(&plans)[..] else {
            panic!("a decode and a chunk, not {:?}", tokens(&plans));
        };
        assert!((20..=29).contains(&prefill), "{prefill} tokens");
        assert!(took_us(&plans[0]) <= 20_000);
    }
    while !step(&mut world).is_empty() {}
    world.check_done();
}

#[test]
fn the_room_is_shared_by_prompts_in_the_order_of_their_rank() {
    let mut world = fitted();
    world.submit(request(90, 3, 200));
    step(&mut world);
    world.submit(request(91, 9, 5));
    world.submit(request(92, 300, 5));
    let plans = step(&mut world);
    let [1, 9, rest] = tokens(&plans)[..] else {
        panic!("a decode, a prompt and a chunk, not {:?}", tokens(&plans));
    };
    assert!((11..=20).contains(&rest), "{rest} tokens");
    while !step(&mut world).is_empty() {}
    world.check_done();
}

#[test]
fn before_steps_are_known_a_prompt_takes_what_decodes_leave_of_the_budget() {
    let mut world = World::new(timed(), &[2_000]);
    for id in 0..5_u32 {
        world.submit(request(id.into(), 10 + 9 * id, 2));
        while !step(&mut world).is_empty() {}
    }
    world.submit(request(90, 3, 200));
    step(&mut world);
    world.submit(request(91, 400, 5));
    assert_eq!(tokens(&step(&mut world)), [1, 63]);
}

#[test]
fn where_nobody_decodes_a_prompt_takes_the_whole_step() {
    let mut world = fitted();
    world.submit(request(90, 400, 5));
    assert_eq!(tokens(&step(&mut world)), [64]);
    assert_eq!(tokens(&step(&mut world)), [64]);
}

#[test]
fn a_prompt_gets_a_block_in_every_step_even_if_decodes_exceed_the_target() {
    let mut config = timed();
    config.target_tpot_ms = 1; // no step is that short
    let mut world = World::new(config, &[2_000]);
    for id in 0..40_u32 {
        world.submit(request(id.into(), 2 + id * 13 % 50, 6));
        step(&mut world);
    }
    while !step(&mut world).is_empty() {}
    world.submit(request(90, 3, 200));
    step(&mut world);
    world.submit(request(91, 40, 5));
    world.submit(request(92, 40, 5));
    for _ in 0..10 {
        assert_eq!(
            tokens(&step(&mut world)),
            [1, 4],
            "one block for one prompt"
        );
    }
    while !step(&mut world).is_empty() {}
    world.check_done();
}

#[test]
fn a_stalled_step_takes_nothing_from_prompts() {
    let mut world = fitted();
    world.submit(request(90, 3, 200));
    step(&mut world);
    world.plan();
    world.now = world.now.plus_ms(60_000);
    world.answer(0);
    world.submit(request(91, 400, 5));
    let plans = step(&mut world);
    let [1, prefill] = tokens(&plans)[..] else {
        panic!("a decode and a chunk, not {:?}", tokens(&plans));
    };
    assert!((18..=29).contains(&prefill), "{prefill} tokens");
}

#[test]
fn a_new_incarnation_starts_with_the_fixed_budget() {
    let mut world = fitted();
    world.ready(0, 2_000);
    world.submit(request(90, 3, 200));
    step(&mut world);
    world.submit(request(91, 400, 5));
    assert_eq!(tokens(&step(&mut world)), [1, 63]);
}
