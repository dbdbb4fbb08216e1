"""How much of the peaks the kernels reach: stated with their source, or fitted to measurements.

Owns the numbers that no data sheet has; never a card's peak (`hardware`) or a formula (`stages`).
"""

import json
import os
import tomllib
from dataclasses import MISSING, asdict, dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any

from step3rt.errors import ConfigError
from step3rt.setting import load_toml

SHARES = frozenset(
    (
        "attention_bytes_bf16",
        "attention_bytes_fp8",
        "attention_flops",
        "linear_bytes",
        "linear_flops",
        "head_bytes",
        "head_flops",
        "moe_bytes",
        "moe_flops",
        "nic_share",
        "nvlink_share",
    )
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Efficiencies as shares of a peak (0 to 1), fixed times in microseconds.

    Attributes:
        source: where the numbers come from.
        attention_bytes_bf16, attention_bytes_fp8: of memory bandwidth, reading KV of that type.
        attention_flops: of the peak, in scores and values.
        linear_bytes, linear_flops: of bandwidth and peak, in projections.
        head_bytes, head_flops: the same in the LM head, one BF16 product by a library.
        attention_fixed_us: norms, rotary, router, quantise and gaps of one layer.
        moe_bytes, moe_flops: of bandwidth and peak, in FFN matrix products.
        ffn_fixed_us: dispatch, activation, combine and gaps of one layer.
        nic_share, nvlink_share: of one-way bandwidth.
        nic_latency_us, nvlink_latency_us: from a stage's end to the next stage's start, bytes
            aside.
        a2f_fixed_us, f2a_fixed_us: of the kernels that store rows into another GPU's memory,
            beyond the bytes: launch, choice of rows, flags; on the way back, adding up the sums.
        step_fixed_us: embedding, sampling and scheduling of one step of one lane.
        jitter_us: mean of the exponential delay that each stage of each GPU adds.
        expert_skew: standard deviation over mean of the experts' popularity.
        linear_tile_rows, moe_tile_rows: rows of a whole tile of those products (see `tiles`); 0
            takes rows as they are.
        sharing_rows: lanes of at most so many rows share a GPU that both want, as their kernels
            leave room for each other's; those of more rows take turns.
    """

    source: str
    attention_bytes_bf16: float
    attention_bytes_fp8: float
    attention_flops: float
    linear_bytes: float
    linear_flops: float
    head_bytes: float
    head_flops: float
    attention_fixed_us: float
    moe_bytes: float
    moe_flops: float
    ffn_fixed_us: float
    nic_share: float
    nvlink_share: float
    nic_latency_us: float
    nvlink_latency_us: float
    step_fixed_us: float
    jitter_us: float
    expert_skew: float
    # Profiles of before have none of these.
    a2f_fixed_us: float = 0.0
    f2a_fixed_us: float = 0.0
    linear_tile_rows: float = 0.0
    moe_tile_rows: float = 0.0
    sharing_rows: float = 0.0

    def attention_bytes(self, kv_element_bytes: float) -> float:
        """Share of memory bandwidth reached reading KV whose elements have that many bytes."""
        return self.attention_bytes_fp8 if kv_element_bytes == 1 else self.attention_bytes_bf16


STATED = "paper-h800"
"""What is taken when nothing is named and nothing was fitted."""


def fitted_profile_path() -> Path | None:
    """Where `plan compare --save` keeps what it fitted if no file is named.

    `None` for a user without a home directory, as in a container that runs under any number.
    """
    base = os.environ.get("XDG_CONFIG_HOME")
    try:
        settings = Path(base) if base else Path.home() / ".config"
    except RuntimeError:
        return None
    return settings / "step3rt" / "fitted.toml"


def load_profile(name_or_path: str) -> Profile:
    """A profile that ships, or one from a TOML file.

    Raises:
        ConfigError: unknown name, unreadable file, or a field is unknown, missing or impossible.
    """
    file = resources.files("step3rt.plan") / "data" / "profiles.toml"
    shipped: dict[str, Any] = tomllib.loads(file.read_text(encoding="utf-8"))
    if name_or_path in shipped:
        return _build(shipped[name_or_path], name_or_path)
    if not Path(name_or_path).is_file():
        raise ConfigError(
            f"The profile {name_or_path!r} is neither one that ships nor a file. Stage times need "
            f"one. Take {' or '.join(shipped)}, or a file that `step3rt plan compare --save` wrote"
        )
    return _build(load_toml(Path(name_or_path)), name_or_path)


def save_profile(profile: Profile, path: Path) -> None:
    """Writes the profile as TOML, for `load_profile`.

    Raises:
        ConfigError: the file cannot be written.
    """
    lines = [f"source = {json.dumps(profile.source)}"]  # a JSON string is a TOML basic string
    lines += [
        f"{name} = {value:.6g}" for name, value in asdict(profile).items() if name != "source"
    ]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"The profile cannot be written to {str(path)!r}: {error.strerror}. Nothing was "
            "saved. Give another path"
        ) from error


def _build(values: dict[str, Any], source: str) -> Profile:
    known = [item.name for item in fields(Profile)]
    defaults = {item.name: item.default for item in fields(Profile) if item.default is not MISSING}
    for name in values:
        if name not in known:
            raise ConfigError(
                f"The field '{name}' of profile {source!r} does not exist. Nothing would read it. "
                f"Known are: {', '.join(known)}"
            )
    checked: dict[str, Any] = {"source": str(values.get("source", source))}
    for name in known[1:]:
        value = values.get(name, defaults.get(name))
        high = 1.0 if name in SHARES else 1e6
        low = 1e-3 if name in SHARES else 0.0
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is None or not is_number or not low <= value <= high:
            raise ConfigError(
                f"The field '{name}' of profile {source!r} is {value!r}. It must be a number from "
                f"{low:g} to {high:g}. Correct it"
            )
        checked[name] = float(value)
    return Profile(**checked)
