//! The doorbell: spin, then sleep, and no ring is lost.
//!
//! A lost ring is a deadlock here, as no timeout helps. Bound: 3 preemptions, and no bound for one
//! ringer and one sleeper.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use loom::thread;

use super::sync::{Ordering, Weakness, futex};
use super::{check, check_up_to, check_without};
use crate::contract::Doorbell;
use crate::doorbell::{FutexDoorbell, MAX_SPIN_US};

const FOREVER: Duration = Duration::MAX;
/// More preemptions than the model has steps.
const MANY: usize = 200;

fn ring_from_another_process(fd: &OwnedFd) -> thread::JoinHandle<()> {
    let peer = FutexDoorbell::open(fd).unwrap();
    thread::spawn(move || peer.ring())
}

fn one_ring_and_one_wait(max_spin_us: u32) {
    let (bell, fd) = FutexDoorbell::create(max_spin_us).unwrap();
    let seen = bell.current();
    let ringer = ring_from_another_process(&fd);
    assert!(bell.wait(seen, FOREVER));
    assert_eq!(bell.current(), seen + 1);
    ringer.join().unwrap();
    assert_eq!(bell.sleepers().load(Ordering::SeqCst), 0);
}

#[test]
fn a_ring_wakes_the_sleeper_whenever_it_comes() {
    check_up_to(MANY, || one_ring_and_one_wait(0));
}

#[test]
#[should_panic(expected = "deadlock")]
fn without_a_common_order_of_counter_and_sleepers_a_ring_is_lost() {
    check_without(Weakness::NoSeqCst, || one_ring_and_one_wait(0));
}

#[test]
#[should_panic(expected = "deadlock")]
fn without_the_compare_before_sleeping_a_ring_is_lost() {
    check_without(Weakness::NoCompare, || one_ring_and_one_wait(0));
}

#[test]
fn a_ring_is_not_lost_between_spinning_and_sleeping() {
    check_up_to(MANY, || one_ring_and_one_wait(MAX_SPIN_US));
}

#[test]
fn two_peers_that_ring_at_once_both_count() {
    check(|| {
        let (bell, fd) = FutexDoorbell::create(0).unwrap();
        let ringers = [(); 2].map(|()| ring_from_another_process(&fd));
        assert!(bell.wait(0, FOREVER));
        // The second ring ends this wait, or has ended the first one too.
        if bell.current() == 1 {
            assert!(bell.wait(1, FOREVER));
        }
        assert_eq!(bell.current(), 2);
        for ringer in ringers {
            ringer.join().unwrap();
        }
    });
}

#[test]
fn one_ring_wakes_two_sleepers() {
    check(|| {
        let (bell, fd) = FutexDoorbell::create(0).unwrap();
        let bell = Arc::new(bell);
        let other = Arc::clone(&bell);
        let sleeper = thread::spawn(move || assert!(other.wait(0, FOREVER)));
        let ringer = ring_from_another_process(&fd);
        assert!(bell.wait(0, FOREVER));
        sleeper.join().unwrap();
        ringer.join().unwrap();
        assert_eq!(bell.sleepers().load(Ordering::SeqCst), 0);
    });
}

#[test]
fn a_wake_up_without_a_ring_ends_no_wait() {
    check(|| {
        let (bell, fd) = FutexDoorbell::create(0).unwrap();
        let peer = FutexDoorbell::open(&fd).unwrap();
        let signal = thread::spawn(move || futex::wake_all(peer.counter()));
        let ringer = ring_from_another_process(&fd);
        assert!(bell.wait(0, FOREVER));
        assert_eq!(bell.current(), 1);
        signal.join().unwrap();
        ringer.join().unwrap();
    });
}

#[test]
fn a_process_killed_before_it_wakes_the_sleeper_is_made_up_for_by_the_next_ring() {
    check(|| {
        let (bell, fd) = FutexDoorbell::create(0).unwrap();
        let peer = FutexDoorbell::open(&fd).unwrap();
        // What is left of a ring that ends between its increment and its wake-up.
        let killed = thread::spawn(move || {
            peer.counter().fetch_add(1, Ordering::SeqCst);
        });
        // The watcher's, at the peer's death.
        let watcher = ring_from_another_process(&fd);
        assert!(bell.wait(0, FOREVER));
        killed.join().unwrap();
        watcher.join().unwrap();
    });
}

#[test]
#[should_panic(expected = "deadlock")]
fn a_killed_process_alone_leaves_the_sleeper_asleep() {
    check(|| {
        let (bell, fd) = FutexDoorbell::create(0).unwrap();
        let peer = FutexDoorbell::open(&fd).unwrap();
        let killed = thread::spawn(move || {
            peer.counter().fetch_add(1, Ordering::SeqCst);
        });
        assert!(bell.wait(0, FOREVER));
        killed.join().unwrap();
    });
}

#[test]
fn no_ring_is_lost_in_a_ping_pong() {
    check(|| {
        let (ping, ping_fd) = FutexDoorbell::create(MAX_SPIN_US).unwrap();
        let (pong, pong_fd) = FutexDoorbell::create(0).unwrap();
        let to_ping = FutexDoorbell::open(&ping_fd).unwrap();
        let to_pong = FutexDoorbell::open(&pong_fd).unwrap();
        let other = thread::spawn(move || {
            for round in 0..2 {
                assert!(ping.wait(round, FOREVER));
                to_pong.ring();
            }
        });
        for round in 0..2 {
            to_ping.ring();
            assert!(pong.wait(round, FOREVER));
        }
        other.join().unwrap();
    });
}
