"""Reads the text part of a Step-3 config.json for the oracle.

It never fills in a size that the file leaves out: a missing size is a KeyError that names it.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Class defaults of the published configuration, for the three fields that real files leave out.
DEFAULT_RMS_NORM_EPS = 1e-5
DEFAULT_ROPE_THETA = 500_000.0
DEFAULT_NORM_EXPERT_WEIGHT = False


@dataclass(frozen=True, slots=True)
class OracleConfig:
    """Sizes and switches of the text model, with the names of the design vocabulary."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    head_dim: int
    query_rank: int
    num_experts: int
    top_k: int
    moe_layers: frozenset[int]
    norm_expert_weight: bool
    rope_theta: float
    rms_norm_eps: float
    max_position: int
    eos_token_ids: frozenset[int]
    weight_block_size: tuple[int, int] | None


def read_config(directory: Path) -> OracleConfig:
    """Reads `config.json`, with the text model nested in `text_config` or flat.

    Raises:
        KeyError: a size is missing.
        ValueError: the file asks for something that Step-3 does not have.
    """
    top: dict[str, Any] = json.loads((directory / "config.json").read_text())
    text: dict[str, Any] = top.get("text_config", top)

    if text.get("rope_scaling") is not None:
        raise ValueError(f"Step-3 has no rope scaling, config asks for {text['rope_scaling']}")
    if text.get("num_attention_groups", 1) != 1:
        raise ValueError(f"Step-3 has one KV head, config has {text['num_attention_groups']}")

    num_layers = int(text["num_hidden_layers"])
    return OracleConfig(
        vocab_size=int(text["vocab_size"]),
        hidden_size=int(text["hidden_size"]),
        num_layers=num_layers,
        num_heads=int(text["num_attention_heads"]),
        head_dim=int(text["head_dim"]),
        query_rank=int(text["share_q_dim"]),
        num_experts=int(text["moe_num_experts"]),
        top_k=int(text["moe_top_k"]),
        moe_layers=parse_moe_layers(text.get("moe_layers_enum"), num_layers),
        norm_expert_weight=bool(text.get("norm_expert_weight", DEFAULT_NORM_EXPERT_WEIGHT)),
        rope_theta=float(text.get("rope_theta", DEFAULT_ROPE_THETA)),
        rms_norm_eps=float(text.get("rms_norm_eps", DEFAULT_RMS_NORM_EPS)),
        max_position=_max_position(text),
        eos_token_ids=_token_ids(top.get("eos_token_id", text.get("eos_token_id"))),
        weight_block_size=_weight_block_size(top, text),
    )


def parse_moe_layers(value: str | list[int] | None, num_layers: int) -> frozenset[int]:
    """Returns the layers with experts: "4,5" or [4, 5]; absent means all but the first."""
    if value is None:
        return frozenset(range(1, num_layers))
    if isinstance(value, str):
        return frozenset(int(part) for part in value.strip().split(",") if part.strip())
    return frozenset(int(layer) for layer in value)


def _max_position(text: dict[str, Any]) -> int:
    # Step-3 spells the key in the singular; the plural is what other models use.
    for key in ("max_position_embedding", "max_seq_len", "max_position_embeddings"):
        if key in text:
            return int(text[key])
    raise KeyError("max_position_embedding")


def _token_ids(value: int | list[int] | None) -> frozenset[int]:
    if value is None:
        return frozenset()
    return frozenset([value] if isinstance(value, int) else value)


def _weight_block_size(top: dict[str, Any], text: dict[str, Any]) -> tuple[int, int] | None:
    quantization = top.get("quantization_config") or text.get("quantization_config")
    if quantization is None:
        return None
    block_rows, block_columns = quantization["weight_block_size"]
    return int(block_rows), int(block_columns)
