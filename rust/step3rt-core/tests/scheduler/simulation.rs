//! Any history of requests, cancels, losses and failures keeps every promise.

use std::cell::RefCell;
use std::collections::BTreeMap;

use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use step3rt_core::config::SchedulerConfig;
use step3rt_core::ids::{Epoch, RequestId, TenantId, TimeNs, TokenId};
use step3rt_core::request::{FinishReason, Request};
use step3rt_core::scheduler::Event;

use crate::world::{World, config, request};

#[derive(Clone, Debug)]
enum Op {
    Submit(Box<Shape>),
    Cancel(usize),
    Stop(usize, u32),
    Plan,
    Answer(usize),
    Fail(usize),
    /// An answer of an incarnation or a step that is long over.
    AnswerStale(usize),
    /// An answer that lost its last outputs.
    AnswerTorn(usize),
    /// An answer whose last logits were not finite.
    AnswerCorrupt(usize),
    Lose(u32),
    /// Comes up, or comes back before its loss was noticed.
    Ready(u32, u32),
    Experts(bool),
    Wait(u64),
}

#[derive(Clone, Debug)]
struct Shape {
    num_prompt_tokens: u32,
    /// The prompt's tokens before this index are those of all other requests.
    num_common_tokens: usize,
    num_resumed: usize,
    max_tokens: u32,
    n: u32,
    priority: i32,
    tenant: u64,
    deadline_ms: Option<u64>,
    prompt_logprobs: Option<u32>,
    min_tokens: u32,
    num_stop_tokens: u32,
}

fn shape() -> impl Strategy<Value = Op> {
    let sizes = (1_u32..50, 1_u32..30, 1_u32..4, -1..2_i32);
    let resumed = (
        prop_oneof![3 => Just(0_usize), 1 => 1_usize..12],
        0_usize..40,
    );
    let options = (
        prop::option::weighted(0.2, 0_u64..400),
        prop::option::weighted(0.3, Just(0_u32)),
        0_u32..4,
        0_u32..5,
        0_u64..3,
    );
    (sizes, resumed, options).prop_map(|(sizes, resumed, options)| {
        let (num_prompt_tokens, max_tokens, n, priority) = sizes;
        let (resumed, num_common_tokens) = resumed;
        let (deadline_ms, prompt_logprobs, min_tokens, num_stop_tokens, tenant) = options;
        Op::Submit(Box::new(Shape {
            num_prompt_tokens,
            num_common_tokens,
            num_resumed: if n == 1 { resumed } else { 0 },
            max_tokens,
            n,
            priority,
            tenant,
            deadline_ms,
            prompt_logprobs,
            min_tokens,
            num_stop_tokens,
        }))
    })
}

fn op() -> impl Strategy<Value = Op> {
    let any_index = any::<prop::sample::Index>().prop_map(|index| index.index(1 << 16));
    prop_oneof![
        6 => shape(),
        2 => any_index.clone().prop_map(Op::Cancel),
        1 => (any_index.clone(), 0_u32..4).prop_map(|(i, n)| Op::Stop(i, n)),
        12 => Just(Op::Plan),
        12 => any_index.clone().prop_map(Op::Answer),
        2 => any_index.clone().prop_map(Op::Fail),
        1 => any_index.clone().prop_map(Op::AnswerStale),
        1 => any_index.clone().prop_map(Op::AnswerTorn),
        1 => any_index.prop_map(Op::AnswerCorrupt),
        1 => (0_u32..3).prop_map(Op::Lose),
        1 => (0_u32..3, 8_u32..24).prop_map(|(id, blocks)| Op::Ready(id, blocks)),
        1 => prop::bool::weighted(0.7).prop_map(Op::Experts),
        3 => (1_u64..300).prop_map(Op::Wait),
    ]
}

impl Shape {
    fn request(&self, id: u64, now_ms: u64) -> Request {
        let mut request = request(id, self.num_prompt_tokens, self.max_tokens);
        for (index, token) in request.prompt.iter_mut().enumerate() {
            if index < self.num_common_tokens {
                *token = TokenId(1);
            }
        }
        request.n = self.n;
        request.priority = self.priority;
        request.tenant = TenantId(self.tenant);
        request.sampling.prompt_logprobs = self.prompt_logprobs;
        request.sampling.min_tokens = self.min_tokens;
        request.sampling.stop_tokens = (0..self.num_stop_tokens).map(TokenId).collect();
        let deadline = |ms| TimeNs(0).plus_ms(now_ms + ms);
        request.deadline = self.deadline_ms.map(deadline);
        request
    }
}

/// Resumes the stream that the request would have had, if it is that long.
fn resume(world: &World, mut request: Request, num_resumed: usize) -> Request {
    let mut other = World::new(world.config.clone(), &[64]);
    other.clients.submit(&request);
    let stream = other.stream(request.id.0);
    let fits = request.prompt.len() < world.config.max_model_len as usize;
    if num_resumed > 0 && fits {
        let (tokens, _) = stream.expected(0, world.config.max_model_len);
        request.resumed = tokens[..num_resumed.min(tokens.len())].to_vec();
    }
    request
}

/// Applies one operation; ids of requests count up, so indices pick any that ever was.
fn apply(world: &mut World, op: &Op, num_requests: &mut u64) {
    let pick = |index: usize, len: usize| (len > 0).then(|| index % len.max(1));
    match op {
        Op::Submit(shape) => {
            let new = shape.request(*num_requests, world.now.0 / 1_000_000);
            *num_requests += 1;
            let new = resume(world, new, shape.num_resumed);
            world.submit(new);
        }
        Op::Cancel(index) => world.handle(Event::Cancel(RequestId(*index as u64 % 40))),
        Op::Stop(index, continuation) => world.handle(Event::Stop {
            request: RequestId(*index as u64 % 40),
            index: *continuation,
        }),
        Op::Plan => drop(world.plan()),
        Op::Answer(index) => {
            if let Some(index) = pick(*index, world.in_flight.len()) {
                world.answer(index);
            }
        }
        Op::Fail(index) => {
            if let Some(index) = pick(*index, world.in_flight.len()) {
                world.fail(index);
            }
        }
        Op::AnswerStale(index) => {
            if let Some(index) = pick(*index, world.in_flight.len()) {
                let before = world.scheduler.stats();
                let output = world.answer(index);
                let after = world.scheduler.stats();
                assert_eq!(before.num_steps_in_flight - 1, after.num_steps_in_flight);
                let mut other = output.clone();
                other.key.epoch = Epoch(0);
                world.handle(Event::StepDone(output));
                world.handle(Event::StepDone(other));
                assert_eq!(world.scheduler.stats(), after);
            }
        }
        Op::AnswerTorn(index) => {
            if let Some(index) = pick(*index, world.in_flight.len()) {
                world.answer_torn(index);
            }
        }
        Op::AnswerCorrupt(index) => {
            if let Some(index) = pick(*index, world.in_flight.len()) {
                world.answer_corrupt(index);
            }
        }
        Op::Lose(id) => world.lose(*id),
        Op::Ready(id, num_blocks) => world.ready(*id, *num_blocks),
        Op::Experts(complete) => world.handle(Event::ExpertsComplete(*complete)),
        Op::Wait(ms) => world.now = world.now.plus_ms(*ms),
    }
}

/// What the histories have led to, so that a test of nothing is found out. The bounds are a fifth
/// or less of what 300 histories usually lead to.
#[derive(Default)]
struct Reached {
    num_finished: usize,
    num_stop_tokens: usize,
    failures: BTreeMap<String, usize>,
    /// At least so many joins were not the first of their sequence.
    num_comebacks: usize,
    num_shared: usize,
    num_doomed: usize,
}

impl Reached {
    fn note(&mut self, world: &World) {
        let started = world.clients.streams.values().filter(|s| s.is_started);
        let first_joins: usize = started.map(|stream| stream.tokens.len()).sum();
        self.num_comebacks += world.num_joins.saturating_sub(first_joins);
        self.num_shared += world.num_shared_joins;
        self.num_doomed += world.num_doomed;
        for stream in world.clients.streams.values() {
            let reasons = stream.finished.iter().flatten().map(|(reason, _)| reason);
            for reason in reasons {
                self.num_finished += 1;
                let is_stop = matches!(reason, FinishReason::StopToken(_));
                self.num_stop_tokens += usize::from(is_stop);
            }
            if let Some(error) = &stream.error {
                *self
                    .failures
                    .entry(format!("{:?}", error.kind))
                    .or_default() += 1;
            }
        }
    }
}

fn check_history(max_steps_in_flight: u8, pools: &[u32], ops: &[Op]) -> World {
    let config = SchedulerConfig {
        max_steps_in_flight,
        ..config()
    };
    let mut world = World::new(config, pools);
    let mut num_requests = 0;
    for op in ops {
        apply(&mut world, op, &mut num_requests);
        world.clients.check_contents(world.config.max_model_len);
    }
    // Faults stop: everything that still lives must end.
    world.handle(Event::ExpertsComplete(true));
    world.ready(9, 16);
    world.run();
    world.now = world.now.plus_ms(world.config.recovery_timeout_ms);
    world.run();
    world.check_done();
    world
}

#[test]
fn any_history_keeps_streams_gap_free_and_blocks_conserved() {
    let reached = RefCell::new(Reached::default());
    let pools = prop::collection::vec(8_u32..24, 0..3);
    let ops = prop::collection::vec(op(), 1..150);
    let mut runner = TestRunner::new(ProptestConfig {
        cases: 300,
        source_file: Some(file!()),
        ..ProptestConfig::default()
    });
    let result = runner.run(&(1_u8..4, pools, ops), |(max_steps, pools, ops)| {
        reached
            .borrow_mut()
            .note(&check_history(max_steps, &pools, &ops));
        Ok(())
    });
    result.unwrap_or_else(|failure| panic!("{failure}"));
    let reached = reached.into_inner();
    assert!(reached.num_finished > 500 && reached.num_stop_tokens > 20);
    assert!(reached.num_comebacks > 200, "too few lost their places");
    assert!(reached.num_shared > 200, "too few shared a beginning");
    assert!(
        reached.num_doomed > 40,
        "too few steps were planned in vain"
    );
    // A recovery that runs out while something runs is rare here; `failures` has tests of it.
    let kinds = reached.failures.keys().map(String::as_str);
    let kinds: Vec<&str> = kinds.filter(|kind| *kind != "NodeLost").collect();
    let all = [
        "Cancelled",
        "DeadlineExceeded",
        "EngineNotReady",
        "Internal",
        "PromptTooLong",
        "QueueFull",
    ];
    assert_eq!(kinds, all);
}

#[test]
fn the_same_history_gives_the_same_plans() {
    let run = || {
        let mut world = World::new(config(), &[12, 20]);
        let mut plans = Vec::new();
        for id in 0..12 {
            let mut new = request(id, 5 + u32::try_from(id).unwrap() * 3 % 17, 20);
            new.n = 1 + u32::try_from(id).unwrap() % 3;
            world.submit(new);
            plans.extend(world.step());
        }
        world.lose(0);
        for _ in 0..60 {
            plans.extend(world.step());
        }
        plans
    };
    let first = run();
    assert!(first.len() > 50);
    assert_eq!(first, run());
}
