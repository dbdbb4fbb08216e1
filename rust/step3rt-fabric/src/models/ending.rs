//! The end of a link, whoever sees it first: nothing that arrived before it is lost, it is said
//! once, and its owner is awake to hear it.
//!
//! Bound: 3 preemptions. Three threads: the peer, this end's watcher, this end's owner.

use std::sync::Arc;

use loom::thread;

use super::ends::pair;
use super::sync::{Event, Ordering, Weakness};
use super::{check, check_without};
use crate::contract::{Doorbell, DownReason, Link, LinkEvent, PushError, Side};
use crate::doorbell::FutexDoorbell;
use crate::frame::HEADER_BYTES;
use crate::two_sides::pair::{End, LANE, Made, frame, terms};

/// A socket that hangs up when its process ends, and a thread that waits for it.
struct Watched {
    hang_up: loom::sync::Arc<Event>,
    watcher: thread::JoinHandle<()>,
}

fn watch(end: &End) -> Watched {
    let hang_up = loom::sync::Arc::new(Event::new().unwrap());
    let (seen, state) = (loom::sync::Arc::clone(&hang_up), Arc::clone(&end.state));
    let watcher = thread::spawn(move || {
        seen.wait();
        state.fail(DownReason::PeerClosed);
    });
    Watched { hang_up, watcher }
}

/// Everything that the owner is told, up to the end of the link.
fn all_events(end: &mut End) -> Vec<LinkEvent> {
    let mut events = Vec::new();
    while !matches!(events.last(), Some(LinkEvent::Down(_))) {
        events.extend(end.next());
    }
    let mut more = Vec::new();
    end.link.poll(&mut more);
    assert_eq!(more, [], "after its end a link says nothing");
    events
}

fn a_push_and_then_the_end() {
    let (mut attention, mut ffn) = pair(1);
    let bells = [&attention.bell, &ffn.bell].map(Arc::clone);
    let Watched { hang_up, watcher } = watch(&ffn);
    let peer = thread::spawn(move || {
        attention.push(LANE, 3);
        hang_up.set();
    });
    let events = all_events(&mut ffn);
    assert_eq!(events.len(), 2, "the frame, then the end");
    assert!(matches!(events[0], LinkEvent::Arrived(_)));
    assert_eq!(ffn.payload(LANE), 3);
    assert_eq!(events[1], LinkEvent::Down(DownReason::PeerClosed));
    peer.join().unwrap();
    watcher.join().unwrap();
    drop(bells);
}

#[test]
fn what_a_peer_pushed_before_it_died_still_arrives() {
    check(a_push_and_then_the_end);
}

#[test]
#[should_panic(expected = "deadlock")]
fn without_a_common_order_in_the_doorbell_the_end_is_slept_through() {
    check_without(Weakness::NoSeqCst, a_push_and_then_the_end);
}

/// How far a process comes with a push before it is killed.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum KilledAfter {
    WritingTheHeader,
    Publishing,
    Counting,
}

fn a_peer_killed_within_a_push(killed: KilledAfter) {
    let made = [Side::Initiator, Side::Responder].map(|side| Made::new(terms(side, 1)));
    let [of_attention, of_ffn] = &made;
    let mut ffn = of_ffn.meet(of_attention);
    let mut attention = of_attention.lanes(of_ffn);
    let ffn_bell = FutexDoorbell::open(&of_ffn.fds[1]).unwrap();
    let Watched { hang_up, watcher } = watch(&ffn);
    let peer = thread::spawn(move || {
        let sequence = attention.begin_push(LANE, frame()).unwrap();
        if killed >= KilledAfter::Publishing {
            attention.outgoing.publish(LANE, sequence);
        }
        if killed >= KilledAfter::Counting {
            ffn_bell.counter().fetch_add(1, Ordering::SeqCst);
        }
        hang_up.set();
    });
    let events = all_events(&mut ffn);
    let num_arrivals = usize::from(killed >= KilledAfter::Publishing);
    assert_eq!(events.len(), num_arrivals + 1);
    peer.join().unwrap();
    watcher.join().unwrap();
    drop(made);
}

#[test]
fn a_peer_killed_before_it_publishes_is_an_end_and_no_frame() {
    check(|| a_peer_killed_within_a_push(KilledAfter::WritingTheHeader));
}

#[test]
fn a_peer_killed_before_it_rings_is_a_frame_and_an_end() {
    check(|| a_peer_killed_within_a_push(KilledAfter::Publishing));
}

#[test]
fn a_peer_killed_before_it_wakes_the_sleeper_is_a_frame_and_an_end() {
    check(|| a_peer_killed_within_a_push(KilledAfter::Counting));
}

fn two_ends_at_once() {
    let (_attention, mut ffn) = pair(1);
    let bell = Arc::clone(&ffn.bell);
    let reset = DownReason::Transport {
        during: "sending a frame",
        os_error: 104,
    };
    let reasons = [DownReason::PeerClosed, reset.clone()];
    let failing = reasons.map(|reason| {
        let state = Arc::clone(&ffn.state);
        thread::spawn(move || state.fail(reason))
    });
    let events = all_events(&mut ffn);
    for thread in failing {
        thread.join().unwrap();
    }
    let kept = ffn.state.down().unwrap().clone();
    assert_eq!(events, [LinkEvent::Down(kept)]);
    drop(bell);
}

#[test]
fn of_two_reasons_at_once_one_is_kept_and_said() {
    check(two_ends_at_once);
}

#[test]
fn a_push_while_the_link_ends_is_refused_or_lost_and_its_owner_hears_of_the_end() {
    check(|| {
        let (mut attention, ffn) = pair(1);
        let bells = [&attention.bell, &ffn.bell].map(Arc::clone);
        let state = Arc::clone(&attention.state);
        let watcher = thread::spawn(move || state.fail(DownReason::PeerClosed));
        let pushed = attention.link.push(LANE, frame());
        let end = DownReason::PeerClosed;
        assert!(pushed.is_ok() || pushed == Err(PushError::Down(end.clone())));
        assert_eq!(all_events(&mut attention), [LinkEvent::Down(end)]);
        watcher.join().unwrap();
        drop(bells);
    });
}

#[test]
fn a_broken_frame_is_never_shown_also_when_its_sender_dies_at_once() {
    check(|| {
        let made = [Side::Initiator, Side::Responder].map(|side| Made::new(terms(side, 1)));
        let [of_attention, of_ffn] = &made;
        let mut ffn = of_ffn.meet(of_attention);
        let outgoing = of_attention.outgoing.clone();
        let ffn_bell = FutexDoorbell::open(&of_ffn.fds[1]).unwrap();
        let Watched { hang_up, watcher } = watch(&ffn);
        let peer = thread::spawn(move || {
            outgoing.write_header(LANE, &[0xa5; HEADER_BYTES]);
            outgoing.publish(LANE, 1);
            ffn_bell.ring();
            hang_up.set();
        });
        let events = all_events(&mut ffn);
        assert_eq!(events.len(), 1, "an end alone");
        peer.join().unwrap();
        watcher.join().unwrap();
        drop(made);
    });
}
