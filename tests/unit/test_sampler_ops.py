import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from step3rt.ops.sampling import SamplingRow, gumbel_noise, sample, token_logprobs

PROBABILITIES = [0.4, 0.25, 0.2, 0.1, 0.05]
LOGITS = torch.tensor([PROBABILITIES], dtype=torch.float64).log().float()


def frequencies(num_draws: int = 4000, **parameters: float) -> list[float]:
    rows = [
        SamplingRow(**{"temperature": 1.0, "seed": 7, **parameters}, position=position)  # type: ignore[arg-type]
        for position in range(num_draws)
    ]
    counts = np.bincount(sample(LOGITS.expand(num_draws, -1), rows), minlength=5)
    return (counts / num_draws).tolist()


def is_close(found: list[float], expected: list[float], num_draws: int = 4000) -> bool:
    """Within five standard deviations of a binomial draw, token by token."""
    return all(
        abs(f - e) <= 5 * math.sqrt(e * (1 - e) / num_draws) + 1e-9
        for f, e in zip(found, expected, strict=True)
    )


def test_temperature_one_draws_from_the_softmax() -> None:
    assert is_close(frequencies(), PROBABILITIES)


def test_temperature_sharpens_the_distribution() -> None:
    sharpened = np.array(PROBABILITIES) ** 2
    assert is_close(frequencies(temperature=0.5), (sharpened / sharpened.sum()).tolist())


def test_top_k_renormalises_over_the_most_likely() -> None:
    assert is_close(frequencies(top_k=2), [0.4 / 0.65, 0.25 / 0.65, 0, 0, 0])


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    # 0.4 + 0.25 does not reach 0.7, with 0.2 it does.
    assert is_close(frequencies(top_p=0.7), [0.4 / 0.85, 0.25 / 0.85, 0.2 / 0.85, 0, 0])


def test_top_p_counts_after_top_k() -> None:
    # Of 0.4 and 0.25 renormalised the first alone reaches 0.6.
    assert is_close(frequencies(top_k=2, top_p=0.6), [1, 0, 0, 0, 0])


def test_min_p_is_relative_to_the_most_likely() -> None:
    assert is_close(frequencies(min_p=0.4), [0.4 / 0.85, 0.25 / 0.85, 0.2 / 0.85, 0, 0])


@pytest.mark.parametrize(
    "parameters", [{"top_p": 1e-9}, {"top_k": 1}, {"min_p": 1.0}, {"temperature": 1e-30}]
)
def test_extreme_filters_leave_the_most_likely_token(parameters: dict[str, float]) -> None:
    assert frequencies(num_draws=50, **parameters)[0] == 1.0


def test_greedy_takes_the_lower_of_equal_tokens() -> None:
    assert sample(torch.tensor([[0.0, 3.0, 3.0]]), [SamplingRow()]) == [1]


def test_masked_tokens_are_not_chosen() -> None:
    masked = SamplingRow(masked_token_ids=(0, 1, 99))
    assert sample(LOGITS, [masked]) == [2]
    rows = [
        SamplingRow(temperature=1.0, position=position, masked_token_ids=(0,))
        for position in range(200)
    ]
    assert 0 not in sample(LOGITS.expand(200, -1), rows)


@given(
    seed=st.integers(0, 2**64 - 1),
    position=st.integers(0, 2**32),
    mates=st.integers(0, 5),
    place=st.integers(0, 5),
)
def test_a_token_depends_on_its_own_row_seed_and_position_alone(
    seed: int, position: int, mates: int, place: int
) -> None:
    generator = torch.Generator().manual_seed(seed % 2**63)
    logits = torch.randn(mates + 1, 64, generator=generator)
    place = min(place, mates)
    row = SamplingRow(temperature=1.3, top_p=0.9, seed=seed, position=position)
    others = [SamplingRow(temperature=0.7, seed=index) for index in range(mates)]
    rows = [*others[:place], row, *others[place:]]
    assert sample(logits, rows)[place] == sample(logits[place : place + 1], [row])[0]


def test_seeds_and_positions_give_independent_noise() -> None:
    first = gumbel_noise(1, 0, 5000)
    for other in (gumbel_noise(2, 0, 5000), gumbel_noise(1, 1, 5000)):
        assert abs(np.corrcoef(first, other)[0, 1]) < 0.06
    assert abs(first.mean() - np.euler_gamma) < 0.1
    assert np.array_equal(first[:10], gumbel_noise(1, 0, 10))


def test_noise_is_the_documented_function_of_philox() -> None:
    """The published constants of Philox4x64-10, in Python integers."""
    mask = 2**64 - 1

    def philox(counter: list[int], key: list[int]) -> list[int]:
        for _ in range(10):
            products = (0xD2E7470EE14C6C93 * counter[0], 0xCA5A826395121157 * counter[2])
            counter = [
                (products[1] >> 64) ^ counter[1] ^ key[0],
                products[1] & mask,
                (products[0] >> 64) ^ counter[3] ^ key[1],
                products[0] & mask,
            ]
            key = [(key[0] + 0x9E3779B97F4A7C15) & mask, (key[1] + 0xBB67AE8584CAA73B) & mask]
        return counter

    seed, position = 2**63 + 5, 1234
    words = philox([1, position, 0, 0], [seed, 0]) + philox([2, position, 0, 0], [seed, 0])
    expected = [-math.log(-math.log(((word >> 12) + 0.5) * 2.0**-52)) for word in words]
    assert np.allclose(gumbel_noise(seed, position, 8), expected, rtol=1e-14)


def test_logprobs_are_of_the_raw_logits() -> None:
    ((logprob, top),) = token_logprobs(LOGITS, [2], 2)
    assert logprob == pytest.approx(math.log(0.2), abs=1e-6)
    assert [token for token, _ in top] == [0, 1]
    assert [value for _, value in top] == pytest.approx([math.log(0.4), math.log(0.25)], abs=1e-6)


def test_top_logprobs_end_at_the_vocabulary() -> None:
    ((_, none),) = token_logprobs(LOGITS, [0], 0)
    ((_, everything),) = token_logprobs(LOGITS, [0], 20)
    assert none == []
    assert [token for token, _ in everything] == [0, 1, 2, 3, 4]
