//! Memory stays mapped while anybody may touch it, and goes after the last access.
//!
//! `words` ends a model in which an access meets memory that is gone, or might. Bound: 3
//! preemptions, up to three threads.

use std::sync::Arc;

use loom::thread;
use step3rt_core::ids::Epoch;

use super::check;
use super::ends::pair;
use super::sync::{AtomicU64, Ordering};
use crate::contract::{Link, LinkIdentity, Side};
use crate::frame::HEADER_BYTES;
use crate::region::Region;
use crate::two_sides::pair::{ATTENTION, LANE, Made, arrival, terms};

fn private_region() -> Region {
    let terms = terms(Side::Responder, 1);
    Region::private(&terms.geometry, terms.side.receives()).unwrap()
}

/// What a thread that receives frames does, which the owner of the link does not wait for.
fn receive_a_frame(incoming: &Region) {
    incoming.write_header(LANE, &[1; HEADER_BYTES]);
    incoming.publish(LANE, 1);
}

#[test]
fn a_region_stays_while_the_thread_that_receives_into_it_has_a_share() {
    check(|| {
        let owners = private_region();
        let incoming = owners.clone();
        let receiver = thread::spawn(move || receive_a_frame(&incoming));
        let _ = owners.published(LANE);
        drop(owners);
        receiver.join().unwrap();
    });
}

#[test]
#[should_panic(expected = "Causality violation")]
fn a_region_is_gone_too_early_for_a_device_that_has_its_address_and_no_share() {
    check(|| {
        let owners = private_region();
        let address = owners.slot(LANE).unwrap().as_ptr().addr();
        let device = thread::spawn(move || {
            let address = std::ptr::without_provenance_mut(address);
            // SAFETY: a model's words are found by address, and what is not mapped is a panic.
            unsafe { AtomicU64::from_ptr(address) }.store(1, Ordering::Relaxed);
        });
        drop(owners);
        device.join().unwrap();
    });
}

#[test]
fn a_slot_that_the_caller_holds_outlives_its_link_and_the_peers_memory() {
    check(|| {
        let (mut attention, mut ffn) = pair(1);
        let bells = [&attention.bell, &ffn.bell].map(Arc::clone);
        let peer = thread::spawn(move || {
            attention.push(LANE, 7);
            // Its process ends: what it had mapped goes, what the other end has mapped stays.
            drop(attention);
        });
        arrival(&ffn.next()[0]);
        let slot = ffn.link.receive_slot(LANE).unwrap();
        drop(ffn);
        let mut bytes = [0; 8];
        slot.read(&mut bytes);
        assert_eq!(u64::from_ne_bytes(bytes), 7);
        peer.join().unwrap();
        drop((bells, slot));
    });
}

#[test]
fn a_slot_is_written_while_the_link_it_is_of_is_dropped() {
    check(|| {
        let (attention, ffn) = pair(1);
        let bells = [&attention.bell, &ffn.bell].map(Arc::clone);
        let slot = attention.link.send_slot(LANE).unwrap();
        let kernel = thread::spawn(move || slot.write(&[9; 8]));
        drop(attention);
        kernel.join().unwrap();
        drop((bells, ffn));
    });
}

#[test]
fn a_late_push_of_an_epoch_that_is_over_meets_memory_and_no_link() {
    check(|| {
        let made = [Side::Initiator, Side::Responder].map(|side| Made::new(terms(side, 1)));
        let next = LinkIdentity {
            epoch: Epoch(ATTENTION.epoch.0 + 1),
            ..ATTENTION
        };
        // The same process at this end, so the same doorbell; slots are each link's own.
        let mut of_next = Made::new(terms(Side::Initiator, 1));
        of_next.terms.local = next;
        let mut for_next = Made::new(terms(Side::Responder, 1));
        for_next.terms.peer = next;
        let [of_last, for_last] = &made;
        let (mut last, ffn_of_last) = (of_last.meet(for_last), for_last.meet(of_last));
        let (mut new, mut ffn) = (of_next.meet(&for_next), for_next.meet(&of_next));
        let late = thread::spawn(move || {
            last.push(LANE, 1);
            new.push(LANE, 2);
        });
        drop(ffn_of_last);
        let events = ffn.next();
        assert_eq!(arrival(&events[0]).epoch, next.epoch);
        assert_eq!(ffn.payload(LANE), 2);
        late.join().unwrap();
        drop((made, of_next, for_next));
    });
}
