"""MFA prefill on the CPU and on a GPU, against float64."""

from dataclasses import dataclass

import pytest
import torch

from step3rt.ops.mfa_prefill import (
    PrefillBatch,
    PrefillChunk,
    mfa_prefill_bf16,
    mfa_prefill_fp8,
    prefill_items,
    reference_mfa_prefill,
)
from step3rt.ops.mfa_schedule import HEAD_DIM
from tests.kernels.mfa_inputs import (
    SOFTMAX_SCALE,
    make_bf16_case,
    make_fp8_case,
    relative_error,
)

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
# As of decode: output rounding and BF16 weights, and e4m3 weights.
BF16_BOUND, FP8_BOUND = 5e-3, 3e-2
NAN = float("nan")

CHUNKS = {  # (first position, tokens) of each sequence's chunk
    "one token": [(0, 1)],
    "pair and odd end": [(0, 2), (0, 3)],
    "block boundaries": [(0, 64), (0, 65), (63, 1), (63, 2), (64, 63), (127, 2)],
    "middle of a prompt": [(300, 17), (0, 40)],
    "a token beside a chunk": [(700, 1), (0, 33), (129, 1)],
}
LARGE = {
    "whole prompt": [(0, 4096)],
    "late chunk": [(30_000, 512)],
    "many prompts": [(37 * i % 500, 1 + 29 * i % 200) for i in range(60)],
    "more pairs than ctas": [(0, 300), (1000, 301), (64, 7)],
}


@dataclass
class Case:
    """A launch over chunks; `shift` rows of q and out before the first belong to nobody."""

    parts: list[tuple[int, int]]
    device: torch.device
    num_heads: int = 64
    shift: int = 0
    spread: float = 1.0

    def __post_init__(self) -> None:
        self.chunks = []
        self.num_rows = self.shift
        for sequence, (first, length) in enumerate(self.parts):
            self.chunks.append(PrefillChunk(self.num_rows, length, first, sequence))
            self.num_rows += length
        items = prefill_items(self.chunks)
        spare = torch.full((3, 4), 2**30, dtype=torch.int32)  # past the end: reading one faults
        self.items = torch.cat([items, spare]).to(self.device)
        self.num_items = torch.tensor([len(items)], dtype=torch.int32, device=self.device)

    def queries(self) -> torch.Tensor:
        shape = (self.num_rows, self.num_heads, HEAD_DIM)
        return torch.randn(shape, device=self.device) * self.spread

    def check(self, out: torch.Tensor, reference: torch.Tensor, bound: float) -> None:
        assert bool(out[: self.shift].isnan().all()), "rows of no chunk are not written"
        assert relative_error(out[self.shift :], reference[self.shift :]) < bound

    def check_bf16(self) -> None:
        lengths = [first + length for first, length in self.parts]
        cached = make_bf16_case(lengths, self.num_heads, device=self.device)
        q, table = self.queries().bfloat16(), cached.batch.block_table
        out = torch.full_like(q, NAN)
        batch = PrefillBatch(self.items, self.num_items, table)
        mfa_prefill_bf16(q, cached.cache, batch, out, SOFTMAX_SCALE)
        want = reference_mfa_prefill(q, cached.cache, self.chunks, table, SOFTMAX_SCALE)
        self.check(out, want, BF16_BOUND)

    def check_fp8(self) -> None:
        lengths = [first + length for first, length in self.parts]
        cached = make_fp8_case(lengths, self.num_heads, device=self.device)
        exact, table = self.queries(), cached.batch.block_table
        q_scale = exact.abs().amax(dim=-1) / 448
        q = (exact / q_scale[..., None]).to(torch.float8_e4m3fn)
        out = torch.full(q.shape, NAN, dtype=torch.bfloat16, device=self.device)
        batch = PrefillBatch(self.items, self.num_items, table)
        mfa_prefill_fp8(q, q_scale, cached.cache, batch, out, SOFTMAX_SCALE, cached.kv_scale)
        scales = torch.tensor(cached.kv_scale, device=self.device)[:, None, None]
        dense = cached.dense.float() * scales
        wide = q.float() * q_scale[..., None]
        want = reference_mfa_prefill(wide, dense, self.chunks, table, SOFTMAX_SCALE)
        self.check(out, want, FP8_BOUND)


def test_chunks_are_cut_into_pairs_the_dearest_first() -> None:
    chunks = [PrefillChunk(5, 3, 10, 0), PrefillChunk(8, 2, 100, 1), PrefillChunk(10, 1, 0, 2)]
    assert prefill_items(chunks).tolist() == [
        [8, 2, 101, 1],
        [7, 1, 13, 0],
        [5, 2, 11, 0],
        [10, 1, 1, 2],
    ]
    assert prefill_items([]).shape == (0, 4)


def test_the_reference_attends_to_what_came_before_and_to_itself() -> None:
    kv = torch.zeros(2, 2, 64, HEAD_DIM)
    kv[1, 1, :, 0] = torch.arange(64.0)  # V of token t is t
    q = torch.randn(3, 1, HEAD_DIM)
    table = torch.tensor([[1]], dtype=torch.int32)
    out = reference_mfa_prefill(q, kv, [PrefillChunk(1, 2, 4, 0)], table, SOFTMAX_SCALE)
    assert out[:, 0, 0].tolist() == [0.0, 2.0, 2.5]  # means of 0…4 and 0…5


@pytest.mark.parametrize("num_heads", [4, 64])
@pytest.mark.parametrize("parts", CHUNKS.values(), ids=CHUNKS.keys())
def test_prefill_on_the_cpu_agrees_with_float64(
    parts: list[tuple[int, int]], num_heads: int
) -> None:
    Case(parts, CPU, num_heads, shift=2).check_bf16()
    Case(parts, CPU, num_heads, shift=2).check_fp8()


@pytest.mark.gpu
@pytest.mark.parametrize("num_heads", [1, 17, 64])
@pytest.mark.parametrize("parts", CHUNKS.values(), ids=CHUNKS.keys())
def test_prefill_agrees_with_float64(parts: list[tuple[int, int]], num_heads: int) -> None:
    device = torch.device("cuda", 0)
    Case(parts, device, num_heads, shift=3).check_bf16()
    Case(parts, device, num_heads, shift=3).check_fp8()


@pytest.mark.gpu
@pytest.mark.parametrize("spread", [0.01, 1.0, 8.0])
@pytest.mark.parametrize("parts", LARGE.values(), ids=LARGE.keys())
def test_large_chunks_agree_with_float64(parts: list[tuple[int, int]], spread: float) -> None:
    device = torch.device("cuda", 0)
    Case(parts, device, spread=spread).check_bf16()
    Case(parts, device, spread=spread).check_fp8()


@pytest.mark.gpu
def test_no_item_at_all_writes_nothing() -> None:
    device = torch.device("cuda", 0)
    case = Case([(0, 4)], device, shift=1)
    case.num_items.zero_()
    cached = make_bf16_case([4], device=device)
    out = torch.full((case.num_rows, 64, HEAD_DIM), NAN, dtype=torch.bfloat16, device=device)
    batch = PrefillBatch(case.items, case.num_items, cached.batch.block_table)
    mfa_prefill_bf16(case.queries().bfloat16(), cached.cache, batch, out, SOFTMAX_SCALE)
    assert bool(out.isnan().all())
