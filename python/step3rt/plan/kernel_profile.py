"""A profile from what `step3rt bench kernels` measured, so that stages use real kernel times.

Owns the names and shapes of that file's rows; never runs a kernel. Each efficiency follows from
rows of its kernel alone; what the file does not measure stays as the given profile has it.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from step3rt.errors import ConfigError
from step3rt.plan.hardware import Hardware
from step3rt.plan.hf_config import load_model
from step3rt.plan.measurement import is_positive, read_json_object
from step3rt.plan.profile import Profile
from step3rt.plan.tiles import expert_rows, linear_rows

# The benchmark measures Step-3's shapes.
_KV_BYTES_PER_TOKEN = {"mfa_decode_bf16": 1024, "mfa_decode_fp8": 512}
_EXPERT_PARAMS = 3 * 7168 * 5120
_PROJECTION_PARAMS = {
    "qkv": 7168 * 2560,  # low-rank query, key and value
    "q_proj": 7168 * 2560,
    "wq": 2048 * 16384,
    "o_proj": 16384 * 7168,
}
_LEAST_SHARE, _MOST_SHARE = 1e-3, 1.0
_COUNT = r"([1-9]\d{0,8})"


@dataclass(frozen=True, slots=True)
class _Product:
    """A measured matrix product: bytes of weights, FLOPs, microseconds."""

    weight_bytes: float
    flops: float
    us: float


def profile_from_kernels(path: Path, card: Hardware, base: Profile) -> Profile:
    """`base` with the efficiencies that the file's rows give on `card`.

    Raises:
        ConfigError: unreadable, not a kernel result, or no row is of a kernel that is known.
    """
    rows = _rows(path)
    found: dict[str, float] = {}
    for kernel, field in (
        ("mfa_decode_bf16", "attention_bytes_bf16"),
        ("mfa_decode_fp8", "attention_bytes_fp8"),
    ):
        shares = [
            1e6 * tokens * _KV_BYTES_PER_TOKEN[kernel] / us / card.bytes_per_s
            for tokens, us in _attention(rows, kernel)
        ]
        if shares:
            found[field] = _clip(float(np.median(shares)))
    products_of = {"moe": _experts(rows, base), "linear": _projections(rows, base)}
    for name, products in products_of.items():
        if products:
            shares_of = _roofline_shares(products, card)
            found |= {f"{name}_{side}": share for side, share in shares_of.items()}
    if not found:
        raise ConfigError(
            f"The result file {str(path)!r} has no row of mfa_decode_*, moe_fp8 or proj_fp8 with a "
            "shape like 128x4096, E3xT256 or 'o_proj M128'. No efficiency follows from it. Give "
            "what `step3rt bench kernels` wrote"
        )
    profile = replace(base, source=f"{base.source}; kernels of {path.name}", **found)
    fixed_us = _attention_fixed_us(rows, card, profile)
    return profile if fixed_us is None else replace(profile, attention_fixed_us=fixed_us)


def _rows(path: Path) -> list[Mapping[str, Any]]:
    rows = read_json_object(path, "what `step3rt bench kernels` wrote").get("rows")
    if not isinstance(rows, list):
        raise ConfigError(
            f"The result file {str(path)!r} has no list of rows. It is not what `step3rt bench "
            "kernels` writes. Give such a file"
        )
    return [row for row in rows if isinstance(row, dict) and is_positive(row.get("us"))]


def _shapes(
    rows: Iterable[Mapping[str, Any]], kernel: str, pattern: str
) -> list[tuple[re.Match[str], float]]:
    """(match of the whole shape, microseconds) of a kernel's rows whose shape is understood."""
    matches = []
    for row in rows:
        match = re.fullmatch(pattern, str(row.get("shape", "")))
        if row.get("kernel") == kernel and match is not None:
            matches.append((match, float(row["us"])))
    return matches


def _attention(rows: Iterable[Mapping[str, Any]], kernel: str) -> list[tuple[int, float]]:
    """(cached tokens, microseconds); rows of varied lengths have the same mean."""
    shapes = _shapes(rows, kernel, rf"{_COUNT}x{_COUNT}(?: varlen)?")
    return [(int(shape[1]) * int(shape[2]), us) for shape, us in shapes]


def _experts(rows: Sequence[Mapping[str, Any]], base: Profile) -> list[_Product]:
    # `ffn_fixed_us` has the rest of a layer, so the products alone where the file has them.
    pattern = rf"E{_COUNT}xT{_COUNT}"
    found = _shapes(rows, "moe_fp8_gemms", pattern) or _shapes(rows, "moe_fp8", pattern)
    products = []
    for shape, us in found:
        experts = int(shape[1])
        mean = np.array(int(shape[2]) / experts)
        # The benchmark draws each row's expert.
        computed = experts * float(expert_rows(mean, np.sqrt(mean), base.moe_tile_rows))
        products.append(_Product(experts * _EXPERT_PARAMS, 2 * computed * _EXPERT_PARAMS, us))
    return products


def _projections(rows: Iterable[Mapping[str, Any]], base: Profile) -> list[_Product]:
    products = []
    for shape, us in _shapes(rows, "proj_fp8", rf"(\w+) M{_COUNT}"):
        if shape[1] in _PROJECTION_PARAMS:
            params = _PROJECTION_PARAMS[shape[1]]
            computed = float(linear_rows(np.array(float(shape[2])), base.linear_tile_rows))
            products.append(_Product(params, 2 * computed * params, us))
    return products


def _roofline_shares(products: Sequence[_Product], card: Hardware) -> dict[str, float]:
    """The shares of bandwidth and peak whose soft roofline explains the products best.

    us^2 = bytes_us^2 / b^2 + flops_us^2 / f^2 is linear in 1/b^2 and 1/f^2; each row counts by
    its relative error.
    """
    us = np.array([product.us for product in products])
    bytes_us = 1e6 * np.array([product.weight_bytes for product in products]) / card.bytes_per_s
    flops_us = 1e6 * np.array([product.flops for product in products]) / card.peak_flops
    sides = np.stack([(bytes_us / us) ** 2, (flops_us / us) ** 2], axis=1)
    bytes_term, flops_term = np.linalg.lstsq(sides, np.ones(us.size), rcond=None)[0]
    # A side that no row feels has no share of its own: its term is nothing, or noise below it.
    shares = {"bytes": bytes_term, "flops": flops_term}
    felt = {name: float(term) for name, term in shares.items() if term > 1e-6}
    return {name: _clip(term**-0.5) for name, term in felt.items()}


def _attention_fixed_us(
    rows: Iterable[Mapping[str, Any]], card: Hardware, profile: Profile
) -> float | None:
    """What whole attention layers take beyond KV and projections."""
    layer = load_model("step3").groups[-1]
    params = layer.attention.linear_params + layer.ffn.router_params
    rest = []
    for kernel, share, per_token in (
        ("attention_layer_fp8", profile.attention_bytes_fp8, 512),
        ("attention_layer_bf16", profile.attention_bytes_bf16, 1024),
    ):
        for shape, us in _shapes(rows, kernel, rf"{_COUNT}x{_COUNT}"):
            sequences, tokens = int(shape[1]), int(shape[1]) * int(shape[2])
            padded = float(linear_rows(np.array(float(sequences)), profile.linear_tile_rows))
            core_us = 1e6 * tokens * per_token / (card.bytes_per_s * share)
            linear_us = np.hypot(
                1e6 * params / (card.bytes_per_s * profile.linear_bytes),
                2e6 * padded * params / (card.peak_flops * profile.linear_flops),
            )
            rest.append(us - core_us - float(linear_us))
    return max(0.0, float(np.median(rest))) if rest else None


def _clip(share: float) -> float:
    return min(max(share, _LEAST_SHARE), _MOST_SHARE)
