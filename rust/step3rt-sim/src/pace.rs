//! Owns how long steps really take, which the scheduler has to find out, and the judgement whether
//! prompts have made decodes wait longer than the target allows.
//!
//! It never tells the scheduler: what that knows, it knows from when it planned and was answered.

use std::collections::BTreeMap;

use step3rt_core::config::SchedulerConfig;
use step3rt_core::ids::{Epoch, InstanceId};
use step3rt_core::step::{StepKey, StepPlan};

use crate::rng::Rng;
use crate::violation::{Violation, ensure};

/// The hidden model of an instance's steps: noise and network come on top.
#[expect(
    clippy::struct_field_names,
    reason = "times carry their unit in this project"
)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pace {
    constant_ns: u64,
    decode_ns: u64,
    prefill_token_ns: u64,
    context_token_ns: u64,
}

/// What is in a step, as its plan says.
#[derive(Clone, Copy, Debug, Default)]
struct Content {
    num_decodes: u64,
    num_prefill_tokens: u64,
    decode_context: u64,
    prefill_context: u64,
}

impl Content {
    fn of(plan: &StepPlan) -> Self {
        let mut content = Self::default();
        for chunk in &plan.chunks {
            let num_new_tokens = u64::from(chunk.num_new_tokens);
            let context = u64::from(chunk.num_computed_tokens) + num_new_tokens;
            if num_new_tokens == 1 {
                content.num_decodes += 1;
                content.decode_context += context;
            } else {
                content.num_prefill_tokens += num_new_tokens;
                content.prefill_context += context;
            }
        }
        content
    }
}

impl Pace {
    pub(crate) fn draw(rng: &mut Rng) -> Self {
        let mut us = |low, high| u64::from(rng.within(low, high)) * 1_000;
        Self {
            constant_ns: us(200, 1_500),
            decode_ns: us(5, 80),
            prefill_token_ns: us(20, 200),
            context_token_ns: us(0, 3),
        }
    }

    /// Without noise.
    pub(crate) fn step_ns(self, plan: &StepPlan) -> u64 {
        self.of(Content::of(plan))
    }

    fn of(self, content: Content) -> u64 {
        self.constant_ns
            + self.decode_ns * content.num_decodes
            + self.prefill_token_ns * content.num_prefill_tokens
            + self.context_token_ns * (content.decode_context + content.prefill_context)
    }

    /// No instance is faster than this with so many prompt tokens in so many steps, and so many
    /// steps that only decode.
    pub(crate) fn least_ns(
        self,
        num_prompt_tokens: u64,
        num_prompt_steps: u64,
        num_decodes: u64,
    ) -> u64 {
        let num_steps = num_prompt_steps + num_decodes;
        let tokens_ns = self.prefill_token_ns * num_prompt_tokens + self.decode_ns * num_decodes;
        let least_ns = self.constant_ns * num_steps + tokens_ns;
        least_ns * u64::from(1_000 - NOISE_PER_MILLE) / 1_000
    }

    fn without_prefill(self, content: Content) -> u64 {
        self.of(Content {
            num_prefill_tokens: 0,
            prefill_context: 0,
            ..content
        })
    }
}

/// How far a step's time lies from what the model says, at most.
pub(crate) const NOISE_PER_MILLE: u32 = 100;

/// An incarnation has been seen for as long as a fit takes, twice over, when it has answered so
/// many steps, and so many of them with prompts.
const FITTED_AFTER: (u32, u32) = (32, 8);
/// Fewer steps than this prove nothing.
const MIN_JUDGED: u64 = 16;

/// Counts the steps in which prompts were added to decodes, and those that this made too long.
///
/// The scheduler leaves room for twice the mean error of its predictions. Steps vary evenly by
/// [`NOISE_PER_MILLE`], the way there and back by a part of a millisecond, and both are in that
/// error. So next to no step of a world without faults is pushed past the target. Faults that
/// change the times for a while (slow machines, jumping clocks) come in bursts shorter than what
/// the fit remembers, so they cannot push one in four; a world whose clock stands still is
/// not judged.
#[derive(Debug, Default)]
pub(crate) struct Judge {
    answered: BTreeMap<(InstanceId, Epoch), (u32, u32)>,
    pub(crate) num_judged: u64,
    pub(crate) num_pushed: u64,
}

impl Judge {
    /// Takes note of a good answer to the step of `plan`.
    pub(crate) fn answered(&mut self, key: StepKey, has_prefill: bool) {
        let place = (key.instance, key.epoch);
        let (num_steps, num_prefill_steps) = self.answered.entry(place).or_default();
        *num_steps += 1;
        *num_prefill_steps += u32::from(has_prefill);
    }

    /// Judges a step that is about to run.
    pub(crate) fn planned(
        &mut self,
        config: &SchedulerConfig,
        pace: Pace,
        plan: &StepPlan,
    ) -> Result<(), Violation> {
        let key = plan.key;
        let answered = self.answered.get(&(key.instance, key.epoch));
        let &(num_steps, num_prefills) = answered.unwrap_or(&(0, 0));
        let content = Content::of(plan);
        let is_fitted = num_steps >= FITTED_AFTER.0 && num_prefills >= FITTED_AFTER.1;
        if !is_fitted || content.num_decodes == 0 || content.num_prefill_tokens == 0 {
            return Ok(());
        }
        let target_ns = u64::from(config.target_tpot_ms) * 1_000_000;
        // A block is what a prompt always gets.
        let is_more = content.num_prefill_tokens > u64::from(config.block_size_tokens);
        let is_pushed =
            is_more && pace.of(content) > target_ns && pace.without_prefill(content) <= target_ns;
        self.num_judged += 1;
        self.num_pushed += u64::from(is_pushed);
        ensure!(
            self.num_judged < MIN_JUDGED || self.num_pushed * 4 <= self.num_judged,
            "prompts pushed {} of {} steps with decodes past {} ms",
            self.num_pushed,
            self.num_judged,
            config.target_tpot_ms
        );
        Ok(())
    }
}
