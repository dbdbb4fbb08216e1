//! Runs many seeds on several threads and says what they found.
//!
//! It never lets one seed see another: a seed's world is made, run and dropped by one thread.

use std::any::Any;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use crate::fault::{Fault, FaultCounts};
use crate::sabotage::Sabotage;
use crate::violation::Violation;
use crate::world::{Outcome, World};

/// Which seeds to run, and how.
#[derive(Clone, Copy, Debug)]
pub struct Sweep {
    /// The first seed.
    pub first_seed: u64,
    /// How many, counting up.
    pub num_seeds: u64,
    /// How many at a time, at least 1.
    pub num_threads: usize,
    /// What is broken on purpose.
    pub sabotage: Option<Sabotage>,
}

/// What a sweep found.
#[derive(Clone, Debug)]
pub struct SweepReport {
    /// The seeds that broke a promise, lowest first.
    pub violations: Vec<(u64, Violation)>,
    /// What went wrong on purpose, in all seeds together.
    pub faults: FaultCounts,
    /// How continuations and requests ended, as in [`Outcome::ends`].
    pub ends: BTreeMap<String, u64>,
    /// See [`Outcome::judged_steps`].
    pub judged_steps: (u64, u64),
    /// How many things happened.
    pub num_events: u64,
    /// Wall-clock time.
    pub seconds: f64,
}

/// Runs one seed. With `has_trace`, the outcome tells every event in words.
pub fn replay(seed: u64, sabotage: Option<Sabotage>, has_trace: bool) -> Outcome {
    // A panic of the scheduler is a violation as any other. Its world is gone, and the trace with
    // it, so the message has to say enough.
    let run = || World::new(seed, sabotage, has_trace).run();
    catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|panic| Outcome {
        violation: Some(Violation(format!("panic: {}", message_of(&*panic)))),
        faults: FaultCounts::default(),
        ends: BTreeMap::new(),
        judged_steps: (0, 0),
        num_events: 0,
        trace: String::new(),
    })
}

/// Runs the seeds of `sweep`.
pub fn run(sweep: Sweep) -> SweepReport {
    let start = Instant::now();
    let next = AtomicU64::new(0);
    let report = Mutex::new(SweepReport {
        violations: Vec::new(),
        faults: FaultCounts::default(),
        ends: BTreeMap::new(),
        judged_steps: (0, 0),
        num_events: 0,
        seconds: 0.0,
    });
    std::thread::scope(|scope| {
        for _ in 0..sweep.num_threads.max(1) {
            scope.spawn(|| {
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    if index >= sweep.num_seeds {
                        return;
                    }
                    let seed = sweep.first_seed.wrapping_add(index);
                    let outcome = replay(seed, sweep.sabotage, false);
                    let mut report = report.lock().unwrap_or_else(PoisonError::into_inner);
                    report.take(seed, outcome);
                }
            });
        }
    });
    let mut report = report.into_inner().unwrap_or_else(PoisonError::into_inner);
    report.violations.sort_by_key(|&(seed, _)| seed);
    report.seconds = start.elapsed().as_secs_f64();
    report
}

impl SweepReport {
    fn take(&mut self, seed: u64, outcome: Outcome) {
        self.faults.add(&outcome.faults);
        self.num_events += outcome.num_events;
        self.judged_steps.0 += outcome.judged_steps.0;
        self.judged_steps.1 += outcome.judged_steps.1;
        for (end, count) in outcome.ends {
            *self.ends.entry(end).or_default() += count;
        }
        self.violations.extend(outcome.violation.map(|v| (seed, v)));
    }

    /// Faults that never happened: a sweep of nothing proves nothing.
    pub fn missing_faults(&self) -> Vec<&'static str> {
        let missing = Fault::ALL.into_iter().filter(|&f| self.faults.of(f) == 0);
        missing.map(Fault::name).collect()
    }
}

fn message_of(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
    text.unwrap_or("of unknown cause").to_owned()
}
