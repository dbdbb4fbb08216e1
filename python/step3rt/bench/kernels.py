"""Times the CUDA kernels and the library kernels that do the same work, on one GPU.

Prints a table or the JSON document of docs/results. Every result is checked before it is timed, and
no setting of the GPU is changed.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from step3rt.bench.attention_layer import attention_layer_rows
from step3rt.bench.commit import measured_commit
from step3rt.bench.graph_timing import MIN_ROTATED_BYTES, Launch, Row, measure_us
from step3rt.bench.linear_fp8 import linear_rows
from step3rt.bench.mfa_prefill import prefill_rows
from step3rt.bench.moe_fp8 import moe_rows
from step3rt.bench.small_kernels import small_kernel_rows
from step3rt.ops.compile import CompileError
from step3rt.ops.kv_cache import bf16_cache_shape, fp8_cache_shape, unpack_fp8_blocks
from step3rt.ops.mfa_decode import (
    MfaBatch,
    mfa_decode_bf16,
    mfa_decode_fp8,
    reference_mfa_decode,
)
from step3rt.ops.mfa_schedule import (
    BLOCK_SIZE_TOKENS,
    HEAD_DIM,
    PADDED_HEADS,
    allocate_schedule,
    mfa_schedule,
)
from step3rt.ops.rope_append import (
    RopeTokens,
    rope_append_bf16,
    rope_append_fp8,
    rotation_table,
)

SOFTMAX_SCALE = HEAD_DIM**-0.5
MIN_LAUNCHES = 4
NUM_CHECKED_SEQUENCES = 4
ERROR_BOUNDS = {"bf16": 5e-3, "fp8": 3e-2}

ATTENTION_SHAPES = ((128, 4096), (256, 4096), (256, 8192), (128, 32768))

ROPE_TOKENS = (128, 256)
ROPE_LAUNCHES = 20
ROPE_L2_BATCHES = 2
"""Rotated batches that stay in L2, where the projection before leaves the queries."""
ROPE_HBM_BATCHES = 10
"""Rotated batches beyond the L2."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the selected benchmarks and prints them. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="step3rt bench kernels", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the JSON document, no table")
    parser.add_argument("--out", type=Path, help="also write the JSON document to this file")
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    parser.add_argument("--no-peers", action="store_true", help="time only our kernels")
    parser.add_argument("--ctas", type=int, help="SMs for attention (default: all)")
    options = parser.parse_args(argv)

    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        sys.stderr.write(
            "error: No GPU of compute capability 9.0 was found. The kernels are for Hopper. Run it "
            "on an H100 or H200\n"
        )
        return os.EX_UNAVAILABLE
    rows = []
    status = 0
    try:
        for row in _measure(options):
            rows.append(row)
            if not options.json:
                sys.stdout.write(_format(row))
                sys.stdout.flush()
    except (RuntimeError, CompileError) as error:  # a wrong result; what was measured stands
        sys.stderr.write(f"{error}\n")
        status = 1
    document = json.dumps(_document(rows, argv), indent=1)
    if options.out is not None:
        options.out.write_text(document + "\n")
    if options.json:
        sys.stdout.write(document + "\n")
    return status


def _measure(options: argparse.Namespace) -> Iterator[Row]:
    shapes = [(f"{count}x{length}", [length] * count) for count, length in ATTENTION_SHAPES]
    shapes.append(("256x8192 varlen", _varied_lengths(256, 8192)))
    for kv_format in ("bf16", "fp8"):
        if options.only in f"mfa_decode_{kv_format}":
            for name, seq_lens in shapes:
                bench = _AttentionBench(kv_format, seq_lens, options.ctas)
                row = bench.row(name)
                if kv_format == "bf16" and not options.no_peers and len(set(seq_lens)) == 1:
                    row.peers = bench.peers()
                yield row
                del bench
                torch.cuda.empty_cache()
        if options.only in f"mfa_prefill_{kv_format}":
            yield from prefill_rows(kv_format, has_peers=not options.no_peers)
        if options.only in f"rope_append_{kv_format}":
            for num_tokens in ROPE_TOKENS:
                yield _rope_row(kv_format, num_tokens, f"T{num_tokens}", ROPE_L2_BATCHES)
            yield _rope_row(kv_format, num_tokens, f"T{num_tokens} from HBM", ROPE_HBM_BATCHES)
    if any(options.only in f"attention_layer_{name}" for name in ("fp8", "bf16")):
        yield from attention_layer_rows()
    if options.only in "proj_fp8":
        yield from linear_rows(has_peers=not options.no_peers)
    if options.only in "moe_fp8_gemms":
        yield from moe_rows(has_peers=not options.no_peers)

    yield from small_kernel_rows(options.only, has_peers=not options.no_peers)


class _AttentionBench:
    """Decode batches over rotated, shuffled KV caches of one format."""

    def __init__(self, kv_format: str, seq_lens: list[int], num_ctas: int | None) -> None:
        self.kv_format = kv_format
        self.seq_lens = seq_lens
        device = torch.device("cuda", torch.cuda.current_device())
        self.device = device
        counts = [-(-length // BLOCK_SIZE_TOKENS) for length in seq_lens]
        num_blocks = sum(counts)
        element_bytes = 2 if kv_format == "bf16" else 1
        self.kv_bytes = sum(seq_lens) * 2 * HEAD_DIM * element_bytes
        self.num_caches = max(1, -(-MIN_ROTATED_BYTES // self.kv_bytes))

        self.q = torch.randn(len(seq_lens), PADDED_HEADS, HEAD_DIM, device=device).bfloat16()
        self.out = torch.full_like(self.q, float("nan"))
        self.q_scale = self.q.float().abs().amax(dim=-1) / 448
        self.q_fp8 = (self.q.float() / self.q_scale[..., None]).to(torch.float8_e4m3fn)
        # A row of normally distributed bytes is one in any layout: no need to pack.
        shape = bf16_cache_shape(num_blocks)
        if kv_format == "fp8":
            shape = fp8_cache_shape(num_blocks)
        self.caches = []
        for _ in range(self.num_caches):
            cache = torch.randn(shape, device=device, dtype=torch.bfloat16)
            if kv_format == "fp8":
                cache = cache.to(torch.float8_e4m3fn).view(torch.uint8)
            self.caches.append(cache)
        table = torch.zeros(len(seq_lens), max(counts), dtype=torch.int32)
        order = torch.randperm(num_blocks, dtype=torch.int32)
        start = 0
        for row, count in enumerate(counts):
            table[row, :count] = order[start : start + count]
            start += count
        lens = torch.tensor(seq_lens, dtype=torch.int32, device=device)
        schedule = allocate_schedule(device, num_ctas)
        mfa_schedule(lens, schedule)
        self.batch = MfaBatch(table.to(device), lens, schedule)

    def row(self, shape: str) -> Row:
        """Checks the first launch, then times all of them."""
        self._launch(self.caches[0])
        self._check()
        count = max(MIN_LAUNCHES, self.num_caches)
        launches = [self._bound(self.caches[i % self.num_caches]) for i in range(count)]
        us = measure_us(launches)
        flops = 4.0 * sum(self.seq_lens) * PADDED_HEADS * HEAD_DIM
        name = f"mfa_decode_{self.kv_format}"
        return Row(name, shape, round(us, 1), round(self.kv_bytes / us / 1e3), flops / us / 1e6)

    def peers(self) -> dict[str, float]:
        """Times torch's SDPA on a contiguous cache, heads folded into the rows of one query."""
        count, length = len(self.seq_lens), self.seq_lens[0]
        self.caches.clear()
        torch.cuda.empty_cache()
        shape = (count, 1, length, HEAD_DIM)
        pairs = [
            tuple(torch.randn(shape, device=self.device, dtype=torch.bfloat16) for _ in range(2))
            for _ in range(self.num_caches)
        ]
        q = self.q[:, None]
        results = {}
        for name, backend in (
            ("sdpa_cudnn_contiguous", SDPBackend.CUDNN_ATTENTION),
            ("sdpa_flash_contiguous", SDPBackend.FLASH_ATTENTION),
        ):
            launches = []
            for index in range(max(MIN_LAUNCHES, self.num_caches)):
                keys, values = pairs[index % self.num_caches]

                def launch(keys: torch.Tensor = keys, values: torch.Tensor = values) -> None:
                    torch.nn.functional.scaled_dot_product_attention(q, keys, values)

                launches.append(launch)
            try:
                with sdpa_kernel(backend):
                    results[name] = round(measure_us(launches), 1)
            except RuntimeError as error:  # a torch build without that backend
                sys.stderr.write(f"{name} did not run: {error}\n")
        return results

    def _bound(self, cache: torch.Tensor) -> Launch:
        return lambda: self._launch(cache)

    def _launch(self, cache: torch.Tensor) -> None:
        if self.kv_format == "bf16":
            mfa_decode_bf16(self.q, cache, self.batch, self.out, SOFTMAX_SCALE)
        else:
            mfa_decode_fp8(self.q_fp8, self.q_scale, cache, self.batch, self.out, SOFTMAX_SCALE)

    def _check(self) -> None:
        """Compares a few sequences with the reference.

        Raises:
            RuntimeError: they differ by more than the format's bound, or hold NaN.
        """
        cache = self.caches[0]
        step = max(1, len(self.seq_lens) // NUM_CHECKED_SEQUENCES)
        q = self.q if self.kv_format == "bf16" else self.q_fp8.float() * self.q_scale[..., None]
        for row in range(0, len(self.seq_lens), step):
            num_blocks = -(-self.seq_lens[row] // BLOCK_SIZE_TOKENS)
            blocks = cache[self.batch.block_table[row, :num_blocks].long()]
            kv = blocks if self.kv_format == "bf16" else unpack_fp8_blocks(blocks).float()
            table = torch.arange(num_blocks, dtype=torch.int32, device=self.device)[None]
            want = reference_mfa_decode(
                q[row : row + 1], kv, table, self.batch.seq_lens[row : row + 1], SOFTMAX_SCALE
            )
            error = float((self.out[row].double() - want[0]).norm() / want.norm())
            if not error < ERROR_BOUNDS[self.kv_format]:
                raise RuntimeError(
                    f"mfa_decode_{self.kv_format} is wrong: relative error {error:.2e} in sequence "
                    f"{row} of {len(self.seq_lens)}. Times of a wrong kernel mean nothing. Run "
                    "`pytest -m gpu tests/kernels`."
                )


def _rope_row(kv_format: str, num_tokens: int, name: str, num_batches: int) -> Row:
    """Times RoPE and append, one token per sequence; `num_batches` sets of queries rotate."""
    device = torch.device("cuda", torch.cuda.current_device())
    table = rotation_table(65536, 5e5, device)
    shape = (num_tokens, PADDED_HEADS, HEAD_DIM)
    positions = torch.randint(0, 65536, (num_tokens,), device=device).int()
    slots = (torch.randperm(num_tokens, device=device) * BLOCK_SIZE_TOKENS).int() + positions % 64
    launches: list[Launch] = []
    cache_shape, cache_dtype = bf16_cache_shape(num_tokens), torch.bfloat16
    if kv_format == "fp8":
        cache_shape, cache_dtype = fp8_cache_shape(num_tokens), torch.uint8
    cache = torch.zeros(cache_shape, dtype=cache_dtype, device=device)
    for _ in range(num_batches):
        fused = torch.randn(num_tokens, 2560, device=device).bfloat16()
        q = torch.randn(shape, device=device).bfloat16()
        tokens = RopeTokens(q, fused[:, 2048:], positions, slots)
        scales = torch.empty(shape[:2], device=device)
        out = torch.empty(shape, dtype=torch.float8_e4m3fn, device=device)

        def launch_bf16(tokens: RopeTokens = tokens) -> None:
            rope_append_bf16(tokens, table, tokens.q, cache)

        def launch_fp8(
            tokens: RopeTokens = tokens, out: torch.Tensor = out, scales: torch.Tensor = scales
        ) -> None:
            rope_append_fp8(tokens, table, (out, scales), cache)

        launches.append(launch_fp8 if kv_format == "fp8" else launch_bf16)
    us = measure_us(launches * (ROPE_LAUNCHES // num_batches))
    moved_bytes = q.numel() * (2 + out.element_size() if kv_format == "fp8" else 4)
    kernel = f"rope_append_{kv_format}"
    return Row(kernel, name, round(us, 2), round(moved_bytes / us / 1e3), 0.0)


def _varied_lengths(count: int, mean: int) -> list[int]:
    """Lengths from half to one and a half times the mean, in a fixed shuffled order."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(mean // 2, mean + mean // 2, (count,), generator=generator).tolist()


def _format(row: Row) -> str:
    peers = "  ".join(f"{name} {us:.1f}" for name, us in row.peers.items())
    speed = f"{row.us:9.1f} us {row.gb_per_s:6.0f} GB/s {row.tflops:6.0f} TFLOP/s"
    return f"{row.kernel:18} {row.shape:16} {speed}  {peers}\n"


def _document(rows: Sequence[Row], argv: Sequence[str] | None) -> dict[str, Any]:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    arguments = " ".join(argv if argv is not None else sys.argv[1:])
    name = torch.cuda.get_device_name()
    return {
        "machine": f"one {name}, CUDA {torch.version.cuda}, driver {driver.splitlines()[0]}",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": measured_commit(),
        "command": f"step3rt bench kernels {arguments}".strip(),
        "rows": [asdict(row) | {"tflops": round(row.tflops)} for row in rows],
    }


if __name__ == "__main__":
    sys.exit(main())
