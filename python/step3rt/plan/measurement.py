"""Reads the result files of whole decode runs (docs/results/decode-*.json).

Owns their names for things and what a run's name says about its placement; never predicts.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from step3rt.errors import ConfigError, InvalidArgument
from step3rt.plan.architecture import Model
from step3rt.plan.cost import DTYPE_BYTES, Precision
from step3rt.plan.deployment import Deployment
from step3rt.plan.hardware import Hardware, card_of_machine
from step3rt.plan.hf_config import parse_config
from step3rt.plan.stages import expected_maximum

STAGES = ("attention", "head", "a2f", "ffn", "f2a", "transfer")
_MAX_FILE_BYTES = 64 << 20
_MAX_COUNT = 1_000_000_000
# A slice carries, on each FFN GPU, what one of the paper's 16 FFN GPUs does of 48 experts.
_SLICE_EXPERTS_PER_GPU = 3
_STEPS_AFTER = 48  # of `step3rt bench decode`, until the first stream ends


@dataclass(frozen=True, slots=True)
class Measurement:
    """One measured run.

    Attributes:
        name: the run's name and its file.
        deployment: where it ran.
        batch: sequences in flight over all GPUs and lanes.
        context_tokens: mean context.
        precision: of the KV cache.
        num_experts: routed experts, if fewer than the model has; else None.
        num_layers: layers that ran; None if the file does not say.
        model: what ran, from the sizes in the file; None if it has none.
        tpot_ms: p50.
        tpot_p99_ms: None if the file has none.
        tokens_per_s_per_gpu: over all GPUs.
        stage_context_tokens: mean context of the steps that stages are means of.
        expert_skew: standard deviation over mean of the experts' popularity, as the busiest one's
            says; None if the file does not have it.
        busy_share: of all GPUs' time, in which some lane is at work; None if the file has none.
        stage_us: mean of one layer and micro-batch, for those of STAGES that the file has; of
            "head" of one step and micro-batch; "transfer" is both ways together, latency included.
    """

    name: str
    deployment: Deployment
    batch: int
    context_tokens: int
    precision: Precision
    num_experts: int | None
    num_layers: int | None
    model: Model | None
    tpot_ms: float
    tpot_p99_ms: float | None
    tokens_per_s_per_gpu: float
    stage_context_tokens: float
    expert_skew: float | None
    busy_share: float | None
    stage_us: dict[str, float]


def result_files(paths: Iterable[Path]) -> list[Path]:
    """The files themselves, and of each directory its decode-*.json; in order, each once.

    Raises:
        ConfigError: a directory has none.
    """
    found = []
    for path in paths:
        if not path.is_dir():
            found.append(path)
            continue
        inside = sorted(path.glob("decode-*.json"))
        if not inside:
            raise ConfigError(
                f"The directory {str(path)!r} has no decode-*.json. Those are what `step3rt bench "
                "decode --out` writes. Give another directory, or the files"
            )
        found += inside
    return list(dict.fromkeys(found))


def load_measurement(
    path: Path, cards: Mapping[str, Hardware], card: Hardware | None = None
) -> Measurement:
    """The run in a result file.

    Args:
        path: the file.
        cards: known hardware; the file's "machine" names one of it.
        card: the hardware, where the file's "machine" does not tell.

    Raises:
        ConfigError: unreadable, not a decode result, or a value is missing or impossible.
    """
    values = ResultValues(path)
    run = values.text("run").lower()
    if card is None:
        card = card_of_machine(values.text("machine"), cards)
        if card is None:
            raise values.error("machine", "names no card that the planner knows. Give --hardware")
    try:
        deployment = _placement(values, run, card, values.count("gpus"), values.count("lanes"))
    except InvalidArgument as error:
        raise ConfigError(f"The result file {str(path)!r} cannot be used. {error}") from error
    experts = None if values.values.get("experts") is None else values.count("experts")
    if experts is None and "slice" in run:
        experts = _SLICE_EXPERTS_PER_GPU * deployment.num_ffn_gpus
    dtype = {"bf16": "bfloat16", "e4m3": "fp8"}.get(
        values.text("kv_dtype"), values.text("kv_dtype")
    )
    if dtype not in DTYPE_BYTES:
        raise values.error("kv_dtype", f"is not one of {', '.join(DTYPE_BYTES)}")
    if values.values.get("weight_dtype", "fp8") != "fp8":
        raise values.error("weight_dtype", "the planner does not know: weights have one byte")
    sizes = values.values.get("model")
    tpot = values.values["tpot_ms"] if isinstance(values.values.get("tpot_ms"), dict) else {}
    return Measurement(
        name=f"{run} ({path.name})",
        deployment=deployment,
        batch=values.count("batch"),
        context_tokens=values.count("context"),
        precision=Precision(kv_bytes=DTYPE_BYTES[dtype]),
        num_experts=experts,
        num_layers=values.count("layers") if "layers" in values.values else None,
        model=parse_config(run, sizes) if isinstance(sizes, Mapping) else None,
        tpot_p99_ms=float(tpot["p99"]) if is_positive(tpot.get("p99")) else None,
        tpot_ms=values.number("tpot_ms", "p50"),
        tokens_per_s_per_gpu=values.number("tokens_per_s_per_gpu"),
        stage_context_tokens=_stage_context(values),
        expert_skew=_expert_skew(values, experts),
        busy_share=_busy_share(values),
        stage_us={name: us for name in STAGES if (us := values.stage_us(name)) is not None},
    )


def _stage_context(values: "ResultValues") -> float:
    """Stages are of the last steps: sequences are longer then than in the mean of the run."""
    context, over = values.number("context"), values.values.get("stages_over")
    steps, last = values.values.get("steps"), over.get("steps") if isinstance(over, dict) else None
    if not is_positive(steps) or not is_positive(last):
        return context
    # "context" is reached half way; the last of the steps that stages are of is the last of all,
    # some steps after those that were measured.
    before = max(0.0, float(steps) - float(last))  # type: ignore[arg-type]
    return context + before / 2 + _STEPS_AFTER


def _expert_skew(values: "ResultValues", num_experts: object) -> float | None:
    load = values.values.get("expert_load")
    busiest = load.get("popularity_max_over_mean") if isinstance(load, dict) else None
    if not is_positive(busiest) or not isinstance(num_experts, int) or num_experts < 2:
        return None
    return max(0.0, float(busiest) - 1) / expected_maximum(num_experts)  # type: ignore[arg-type]


def _busy_share(values: "ResultValues") -> float | None:
    share = values.stage("wait", "share")
    return None if share is None or share >= 1 else 1 - share


def _placement(
    values: "ResultValues", run: str, card: Hardware, gpus: int, lanes: int
) -> Deployment:
    if "colocated" in str(values.values.get("placement", run)) or _is_shared(values, gpus):
        return Deployment(
            placement="colocated",
            attention_card=card,
            ffn_card=card,
            num_attention_gpus=gpus,
            num_ffn_gpus=0,
            lanes=lanes,
        )
    if "attention" in values.values and "ffn" in values.values:
        attention, ffn = values.count("attention"), values.count("ffn")
    else:
        match = re.search(r"(\d+)a(\d+)f", run)
        if match is None:
            raise values.error("run", "names neither a colocated run nor one like 2a2f")
        attention, ffn = int(match[1]), int(match[2])
    # "2A2F" counts GPUs here, and hosts of 8 in the paper.
    per_instance = {attention + ffn: 1, (attention + ffn) * card.gpus_per_host: card.gpus_per_host}
    if gpus not in per_instance:
        raise values.error("gpus", f"is neither {' nor '.join(map(str, per_instance))}")
    return Deployment(
        placement="disaggregated",
        attention_card=card,
        ffn_card=card,
        num_attention_gpus=attention * per_instance[gpus],
        num_ffn_gpus=ffn * per_instance[gpus],
        lanes=lanes,
        ffn_parallelism="ep" if per_instance[gpus] == 1 else "tp_ep",
    )


def _is_shared(values: "ResultValues", gpus: int) -> bool:
    """Whether every GPU has an instance of both roles, whatever the placement is called."""
    roles = [values.values.get(role) for role in ("attention", "ffn")]
    return roles == [gpus, gpus]


class ResultValues:
    """A decode run's values, checked when they are asked for.

    `number` and `text` raise a ConfigError that names file and key where a value is not usable.
    """

    def __init__(self, path: Path) -> None:
        """Reads the file.

        Raises:
            ConfigError: unreadable, too large, or not a JSON object.
        """
        self.path = path
        self.values = read_json_object(path, "a decode run's JSON object, see docs/planning.md")

    def error(self, key: str, what: str) -> ConfigError:
        """What is wrong with a key, for people."""
        return ConfigError(
            f"The result file {str(self.path)!r} has {key} = {self.values.get(key)!r}, which "
            f"{what}. The run cannot be predicted. Correct the file"
        )

    def text(self, key: str) -> str:
        """A key's text."""
        value = self.values.get(key)
        if not isinstance(value, str):
            raise self.error(key, "is not text")
        return value

    def number(self, key: str, inner: str | None = None) -> float:
        """A key's number above 0, or that of a key inside it."""
        value = self.values.get(key)
        if inner is not None:
            value = value.get(inner) if isinstance(value, dict) else None
        if not is_positive(value):
            raise self.error(key, f"has no number above 0{f' as {inner}' if inner else ''}")
        return float(value)  # type: ignore[arg-type]

    def count(self, key: str) -> int:
        """A key's number, at least 1, without what is behind its point."""
        value = self.number(key)
        if not 1 <= value <= _MAX_COUNT:
            raise self.error(key, f"is not from 1 to {_MAX_COUNT}")
        return int(value)

    def stage_us(self, name: str) -> float | None:
        """A stage's microseconds; None if the file does not have it."""
        return self.stage(name, "us")

    def stage(self, name: str, key: str) -> float | None:
        """A number above 0 that belongs to a stage; None if the file does not have it."""
        stages = self.values.get("stages")
        value = stages.get(name) if isinstance(stages, dict) else None
        if isinstance(value, dict):
            value = value.get(key)
        elif key != "us":
            value = None
        return float(value) if is_positive(value) else None  # type: ignore[arg-type]


def read_json_object(path: Path, wanted: str) -> dict[str, Any]:
    """The object in a result file, which should be `wanted`.

    Raises:
        ConfigError: unreadable, too large, or not a JSON object.
    """
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise ValueError(f"it has more than {_MAX_FILE_BYTES} bytes")
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("it is not a JSON object")
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(
            f"The result file {str(path)!r} cannot be read: {reason}. The planner reads "
            f"{wanted}. Give such a file"
        ) from error
    return values


def is_positive(value: object) -> bool:
    """Whether a value is a finite number above 0."""
    return is_finite(value) and value > 0  # type: ignore[operator]


def is_finite(value: object) -> bool:
    """Whether a value is a finite number; of JSON's whole numbers, not all are."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    try:
        return is_number and math.isfinite(value)  # type: ignore[arg-type]
    except OverflowError:
        return False
