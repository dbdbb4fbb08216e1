//! Payloads by pointer, as the embedding program writes and reads them, while links come and go.
//!
//! What Miri (`make miri`) watches for races and for accesses to memory that is gone: there, mappings
//! are blocks of the heap, and each seed is another interleaving. A race in a payload would be a race
//! in a tensor.

#![allow(unsafe_code, reason = "payloads are written and read by pointer")]

use std::sync::Arc;
use std::thread;

use step3rt_core::ids::LaneId;

use super::pair::{End, LANE, Made, arrival, frame, terms};
use crate::contract::{Doorbell, DownReason, Link, LinkEvent, PushError, Side, SlotMemory};
use crate::frame::{Frame, HEADER_BYTES};
use crate::lane::LinkTerms;
use crate::region::Region;

/// Under Miri a step takes a thousand times as long.
const NUM_ROUNDS: u64 = if cfg!(miri) { 2 } else { 2_000 };

/// No whole number of words.
const NUM_BYTES: usize = 21;

fn checked(side: Side) -> LinkTerms {
    let mut terms = terms(side, 2);
    terms.payload_checksum = true;
    terms.geometry.a2f_slot_bytes = NUM_BYTES;
    terms.geometry.f2a_slot_bytes = NUM_BYTES;
    terms
}

fn ends() -> (End, End) {
    let [attention, ffn] = [Side::Initiator, Side::Responder].map(|side| Made::new(checked(side)));
    (attention.meet(&ffn), ffn.meet(&attention))
}

fn fill(slot: &dyn SlotMemory, value: u64) {
    let bytes = [value.to_le_bytes()[0]; NUM_BYTES];
    assert_eq!(slot.len(), NUM_BYTES);
    // SAFETY: in bounds, and the lane has credit, so nobody else reads or writes.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), slot.as_ptr(), NUM_BYTES) };
}

fn check(slot: &dyn SlotMemory, value: u64) {
    let mut bytes = [0; NUM_BYTES];
    // SAFETY: in bounds; between its arrival and the answer nobody writes.
    unsafe { std::ptr::copy_nonoverlapping(slot.as_ptr(), bytes.as_mut_ptr(), NUM_BYTES) };
    assert_eq!(bytes, [value.to_le_bytes()[0]; NUM_BYTES]);
}

fn push(end: &mut End, lane: LaneId, value: u64) -> Result<(), PushError> {
    fill(&*end.link.send_slot(lane).unwrap(), value);
    let frame = Frame {
        payload_bytes: NUM_BYTES,
        ..frame()
    };
    end.link.push(lane, frame)
}

#[test]
fn payloads_by_pointer_come_whole_over_two_lanes_at_once() {
    let (mut attention, mut ffn) = ends();
    let responder = thread::spawn(move || {
        let mut num_arrivals = 0;
        while num_arrivals < 2 * NUM_ROUNDS {
            for event in ffn.next() {
                let header = arrival(&event);
                check(
                    &*ffn.link.receive_slot(header.lane).unwrap(),
                    header.sequence,
                );
                push(&mut ffn, header.lane, header.sequence + 1).unwrap();
                num_arrivals += 1;
            }
        }
    });
    for lane in [0, 1] {
        push(&mut attention, LaneId(lane), 1).unwrap();
    }
    let mut num_arrivals = 0;
    while num_arrivals < 2 * NUM_ROUNDS {
        for event in attention.next() {
            let header = arrival(&event);
            let (lane, sequence) = (header.lane, header.sequence);
            check(&*attention.link.receive_slot(lane).unwrap(), sequence + 1);
            if sequence < NUM_ROUNDS {
                push(&mut attention, lane, sequence + 1).unwrap();
            }
            num_arrivals += 1;
        }
    }
    responder.join().unwrap();
}

#[test]
fn slots_outlive_their_links_and_the_peers_whole_process() {
    let (mut attention, mut ffn) = ends();
    let held = attention.link.send_slot(LANE).unwrap();
    let peer = thread::spawn(move || {
        push(&mut attention, LANE, 7).unwrap();
        drop(attention);
    });
    arrival(&ffn.next()[0]);
    let slot = ffn.link.receive_slot(LANE).unwrap();
    drop(ffn);
    check(&*slot, 7);
    peer.join().unwrap();
    check(&*slot, 7);
    fill(&*held, 8);
    check(&*slot, 8);
}

#[test]
fn a_region_is_written_by_a_thread_that_its_owner_does_not_wait_for() {
    let terms = checked(Side::Responder);
    let owners = Region::private(&terms.geometry, terms.side.receives()).unwrap();
    let incoming = owners.clone();
    let receiver = thread::spawn(move || {
        fill(&*incoming.slot(LANE).unwrap(), 1);
        incoming.write_header(LANE, &[1; HEADER_BYTES]);
        incoming.publish(LANE, 1);
    });
    if owners.published(LANE) == 1 {
        check(&*owners.slot(LANE).unwrap(), 1);
    }
    drop(owners);
    receiver.join().unwrap();
}

#[test]
fn a_link_that_ends_within_a_push_says_so_once() {
    let (mut attention, ffn) = ends();
    let state = Arc::clone(&attention.state);
    let watcher = thread::spawn(move || {
        drop(ffn);
        state.fail(DownReason::PeerClosed);
    });
    let end = DownReason::PeerClosed;
    let pushed = push(&mut attention, LANE, 1);
    assert!(pushed.is_ok() || pushed == Err(PushError::Down(end.clone())));
    assert_eq!(attention.next(), [LinkEvent::Down(end)]);
    watcher.join().unwrap();
    let seen = attention.bell.current();
    assert!(!attention.bell.wait(seen, std::time::Duration::ZERO));
}

#[test]
fn a_payload_that_changed_after_its_push_is_not_shown() {
    let (mut attention, mut ffn) = ends();
    push(&mut attention, LANE, 1).unwrap();
    fill(&*attention.link.send_slot(LANE).unwrap(), 2);
    let events = ffn.next();
    assert!(matches!(
        events[..],
        [LinkEvent::Down(DownReason::Protocol(_))]
    ));
}
