//! That the simulated fabric does what its seed and its faults say, and the same every time.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on stops there")]

mod common;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use common::{frame, geometry, identity};
use step3rt_core::ids::{Epoch, LaneId};
use step3rt_fabric::contract::{Doorbell, DownReason, Link, LinkEvent, PushError};
use step3rt_fabric::frame::ProtocolError;
use step3rt_fabric::sim::{self, ONE_MILLION, SimConfig, SimEnd, SimFaults, SimLink};

const NUM_LANES: u8 = 4;

/// A doorbell that counts and never sleeps: these tests run in one thread.
#[derive(Default)]
struct Counter(std::sync::atomic::AtomicU32);

impl Doorbell for Counter {
    fn current(&self) -> u32 {
        self.0.load(std::sync::atomic::Ordering::SeqCst)
    }

    fn ring(&self) {
        self.0.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
    }

    fn wait(&self, seen: u32, _timeout: Duration) -> bool {
        self.current() != seen
    }
}

fn pair(seed: u64, faults: SimFaults) -> (SimLink, SimLink) {
    let end = |instance| SimEnd {
        identity: identity(instance, 5),
        doorbell: Arc::new(Counter::default()),
    };
    let config = SimConfig {
        seed,
        geometry: geometry(NUM_LANES, 64),
        faults,
    };
    sim::pair(config, &end(1), &end(2)).unwrap()
}

/// Echoes steps on all lanes until `num_polls` polls are over or the link is; returns what both
/// ends saw, in order.
fn history(seed: u64, faults: SimFaults, num_polls: usize) -> Vec<(&'static str, LinkEvent)> {
    let (mut attention, mut ffn) = pair(seed, faults);
    for lane in (0..NUM_LANES).map(LaneId) {
        attention.push(lane, frame(0, 8)).unwrap();
    }
    let mut seen = Vec::new();
    let mut events = Vec::new();
    for _ in 0..num_polls {
        for (name, link) in [("ffn", &mut ffn), ("attention", &mut attention)] {
            link.poll(&mut events);
            for event in events.drain(..) {
                if let LinkEvent::Arrived(header) = event {
                    let step = header.frame.step + u64::from(name == "attention");
                    // Refused only by a link that has just dropped, which it then reports.
                    if let Err(error) = link.push(header.lane, frame(step, 8)) {
                        assert!(matches!(error, PushError::Down(_)), "{error}");
                    }
                }
                seen.push((name, event));
            }
        }
    }
    seen
}

fn num_arrivals(history: &[(&str, LinkEvent)]) -> usize {
    history
        .iter()
        .filter(|(_, event)| matches!(event, LinkEvent::Arrived(_)))
        .count()
}

#[test]
fn without_faults_every_frame_arrives_at_the_next_poll() {
    assert_eq!(
        num_arrivals(&history(1, SimFaults::default(), 10)),
        2 * 10 * usize::from(NUM_LANES)
    );
}

#[test]
fn the_same_seed_gives_the_same_history_and_another_seed_another() {
    let faults = SimFaults {
        max_delay_polls: 7,
        drop_link_ppm: 2_000,
        ..SimFaults::default()
    };
    let histories: Vec<_> = (0..20).map(|seed| history(seed, faults, 200)).collect();
    for (seed, expected) in (0..20).zip(&histories) {
        assert_eq!(&history(seed, faults, 200), expected);
    }
    assert!(histories.windows(2).all(|pair| pair[0] != pair[1]));
}

#[test]
fn lanes_overtake_each_other_but_no_frame_overtakes_on_its_lane() {
    let faults = SimFaults {
        max_delay_polls: 7,
        ..SimFaults::default()
    };
    let seen = history(3, faults, 300);
    let mut orders = BTreeSet::new();
    let mut last = Vec::new();
    for (name, event) in &seen {
        let LinkEvent::Arrived(header) = event else {
            panic!("{event:?}")
        };
        if *name == "ffn" {
            last.push(header.lane);
            if last.len() == usize::from(NUM_LANES) {
                orders.insert(std::mem::take(&mut last));
            }
        }
    }
    assert!(
        orders.len() > 5,
        "lanes arrive in {} orders only",
        orders.len()
    );
    for lane in (0..NUM_LANES).map(LaneId) {
        let sequences = seen.iter().filter_map(|(name, event)| match event {
            LinkEvent::Arrived(header) if *name == "ffn" && header.lane == lane => {
                Some(header.sequence)
            }
            _ => None,
        });
        assert!(sequences.eq(1..=sequences_expected(&seen, lane)));
    }
}

fn sequences_expected(seen: &[(&str, LinkEvent)], lane: LaneId) -> u64 {
    let arrived = seen.iter().filter(|(name, event)| {
        *name == "ffn" && matches!(event, LinkEvent::Arrived(header) if header.lane == lane)
    });
    arrived.count() as u64
}

#[test]
fn every_fault_ends_the_link_as_the_real_one_would() {
    let none = SimFaults::default();
    let first_end = |faults| {
        let seen = history(1, faults, 3);
        assert_eq!(num_arrivals(&seen), 0);
        let (_, LinkEvent::Down(reason)) = seen[0].clone() else {
            panic!("{seen:?}")
        };
        reason
    };
    let stale = first_end(SimFaults {
        stale_epoch_ppm: ONE_MILLION,
        ..none
    });
    let epoch = ProtocolError::Epoch {
        found: Epoch(4),
        expected: Epoch(5),
    };
    assert_eq!(stale, DownReason::Protocol(epoch));
    let corrupt = first_end(SimFaults {
        corrupt_header_ppm: ONE_MILLION,
        ..none
    });
    assert!(matches!(corrupt, DownReason::Protocol(_)), "{corrupt}");
}

#[test]
fn a_dropped_link_is_down_at_both_ends_and_loses_what_was_on_its_way() {
    let faults = SimFaults {
        drop_link_ppm: ONE_MILLION,
        ..SimFaults::default()
    };
    let (mut attention, mut ffn) = pair(1, faults);
    attention.push(LaneId(0), frame(0, 8)).unwrap();
    let refused = attention.push(LaneId(1), frame(0, 8));
    assert_eq!(refused, Err(PushError::Down(DownReason::PeerClosed)));
    for link in [&mut attention, &mut ffn] {
        let mut events = Vec::new();
        link.poll(&mut events);
        link.poll(&mut events);
        assert_eq!(events, [LinkEvent::Down(DownReason::PeerClosed)]);
    }
}

#[test]
fn chances_are_met_on_average() {
    let faults = SimFaults {
        drop_link_ppm: 100_000,
        ..SimFaults::default()
    };
    let num_dropped = (0..1000).filter(|seed| {
        let (mut attention, _ffn) = pair(*seed, faults);
        attention.push(LaneId(0), frame(0, 8)).unwrap();
        attention.push(LaneId(1), frame(0, 8)).is_err()
    });
    assert!((70..130).contains(&num_dropped.count()));
}
