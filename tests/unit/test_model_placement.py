import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from step3rt.model.placement import combine, expert_range, place
from step3rt.ops.moe import ExpertStack, grouped_experts


def random(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@given(st.integers(0, 100), st.integers(1, 20))
def test_expert_ranges_partition_the_experts(num_experts: int, ep_size: int) -> None:
    ranges = [expert_range(num_experts, rank, ep_size) for rank in range(ep_size)]
    assert [expert for experts in ranges for expert in experts] == list(range(num_experts))
    assert max(map(len, ranges)) - min(map(len, ranges)) <= 1


@given(
    num_tokens=st.integers(1, 20),
    num_experts=st.integers(1, 9),
    top_k=st.integers(1, 4),
    ep_size=st.integers(1, 12),
    is_dense=st.booleans(),
    seed=st.integers(0, 100),
)
def test_partial_sums_add_up_to_the_whole_ffn_for_any_ep_size(
    num_tokens: int, num_experts: int, top_k: int, ep_size: int, is_dense: bool, seed: int
) -> None:
    top_k = min(top_k, num_experts)
    hidden = random(num_tokens, 6, seed=seed)
    gate_up, down = random(num_experts, 8, 6, seed=1), random(num_experts, 6, 4, seed=2)
    shared = ExpertStack(num_experts, random(1, 20, 6, seed=3), random(1, 6, 10, seed=4))
    scores = random(num_tokens, num_experts, seed=seed + 1)
    topk_weights, topk_ids = scores.topk(0 if is_dense else top_k)
    topk_ids = topk_ids.int()

    def split(ep_size: int) -> torch.Tensor:
        placements = place(
            topk_ids, topk_weights, num_experts=num_experts, top_k=top_k, ep_size=ep_size
        )
        partial_sums = []
        for rank, placement in enumerate(placements):
            experts = expert_range(num_experts, rank, ep_size)
            routed = ExpertStack(
                experts.start,
                gate_up[experts.start : experts.stop],
                down[experts.start : experts.stop],
            )
            partial_sums.append(
                grouped_experts(
                    hidden[placement.rows],
                    placement.expert_ids,
                    placement.expert_weights,
                    (routed, shared),
                )
            )
        return combine(partial_sums, placements, num_tokens)

    everything = torch.cat(
        (topk_ids, torch.full((num_tokens, 1), num_experts, dtype=torch.int32)), dim=1
    )
    weights = torch.cat((topk_weights, torch.ones(num_tokens, 1)), dim=1)
    whole = grouped_experts(hidden, everything, weights, (ExpertStack(0, gate_up, down), shared))
    assert torch.allclose(split(ep_size), whole, atol=1e-12)


def test_a_row_travels_only_to_its_experts_and_its_home() -> None:
    topk_ids = torch.tensor([[0, 1], [2, 7], [4, 5]], dtype=torch.int32)
    topk_weights = torch.tensor([[0.5, 0.1], [0.4, 0.3], [0.6, 0.2]])
    placements = place(topk_ids, topk_weights, num_experts=8, top_k=2, ep_size=4)
    assert [placement.rows.tolist() for placement in placements] == [[0], [1], [2], [1]]
    assert placements[1].expert_ids.tolist() == [[2, -1, 8]]
    assert placements[1].expert_weights[0].tolist() == pytest.approx([0.4, 0, 1])
    assert placements[3].expert_ids.tolist() == [[-1, 7, -1]]


def test_every_expert_of_every_token_is_computed_once() -> None:
    topk_ids = torch.randint(0, 9, (50, 3), generator=torch.Generator().manual_seed(0)).int()
    placements = place(topk_ids, torch.rand(50, 3), num_experts=9, top_k=3, ep_size=4)
    found = sorted(
        (row, column, expert)
        for placement in placements
        for row, ids in zip(placement.rows.tolist(), placement.expert_ids.tolist(), strict=True)
        for column, expert in enumerate(ids)
        if expert >= 0
    )
    expected = sorted(
        (row, column, expert)
        for row, ids in enumerate(topk_ids.tolist())
        for column, expert in enumerate([*ids, 9])
    )
    assert found == expected
