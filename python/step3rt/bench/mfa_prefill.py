"""Times MFA prefill beside torch's attention, on one GPU."""

import sys
from collections.abc import Iterator

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from step3rt.bench.graph_timing import Row, measure_us
from step3rt.ops.kv_cache import bf16_cache_shape, fp8_cache_shape, unpack_fp8_blocks
from step3rt.ops.mfa_prefill import (
    PrefillBatch,
    PrefillChunk,
    mfa_prefill_bf16,
    mfa_prefill_fp8,
    prefill_items,
    reference_mfa_prefill,
)
from step3rt.ops.mfa_schedule import BLOCK_SIZE_TOKENS, HEAD_DIM, PADDED_HEADS

SOFTMAX_SCALE = HEAD_DIM**-0.5
LAUNCHES = 8
NUM_CHECKED_TOKENS = 4
ERROR_BOUNDS = {"bf16": 5e-3, "fp8": 3e-2}
SHAPES = ((512, 0), (1024, 0), (2048, 0), (4096, 0), (512, 4096), (2048, 30_000))
"""Tokens of one sequence's chunk, and those before it. K and V fit in L2, as they do in a step."""


def prefill_rows(kv_format: str, *, has_peers: bool) -> Iterator[Row]:
    """Checks and times every shape; peers take whole prompts, K and V contiguous, in BF16.

    Raises:
        RuntimeError: a result is wrong.
    """
    for num_tokens, num_before in SHAPES:
        bench = _Bench(kv_format, num_tokens, num_before)
        row = bench.row()
        if has_peers and kv_format == "bf16" and num_before == 0:
            row.peers = _peers(num_tokens)
        yield row
        del bench
        torch.cuda.empty_cache()


class _Bench:
    """One chunk over a shuffled KV cache of one format."""

    def __init__(self, kv_format: str, num_tokens: int, num_before: int) -> None:
        self.kv_format = kv_format
        self.num_tokens, self.num_before = num_tokens, num_before
        device = torch.device("cuda", torch.cuda.current_device())
        num_blocks = -(-(num_before + num_tokens) // BLOCK_SIZE_TOKENS)
        q = torch.randn(num_tokens, PADDED_HEADS, HEAD_DIM, device=device)
        self.q_scale = q.abs().amax(dim=-1) / 448
        self.q = q.bfloat16()
        if kv_format == "fp8":
            self.q = (q / self.q_scale[..., None]).to(torch.float8_e4m3fn)
        # A row of normally distributed bytes is one in any layout: no need to pack.
        shape = bf16_cache_shape(num_blocks) if kv_format == "bf16" else fp8_cache_shape(num_blocks)
        self.cache = torch.randn(shape, device=device, dtype=torch.bfloat16)
        if kv_format == "fp8":
            self.cache = self.cache.to(torch.float8_e4m3fn).view(torch.uint8)
        self.out = torch.full(q.shape, float("nan"), dtype=torch.bfloat16, device=device)
        items = prefill_items([PrefillChunk(0, num_tokens, num_before, 0)]).to(device)
        self.batch = PrefillBatch(
            items=items,
            num_items=torch.tensor([len(items)], dtype=torch.int32, device=device),
            block_table=torch.randperm(num_blocks, device=device).int()[None],
        )

    def row(self) -> Row:
        """Checks a launch, then times several."""
        self._launch()
        self._check()
        us = measure_us([self._launch] * LAUNCHES)
        seen = self.num_tokens * self.num_before + self.num_tokens * (self.num_tokens + 1) / 2
        flops = 4.0 * seen * PADDED_HEADS * HEAD_DIM
        name = f"mfa_prefill_{self.kv_format}"
        shape = f"{self.num_tokens} after {self.num_before}"
        moved = self.q.numel() * self.q.element_size() + self.out.numel() * 2
        moved += self.cache.numel() * self.cache.element_size()
        return Row(name, shape, round(us, 1), round(moved / us / 1e3), flops / us / 1e6)

    def _launch(self) -> None:
        if self.kv_format == "bf16":
            mfa_prefill_bf16(self.q, self.cache, self.batch, self.out, SOFTMAX_SCALE)
        else:
            mfa_prefill_fp8(self.q, self.q_scale, self.cache, self.batch, self.out, SOFTMAX_SCALE)

    def _check(self) -> None:
        """Compares a few tokens with the reference.

        Raises:
            RuntimeError: they differ by more than the format's bound, or hold NaN.
        """
        kv, q = self.cache, self.q.float()
        if self.kv_format == "fp8":
            kv, q = unpack_fp8_blocks(self.cache).float(), q * self.q_scale[..., None]
        step = max(1, self.num_tokens // NUM_CHECKED_TOKENS)
        for row in [*range(0, self.num_tokens, step), self.num_tokens - 1]:
            chunk = PrefillChunk(0, 1, self.num_before + row, 0)
            table = self.batch.block_table
            want = reference_mfa_prefill(q[row : row + 1], kv, [chunk], table, SOFTMAX_SCALE)
            error = float((self.out[row].double() - want[0]).norm() / want.norm())
            if not error < ERROR_BOUNDS[self.kv_format]:
                raise RuntimeError(
                    f"mfa_prefill_{self.kv_format} is wrong: relative error {error:.2e} in token "
                    f"{row} of {self.num_tokens} after {self.num_before}. Times of a wrong kernel "
                    "mean nothing. Run `pytest -m gpu tests/kernels`."
                )


def _peers(num_tokens: int) -> dict[str, float]:
    """Times torch's SDPA on a whole prompt, causal, 64 query heads on one of K and V."""
    device = torch.device("cuda", torch.cuda.current_device())

    def heads(count: int) -> torch.Tensor:
        return torch.randn(1, count, num_tokens, HEAD_DIM, dtype=torch.bfloat16, device=device)

    q, keys, values = heads(PADDED_HEADS), heads(1), heads(1)

    def launch() -> None:
        torch.nn.functional.scaled_dot_product_attention(
            q, keys, values, is_causal=True, enable_gqa=True
        )

    results = {}
    for name, backend in (
        ("sdpa_cudnn_contiguous", SDPBackend.CUDNN_ATTENTION),
        ("sdpa_flash_contiguous", SDPBackend.FLASH_ATTENTION),
    ):
        try:
            with sdpa_kernel(backend):
                results[name] = round(measure_us([launch] * LAUNCHES), 1)
        except RuntimeError as error:  # a torch build without that backend
            sys.stderr.write(f"{name} did not run: {error}\n")
    return results
