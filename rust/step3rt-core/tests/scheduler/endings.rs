//! How streams end, and that everything is given back when they do.

use step3rt_core::error::ErrorKind;
use step3rt_core::ids::{RequestId, TimeNs, TokenId};
use step3rt_core::request::{FinishReason, Request};
use step3rt_core::scheduler::Event;
use step3rt_core::step::SequenceOutput;

use crate::world::{World, config, request};

/// A request whose token at `position` is a stop id, and that token.
fn stopping_at(position: usize) -> (Request, TokenId) {
    let mut new = request(0, 5, 20);
    let mut world = World::new(config(), &[16]);
    world.clients.submit(&new);
    let token = world.stream(0).expected(0, 64).0[position];
    new.sampling.stop_tokens = vec![token];
    (new, token)
}

#[test]
fn a_stop_id_is_the_last_token_of_its_stream() {
    let (new, token) = stopping_at(4);
    let mut world = World::new(config(), &[16]);
    world.submit(new);
    world.run();
    world.check_done();
    let (reason, usage) = world.stream(0).finished[0].expect("it ends");
    assert_eq!(reason, FinishReason::StopToken(token));
    assert_eq!(world.stream(0).tokens[0].last(), Some(&token));
    assert!(usage.completion_tokens <= 5);
}

#[test]
fn usage_tells_when_it_came_was_planned_had_its_first_token_and_ended() {
    let mut world = World::new(config(), &[16]);
    world.submit(request(0, 12, 3)); // a step of eight tokens, and one of the rest
    let began = world.now;
    world.now = began.plus_ms(5);
    for _ in 0..4 {
        world.plan();
        world.now = world.now.plus_ms(10);
        world.answer(0);
    }
    let (_, usage) = world.stream(0).finished[0].expect("it ends");
    let times = [0, 5, 25, 45].map(|ms| began.plus_ms(ms));
    assert_eq!(usage.times, times);
    world.run();
    world.check_done();
}

#[test]
fn stop_ids_do_not_stop_before_min_tokens() {
    let (mut new, token) = stopping_at(0);
    new.sampling.min_tokens = 1; // a real sampler would not even have sampled it
    let mut world = World::new(config(), &[16]);
    world.submit(new);
    world.run();
    world.check_done();
    assert_eq!(world.stream(0).tokens[0][0], token);
    assert!(world.stream(0).tokens[0].len() > 1);
}

#[test]
fn a_stop_string_ends_one_continuation_and_drops_what_is_in_flight() {
    let mut world = World::new(config(), &[32]);
    let mut new = request(0, 5, 6);
    new.n = 2;
    world.submit(new);
    world.step();
    world.step();
    world.plan();
    let stop = Event::Stop {
        request: RequestId(0),
        index: 1,
    };
    world.handle(stop.clone());
    world.handle(stop);
    world.run();
    world.check_done();
    let stream = world.stream(0);
    assert_eq!(stream.tokens[1].len(), 1);
    assert_eq!(stream.tokens[0].len(), 6);
    let reasons = [0, 1].map(|index| stream.finished[index].expect("it ends").0);
    assert_eq!(reasons, [FinishReason::Length, FinishReason::StopString]);
}

#[test]
fn cancelled_request_returns_its_blocks_at_once_when_no_step_holds_them() {
    let mut world = World::new(config(), &[16]);
    world.submit(request(0, 9, 20));
    world.step();
    assert_ne!(world.kv_blocks().0, 16);
    world.handle(Event::Cancel(RequestId(0)));
    assert_eq!(world.kv_blocks(), (16, 16));
    let error = world.stream(0).error.clone().expect("it is told");
    assert_eq!(error.kind, ErrorKind::Cancelled);
    world.run();
    world.check_done();
}

#[test]
fn cancelled_request_returns_its_blocks_when_the_step_in_flight_ends() {
    let mut world = World::new(config(), &[16]);
    world.submit(request(0, 4, 20));
    world.step();
    world.plan();
    world.handle(Event::Cancel(RequestId(0)));
    assert_ne!(world.kv_blocks().0, 16, "the step still writes to them");
    world.answer(0);
    assert_eq!(world.kv_blocks(), (16, 16));
    assert_eq!(world.stream(0).tokens[0].len(), 1, "the output is dropped");
    world.run();
    world.check_done();
}

#[test]
fn a_step_that_fails_frees_what_was_cancelled_meanwhile() {
    let mut world = World::new(config(), &[16]);
    world.submit(request(0, 4, 20));
    world.plan();
    world.handle(Event::Cancel(RequestId(0)));
    world.fail(0);
    assert_eq!(world.kv_blocks(), (16, 16));
    world.run();
    world.check_done();
}

#[test]
fn a_waiting_request_can_be_cancelled() {
    let mut world = World::new(config(), &[8]);
    world.submit(request(0, 20, 10));
    world.submit(request(1, 20, 10));
    world.step();
    assert_eq!(world.scheduler.stats().num_waiting, 1);
    world.handle(Event::Cancel(RequestId(1)));
    assert_eq!(world.scheduler.stats().num_waiting, 0);
    world.handle(Event::Cancel(RequestId(1)));
    world.handle(Event::Cancel(RequestId(99)));
    world.run();
    world.check_done();
}

#[test]
fn deadlines_end_running_and_waiting_requests_and_set_the_timer() {
    let mut world = World::new(config(), &[8]);
    let deadline = world.now.plus_ms(50);
    let mut running = request(0, 20, 10);
    running.deadline = Some(deadline);
    let mut waiting = request(1, 20, 10);
    waiting.deadline = Some(deadline.plus_ms(10));
    world.submit(running);
    world.submit(waiting);
    world.submit(request(2, 20, 10));
    world.step();
    assert_eq!(world.scheduler.next_timer(), Some(deadline));
    world.now = TimeNs(deadline.0 - 1);
    world.step();
    assert!(world.stream(0).error.is_none());
    world.now = deadline;
    world.plan();
    let error = world.stream(0).error.clone().expect("its deadline passed");
    assert_eq!(error.kind, ErrorKind::DeadlineExceeded);
    assert!(error.message.contains("50 ms"));
    assert_eq!(world.scheduler.next_timer(), Some(deadline.plus_ms(10)));
    world.now = deadline.plus_ms(10);
    world.run();
    world.check_done();
    assert!(world.stream(1).error.is_some());
    assert!(world.stream(2).error.is_none());
}

#[test]
fn corrupt_logits_fail_their_request_alone() {
    let mut world = World::new(config(), &[32]);
    let mut new = request(0, 3, 5);
    new.n = 2;
    world.submit(new);
    world.submit(request(1, 3, 5));
    world.submit(request(2, 3, 5));
    world.step();
    world.plan();
    let mut output = world.compute(0);
    output.outputs[0].is_corrupt = true;
    output.outputs[0].token = None;
    world.handle(Event::StepDone(output));
    let error = world
        .stream(0)
        .error
        .clone()
        .expect("its logits were corrupt");
    assert_eq!(error.kind, ErrorKind::Internal);
    world.run();
    world.check_done();
    assert!([1, 2].iter().all(|&id| world.stream(id).error.is_none()));
}

#[test]
fn an_answer_that_does_not_match_its_plan_fails_whom_it_concerns() {
    let spoils: [fn(&mut Vec<SequenceOutput>); 3] = [
        |outputs| drop(outputs.pop()),
        |outputs| outputs[1].token = None,
        |outputs| outputs[1].sequence.0 += 1_000,
    ];
    for spoil in spoils {
        let mut world = World::new(config(), &[32]);
        for id in 0..4 {
            world.submit(request(id, 3, 5));
        }
        world.plan();
        let mut output = world.compute(0);
        assert_eq!(output.outputs.len(), 2);
        spoil(&mut output.outputs);
        world.handle(Event::StepDone(output));
        world.run();
        world.check_done();
        let failed: Vec<_> = world
            .clients
            .streams
            .values()
            .filter_map(|stream| stream.error.as_ref().map(|error| error.kind))
            .collect();
        assert_eq!(failed, [ErrorKind::Internal]);
    }
}

#[test]
fn prompt_logprobs_come_in_chunks_before_the_first_token() {
    let mut world = World::new(config(), &[32]);
    let mut new = request(0, 20, 2);
    new.sampling.prompt_logprobs = Some(0);
    world.submit(new);
    let counts: Vec<_> = (0..3)
        .map(|_| {
            world.step();
            world.stream(0).prompt_logprobs.len()
        })
        .collect();
    assert_eq!(counts, [7, 15, 19]);
    world.run();
    world.check_done();
}
