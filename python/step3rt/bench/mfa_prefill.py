"""Times MFA prefill beside torch's attention, on one GPU.

A row's shape is `1xTOKENS`, a whole prompt, or `1xTOKENS+BEFORE`, a chunk of one with so many
tokens before it. Peers take contiguous K and V in BF16; `mfa_decode_rows` is our decode kernel,
which gives every token of the chunk a row of its own.
"""

import sys
from collections.abc import Callable, Iterator, Sequence

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from step3rt.bench.graph_timing import Launch, Row, measure_us
from step3rt.ops.kv_cache import bf16_cache_shape, fp8_cache_shape, unpack_fp8_blocks
from step3rt.ops.mfa_decode import MfaBatch, mfa_decode_bf16, mfa_decode_fp8
from step3rt.ops.mfa_prefill import (
    PrefillBatch,
    PrefillChunk,
    mfa_prefill_bf16,
    mfa_prefill_fp8,
    prefill_items,
    reference_mfa_prefill,
)
from step3rt.ops.mfa_schedule import (
    BLOCK_SIZE_TOKENS,
    HEAD_DIM,
    MAX_SEQUENCES,
    PADDED_HEADS,
    allocate_schedule,
    mfa_schedule,
)

SOFTMAX_SCALE = HEAD_DIM**-0.5
LAUNCHES = 8
NUM_CHECKED_TOKENS = 4
ERROR_BOUNDS = {"bf16": 5e-3, "fp8": 3e-2}
PEER_BOUND = 2e-2
SHAPES = (
    *((num_tokens, 0) for num_tokens in (512, 1024, 2048, 4096)),
    *((num_tokens, 8192) for num_tokens in (64, 128, 256, 512, 1024, 2048, 4096)),
)
"""Tokens of one sequence's chunk, and those before it. K and V fit in L2, as they do in a step. The
short ones are there for `mfa_prefill_choice.PAIR_COST_ROWS`: with which does prefill begin to win?
"""


def prefill_rows(
    kv_format: str,
    *,
    has_peers: bool,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    device: torch.device | None = None,
) -> Iterator[Row]:
    """Checks and times every shape.

    Raises:
        RuntimeError: a result is wrong.
    """
    if device is None:
        device = torch.device("cuda", torch.cuda.current_device())
    for num_tokens, num_before in shapes:
        bench = _Bench(kv_format, num_tokens, num_before, device)
        row = bench.row()
        row.peers["mfa_decode_rows"] = bench.decode_us()
        if has_peers and kv_format == "bf16":
            row.peers |= _Peers(num_tokens, num_before, device).times_us()
        yield row
        del bench
        if device.type == "cuda":
            torch.cuda.empty_cache()


class _Bench:
    """One chunk over a shuffled KV cache of one format."""

    def __init__(
        self, kv_format: str, num_tokens: int, num_before: int, device: torch.device
    ) -> None:
        self.kv_format = kv_format
        self.num_tokens, self.num_before = num_tokens, num_before
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
        self._check("mfa_prefill")
        us = measure_us([self._launch] * LAUNCHES)
        seen = self.num_tokens * self.num_before + self.num_tokens * (self.num_tokens + 1) / 2
        flops = 4.0 * seen * PADDED_HEADS * HEAD_DIM
        name = f"mfa_prefill_{self.kv_format}"
        shape = f"1x{self.num_tokens}"
        if self.num_before:
            shape += f"+{self.num_before}"
        moved = self.q.numel() * self.q.element_size() + self.out.numel() * 2
        moved += self.cache.numel() * self.cache.element_size()
        return Row(name, shape, round(us, 1), round(moved / us / 1e3), flops / us / 1e6)

    def decode_us(self) -> float:
        """Checks and times the decode kernel on the same rows, as many at a time as it takes."""
        device = self.q.device
        launches = []
        for start in range(0, self.num_tokens, MAX_SEQUENCES):
            rows = slice(start, min(start + MAX_SEQUENCES, self.num_tokens))
            lengths = torch.arange(rows.start + 1, rows.stop + 1, device=device) + self.num_before
            schedule = allocate_schedule(device)
            batch = MfaBatch(
                block_table=self.batch.block_table.expand(len(lengths), -1).contiguous(),
                seq_lens=lengths.int(),
                schedule=schedule,
            )
            mfa_schedule(batch.seq_lens, schedule)
            launches.append(self._decode(rows, batch))
        self.out.fill_(float("nan"))
        for launch in launches:
            launch()
        self._check("mfa_decode")
        return round(measure_us(launches * LAUNCHES) * len(launches), 1)

    def _launch(self) -> None:
        if self.kv_format == "bf16":
            mfa_prefill_bf16(self.q, self.cache, self.batch, self.out, SOFTMAX_SCALE)
        else:
            mfa_prefill_fp8(self.q, self.q_scale, self.cache, self.batch, self.out, SOFTMAX_SCALE)

    def _decode(self, rows: slice, batch: MfaBatch) -> Launch:
        q, q_scale, out = self.q[rows], self.q_scale[rows], self.out[rows]

        def launch() -> None:
            if self.kv_format == "bf16":
                mfa_decode_bf16(q, self.cache, batch, out, SOFTMAX_SCALE)
            else:
                mfa_decode_fp8(q, q_scale, self.cache, batch, out, SOFTMAX_SCALE)

        return launch

    def _check(self, kernel: str) -> None:
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
                    f"{kernel}_{self.kv_format} is wrong: relative error {error:.2e} in token "
                    f"{row} of {self.num_tokens} after {self.num_before}. Times of a wrong kernel "
                    "mean nothing. Run `pytest -m gpu tests/kernels`."
                )


class _Peers:
    """torch's attention on one chunk: 64 query heads on one of K and V, contiguous, in BF16."""

    def __init__(self, num_tokens: int, num_before: int, device: torch.device) -> None:
        self.num_before = num_before

        def heads(count: int, length: int) -> torch.Tensor:
            shape = (1, count, length, HEAD_DIM)
            return torch.randn(shape, dtype=torch.bfloat16, device=device)

        self.q = heads(PADDED_HEADS, num_tokens)
        self.keys, self.values = (heads(1, num_before + num_tokens) for _ in range(2))

    def times_us(self) -> dict[str, float]:
        """Times what this build of torch has; says of the rest why it did not run.

        Behind a context, cuDNN's causal mask would begin at the context's start. It gets two calls,
        the context without a mask and the chunk; what would merge their results is left out.
        """
        results: dict[str, float] = {}
        cudnn, flash = SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION
        if self.num_before:
            results |= self._time("sdpa_cudnn_two_calls", cudnn, self._two_calls)
            results |= self._time("sdpa_flash_contiguous", flash, self._lower_right)
        else:
            results |= self._time("sdpa_cudnn_contiguous", cudnn, self._whole)
            results |= self._time("sdpa_flash_contiguous", flash, self._whole)
        return results

    def _time(
        self, name: str, backend: SDPBackend, attend: Callable[[], torch.Tensor]
    ) -> dict[str, float]:
        def launch() -> None:
            attend()

        try:
            with sdpa_kernel(backend):
                if attend != self._two_calls:
                    self._check(name, attend())
                return {name: round(measure_us([launch] * LAUNCHES), 1)}
        except RuntimeError as error:  # a torch build without that backend
            sys.stderr.write(f"{name} did not run: {error}\n")
            return {}

    def _whole(self) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            self.q, self.keys, self.values, is_causal=True, enable_gqa=True
        )

    def _lower_right(self) -> torch.Tensor:
        # Not SDPA, which takes its causal mask to begin at the context's start; this one ends at
        # the context's end.
        attend = torch.ops.aten._scaled_dot_product_flash_attention
        out: torch.Tensor = attend(self.q, self.keys, self.values, 0.0, True, False)[0]
        return out

    def _two_calls(self) -> torch.Tensor:
        context, chunk = slice(None, self.num_before), slice(self.num_before, None)
        attend = torch.nn.functional.scaled_dot_product_attention
        attend(self.q, self.keys[:, :, context], self.values[:, :, context], enable_gqa=True)
        keys, values = self.keys[:, :, chunk], self.values[:, :, chunk]
        return attend(self.q, keys, values, is_causal=True, enable_gqa=True)

    def _check(self, name: str, out: torch.Tensor) -> None:
        """Looks whether the first token sees what is before it and itself, and nothing else.

        Raises:
            RuntimeError: it does not.
        """
        keys = self.keys[0, 0, : self.num_before + 1].double()
        values = self.values[0, 0, : self.num_before + 1].double()
        scores = self.q[0, :, 0].double() @ keys.T * SOFTMAX_SCALE
        want = scores.softmax(dim=-1) @ values
        error = float((out[0, :, 0].double() - want).norm() / want.norm())
        if not error < PEER_BOUND:
            raise RuntimeError(f"{name} computes something else: relative error {error:.2e}")
