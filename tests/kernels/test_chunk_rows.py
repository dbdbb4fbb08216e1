"""Rows of one sequence in one step: decode reads K and V that the launch before it has written."""

import pytest
import torch

from step3rt.ops.kv_cache import bf16_cache_shape, fp8_cache_shape
from step3rt.ops.mfa_decode import MfaBatch, mfa_decode_bf16, mfa_decode_fp8
from step3rt.ops.mfa_schedule import (
    BLOCK_SIZE_TOKENS,
    HEAD_DIM,
    allocate_schedule,
    mfa_schedule,
)
from step3rt.ops.rope_append import (
    RopeTokens,
    rope_append_bf16,
    rope_append_fp8,
    rotation_table,
)

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda", 0)
NUM_HEADS = 64
NAN_BYTE = 0x7F  # in e4m3; two of them are a NaN in bf16, too
ROUNDS = 10


class ChunkStep:
    """A step of T tokens of one sequence, from its start."""

    def __init__(self, num_tokens: int, *, is_fp8: bool) -> None:
        num_blocks = -(-num_tokens // BLOCK_SIZE_TOKENS)
        self.is_fp8 = is_fp8
        positions = torch.arange(num_tokens, dtype=torch.int32, device=DEVICE)
        blocks = torch.randperm(num_blocks, dtype=torch.int32, device=DEVICE)
        slots = blocks[positions.long() // BLOCK_SIZE_TOKENS] * BLOCK_SIZE_TOKENS
        slots = (slots + positions % BLOCK_SIZE_TOKENS).int()
        self.q = torch.randn(num_tokens, NUM_HEADS, HEAD_DIM, device=DEVICE).bfloat16()
        self.kv = torch.randn(num_tokens, 2 * HEAD_DIM, device=DEVICE).bfloat16()
        self.places = positions, slots
        self.table = rotation_table(num_tokens, 10_000.0, DEVICE)
        schedule = allocate_schedule(DEVICE)
        lengths = positions + 1
        mfa_schedule(lengths, schedule)
        table = blocks.expand(num_tokens, -1).contiguous()
        self.batch = MfaBatch(table, lengths, schedule)
        shape = fp8_cache_shape(num_blocks) if is_fp8 else bf16_cache_shape(num_blocks)
        dtype = torch.uint8 if is_fp8 else torch.bfloat16
        self.cache = torch.empty(shape, dtype=dtype, device=DEVICE)
        self.q_fp8 = (
            torch.empty(self.q.shape, dtype=torch.float8_e4m3fn, device=DEVICE),
            torch.empty(self.q.shape[:2], device=DEVICE),
        )

    def run(self, *, waits_between: bool) -> torch.Tensor:
        """Appends and attends; the cache holds NaN before."""
        self.cache.view(torch.uint8).fill_(NAN_BYTE)
        q, out = self.q.clone(), torch.full_like(self.q, float("nan"))
        tokens = RopeTokens(q, self.kv, *self.places)
        torch.cuda.synchronize()
        if self.is_fp8:
            rope_append_fp8(tokens, self.table, self.q_fp8, self.cache)
        else:
            rope_append_bf16(tokens, self.table, q, self.cache)
        if waits_between:
            torch.cuda.synchronize()
        if self.is_fp8:
            mfa_decode_fp8(*self.q_fp8, self.cache, self.batch, out, 1 / 16)
        else:
            mfa_decode_bf16(q, self.cache, self.batch, out, 1 / 16)
        return out


@pytest.mark.parametrize("is_fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("num_tokens", [65, 200, 1024])
def test_rows_see_the_tokens_of_their_own_step(num_tokens: int, is_fp8: bool) -> None:
    step = ChunkStep(num_tokens, is_fp8=is_fp8)
    expected = step.run(waits_between=True)
    assert bool(torch.isfinite(expected).all())
    for _ in range(ROUNDS):
        assert torch.equal(step.run(waits_between=False), expected)
