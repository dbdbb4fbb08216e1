//! Waiting where the sockets are: a ring wakes who sleeps there, and who cannot be woken there
//! sleeps elsewhere.
//!
//! Bound: 3 preemptions, up to three threads. The bell has a socket on which nothing comes.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use loom::thread;

use super::sync::Weakness;
use super::{check, check_without};
use crate::bell::EndpointBell;
use crate::contract::Doorbell;
use crate::doorbell::FutexDoorbell;
use crate::sockets::Transfer;
use crate::two_sides::pair::FOREVER;

struct Silent;

impl Transfer for Silent {
    fn advance(&self) {}
}

fn bell_with_a_socket() -> (Arc<EndpointBell>, OwnedFd) {
    let (bell, fd) = EndpointBell::create(0).unwrap();
    let (socket, _peer) = UnixStream::pair().unwrap();
    bell.sockets().add(&socket, Arc::new(Silent)).unwrap();
    (Arc::new(bell), fd)
}

fn one_ring_and_one_wait() {
    let (bell, _fd) = bell_with_a_socket();
    let ringers = Arc::clone(&bell);
    let ringer = thread::spawn(move || ringers.ring());
    assert!(bell.wait(0, FOREVER));
    ringer.join().unwrap();
}

#[test]
fn a_ring_wakes_who_sleeps_where_the_sockets_are() {
    check(one_ring_and_one_wait);
}

#[test]
#[should_panic(expected = "deadlock")]
fn without_a_common_order_of_counter_and_sleeper_a_ring_is_lost() {
    check_without(Weakness::NoSeqCst, one_ring_and_one_wait);
}

#[test]
fn one_ring_wakes_two_that_wait() {
    check(|| {
        let (bell, _fd) = bell_with_a_socket();
        let others = Arc::clone(&bell);
        let other = thread::spawn(move || assert!(others.wait(0, FOREVER)));
        let ringers = Arc::clone(&bell);
        let ringer = thread::spawn(move || ringers.ring());
        assert!(bell.wait(0, FOREVER));
        other.join().unwrap();
        ringer.join().unwrap();
    });
}

#[test]
fn a_peer_of_another_process_wakes_who_slept_where_the_sockets_are_before_it_came() {
    check(|| {
        let (bell, fd) = bell_with_a_socket();
        let accepting = Arc::clone(&bell);
        let peer = FutexDoorbell::open(&fd).unwrap();
        let watcher = thread::spawn(move || {
            let ringer = accepting.expect_far_ringer();
            peer.ring();
            ringer
        });
        // The first ring says that there is a peer now, the second is the peer's.
        for seen in 0..2 {
            assert!(bell.wait(seen, FOREVER));
        }
        assert_eq!(bell.current(), 2);
        drop(watcher.join().unwrap());
    });
}
