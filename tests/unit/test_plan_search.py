"""The search finds what enumeration finds; the verdict names the limit that is there."""

import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from step3rt.errors import InvalidArgument
from step3rt.plan.batches import evaluate, most_sequences
from step3rt.plan.cost import Precision
from step3rt.plan.deployment import max_batch_by_memory
from step3rt.plan.hardware import Hardware, load_hardware
from step3rt.plan.hf_config import load_model, parse_config
from step3rt.plan.profile import load_profile
from step3rt.plan.search import Candidate, search
from step3rt.plan.search_space import Inventory, Target, deployments
from step3rt.plan.simulate import simulate
from step3rt.plan.verdict import MODEL_ERROR, decide
from step3rt.plan.workload import Workload

CARDS = load_hardware()
STEP3 = load_model("step3")
PAPER = load_profile("paper-h800")
FP8 = Precision()
TINY_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_hidden_layers",
    "vocab_size",
)


def inventory(**counts: int) -> Inventory:
    return Inventory(tuple((CARDS[key], count) for key, count in counts.items()))


def test_most_sequences_are_the_largest_that_enumeration_finds() -> None:
    target = Target(context_tokens=8192)
    for unit, _ in list(deployments(inventory(h800=32), target))[::37]:
        deployment = replace(unit, lanes=2)
        places = 2 * deployment.num_attention_gpus
        limit = int(max_batch_by_memory(STEP3, deployment, 8192, FP8) / places)
        sizes = np.arange(1.0, limit + 1)
        if not sizes.size:
            assert most_sequences(STEP3, deployment, target, PAPER, FP8) == 0
            continue
        within = evaluate(STEP3, deployment, target, PAPER, FP8, sizes) <= target.tpot_ms
        expected = int(sizes[within][-1]) if within.any() else 0
        assert most_sequences(STEP3, deployment, target, PAPER, FP8) == expected


@pytest.mark.parametrize("context", [4096, 8192])
def test_where_tiles_are_whole_the_best_batch_is_what_enumeration_finds(context: int) -> None:
    # At 4K, 263 sequences a GPU fit in memory, and 256 of them fill the projections' tile.
    target = Target(context_tokens=context, placement="colocated", lanes=1)
    profile = load_profile("step3rt-h200")
    found = search(STEP3, inventory(h200=4), target, profile, FP8).best[0]
    unit = found.deployment
    limit = int(max_batch_by_memory(STEP3, unit, context, FP8) / unit.num_attention_gpus)
    sizes = np.arange(1.0, limit + 1)
    tpot_ms = evaluate(STEP3, unit, target, profile, FP8, sizes)
    rates = np.where(tpot_ms <= target.tpot_ms, 1e3 * unit.num_attention_gpus * sizes / tpot_ms, 0)
    assert found.tokens_per_s == pytest.approx(rates.max(), rel=0.01)
    verdict = decide(STEP3, inventory(h200=4), target, profile, FP8)
    assert all(limit.gain >= 0 for limit in verdict.choices[0].limits)


@pytest.mark.parametrize(
    ("cards", "context", "profile"),
    [({"h200": 5}, 4096, "step3rt-h200"), ({"h800": 7}, 2048, "paper-h800")],
)
def test_no_deployment_and_batch_beats_what_the_search_finds(
    cards: dict[str, int], context: int, profile: str
) -> None:
    target, kernels = Target(context_tokens=context), load_profile(profile)
    found = search(STEP3, inventory(**cards), target, kernels, FP8)
    most: dict[str, float] = {}
    for unit, num_units in deployments(inventory(**cards), target):
        if unit.ffn_parallelism == "tp_ep":
            continue  # of no part of a host
        for lanes in (1, 2, 3, 4):
            deployment = replace(unit, lanes=lanes)
            places = lanes * unit.num_attention_gpus
            limit = int(max_batch_by_memory(STEP3, deployment, context, FP8) / places)
            if not limit:
                continue
            sizes = np.arange(1.0, limit + 1)
            tpot_ms = evaluate(STEP3, deployment, target, kernels, FP8, sizes)
            rates = 1e3 * num_units * sizes * places / tpot_ms
            rate = float(np.max(rates, where=tpot_ms <= target.tpot_ms, initial=0.0))
            most[unit.placement] = max(most.get(unit.placement, 0.0), rate)
    assert {each.deployment.placement for each in found.best} == set(most)
    for candidate in found.best:
        expected = most[candidate.deployment.placement]
        assert candidate.tokens_per_s == pytest.approx(expected, rel=1e-9)


@settings(max_examples=25, deadline=None)
@given(
    field=st.sampled_from(
        ["bytes_per_s", "fp8_flops", "bf16_flops", "memory_bytes", "nvlink_bytes_per_s"]
    ),
    factor=st.floats(1.0, 3.0),
    context=st.integers(256, 65536),
    profile=st.sampled_from(["paper-h800", "step3rt-h200"]),
)
def test_a_better_card_is_never_slower_and_a_dearer_one_costs_in_proportion(
    field: str, factor: float, context: int, profile: str
) -> None:
    card = CARDS["h200"]
    better = replace(card, **{field: factor * getattr(card, field)})
    dearer = replace(card, usd_per_hour=factor * card.usd_per_hour)
    target, kernels = Target(context_tokens=context), load_profile(profile)

    def best(of: Hardware) -> dict[str, Candidate]:
        found = search(STEP3, Inventory(((of, 6),)), target, kernels, FP8)
        return {each.deployment.placement: each for each in found.best}

    stated, faster, paid = best(card), best(better), best(dearer)
    for placement, candidate in stated.items():
        assert faster[placement].tokens_per_s >= candidate.tokens_per_s * (1 - 1e-9)
        assert paid[placement].deployment.label == candidate.deployment.label
        assert paid[placement].usd_per_1m_tokens == pytest.approx(
            factor * candidate.usd_per_1m_tokens
        )


@pytest.mark.parametrize(
    ("cards", "context"), [({"h800": 16}, 4096), ({"h800": 8, "h20": 8}, 16384)]
)
def test_simulating_what_was_chosen_meets_the_target(cards: dict[str, int], context: int) -> None:
    target = Target(context_tokens=context)
    verdict = decide(STEP3, inventory(**cards), target, PAPER, FP8)
    assert verdict.choices
    for choice in verdict.choices:
        candidate = choice.candidate
        workload = Workload(batch=candidate.batch, context_tokens=context, lengths="spread")
        result = simulate(STEP3, candidate.deployment, PAPER, workload, FP8)
        assert result.tpot_ms["p99"] <= target.tpot_ms
        room = max_batch_by_memory(STEP3, candidate.deployment, context, FP8)
        assert candidate.batch <= room


def test_experts_that_are_spread_either_way_count_as_what_was_asked_for() -> None:
    """Colocated experts know no other way, so asking for a split FFN does not rule them out."""
    target = Target(context_tokens=4096, ffn_parallelism="tp_ep")
    split = decide(STEP3, inventory(h800=16), target, PAPER, FP8)
    either = decide(STEP3, inventory(h800=16), replace(target, ffn_parallelism=None), PAPER, FP8)
    assert split.of("colocated") == either.of("colocated") is not None
    one_host = decide(STEP3, inventory(h800=8), target, PAPER, FP8)
    assert one_host.of("disaggregated") is not None


def test_every_unit_fits_the_inventory() -> None:
    cards = inventory(h20=8, h800=24)
    counts = {"h20": 8, "h800": 24}
    for unit, num_units in deployments(cards, Target(context_tokens=4096)):
        used = {unit.attention_card.key: num_units * unit.num_attention_gpus}
        ffn = unit.ffn_card.key
        used[ffn] = used.get(ffn, 0) + num_units * unit.num_ffn_gpus
        assert num_units >= 1
        assert all(used[key] <= counts[key] for key in used)


def test_no_point_of_the_front_is_dominated_and_it_holds_the_best() -> None:
    target = Target(context_tokens=4096)
    found = search(STEP3, inventory(h800=24, h20=8), target, PAPER, FP8)
    merits = np.array([(-p.tpot_ms, p.tokens_per_s, 1 / p.usd_per_1m_tokens) for p in found.front])
    for point in merits:
        is_better = (merits >= point).all(axis=1) & (merits > point).any(axis=1)
        assert not is_better.any()
    best = max(point.tokens_per_s for point in found.front if point.tpot_ms <= target.tpot_ms)
    assert found.best[0].tokens_per_s == pytest.approx(best)


def test_usd_count_the_cards_in_use_and_rates_all_cards() -> None:
    found = search(STEP3, inventory(h800=31), Target(context_tokens=4096), PAPER, FP8)
    for candidate in found.best:
        used = candidate.num_units * candidate.deployment.num_gpus
        usd_per_s = used * CARDS["h800"].usd_per_hour / 3600
        assert used <= 31
        assert candidate.usd_per_1m_tokens == pytest.approx(
            1e6 * usd_per_s / candidate.tokens_per_s
        )
        assert candidate.tokens_per_s_per_gpu == pytest.approx(candidate.tokens_per_s / 31)


def test_the_paper_deployment_is_what_the_search_finds_for_32_h800() -> None:
    target = Target(context_tokens=4096, placement="disaggregated")
    verdict = decide(STEP3, inventory(h800=32), target, PAPER, FP8)
    choice = verdict.choices[0]
    assert choice.candidate.deployment.label == "16A+16F h800 tp_ep x3"
    assert choice.candidate.batch == pytest.approx(6144, rel=0.05)
    assert choice.result.tpot_ms["p99"] <= 50
    assert choice.candidate.tokens_per_s_per_gpu == pytest.approx(4039, rel=0.10)


def test_deepseek_profile_is_within_the_stated_model_error() -> None:
    """Published: EP128, 128 sequences a GPU in two micro-batches, 4K: 2324 tokens/s/GPU."""
    model = load_model("deepseek-v3")
    unit = next(
        unit
        for unit, _ in deployments(inventory(h800=128), Target(context_tokens=4096))
        if unit.is_colocated and unit.num_gpus == 128
    )
    workload = Workload(batch=128 * 128, context_tokens=4096, lengths="spread")
    result = simulate(model, replace(unit, lanes=2), PAPER, workload, Precision(2.0), steps=16)
    assert result.tokens_per_s_per_gpu == pytest.approx(2324, rel=MODEL_ERROR)


def test_one_host_is_told_not_to_use_afd() -> None:
    profile = load_profile("peers-h200")
    verdict = decide(STEP3, inventory(h200=4), Target(context_tokens=4096), profile, FP8)
    assert verdict.advice == "colocate"
    assert verdict.text.startswith("Do not use AFD here")
    afd = verdict.of("disaggregated")
    assert afd is not None
    assert afd.candidate.deployment.label == "1A+3F h200 ep x1"
    assert afd.limits[0].name == "FFN bandwidth"


def test_a_dense_model_may_be_split_where_it_is_colocated() -> None:
    """Eight copies of 32B weights leave no time; one copy over eight GPUs does."""
    model = load_model("qwen3-32b")
    target = Target(context_tokens=2048, tpot_ms=15, placement="colocated")
    verdict = decide(model, inventory(h800=8), target, PAPER, FP8)
    deployment = verdict.choices[0].candidate.deployment
    assert deployment.ffn_parallelism == "tp_ep"
    assert deployment.num_gpus > 1
    copied = replace(target, ffn_parallelism="ep")
    of_copies = search(model, inventory(h800=8), copied, PAPER, FP8).best
    best = verdict.choices[0].candidate.tokens_per_s
    assert all(item.tokens_per_s < 0.9 * best for item in of_copies)


def test_little_scale_out_bandwidth_rules_afd_out() -> None:
    slow = replace(CARDS["h800"], nic_bytes_per_s=2e9)
    cards = Inventory(((slow, 32),))
    verdict = decide(STEP3, cards, Target(context_tokens=4096), PAPER, FP8)
    assert verdict.advice == "colocate"
    assert verdict.choices[0].candidate.deployment.is_one_host
    assert verdict.text.startswith("Do not use AFD here")


def test_afd_wins_where_cards_suit_one_side_each() -> None:
    """Attention cards with bandwidth alone, FFN cards with compute alone."""
    reader = replace(CARDS["h20"], key="reader", bytes_per_s=8e12, memory_bytes=60e9)
    counter = replace(CARDS["h800"], key="counter", memory_bytes=40e9)
    verdict = decide(
        STEP3, Inventory(((reader, 16), (counter, 16))), Target(context_tokens=8192), PAPER, FP8
    )
    assert verdict.advice == "disaggregate"
    deployment = verdict.choices[0].candidate.deployment
    assert (deployment.attention_card.key, deployment.ffn_card.key) == ("reader", "counter")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"memory_bytes": 32e9}, "KV capacity"),
        ({"nic_bytes_per_s": 1.2e10}, "network"),
        ({"bytes_per_s": 8e11}, "attention bandwidth"),
        ({"fp8_flops": 2.5e14, "bf16_flops": 1.2e14, "bytes_per_s": 8e12}, "FFN compute"),
    ],
)
def test_the_verdict_names_the_limit_that_was_built_in(
    change: dict[str, float], expected: str
) -> None:
    card = replace(CARDS["h800"], **change)  # type: ignore[arg-type]
    target = Target(
        context_tokens=8192, placement="disaggregated", ffn_parallelism="tp_ep", tpot_ms=80
    )
    verdict = decide(STEP3, Inventory(((card, 32),)), target, PAPER, FP8)
    assert verdict.choices[0].limits[0].name == expected


def test_p99_is_met_at_a_smaller_batch_than_p50() -> None:
    noisy = replace(PAPER, jitter_us=60.0)
    batches = []
    for percentile in ("p50", "p99"):
        target = Target(context_tokens=4096, percentile=percentile, placement="disaggregated")
        choice = decide(STEP3, inventory(h800=16), target, noisy, FP8).choices[0]
        assert choice.result.tpot_ms[percentile] <= 50
        batches.append(choice.candidate.batch)
    assert batches[1] <= batches[0]


def test_a_sparse_moe_is_warned_about() -> None:
    target = Target(context_tokens=4096, placement="disaggregated")
    sparse = decide(load_model("kimi-k2"), inventory(h800=96), target, PAPER, FP8)
    assert "too sparse for NVIDIA H800: 0.023" in sparse.warnings[0]
    assert not decide(STEP3, inventory(h800=32), target, PAPER, FP8).warnings


def test_an_impossible_target_is_said_to_be_one() -> None:
    target = Target(context_tokens=4096, tpot_ms=1.0)
    verdict = decide(STEP3, inventory(h800=32), target, PAPER, FP8)
    assert (verdict.advice, verdict.choices) == ("none", ())
    assert "reaches 1 ms" in verdict.text


def test_a_thousand_gpus_are_searched_in_seconds() -> None:
    begin = time.process_time()
    verdict = decide(STEP3, inventory(h800=512, h20=512), Target(context_tokens=8192), PAPER, FP8)
    assert time.process_time() - begin < 10
    assert verdict.found.num_evaluated > 5000


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"context_tokens": 0}, "Both are above 0"),
        ({"context_tokens": 1, "tpot_ms": float("nan")}, "Both are above 0"),
        ({"context_tokens": 1, "tpot_ms": float("inf")}, "the TPOT finite"),
        ({"context_tokens": 10**400}, "a context at most 1000000000"),
        ({"context_tokens": 1, "percentile": "p90"}, "knows p50 and p99"),
    ],
)
def test_impossible_targets_are_refused(values: dict[str, float], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        Target(**values)  # type: ignore[arg-type]


def test_a_model_that_is_small_for_its_cards_has_a_batch_that_can_be_simulated() -> None:
    tiny = parse_config("tiny", dict.fromkeys(TINY_SIZES, 8))
    target = Target(context_tokens=10, tpot_ms=1e9)
    verdict = decide(tiny, inventory(h800=1), target, PAPER, FP8)
    assert verdict.choices[0].candidate.batch == 10_000_000


def test_an_empty_inventory_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="from 1 to"):
        search(STEP3, Inventory(()), Target(context_tokens=1), PAPER, FP8)
