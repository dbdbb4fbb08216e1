//! The simulator finds nothing in the scheduler, reaches every fault, replays, and can fail.

use step3rt_sim::sabotage::Sabotage;
use step3rt_sim::sweep::{Sweep, replay, run};

fn sweep(num_seeds: u64, sabotage: Option<Sabotage>) -> Sweep {
    Sweep {
        first_seed: 0,
        num_seeds,
        num_threads: 2,
        sabotage,
    }
}

#[test]
fn no_seed_breaks_a_promise_and_every_fault_happens() {
    let report = run(sweep(300, None));
    assert_eq!(report.violations, []);
    assert_eq!(report.missing_faults(), Vec::<&str>::new());
}

#[test]
fn a_seed_replays_event_by_event() {
    for seed in 0..20 {
        let first = replay(seed, None, true);
        let second = replay(seed, None, true);
        assert!(first.trace.lines().count() > 20);
        assert_eq!(first.trace, second.trace);
        let untraced = replay(seed, None, false);
        assert_eq!(first.num_events, untraced.num_events);
        assert_eq!(first.faults, untraced.faults);
    }
}

#[test]
fn every_sabotage_is_seen() {
    for sabotage in Sabotage::ALL {
        let report = run(sweep(120, Some(sabotage)));
        let name = sabotage.name();
        assert!(!report.violations.is_empty(), "{name} went unseen");
        let (seed, violation) = &report.violations[0];
        let outcome = replay(*seed, Some(sabotage), true);
        assert_eq!(outcome.violation.as_ref(), Some(violation), "{name}");
    }
}
