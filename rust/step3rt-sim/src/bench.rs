//! Measures what the scheduler costs per lane step.
//!
//! One lane step is one step of one lane on every attention instance. Measured is everything that
//! the drive loop asks of the scheduler for it, and nothing that instances or clients do.

use std::time::Instant;

use rustix::time::{ClockId, Timespec, clock_gettime};
use serde::{Deserialize, Serialize};

use crate::stats::{quantile, to_f64};
use crate::workload::{Load, Workload};

/// What to measure.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BenchOptions {
    /// Sequences that run at a time, all lanes together.
    pub sequences: u32,
    /// Attention instances.
    pub attention: u32,
    /// Micro-batch lanes per instance.
    pub lanes: u8,
    /// Lane steps to measure.
    pub steps: u32,
    /// Whether to measure from 256 to 65,536 sequences as well.
    pub scaling: bool,
}

/// What was measured.
#[derive(Clone, Debug, Serialize)]
pub struct BenchReport {
    /// Microseconds of one lane step.
    pub schedule_apply_us: Quantiles,
    /// The same in time that the thread was on a core, which other processes do not lengthen.
    pub schedule_apply_cpu_us: Quantiles,
    /// Sequences in one lane step, on average.
    pub sequences_per_lane_step: u64,
    /// Lane steps measured.
    pub steps: u32,
    /// Growth of the process's resident memory while they ran.
    pub resident_growth_kib: u64,
    /// The processor.
    pub machine: String,
    /// The cost by size.
    pub scaling: Vec<ScalingPoint>,
}

/// Where the measured times lie.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Quantiles {
    /// Half are below.
    pub p50: f64,
    /// One in a hundred is above.
    pub p99: f64,
    /// The longest.
    pub max: f64,
}

/// The cost at one size.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct ScalingPoint {
    /// Sequences that run at a time.
    pub sequences: u32,
    /// Microseconds of one lane step.
    pub p50_us: f64,
    /// The same for each sequence in it.
    pub ns_per_sequence: f64,
}

const SCALING_SEQUENCES: [u32; 5] = [256, 1_024, 4_096, 16_384, 65_536];
/// The largest size takes milliseconds per lane step; its median needs no more.
const SCALING_STEPS: u32 = 300;

/// Measures as `options` say.
///
/// # Errors
/// If a count is 0 or there are more lanes than the scheduler takes.
pub fn run(options: BenchOptions) -> Result<BenchReport, String> {
    let BenchOptions {
        sequences,
        attention,
        lanes,
        steps,
        scaling,
    } = options;
    if sequences == 0 || attention == 0 || steps == 0 || !(1..=8).contains(&lanes) {
        return Err(format!(
            "sequences = {sequences}, attention = {attention}, lanes = {lanes}, steps = {steps} \
             cannot be measured. There must be at least one of each, and the scheduler takes up to \
             8 lanes. Raise what is 0, or lower `lanes`"
        ));
    }
    let load = |num_sequences| Load {
        num_sequences,
        num_attention: attention,
        num_lanes: lanes,
    };
    let measured = measure(load(sequences), steps);
    let sizes: &[u32] = if scaling { &SCALING_SEQUENCES } else { &[] };
    let point = |&num_sequences: &u32| {
        let measured = measure(load(num_sequences), SCALING_STEPS.min(steps));
        let p50_us = measured.cpu_us.p50;
        ScalingPoint {
            sequences: num_sequences,
            p50_us,
            ns_per_sequence: p50_us * 1e3 / to_f64(measured.sequences_per_lane_step).max(1.0),
        }
    };
    Ok(BenchReport {
        schedule_apply_us: measured.wall_us,
        schedule_apply_cpu_us: measured.cpu_us,
        sequences_per_lane_step: measured.sequences_per_lane_step,
        steps,
        resident_growth_kib: measured.resident_growth_kib,
        machine: machine(),
        scaling: sizes.iter().map(point).collect(),
    })
}

struct Measured {
    wall_us: Quantiles,
    cpu_us: Quantiles,
    sequences_per_lane_step: u64,
    resident_growth_kib: u64,
}

fn measure(load: Load, num_steps: u32) -> Measured {
    let mut workload = Workload::new(load);
    // Touched here, so that the memory that holds the results is no growth.
    let mut wall_us = vec![0.0; num_steps as usize];
    let mut cpu_us = wall_us.clone();
    let before_kib = resident_kib();
    let mut num_sequences = 0;
    let lanes = (0..usize::from(load.num_lanes)).cycle();
    for (lane, (wall_us, cpu_us)) in lanes.zip(wall_us.iter_mut().zip(&mut cpu_us)) {
        let step = workload.prepare(lane);
        num_sequences += step.num_sequences as u64;
        let (start, cpu_start_us) = (Instant::now(), thread_cpu_us());
        let answers = workload.run(step);
        *cpu_us = thread_cpu_us() - cpu_start_us;
        *wall_us = start.elapsed().as_secs_f64() * 1e6;
        workload.note(answers);
    }
    Measured {
        resident_growth_kib: resident_kib().saturating_sub(before_kib),
        wall_us: Quantiles::of(wall_us),
        cpu_us: Quantiles::of(cpu_us),
        sequences_per_lane_step: num_sequences / u64::from(num_steps),
    }
}

impl Quantiles {
    fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let [p50, p99, max] = [500, 990, 1_000].map(|per_mille| quantile(&values, per_mille));
        Self { p50, p99, max }
    }
}

fn thread_cpu_us() -> f64 {
    let Timespec { tv_sec, tv_nsec } = clock_gettime(ClockId::ThreadCPUTime);
    to_f64(tv_sec.unsigned_abs()) * 1e6 + to_f64(tv_nsec.unsigned_abs()) / 1e3
}

/// Resident memory of this process, from the kernel; 0 where there is no such file.
fn resident_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let number = line.and_then(|line| line.split_whitespace().next());
    number.and_then(|text| text.parse().ok()).unwrap_or(0)
}

fn machine() -> String {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = cpuinfo.lines().find(|line| line.starts_with("model name"));
    let name = line.and_then(|line| line.split_once(": "));
    name.map_or_else(|| "unknown".to_owned(), |(_, name)| name.to_owned())
}
