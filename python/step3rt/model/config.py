"""Owns what `config.json` says about the text model, checked and with its traps resolved.

Never imports torch and never runs code that a checkpoint names (`auto_map`). Step-3 checkpoints
also describe a vision tower; step3rt is text-only and skips that part.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from step3rt.errors import ConfigError

MODEL_TYPES = ("step3_vl", "step3_text")
# The published configuration class supplies these where the file does not.
DEFAULT_RMS_NORM_EPS = 1e-5
DEFAULT_ROPE_THETA = 500_000.0
# Far above the published 61 layers and 128,815 tokens; keeps a hostile file from costing memory.
MAX_LAYERS = 4096
MAX_SIZE = 1 << 24
MAX_CONFIG_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class LayerConfig:
    """What may differ from layer to layer."""

    is_moe: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Step3Config:
    """Sizes and switches of the text model.

    query_rank is the width of the low-rank query (`share_q_dim`). weight_block_size is the shape of
    an FP8 scale's block, None for a checkpoint that is not quantised. The MoE sizes are 0 in a
    model without MoE layers.
    """

    vocab_size: int
    hidden_size: int
    num_heads: int
    head_dim: int
    query_rank: int
    intermediate_size: int
    num_experts: int
    top_k: int
    moe_intermediate_size: int
    share_expert_dim: int
    norm_expert_weight: bool
    rope_theta: float
    rms_norm_eps: float
    max_model_len: int
    bos_token_id: int
    eos_token_ids: tuple[int, ...]
    weight_block_size: tuple[int, int] | None
    layers: tuple[LayerConfig, ...]

    @property
    def num_layers(self) -> int:
        """Number of decoder layers, dense and MoE."""
        return len(self.layers)

    @classmethod
    def from_directory(cls, directory: Path) -> "Step3Config":
        """Reads and checks `config.json` of a model directory.

        Raises:
            ConfigError: the file is missing, is not JSON, or asks for what Step-3 does not have.
        """
        path = directory / "config.json"
        return cls.from_json(read_json_object(path, MAX_CONFIG_BYTES), path)

    @classmethod
    def from_json(cls, top: dict[str, Any], path: Path) -> "Step3Config":
        """Checks a parsed `config.json`; `path` is for messages.

        Raises:
            ConfigError: see `from_directory`.
        """
        return _Reader(top, path).read()


def read_json_object(path: Path, max_bytes: int) -> dict[str, Any]:
    """Reads a JSON file that must hold one object without repeated keys.

    Raises:
        ConfigError: it is missing, larger than `max_bytes`, not JSON, or not an object.
    """
    try:
        with path.open("rb") as file:
            text = file.read(max_bytes + 1)
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}). A model directory holds config.json and "
            "safetensors files. Check the model path."
        ) from error
    if len(text) > max_bytes:
        raise ConfigError(
            f"{path}: larger than {max_bytes} bytes, the most such a file may have. "
            "Check that the file is what its name says."
        )
    return parse_json_object(text, path)


def parse_json_object(text: bytes, path: Path) -> dict[str, Any]:
    """Parses JSON text that must be one object without repeated keys; `path` is for messages.

    Raises:
        ConfigError: it is not.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid JSON ({error}). Download the file again.") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: holds a JSON {type(value).__name__}, not an object.")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {repeated!r} occurs twice")
    return result


class _Reader:
    """Reads checked fields out of one `config.json`."""

    def __init__(self, top: dict[str, Any], path: Path) -> None:
        self.top = top
        self.path = path
        nested = top.get("text_config")
        if nested is not None and not isinstance(nested, dict):
            raise self.error("text_config", nested, "must be an object")
        self.text: dict[str, Any] = top if nested is None else nested

    def read(self) -> Step3Config:
        self.refuse_other_models()
        num_layers = self.size("num_hidden_layers", MAX_LAYERS)
        moe_layers = self.moe_layers(num_layers)
        has_moe = bool(moe_layers)
        has_dense = len(moe_layers) < num_layers
        config = Step3Config(
            vocab_size=self.size("vocab_size"),
            hidden_size=self.size("hidden_size"),
            num_heads=self.size("num_attention_heads"),
            head_dim=self.size("head_dim"),
            query_rank=self.size("share_q_dim"),
            intermediate_size=self.size("intermediate_size") if has_dense else 0,
            num_experts=self.size("moe_num_experts") if has_moe else 0,
            top_k=self.size("moe_top_k") if has_moe else 0,
            moe_intermediate_size=self.size("moe_intermediate_size") if has_moe else 0,
            share_expert_dim=self.size("share_expert_dim") if has_moe else 0,
            norm_expert_weight=self.boolean("norm_expert_weight", default=False),
            rope_theta=self.rope_theta(),
            rms_norm_eps=self.positive("rms_norm_eps", DEFAULT_RMS_NORM_EPS, self.text),
            max_model_len=self.max_model_len(),
            bos_token_id=self.bos_token_id(),
            eos_token_ids=self.eos_token_ids(),
            weight_block_size=self.weight_block_size(),
            layers=tuple(LayerConfig(is_moe=index in moe_layers) for index in range(num_layers)),
        )
        if config.head_dim % 2:
            raise self.error(
                "head_dim", config.head_dim, "must be even: rotary embedding turns pairs of dims"
            )
        if config.top_k > config.num_experts:
            raise self.error(
                "moe_top_k", config.top_k, f"must not exceed moe_num_experts={config.num_experts}"
            )
        return config

    def refuse_other_models(self) -> None:
        model_type = self.top.get("model_type")
        if model_type not in MODEL_TYPES:
            raise self.error("model_type", model_type, f"must be one of {', '.join(MODEL_TYPES)}")
        groups = self.text.get("num_attention_groups", 1)
        if groups != 1:
            raise self.error("num_attention_groups", groups, "must be 1: MFA has one K/V head")
        for source in (self.top, self.text):
            for key, wanted in (
                ("tie_word_embeddings", (None, False)),
                ("hidden_act", (None, "silu")),
                ("attention_bias", (None, False)),
            ):
                if source.get(key) not in wanted:
                    raise self.error(key, source[key], "must be absent: Step-3 has no such variant")

    def rope_theta(self) -> float:
        """Reads the base of the rotary angles; newer tools write it into `rope_parameters`."""
        for source in (self.top, self.text):
            for key in ("rope_scaling", "rope_parameters"):
                if not _is_plain_rope(source.get(key)):
                    raise self.error(key, source[key], "must not scale: Step-3 has no such variant")
        nested = self.text.get("rope_parameters")
        source = self.text if self.text.get("rope_theta") is not None else nested or {}
        return self.positive("rope_theta", DEFAULT_ROPE_THETA, source)

    def moe_layers(self, num_layers: int) -> frozenset[int]:
        """Parses `moe_layers_enum`: the published string "4,5,…", a list, or absent (1..L-1)."""
        value = self.text.get("moe_layers_enum")
        if value is None:
            return frozenset(range(1, num_layers))
        items = value
        if isinstance(value, str):
            parts = [part.strip() for part in value.split(",")] if value.strip() else []
            if not all(part.isascii() and part.isdigit() and len(part) <= 9 for part in parts):
                raise self.error("moe_layers_enum", value, 'must read like "4,5,6"')
            items = [int(part) for part in parts]
        if not isinstance(items, list) or not all(_is_int(item) for item in items):
            raise self.error("moe_layers_enum", value, "must be a string or a list of integers")
        layers = frozenset(items)
        if len(layers) != len(items) or not all(0 <= item < num_layers for item in items):
            raise self.error(
                "moe_layers_enum", value, f"must name layers of 0..{num_layers - 1}, each once"
            )
        return layers

    def max_model_len(self) -> int:
        """Reads the context limit, which Step-3 spells in the singular, and elsewhere as well."""
        keys = ("max_position_embedding", "max_seq_len", "max_position_embeddings")
        present = [key for key in keys if self.text.get(key) is not None]
        if not present:
            raise self.error(keys[0], None, "is needed: it limits the context")
        return self.size(present[0])

    def bos_token_id(self) -> int:
        value = self.token_field("bos_token_id")
        return 0 if value is None else self.token_id("bos_token_id", value)

    def eos_token_ids(self) -> tuple[int, ...]:
        value = self.token_field("eos_token_id")
        if value is None:
            return ()
        values = value if isinstance(value, list) else [value]
        return tuple(self.token_id("eos_token_id", item) for item in values)

    def token_field(self, key: str) -> Any:
        value = self.top.get(key)
        return self.text.get(key) if value is None else value

    def token_id(self, key: str, value: Any) -> int:
        # The ids need not be smaller than vocab_size: such a token is simply never sampled.
        if not _is_int(value) or not 0 <= value < MAX_SIZE:
            raise self.error(key, value, "must be a token id")
        return value

    def weight_block_size(self) -> tuple[int, int] | None:
        found = self.top.get("quantization_config")
        if found is None:
            found = self.text.get("quantization_config")
        if found is None:
            return None
        if not isinstance(found, dict):
            raise self.error("quantization_config", found, "must be an object")
        method, fmt = found.get("quant_method"), found.get("fmt", "e4m3")
        if method != "fp8" or fmt != "e4m3":
            raise self.error(
                "quantization_config", f"{method} {fmt}", "must be fp8 e4m3 with block scales"
            )
        block = found.get("weight_block_size")
        if (
            not isinstance(block, list)
            or len(block) != 2
            or not all(_is_int(size) and 1 <= size <= MAX_SIZE for size in block)
        ):
            raise self.error(
                "quantization_config.weight_block_size", block, "must be two positive integers"
            )
        return (block[0], block[1])

    def size(self, key: str, maximum: int = MAX_SIZE) -> int:
        value = self.text.get(key)
        if not _is_int(value) or not 1 <= value <= maximum:
            raise self.error(key, value, f"must be an integer of 1..{maximum}")
        return value

    def positive(self, key: str, default: float, source: Mapping[str, Any]) -> float:
        value = source.get(key)
        if value is None:
            return default
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value) or value <= 0:
            raise self.error(key, value, "must be a positive number")
        return float(value)

    def boolean(self, key: str, *, default: bool) -> bool:
        value = self.text.get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, value, "must be true or false")
        return value

    def error(self, key: str, found: Any, why: str) -> ConfigError:
        shown = "missing" if found is None else f"{found!r:.80}"
        return ConfigError(
            f"{self.path}: {key} is {shown}. It {why}. Use a Step-3 checkpoint in the "
            "Hugging Face layout.",
            details={"field": key},
        )


def _is_plain_rope(value: Any) -> bool:
    """Whether a rotary embedding that is described so has its angles unchanged."""
    return value is None or (
        isinstance(value, dict)
        and value.keys() <= {"rope_type", "type", "rope_theta"}
        and all(value.get(key) in (None, "default") for key in ("rope_type", "type"))
    )


def _is_int(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)
