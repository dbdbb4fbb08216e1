//! Frames through a slot: published whole, seen whole, and not overwritten before the answer.
//!
//! Bound: 3 preemptions, two threads, each an end of a link through shared memory.

use loom::thread;
use step3rt_core::ids::LaneId;

use super::ends::pair;
use super::sync::Weakness;
use super::{check, check_up_to, check_without};
use crate::contract::{Link, PushError};
use crate::two_sides::pair::{End, LANE, arrival, frame};

/// Takes one frame, whose payload must be `value`, without answering it.
fn expect(end: &mut End, lane: LaneId, value: u64) {
    let events = end.next();
    assert_eq!(events.len(), 1);
    let header = arrival(&events[0]);
    assert_eq!(header.lane, lane);
    assert_eq!(end.payload(lane), value);
}

/// Two rounds of one lane, so that both slots are used twice; both ends sleep while they wait.
fn two_rounds() {
    let (mut attention, mut ffn) = pair(1);
    let bells = [&attention.bell, &ffn.bell].map(std::sync::Arc::clone);
    let other = thread::spawn(move || {
        for round in 1..=2 {
            expect(&mut ffn, LANE, round);
            ffn.push(LANE, 10 * round);
        }
    });
    for round in 1..=2 {
        attention.push(LANE, round);
        let refused = attention.link.push(LANE, frame());
        assert_eq!(refused, Err(PushError::NoCredit(LANE)));
        expect(&mut attention, LANE, 10 * round);
    }
    other.join().unwrap();
    drop(bells);
}

#[test]
fn frames_arrive_whole_and_slots_are_used_again_only_after_the_answer() {
    check(two_rounds);
}

#[test]
#[should_panic(expected = "deadlock")]
fn without_a_common_order_in_the_doorbell_an_arrival_is_slept_through() {
    check_without(Weakness::NoSeqCst, two_rounds);
}

/// One frame to an end that never sleeps, so that the flag alone orders the bytes.
fn one_frame_polled_for() {
    let (mut attention, mut ffn) = pair(1);
    let bell = std::sync::Arc::clone(&ffn.bell);
    let other = thread::spawn(move || attention.push(LANE, 7));
    let mut events = Vec::new();
    for _ in 0..2 {
        ffn.link.poll(&mut events);
    }
    if let [event] = &events[..] {
        assert_eq!(arrival(event).sequence, 1);
        assert_eq!(ffn.payload(LANE), 7);
    }
    other.join().unwrap();
    drop(bell);
}

#[test]
fn a_frame_is_whole_for_whoever_polls_for_it() {
    check_up_to(4, one_frame_polled_for);
}

#[test]
#[should_panic(expected = "no arrival")]
fn a_flag_that_is_published_without_release_shows_a_header_that_is_not_there() {
    check_without(Weakness::NoRelease, one_frame_polled_for);
}

#[test]
#[should_panic(expected = "no arrival")]
fn a_flag_that_is_read_without_acquire_shows_a_header_that_is_not_there() {
    check_without(Weakness::NoAcquire, one_frame_polled_for);
}

#[test]
#[should_panic(expected = "left: 2")]
fn whoever_answers_before_reading_reads_the_next_frame() {
    check(|| {
        let (mut attention, mut ffn) = pair(1);
        let bells = [&attention.bell, &ffn.bell].map(std::sync::Arc::clone);
        let other = thread::spawn(move || {
            attention.push(LANE, 1);
            expect(&mut attention, LANE, 10);
            attention.push(LANE, 2);
        });
        arrival(&ffn.next()[0]);
        ffn.push(LANE, 10);
        assert_eq!(ffn.payload(LANE), 1);
        other.join().unwrap();
        drop(bells);
    });
}

#[test]
fn lanes_do_not_wait_for_each_other() {
    check(|| {
        let (mut attention, mut ffn) = pair(2);
        let bells = [&attention.bell, &ffn.bell].map(std::sync::Arc::clone);
        let other = thread::spawn(move || {
            for lane in [0, 1] {
                attention.push(LaneId(lane), lane.into());
            }
        });
        let mut seen = [false; 2];
        while seen != [true; 2] {
            for event in ffn.next() {
                let lane = arrival(&event).lane;
                assert_eq!(ffn.payload(lane), lane.0.into());
                assert!(!std::mem::replace(&mut seen[usize::from(lane.0)], true));
            }
        }
        other.join().unwrap();
        drop(bells);
    });
}
