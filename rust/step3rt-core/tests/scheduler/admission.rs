//! Who is let in, and what the others are told.

use step3rt_core::error::{ErrorKind, RequestError};
use step3rt_core::ids::{RequestId, TenantId, TimeNs, TokenId};
use step3rt_core::request::{FinishReason, Request};
use step3rt_core::scheduler::Event;

use crate::world::{World, config, request};

fn refusal(world: &mut World, request: Request) -> RequestError {
    let id = request.id.0;
    world.submit(request);
    let stream = world.stream(id);
    assert!(!stream.is_started);
    stream.error.clone().expect("the request is refused")
}

type Spoil = fn(&mut Request);

#[test]
fn a_request_that_can_never_run_is_refused_at_once() {
    let mut world = World::new(config(), &[8, 6]);
    let cases: [(ErrorKind, Spoil); 8] = [
        (ErrorKind::InvalidParameter, |r| r.prompt.clear()),
        (ErrorKind::InvalidParameter, |r| r.max_tokens = 0),
        (ErrorKind::InvalidParameter, |r| r.n = 0),
        (ErrorKind::InvalidParameter, |r| r.n = 129),
        (ErrorKind::InvalidParameter, |r| {
            r.n = 2;
            r.resumed = vec![TokenId(1)];
        }),
        (ErrorKind::PromptTooLong, |r| {
            r.prompt = vec![TokenId(0); 64];
        }),
        (ErrorKind::PromptTooLong, |r| {
            r.resumed = vec![TokenId(0); 62];
        }),
        (ErrorKind::PromptTooLong, |r| r.max_tokens = 31), // 33 tokens in 4 * 8 slots
    ];
    for (id, (kind, spoil)) in (0..).zip(cases) {
        let mut new = request(id, 3, 4);
        spoil(&mut new);
        assert_eq!(refusal(&mut world, new).kind, kind, "case {id}");
    }
    assert_eq!(world.plan(), []);
    world.check_done();
}

#[test]
fn a_prompt_that_leaves_no_token_of_the_context_is_refused_however_large_the_pool() {
    let mut world = World::new(config(), &[100]);
    let error = refusal(&mut world, request(0, 64, 1));
    assert_eq!(error.kind, ErrorKind::PromptTooLong);
    world.submit(request(1, 63, 1));
    assert!(world.stream(1).error.is_none());
}

#[test]
fn the_longest_sequence_that_is_promised_is_the_longest_that_is_let_in() {
    assert_eq!(
        World::new(config(), &[])
            .scheduler
            .longest_sequence_tokens(),
        None
    );
    for num_blocks in 1..20 {
        let mut world = World::new(config(), &[1, num_blocks]);
        let longest = world.scheduler.longest_sequence_tokens();
        let longest = longest.expect("there is an instance");
        world.submit(request(0, longest - 1, 1));
        assert!(world.stream(0).error.is_none(), "{longest} tokens");
        let error = refusal(&mut world, request(1, longest, 1));
        assert_eq!(error.kind, ErrorKind::PromptTooLong);
    }
}

#[test]
fn a_request_that_just_fits_the_pool_runs_to_its_end() {
    let mut world = World::new(config(), &[8]);
    world.submit(request(0, 3, 30)); // 33 tokens, of which the last is never computed
    world.run();
    world.check_done();
    let (reason, usage) = world.stream(0).finished[0].expect("it ends");
    assert_eq!(
        (reason, usage.completion_tokens),
        (FinishReason::Length, 30)
    );
}

#[test]
fn a_sequence_ends_at_the_contexts_end() {
    let mut world = World::new(config(), &[16]);
    world.submit(request(0, 63, 30));
    world.submit(request(1, 40, u32::MAX));
    world.run();
    world.check_done();
    let lengths = [0, 1].map(|id| world.stream(id).tokens[0].len());
    assert_eq!(lengths, [1, 24]);
}

#[test]
fn a_full_queue_refuses_with_a_retry_hint_and_keeps_those_it_has() {
    let mut world = World::new(config(), &[64]);
    // Eight places on two lanes, eight more in the queue.
    for id in 0..16 {
        world.submit(request(id, 4, 4));
    }
    assert_eq!(world.scheduler.stats().num_waiting, 8);
    world.now = world.now.plus_ms(700);
    let error = refusal(&mut world, request(16, 4, 4));
    assert_eq!(error.kind, ErrorKind::QueueFull);
    assert_eq!(
        error.retry_after_ms,
        Some(700),
        "as long as the head has waited"
    );
    world.run();
    world.submit(request(17, 4, 4));
    world.run();
    let refused: Vec<_> = world
        .clients
        .streams
        .values()
        .filter(|s| s.error.is_some())
        .collect();
    assert_eq!(refused.len(), 1);
    world.check_done();
}

#[test]
fn the_retry_hint_is_the_time_between_places_while_there_was_a_line() {
    let mut world = World::new(config(), &[64]);
    for id in 0..16 {
        world.submit(request(id, 4, 4)); // 8 run, 8 wait
    }
    let began = world.now;
    while world.scheduler.stats().num_waiting > 0 {
        world.step();
        world.now = world.now.plus_ms(500);
        world.plan();
    }
    let waited_ms = (world.now.0 - began.0) / 1_000_000;
    world.run();
    world.now = world.now.plus_ms(60_000); // nobody waits: that says nothing about the line
    for id in 16..32 {
        world.submit(request(id, 4, 4));
    }
    world.plan();
    let error = refusal(&mut world, request(40, 4, 4));
    assert_eq!(error.retry_after_ms, Some(waited_ms / 8), "8 were served");
    world.run();
}

#[test]
fn the_retry_hint_is_bounded_from_below() {
    let mut world = World::new(config(), &[64]);
    for id in 0..16 {
        world.submit(request(id, 4, 4));
    }
    let error = refusal(&mut world, request(16, 4, 4));
    assert_eq!(error.retry_after_ms, Some(100));
}

#[test]
fn one_tenant_cannot_fill_the_queue_for_another() {
    let mut world = World::new(config(), &[64]);
    let of = |id: u64, tenant| {
        let mut new = request(id, 4, 4);
        new.tenant = TenantId(tenant);
        new
    };
    for id in 0..16 {
        world.submit(of(id, 1)); // eight run, eight wait
    }
    for id in 16..20 {
        world.submit(of(id, 2));
        assert!(world.stream(id).error.is_none(), "four are its share");
    }
    let displaced = (0..16).filter(|&id| world.stream(id).error.is_some());
    assert_eq!(
        displaced.collect::<Vec<_>>(),
        [12, 13, 14, 15],
        "the youngest"
    );
    let error = world.stream(15).error.clone().expect("displaced");
    assert_eq!(error.kind, ErrorKind::QueueFull);
    assert!(error.retry_after_ms.is_some());
    for tenant in [1, 2] {
        let id = 20 + tenant;
        let error = refusal(&mut world, of(id, tenant));
        assert_eq!(error.kind, ErrorKind::QueueFull, "it has its share");
    }
    world.submit(of(23, 3));
    assert!(world.stream(23).error.is_none(), "a third may come");
    assert_eq!(world.scheduler.stats().num_waiting, 8);
    world.run();
    world.check_done();
}

#[test]
fn a_newcomer_that_is_refused_for_itself_displaces_nobody() {
    let mut world = World::new(config(), &[64]);
    for id in 0..16 {
        world.submit(request(id, 4, 4));
    }
    let mut late = request(16, 4, 4);
    (late.tenant, late.deadline) = (TenantId(2), Some(world.now));
    assert_eq!(refusal(&mut world, late).kind, ErrorKind::DeadlineExceeded);
    let mut large = request(17, 3, 31);
    large.tenant = TenantId(2);
    let mut small = World::new(config(), &[8]);
    assert_eq!(refusal(&mut small, large).kind, ErrorKind::PromptTooLong);
    assert!((0..16).all(|id| world.stream(id).error.is_none()));
}

#[test]
fn a_draining_server_finishes_what_it_has_and_takes_nothing_new() {
    let mut world = World::new(config(), &[64]);
    for id in 0..12 {
        world.submit(request(id, 4, 4));
    }
    world.handle(Event::Drain);
    let error = refusal(&mut world, request(12, 4, 4));
    assert_eq!(error.kind, ErrorKind::Draining);
    assert!(error.retry_after_ms.is_some());
    world.run();
    world.check_done();
    let finished = world.clients.streams.values().filter(|s| s.error.is_none());
    assert_eq!(finished.count(), 12, "those in the queue were accepted too");
}

#[test]
fn a_cluster_that_was_never_complete_refuses_at_once() {
    let mut world = World::empty(config());
    let kind = refusal(&mut world, request(0, 4, 4)).kind;
    assert_eq!(kind, ErrorKind::EngineNotReady);
    let mut world = World::new(config(), &[]);
    let kind = refusal(&mut world, request(0, 4, 4)).kind;
    assert_eq!(kind, ErrorKind::EngineNotReady, "experts alone do not do");
    let mut world = World::empty(config());
    world.ready(0, 16);
    let error = refusal(&mut world, request(1, 4, 4));
    assert_eq!(error.kind, ErrorKind::EngineNotReady);
    assert!(error.message.contains("1 attention instances are ready"));
    world.handle(Event::ExpertsComplete(true));
    world.submit(request(2, 4, 4));
    world.run();
    world.check_done();
    assert!(world.stream(2).error.is_none());
}

#[test]
fn a_request_whose_deadline_has_passed_is_refused() {
    let mut world = World::new(config(), &[16]);
    let mut late = request(0, 4, 4);
    late.deadline = Some(world.now);
    assert_eq!(refusal(&mut world, late).kind, ErrorKind::DeadlineExceeded);
}

#[test]
fn a_second_request_under_a_live_id_changes_nothing() {
    let mut world = World::new(config(), &[16]);
    world.submit(request(0, 4, 4));
    world.step();
    world.handle(Event::Submit(request(0, 9, 9)));
    world.run();
    world.check_done();
    assert_eq!(world.stream(0).tokens[0].len(), 4);
}

#[test]
fn as_many_continuations_as_are_allowed_all_run() {
    let mut world = World::new(config(), &[16, 16]);
    let mut new = request(0, 5, 2);
    new.n = 128;
    world.submit(new);
    world.run();
    world.check_done();
    assert!(world.stream(0).error.is_none());
}

#[test]
fn a_long_prompt_may_resume_a_long_stream() {
    let mut world = World::new(config(), &[16]);
    let mut new = request(0, 30, 34);
    world.clients.submit(&new);
    new.resumed = world.stream(0).expected(0, 64).0[..30].to_vec();
    world.submit(new);
    world.run();
    world.check_done();
    assert_eq!(world.stream(0).tokens[0].len(), 34);
}

#[test]
fn a_resumed_stream_goes_on_where_it_was() {
    let mut world = World::new(config(), &[16]);
    let mut new = request(0, 6, 9);
    world.clients.submit(&new);
    let (tokens, _) = world.stream(0).expected(0, 64);
    new.resumed = tokens[..5].to_vec();
    world.submit(new);
    let join = world.step().remove(0).joined.remove(0);
    assert_eq!((join.tokens.len(), join.num_prompt_tokens), (11, 6));
    world.run();
    world.check_done();
    assert_eq!(world.stream(0).tokens[0], tokens);
    let (_, usage) = world.stream(0).finished[0].expect("it ends");
    assert_eq!((usage.prompt_tokens, usage.completion_tokens), (6, 9));
}

#[test]
fn a_resumed_stream_that_lacks_only_its_end_gets_it_without_a_step() {
    let mut world = World::new(config(), &[16]);
    let mut full = request(0, 6, 2);
    full.resumed = vec![TokenId(9), TokenId(9)];
    world.submit(full);
    let mut stopped = request(1, 6, 8);
    stopped.resumed = vec![TokenId(9), TokenId(3)];
    stopped.sampling.stop_tokens = vec![TokenId(3)];
    world.submit(stopped);
    let mut at_the_end = request(2, 62, 30);
    at_the_end.resumed = vec![TokenId(9), TokenId(9)]; // 64 tokens fill the context
    world.submit(at_the_end);
    assert_eq!(world.plan(), []);
    let reasons = [0, 1, 2].map(|id| world.stream(id).finished[0].expect("it ends").0);
    let stop = FinishReason::StopToken(TokenId(3));
    assert_eq!(reasons, [FinishReason::Length, stop, FinishReason::Length]);
    assert!((0..3).all(|id| world.stream(id).is_started));
}

#[test]
fn a_long_request_at_the_head_is_not_overtaken_for_ever() {
    let mut world = World::new(config(), &[16]);
    world.submit(request(0, 40, 10));
    world.submit(request(1, 40, 10)); // finds no room beside the first
    world.submit(request(2, 1, 1)); // would
    world.step();
    assert_eq!(world.scheduler.stats().num_waiting, 2);
    world.run();
    world.check_done();
    let started = |id| world.stream(id).finished[0].expect("it ends").1.times[1];
    assert!(started(1) <= started(2));
    assert_eq!(world.stream(0).request.id, RequestId(0));
    assert!(started(0) > TimeNs(0));
}
