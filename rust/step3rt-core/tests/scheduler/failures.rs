//! Losses are ordinary events: streams go on without a gap, or say that they cannot.

use step3rt_core::error::ErrorKind;
use step3rt_core::ids::{Epoch, InstanceId, TimeNs};
use step3rt_core::scheduler::Event;

use crate::world::{World, config, request};

#[test]
fn sequences_of_a_lost_instance_go_on_elsewhere_without_a_gap() {
    let mut world = World::new(config(), &[32, 32]);
    for id in 0..6 {
        let mut new = request(id, 10, 12);
        new.sampling.prompt_logprobs = Some(0);
        world.submit(new);
    }
    for _ in 0..4 {
        world.step();
    }
    world.plan();
    world.lose(0);
    assert!(world.scheduler.stats().num_waiting > 0);
    world.run();
    world.check_done();
    for id in 0..6 {
        assert_eq!(world.stream(id).tokens[0].len(), 12);
        assert_eq!(world.stream(id).prompt_logprobs.len(), 9);
    }
}

#[test]
fn a_join_after_a_loss_carries_what_was_generated() {
    let mut world = World::new(config(), &[32]);
    world.submit(request(0, 5, 8));
    for _ in 0..4 {
        world.step();
    }
    world.lose(0);
    assert_eq!(world.plan(), []);
    world.ready(0, 32);
    let join = world.plan().remove(0).joined.remove(0);
    assert_eq!((join.tokens.len(), join.num_prompt_tokens), (9, 5));
    assert_eq!(join.tokens[5..], world.stream(0).tokens[0]);
}

#[test]
fn a_new_incarnation_replaces_one_whose_loss_nobody_noticed() {
    let mut world = World::new(config(), &[32]);
    world.submit(request(0, 5, 8));
    world.step();
    world.plan();
    let old = world.in_flight[0].clone();
    world.ready(0, 24);
    let mut late = world.plan();
    assert_eq!(late[0].joined.len(), 1);
    let before = world.scheduler.stats();
    let key = old.key;
    let reason = "late".to_owned();
    world.handle(Event::StepFailed { key, reason });
    assert_eq!(
        world.scheduler.stats(),
        before,
        "a stale epoch touches nothing"
    );
    late.clear();
    world.run();
    world.check_done();
    assert_eq!(world.kv_blocks(), (24, 24));
}

#[test]
fn a_registration_of_an_older_incarnation_is_ignored() {
    let mut world = World::new(config(), &[32]);
    world.handle(Event::AttentionReady {
        instance: InstanceId(0),
        epoch: Epoch(0),
        num_kv_blocks: 5,
    });
    assert_eq!(world.kv_blocks(), (32, 32));
}

#[test]
fn a_failed_step_is_planned_again_whole_and_tells_nothing_twice() {
    let mut world = World::new(config(), &[32]);
    world.submit(request(0, 6, 4));
    let first = world.plan();
    world.fail(0);
    let again = world.plan();
    assert_eq!(again[0].joined, []);
    assert_eq!(again[0].chunks[0].new_blocks, [], "the grant stands");
    assert_eq!(again[0].chunks[0].num_computed_tokens, 0);
    assert_eq!(again[0].chunks[0].num_new_tokens, 6);
    assert_eq!(again[0].key.step.0, first[0].key.step.0 + 1);
    world.run();
    world.check_done();
}

#[test]
fn steps_that_keep_failing_are_tried_at_a_pace_and_then_given_up() {
    let mut world = World::new(config(), &[32]);
    world.submit(request(0, 6, 4));
    let started = world.now;
    world.plan();
    world.fail(0);
    assert_eq!(world.plan().len(), 1, "the first retry is at once");
    world.fail(0);
    assert_eq!(world.plan(), []);
    let retry = world.scheduler.next_timer().expect("a retry is due");
    assert_eq!(retry, world.now.plus_ms(10));
    world.now = TimeNs(started.plus_ms(world.config.recovery_timeout_ms).0 - 1);
    assert_eq!(world.plan().len(), 1);
    world.fail(0);
    assert!(world.stream(0).error.is_none());
    world.now = world.now.plus_ms(10);
    world.plan();
    world.fail(0);
    let error = world.stream(0).error.clone().expect("given up");
    assert_eq!(error.kind, ErrorKind::NodeLost);
    world.now = world.now.plus_ms(10);
    world.run();
    world.check_done();
}

#[test]
fn failures_are_given_up_the_moment_the_recovery_time_is_over() {
    let mut world = World::new(config(), &[32]);
    world.submit(request(0, 6, 4));
    world.plan();
    world.fail(0);
    world.plan();
    world.now = world.now.plus_ms(world.config.recovery_timeout_ms);
    world.fail(0);
    assert!(world.stream(0).error.is_some());
}

#[test]
fn one_success_forgives_earlier_failures() {
    let mut world = World::new(config(), &[32]);
    world.submit(request(0, 6, 4));
    world.plan();
    world.fail(0);
    world.step();
    world.now = world.now.plus_ms(world.config.recovery_timeout_ms);
    world.plan();
    world.fail(0);
    assert!(world.stream(0).error.is_none());
    world.run();
    world.check_done();
}

#[test]
fn nothing_is_planned_without_every_expert() {
    let mut world = World::new(config(), &[32]);
    world.submit(request(0, 6, 4));
    world.step();
    world.handle(Event::ExpertsComplete(false));
    world.submit(request(1, 6, 4)); // waits with the others
    assert_eq!(world.plan(), []);
    world.now = world.now.plus_ms(world.config.recovery_timeout_ms - 1);
    world.handle(Event::ExpertsComplete(true));
    world.run();
    world.check_done();
    assert!([0, 1].iter().all(|&id| world.stream(id).error.is_none()));
}

#[test]
fn a_cluster_that_does_not_recover_in_time_fails_everybody_and_refuses_then() {
    let mut world = World::new(config(), &[32]);
    world.submit(request(0, 6, 4));
    world.step();
    world.plan();
    world.handle(Event::ExpertsComplete(false));
    world.submit(request(1, 6, 4));
    let deadline = world.now.plus_ms(world.config.recovery_timeout_ms);
    assert_eq!(world.scheduler.next_timer(), Some(deadline));
    world.now = world.now.plus_ms(500);
    world.handle(Event::ExpertsComplete(false)); // said again: prolongs nothing
    world.now = deadline;
    assert_eq!(world.plan(), []);
    let kind = |world: &World, id| world.stream(id).error.clone().expect("given up").kind;
    assert_eq!(kind(&world, 0), ErrorKind::NodeLost);
    assert_eq!(kind(&world, 1), ErrorKind::EngineNotReady);
    world.submit(request(2, 6, 4));
    assert_eq!(kind(&world, 2), ErrorKind::EngineNotReady);
    world.fail(0);
    assert_eq!(world.kv_blocks(), (32, 32));
    world.handle(Event::ExpertsComplete(true));
    world.submit(request(3, 6, 4));
    world.run();
    world.check_done();
    assert!(world.stream(3).error.is_none());
}

#[test]
fn who_fits_only_a_lost_instance_waits_for_it_and_holds_nobody_up() {
    let mut world = World::new(config(), &[16, 4]);
    world.submit(request(0, 30, 10));
    world.step();
    world.lose(0);
    world.submit(request(1, 6, 4));
    for _ in 0..10 {
        world.step();
    }
    assert!(world.stream(1).finished[0].is_some());
    assert!(world.stream(0).error.is_none());
    world.now = world.now.plus_ms(world.config.recovery_timeout_ms);
    world.plan();
    let error = world.stream(0).error.clone().expect("given up");
    assert_eq!(error.kind, ErrorKind::NodeLost);
    world.submit(request(2, 6, 4));
    world.run();
    world.check_done();
    assert!(world.stream(2).error.is_none());
}

#[test]
fn a_request_that_comes_after_the_last_instance_went_waits_for_the_recovery() {
    let mut world = World::new(config(), &[32]);
    world.lose(0); // nobody is there to miss it
    let deadline = world.now.plus_ms(world.config.recovery_timeout_ms);
    world.submit(request(0, 6, 4));
    world.submit(request(1, 1, 2)); // one block
    assert_eq!(world.scheduler.next_timer(), Some(deadline));
    world.now = world.now.plus_ms(world.config.recovery_timeout_ms - 1);
    world.plan();
    assert!([0, 1].iter().all(|&id| world.stream(id).error.is_none()));
    world.now = deadline;
    world.plan();
    for id in [0, 1] {
        let error = world.stream(id).error.clone().expect("given up");
        assert_eq!(error.kind, ErrorKind::EngineNotReady);
    }
    world.check_done();
}

#[test]
fn who_waited_for_a_larger_instance_in_vain_is_told_the_size_of_those_that_are_here() {
    let mut world = World::new(config(), &[16, 4]);
    world.lose(0);
    world.submit(request(0, 3, 1));
    world.run();
    world.ready(0, 16);
    world.submit(request(1, 30, 10));
    world.lose(0);
    world.now = world.now.plus_ms(world.config.recovery_timeout_ms);
    world.plan();
    let error = world.stream(1).error.clone().expect("given up");
    assert_eq!(error.kind, ErrorKind::PromptTooLong);
    world.check_done();
}

#[test]
fn steps_that_failed_for_want_of_experts_count_neither_against_lanes_nor_their_pace() {
    let mut world = World::new(config(), &[32]);
    world.submit(request(0, 6, 20));
    world.step();
    for _ in 0..2 {
        world.plan();
        world.fail(0);
    }
    world.handle(Event::ExpertsComplete(false));
    world.now = world.now.plus_ms(world.config.recovery_timeout_ms - 1);
    world.handle(Event::ExpertsComplete(true));
    assert_eq!(world.scheduler.next_timer(), None, "no pause is left over");
    world.plan();
    world.now = world.now.plus_ms(1); // the first of these failures was a recovery's time ago
    world.fail(0);
    assert!(world.stream(0).error.is_none());
    world.run();
    world.check_done();
}

#[test]
fn losing_an_unknown_instance_changes_nothing() {
    let mut world = World::new(config(), &[32]);
    world.submit(request(0, 6, 4));
    world.handle(Event::AttentionLost(InstanceId(7)));
    world.run();
    world.check_done();
}

#[test]
fn a_late_registration_of_a_dead_incarnation_brings_nothing_back() {
    let mut world = World::new(config(), &[32]);
    let epoch = world.instances[&InstanceId(0)].epoch;
    world.lose(0);
    world.handle(Event::AttentionReady {
        instance: InstanceId(0),
        epoch,
        num_kv_blocks: 32,
    });
    assert_eq!(world.scheduler.stats().kv_blocks, []);
    world.ready(0, 32);
    assert_eq!(world.scheduler.stats().kv_blocks.len(), 1);
}
