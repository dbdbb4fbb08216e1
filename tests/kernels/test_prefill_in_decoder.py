"""Prompts through the prefill kernel in the one-GPU decoder, against its decode kernel's rows.

On the CPU the references of both kernels compute a row alike, in float64: whatever is cut where, no
bit changes. On a GPU sums differ in their order, and what comes of them by rounding.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

from step3rt.errors import InvalidArgument
from step3rt.model import gpu_layer
from step3rt.model.checkpoint import Checkpoint
from step3rt.model.gpu_decoder import GpuDecoder, GpuDecoderOptions, steps_of_prompt
from step3rt.model.gpu_weights import GpuWeights, load_gpu_weights
from step3rt.model.monolithic import MonolithicModel
from step3rt.model.prompt_steps import Prompt
from step3rt.model.step_tokens import StepTokens
from step3rt.ops.mfa_prefill import PrefillChunk
from tests.kernels.decoder_inputs import NANO, windows

pytestmark = pytest.mark.usefixtures("one_thread")

DEVICES = [
    pytest.param("cpu", id="cpu"),
    pytest.param("cuda", marks=pytest.mark.gpu, id="gpu"),
]
FORMATS = [  # weights and activations in FP8, K and V in FP8
    pytest.param(False, False, id="bf16"),
    pytest.param(True, False, id="fp8"),
    pytest.param(True, True, id="fp8-fp8kv"),
]
FEW_ROWS = 64
KV_FORMATS = [pytest.param(False, id="bf16kv"), pytest.param(True, id="fp8kv")]


@cache
def nano(device: str, is_fp8: bool) -> GpuWeights:
    return load_gpu_weights(Checkpoint.open(NANO), torch.device(device), is_fp8=is_fp8)


def decoder(
    device: str, is_fp8: bool, is_fp8_kv: bool, max_prefill_tokens: int = 128
) -> GpuDecoder:
    options = GpuDecoderOptions(
        num_blocks=16,
        max_model_len=256,
        max_tokens=128,
        is_fp8_kv=is_fp8_kv,
        max_prefill_tokens=max_prefill_tokens,
    )
    model = GpuDecoder(nano(device, is_fp8), options)
    model._prefill_ctas = 1  # so that every chunk of two tokens goes through the prefill kernel
    return model


def assert_same(got: torch.Tensor, want: torch.Tensor, *, is_fp8_kv: bool) -> None:
    """Bit for bit on the CPU; on a GPU within what other cuts of a prompt may change."""
    assert bool(torch.isfinite(got).all())
    if got.device.type == "cpu":
        assert torch.equal(got, want)
        return
    error = float((got.float() - want.float()).norm() / want.float().norm())
    # Of a few rows only, one that is near a tie of the router may be much of the sum.
    few = 3 if len(got) < FEW_ROWS else 1
    assert error < few * (3e-2 if is_fp8_kv else 2e-2)


def token_by_token(model: GpuDecoder, token_ids: list[int], blocks: list[int]) -> torch.Tensor:
    """bf16[T, V]: logits of every token, each computed in a step of its own."""
    (rows,) = steps_of_prompt(token_ids, blocks, len(token_ids))
    steps = [rows.rows(index, index + 1) for index in range(len(token_ids))]
    return torch.cat([model.step(step).clone() for step in steps])


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the attention launchers that were called since it was cleared."""
    names = list[str]()

    def noting(name: str, launcher: Callable[..., None]) -> Callable[..., None]:
        def launch(*args: Any) -> None:
            names.append(name)
            launcher(*args)

        return launch

    for name in ("mfa_decode_bf16", "mfa_decode_fp8", "mfa_prefill_bf16", "mfa_prefill_fp8"):
        monkeypatch.setattr(gpu_layer, name, noting(name, getattr(gpu_layer, name)))
    return names


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("is_fp8", "is_fp8_kv"), FORMATS)
def test_chunks_of_any_size_give_the_logits_of_single_tokens(
    device: str, is_fp8: bool, is_fp8_kv: bool, launched: list[str]
) -> None:
    lengths, tables = (100, 1, 65), [[5, 2], [9], [11, 0]]
    prompts = [window[:length] for window, length in zip(windows(), lengths, strict=False)]
    model = decoder(device, is_fp8, is_fp8_kv)
    want = torch.stack(
        [
            token_by_token(model, ids, blocks)[-1]
            for ids, blocks in zip(prompts, tables, strict=True)
        ]
    )
    kv = "fp8" if is_fp8_kv else "bf16"
    assert set(launched) == {f"mfa_decode_{kv}"}
    cached = [layer.clone() for layer in model._kv]
    # All in two steps; 100 = 2 * 37 + 26, so that chunks begin and end within KV blocks; 100 = 33 *
    # 3 + 1, so that a chunk of one token is left, which the decode kernel takes.
    for max_prefill_tokens in (128, 37, 33):
        launched.clear()
        model = decoder(device, is_fp8, is_fp8_kv, max_prefill_tokens)
        got = model.prefill(
            [Prompt(ids, blocks) for ids, blocks in zip(prompts, tables, strict=True)]
        )
        assert f"mfa_prefill_{kv}" in launched
        assert_same(got, want, is_fp8_kv=is_fp8_kv)
        if device == "cpu":
            for layer, expected in zip(model._kv, cached, strict=True):
                assert torch.equal(layer, expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("is_fp8_kv", KV_FORMATS)
def test_a_step_of_decode_rows_and_chunks_equals_one_of_decode_rows(
    device: str, is_fp8_kv: bool, launched: list[str]
) -> None:
    parts = [  # tokens before, tokens, KV blocks; chunks start and end within blocks and at edges
        (89, 1, [5, 9]),
        (20, 37, [14]),
        (63, 2, [3, 8]),
        (0, 1, [7]),
        (0, 64, [1]),
        (64, 3, [0, 12]),
    ]
    model = decoder(device, True, is_fp8_kv)
    steps, chunks, row = [], [], 0
    for window, (first, length, blocks) in zip(windows(), parts, strict=True):
        (tokens,) = steps_of_prompt(window[: first + length], [*blocks, *blocks][:2], 256)
        if first:
            model.step(tokens.rows(0, first))
        steps.append(tokens.rows(first, first + length))
        if length > 1:
            chunks.append(PrefillChunk(row, length, first, row + length - 1))
        row += length
    step = StepTokens.concatenate(steps)
    want = model.step(step).clone()
    cached = [layer.clone() for layer in model._kv]
    launched.clear()
    got = model.step(step, chunks)
    kv = "fp8" if is_fp8_kv else "bf16"
    assert launched[:2] == [f"mfa_decode_{kv}", f"mfa_prefill_{kv}"]
    assert_same(got, want, is_fp8_kv=is_fp8_kv)
    if device == "cpu":
        for layer, expected in zip(model._kv, cached, strict=True):
            assert torch.equal(layer, expected)
    # A step without chunks, in the graph that it always had, sees nothing of those before.
    assert torch.equal(model.step(step), want)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("is_fp8_kv", KV_FORMATS)
@pytest.mark.parametrize("num_cached", [64, 70, 99])
def test_prompts_behind_a_cached_prefix_are_computed_from_there(
    device: str, is_fp8_kv: bool, num_cached: int
) -> None:
    prompt = windows()[0][:100]
    model = decoder(device, True, is_fp8_kv)
    want = token_by_token(model, prompt, [5, 2])[-1:]
    model.prefill([Prompt(prompt[:num_cached], [6, 10])])
    # Whole blocks may be another sequence's; in a block that is begun the chunk goes on.
    blocks = [6, 13] if num_cached == 64 else [6, 10]
    assert_same(model.prefill([Prompt(prompt, blocks, num_cached)]), want, is_fp8_kv=is_fp8_kv)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("is_fp8", "is_fp8_kv", "bound"), [
    pytest.param(False, False, 1.5e-2, id="bf16"),
    pytest.param(True, False, 3e-2, id="fp8"),
    pytest.param(True, True, 5e-2, id="fp8-fp8kv"),
])  # fmt: skip
def test_prefill_agrees_with_the_monolithic_model(
    device: str, is_fp8: bool, is_fp8_kv: bool, bound: float
) -> None:
    kv_dtype = torch.float8_e4m3fn if is_fp8_kv else None
    reference = MonolithicModel.load(NANO, torch.bfloat16, kv_dtype)
    model = decoder(device, is_fp8, is_fp8_kv)
    got = []
    for step in steps_of_prompt(windows()[0][:90], [5, 2, 11, 8], 50):
        first, length = int(step.positions[0]), len(step.positions)
        got.append(model.step(step, [PrefillChunk(0, length, first, 0)]).double().cpu())
    want = reference.logits(windows()[0][:90], chunk_tokens=64).double()
    assert float((torch.cat(got) - want).norm() / want.norm()) < bound


@pytest.mark.parametrize("device", DEVICES)
def test_steps_that_fill_no_gpu_run_as_rows_of_the_decode_kernel(
    device: str, launched: list[str]
) -> None:
    prompt = windows()[0][:40]
    model = decoder(device, True, True)
    want = token_by_token(model, prompt, [5])[-1:]
    launched.clear()
    model._prefill_ctas = 132
    assert_same(model.prefill([Prompt(prompt, [3])]), want, is_fp8_kv=True)
    assert set(launched) == {"mfa_decode_fp8"}


def test_prompts_and_sizes_that_do_not_fit_are_refused() -> None:
    model = decoder("cpu", True, True)
    with pytest.raises(InvalidArgument, match="6 KV blocks"):
        model.prefill([Prompt([1], range(6))])
    with pytest.raises(InvalidArgument, match="3000"):
        GpuDecoderOptions(num_blocks=1, max_model_len=64, max_prefill_tokens=3000)


def test_decoding_goes_on_from_a_prefilled_prompt() -> None:
    model = decoder("cpu", True, True)
    prompt, blocks = windows()[0][:60], [5, 9]
    known = list(prompt)
    for _ in range(6):
        logits = steps_of_prompt(known, blocks, 256)[0]
        known.append(int(model.step(logits)[len(known) - 1].argmax()))
    other = decoder("cpu", True, True)
    first = int(other.prefill([Prompt(prompt, blocks)]).argmax())
    (tokens,) = steps_of_prompt([*prompt, first], blocks, 256)
    decoded = other.decode(tokens.rows(60, 61), 5)
    assert [first, *decoded[:, 0].tolist()] == known[60:]
