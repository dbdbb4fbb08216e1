"""Loads a whole checkpoint for one Hopper GPU, laid out for the kernels.

The same layouts on the CPU are what the references behind the launchers read.

Computes nothing but layouts and number formats: FP8 blocks stay as they are and what a checkpoint
left in more bits is quantised; or everything becomes bf16, to compare with.

Attention kernels work on heads of 256. Narrower heads are spread out, so that a pair that rotary
embedding turns together keeps its distance of 128; what is between is zero and adds nothing:

    head of 128   | 0 … 63 |                  | 64 … 127 |
    head of 256   | 0 … 63 | 64 … 127 zero    | 128 … 191 | 192 … 255 zero
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from step3rt.errors import CheckpointError, ConfigError
from step3rt.model.checkpoint import Checkpoint
from step3rt.model.config import Step3Config
from step3rt.model.tensor_plan import EMBEDDING, FP8, SCALE_SUFFIX
from step3rt.ops.mfa_schedule import HEAD_DIM, PADDED_HEADS
from step3rt.ops.moe_fp8 import Fp8Experts
from step3rt.ops.moe_layout import pack_down, pack_gate_up
from step3rt.ops.quantize import E4M3_MAX, dequantize_blocks

BLOCK = 128
"""Rows and columns that share a weight scale, in checkpoints and in the kernels."""


@dataclass(frozen=True, slots=True)
class Fp8Matrix:
    """A linear layer: `values` e4m3[N, K], `scales` f32[N / 128, K / 128]."""

    values: torch.Tensor
    scales: torch.Tensor


@dataclass(frozen=True, slots=True)
class Bf16Experts:
    """Experts in bf16: `gate_up` [G, 2 * I, H], gate first, and `down` [G, H, I].

    `num_routed`: as of `Fp8Experts`; the last of more groups takes every token.
    """

    gate_up: torch.Tensor
    down: torch.Tensor
    num_routed: int


Matrix = Fp8Matrix | torch.Tensor
"""A linear layer in FP8, or bf16[N, K]."""

Experts = Fp8Experts | Bf16Experts


@dataclass(frozen=True, slots=True)
class GpuLayerWeights:
    """One decoder layer.

    Norm weights bf16. `qkv` [R + 512, H], rows q | k | v; `wq` [N * 256, R]; `o_proj` [H, N * 256].
    `router` bf16[E, H], None in a dense layer. `experts`: the layer's output is the sum of what
    each computes; routed ones first.
    """

    input_norm: torch.Tensor
    qkv: Matrix
    inter_norm: torch.Tensor
    wq: Matrix
    o_proj: Matrix
    post_attention_norm: torch.Tensor
    router: torch.Tensor | None
    experts: tuple[Experts, ...]


VOCAB_ALIGNMENT = 128
"""cuBLAS takes 4.9 ms for 256 rows of Step-3's 128,815 logits, 0.63 ms for 128,896 (one H200)."""


@dataclass(frozen=True, slots=True)
class GpuWeights:
    """A model on one device. `embed_tokens` bf16[V, H], `final_norm` bf16[H].

    `lm_head` bf16[V', H]: V rounded up to `VOCAB_ALIGNMENT`; rows past V are 0, and the logits that
    they give are nobody's.
    """

    config: Step3Config
    embed_tokens: torch.Tensor
    layers: tuple[GpuLayerWeights, ...]
    final_norm: torch.Tensor
    lm_head: torch.Tensor


def check_sizes(config: Step3Config) -> None:
    """Checks that the FP8 kernels can compute the model.

    Raises:
        ConfigError: a size is one that they do not take.
    """
    widths = {
        "hidden_size": config.hidden_size,
        "share_q_dim": config.query_rank,
        "intermediate_size": config.intermediate_size,
        "moe_intermediate_size": config.moe_intermediate_size,
        "share_expert_dim": config.share_expert_dim,
    }
    for name, width in widths.items():
        if width % BLOCK:
            raise ConfigError(
                f"{name}={width} is not a multiple of {BLOCK}. The FP8 kernels work on whole scale "
                "blocks. Use the CPU backend for this model."
            )
    if config.head_dim not in (BLOCK, HEAD_DIM) or config.num_heads > PADDED_HEADS:
        raise ConfigError(
            f"{config.num_heads} query heads of {config.head_dim} do not fit. The attention "
            f"kernels take up to {PADDED_HEADS} heads of {BLOCK} or {HEAD_DIM}. Use the CPU "
            "backend for this model."
        )
    if config.weight_block_size not in (None, (BLOCK, BLOCK)):
        raise ConfigError(
            f"weight_block_size={config.weight_block_size} is not {BLOCK} x {BLOCK}. The FP8 "
            "kernels have one scale per such block. Quantise the checkpoint again."
        )


def load_gpu_weights(
    checkpoint: Checkpoint, device: torch.device, *, is_fp8: bool = True
) -> GpuWeights:
    """Loads all layers onto `device`, linear layers and experts in FP8 or in bf16.

    Raises:
        CheckpointError: a block scale is not a usable number.
        ConfigError: the kernels cannot compute a model of these sizes.
    """
    check_sizes(checkpoint.config)
    return build_gpu_weights(CheckpointTensors(checkpoint, device), is_fp8=is_fp8)


def build_gpu_weights(tensors: "ModelTensors", *, is_fp8: bool) -> GpuWeights:
    """Lays out the tensors of a model that the kernels can compute."""
    return _build(TensorReader(tensors, is_fp8=is_fp8), _load_experts)


def build_attention_weights(tensors: "ModelTensors", *, is_fp8: bool = True) -> GpuWeights:
    """Lays out what an attention instance holds: all but the experts, of which layers have none.

    Raises:
        CheckpointError: a block scale is not a usable number.
        ConfigError: the kernels cannot compute a model of these sizes.
    """
    check_sizes(tensors.config)
    return _build(TensorReader(tensors, is_fp8=is_fp8), lambda _reader, _index: ())


def _build(reader: "TensorReader", load_experts: "ExpertLoader") -> GpuWeights:
    config = reader.config
    return GpuWeights(
        config=config,
        embed_tokens=reader.plain(EMBEDDING),
        layers=tuple(
            _load_layer(reader, index, load_experts) for index in range(config.num_layers)
        ),
        final_norm=reader.plain("model.norm.weight"),
        lm_head=_pad_rows(reader.plain("lm_head.weight")),
    )


def _pad_rows(matrix: torch.Tensor) -> torch.Tensor:
    missing = -matrix.shape[0] % VOCAB_ALIGNMENT
    return torch.nn.functional.pad(matrix, (0, 0, 0, missing)) if missing else matrix


def _load_layer(
    reader: "TensorReader", index: int, load_experts: "ExpertLoader"
) -> GpuLayerWeights:
    config = reader.config
    prefix = f"model.layers.{index}"
    attention = f"{prefix}.self_attn"
    q, k, v = (reader.matrix(f"{attention}.{name}_proj.weight") for name in "qkv")
    is_moe = config.layers[index].is_moe
    qkv = stack_rows([q, spread_rows(k, config.head_dim), spread_rows(v, config.head_dim)])
    wq = spread_rows(reader.matrix(f"{attention}.wq.weight"), config.head_dim)
    o_proj = spread_columns(reader.matrix(f"{attention}.o_proj.weight"), config.head_dim)
    return GpuLayerWeights(
        input_norm=reader.plain(f"{prefix}.input_layernorm.weight"),
        qkv=reader.finish(qkv),
        inter_norm=reader.plain(f"{attention}.inter_norm.weight"),
        wq=reader.finish(wq),
        o_proj=reader.finish(o_proj),
        post_attention_norm=reader.plain(f"{prefix}.post_attention_layernorm.weight"),
        router=reader.plain(f"{prefix}.moe.gate.weight") if is_moe else None,
        experts=load_experts(reader, index),
    )


def _load_experts(reader: "TensorReader", index: int) -> tuple[Experts, ...]:
    prefix = f"model.layers.{index}"
    if reader.config.layers[index].is_moe:
        return _load_moe(reader, prefix)
    return (_whole_ffn(reader, f"{prefix}.mlp"),)


def _load_moe(reader: "TensorReader", prefix: str) -> tuple[Experts, ...]:
    config = reader.config
    routed = [
        (reader.gate_up(f"{prefix}.moe", expert), reader.down(f"{prefix}.moe", expert))
        for expert in range(config.num_experts)
    ]
    shared = f"{prefix}.share_expert"
    if config.share_expert_dim != config.moe_intermediate_size:
        return _experts(reader, routed, len(routed)), _whole_ffn(reader, shared)
    # Of the routed experts' size, as in Step-3: one more group of the same launches.
    routed.append((reader.gate_up(shared), reader.down(shared)))
    return (_experts(reader, routed, config.num_experts),)


def _whole_ffn(reader: "TensorReader", prefix: str) -> Experts:
    return _experts(reader, [(reader.gate_up(prefix), reader.down(prefix))], 0)


def _experts(
    reader: "TensorReader", matrices: list[tuple[Fp8Matrix, Fp8Matrix]], num_routed: int
) -> Experts:
    if reader.is_fp8:
        return pack_experts(matrices, num_routed)
    return Bf16Experts(
        gate_up=torch.stack([dequantize(gate_up) for gate_up, _ in matrices]),
        down=torch.stack([dequantize(down) for _, down in matrices]),
        num_routed=num_routed,
    )


def pack_experts(matrices: list[tuple[Fp8Matrix, Fp8Matrix]], num_routed: int) -> Fp8Experts:
    """Packs experts of equal size, gate and up projection and down projection of each."""
    gate_ups = [pack_gate_up(gate_up.values[None]) for gate_up, _ in matrices]
    downs = [pack_down(down.values[None]) for _, down in matrices]
    return Fp8Experts(
        gate_up=cat_fp8(gate_ups),
        gate_up_scale=torch.stack([gate_up.scales for gate_up, _ in matrices]),
        down=cat_fp8(downs),
        down_scale=torch.stack([down.scales for _, down in matrices]),
        first_expert=0,
        num_routed=num_routed,
    )


def quantize_blocks(weight: torch.Tensor) -> Fp8Matrix:
    """Quantises a weight in blocks of 128 x 128, amax / 448 each.

    Args:
        weight: float[N, K], multiples of 128.
    """
    rows, columns = weight.shape
    blocks = weight.float().view(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
    amax = blocks.abs().amax(dim=(1, 3))
    scales = torch.where(amax == 0, 1.0, amax / E4M3_MAX)
    scaled = (blocks / scales[:, None, :, None]).clamp(-E4M3_MAX, E4M3_MAX)
    return Fp8Matrix(scaled.view(rows, columns).to(torch.float8_e4m3fn), scales)


def spread_rows(matrix: Fp8Matrix, head_dim: int) -> Fp8Matrix:
    """Lays rows of heads of `head_dim` out as heads of 256; see the module's picture.

    Args:
        matrix: [N * head_dim, K].
        head_dim: 128 or 256.

    Returns:
        [N * 256, K].
    """
    if head_dim == HEAD_DIM:
        return matrix
    heads = matrix.values.view(torch.uint8).view(-1, 2, head_dim // 2, matrix.values.shape[1])
    values = torch.nn.functional.pad(heads, (0, 0, 0, HEAD_DIM // 2 - head_dim // 2))
    # A head of 128 is one row of blocks; both halves of the new one keep its scale.
    return Fp8Matrix(
        values.flatten(0, 2).view(torch.float8_e4m3fn), matrix.scales.repeat_interleave(2, dim=0)
    )


def spread_columns(matrix: Fp8Matrix, head_dim: int) -> Fp8Matrix:
    """Lays columns out as `spread_rows` does rows: [H, N * head_dim] to [H, N * 256]."""
    if head_dim == HEAD_DIM:
        return matrix
    rows = Fp8Matrix(matrix.values.T.contiguous(), matrix.scales.T.contiguous())
    spread = spread_rows(rows, head_dim)
    return Fp8Matrix(spread.values.T.contiguous(), spread.scales.T.contiguous())


def stack_rows(matrices: list[Fp8Matrix]) -> Fp8Matrix:
    """Joins matrices of equal width, one below the other."""
    values = cat_fp8([matrix.values for matrix in matrices])
    return Fp8Matrix(values, torch.cat([matrix.scales for matrix in matrices]))


def cat_fp8(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Joins e4m3 tensors along their first dimension, as bytes."""
    return torch.cat([tensor.view(torch.uint8) for tensor in tensors]).view(torch.float8_e4m3fn)


ExpertLoader = Callable[["TensorReader", int], tuple[Experts, ...]]
"""What a layer's experts are, as of the reader and the layer's index."""


class ModelTensors(Protocol):
    """Where a model's tensors come from, on the device already; named as in a checkpoint."""

    config: Step3Config

    def plain(self, name: str) -> torch.Tensor:
        """Returns a tensor in bf16."""

    def matrix(self, name: str, expert: int | None = None) -> Fp8Matrix:
        """Returns a linear layer, or one expert's of a stack, in FP8."""


class CheckpointTensors:
    """Tensors of a checkpoint, read when they are asked for."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device) -> None:
        """Reads nothing yet."""
        self.config = checkpoint.config
        self._files = checkpoint.files
        self._device = device

    def plain(self, name: str) -> torch.Tensor:
        """Returns a tensor in bf16."""
        return self._read(name, None).to(self._device, torch.bfloat16)

    def matrix(self, name: str, expert: int | None = None) -> Fp8Matrix:
        """Returns a linear layer, quantised here unless the checkpoint did.

        Raises:
            CheckpointError: a block scale is not a usable number.
        """
        values = self._read(name, expert).to(self._device)
        if self._files.entries[name].dtype != FP8:
            return quantize_blocks(values)
        scales = self._read(name + SCALE_SUFFIX, expert).to(self._device, torch.float32)
        if not bool((torch.isfinite(scales) & (scales >= 0)).all()):
            raise CheckpointError(
                f"{self._files.entries[name].path}: the scales of {name!r} hold one that is "
                "negative or not finite. No quantiser writes one. Download the file again."
            )
        return Fp8Matrix(values, scales)

    def _read(self, name: str, expert: int | None) -> torch.Tensor:
        entry = self._files.entries[name]
        if expert is None:
            return self._files.read(entry)
        return self._files.read(entry, slice(expert, expert + 1))[0]


class TensorReader:
    """Takes a model's tensors in the number format that is wanted."""

    def __init__(self, tensors: ModelTensors, *, is_fp8: bool) -> None:
        """Reads nothing yet."""
        self.config = tensors.config
        self.is_fp8 = is_fp8
        self.plain = tensors.plain
        self.matrix = tensors.matrix

    def finish(self, matrix: Fp8Matrix) -> Matrix:
        """The matrix in the format that is wanted."""
        return matrix if self.is_fp8 else dequantize(matrix)

    def gate_up(self, module: str, expert: int | None = None) -> Fp8Matrix:
        """Gate and up projection of an FFN, gate first."""
        names = (f"{module}.gate_proj.weight", f"{module}.up_proj.weight")
        return stack_rows([self.matrix(name, expert) for name in names])

    def down(self, module: str, expert: int | None = None) -> Fp8Matrix:
        """Down projection of an FFN."""
        return self.matrix(f"{module}.down_proj.weight", expert)


def dequantize(matrix: Fp8Matrix) -> torch.Tensor:
    """Returns bf16[N, K]."""
    return dequantize_blocks(matrix.values, matrix.scales, (BLOCK, BLOCK), torch.bfloat16)
