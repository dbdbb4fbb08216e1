//! Owns what one seed is about: the settings, the cluster, the load, and which faults there are.
//!
//! Not every seed has every fault: a fault that ends everything early would hide what others do.

use std::collections::BTreeMap;

use step3rt_core::config::SchedulerConfig;

use crate::fault::Fault;
use crate::pace::Pace;
use crate::rng::Rng;

/// One seed's world before anything happens.
#[derive(Clone, Debug)]
pub(crate) struct Profile {
    pub(crate) config: SchedulerConfig,
    /// KV blocks of each attention instance.
    pub(crate) pools: Vec<u32>,
    /// How long the steps of all of them really take.
    pub(crate) pace: Pace,
    pub(crate) num_requests: u32,
    /// Between two requests, on average.
    pub(crate) mean_gap_us: u32,
    pub(crate) max_prompt_tokens: u32,
    pub(crate) max_new_tokens: u32,
    /// How often the drive loop plans at once and not a moment later.
    pub(crate) plans_at_once_per_mille: u32,
    /// When the faults stop.
    pub(crate) calm_after_us: u32,
    /// How long an instance may be silent before it counts as lost.
    pub(crate) lease_us: u32,
    /// How long a step may stay unanswered before its session is closed.
    pub(crate) step_timeout_us: u32,
    rates: BTreeMap<Fault, u32>,
}

impl Profile {
    pub(crate) fn draw(rng: &mut Rng) -> Self {
        let block_size_tokens = rng.pick(&[2, 4, 4, 8]);
        let max_sequences_per_lane = rng.within(1, 6);
        let max_model_len = rng.within(8, 80);
        let max_prefill_tokens = rng.pick(&[20, 60]);
        let config = SchedulerConfig {
            num_lanes: u8::try_from(rng.within(1, 3)).expect("at most 3"),
            block_size_tokens,
            max_model_len,
            max_tokens_per_micro_batch: max_sequences_per_lane + rng.within(0, max_prefill_tokens),
            max_steps_in_flight: u8::try_from(rng.within(1, 4)).expect("at most 4"),
            target_tpot_ms: rng.pick(&[1, 2, 2, 3, 50]),
            max_sequences_per_lane,
            max_waiting_requests: rng.within(2, 40),
            recovery_timeout_ms: u64::from(rng.within(20, 800)),
            assumes_computed_prompts: false,
        };
        // From pools that hold one sequence to pools that are never full.
        let whole = max_model_len.div_ceil(block_size_tokens);
        let pools = (0..rng.within(1, 4)).map(|_| rng.within(whole / 2 + 1, whole * 4));
        let pools = pools.collect();
        let mut profile = Self {
            pools,
            pace: Pace::draw(&mut rng.fork()),
            num_requests: rng.within(4, 64),
            mean_gap_us: rng.pick(&[300, 2_000, 8_000]),
            max_prompt_tokens: rng.within(4, max_model_len),
            max_new_tokens: rng.within(2, 40),
            plans_at_once_per_mille: rng.pick(&[1_000, 1_000, 500, 100]),
            calm_after_us: rng.within(20_000, 500_000),
            lease_us: rng.within(5_000, 80_000),
            step_timeout_us: rng.within(60_000, 200_000),
            rates: BTreeMap::new(),
            config,
        };
        let is_peaceful = rng.chance(30);
        for fault in Fault::ALL {
            let is_there = !is_peaceful && rng.chance(500);
            let rate = rng.pick(rates(fault));
            profile.rates.extend(is_there.then_some((fault, rate)));
        }
        profile
    }

    /// How many of a thousand opportunities this fault takes.
    pub(crate) fn rate(&self, fault: Fault) -> u32 {
        self.rates.get(&fault).copied().unwrap_or(0)
    }
}

/// Per thousand requests, messages, steps, or ticks of the fault clock.
fn rates(fault: Fault) -> &'static [u32] {
    match fault {
        Fault::Cancel | Fault::StopString | Fault::Deadline => &[50, 200, 500],
        Fault::InvalidRequest | Fault::RepeatedRequest => &[30, 150],
        Fault::Crash | Fault::UnnoticedRestart | Fault::SlowNode => &[20, 60, 150],
        Fault::LostExperts | Fault::ClockJump | Fault::ClockStall => &[20, 80],
        Fault::Drain => &[5, 30],
        Fault::StaleAnswer | Fault::StaleRegistration => &[300, 1_000],
        Fault::LostPlan | Fault::LostAnswer | Fault::TornAnswer | Fault::CorruptLogits => &[2, 10],
        Fault::DelayedMessage | Fault::DuplicatedAnswer | Fault::ReorderedAnswer => &[10, 80],
        Fault::FailedStep => &[10, 60, 300],
        Fault::KvExhaustion => &[0], // comes of small pools
    }
}
