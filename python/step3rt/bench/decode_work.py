"""What a decode step has to move and to compute by stage, and how long that takes at the peaks.

Owns the counting, from the model's sizes and the rows that the experts got. Weights have one byte;
activations within a GPU are left out: they stay in its L2.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from step3rt.model.config import Step3Config
from step3rt.model.placement import expert_range
from step3rt.plan.architecture import Model
from step3rt.plan.cost import DTYPE_BYTES, Precision, layer_core_flops, layer_kv_bytes
from step3rt.plan.hardware import Hardware
from step3rt.plan.hf_config import parse_config

_FP8_GROUP = 128
_COLUMN_BYTES = 8
"""Of an expert's id and weight beside a row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What decodes where: `batch` sequences of `context_tokens` over all instances and lanes.

    The context is that of the steps whose times the work is put beside.
    """

    config: Step3Config
    num_attention: int
    num_ffn: int
    num_lanes: int
    batch: int
    context_tokens: float
    kv_dtype: str

    @property
    def rows(self) -> float:
        """Sequences of one lane of one attention instance."""
        return self.batch / (self.num_attention * self.num_lanes)

    @property
    def moe_layers(self) -> list[int]:
        """Their numbers."""
        return [index for index, layer in enumerate(self.config.layers) if layer.is_moe]


@dataclass(frozen=True, slots=True)
class Work:
    """Of one layer (the head: of one step) and micro-batch on one GPU; the mean over both.

    `num_bytes` out of memory, or over the link; `flops`; `peak_us`: the larger of both at the
    card's peaks, layer by layer; None where the card is not known. `limit`: which of both it is, on
    the whole.
    """

    num_bytes: float
    flops: float
    peak_us: float | None = None
    limit: str = "bytes"


def sizes_of(config: Step3Config) -> dict[str, Any]:
    """The model's sizes as its config.json names them, for `plan compare`."""
    sizes: dict[str, Any] = {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_attention_groups": 1,
        "head_dim": config.head_dim,
        "share_q_dim": config.query_rank,
        "vocab_size": config.vocab_size,
    }
    moe_layers = [index for index, layer in enumerate(config.layers) if layer.is_moe]
    if moe_layers:
        sizes |= {
            "moe_layers_enum": ",".join(map(str, moe_layers)),
            "moe_num_experts": config.num_experts,
            "moe_top_k": config.top_k,
            "moe_intermediate_size": config.moe_intermediate_size,
            "share_expert_dim": config.share_expert_dim,
        }
    return sizes


def model_of(config: Step3Config) -> Model:
    """The model as the planner counts it."""
    return parse_config("measured", sizes_of(config))


def attention_work(shape: Shape, card: Hardware | None) -> Work:
    """K and V of all rows and the projections' weights, in; scores, values and projections."""
    model, precision = model_of(shape.config), Precision(kv_bytes=DTYPE_BYTES[shape.kv_dtype])
    parts = []
    for group in model.groups:
        params = group.attention.linear_params + group.ffn.router_params
        kv = shape.rows * layer_kv_bytes(group.attention, shape.context_tokens, precision)
        core = shape.rows * layer_core_flops(group.attention, shape.context_tokens)
        linear = 2 * shape.rows * params
        flops_us = bytes_us = 0.0
        if card is not None:
            core_peak = card.peak_flops if precision.kv_bytes == 1 else card.bf16_flops
            flops_us = 1e6 * (core / core_peak + linear / card.peak_flops)
            bytes_us = 1e6 * (kv + params) / card.bytes_per_s
        parts.append((group.count, kv + params, core + linear, bytes_us, flops_us))
    counts, num_bytes, flops, bytes_us_, flops_us_ = np.array(parts).T
    return _work(num_bytes, flops, bytes_us_, flops_us_, counts, card)


def head_work(shape: Shape, card: Hardware | None) -> Work:
    """The LM head in BF16, of one step; sampling reads what it wrote, which is little beside it."""
    params = model_of(shape.config).embedding_params
    num_bytes, flops = np.array([2.0 * params]), np.array([2.0 * shape.rows * params])
    bytes_us = 1e6 * num_bytes / card.bytes_per_s if card else num_bytes
    flops_us = 1e6 * flops / card.bf16_flops if card else flops
    return _work(num_bytes, flops, bytes_us, flops_us, np.ones(1), card)


def ffn_work(
    shape: Shape, rows: Sequence[npt.NDArray[np.int32]], card: Hardware | None
) -> Work | None:
    """Weights of the groups that got rows, in; their products. None where no rows were seen.

    `rows`: of each rank i32[looks, layers, groups], see `group_rows` of a recording.
    """
    moe = next((g.ffn for g in model_of(shape.config).groups if g.ffn.num_experts), None)
    dense = next((g.ffn for g in model_of(shape.config).groups if not g.ffn.num_experts), None)
    num_bytes, flops = [], []
    for rank, found in enumerate(rows):
        if not len(found):
            return None
        for layer, is_moe in enumerate(each.is_moe for each in shape.config.layers):
            ffn = moe if is_moe else dense
            if ffn is None:
                continue
            num_experts = len(expert_range(shape.config.num_experts, rank, shape.num_ffn))
            params = [ffn.expert_params] * (num_experts if is_moe else 0) + [ffn.dense_params]
            in_layer = found[:, layer, : len(params)].astype(np.float64)
            num_bytes.append((in_layer > 0) @ np.array(params, dtype=np.float64))
            flops.append(2 * in_layer @ np.array(params, dtype=np.float64))
    all_bytes, all_flops = np.concatenate(num_bytes), np.concatenate(flops)
    bytes_us = 1e6 * all_bytes / card.bytes_per_s if card else np.zeros_like(all_bytes)
    flops_us = 1e6 * all_flops / card.peak_flops if card else np.zeros_like(all_flops)
    return _work(all_bytes, all_flops, bytes_us, flops_us, np.ones_like(all_bytes), card)


def transfer_work(shape: Shape, card: Hardware | None) -> tuple[Work, Work]:
    """What a source sends to all ranks, and what a rank sends back to all sources.

    Both are of the GPU whose kernel stores them. Layer by layer the same rows go back.

    With several ranks, to how many of them a row goes is that of equally popular experts.
    """
    config, num_ranks = shape.config, shape.num_ffn
    copies = []
    for layer in config.layers:
        wanted = 1.0
        if layer.is_moe and num_ranks > 1:
            here = sum(_wanted(config, rank, num_ranks) for rank in range(num_ranks))
            wanted += (num_ranks - 1) * here / num_ranks
        copies.append(wanted)
    rows = shape.rows * float(np.mean(copies))
    ids = shape.rows * num_ranks * (config.top_k + 1) * _COLUMN_BYTES
    there = rows * config.hidden_size * (1 + 4 / _FP8_GROUP) + ids
    back = rows * config.hidden_size * 2 * shape.num_attention / num_ranks
    link = card.host_bytes_per_s if card is not None else None
    peaks = [None if link is None else 1e6 * num_bytes / link for num_bytes in (there, back)]
    return Work(there, 0.0, peaks[0]), Work(back, 0.0, peaks[1])


def _wanted(config: Step3Config, rank: int, num_ranks: int) -> float:
    """How likely some of a row's experts are on a rank."""
    others = config.num_experts - len(expert_range(config.num_experts, rank, num_ranks))
    return 1 - math.comb(others, config.top_k) / math.comb(config.num_experts, config.top_k)


def _work(
    num_bytes: npt.NDArray[Any],
    flops: npt.NDArray[Any],
    bytes_us: npt.NDArray[Any],
    flops_us: npt.NDArray[Any],
    counts: npt.NDArray[Any],
    card: Hardware | None,
) -> Work:
    def mean(values: npt.NDArray[Any]) -> float:
        return float(values @ counts / counts.sum())

    if card is None:
        return Work(mean(num_bytes), mean(flops))
    limit = "bytes" if mean(bytes_us) >= mean(flops_us) else "flops"
    return Work(mean(num_bytes), mean(flops), mean(np.maximum(bytes_us, flops_us)), limit)
