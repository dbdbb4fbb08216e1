"""Times the FP8 MoE kernels beside torch's grouped and plain scaled matrix products.

`moe_fp8` is the whole layer: dispatch, both GEMMs with SwiGLU and quantisation, weighted sum;
`moe_fp8_gemms` is the two GEMM launches of it. torch's products take one scale per row, and nothing
is done between them: a lower bound of what a layer made of them takes.
"""

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from step3rt.bench.graph_timing import Launch, Row, measure_us
from step3rt.ops.moe_fp8 import (
    Fp8Experts,
    MoeTokens,
    allocate_moe_workspace,
    moe_down,
    moe_fp8,
    moe_gate_up,
    reference_expert,
)
from step3rt.ops.moe_layout import pack_down, pack_gate_up
from step3rt.ops.quantize import dequantize_blocks, dequantize_groups, quantize_groups

MIN_ROTATED_BYTES = 512 << 20
"""Launches of one graph cycle through this many bytes of weights, many times the L2."""
NUM_LAUNCHES = 8
NUM_CHECKED_TOKENS = 8
ERROR_BOUND = 2e-2
"""Of one token; tests/kernels/test_moe_fp8.py has the reasons."""
BLOCK = (128, 128)


@dataclass(frozen=True, slots=True)
class MoeShape:
    """`num_rows` token rows over `num_experts` local experts of H and I; 0 experts: a dense FFN."""

    num_experts: int
    num_rows: int
    hidden_size: int = 7168
    inner_size: int = 5120


MOE_SHAPES = {
    "E3xT64": MoeShape(3, 64),
    "E3xT256": MoeShape(3, 256),
    "E3xT768": MoeShape(3, 768),
    "E6xT256": MoeShape(6, 256),
    "E16xT768": MoeShape(16, 768),
    "dense T128": MoeShape(0, 128, inner_size=18432),
    "dense T256": MoeShape(0, 256, inner_size=18432),
}


def moe_rows(*, has_peers: bool) -> Iterator[Row]:
    """Checks, then times every shape: the whole layer, and its two GEMMs beside torch's."""
    for name, shape in MOE_SHAPES.items():
        bench = _MoeBench(shape)
        yield from bench.rows(name, has_peers=has_peers)
        del bench
        torch.cuda.empty_cache()


class _MoeBench:
    """One layer's tokens and rotated experts."""

    def __init__(self, shape: MoeShape) -> None:
        self.shape = shape
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.num_groups = max(shape.num_experts, 1)
        weight_bytes = 3 * self.num_groups * shape.hidden_size * shape.inner_size
        self.weight_bytes = weight_bytes
        self.gate_up = self._weight(2 * shape.inner_size, shape.hidden_size)
        self.down = self._weight(shape.hidden_size, shape.inner_size)
        self.sets = [self._experts(pack_gate_up(self.gate_up), pack_down(self.down))]
        while len(self.sets) * weight_bytes < MIN_ROTATED_BYTES:
            # Any bytes of normal values are a packed weight.
            self.sets.append(self._experts(self.gate_up.flatten(1), self.down.flatten(1).clone()))
            self.gate_up = self.gate_up.clone()
        self.tokens = self._tokens()
        num_columns = self.tokens.topk_ids.shape[1]
        self.workspace = allocate_moe_workspace(self.sets[0], shape.num_rows, num_columns)
        self.out = torch.full(
            (shape.num_rows, shape.hidden_size),
            float("nan"),
            dtype=torch.bfloat16,
            device=self.device,
        )

    def rows(self, name: str, *, has_peers: bool) -> Iterator[Row]:
        """Checks the first launch, then times the GEMMs and the layer."""
        moe_fp8(self.tokens, self.sets[0], self.workspace, self.out)
        self._check()
        peers = self.peers() if has_peers else {}
        gemms_us = self._measure(self._gemms)
        layer_us = self._measure(self._layer)
        yield self._row("moe_fp8", name, layer_us, {})
        yield self._row("moe_fp8_gemms", name, gemms_us, peers)

    def peers(self) -> dict[str, float]:
        """Times torch's scaled products of the same sizes, bf16 output, row-wise scales."""
        try:
            return {"torch_scaled_mm": round(self._torch_us(), 1)}
        except (RuntimeError, AttributeError) as error:  # a torch build without them
            sys.stderr.write(f"torch's scaled products did not run: {error}\n")
            return {}

    def _measure(self, launch: Callable[[Fp8Experts], None]) -> float:
        def bound(experts: Fp8Experts) -> Launch:
            return lambda: launch(experts)

        return measure_us([bound(self.sets[i % len(self.sets)]) for i in range(NUM_LAUNCHES)])

    def _row(self, kernel: str, name: str, us: float, peers: dict[str, float]) -> Row:
        flops = 6.0 * self.shape.num_rows * self.shape.hidden_size * self.shape.inner_size
        gb_per_s = round(self.weight_bytes / us / 1e3)
        return Row(kernel, name, round(us, 1), gb_per_s, flops / us / 1e6, peers)

    def _layer(self, experts: Fp8Experts) -> None:
        moe_fp8(self.tokens, experts, self.workspace, self.out)

    def _gemms(self, experts: Fp8Experts) -> None:
        moe_gate_up(experts, self.workspace)
        moe_down(experts, self.workspace)

    def _weight(self, rows: int, columns: int) -> torch.Tensor:
        shape = (self.num_groups, rows, columns)
        values = torch.empty(shape, dtype=torch.float8_e4m3fn, device=self.device)
        for group in range(self.num_groups):
            values[group] = torch.randn(shape[1:], device=self.device).to(values.dtype)
        return values

    def _experts(self, gate_up: torch.Tensor, down: torch.Tensor) -> Fp8Experts:
        hidden, inner = self.shape.hidden_size // 128, self.shape.inner_size // 128

        def scales(rows: int, columns: int) -> torch.Tensor:
            spread = torch.rand(self.num_groups, rows, columns, device=self.device) + 0.5
            return spread / math.sqrt(columns * 128)

        gate_up_scale, down_scale = scales(2 * inner, hidden), scales(hidden, inner)
        return Fp8Experts(gate_up, gate_up_scale, down, down_scale, 0, self.shape.num_experts)

    def _tokens(self) -> MoeTokens:
        """Every row is a token of its own, routed at random: experts get unequal numbers."""
        # Of the seeds 0..3 the one whose counts are spread as in the peers' measurements: 82 to 92
        # and 237 to 268 rows for 3 experts.
        num_rows, num_experts = self.shape.num_rows, self.shape.num_experts
        generator = torch.Generator().manual_seed(3)
        ids = torch.zeros(num_rows, 0, dtype=torch.int32)
        if num_experts > 0:
            ids = torch.randint(0, num_experts, (num_rows, 1), generator=generator).int()
        hidden = torch.randn(num_rows, self.shape.hidden_size, device=self.device)
        weights = torch.rand(ids.shape, device=self.device)
        return MoeTokens(*quantize_groups(hidden), ids.to(self.device), weights)

    def _check(self) -> None:
        """Compares a few tokens with the reference.

        Raises:
            RuntimeError: they differ by more than the bound, or hold NaN.
        """
        step = max(1, self.shape.num_rows // NUM_CHECKED_TOKENS)
        experts, f32 = self.sets[0], torch.float32
        for token in range(0, self.shape.num_rows, step):
            one = slice(token, token + 1)
            group, weight = 0, 1.0
            if self.shape.num_experts > 0:
                group = int(self.tokens.topk_ids[token, 0])
                weight = float(self.tokens.topk_weights[token, 0])
            want = weight * reference_expert(
                dequantize_groups(self.tokens.hidden[one], self.tokens.scales[one], f32),
                dequantize_blocks(self.gate_up[group], experts.gate_up_scale[group], BLOCK, f32),
                dequantize_blocks(self.down[group], experts.down_scale[group], BLOCK, f32),
            )
            error = float((self.out[one].float() - want).norm() / want.norm())
            if not error < ERROR_BOUND:
                raise RuntimeError(
                    f"moe_fp8 is wrong: relative error {error:.2e} in token {token} of "
                    f"{self.shape.num_rows}. Times of a wrong kernel mean nothing. Run "
                    "`pytest -m gpu tests/kernels`."
                )

    def _torch_us(self) -> float:
        shape, groups = self.shape, self.num_groups
        counts = torch.tensor([shape.num_rows])
        if shape.num_experts > 0:
            counts = torch.bincount(self.tokens.topk_ids[:, 0].cpu(), minlength=groups)
        offsets = counts.cumsum(0).int().to(self.device)
        ones = torch.ones(shape.num_rows, device=self.device)

        scaled_mm: Callable[..., torch.Tensor] = torch._scaled_mm
        scaled_grouped_mm: Callable[..., torch.Tensor] = torch._scaled_grouped_mm

        def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            """b: e4m3[G, N, K]."""
            scale = torch.ones(b.shape[:2], device=self.device)
            if groups == 1:
                return scaled_mm(
                    a,
                    b[0].T,
                    scale_a=ones[:, None],
                    scale_b=scale,
                    out_dtype=torch.bfloat16,
                    use_fast_accum=True,
                )
            return scaled_grouped_mm(
                a,
                b.transpose(1, 2),
                ones,
                scale,
                offs=offsets,
                out_dtype=torch.bfloat16,
                use_fast_accum=True,
            )

        inner = torch.randn(shape.num_rows, shape.inner_size, device=self.device)
        inner_fp8 = inner.to(torch.float8_e4m3fn)

        def both(experts: Fp8Experts) -> None:
            gate_up = experts.gate_up.view(groups, 2 * shape.inner_size, shape.hidden_size)
            product(self.tokens.hidden, gate_up)
            product(inner_fp8, experts.down.view(groups, shape.hidden_size, shape.inner_size))

        return self._measure(both)
