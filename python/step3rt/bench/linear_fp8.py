"""Times the FP8 projections and torch's, and finds the fastest variant of the kernel.

`python -m step3rt.bench.linear_fp8` prints the table of `ops/linear_fp8_choice.py`; the rows of
`step3rt bench kernels` use what that table says.
"""

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence

import torch

from step3rt.bench.graph_timing import MIN_ROTATED_BYTES, Launch, Row, measure_us
from step3rt.ops.linear_fp8 import linear_fp8, reference_linear_fp8
from step3rt.ops.linear_fp8_choice import choose_variant
from step3rt.ops.linear_fp8_variant import LinearVariant
from step3rt.ops.quantize import GROUP_SIZE, quantize_groups

PROJECTIONS = {"qkv": (2560, 7168), "wq": (16384, 2048), "o_proj": (7168, 16384)}
"""Outputs and inputs."""
TOKENS = (1, 64, 128, 256, 512, 1024, 2048)
ERROR_BOUND = 2e-3
MIN_LAUNCHES = 16
_SHARED_BYTES = 227 * 1024
_MAX_CLUSTER = 8
_MIN_CTAS = 80
_MAX_SPLIT_CTAS = 132
"""A cut of K that needs more than one CTA for each SM saves nothing."""


def linear_rows(has_peers: bool) -> Iterator[Row]:
    """Measures every projection and number of tokens."""
    for name, shape in PROJECTIONS.items():
        bench = _LinearBench(*shape)
        for num_tokens in TOKENS:
            bench.set_tokens(num_tokens)
            variant = choose_variant(num_tokens, *shape)
            bench.check(variant)
            us = bench.measure(variant)
            flops = 2.0 * num_tokens * shape[0] * shape[1]
            moved = shape[0] * shape[1]
            row = Row(
                "proj_fp8",
                f"{name} M{num_tokens}",
                round(us, 1),
                round(moved / us / 1e3),
                flops / us / 1e6,
            )
            if has_peers:
                row.peers = bench.peers()
            yield row
        del bench
        torch.cuda.empty_cache()


def main(argv: Sequence[str] | None = None) -> int:
    """Measures every variant that fits and prints the fastest ones. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="step3rt.bench.linear_fp8", description=__doc__)
    parser.add_argument("--top", type=int, default=1, help="variants to print for each size")
    parser.add_argument("--only", default="", help="projections whose name contains this")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        sys.stderr.write("No GPU of compute capability 9.0 found. The kernel is for Hopper.\n")
        return 1
    for name, shape in PROJECTIONS.items():
        if options.only not in name:
            continue
        sys.stdout.write(f"    {shape}: (  # {name}\n")
        bench = _LinearBench(*shape)
        for num_tokens in TOKENS:
            bench.set_tokens(num_tokens)
            times = []
            for variant in candidates(num_tokens, *shape):
                bench.check(variant)
                times.append((bench.measure(variant), variant))
            for us, variant in sorted(times, key=lambda item: item[0])[: options.top]:
                sys.stdout.write(f"        ({num_tokens}, {variant}),  # {us:.1f} us\n")
            sys.stdout.flush()
        sys.stdout.write("    ),\n")
    return 0


def candidates(num_tokens: int, num_outputs: int, num_inputs: int) -> Iterator[LinearVariant]:
    """Variants worth measuring: whole clusters, three stages, and a CTA for most SMs."""
    for tile_m, tile_n in itertools.product((64, 128, 256), (64, 80, 112, 128, 160)):
        if tile_m * tile_n > 256 * 128 or tile_m >= 2 * max(num_tokens, 64):
            continue
        stages = min(9, _SHARED_BYTES // ((tile_m + tile_n + 8) * GROUP_SIZE))
        for split, cast, share in itertools.product(range(1, _MAX_CLUSTER + 1), (1, 2, 4), (1, 2)):
            if stages < 3 or split * cast * share > _MAX_CLUSTER:
                continue
            if share > 1 and num_tokens <= tile_m:
                continue
            chunk = _chunk(tile_m, tile_n)
            variant = LinearVariant(tile_m, tile_n, split, cast, stages, 1, chunk, share)
            num_ctas = variant.num_ctas(num_tokens, num_outputs)
            if num_ctas < _MIN_CTAS or (split > 1 and num_ctas > _MAX_SPLIT_CTAS):
                continue
            if variant.fits(num_outputs, num_inputs):
                yield variant


def _chunk(tile_m: int, tile_n: int) -> int:
    """The longest chunk whose products fit in registers beside the sums."""
    if tile_m == 256:
        return 2 if tile_n <= 80 else 1 if tile_n <= 112 else 0
    return 4 if tile_n <= 128 else 0


class _LinearBench:
    """One weight, as many copies of it as the rotation needs, and rows of one number of tokens."""

    def __init__(self, num_outputs: int, num_inputs: int) -> None:
        device = torch.device("cuda", torch.cuda.current_device())
        self.device = device
        self.shape = (num_outputs, num_inputs)
        num_weights = -(-MIN_ROTATED_BYTES // (num_outputs * num_inputs))
        weight = (torch.randn(self.shape, device=device) * 100).clamp(-448, 448)
        weight = weight.to(torch.float8_e4m3fn)
        self.weights = [weight] + [weight.clone() for _ in range(num_weights - 1)]
        blocks = (num_outputs // GROUP_SIZE, num_inputs // GROUP_SIZE)
        self.weight_scale = torch.rand(blocks, device=device) * 1e-3 + 1e-4

    def set_tokens(self, num_tokens: int) -> None:
        """Draws new rows."""
        num_outputs, num_inputs = self.shape
        self.x, self.x_scale = quantize_groups(
            torch.randn(num_tokens, num_inputs, device=self.device)
        )
        self.out = torch.empty(num_tokens, num_outputs, dtype=torch.bfloat16, device=self.device)
        self.want = reference_linear_fp8(self.x, self.x_scale, self.weights[0], self.weight_scale)

    def check(self, variant: LinearVariant) -> None:
        """Compares one launch with the reference.

        Raises:
            RuntimeError: they differ by more than the bound, or hold NaN.
        """
        self.out.fill_(float("nan"))
        self._launch(self.weights[0], variant)
        error = float((self.out.double() - self.want).norm() / self.want.norm())
        if not error < ERROR_BOUND:
            raise RuntimeError(
                f"linear_fp8 is wrong: relative error {error:.2e} for {len(self.x)} tokens and a "
                f"weight of {self.shape} with {variant}. Times of a wrong kernel mean nothing. "
                "Run `pytest -m gpu tests/kernels/test_linear_fp8.py`."
            )

    def measure(self, variant: LinearVariant) -> float:
        """Microseconds of one launch."""
        return measure_us([self._bound(weight, variant) for weight in self._rotation()])

    def peers(self) -> dict[str, float]:
        """Times torch's products: scaled by blocks, as ours, and by rows, which is less work."""
        num_outputs = self.shape[0]
        ones = torch.ones(len(self.x), 1, device=self.device)
        outputs = torch.ones(1, num_outputs, device=self.device)
        by_blocks = (self.x_scale.t().contiguous().t(), self.weight_scale.t())
        results = {}
        for name, (x_scale, w_scale), is_fast in (
            ("scaled_mm_blockwise", by_blocks, False),
            ("scaled_mm_rowwise", (ones, outputs), True),
        ):
            launches: list[Launch] = []
            for weight in self._rotation():

                def launch(
                    weight: torch.Tensor = weight,
                    x_scale: torch.Tensor = x_scale,
                    w_scale: torch.Tensor = w_scale,
                    is_fast: bool = is_fast,
                ) -> None:
                    torch._scaled_mm(
                        self.x,
                        weight.t(),
                        x_scale,
                        w_scale,
                        out_dtype=torch.bfloat16,
                        use_fast_accum=is_fast,
                    )

                launches.append(launch)
            try:
                results[name] = round(measure_us(launches), 1)
            except RuntimeError as error:  # a torch build without it
                sys.stderr.write(f"{name} did not run: {error}\n")
        return results

    def _rotation(self) -> list[torch.Tensor]:
        return self.weights * max(1, -(-MIN_LAUNCHES // len(self.weights)))

    def _bound(self, weight: torch.Tensor, variant: LinearVariant) -> Launch:
        return lambda: self._launch(weight, variant)

    def _launch(self, weight: torch.Tensor, variant: LinearVariant) -> None:
        linear_fp8(self.x, self.x_scale, weight, self.weight_scale, self.out, variant)


if __name__ == "__main__":
    sys.exit(main())
