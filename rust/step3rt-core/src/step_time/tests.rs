//! What the fit finds, and what it withstands.

use proptest::prelude::*;

use super::*;

/// A source of chance that needs no crate: the high bits of a multiplicative congruence.
struct Chance(u64);

impl Chance {
    fn below(&mut self, bound: u32) -> u32 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        u32::try_from((self.0 >> 33) % u64::from(bound)).expect("below a u32")
    }

    /// From 0.9 to 1.1.
    fn noise(&mut self) -> f64 {
        0.9 + f64::from(self.below(2_001)) * 1e-4
    }

    fn load(&mut self) -> StepLoad {
        let num_decodes = self.below(65);
        let num_prefill_tokens = if self.below(2) == 0 {
            0
        } else {
            self.below(512)
        };
        StepLoad {
            num_decodes,
            num_prefill_tokens,
            num_context_tokens: u64::from(num_decodes) * u64::from(500 + self.below(8_000)),
            num_other_lanes: self.below(3),
        }
    }
}

/// Microseconds: 12,800 + 30 per decode + 25 per prompt token + 0.02 per context token, + 2,000
/// per other lane.
fn truth(load: StepLoad) -> f64 {
    12_800.0
        + 30.0 * f64::from(load.num_decodes)
        + 25.0 * f64::from(load.num_prefill_tokens)
        + 0.02 * to_f64(load.num_context_tokens)
        + 2_000.0 * f64::from(load.num_other_lanes)
}

fn ns(time_us: f64) -> u64 {
    u64::from(whole(time_us)) * 1_000
}

/// A model that has seen `num_steps` noisy steps of mixed load.
fn fitted(num_steps: u32, slower: f64) -> (StepTimeModel, Chance) {
    let mut model = StepTimeModel::default();
    let mut chance = Chance(7);
    train(&mut model, &mut chance, (num_steps, slower));
    (model, chance)
}

fn train(model: &mut StepTimeModel, chance: &mut Chance, (num_steps, slower): (u32, f64)) {
    for _ in 0..num_steps {
        let load = chance.load();
        model.observe(load, ns(truth(load) * slower * chance.noise()));
    }
}

/// The largest relative error over loads that it has not seen.
fn worst_error(model: &StepTimeModel, chance: &mut Chance, slower: f64) -> f64 {
    let errors = (0..200).map(|_| {
        let load = chance.load();
        let expected = truth(load) * slower;
        (model.predict_us(load) - expected).abs() / expected
    });
    errors.fold(0.0, f64::max)
}

#[test]
fn noisy_steps_of_mixed_load_are_predicted() {
    let (model, mut chance) = fitted(600, 1.0);
    let error = worst_error(&model, &mut chance, 1.0);
    assert!(error < 0.05, "off by {error}");
    let prefill_us = model.coefficients[PREFILL];
    assert!((22.0..28.0).contains(&prefill_us), "{prefill_us} us");
    assert!(
        (0.02..0.08).contains(&model.spread),
        "5 % on average: {}",
        model.spread
    );
}

#[test]
fn few_steps_fit_nothing() {
    let mut model = StepTimeModel::default();
    let decode = StepLoad {
        num_decodes: 4,
        ..StepLoad::default()
    };
    for _ in 0..100 {
        model.observe(decode, 5_000_000);
    }
    assert!(!model.is_fitted(), "no prompt has shown its price");
    assert!(model.least_step_us() <= 0.0);
    let (model, _) = fitted(16, 1.0);
    assert!(model.is_fitted());
    let prefill = StepLoad {
        num_prefill_tokens: 8,
        ..StepLoad::default()
    };
    let mut model = StepTimeModel::default();
    for num_steps in 1..=MIN_STEPS {
        assert!(!model.is_fitted());
        assert!(model.least_prefill_token_us() <= 0.0);
        let is_early = num_steps <= MIN_PREFILL_STEPS;
        model.observe(if is_early { prefill } else { decode }, 5_000_000);
    }
    assert!(model.is_fitted());
}

#[test]
fn a_chunk_takes_its_tokens_and_reads_all_before_them_and_itself() {
    let model = StepTimeModel {
        coefficients: [1_000.0, 10.0, 20.0, 0.5, 100.0],
        ..StepTimeModel::default()
    };
    let prefill_us = model.prefill_us(10, 100);
    assert!((prefill_us - (20.0 * 10.0 + 0.5 * 110.0)).abs() < 1e-9);
    assert_eq!(model.prefill_tokens_within(50.0 + 82.0, 100), 4); // 20.5 a token
    assert_eq!(model.prefill_tokens_within(50.0 + 81.9, 100), 3);
}

#[test]
fn the_optimistic_figures_are_zero_where_predictions_are_wide_of_the_mark() {
    let mut model = StepTimeModel::default();
    let mut chance = Chance(5);
    for _ in 0..200 {
        let load = chance.load();
        model.observe(load, u64::from(1 + chance.below(100_000)) * 1_000);
    }
    assert!(model.is_fitted() && model.spread > 0.4);
    assert!(model.least_step_us() <= 0.0 && model.least_prefill_token_us() <= 0.0);
}

#[test]
fn no_step_is_promised_to_take_longer_than_a_third_of_the_fastest() {
    let (mut model, mut chance) = fitted(600, 1.0);
    let usual = model.least_step_us();
    model.observe(chance.load(), 900_000);
    assert!(model.least_step_us() <= 300.0, "it was {usual}");
    train(&mut model, &mut chance, (20, 1.0));
    assert!(model.least_step_us() <= 300.0, "and is not forgotten");
}

#[test]
fn one_stalled_step_changes_next_to_nothing() {
    for stall_ns in [0, 1, 1_000_000_000, 60_000_000_000, u64::MAX] {
        let (mut model, mut chance) = fitted(600, 1.0);
        let load = chance.load();
        let before = model.predict_us(load);
        model.observe(load, stall_ns);
        let after = model.predict_us(load);
        let change = (after - before).abs() / before;
        assert!(change < 0.05, "{stall_ns} ns changed it by {change}");
    }
}

#[test]
fn a_stall_at_the_very_beginning_is_overcome() {
    let mut model = StepTimeModel::default();
    let mut chance = Chance(3);
    for _ in 0..3 {
        model.observe(chance.load(), 8_000_000_000);
    }
    train(&mut model, &mut chance, (60, 1.0));
    let error = worst_error(&model, &mut chance, 1.0);
    assert!(error < 0.15, "off by {error}");
}

#[test]
fn a_machine_that_has_become_slower_is_followed() {
    let (mut model, mut chance) = fitted(600, 1.0);
    train(&mut model, &mut chance, (1_500, 3.0));
    let error = worst_error(&model, &mut chance, 3.0);
    assert!(error < 0.1, "off by {error}");
    train(&mut model, &mut chance, (1_500, 1.0));
    let error = worst_error(&model, &mut chance, 1.0);
    assert!(error < 0.1, "off by {error} when it is fast again");
}

#[test]
fn what_cannot_be_told_from_the_constant_is_taken_to_be_free() {
    let mut model = StepTimeModel::default();
    let load = StepLoad {
        num_decodes: 32,
        num_prefill_tokens: 64,
        num_context_tokens: 10_000,
        num_other_lanes: 2,
    };
    for _ in 0..200 {
        model.observe(load, 20_000_000);
    }
    assert!((model.predict_us(load) - 20_000.0).abs() < 50.0);
    assert!(model.coefficients[PREFILL] < 1.0);
    assert_eq!(model.prefill_tokens_within(100_000.0, 0), u32::MAX);
}

#[test]
fn tokens_within_a_room_take_no_more_than_the_room() {
    let (model, _) = fitted(600, 1.0);
    for (room_us, start) in [(5_000.0, 0), (5_000.0, 100_000), (200.0, 50), (-1.0, 0)] {
        let num_tokens = model.prefill_tokens_within(room_us, start);
        if num_tokens > 0 {
            assert!(model.prefill_us(num_tokens, start) <= room_us);
            assert!(model.prefill_us(num_tokens + 1, start) > room_us);
        } else {
            assert!(model.prefill_us(1, start) > room_us);
        }
    }
    assert!(model.within_us(50_000.0) < 50_000.0 / 1.04);
}

#[test]
fn the_optimistic_figures_are_below_the_truth() {
    let (model, _) = fitted(600, 1.0);
    assert!(model.least_step_us() > 1_000.0);
    assert!(model.least_step_us() < 12_800.0 * 0.9);
    assert!(model.least_prefill_token_us() > 10.0);
    assert!(model.least_prefill_token_us() < 25.0);
}

#[test]
fn errors_of_long_ago_do_not_count_for_ever() {
    let (mut model, mut chance) = fitted(3_000, 1.0);
    assert!(model.spread < 0.1);
    for _ in 0..400 {
        let load = chance.load();
        let slower = f64::from(1 + chance.below(4));
        model.observe(load, ns(truth(load) * slower));
    }
    assert!(model.spread > 0.2, "{}", model.spread);
}

#[test]
fn what_was_learned_of_prompts_outlasts_any_time_without_one() {
    let (mut model, mut chance) = fitted(600, 1.0);
    for _ in 0..200_000 {
        // until no trace of one is left in the sums
        let load = StepLoad {
            num_prefill_tokens: 0,
            ..chance.load()
        };
        model.observe(load, ns(truth(load) * chance.noise()));
    }
    let prefill_us = model.coefficients[PREFILL];
    assert!((15.0..35.0).contains(&prefill_us), "{prefill_us} us");
}

fn any_load() -> impl Strategy<Value = StepLoad> {
    let count = prop_oneof![Just(0_u32), 0..600_u32, any::<u32>()];
    let context = prop_oneof![Just(0_u64), 0..1_000_000_u64, any::<u64>()];
    (count.clone(), count.clone(), context, count).prop_map(|(decodes, prefill, context, lanes)| {
        StepLoad {
            num_decodes: decodes,
            num_prefill_tokens: prefill,
            num_context_tokens: context,
            num_other_lanes: lanes,
        }
    })
}

proptest! {
    #[test]
    fn no_history_makes_a_prediction_that_is_no_number_or_falls_with_the_load(
        steps in prop::collection::vec((any_load(), prop_oneof![0..10_000_000_000_u64, any::<u64>()]), 0..120),
        asked in any_load(),
    ) {
        let mut model = StepTimeModel::default();
        for (load, duration_ns) in steps {
            model.observe(load, duration_ns);
            prop_assert!(model.coefficients.iter().all(|c| c.is_finite() && *c >= 0.0));
        }
        let predicted = model.predict_us(asked);
        prop_assert!(predicted.is_finite() && predicted >= 0.0);
        prop_assert!((0.0..=1.0).contains(&model.spread));
        prop_assert!(model.within_us(50_000.0) <= 50_000.0);
        prop_assert!(model.least_step_us() >= 0.0 && model.least_step_us().is_finite());
        prop_assert!(model.least_prefill_token_us().is_finite());
        let more = [
            StepLoad { num_decodes: asked.num_decodes.saturating_add(1), ..asked },
            StepLoad { num_prefill_tokens: asked.num_prefill_tokens.saturating_add(1), ..asked },
            StepLoad { num_context_tokens: asked.num_context_tokens.saturating_add(1), ..asked },
            StepLoad { num_other_lanes: asked.num_other_lanes.saturating_add(1), ..asked },
        ];
        for load in more {
            prop_assert!(model.predict_us(load) >= predicted);
        }
    }
}
