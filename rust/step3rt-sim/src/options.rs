//! What the command line asks and is told, as JSON: the crate's face to other languages.
//!
//! It never runs anything itself.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::bench::{self, BenchOptions};
use crate::fault::{Fault, FaultCounts};
use crate::replay::{self, ReplayOptions};
use crate::sabotage::Sabotage;
use crate::sweep::{Sweep, replay as replay_seed, run};

/// What `simulate` takes.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct SimulateOptions {
    first_seed: u64,
    seeds: u64,
    threads: usize,
    sabotage: Option<String>,
    /// Tells every event of `first_seed` in words; the other seeds are not run.
    trace: bool,
}

/// What `simulate` gives.
#[derive(Clone, Debug, Serialize)]
struct SimulateReport {
    seeds: u64,
    violations: Vec<SeedViolation>,
    faults: BTreeMap<&'static str, u64>,
    /// How continuations (`Finished`) and requests (an error's kind) ended.
    ends: BTreeMap<String, u64>,
    /// Steps with decodes and prompts on instances whose steps are known, and those of them that
    /// prompts pushed past the TPOT target.
    judged_steps: (u64, u64),
    events: u64,
    seconds: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    trace: Option<String>,
}

#[derive(Clone, Debug, Serialize)]
struct SeedViolation {
    seed: u64,
    what: String,
}

/// Runs seeds as a JSON object says: `first_seed`, `seeds`, `threads`, `sabotage` (a name or
/// null), `trace` (one seed, told in words). Returns a JSON object.
///
/// # Errors
/// If the object does not say that, with what to change.
pub fn simulate(options_json: &str) -> Result<String, String> {
    let options: SimulateOptions = parse(options_json)?;
    let sabotage = options.sabotage.as_deref().map(str::parse::<Sabotage>);
    let sabotage = sabotage.transpose()?;
    let (seeds, first_seed) = (options.seeds, options.first_seed);
    if options.trace {
        let outcome = replay_seed(first_seed, sabotage, true);
        let violation = outcome.violation.map(|violation| SeedViolation {
            seed: first_seed,
            what: violation.0,
        });
        return to_json(&SimulateReport {
            seeds: 1,
            violations: violation.into_iter().collect(),
            faults: by_name(&outcome.faults),
            ends: outcome.ends,
            judged_steps: outcome.judged_steps,
            events: outcome.num_events,
            seconds: 0.0,
            trace: Some(outcome.trace),
        });
    }
    let report = run(Sweep {
        first_seed,
        num_seeds: seeds,
        num_threads: options.threads,
        sabotage,
    });
    let violations = report.violations.into_iter();
    to_json(&SimulateReport {
        seeds,
        violations: violations
            .map(|(seed, violation)| SeedViolation {
                seed,
                what: violation.0,
            })
            .collect(),
        faults: by_name(&report.faults),
        ends: report.ends,
        judged_steps: report.judged_steps,
        events: report.num_events,
        seconds: report.seconds,
        trace: None,
    })
}

/// Measures the scheduler as the JSON object of a [`BenchOptions`] says. Returns a JSON object.
///
/// # Errors
/// If the object does not say that, with what to change.
pub fn bench_scheduler(options_json: &str) -> Result<String, String> {
    let options: BenchOptions = parse(options_json)?;
    to_json(&bench::run(options)?)
}

/// Replays a trace of requests as the JSON object of a [`ReplayOptions`] says, under the scheduler
/// and under first come, first served. Returns a JSON object.
///
/// # Errors
/// If the object does not say that, with what to change.
pub fn replay_traffic(options_json: &str) -> Result<String, String> {
    let options: ReplayOptions = parse(options_json)?;
    to_json(&replay::run(&options)?)
}

fn by_name(faults: &FaultCounts) -> BTreeMap<&'static str, u64> {
    let counts = Fault::ALL.into_iter();
    counts
        .map(|fault| (fault.name(), faults.of(fault)))
        .collect()
}

fn parse<'a, T: Deserialize<'a>>(options_json: &'a str) -> Result<T, String> {
    serde_json::from_str(options_json).map_err(|error| {
        format!(
            "The options cannot be used: {error}. They are a JSON object with exactly the fields \
             that the documentation names. Correct the field"
        )
    })
}

fn to_json(report: &impl Serialize) -> Result<String, String> {
    serde_json::to_string(report).map_err(|error| format!("The report is no JSON: {error}"))
}
