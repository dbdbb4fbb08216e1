"""Sizes and handles of AFD links: what lies where, who gets which rows, and who may be linked."""

from dataclasses import replace

import pytest
import torch

from step3rt.errors import InvalidArgument, Unavailable
from step3rt.model.placement import place
from step3rt.ops.afd_link import AttentionSlots, FfnSlots, StopWord
from step3rt.ops.afd_slots import (
    AFD_LANE,
    AFD_PEER,
    AFD_TRACE_ROW,
    FLAG_BYTES,
    Role,
    Section,
    local_ids,
)
from tests.kernels.afd_cases import CPU, DEVICES, SHAPE, device_of
from tests.kernels.afd_party import NUM_EXPERTS


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_lanes", 0),
        ("num_sources", 33),
        ("num_ranks", 0),
        ("max_tokens", 1025),  # of 2 sources: more than the experts take
        ("hidden_size", 200),
        ("top_k", 8),
    ],
)
def test_sizes_that_cannot_be_linked_are_refused(field: str, value: int) -> None:
    with pytest.raises(InvalidArgument, match=f"{field}={value}.*cannot be linked"):
        replace(SHAPE, **{field: value})


def test_no_two_sections_of_a_region_overlap() -> None:
    for role in Role:
        sections: list[Section] = []
        for lane in range(SHAPE.num_lanes):
            of_role = SHAPE.ffn_sections if role is Role.FFN else SHAPE.attention_sections
            sections += [getattr(of_role(lane), name) for name in of_role(lane).__slots__]
        sections.sort(key=lambda section: section.offset)
        ends = [section.offset + section.num_bytes for section in sections]
        assert all(section.offset % 256 == 0 for section in sections)
        assert all(
            end <= following.offset for end, following in zip(ends, sections[1:], strict=False)
        )
        assert ends[-1] <= SHAPE.region_bytes(role)
    assert (AFD_PEER.itemsize, AFD_LANE.itemsize, AFD_TRACE_ROW.itemsize) == (128, 33 * 128, 64)
    assert AFD_LANE.fields is not None
    assert AFD_LANE.fields["peers"][1] == FLAG_BYTES


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 9])
def test_ranks_get_the_rows_and_ids_that_the_placement_gives_them(num_ranks: int) -> None:
    shape = replace(SHAPE, num_ranks=num_ranks, max_tokens=40)
    generator = torch.Generator().manual_seed(num_ranks)
    weights, chosen = torch.rand(40, NUM_EXPERTS, generator=generator).topk(3, dim=1)
    topk = (chosen.int(), weights)
    for choices, experts in ((topk, NUM_EXPERTS), (None, 0)):
        ids, shares = local_ids(shape, choices, 37, experts)
        of_placement = topk if choices else (chosen[:, :0], weights[:, :0])
        placements = place(
            *(tensor[:37] for tensor in of_placement),
            num_experts=experts,
            top_k=3,
            ep_size=num_ranks,
        )
        for rank, placement in enumerate(placements):
            first = experts * rank // num_ranks
            end = experts * (rank + 1) // num_ranks
            is_here = (ids[rank] >= 0).any(dim=1)
            assert torch.equal(is_here.nonzero()[:, 0], placement.rows)
            want = placement.expert_ids.clone()
            want[:, :3] = torch.where(want[:, :3] >= 0, want[:, :3] - first, -1)
            want[:, 3] = torch.where(want[:, 3] >= 0, end - first, -1)
            assert torch.equal(ids[rank][is_here], want)
            assert torch.equal(shares[rank][is_here], placement.expert_weights)
            assert bool((ids[rank][~is_here] == -1).all())


@pytest.mark.parametrize("kind", DEVICES)
def test_handles_of_other_shapes_roles_and_places_are_refused(kind: str) -> None:
    device = device_of(kind)
    stop = StopWord(device)
    with (
        AttentionSlots(SHAPE, 0, device, stop) as source,
        FfnSlots(SHAPE, 1, device, stop) as rank,
        FfnSlots(replace(SHAPE, max_tokens=8), 1, device, stop) as other,
    ):
        for handle in (other.handle, source.handle, rank.handle[:20], b""):
            with pytest.raises(InvalidArgument, match="expected"):
                source.connect(1, handle, epoch=1)
        with pytest.raises(InvalidArgument, match="expected"):
            source.connect(0, rank.handle, epoch=1)
        with pytest.raises(InvalidArgument, match="not one of 2"):
            source.connect(2, rank.handle, epoch=1)
        source.connect(1, rank.handle, epoch=7)
        for epoch in (7, 6, 0, 1 << 24):
            with pytest.raises(InvalidArgument, match="Epoch"):
                source.connect(1, rank.handle, epoch)
        with pytest.raises(InvalidArgument, match="not linked"):
            rank.set_active(0, True)


def test_memory_that_is_gone_or_something_else_now_is_not_mapped() -> None:
    stop = StopWord(CPU)
    with AttentionSlots(SHAPE, 0, CPU, stop) as source:
        with FfnSlots(SHAPE, 0, CPU, stop) as closed:
            handle = closed.handle
        with pytest.raises(Unavailable, match="cannot be mapped"):
            source.connect(0, handle, epoch=1)
        with FfnSlots(SHAPE, 0, CPU, stop) as rank:
            wrong_token = rank.handle[:-1] + bytes([rank.handle[-1] ^ 1])
            with pytest.raises(Unavailable, match="something else"):
                source.connect(0, wrong_token, epoch=1)
