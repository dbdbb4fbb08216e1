"""Owns which tensors a Step-3 checkpoint must have, with shape and dtype; reads none of them."""

from collections.abc import Iterator
from dataclasses import dataclass

from step3rt.errors import CheckpointError
from step3rt.model.config import Step3Config
from step3rt.model.tensor_files import DTYPES, TensorEntry, TensorFiles

# The vision tower and its projector; step3rt is text-only and skips them.
VISION_PREFIXES = ("vision_model.", "vit_downsampler.", "vit_downsampler2.", "vit_large_projector.")
EMBEDDING = "model.embed_tokens.weight"
SCALE_SUFFIX = "_scale_inv"
SCALE_DTYPES = ("F32", "BF16")
FP8 = "F8_E4M3"


@dataclass(frozen=True, slots=True)
class WantedTensor:
    """A tensor that the model has; `may_be_fp8` for linear layers that FP8 checkpoints quantise."""

    name: str
    shape: tuple[int, ...]
    may_be_fp8: bool = False


def wanted_tensors(config: Step3Config) -> Iterator[WantedTensor]:
    """Yields every tensor of the text model, block scales excepted."""
    vocab, hidden = config.vocab_size, config.hidden_size
    yield WantedTensor(EMBEDDING, (vocab, hidden))
    for index in range(config.num_layers):
        yield from wanted_attention_tensors(config, index)
        yield from wanted_ffn_tensors(config, index)
    yield WantedTensor("model.norm.weight", (hidden,))
    yield WantedTensor("lm_head.weight", (vocab, hidden))


def wanted_attention_tensors(config: Step3Config, layer: int) -> Iterator[WantedTensor]:
    """Yields the tensors of one layer that belong to the attention side, the router included."""
    prefix = f"model.layers.{layer}"
    hidden, rank, dim = config.hidden_size, config.query_rank, config.head_dim
    heads_width = config.num_heads * dim
    yield WantedTensor(f"{prefix}.input_layernorm.weight", (hidden,))
    yield WantedTensor(f"{prefix}.self_attn.q_proj.weight", (rank, hidden), may_be_fp8=True)
    yield WantedTensor(f"{prefix}.self_attn.k_proj.weight", (dim, hidden), may_be_fp8=True)
    yield WantedTensor(f"{prefix}.self_attn.v_proj.weight", (dim, hidden), may_be_fp8=True)
    yield WantedTensor(f"{prefix}.self_attn.inter_norm.weight", (rank,))
    yield WantedTensor(f"{prefix}.self_attn.wq.weight", (heads_width, rank), may_be_fp8=True)
    yield WantedTensor(f"{prefix}.self_attn.o_proj.weight", (hidden, heads_width), may_be_fp8=True)
    yield WantedTensor(f"{prefix}.post_attention_layernorm.weight", (hidden,))
    if config.layers[layer].is_moe:
        yield WantedTensor(f"{prefix}.moe.gate.weight", (config.num_experts, hidden))


def wanted_ffn_tensors(config: Step3Config, layer: int) -> Iterator[WantedTensor]:
    """Yields the tensors of one layer that belong to the FFN side."""
    prefix = f"model.layers.{layer}"
    if config.layers[layer].is_moe:
        modules: tuple[tuple[str, int, tuple[int, ...]], ...] = (
            (f"{prefix}.moe", config.moe_intermediate_size, (config.num_experts,)),
            (f"{prefix}.share_expert", config.share_expert_dim, ()),
        )
    else:
        modules = ((f"{prefix}.mlp", config.intermediate_size, ()),)
    hidden = config.hidden_size
    for module, inner, stack in modules:
        yield WantedTensor(f"{module}.gate_proj.weight", (*stack, inner, hidden), may_be_fp8=True)
        yield WantedTensor(f"{module}.up_proj.weight", (*stack, inner, hidden), may_be_fp8=True)
        yield WantedTensor(f"{module}.down_proj.weight", (*stack, hidden, inner), may_be_fp8=True)


def check_tensors(files: TensorFiles, config: Step3Config) -> None:
    """Checks that the checkpoint has every tensor of the model as it must be, and no other.

    Looks at headers only, before anything is allocated.

    Raises:
        CheckpointError: a tensor is missing, misshapen, of an unusable dtype, or extra.
    """
    entries = files.entries
    expected: set[str] = set()
    for wanted in wanted_tensors(config):
        entry = _check_entry(files, wanted.name, wanted.shape)
        expected.add(wanted.name)
        if entry.dtype == FP8:
            expected.add(_check_scale(files, config, wanted, entry))
        elif entry.dtype not in DTYPES:
            raise CheckpointError(
                f"{entry.path}: tensor {entry.name!r} is {entry.dtype}. Weights must be one of "
                f"{', '.join(DTYPES)}. Convert the checkpoint."
            )
    for name, entry in entries.items():
        if name not in expected and not name.startswith(VISION_PREFIXES):
            raise CheckpointError(
                f"{entry.path}: tensor {name!r} is extra: a Step-3 model of the sizes in "
                "config.json has no such tensor. Check that config.json belongs to these weights."
            )


def scale_shape(shape: tuple[int, ...], block_size: tuple[int, int]) -> tuple[int, ...]:
    """Shape of the block scales of a weight [..., N, K]; the last blocks may be ragged."""
    *stack, rows, columns = shape
    return (*stack, -(-rows // block_size[0]), -(-columns // block_size[1]))


def _check_entry(files: TensorFiles, name: str, shape: tuple[int, ...]) -> TensorEntry:
    entry = files.entries.get(name)
    if entry is None:
        raise CheckpointError(
            f"{_home(files)}: tensor {name!r} is missing. The "
            f"model that config.json describes needs it, with shape {list(shape)}. Check that "
            "config.json belongs to these weights."
        )
    if entry.shape != shape:
        raise CheckpointError(
            f"{entry.path}: tensor {name!r} has shape {list(entry.shape)}. config.json implies "
            f"{list(shape)}. Check that config.json belongs to these weights."
        )
    return entry


def _check_scale(
    files: TensorFiles, config: Step3Config, wanted: WantedTensor, entry: TensorEntry
) -> str:
    """Checks the block scales of an FP8 weight and returns their name."""
    if not wanted.may_be_fp8 or config.weight_block_size is None:
        why = (
            "config.json has no quantization_config"
            if wanted.may_be_fp8
            else "norms, router, embeddings and head are never quantised"
        )
        raise CheckpointError(
            f"{entry.path}: tensor {wanted.name!r} is {FP8}, but {why}. "
            "Check that config.json belongs to these weights."
        )
    name = wanted.name + SCALE_SUFFIX
    scale = _check_entry(files, name, scale_shape(wanted.shape, config.weight_block_size))
    if scale.dtype not in SCALE_DTYPES:
        raise CheckpointError(
            f"{scale.path}: tensor {name!r} is {scale.dtype}. Block scales must be one of "
            f"{', '.join(SCALE_DTYPES)}. Convert the checkpoint."
        )
    return name


def _home(files: TensorFiles) -> str:
    """Names where a missing tensor should be: the one file, or the directory of many."""
    paths = {entry.path for entry in files.entries.values()}
    return str(paths.pop() if len(paths) == 1 else files.directory)
