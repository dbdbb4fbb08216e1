"""Reads a Hugging Face config.json into a `Model`, for any of the families the planner knows.

Owns the many names that the same size has in different configs; never computes cost.
"""

import json
from collections import Counter
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from step3rt.errors import ConfigError
from step3rt.plan.architecture import AttentionLayer, FfnLayer, LayerGroup, Model

_EXPERTS = ("n_routed_experts", "moe_num_experts", "num_experts", "num_local_experts")
_TOP_K = ("num_experts_per_tok", "moe_top_k", "moe_k", "num_experts_per_token")
_KV_HEADS = ("num_key_value_heads", "num_attention_groups")
_MAX_CONFIG_BYTES = 16 << 20
_MAX_LAYERS = 10_000  # a config is a stranger's file: per-layer lists are sized by this number
_MAX_SIZE = 1 << 40


def shipped_models() -> list[str]:
    """Names of the models whose configs ship, sorted."""
    files = (resources.files("step3rt.plan") / "data" / "models").iterdir()
    return sorted(item.name.removesuffix(".json") for item in files if item.name.endswith(".json"))


def load_model(name_or_path: str) -> Model:
    """The model of that name, or of a config.json, or of a directory that has one.

    Raises:
        ConfigError: no such model or file, not JSON, or a size is missing or impossible.
    """
    path = Path(name_or_path)
    if name_or_path in shipped_models():
        file = resources.files("step3rt.plan") / "data" / "models" / f"{name_or_path}.json"
        return parse_config(name_or_path, json.loads(file.read_text(encoding="utf-8")))
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        raise ConfigError(
            f"The model {name_or_path!r} is neither one that the planner ships nor a config.json. "
            f"Nothing can be planned for it. Take one of {', '.join(shipped_models())}, or give "
            "the path of a checkpoint or its config.json"
        )
    size_bytes = path.stat().st_size
    if size_bytes > _MAX_CONFIG_BYTES:
        raise ConfigError(
            f"The file {str(path)!r} has {size_bytes} bytes. A config.json has at most "
            f"{_MAX_CONFIG_BYTES}. Give the configuration, not the weights"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"The model configuration {str(path)!r} cannot be read: {error}. The planner needs "
            "its sizes. Correct the file"
        ) from error
    if not isinstance(config, dict):
        raise ConfigError(
            f"The model configuration {str(path)!r} is not a JSON object. The planner needs its "
            "sizes. Correct the file"
        )
    return parse_config(path.parent.name or path.stem, config)


def parse_config(name: str, config: Mapping[str, Any]) -> Model:
    """The model that a parsed config.json describes; a `text_config` inside wins.

    Raises:
        ConfigError: a size is missing or impossible, or the attention is of an unknown family.
    """
    text = config.get("text_config")
    sizes = _Sizes(name, text if isinstance(text, Mapping) else config)
    num_layers = sizes.get("num_hidden_layers")
    if num_layers > _MAX_LAYERS:
        raise sizes.error("num_hidden_layers", f"{num_layers}; at most {_MAX_LAYERS}")
    kinds = _attention_kinds(sizes, num_layers)
    moe_layers = _moe_layers(sizes, num_layers)
    shapes = Counter((kinds[layer], layer in moe_layers) for layer in range(num_layers))
    return Model(
        name=name,
        hidden_size=sizes.get("hidden_size"),
        vocab_size=sizes.get("vocab_size"),
        is_tied=bool(config.get("tie_word_embeddings", False)),
        groups=tuple(
            LayerGroup(count, _attention(sizes, kind), _ffn(sizes, is_moe))
            for (kind, is_moe), count in sorted(shapes.items())
        ),
    )


class _Sizes:
    """A config's numbers, checked when they are asked for."""

    def __init__(self, name: str, values: Mapping[str, Any]) -> None:
        self.name = name
        self.values = values

    def error(self, key: str, found: str) -> ConfigError:
        return ConfigError(
            f"The configuration of {self.name!r} has {key} = {found}. The planner cannot size the "
            "model from it. Correct the config.json"
        )

    def get(self, *keys: str, default: int | None = None) -> int:
        """The first of `keys` that has a value; it may be 0 where that is the default."""
        low = 0 if default == 0 else 1
        for key in keys:
            value = self.values.get(key)
            if value is None:
                continue
            if (
                isinstance(value, bool)
                or not isinstance(value, int)
                or not low <= value < _MAX_SIZE
            ):
                raise self.error(key, repr(value)[:80])
            return value
        if default is None:
            raise self.error(keys[0], "nothing")
        return default

    def list(self, key: str, length: int) -> list[Any] | None:
        value = self.values.get(key)
        if not value:
            return None
        if not isinstance(value, list) or len(value) < length:
            raise self.error(key, f"no list of {length} entries, one for each layer")
        return value[:length]


def _attention_kinds(sizes: _Sizes, num_layers: int) -> list[str]:
    if types := sizes.list("attn_type_list", num_layers):
        return ["linear" if kind == 0 else "full" for kind in types]
    if sizes.get("attention_chunk_size", default=0):
        # The list has 1 where rotary positions are used, and there attention is chunked.
        every = sizes.get("no_rope_layer_interval", default=4)
        ropes = sizes.list("no_rope_layers", num_layers)
        ropes = ropes or [(layer + 1) % every for layer in range(num_layers)]
        return ["window" if has_rope else "full" for has_rope in ropes]
    if types := sizes.list("layer_types", num_layers):
        names = {
            "full_attention": "full",
            "sliding_attention": "window",
            "chunked_attention": "window",
        }
        if str(sizes.values.get("model_type", "")).startswith("minimax"):
            names["linear_attention"] = "linear"
        for kind in types:
            if kind not in names:
                raise sizes.error("layer_types", f"[… {kind!r} …], which is of no known family")
        return [names[kind] for kind in types]
    if "linear_attn_config" in sizes.values:
        raise sizes.error("linear_attn_config", "…, which is of no known family")
    return ["full"] * num_layers


def _attention(sizes: _Sizes, kind: str) -> AttentionLayer:
    hidden = sizes.get("hidden_size")
    heads = sizes.get("num_attention_heads")
    if kind == "full" and sizes.values.get("kv_lora_rank"):
        return _mla(sizes, hidden, heads)
    dim = sizes.get("head_dim", default=max(hidden // heads, 1))
    width = heads * dim
    if kind == "linear":
        # Query, key, value, output gate and output projection, all of full width.
        return AttentionLayer("linear", 0, 0, 5 * hidden * width, width, None, heads * dim * dim)
    kv_width = sizes.get(*_KV_HEADS, default=heads) * dim
    core_flops = 4 * width
    if rank := sizes.get("share_q_dim", default=0):
        linear = hidden * rank + rank * width + 2 * hidden * kv_width + width * hidden
        return AttentionLayer("mfa", 2 * kv_width, core_flops, linear, width)
    linear = hidden * width + 2 * hidden * kv_width + width * hidden
    if kind == "window":
        window = sizes.get("attention_chunk_size", "sliding_window")
        return AttentionLayer("window", 2 * kv_width, core_flops, linear, width, window)
    return AttentionLayer("gqa", 2 * kv_width, core_flops, linear, width)


def _mla(sizes: _Sizes, hidden: int, heads: int) -> AttentionLayer:
    latent = sizes.get("kv_lora_rank")
    rope = sizes.get("qk_rope_head_dim")
    nope = sizes.get("qk_nope_head_dim")
    value = sizes.get("v_head_dim")
    rank = sizes.get("q_lora_rank", default=0)  # null in small models: one full projection
    query = hidden * rank + rank * heads * (nope + rope) if rank else hidden * heads * (nope + rope)
    linear = (
        query + hidden * (latent + rope) + latent * heads * (nope + value) + heads * value * hidden
    )
    cached = latent + rope
    # Weights absorbed: every head is of width latent + rope. The paper counts that width for
    # the values too, where latent alone is used, so its FLOPs and intensity are 6 % high.
    return AttentionLayer("mla", cached, 4 * heads * cached, linear, heads * nope)


def _moe_layers(sizes: _Sizes, num_layers: int) -> set[int]:
    if not sizes.get(*_EXPERTS, default=0):
        return set()
    layers = set(range(num_layers))
    if "moe_layers_enum" in sizes.values:
        text = str(sizes.values["moe_layers_enum"])
        try:
            return {int(item) for item in text.strip("()[] ").split(",")} & layers
        except ValueError as error:
            raise sizes.error("moe_layers_enum", repr(text[:80])) from error
    first_dense = sizes.get("first_k_dense_replace", "moe_layer_start_index", default=0)
    last = sizes.get("moe_layer_end_index", default=num_layers)
    every = max(
        sizes.get("interleave_moe_layer_step", "decoder_sparse_step", default=1),
        sizes.get("moe_layer_freq", "moe_layer_interval", default=1),
    )
    dense = sizes.values.get("mlp_only_layers") or []
    if not isinstance(dense, list):
        raise sizes.error("mlp_only_layers", repr(dense)[:80])
    return {
        layer
        for layer in layers
        if first_dense <= layer <= last and (layer + 1) % every == 0 and layer not in dense
    }


def _ffn(sizes: _Sizes, is_moe: bool) -> FfnLayer:
    hidden = sizes.get("hidden_size")
    if not is_moe:
        return FfnLayer(3 * hidden * sizes.get("intermediate_size_mlp", "intermediate_size"))
    width = sizes.get("moe_intermediate_size", "intermediate_size")
    shared = sizes.get(
        "share_expert_dim",
        "shared_expert_intermediate_size",
        "shared_intermediate_size",
        default=0,
    ) or width * sizes.get("n_shared_experts", "moe_num_shared_experts", default=0)
    if str(sizes.values.get("model_type", "")).startswith("llama4"):
        shared = width  # always one shared expert, of which the config says nothing
    num_experts, top_k = sizes.get(*_EXPERTS), sizes.get(*_TOP_K)
    if top_k > num_experts:
        raise sizes.error(_TOP_K[0], f"{top_k} of {num_experts} experts")
    return FfnLayer(
        dense_params=3 * hidden * shared,
        expert_params=3 * hidden * width,
        num_experts=num_experts,
        top_k=top_k,
        router_params=hidden * num_experts,
    )
