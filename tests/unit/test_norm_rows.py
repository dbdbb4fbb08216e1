"""Rows in bf16 are stored behind a norm only where somebody reads them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from step3rt.bench.attention_layer import ONE_MOE_LAYER
from step3rt.model.config import Step3Config
from step3rt.model.gpu_layer import LayerBuffers, LayerRunner
from step3rt.model.gpu_weights import Fp8Matrix, GpuLayerWeights, GpuWeights

CONFIG = Step3Config.from_json(ONE_MOE_LAYER, Path("config.json"))
HIDDEN = CONFIG.hidden_size


def layer_weights() -> GpuLayerWeights:
    matrix = Fp8Matrix(torch.zeros(1, dtype=torch.float8_e4m3fn), torch.zeros(1))
    norm = torch.ones(HIDDEN, dtype=torch.bfloat16)
    return GpuLayerWeights(norm, matrix, norm, matrix, matrix, norm, None, ())


@pytest.mark.parametrize("is_quantized", [True, False])
def test_only_a_projection_in_bf16_reads_bf16(is_quantized: bool) -> None:
    weights = layer_weights()
    if not is_quantized:
        weights = replace(weights, qkv=torch.zeros(1, dtype=torch.bfloat16))
    runner = LayerRunner(CONFIG, weights, torch.empty(0), is_fp8_kv=True)
    assert runner.reads_normed is not is_quantized


def make_buffers(num_tokens: int) -> LayerBuffers:
    table = torch.zeros(1, HIDDEN, dtype=torch.bfloat16)
    weights = GpuWeights(CONFIG, table, (layer_weights(),), table[0], table)
    made = LayerBuffers.allocate(weights, num_tokens)
    made.normed.fill_(7.0)
    return made


def test_rows_that_nobody_reads_in_bf16_are_not_stored_and_the_others_are_the_same() -> None:
    weight = torch.randn(HIDDEN).bfloat16()
    unread, read = make_buffers(2), make_buffers(2)
    read.residual.copy_(unread.residual.normal_())
    sums = torch.randn(3, 2, HIDDEN).bfloat16()
    unread.add_and_norm(sums, weight, 1e-5, fills_normed=False)
    read.add_and_norm(sums, weight, 1e-5, fills_normed=True)
    assert bool((unread.normed == 7.0).all())
    assert not bool((read.normed == 7.0).all())
    assert torch.equal(unread.residual, read.residual)
    assert torch.equal(unread.hidden.values.view(torch.uint8), read.hidden.values.view(torch.uint8))
    assert torch.equal(unread.hidden.scales, read.hidden.scales)
