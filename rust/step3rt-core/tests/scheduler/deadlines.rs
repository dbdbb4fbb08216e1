//! Who is told at once, or as soon as it is certain, that a deadline cannot be met.

use std::time::{Duration, Instant};

use step3rt_core::config::SchedulerConfig;
use step3rt_core::error::{ErrorKind, RequestError};
use step3rt_core::ids::{TenantId, TimeNs, TokenId};
use step3rt_core::request::{Request, RequestEvent};
use step3rt_core::scheduler::Event;

use crate::step_times::{fitted, fitted_with, step, timed};
use crate::world::{World, request};

fn with_deadline(world: &World, mut request: Request, after_ms: u64) -> Request {
    request.deadline = Some(world.now.plus_ms(after_ms));
    request
}

fn error(world: &World, id: u64) -> Option<RequestError> {
    world.stream(id).error.clone()
}

/// Lets steps and timers happen until `until`.
fn run_until(world: &mut World, until: TimeNs) {
    while world.now < until {
        if step(world).is_empty() {
            let timer = world.scheduler.next_timer();
            world.now = timer.map_or(until, |timer| timer.min(until)).max(world.now);
            if world.now == until {
                world.plan();
            }
        }
    }
}

#[test]
fn a_prompt_that_takes_longer_than_there_is_time_is_refused_at_once() {
    let mut world = fitted(); // 0.5 ms a token
    let new = with_deadline(&world, request(90, 400, 2), 100);
    world.submit(new);
    let error = error(&world, 90).expect("refused");
    assert_eq!(error.kind, ErrorKind::DeadlineExceeded);
    assert!(error.message.contains("400 tokens to compute first"));
    assert!(error.message.contains("100 ms are left"));
    let mut words = error.message.split(' ');
    let least_ms = words.find_map(|word| word.parse::<u32>().ok());
    assert!(least_ms.is_some_and(|ms| ms > 100), "{}", error.message);
    let new = with_deadline(&world, request(91, 400, 2), 300);
    world.submit(new);
    let end = world.now.plus_ms(400);
    run_until(&mut world, end);
    world.check_done();
    assert!(world.stream(91).error.is_none());
}

#[test]
fn so_are_more_tokens_than_there_is_time_for() {
    let mut world = fitted(); // no step takes less than 5.5 ms
    let mut new = with_deadline(&world, request(90, 4, 200), 250);
    new.sampling.min_tokens = 150;
    world.submit(new.clone());
    let error = error(&world, 90).expect("refused");
    assert!(error.message.contains("150 to generate"));
    // It may stop after its first token.
    let mut may_stop = new.clone();
    may_stop.id.0 = 91;
    may_stop.sampling.min_tokens = 0;
    // Or it ends before `min_tokens`, since it is allowed no more.
    let mut is_short = with_deadline(&world, request(92, 100, 1), 150);
    is_short.sampling.min_tokens = 150;
    // Or it has all of them.
    let mut is_resumed = new;
    is_resumed.id.0 = 93;
    world.clients.submit(&is_resumed);
    is_resumed.resumed = world.stream(93).expected(0, 1_024).0[..150].to_vec();
    for let_in in [may_stop, is_short, is_resumed] {
        let id = let_in.id.0;
        world.submit(let_in);
        assert!(world.stream(id).error.is_none(), "request {id}");
    }
}

#[test]
fn one_that_has_begun_goes_on_to_its_deadline() {
    let mut world = fitted();
    let submitted = world.now;
    let mut new = with_deadline(&world, request(90, 4, 100), 300); // needs 550 ms, and 180 at best
    new.sampling.min_tokens = 100;
    world.submit(new);
    run_until(&mut world, submitted.plus_ms(290));
    assert!(world.stream(90).error.is_none());
    assert!(world.stream(90).tokens[0].len() > 45);
    run_until(&mut world, submitted.plus_ms(310));
    assert!(error(&world, 90).is_some());
}

#[test]
fn nobody_is_refused_before_steps_are_known() {
    let mut world = World::new(timed(), &[2_000]);
    let new = with_deadline(&world, request(90, 900, 2), 1);
    world.submit(new);
    assert!(world.stream(90).error.is_none());
}

#[test]
fn what_is_cached_or_being_computed_takes_no_time() {
    let mut world = fitted();
    world.submit(request(90, 400, 2));
    let mut same = request(90, 400, 2);
    same.id.0 = 91;
    let same = with_deadline(&world, same, 40);
    world.submit(same.clone());
    assert!(world.stream(91).error.is_none(), "the other computes it");
    let mut of_another = same.clone();
    (of_another.id.0, of_another.tenant) = (93, TenantId(5));
    world.submit(of_another);
    assert!(error(&world, 93).is_some(), "tenants share nothing");
    while !step(&mut world).is_empty() {}
    let mut again = with_deadline(&world, same, 40);
    again.id.0 = 92;
    world.submit(again);
    while !step(&mut world).is_empty() {}
    world.check_done();
    assert!(world.stream(92).error.is_none(), "it is cached");
}

#[test]
fn one_that_waits_too_long_is_told_when_it_is_certain() {
    let mut world = fitted();
    for id in 70..78 {
        world.submit(request(id, 4, 100)); // all places of the lane, for half a second
    }
    let submitted = world.now;
    let new = with_deadline(&world, request(90, 400, 2), 300);
    world.submit(new);
    assert!(world.stream(90).error.is_none(), "the others may end soon");
    run_until(&mut world, submitted.plus_ms(200));
    let error = error(&world, 90).expect("it can no longer end in time");
    assert_eq!(error.kind, ErrorKind::DeadlineExceeded);
    assert!(error.message.contains("cannot end within its deadline"));
    while !step(&mut world).is_empty() {}
    world.check_done();
}

#[test]
fn those_ahead_count_when_they_are_more_than_there_are_places() {
    for (num_others, is_refused) in [(15, false), (16, true)] {
        let mut world = fitted(); // eight places
        for id in 70..70 + num_others {
            world.submit(request(id, 4, 100));
            world.plan();
        }
        // Itself it needs a step, of 1.8 ms at the least.
        let new = with_deadline(&world, request(90, 4, 1), 3);
        world.submit(new);
        assert_eq!(
            error(&world, 90).is_some(),
            is_refused,
            "{num_others} others"
        );
        let mut urgent = with_deadline(&world, request(91, 4, 1), 3);
        urgent.priority = -1;
        world.submit(urgent);
        assert!(error(&world, 91).is_none(), "nobody comes before it");
    }
}

/// The least time that it takes to tell somebody that a deadline is out of reach, while a thousand
/// wait whose prompts have `num_common` tokens in common with that one's.
fn time_to_refuse(num_common: usize) -> Duration {
    let config = SchedulerConfig {
        block_size_tokens: 64,
        max_waiting_requests: 2_000,
        ..timed()
    };
    let mut world = fitted_with(config);
    let new = |id: u64| {
        let mut new = request(id, 1_000, 2);
        let own = u32::try_from(id).expect("small");
        new.prompt[num_common..].fill(TokenId(own));
        new.prompt[..num_common].fill(TokenId(1));
        new
    };
    for id in 1_000..2_000 {
        let event = Event::Submit(new(id));
        world.scheduler.handle(world.now, event);
    }
    let refused = (2_000..2_020).map(|id| {
        let event = Event::Submit(with_deadline(&world, new(id), 3));
        let started = Instant::now();
        world.scheduler.handle(world.now, event);
        let took = started.elapsed();
        let events = world.scheduler.take_events();
        let told = events.iter().find(|(told, _)| told.0 == id);
        assert!(matches!(told, Some((_, RequestEvent::Failed(_)))));
        took
    });
    refused.min().expect("several")
}

#[test]
fn telling_so_takes_no_longer_where_a_thousand_prompts_begin_alike() {
    let (apart, alike) = (time_to_refuse(0), time_to_refuse(960));
    assert!(
        alike < 10 * apart,
        "{alike:?} where they begin alike, {apart:?} where not"
    );
}
