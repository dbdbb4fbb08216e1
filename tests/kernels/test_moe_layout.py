import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from step3rt.ops.moe_fp8 import Fp8Experts, allocate_moe_workspace
from step3rt.ops.moe_fp8_reference import reference_dispatch
from step3rt.ops.moe_layout import (
    BLOCK_K,
    DOWN_TILE,
    GATE_UP_TILE,
    GRANULE,
    pack_down,
    pack_gate_up,
    pack_rows,
    unpack_rows,
)


def weight(num_groups: int, rows: int, columns: int) -> torch.Tensor:
    raw = torch.randint(0, 255, (num_groups, rows, columns), dtype=torch.uint8)
    return raw.view(torch.float8_e4m3fn)


def staged_rows(packed: torch.Tensor, num_rows: int, columns: int, tile_rows: int) -> torch.Tensor:
    """u8[G, N, K]: row r of what wgmma sees as B, tile by tile, read through its 128-byte swizzle.

    Every stage is one contiguous copy, so the offsets here are those of the kernels' producers.
    """
    data = packed.view(torch.uint8)
    plain = torch.empty(data.shape[0], num_rows, columns, dtype=torch.uint8)
    for first in range(0, num_rows, tile_rows):
        height = min(tile_rows, num_rows - first)
        for k in range(columns // BLOCK_K):
            start = first * columns + k * height * BLOCK_K
            stage = data[:, start : start + height * BLOCK_K].view(-1, height, 8, 16)
            for row in range(height):
                for chunk in range(8):
                    at = k * BLOCK_K + 16 * chunk
                    plain[:, first + row, at : at + 16] = stage[:, row, chunk ^ row % 8]
    return plain


def output_of(row: int) -> int:
    """Output of a 64-row block that accumulates where m64nN has its row.

    Thread (warp w, lane 4g + t) holds rows 16w + g and 16w + g + 8: two neighbouring outputs.
    """
    warp, in_warp = divmod(row, 16)
    half, group = divmod(in_warp, 8)
    return 16 * warp + 2 * group + half


def test_packed_gate_and_up_rows_meet_in_one_thread() -> None:
    inner, hidden = 384, 256
    gate_up = weight(2, 2 * inner, hidden)
    staged = staged_rows(pack_gate_up(gate_up), 2 * inner, hidden, GATE_UP_TILE)
    raw = gate_up.view(torch.uint8)
    for row in range(2 * inner):
        # A consumer takes 128 rows: 64 of gate, then the 64 of up for the same outputs.
        consumer, in_consumer = divmod(row, 2 * GRANULE)
        is_up, in_block = divmod(in_consumer, GRANULE)
        output = consumer * GRANULE + output_of(in_block)
        assert torch.equal(staged[:, row], raw[:, is_up * inner + output])


def test_packed_down_rows_give_a_thread_two_neighbouring_columns() -> None:
    hidden, inner = 512, 256  # two full tiles of 192 and one of 128
    down = weight(2, hidden, inner)
    staged = staged_rows(pack_down(down), hidden, inner, DOWN_TILE)
    raw = down.view(torch.uint8)
    for row in range(hidden):
        granule, in_block = divmod(row, GRANULE)
        assert torch.equal(staged[:, row], raw[:, granule * GRANULE + output_of(in_block)])


def test_four_neighbouring_outputs_are_in_a_thread_that_has_rows_on_the_tall_side() -> None:
    """Accumulator 4j + 2r + c of lane 4g + t is place 8j + 2t + c of 64 weights."""
    for lane in range(4):
        for chunk in range(4):  # of 16 outputs
            places = [8 * j + 2 * lane + c for c in (0, 1) for j in (2 * chunk, 2 * chunk + 1)]
            first = 16 * chunk + 4 * lane
            assert [output_of(place) for place in places] == list(range(first, first + 4))


def test_rows_loaded_to_registers_are_wgmmas_left_operand() -> None:
    """Replays moe_load_rows: ldmatrix by 16-byte rows, at the addresses that the lanes give."""
    plain = torch.randint(0, 255, (128, 128), dtype=torch.uint8)
    packed = pack_rows(plain.view(torch.float8_e4m3fn), torch.arange(128))
    stage = packed.view(torch.uint8).flatten()
    for warp in range(8):  # of both consumers
        for step in range(4):
            rows = []
            for lane in range(32):
                address = (16 * warp + lane % 16) * 128 + 16 * (lane // 16 ^ lane % 8)
                start = address ^ 32 * step
                rows.append(stage[start : start + 16])
            for lane in range(32):
                group, in_group = divmod(lane, 4)
                for register in range(4):
                    got = rows[8 * register + group][4 * in_group : 4 * in_group + 4]
                    row = 16 * warp + group + 8 * (register % 2)
                    first = 32 * step + 16 * (register // 2) + 4 * in_group
                    assert torch.equal(got, plain[row, first : first + 4])


@pytest.mark.parametrize("shape", [(1, 200, 256), (1, 256, 200)])
def test_a_weight_of_ragged_scale_blocks_is_refused(shape: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="not a multiple of 128"):
        pack_down(weight(*shape))
    with pytest.raises(ValueError, match="not a multiple of 128"):
        pack_gate_up(weight(shape[0], 2 * shape[1], shape[2]))


def test_activation_rows_unpack_through_the_swizzle() -> None:
    rows = torch.zeros(2, 16, 128, dtype=torch.uint8)
    rows[1, 13, ((5 ^ 13 % 8) * 16) + 3] = 9  # value 128 + 5 * 16 + 3 of row 13
    plain = unpack_rows(rows.view(torch.float8_e4m3fn)).view(torch.uint8)
    assert plain.nonzero().tolist() == [[13, 128 + 83]]


def test_reference_dispatch_pads_groups_and_skips_experts_of_others() -> None:
    ids = torch.tensor([[7, 3, 40], [4, 7, 5], [-1, 48, 0], [7, 4, 2]], dtype=torch.int32)
    groups, token_rows = reference_dispatch(ids, 4, 4, has_shared=True)
    assert groups == [(0, 2), (64, 1), (128, 0), (128, 3), (192, 4)]
    assert token_rows.tolist() == [
        [128, -1, -1, 192],
        [0, 129, 64, 193],
        [-1, -1, -1, 194],
        [130, 1, -1, 195],
    ]


def tiny_experts(num_groups: int, num_routed: int) -> Fp8Experts:
    packed = torch.empty(num_groups, 2 * 128 * 128).to(torch.float8_e4m3fn)
    gate_up_scale, down_scale = torch.empty(num_groups, 2, 1), torch.empty(num_groups, 1, 1)
    return Fp8Experts(packed, gate_up_scale, packed[:, ::2], down_scale, 0, num_routed)


@given(st.data(), st.integers(1, 200), st.integers(1, 4), st.integers(0, 6), st.booleans())
def test_a_workspace_holds_whatever_the_router_sends(
    data: st.DataObject, num_tokens: int, num_columns: int, num_routed: int, has_shared: bool
) -> None:
    if num_routed == 0 and not has_shared:
        return
    # Ids may repeat in a row and name experts of others: nothing here relies on a good router.
    ids = data.draw(st.lists(st.integers(-1, 7), min_size=1, max_size=9))
    topk_ids = torch.tensor(ids).repeat(num_tokens * num_columns)[: num_tokens * num_columns]
    topk_ids = topk_ids.view(num_tokens, num_columns).int()
    experts = tiny_experts(num_routed + has_shared, num_routed)
    workspace = allocate_moe_workspace(experts, num_tokens, num_columns, num_ctas=2)
    groups, _ = reference_dispatch(topk_ids, 0, num_routed, has_shared=has_shared)
    first_row, num_rows = groups[-1]
    assert first_row % 64 == 0
    assert first_row + -(-num_rows // 64) * 64 <= workspace.rows.shape[1]


def test_a_workspace_that_the_kernels_cannot_use_is_refused() -> None:
    experts = tiny_experts(2, 2)
    with pytest.raises(ValueError, match="num_ctas is 3"):
        allocate_moe_workspace(experts, 8, 2, num_ctas=3)
    with pytest.raises(ValueError, match="max_tokens is 4096"):
        allocate_moe_workspace(experts, 4096, 2, num_ctas=2)
    with pytest.raises(ValueError, match="num_columns 9"):
        allocate_moe_workspace(experts, 8, 9, num_ctas=2)
