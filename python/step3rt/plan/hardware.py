"""Accelerators and their prices: TOML in, one frozen dataclass per card out.

Owns peaks, sizes and prices; never how much of a peak a kernel reaches (`profile` does).
"""

import difflib
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any

from step3rt.errors import ConfigError, InvalidArgument
from step3rt.setting import load_toml

PAPER_CARDS = ("h800", "h20", "a800", "910b")  # table 4; their prices are the paper's
_SECONDS_PER_HOUR = 3600.0
_LEAST, _MOST = 1e-9, 1e21  # of a field, so that what follows from several is finite, too
_OPTIONAL = ("fp8_flops", "nvlink_bytes_per_s")
_PCIE_BYTES_PER_S = 2.5e10  # PCIe 4.0 x16, what a copy reaches


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """One card.

    Attributes:
        key: what the user calls it, e.g. "h800".
        usd_per_hour: price of one card.
        bf16_flops, fp8_flops: dense peaks in FLOP/s; fp8_flops is None where there is no FP8.
        bytes_per_s: memory bandwidth.
        memory_bytes: memory of one card.
        nvlink_bytes_per_s: one way, between cards of one host; None is PCIe.
        nic_bytes_per_s: one way, this card's share of its host's NICs.
        gpus_per_host: cards of one host.
    """

    key: str
    name: str
    source: str
    usd_per_hour: float
    bf16_flops: float
    fp8_flops: float | None = None
    bytes_per_s: float
    memory_bytes: float
    nvlink_bytes_per_s: float | None = None
    nic_bytes_per_s: float
    gpus_per_host: int

    @property
    def peak_flops(self) -> float:
        """The peak for 8-bit weights and KV: FP8, else BF16 (paper section 4.1)."""
        return self.fp8_flops or self.bf16_flops

    @property
    def host_bytes_per_s(self) -> float:
        """One-way bandwidth between cards of one host."""
        return self.nvlink_bytes_per_s or _PCIE_BYTES_PER_S

    @property
    def roofline(self) -> float:
        """FLOPs per byte at which compute and memory take equally long, at the BF16/FP8 peak."""
        return self.peak_flops / self.bytes_per_s

    @property
    def usd_per_flop(self) -> float:
        """Price of a FLOP at the peak (paper table 5)."""
        return self.usd_per_hour / _SECONDS_PER_HOUR / self.peak_flops

    @property
    def usd_per_byte(self) -> float:
        """Price of a byte of memory access at the peak (paper table 5)."""
        return self.usd_per_hour / _SECONDS_PER_HOUR / self.bytes_per_s


def load_hardware(extra_file: Path | None = None) -> dict[str, Hardware]:
    """The cards by key: those that ship, then those of `extra_file`, which may change fields.

    Raises:
        ConfigError: the file is unreadable, or a card has an unknown, missing or wrong field.
    """
    file = resources.files("step3rt.plan") / "data" / "hardware.toml"
    tables: dict[str, Any] = tomllib.loads(file.read_text(encoding="utf-8"))
    source = "hardware.toml"
    if extra_file is not None:
        source = str(extra_file)
        for written, values in load_toml(extra_file).items():
            key = written.lower()
            if not isinstance(values, dict):
                raise ConfigError(
                    f"The entry {written!r} of {source} is not a table. Each card is one. "
                    f"Write [{key}] and its fields below"
                )
            tables[key] = {"name": key, "source": source} | tables.get(key, {}) | values
    return {key: _card(key, values, source) for key, values in tables.items()}


def pick_hardware(key: str, cards: dict[str, Hardware]) -> Hardware:
    """The card of that key.

    Raises:
        ConfigError: there is none; the message has the nearest known one.
    """
    card = cards.get(key.lower())
    if card is not None:
        return card
    near = difflib.get_close_matches(key.lower(), cards, n=1)
    hint = f"Did you mean {near[0]!r}?" if near else f"Known are: {', '.join(cards)}."
    raise ConfigError(
        f"The hardware {key!r} is unknown. Its peaks and price are needed. {hint} "
        "Add cards with --hardware-file"
    )


def card_of_machine(machine: str, cards: Mapping[str, Hardware]) -> Hardware | None:
    """The card that the description of a machine names, e.g. "4 x NVIDIA H200"; None if none."""
    words = re.findall(r"[a-z]*\d+[a-z]*", machine.lower())
    return next((cards[word] for word in words if word in cards), None)


def parse_inventory(text: str, cards: dict[str, Hardware]) -> tuple[tuple[Hardware, int], ...]:
    """Cards and counts from text like "h20:8,h800:8".

    Raises:
        InvalidArgument: a kind has no count or comes twice.
        ConfigError: a card is unknown.
    """
    kinds: dict[str, tuple[Hardware, int]] = {}
    for part in text.split(","):
        key, _, count = part.strip().partition(":")
        if (
            not (count.isascii() and count.isdecimal() and len(count) < 10 and int(count))
            or key.lower() in kinds
        ):
            raise InvalidArgument(
                f"The inventory {text!r} has {part!r}. Each kind of card comes once, with a count "
                "above 0. Write it like h20:8,h800:8"
            )
        kinds[key.lower()] = (pick_hardware(key, cards), int(count))
    return tuple(kinds.values())


def _card(key: str, values: dict[str, Any], source: str) -> Hardware:
    wanted = {item.name: item.type for item in fields(Hardware) if item.name != "key"}
    for name, value in values.items():
        if name not in wanted:
            raise ConfigError(
                f"The field '{name}' of card {key!r} does not exist ({source}). Nothing would "
                f"read it. Known are: {', '.join(wanted)}"
            )
        is_text = name in ("name", "source")
        whole = "whole " if name == "gpus_per_host" else ""
        if is_text != isinstance(value, str) or (
            not is_text
            and (
                isinstance(value, bool)
                or not isinstance(value, int | float)
                or not _LEAST <= value <= _MOST
                or (name == "gpus_per_host" and value != int(value))
            )
        ):
            wanted_text = f"a {whole}number above 0, and finite: from {_LEAST:g} to {_MOST:g}"
            raise ConfigError(
                f"The field '{name}' of card {key!r} is {value!r} ({source}). It must be "
                f"{'text' if is_text else wanted_text}. Correct it"
            )
    for name in wanted:
        if name not in values and name not in _OPTIONAL:
            raise ConfigError(
                f"The field '{name}' of card {key!r} is missing ({source}). It has no default. "
                "Give it"
            )
    values = values | {"gpus_per_host": int(values["gpus_per_host"])}
    return Hardware(key=key, **values)
