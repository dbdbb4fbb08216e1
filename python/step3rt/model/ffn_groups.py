"""Lays out what one FFN instance of the device pipeline holds: groups of experts, by layer.

Owns which expert is which group; rows name groups, so that no kernel knows where a range begins:

    MoE layer     | routed experts first … last of this rank's range | shared expert |
    dense layer   | the whole FFN |

A row's last column is its home's: the last group of the layer. To the kernels all groups are routed
to, the shared one too: a row that has its home elsewhere does not meet it here.
"""

from dataclasses import dataclass

import torch

from step3rt.model.config import Step3Config
from step3rt.model.gpu_weights import (
    BLOCK,
    Fp8Matrix,
    ModelTensors,
    TensorReader,
    check_sizes,
    pack_experts,
    stack_rows,
)
from step3rt.model.placement import expert_range
from step3rt.ops.moe_fp8 import Fp8Experts


@dataclass(frozen=True, slots=True)
class FfnGroups:
    """The experts of one FFN rank. `layers` has one entry per layer of the model."""

    config: Step3Config
    experts: range
    layers: tuple[Fp8Experts, ...]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.layers[0].gate_up.device


def build_ffn_groups(tensors: ModelTensors, rank: int, num_ranks: int) -> FfnGroups:
    """Reads the groups of rank `rank` of `num_ranks`, and no other expert.

    Raises:
        CheckpointError: a block scale is not a usable number.
        ConfigError: the kernels cannot compute a model of these sizes.
    """
    config = tensors.config
    check_sizes(config)
    reader = TensorReader(tensors, is_fp8=True)
    experts = expert_range(config.num_experts, rank, num_ranks)
    layers = tuple(_load_layer(reader, index, experts) for index in range(config.num_layers))
    return FfnGroups(config, experts, layers)


def _load_layer(reader: TensorReader, index: int, experts: range) -> Fp8Experts:
    prefix = f"model.layers.{index}"
    config = reader.config
    if not config.layers[index].is_moe:
        matrices = [_read(reader, f"{prefix}.mlp", None, config.intermediate_size)]
        return pack_experts(matrices, len(matrices))
    # One launch computes all groups, which have one size: what is narrower is padded with zeros,
    # which add nothing. Step-3's experts are all of one size.
    width = max(config.moe_intermediate_size, config.share_expert_dim)
    matrices = [_read(reader, f"{prefix}.moe", expert, width) for expert in experts]
    matrices.append(_read(reader, f"{prefix}.share_expert", None, width))
    return pack_experts(matrices, len(matrices))


def _read(
    reader: TensorReader, module: str, expert: int | None, width: int
) -> tuple[Fp8Matrix, Fp8Matrix]:
    """Gate and up projection, one below the other, and down projection, `width` wide inside."""
    gate, up = (
        _pad(reader.matrix(f"{module}.{name}_proj.weight", expert), width, 0)
        for name in ("gate", "up")
    )
    return stack_rows([gate, up]), _pad(reader.down(module, expert), width, 1)


def _pad(matrix: Fp8Matrix, size: int, dim: int) -> Fp8Matrix:
    """Appends zeros to dimension `dim` of a weight; `size` is a multiple of 128."""
    missing = size - matrix.values.shape[dim]
    if missing == 0:
        return matrix
    sides = (0, 0, 0, missing) if dim == 0 else (0, missing)
    values = torch.nn.functional.pad(matrix.values.view(torch.uint8), sides)
    scale_sides = tuple(side // BLOCK for side in sides)
    return Fp8Matrix(
        values.view(torch.float8_e4m3fn), torch.nn.functional.pad(matrix.scales, scale_sides)
    )
