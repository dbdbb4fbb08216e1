"""What the MoE launchers compute on the CPU, against float64 on the plain weights."""

import dataclasses

import pytest
import torch

from step3rt.ops.moe_fp8 import MoeTokens, allocate_moe_workspace, moe_fp8
from step3rt.ops.moe_layout import (
    pack_down,
    pack_gate_up,
    pack_rows,
    unpack_down,
    unpack_gate_up,
    unpack_rows,
)
from tests.kernels.moe_inputs import MoeCase, make_case, poison, relative_error

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(12)


def bound(num_tokens: int) -> float:
    """As of the kernels: outputs in BF16, and SwiGLU values on the other side of an e4m3 step."""
    return 1e-2 * (1 + num_tokens**-0.5)


def distinct_ids(num_tokens: int, num_columns: int, num_experts: int) -> torch.Tensor:
    """i32[T, C]: ids in 0...num_experts - 1, distinct in a row."""
    return torch.rand(num_tokens, num_experts).topk(num_columns, dim=1).indices.int()


def check(case: MoeCase) -> None:
    out = case.run()
    assert relative_error(out, case.reference()) < bound(out.shape[0])


@pytest.mark.parametrize("sizes", [(128, 128), (384, 128), (640, 256), (256, 384)])
def test_packed_weights_come_back_from_packing(sizes: tuple[int, int]) -> None:
    hidden, inner = sizes

    def weight(rows: int, columns: int) -> torch.Tensor:
        return torch.randint(0, 255, (3, rows, columns), dtype=torch.uint8)

    raw = weight(2 * inner, hidden)
    packed = pack_gate_up(raw.view(torch.float8_e4m3fn))
    assert torch.equal(unpack_gate_up(packed, hidden).view(torch.uint8), raw)
    raw = weight(hidden, inner)
    packed = pack_down(raw.view(torch.float8_e4m3fn))
    assert torch.equal(unpack_down(packed[1:2], inner).view(torch.uint8), raw[1:2])


def test_rows_are_packed_as_they_are_unpacked() -> None:
    raw = torch.randint(0, 255, (21, 384), dtype=torch.uint8)
    rows = torch.zeros(3, 40, 128, dtype=torch.uint8)
    places = torch.randperm(40)[:21]
    rows[:, places] = pack_rows(raw.view(torch.float8_e4m3fn), places).view(torch.uint8)
    plain = unpack_rows(rows.view(torch.float8_e4m3fn)).view(torch.uint8)
    assert torch.equal(plain[places], raw)
    assert int(plain.sum()) == int(raw.sum())


@pytest.mark.parametrize("num_tokens", [1, 7, 64, 65, 130])
def test_routed_and_shared_experts_agree_with_float64(num_tokens: int) -> None:
    # 3 of 6 experts are at hand: about half of the ids are not.
    check(make_case(distinct_ids(num_tokens, 3, 6), 4, 3, first_expert=2, device=CPU))


@pytest.mark.parametrize("sizes", [(128, 128), (384, 384), (640, 128), (128, 640)])
def test_odd_numbers_of_tiles(sizes: tuple[int, int]) -> None:
    check(make_case(distinct_ids(70, 2, 4), 4, 3, sizes=sizes, device=CPU))


@pytest.mark.parametrize("num_slices", [1, 2, 3, 7])
def test_a_dense_ffn_is_a_shared_expert_alone(num_slices: int) -> None:
    ids = torch.zeros(33, 0, dtype=torch.int32)
    check(make_case(ids, 1, 0, sizes=(256, 640), num_slices=num_slices, device=CPU))


def test_ids_may_repeat_and_name_nobody() -> None:
    check(make_case(torch.tensor([[1, 1, 3], [-1, 0, 9]], dtype=torch.int32), 4, 4, device=CPU))


def test_tokens_without_a_local_expert_get_zero() -> None:
    ids = torch.tensor([[9, 8, -1], [9, 2, 7]], dtype=torch.int32)
    case = make_case(ids, 4, 4, device=CPU)
    out = case.run()
    assert bool((out[0] == 0).all())
    assert relative_error(out, case.reference()) < bound(1)


def test_zero_hidden_states_stay_zero_and_large_ones_finite() -> None:
    case = make_case(distinct_ids(9, 2, 3), 3, 3, device=CPU)
    case.tokens.hidden.view(torch.uint8)[0] = 0
    case.tokens.scales[1] *= 1e4
    out = case.run()
    assert bool((out[0] == 0).all())
    assert bool(out.isfinite().all())


def test_a_token_gets_the_same_bits_whoever_else_is_in_the_batch() -> None:
    case = make_case(distinct_ids(70, 3, 6), 7, 6, device=CPU)
    together = case.run()
    for token in (0, 17, 69):
        alone = MoeTokens(
            *(
                getattr(case.tokens, field.name)[token : token + 1]
                for field in dataclasses.fields(MoeTokens)
            )
        )
        poison(case.workspace)
        out = torch.full_like(together[:1], float("nan"))
        moe_fp8(alone, case.experts, case.workspace, out)
        assert torch.equal(out[0], together[token])


def test_no_tokens_are_no_work_and_what_does_not_fit_is_refused() -> None:
    case = make_case(distinct_ids(8, 2, 3), 3, 3, device=CPU)
    empty = MoeTokens(
        *(getattr(case.tokens, field.name)[:0] for field in dataclasses.fields(MoeTokens))
    )
    moe_fp8(empty, case.experts, case.workspace, torch.empty(0, 512).bfloat16())
    out = torch.empty(8, 512, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"`out` is torch\.float32"):
        moe_fp8(case.tokens, case.experts, case.workspace, out.float())
    smaller = allocate_moe_workspace(case.experts, 7, 2)
    with pytest.raises(ValueError, match="8 tokens of 2 ids do not fit a workspace for 7"):
        moe_fp8(case.tokens, case.experts, smaller, out)
