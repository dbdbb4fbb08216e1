//! An instance as its loop sees it: the order of its verbs, its reports, and what wakes it.

#![allow(clippy::unwrap_used, reason = "a test that cannot set up fails")]

mod scripted;

use std::thread;
use std::time::{Duration, Instant};

use scripted::instance::{Instance, LANE};
use scripted::{Coordinator, PATIENCE};
use step3rt_core::ids::{SequenceId, StepId, TokenId};
use step3rt_core::step::{SequenceOutput, StepOutput, TokenLogprob};
use step3rt_node::error::NodeErrorKind;
use step3rt_node::event::NodeEvent;
use step3rt_node::node::StepTiming;
use step3rt_proto::v1;
use step3rt_proto::v1::session_request::Event;
use step3rt_proto::v1::session_response::Command;

#[test]
fn verbs_out_of_order_are_refused_and_change_nothing() {
    let mut coordinator = Coordinator::start();
    let mut instance = Instance::join(&mut coordinator, v1::Role::Ffn, 1, "auto");
    let node = &mut instance.node;
    let mut events = vec![];
    let error = node.poll(Duration::ZERO, &mut events).unwrap_err();
    assert_eq!(error.kind(), NodeErrorKind::InvalidArgument);
    let text = node.ready(1, false).unwrap_err().to_string();
    assert!(text.contains("it comes once, after bind"), "{text}");
    node.bind(64, 64, None).unwrap();
    let text = node.bind(64, 64, None).unwrap_err().to_string();
    assert!(text.contains("it comes once, before ready"), "{text}");
    node.ready(1, false).unwrap();
    assert!(node.ready(1, false).is_err());
    node.poll(Duration::ZERO, &mut events).unwrap();
    node.close();
    node.close();
    assert!(node.poll(Duration::ZERO, &mut events).is_err());
}

#[test]
fn slots_of_no_size_are_refused() {
    let mut coordinator = Coordinator::start();
    let mut instance = Instance::join(&mut coordinator, v1::Role::Ffn, 1, "auto");
    let error = instance.node.bind(0, 64, None).unwrap_err();
    assert_eq!(error.kind(), NodeErrorKind::Config);
    assert!(error.to_string().contains("0 bytes"), "{error}");
    let long = vec![0; 4097];
    let error = instance.node.bind(64, 64, Some(&long)).unwrap_err();
    assert_eq!(error.kind(), NodeErrorKind::InvalidArgument);
    assert!(error.to_string().contains("4097 bytes"), "{error}");
    instance.node.bind(64, 64, None).unwrap();
}

#[test]
fn outputs_and_failures_name_their_step_and_epoch() {
    let mut coordinator = Coordinator::start();
    let mut instance = Instance::start(&mut coordinator, v1::Role::Attention, 2, "auto");
    let key = instance.node.step_key(LANE, StepId(40));
    let output = SequenceOutput {
        sequence: SequenceId(5),
        token: Some(TokenId(3)),
        logprob: Some(TokenLogprob {
            token: TokenId(3),
            logprob: -0.5,
            top: vec![(TokenId(3), -0.5)],
        }),
        prompt_logprobs: vec![],
        is_corrupt: false,
    };
    let timing = StepTiming {
        compute_ns: 1,
        wait_ns: 2,
        total_ns: 3,
    };
    let outputs = vec![output];
    instance
        .node
        .complete_step(StepOutput { key, outputs }, timing)
        .unwrap();
    match instance.scripted.next_report() {
        Some(Event::StepOutput(output)) => {
            assert_eq!((output.epoch, output.lane, output.step), (102, 1, 40));
            assert_eq!(output.outputs[0].token_id, Some(3));
            assert_eq!(output.timing.unwrap().wait_ns, 2);
        }
        event => panic!("{event:?}"),
    }
    instance
        .node
        .fail_step(key, "FFN instance 1 died".to_owned())
        .unwrap();
    match instance.scripted.next_report() {
        Some(Event::StepFailed(failed)) => {
            assert_eq!((failed.epoch, failed.lane, failed.step), (102, 1, 40));
            assert_eq!(failed.reason, "FFN instance 1 died");
        }
        event => panic!("{event:?}"),
    }
}

#[test]
fn the_coordinator_asks_to_drain_once() {
    let mut coordinator = Coordinator::start();
    let mut instance = Instance::start(&mut coordinator, v1::Role::Ffn, 1, "auto");
    instance.scripted.send(Command::Drain(v1::Drain {}));
    assert_eq!(instance.event(), NodeEvent::Drain);
    instance.scripted.send(Command::Drain(v1::Drain {}));
    // Something that comes after the second Drain, so that it has been taken for sure.
    instance.scripted.send(Command::StepPlan(v1::StepPlan {
        epoch: 101,
        ..Default::default()
    }));
    assert!(matches!(instance.event(), NodeEvent::StepPlan(_)));
}

#[test]
fn a_sleeping_loop_wakes_when_the_coordinator_dies_and_hears_it_once() {
    let mut coordinator = Coordinator::start();
    let mut instance = Instance::start(&mut coordinator, v1::Role::Ffn, 1, "auto");
    let killer = thread::spawn(move || {
        thread::sleep(Duration::from_millis(50));
        drop(coordinator);
        Instant::now()
    });
    let mut events = vec![];
    instance.node.poll(PATIENCE, &mut events).unwrap();
    let noticed = killer.join().unwrap().elapsed();
    assert!(noticed < Duration::from_secs(1), "{noticed:?}");
    assert!(
        matches!(events[..], [NodeEvent::SessionLost { .. }]),
        "{events:?}"
    );
    events.clear();
    instance
        .node
        .poll(Duration::from_millis(10), &mut events)
        .unwrap();
    assert_eq!(events, []);
}

#[test]
fn a_poll_without_news_takes_its_time_and_not_much_more() {
    let mut coordinator = Coordinator::start();
    let mut instance = Instance::start(&mut coordinator, v1::Role::Ffn, 1, "auto");
    let mut events = vec![];
    let started = Instant::now();
    let timeout = Duration::from_millis(450);
    instance.node.poll(timeout, &mut events).unwrap();
    assert!(started.elapsed() >= timeout);
    assert!(started.elapsed() < PATIENCE);
    assert_eq!(events, []);
}

#[test]
fn a_poll_without_end_still_hears_what_comes() {
    let mut coordinator = Coordinator::start();
    let mut instance = Instance::start(&mut coordinator, v1::Role::Ffn, 1, "auto");
    instance.scripted.send(Command::Drain(v1::Drain {}));
    let mut events = vec![];
    instance.node.poll(Duration::MAX, &mut events).unwrap();
    assert_eq!(events, [NodeEvent::Drain]);
}
