//! The session against a real gRPC server: registering, retrying, leases, commands and endings.

#![allow(clippy::unwrap_used, reason = "a test that cannot set up fails")]

mod scripted;

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use scripted::doorbell::Counter;
use scripted::{Coordinator, PATIENCE, ReservedPort, ScriptedSession, options, welcome};
use step3rt_core::ids::{Epoch, InstanceId, LaneId, SequenceId, StepId};
use step3rt_core::step::StepKey;
use step3rt_fabric::contract::Doorbell;
use step3rt_node::error::{NodeError, NodeErrorKind};
use step3rt_node::session::{Command, Session};
use step3rt_proto::v1;
use step3rt_proto::v1::session_request::Event;
use step3rt_proto::v1::session_response;
use tonic::Status;

/// Opens an attention instance's session while the coordinator does what `answer` does.
fn open<T: Send>(
    coordinator: &mut Coordinator,
    answer: impl FnOnce(ScriptedSession) -> T + Send,
) -> (Result<Session, NodeError>, T) {
    let options = options(&coordinator.address.to_string(), "attention", 10.0);
    thread::scope(|scope| {
        let answering = scope.spawn(|| answer(coordinator.accept()));
        let session = Session::connect(&options, "boot".to_owned(), &mut || false);
        (session, answering.join().unwrap())
    })
}

fn open_welcomed(coordinator: &mut Coordinator) -> (Session, ScriptedSession) {
    let (session, scripted) = open(coordinator, |mut scripted| {
        scripted.welcome(4, 9, "auto");
        scripted
    });
    (session.unwrap(), scripted)
}

fn next_command(session: &mut Session) -> Command {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(command) = session.next_command() {
            return command;
        }
        assert!(Instant::now() < deadline, "no command has come");
        thread::sleep(Duration::from_millis(1));
    }
}

fn plan(epoch: u64, step: u64) -> session_response::Command {
    session_response::Command::StepPlan(v1::StepPlan {
        epoch,
        lane: 1,
        step,
        left: vec![17],
        joined: vec![],
        chunks: vec![],
    })
}

fn lost_reason(session: &mut Session) -> String {
    match next_command(session) {
        Command::Lost(reason) => reason,
        command => panic!("{command:?}"),
    }
}

#[test]
fn hello_says_what_the_instance_is_and_welcome_says_who() {
    let mut coordinator = Coordinator::start();
    let (session, hello) = open(&mut coordinator, |mut scripted| {
        scripted.welcome(4, 9, "tcp")
    });
    assert_eq!(hello.protocol_version, step3rt_proto::PROTOCOL_VERSION);
    assert_eq!(hello.role(), v1::Role::Attention);
    assert_eq!(hello.boot_id, "boot");
    assert_eq!(hello.pid, std::process::id());
    assert_eq!(hello.model_fingerprint, "f00d");
    assert_eq!(hello.model.unwrap().num_experts, 4);
    let session = session.unwrap();
    let welcome = session.welcome();
    assert_eq!(welcome.instance, InstanceId(4));
    assert_eq!(welcome.epoch, Epoch(9));
    assert_eq!(welcome.num_lanes, 2);
}

#[test]
fn an_instance_that_starts_first_waits_for_its_coordinator() {
    let port = ReservedPort::new();
    let options = options(&port.address.to_string(), "ffn", 30.0);
    thread::scope(|scope| {
        let session = scope.spawn(|| Session::connect(&options, "boot".to_owned(), &mut || false));
        // Long enough for a refused attempt or two; the outcome does not depend on it.
        thread::sleep(Duration::from_millis(100));
        let mut coordinator = Coordinator::start_on(port);
        let mut scripted = coordinator.accept();
        assert_eq!(scripted.welcome(1, 1, "auto").role(), v1::Role::Ffn);
        session.join().unwrap().unwrap();
    });
}

#[test]
fn a_coordinator_that_never_answers_is_unavailable_and_the_error_says_why() {
    let port = ReservedPort::new();
    let address = port.address.to_string();
    let error = Session::connect(&options(&address, "ffn", 0.2), String::new(), &mut || false)
        .err()
        .unwrap();
    assert_eq!(error.kind(), NodeErrorKind::Unavailable);
    let text = error.to_string();
    assert!(
        text.starts_with(&format!(
            "no session with a coordinator at {address} within 0."
        )),
        "{text}"
    );
    assert!(text.contains("refused"), "{text}");
}

#[test]
fn a_signal_ends_the_wait_for_a_coordinator() {
    let port = ReservedPort::new();
    let address = port.address.to_string();
    let started = Instant::now();
    let error = Session::connect(&options(&address, "ffn", 600.0), String::new(), &mut || {
        true
    })
    .err()
    .unwrap();
    assert_eq!(error.kind(), NodeErrorKind::Cancelled);
    assert!(started.elapsed() < PATIENCE);
}

#[test]
fn a_refusal_is_final_and_carries_the_coordinators_words() {
    let mut coordinator = Coordinator::start();
    let (session, ()) = open(&mut coordinator, |scripted| {
        scripted.refuse(Status::failed_precondition(
            "the cluster runs another model: a1b2",
        ));
    });
    let error = session.err().unwrap();
    assert_eq!(error.kind(), NodeErrorKind::Config);
    let text = error.to_string();
    assert!(
        text.ends_with("refused this instance: the cluster runs another model: a1b2"),
        "{text}"
    );
}

#[test]
fn the_port_for_clients_is_told_from_the_one_for_instances() {
    let mut coordinator = Coordinator::start();
    let (session, ()) = open(&mut coordinator, |scripted| {
        scripted.refuse(Status::unimplemented(""));
    });
    let error = session.err().unwrap();
    assert_eq!(error.kind(), NodeErrorKind::Config);
    let text = error.to_string();
    assert!(
        text.ends_with("Give the address of its --control-listen"),
        "{text}"
    );
}

#[test]
fn a_coordinator_without_room_is_asked_again() {
    let mut coordinator = Coordinator::start();
    let options = options(&coordinator.address.to_string(), "ffn", 20.0);
    thread::scope(|scope| {
        let session = scope.spawn(|| Session::connect(&options, "boot".to_owned(), &mut || false));
        coordinator
            .accept()
            .refuse(Status::resource_exhausted("both FFN ranks are taken"));
        coordinator.accept().welcome(2, 2, "auto");
        session.join().unwrap().unwrap();
    });
}

#[test]
fn a_welcome_that_makes_no_sense_is_refused() {
    let with = |change: fn(&mut v1::ClusterSettings)| {
        let mut welcome = welcome(1, 1, "auto");
        change(welcome.settings.as_mut().unwrap());
        welcome
    };
    let cases = [
        (with(|s| s.num_lanes = 0), "0 lanes; 1 to 32 are possible"),
        (with(|s| s.num_lanes = 300), "300 lanes"),
        (with(|s| s.lease_ms = 0), "a lease of 0 ms"),
        (
            with(|s| s.fabric = "pigeon".to_owned()),
            "fabric \"pigeon\" is not known",
        ),
    ];
    let mut coordinator = Coordinator::start();
    for (welcome, expected) in cases {
        let (session, ()) = open(&mut coordinator, |scripted| {
            scripted.send(session_response::Command::Welcome(welcome));
        });
        let error = session.err().unwrap();
        assert_eq!(error.kind(), NodeErrorKind::Config);
        assert!(error.to_string().contains(expected), "{error}");
    }
}

#[test]
fn heartbeats_keep_coming_and_tell_status_and_progress() {
    let mut coordinator = Coordinator::start();
    let (session, mut scripted) = open_welcomed(&mut coordinator);
    session.pulse().set_status("loading weights 43 %");
    let mut beats = vec![];
    while beats.len() < 5 {
        match scripted.next_event() {
            Some(Event::Heartbeat(beat)) => beats.push(beat),
            event => panic!("{event:?}"),
        }
    }
    assert_eq!(beats[4].status, "loading weights 43 %");
    // Nobody has marked progress, so its age grows from beat to beat.
    assert!(beats[4].last_progress_age_ms > beats[1].last_progress_age_ms);
    session.pulse().mark_progress(Instant::now());
    // Beats may already have been on their way, each with a greater age than the one before.
    let mut last_age_ms = beats[4].last_progress_age_ms;
    let marked = Instant::now();
    loop {
        let Some(Event::Heartbeat(beat)) = scripted.next_event() else {
            panic!("the session has ended");
        };
        if beat.last_progress_age_ms < last_age_ms {
            break;
        }
        assert!(marked.elapsed() < PATIENCE, "the age only grows");
        last_age_ms = beat.last_progress_age_ms;
    }
}

#[test]
fn commands_come_in_order_and_ring_the_doorbell() {
    let mut coordinator = Coordinator::start();
    let (mut session, scripted) = open_welcomed(&mut coordinator);
    let doorbell = Arc::new(Counter::default());
    session.ring(Arc::clone(&doorbell) as Arc<dyn Doorbell>);
    scripted.send(plan(9, 0));
    scripted.send(session_response::Command::Topology(v1::Topology {
        version: 5,
        peers: vec![],
    }));
    scripted.send(session_response::Command::Drain(v1::Drain {}));

    let Command::StepPlan(first) = next_command(&mut session) else {
        panic!("the plan must come first");
    };
    let key = StepKey {
        instance: InstanceId(4),
        epoch: Epoch(9),
        lane: LaneId(1),
        step: StepId(0),
    };
    assert_eq!(first.key, key);
    assert_eq!(first.left, [SequenceId(17)]);
    assert!(matches!(next_command(&mut session), Command::Topology(t) if t.version == 5));
    assert_eq!(next_command(&mut session), Command::Drain);
    doorbell.wait_for(3);
}

#[test]
fn a_panic_of_the_session_thread_ends_the_session_and_wakes_the_loop() {
    let mut coordinator = Coordinator::start();
    let (mut session, scripted) = open_welcomed(&mut coordinator);
    let doorbell = Arc::new(Counter::panicking());
    session.ring(Arc::clone(&doorbell) as Arc<dyn Doorbell>);
    scripted.send(session_response::Command::Drain(v1::Drain {}));
    assert_eq!(next_command(&mut session), Command::Drain);
    let reason = lost_reason(&mut session);
    assert!(reason.contains("the session thread panicked"), "{reason}");
    assert_eq!(session.next_command(), None, "it is lost once");
    doorbell.wait_for(2);
    let error = session.send(Event::Leaving(v1::Leaving {})).unwrap_err();
    assert_eq!(error.kind(), NodeErrorKind::Unavailable);
    session.close();
}

#[test]
fn a_plan_of_another_epoch_never_reaches_the_loop() {
    let mut coordinator = Coordinator::start();
    let (mut session, scripted) = open_welcomed(&mut coordinator);
    scripted.send(plan(8, 40));
    scripted.send(plan(9, 41));
    assert!(matches!(next_command(&mut session), Command::StepPlan(p) if p.key.step == StepId(41)));
}

#[test]
fn nonsense_from_the_coordinator_ends_the_session_with_its_name() {
    let mut coordinator = Coordinator::start();
    let (mut session, scripted) = open_welcomed(&mut coordinator);
    scripted.send(session_response::Command::Welcome(welcome(4, 9, "auto")));
    assert_eq!(
        lost_reason(&mut session),
        "the coordinator sent nonsense: a second Welcome"
    );
}

#[test]
fn a_killed_coordinator_is_noticed_at_once() {
    let mut coordinator = Coordinator::start();
    let (mut session, scripted) = open_welcomed(&mut coordinator);
    drop(coordinator);
    let killed = Instant::now();
    lost_reason(&mut session);
    assert_eq!(session.next_command(), None, "nothing follows");
    assert!(
        killed.elapsed() < Duration::from_secs(1),
        "{:?}",
        killed.elapsed()
    );
    drop(scripted);
    // The thread is gone, so reports have nowhere to go.
    let deadline = Instant::now() + PATIENCE;
    while session.send(Event::Leaving(v1::Leaving {})).is_ok() {
        assert!(Instant::now() < deadline);
        thread::sleep(Duration::from_millis(1));
    }
    let error = session.send(Event::Leaving(v1::Leaving {})).unwrap_err();
    assert_eq!(error.kind(), NodeErrorKind::Unavailable);
}

#[test]
fn the_reason_of_an_ended_lease_reaches_the_loop() {
    let mut coordinator = Coordinator::start();
    let (mut session, scripted) = open_welcomed(&mut coordinator);
    scripted.refuse(Status::aborted("attention instance 2 lost its link to you"));
    assert_eq!(
        lost_reason(&mut session),
        "attention instance 2 lost its link to you"
    );
}

#[test]
fn closing_delivers_what_was_reported_before() {
    let mut coordinator = Coordinator::start();
    let (mut session, mut scripted) = open_welcomed(&mut coordinator);
    for step in 0..100 {
        let failed = v1::StepFailed {
            step,
            ..Default::default()
        };
        session.send(Event::StepFailed(failed)).unwrap();
    }
    thread::scope(|scope| {
        scope.spawn(move || {
            for expected in 0..100 {
                match scripted.next_report() {
                    Some(Event::StepFailed(failed)) => assert_eq!(failed.step, expected),
                    event => panic!("{event:?}"),
                }
            }
            assert_eq!(scripted.next_report(), None);
            // Dropping `scripted` here ends the response stream, as a coordinator does.
        });
        session.close();
    });
    session.close();
    let error = session.send(Event::Leaving(v1::Leaving {})).unwrap_err();
    assert!(error.to_string().contains("this instance closed it"));
}

#[test]
fn reports_that_nobody_reads_do_not_pile_up() {
    let mut coordinator = Coordinator::start();
    let (session, scripted) = open_welcomed(&mut coordinator);
    let failed = Event::StepFailed(v1::StepFailed {
        reason: "x".repeat(100_000),
        ..Default::default()
    });
    // The scripted coordinator reads 64 messages, then HTTP/2's window fills, then the queue.
    let refused = (0..10_000).find_map(|_| {
        thread::sleep(Duration::from_micros(100));
        session.send(failed.clone()).err()
    });
    let text = refused.expect("a bounded queue must fill").to_string();
    assert!(text.contains("does not read"), "{text}");
    drop(scripted);
}

#[test]
fn dropping_a_session_waits_for_nobody() {
    let mut coordinator = Coordinator::start();
    let (session, mut scripted) = open_welcomed(&mut coordinator);
    session.send(Event::Leaving(v1::Leaving {})).unwrap();
    let started = Instant::now();
    drop(session);
    // Far below the grace that closing gives to a coordinator that does not answer.
    assert!(started.elapsed() < Duration::from_millis(500));
    assert!(matches!(scripted.next_report(), Some(Event::Leaving(_))));
    assert_eq!(scripted.next_report(), None);
}
