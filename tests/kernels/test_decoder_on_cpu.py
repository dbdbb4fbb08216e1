"""The GPU's decoder on the CPU: the same program, by the references behind its launchers."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

from step3rt.model import gpu_layer
from step3rt.model.checkpoint import Checkpoint
from step3rt.model.gpu_decoder import GpuDecoder, GpuDecoderOptions, StepTokens, steps_of_prompt
from step3rt.model.gpu_weights import GpuWeights, load_gpu_weights
from step3rt.model.monolithic import MonolithicModel
from step3rt.model.random_weights import random_gpu_weights
from step3rt.ops import router_topk
from tests.kernels.decoder_inputs import NANO, step3_slice, windows

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
NUM_TOKENS = 90  # two KV blocks
BLOCKS = [5, 2, 11, 8]
# Weights and activations in FP8; K and V in FP8; of the logits against those of BF16 arithmetic:
# relative error, share of equal most likely tokens, divergence. About twice what they are.
FORMATS = [
    pytest.param(False, False, 1.5e-2, 0.95, 1e-3, id="bf16"),  # 6.0e-3, 0.98, 3.2e-4
    pytest.param(True, False, 3e-2, 0.95, 4e-3, id="fp8"),  # 1.8e-2, 0.98, 1.9e-3
    pytest.param(True, True, 5e-2, 0.93, 9e-3, id="fp8-fp8kv"),  # 2.7e-2, 0.97, 4.3e-3
]


@cache
def nano(is_fp8: bool) -> GpuWeights:
    return load_gpu_weights(Checkpoint.open(NANO), CPU, is_fp8=is_fp8)


def decoder(is_fp8: bool = True, is_fp8_kv: bool = True, max_tokens: int = 128) -> GpuDecoder:
    options = GpuDecoderOptions(
        num_blocks=16, max_model_len=256, max_tokens=max_tokens, is_fp8_kv=is_fp8_kv
    )
    return GpuDecoder(nano(is_fp8), options)


def logits_of(
    model: GpuDecoder, token_ids: list[int], max_tokens: int, blocks: list[int] = BLOCKS
) -> torch.Tensor:
    steps = steps_of_prompt(token_ids, blocks, max_tokens)
    return torch.cat([model.step(step).clone() for step in steps])


@pytest.mark.parametrize(("is_fp8", "is_fp8_kv", "error", "same", "divergence"), FORMATS)
def test_nano_agrees_with_the_monolithic_model(
    is_fp8: bool, is_fp8_kv: bool, error: float, same: float, divergence: float
) -> None:
    kv_dtype = torch.float8_e4m3fn if is_fp8_kv else None
    reference = MonolithicModel.load(NANO, torch.bfloat16, kv_dtype)
    model = decoder(is_fp8, is_fp8_kv)
    windows_of = [window[:NUM_TOKENS] for window in windows()[:2]]
    got = torch.cat([logits_of(model, window, 64) for window in windows_of]).double()
    want = torch.cat([reference.logits(window, chunk_tokens=64) for window in windows_of]).double()
    assert bool(torch.isfinite(got).all())
    assert float((got - want).norm() / want.norm()) < error
    assert float((got.argmax(-1) == want.argmax(-1)).double().mean()) > same
    kl = torch.nn.functional.kl_div(
        got.log_softmax(-1), want.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    assert float(kl) < divergence


@pytest.mark.parametrize(("is_fp8", "is_fp8_kv"), [(False, False), (True, True)])
def test_bucket_and_cuts_of_a_prompt_change_nothing(is_fp8: bool, is_fp8_kv: bool) -> None:
    token_ids = windows()[0][:70]
    model = decoder(is_fp8, is_fp8_kv)
    whole = logits_of(model, token_ids, 128)
    # 33 tokens leave 31 unused rows of bucket 64, 3 one of 4; the second decoder has none to leave.
    assert torch.equal(logits_of(model, token_ids, 33), whole)
    assert torch.equal(logits_of(model, token_ids, 3, [0, 1, 2, 3]), whole)
    small = decoder(is_fp8, is_fp8_kv, max_tokens=35)
    assert torch.equal(logits_of(small, token_ids, 35), whole)


def test_rows_that_fill_a_bucket_write_no_cache() -> None:
    model = decoder()
    (step,) = steps_of_prompt(windows()[0][:5], [7], 8)
    model.step(step)
    for kv in model._kv:
        written = kv.view(torch.uint8).flatten(1).any(dim=1)
        assert written.nonzero().flatten().tolist() == [7]


@pytest.mark.parametrize(("is_fp8", "is_fp8_kv"), [(False, False), (True, True)])
def test_a_token_does_not_see_its_batch_mates(is_fp8: bool, is_fp8_kv: bool) -> None:
    model = decoder(is_fp8, is_fp8_kv)
    first, second = windows()[0][:40], windows()[1][:70]
    alone = [logits_of(model, ids, 128) for ids in (first, second)]
    steps = [
        steps_of_prompt(ids, blocks, 128)[0] for ids, blocks in ((first, [5, 9]), (second, [14, 3]))
    ]
    together = model.step(StepTokens.concatenate(steps)).split([40, 70])
    for got, want in zip(together, alone, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(("is_fp8", "is_fp8_kv"), [(False, False), (True, True)])
def test_decoding_gives_the_tokens_of_single_steps(is_fp8: bool, is_fp8_kv: bool) -> None:
    num_steps, lengths = 12, (60, 21)  # the first crosses into another KV block
    tables = [[5, 9], [14, 3]]
    model = decoder(is_fp8, is_fp8_kv)
    want, last = [], []
    for window, length, blocks in zip(windows(), lengths, tables, strict=False):
        prompt = window[:length]
        (step,) = steps_of_prompt(prompt, blocks, 128)
        known = [*prompt, int(model.step(step)[length - 1].argmax())]
        last.append(step.rows(length - 1, length))
        while len(known) < length + num_steps:
            step = steps_of_prompt(known, blocks, 128)[0]
            known.append(int(model.step(step.rows(len(known) - 1, len(known)))[0].argmax()))
        want.append(known[length:])
    tokens = StepTokens.concatenate(last)
    assert model.decode(tokens, num_steps).T.tolist() == want
    assert model.decode(tokens, num_steps).T.tolist() == want


def test_step3s_own_widths_run_fused_launchers_that_compute_what_torch_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = step3_slice(expert_size=128, num_heads=2, dense_size=128)
    weights = random_gpu_weights(config, CPU)
    options = GpuDecoderOptions(num_blocks=4, max_model_len=128, max_tokens=8)

    def compute() -> torch.Tensor:
        return logits_of(GpuDecoder(weights, options), list(range(7, 15)), 8, [3, 1])

    launched = list[str]()
    for owner, name in (
        (gpu_layer, "add_rmsnorm_quantize"),
        (gpu_layer, "rmsnorm_quantize"),
        (router_topk, "route_topk"),
    ):
        monkeypatch.setattr(owner, name, noting(launched, name, getattr(owner, name)))
    fused = compute()
    assert sorted(set(launched)) == ["add_rmsnorm_quantize", "rmsnorm_quantize", "route_topk"]
    launched.clear()
    # No model has these widths: norms and the router come from torch, as for nano.
    monkeypatch.setattr(gpu_layer, "HIDDEN_SIZE", 0)
    monkeypatch.setattr(gpu_layer, "QUERY_RANK", 0)
    plain = compute()
    assert launched == []
    assert bool(torch.isfinite(fused).all())
    assert torch.equal(fused, plain)


def noting(launched: list[str], name: str, launcher: Callable[..., None]) -> Callable[..., None]:
    """The launcher itself, which leaves its name."""

    def launch(*args: Any, **kwargs: Any) -> None:
        launched.append(name)
        launcher(*args, **kwargs)

    return launch
