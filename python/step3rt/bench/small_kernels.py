"""Times the kernels between the large ones: norms, quantisation, router, sampling.

Checks every kernel against its reference before it times it.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from step3rt.bench.graph_timing import Launch, Row, measure_us
from step3rt.ops.quantize import quantize_groups
from step3rt.ops.quantize_groups import quantize_groups_fp8
from step3rt.ops.rmsnorm_quantize import (
    HIDDEN_SIZE,
    QUERY_RANK,
    NormOutputs,
    QuantizedRows,
    add_rmsnorm_quantize,
    reference_add_rmsnorm_quantize,
    rmsnorm_quantize,
)
from step3rt.ops.router import route
from step3rt.ops.router_topk import MAX_EXPERTS, TOP_K, route_topk
from step3rt.ops.sample import (
    DeviceSamplingRow,
    Samples,
    SamplingBatch,
    pack_rows,
    sample_on_device,
)

TOKENS = (128, 256)
LAUNCHES = 20
L2_BATCHES = 2
"""Rotated batches that stay in L2, where the kernel before leaves them."""
HBM_BATCHES = 24
"""Rotated batches beyond the L2."""
NUM_FFN_INSTANCES = 3
ATTENTION_WIDTH = 16384
EPS = 1e-5

VOCAB_SIZE = 128_815
LOGIT_STRIDE = 128_832
SAMPLED_ROWS = 256
LOGIT_BATCHES = {torch.bfloat16: 5, torch.float32: 3}
"""Rotated logits: more than 256 MiB, and read from HBM."""

SAMPLING = {
    "greedy": DeviceSamplingRow(),
    "greedy, top 5 logprobs": DeviceSamplingRow(num_top=5),
    "temperature": DeviceSamplingRow(temperature=1.0),
    "top_p 0.95": DeviceSamplingRow(temperature=0.6, top_p=0.95),
    "top_k 50": DeviceSamplingRow(temperature=1.0, top_k=50),
    "min_p 0.05": DeviceSamplingRow(temperature=1.0, min_p=0.05),
    "penalties": DeviceSamplingRow(
        temperature=0.6, top_p=0.95, frequency=0.5, generated={31 * i: 1 for i in range(1000)}
    ),
}


def small_kernel_rows(only: str, *, has_peers: bool) -> Iterator[Row]:
    """Measures the kernels whose name contains `only`."""
    device = torch.device("cuda", torch.cuda.current_device())
    benches: dict[str, Callable[[int], Iterator[_Bench]]] = {
        "add_rmsnorm_quantize": lambda tokens: _add_norm(tokens, device),
        "rmsnorm_quantize_latent": lambda tokens: _latent_norm(tokens, device),
        "quantize_groups": lambda tokens: _quantize(tokens, device),
        "router_topk": lambda tokens: _router(tokens, device),
    }
    for name, make in benches.items():
        if only not in name:
            continue
        for num_tokens in TOKENS:
            for bench in make(num_tokens):
                yield bench.row(name, L2_BATCHES, "")
        for bench in make(num_tokens):
            yield bench.row(name, HBM_BATCHES, " from HBM")
    for dtype in LOGIT_BATCHES:
        name = f"sample_{'bf16' if dtype == torch.bfloat16 else 'f32'}"
        if only in name:
            yield from _sample_rows(name, dtype, device, has_peers=has_peers)


class _Bench:
    """A kernel at one shape: makes batches of inputs, launches and checks one."""

    def __init__(
        self, shape: str, moved_bytes: int, make: Callable[[], tuple[Launch, Callable[[], bool]]]
    ) -> None:
        self.shape = shape
        self.moved_bytes = moved_bytes
        self.make = make

    def row(self, kernel: str, num_batches: int, suffix: str) -> Row:
        """Checks the first batch, then times all.

        Raises:
            RuntimeError: the result is wrong.
        """
        batches = [self.make() for _ in range(num_batches)]
        launch, is_right = batches[0]
        launch()
        if not is_right():
            raise RuntimeError(
                f"{kernel} is wrong at {self.shape}. Times of a wrong kernel mean nothing. Run "
                "`pytest -m gpu tests/kernels`."
            )
        rounds = -(-LAUNCHES // num_batches)
        us = measure_us([launch for launch, _ in batches] * rounds)
        speed = round(self.moved_bytes / us / 1e3)
        return Row(kernel, self.shape + suffix, round(us, 2), speed, 0.0)


def _normal(*shape: int, device: torch.device) -> torch.Tensor:
    return torch.randn(shape, device=device).bfloat16()


def _is_quantised(rows: QuantizedRows, normed: torch.Tensor) -> bool:
    """Whether the rows are the tensor, but for its rounding to bf16 and e4m3."""
    values, scales = quantize_groups(normed)
    wrong = (rows.values.view(torch.uint8) != values.view(torch.uint8)).float().mean()
    return float(wrong) < 1e-2 and torch.allclose(rows.scales, scales, rtol=2**-6)


def _add_norm(num_tokens: int, device: torch.device) -> Iterator[_Bench]:
    """The output projection's result, and those of three FFN instances."""
    for num_partial_sums in (1, NUM_FFN_INSTANCES):

        def make(count: int = num_partial_sums) -> tuple[Launch, Callable[[], bool]]:
            residual = _normal(num_tokens, HIDDEN_SIZE, device=device)
            partial_sums = _normal(count, num_tokens, HIDDEN_SIZE, device=device)
            weight = _normal(HIDDEN_SIZE, device=device)
            rows = QuantizedRows.empty(num_tokens, HIDDEN_SIZE, device)
            out = NormOutputs(torch.empty_like(residual), quantized=rows)
            want = reference_add_rmsnorm_quantize(residual, partial_sums, weight, EPS)
            return (
                lambda: add_rmsnorm_quantize(residual, partial_sums, weight, out, EPS),
                lambda: _is_quantised(rows, want[1]),
            )

        moved_bytes = num_tokens * HIDDEN_SIZE * (2 * (2 + num_partial_sums) + 1)
        yield _Bench(f"T{num_tokens} n{num_partial_sums}", moved_bytes, make)


def _latent_norm(num_tokens: int, device: torch.device) -> Iterator[_Bench]:
    def make() -> tuple[Launch, Callable[[], bool]]:
        latent = _normal(num_tokens, QUERY_RANK + 512, device=device)[:, :QUERY_RANK]
        weight = _normal(QUERY_RANK, device=device)
        rows = QuantizedRows.empty(num_tokens, QUERY_RANK, device)
        nothing = latent.new_empty(0, num_tokens, QUERY_RANK)
        want = reference_add_rmsnorm_quantize(latent, nothing, weight, EPS)
        return (
            lambda: rmsnorm_quantize(latent, weight, rows, EPS),
            lambda: _is_quantised(rows, want[1]),
        )

    yield _Bench(f"T{num_tokens}", num_tokens * QUERY_RANK * 3, make)


def _quantize(num_tokens: int, device: torch.device) -> Iterator[_Bench]:
    def make() -> tuple[Launch, Callable[[], bool]]:
        x = _normal(num_tokens, ATTENTION_WIDTH, device=device)
        rows = QuantizedRows.empty(num_tokens, ATTENTION_WIDTH, device)
        return lambda: quantize_groups_fp8(x, rows), lambda: _is_quantised(rows, x)

    yield _Bench(f"T{num_tokens}", num_tokens * ATTENTION_WIDTH * 3, make)


def _router(num_tokens: int, device: torch.device) -> Iterator[_Bench]:
    def make() -> tuple[Launch, Callable[[], bool]]:
        hidden = _normal(num_tokens, HIDDEN_SIZE, device=device)
        gate = _normal(MAX_EXPERTS, HIDDEN_SIZE, device=device)
        ids = torch.empty(num_tokens, TOP_K, dtype=torch.int32, device=device)
        weights = torch.empty(num_tokens, TOP_K, device=device)
        logits = torch.empty(num_tokens, MAX_EXPERTS, dtype=torch.bfloat16, device=device)
        topk = (ids, weights)

        def is_right() -> bool:
            route_topk(hidden, gate, topk, is_normalised=False, logits=logits)
            want_ids, _ = route(logits.cpu(), TOP_K, is_normalised=False)
            exact = hidden.double() @ gate.double().T
            close = torch.allclose(logits.double(), exact, rtol=2**-7, atol=1e-2)
            return torch.equal(ids.cpu(), want_ids) and close

        return lambda: route_topk(hidden, gate, topk, is_normalised=False), is_right

    moved_bytes = (num_tokens + MAX_EXPERTS) * HIDDEN_SIZE * 2
    yield _Bench(f"T{num_tokens}", moved_bytes, make)


def _model_like_logits(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Rows with a bulk and a few hundred likely tokens, anywhere in the vocabulary."""
    logits = torch.randn(SAMPLED_ROWS, VOCAB_SIZE, device=device) * 2.5 - 2
    likely = torch.randperm(VOCAB_SIZE, device=device)[:200]
    logits[:, likely] += torch.rand(SAMPLED_ROWS, 200, device=device) * 14
    padded = torch.empty(SAMPLED_ROWS, LOGIT_STRIDE, dtype=dtype, device=device)
    padded[:, :VOCAB_SIZE] = logits.to(dtype)
    return padded[:, :VOCAB_SIZE]


def _sample_rows(
    name: str, dtype: torch.dtype, device: torch.device, *, has_peers: bool
) -> Iterator[Row]:
    batches = [_model_like_logits(dtype, device) for _ in range(LOGIT_BATCHES[dtype])]
    moved_bytes = SAMPLED_ROWS * VOCAB_SIZE * batches[0].element_size()
    for mode, row in SAMPLING.items():
        rows = [replace(row, seed=index, position=index) for index in range(SAMPLED_ROWS)]
        packed = pack_rows(rows, VOCAB_SIZE, device)
        launches, outs = [], []
        for logits in batches:
            out = Samples.empty(SAMPLED_ROWS, max(1, packed.num_top), device)
            outs.append(out)
            launches.append(_bound(logits, packed, out))
        launches[0]()
        if mode == "greedy" and not torch.equal(outs[0].token_ids, _argmax(batches[0])):
            raise RuntimeError(
                f"{name} is wrong: its greedy tokens are not the largest logits'. Times of a wrong "
                "kernel mean nothing. Run `pytest -m gpu tests/kernels`."
            )
        us = measure_us(launches * 2)
        measured = Row(
            name, f"{SAMPLED_ROWS} rows {mode}", round(us, 1), round(moved_bytes / us / 1e3), 0.0
        )
        if mode == "greedy" and has_peers:
            results = [torch.empty(SAMPLED_ROWS, dtype=torch.int64, device=device)] * len(batches)
            peers = [
                _bound_argmax(logits, result)
                for logits, result in zip(batches, results, strict=True)
            ]
            measured.peers = {"torch_argmax": round(measure_us(peers * 2), 1)}
        yield measured


def _argmax(logits: torch.Tensor) -> torch.Tensor:
    """The first of the largest, which torch's argmax on a GPU does not promise."""
    largest = logits.amax(dim=1, keepdim=True)
    tokens = torch.arange(VOCAB_SIZE, dtype=torch.int32, device=logits.device)
    return torch.where(logits == largest, tokens, VOCAB_SIZE).amin(dim=1)


def _bound(logits: torch.Tensor, packed: SamplingBatch, out: Samples) -> Launch:
    return lambda: sample_on_device(logits, packed, out)


def _bound_argmax(logits: torch.Tensor, result: torch.Tensor) -> Launch:
    def launch() -> None:
        torch.argmax(logits, dim=1, out=result)

    return launch
