"""Loads the weights of one role for a compute dtype, touching only that role's bytes.

A `Checkpoint` has been checked by its headers before anything is allocated here.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from step3rt.errors import CheckpointError
from step3rt.model.checkpoint import Checkpoint
from step3rt.model.tensor_plan import (
    EMBEDDING,
    FP8,
    SCALE_SUFFIX,
    WantedTensor,
    wanted_attention_tensors,
    wanted_ffn_tensors,
)
from step3rt.ops.linear import weight_dtype
from step3rt.ops.moe import ExpertStack
from step3rt.ops.quantize import dequantize_blocks

# Called with bytes done, bytes in total, and what is being loaded, e.g. "layer 3".
Progress = Callable[[int, int, str], None]


def no_progress(_done_bytes: int, _total_bytes: int, _phase: str) -> None:
    """Ignores progress."""


@dataclass(frozen=True, slots=True)
class AttentionLayerWeights:
    """One layer's attention side.

    input_norm, post_attention_norm [H] and inter_norm [R] are in the compute dtype; qkv_proj
    [R + 2 D, H], rows q | k | v, wq [N * D, R], o_proj [H, N * D] and router [E, H], None in a
    dense layer, in `ops.linear.weight_dtype` of it.
    """

    input_norm: torch.Tensor
    qkv_proj: torch.Tensor
    inter_norm: torch.Tensor
    wq: torch.Tensor
    o_proj: torch.Tensor
    post_attention_norm: torch.Tensor
    router: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class AttentionWeights:
    """What an attention instance holds.

    embed_tokens [V, H] and final_norm [H] are in the compute dtype, lm_head [V, H] in
    `ops.linear.weight_dtype` of it.
    """

    embed_tokens: torch.Tensor
    layers: tuple[AttentionLayerWeights, ...]
    final_norm: torch.Tensor
    lm_head: torch.Tensor


@dataclass(frozen=True, slots=True)
class FfnLayerWeights:
    """One layer's FFN side: a range of routed experts, and the expert that every token meets.

    The latter, with id `num_experts`, is the shared expert, or the whole FFN of a dense layer.
    """

    stacks: tuple[ExpertStack, ...]


@dataclass(frozen=True, slots=True)
class FfnWeights:
    """What an FFN instance holds: its experts of every layer."""

    layers: tuple[FfnLayerWeights, ...]


def load_attention_weights(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    progress: Progress = no_progress,
) -> AttentionWeights:
    """Loads embedding, attention, norms, routers and head.

    Raises:
        CheckpointError: a block scale is not a usable number.
    """
    config = checkpoint.config
    edges = [
        WantedTensor(EMBEDDING, (config.vocab_size, config.hidden_size)),
        WantedTensor("model.norm.weight", (config.hidden_size,)),
        WantedTensor("lm_head.weight", (config.vocab_size, config.hidden_size)),
    ]
    of_layers = [
        list(wanted_attention_tensors(config, index)) for index in range(config.num_layers)
    ]
    reader = _Reader(checkpoint, dtype, progress)
    for wanted in (*edges, *(wanted for layer in of_layers for wanted in layer)):
        reader.expect(wanted)
    embed_tokens, final_norm, lm_head = (reader.read(wanted) for wanted in edges)
    layers = []
    for index, wanted_in_layer in enumerate(of_layers):
        reader.phase = f"layer {index}"
        tensors = [reader.read(wanted) for wanted in wanted_in_layer]
        input_norm, q_proj, k_proj, v_proj, inter_norm, wq, o_proj, post_norm, *router = tensors
        layers.append(
            AttentionLayerWeights(
                input_norm=input_norm,
                qkv_proj=torch.cat((q_proj, k_proj, v_proj)),
                inter_norm=inter_norm,
                wq=wq,
                o_proj=o_proj,
                post_attention_norm=post_norm,
                router=router[0] if router else None,
            )
        )
    return AttentionWeights(embed_tokens, tuple(layers), final_norm, lm_head)


def load_ffn_weights(
    checkpoint: Checkpoint,
    experts: range,
    dtype: torch.dtype,
    progress: Progress = no_progress,
) -> FfnWeights:
    """Loads the routed experts of `experts`, every shared expert and every dense FFN.

    Raises:
        CheckpointError: a block scale is not a usable number.
    """
    config = checkpoint.config
    of_layers = [list(wanted_ffn_tensors(config, index)) for index in range(config.num_layers)]
    reader = _Reader(checkpoint, dtype, progress)
    for wanted_in_layer in of_layers:
        for wanted in wanted_in_layer:
            reader.expect(wanted, experts)
    layers = []
    for index, wanted_in_layer in enumerate(of_layers):
        reader.phase = f"layer {index}"
        stacks = []
        for first in range(0, len(wanted_in_layer), 3):
            gate, up, down = wanted_in_layer[first : first + 3]
            stacks.append(_read_stack(reader, experts, (gate, up, down)))
        layers.append(FfnLayerWeights(tuple(stacks)))
    return FfnWeights(tuple(layers))


def _read_stack(
    reader: "_Reader",
    experts: range,
    wanted: tuple[WantedTensor, WantedTensor, WantedTensor],
) -> ExpertStack:
    gate, up, down = wanted
    hidden, inner = down.shape[-2:]
    is_routed = len(down.shape) == 3
    num_experts = len(experts) if is_routed else 1
    dtype = weight_dtype(reader.compute_dtype)
    gate_up = torch.empty(num_experts, 2 * inner, hidden, dtype=dtype)
    down_stack = torch.empty(num_experts, hidden, inner, dtype=dtype)
    # Expert by expert, so that what is read and not yet converted stays small.
    for place in range(num_experts):
        expert = experts[place] if is_routed else None
        gate_up[place, :inner] = reader.read(gate, expert)
        gate_up[place, inner:] = reader.read(up, expert)
        down_stack[place] = reader.read(down, expert)
    first_id = experts.start if is_routed else reader.config.num_experts
    return ExpertStack(first_id, gate_up, down_stack)


class _Reader:
    """Reads tensors in the compute dtype and reports progress in bytes of the checkpoint."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, progress: Progress) -> None:
        self.config = checkpoint.config
        self.files = checkpoint.files
        self.compute_dtype = dtype
        self.phase = "embedding and head"
        self._progress = progress
        self._done_bytes = 0
        self._total_bytes = 0

    def expect(self, wanted: WantedTensor, experts: range | None = None) -> None:
        """Counts a tensor's bytes, of a stack those of `experts`, towards the total."""
        for name in (wanted.name, wanted.name + SCALE_SUFFIX):
            entry = self.files.entries.get(name)
            if entry is not None:
                if experts is None or len(wanted.shape) < 3:
                    self._total_bytes += entry.num_bytes
                else:
                    self._total_bytes += entry.num_bytes // entry.shape[0] * len(experts)

    def read(self, wanted: WantedTensor, expert: int | None = None) -> torch.Tensor:
        """Reads a tensor, or one expert's matrix of a stack, dequantised, in the dtype it needs."""
        values = self._read(wanted.name, expert)
        is_linear = len(wanted.shape) > 1 and wanted.name != EMBEDDING
        dtype = weight_dtype(self.compute_dtype) if is_linear else self.compute_dtype
        if self.files.entries[wanted.name].dtype != FP8:
            return values.to(dtype)
        scale_name = wanted.name + SCALE_SUFFIX
        scale_inv = self._read(scale_name, expert)
        if not bool((torch.isfinite(scale_inv) & (scale_inv >= 0)).all()):
            raise CheckpointError(
                f"{self.files.entries[scale_name].path}: tensor {scale_name!r} has a scale that "
                "is negative or not finite. No quantiser writes one. Download the file again."
            )
        # A checkpoint without a block size has no FP8 tensor.
        block_size = self.config.weight_block_size or (1, 1)
        return dequantize_blocks(values, scale_inv, block_size, dtype)

    def _read(self, name: str, expert: int | None) -> torch.Tensor:
        entry = self.files.entries[name]
        if expert is None:
            tensor = self.files.read(entry)
        else:
            tensor = self.files.read(entry, slice(expert, expert + 1))[0]
        self._done_bytes += tensor.numel() * tensor.element_size()
        self._progress(self._done_bytes, self._total_bytes, self.phase)
        return tensor
