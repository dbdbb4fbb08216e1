"""Random decode batches for the MFA kernel tests, on one CUDA device or the CPU."""

from dataclasses import dataclass

import torch

from step3rt.ops.kv_cache import bf16_cache_shape, fp8_cache_shape, pack_fp8_blocks
from step3rt.ops.mfa_decode import MfaBatch, mfa_decode_bf16, mfa_decode_fp8, reference_mfa_decode
from step3rt.ops.mfa_schedule import BLOCK_SIZE_TOKENS, HEAD_DIM, allocate_schedule, mfa_schedule
from step3rt.ops.quantize_groups import quantize_groups_fp8
from step3rt.ops.rmsnorm_quantize import QuantizedRows

SOFTMAX_SCALE = HEAD_DIM**-0.5
DEVICE = torch.device("cuda", 0)


def make_batch(
    seq_lens: list[int], num_ctas: int | None = None, device: torch.device = DEVICE
) -> tuple[MfaBatch, int]:
    """Gives every sequence its own blocks in random order; returns the batch and the pool size."""
    counts = [-(-length // BLOCK_SIZE_TOKENS) for length in seq_lens]
    num_blocks = sum(counts) + 3
    order = torch.randperm(num_blocks, dtype=torch.int32)
    # Unused entries of the table name no block: reading one would fault.
    table = torch.full((len(seq_lens), max(counts) + 2), 2**30, dtype=torch.int32)
    start = 0
    for row, count in enumerate(counts):
        table[row, :count] = order[start : start + count]
        start += count
    schedule = allocate_schedule(device, num_ctas)
    lens = torch.tensor(seq_lens, dtype=torch.int32, device=device)
    mfa_schedule(lens, schedule)
    return MfaBatch(table.to(device), lens, schedule), num_blocks


def used_slots(batch: MfaBatch, num_blocks: int) -> torch.Tensor:
    """bool[B, 64]: which token slots of the pool belong to a sequence."""
    device = batch.seq_lens.device
    used = torch.zeros(num_blocks, BLOCK_SIZE_TOKENS, dtype=torch.bool, device=device)
    positions = torch.arange(BLOCK_SIZE_TOKENS, device=device)
    for row, length in enumerate(batch.seq_lens.tolist()):
        for index in range(-(-length // BLOCK_SIZE_TOKENS)):
            valid = positions < length - index * BLOCK_SIZE_TOKENS
            used[batch.block_table[row, index].long()] = valid
    return used


@dataclass
class Bf16Case:
    """A BF16 decode launch and its float64 reference; unused slots of the cache hold NaN."""

    batch: MfaBatch
    q: torch.Tensor
    cache: torch.Tensor

    def run(self) -> torch.Tensor:
        out = torch.full_like(self.q, float("nan"))
        self.run_into(out)
        return out

    def run_into(self, out: torch.Tensor | QuantizedRows) -> None:
        mfa_decode_bf16(self.q, self.cache, self.batch, out, SOFTMAX_SCALE)

    def reference(self) -> torch.Tensor:
        table, lens = self.batch.block_table, self.batch.seq_lens
        return reference_mfa_decode(self.q, self.cache, table, lens, SOFTMAX_SCALE)


@dataclass
class Fp8Case:
    """The same with an FP8 cache; `dense` e4m3[B, 2, 64, 256] is the cache unpacked."""

    batch: MfaBatch
    q: torch.Tensor
    q_scale: torch.Tensor
    cache: torch.Tensor
    dense: torch.Tensor
    kv_scale: tuple[float, float]

    def run(self) -> torch.Tensor:
        out = torch.full(self.q.shape, float("nan"), dtype=torch.bfloat16, device=self.q.device)
        self.run_into(out)
        return out

    def run_into(self, out: torch.Tensor | QuantizedRows) -> None:
        mfa_decode_fp8(
            self.q, self.q_scale, self.cache, self.batch, out, SOFTMAX_SCALE, self.kv_scale
        )

    def reference(self) -> torch.Tensor:
        q = self.q.float() * self.q_scale[..., None]
        scale = torch.tensor(self.kv_scale, device=self.q.device)[:, None, None]
        kv = self.dense.float() * scale
        table, lens = self.batch.block_table, self.batch.seq_lens
        return reference_mfa_decode(q, kv, table, lens, SOFTMAX_SCALE)


def make_bf16_case(
    seq_lens: list[int],
    num_heads: int = 64,
    num_ctas: int | None = None,
    spread: float = 1.0,
    device: torch.device = DEVICE,
) -> Bf16Case:
    """`spread` scales the queries: the standard deviation of the scores."""
    batch, num_blocks = make_batch(seq_lens, num_ctas, device)
    shape = (len(seq_lens), num_heads, HEAD_DIM)
    q = (torch.randn(shape, device=device) * spread).bfloat16()
    cache = torch.randn(bf16_cache_shape(num_blocks), device=device, dtype=torch.bfloat16)
    unused = ~used_slots(batch, num_blocks)
    cache[unused[:, None].expand(-1, 2, -1)] = float("nan")
    return Bf16Case(batch, q, cache)


def make_fp8_case(
    seq_lens: list[int],
    num_heads: int = 64,
    num_ctas: int | None = None,
    spread: float = 1.0,
    value_mean: float = 0.0,
    device: torch.device = DEVICE,
) -> Fp8Case:
    """`value_mean` shifts V, so that a bias of the accumulation shows up in the output."""
    batch, num_blocks = make_batch(seq_lens, num_ctas, device)
    shape = (len(seq_lens), num_heads, HEAD_DIM)
    exact_q = torch.randn(shape, device=device) * spread
    q_scale = exact_q.abs().amax(dim=-1) / 448
    q = (exact_q / q_scale[..., None]).to(torch.float8_e4m3fn)
    kv = torch.randn(bf16_cache_shape(num_blocks), device=device, dtype=torch.bfloat16)
    kv[:, 1] += value_mean
    kv_scale = (0.5, 0.25)
    dense = (kv / torch.tensor(kv_scale, device=device)[:, None, None]).to(torch.float8_e4m3fn)
    unused = ~used_slots(batch, num_blocks)
    poisoned = dense.view(torch.uint8)
    poisoned[unused[:, None].expand(-1, 2, -1)] = 0x7F  # e4m3 NaN
    cache = pack_fp8_blocks(dense)
    assert cache.shape == fp8_cache_shape(num_blocks)
    return Fp8Case(batch, q, q_scale, cache, dense, kv_scale)


def poisoned_rows(num_rows: int, width: int, device: torch.device) -> QuantizedRows:
    """Rows of NaN with scales of NaN."""
    rows = QuantizedRows.empty(num_rows, width, device)
    rows.values.view(torch.uint8).fill_(0x7F)
    rows.scales.fill_(float("nan"))
    return rows


def same_rows(got: QuantizedRows, want: QuantizedRows) -> bool:
    """Whether all bits are equal, those of NaN too."""
    same_values = torch.equal(got.values.view(torch.uint8), want.values.view(torch.uint8))
    return same_values and torch.equal(got.scales.view(torch.int32), want.scales.view(torch.int32))


def quantizes_its_output(case: Bf16Case | Fp8Case) -> bool:
    """Whether rows are, bit for bit, what quantising the bf16 output gives; nothing else changes.

    The rows lie between two that belong to no sequence.
    """
    num_sequences, num_heads, _ = case.q.shape
    width, device = num_heads * HEAD_DIM, case.q.device
    want = poisoned_rows(num_sequences + 2, width, device)
    got = poisoned_rows(num_sequences + 2, width, device)
    middle = slice(1, num_sequences + 1)
    quantize_groups_fp8(case.run().flatten(1), cut_rows(want, middle))
    case.run_into(cut_rows(got, middle))
    return same_rows(got, want) and bool(cut_rows(got, middle).scales.isfinite().all())


def cut_rows(rows: QuantizedRows, part: slice) -> QuantizedRows:
    return QuantizedRows(rows.values[part], rows.scales[part])


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    """Returns |out - reference| / |reference| over all elements; NaN if any element is."""
    difference = (out.double() - reference).norm()
    return float(difference / reference.norm().clamp(min=1e-30))
