"""What a decode run's recordings say: stages, bubbles, experts' load, bytes, roofline shares.

Owns the keys of the result file that come from the instances' own times; what the coordinator's
log says is `bench.decode`'s.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from step3rt.bench.decode_work import (
    Shape,
    Work,
    attention_work,
    ffn_work,
    head_work,
    transfer_work,
)
from step3rt.model.placement import expert_range
from step3rt.plan.hardware import Hardware
from step3rt.trace.recording import Recording
from step3rt.trace.stages import SteadyState, steady_state
from step3rt.trace.timeline import build

MAX_STEPS = 128
"""Of each lane in the stages' means."""

Rows = npt.NDArray[np.int32]


def stage_report(
    recordings: list[Recording], shape: Shape, card: Hardware | None, max_steps: int = MAX_STEPS
) -> dict[str, Any]:
    """`stages` and what belongs to them, of the result file.

    Args:
        recordings: of all instances, see `trace.recording.load_all`.
        shape: what decoded.
        card: what all instances run on; without one, no share of a roofline is stated.
        max_steps: of each lane that the means are over, at most.

    Raises:
        InvalidArgument: the recordings do not belong together.
        Unavailable: they have no steady state.
    """
    steady = steady_state(build(recordings), max_steps)
    looks = [_full_looks(each, shape) for each in recordings if each.shape.role == "ffn"]
    merged = [each.reshape(-1, *each.shape[2:]) for each in looks]
    attention, ffn = attention_work(shape, card), ffn_work(shape, merged, card)
    # Only what lies on another GPU is reached by a link.
    devices = {role: _devices(recordings, role) for role in ("attention", "ffn")}
    is_apart = not devices["attention"] & devices["ffn"]
    there, back = transfer_work(shape, card if is_apart else None)
    works = {
        "attention": attention,
        "head": head_work(shape, card),
        "ffn": ffn,
        "a2f": there,
        "f2a": back,
    }
    report: dict[str, Any] = {
        "stages": _stages(steady, works),
        "bubble_share": {"mean": steady.shares["wait"], "by_gpu": steady.bubbles},
        "stages_over": {
            "seconds": round(steady.seconds, 3),
            "steps": steady.num_steps,
            "context": shape.context_tokens,
        },
        "device_step_ms": _quantiles(steady.step_ms),
        "expert_load": _expert_load(merged, shape),
        "bytes_per_step": _bytes_per_step(works, shape),
    }
    if card is not None:
        report["roofline"] = {
            "card": card.key,
            "memory_bytes_per_s": card.bytes_per_s,
            "fp8_flops": card.peak_flops,
            "bf16_flops": card.bf16_flops,
            "link_bytes_per_s": card.host_bytes_per_s,
            "peaks_are": "nominal",
        }
    return report


def _stages(steady: SteadyState, works: dict[str, Work | None]) -> dict[str, Any]:
    stages: dict[str, Any] = {}
    for name, time in steady.stages.items():
        stages[name] = {
            "us": time.own_us,
            "elapsed_us": time.elapsed_us,
            "share": steady.shares[name],
            **_roofline(works.get(name), time.own_us),
        }
    stages["transfer"] = {
        "us": steady.transfer_us,
        "share": round(steady.shares["a2f"] + steady.shares["f2a"], 4),
    }
    stages["wait"] = {
        "us": steady.wait_us["attention"],
        "ffn_us": steady.wait_us["ffn"],
        "share": steady.shares["wait"],
    }
    return stages


def _quantiles(values: npt.NDArray[np.float64]) -> dict[str, float]:
    if not len(values):
        return {}
    shares = np.quantile(values, [0.5, 0.99, 1.0])
    return dict(zip(("p50", "p99", "max"), shares.round(3).tolist(), strict=True))


def _roofline(work: Work | None, us: float) -> dict[str, Any]:
    if work is None:
        return {}
    values: dict[str, Any] = {"bytes": round(work.num_bytes)}
    if work.flops:
        values["flops"] = round(work.flops)
    if work.peak_us is not None and us > 0:
        values["roofline_us"] = round(work.peak_us, 2)
        values["roofline_limit"] = work.limit
        if us < work.peak_us:
            # Nothing is faster than the card: of a GPU that lanes share, this one took more than
            # the equal part that counts as its own.
            values["roofline_share_missing"] = (
                f"{us} us are less than it takes: lanes share a GPU's time in unequal parts"
            )
        else:
            values["roofline_share"] = round(work.peak_us / us, 4)
    return values


def _devices(recordings: Sequence[Recording], role: str) -> set[str]:
    return {
        each.shape.device if each.shape.device.startswith("cuda") else each.name
        for each in recordings
        if each.shape.role == role
    }


def _full_looks(recording: Recording, shape: Shape) -> Rows:
    """i32[looks, lanes, layers, groups] of the looks at which the lanes had all their rows."""
    rows = recording.group_rows
    if not len(rows):
        return rows
    experts = expert_range(shape.config.num_experts, recording.shape.rank, shape.num_ffn)
    # A row has its home at one rank in every layer, whatever its experts: in the last group there.
    last = [len(experts) if layer.is_moe else 0 for layer in shape.config.layers]
    home = rows[:, :, np.arange(len(last)), last]
    full = home.max(axis=(0, 2), keepdims=True)
    is_full = (home == full).all(axis=(1, 2)) & (rows.sum(axis=(1, 2, 3)) > 0)
    found: Rows = rows[is_full]
    return found


def _expert_load(rows: Sequence[Rows], shape: Shape) -> dict[str, Any] | None:
    """Rows of one micro-batch per routed expert; ranks are looked at in different steps."""
    num_looks = min((len(each) for each in rows), default=0)
    layers = shape.moe_layers
    if not num_looks or not layers:
        return None
    routed, totals = [], []
    for rank, found in enumerate(rows):
        num_experts = len(expert_range(shape.config.num_experts, rank, shape.num_ffn))
        in_moe = found[:num_looks, layers].astype(np.float64)
        routed.append(in_moe[..., :num_experts])
        totals.append(in_moe[..., : num_experts + 1].sum(axis=-1))
    by_expert, by_rank = np.concatenate(routed, axis=-1), np.stack(totals, axis=-1)
    return {
        "looks": num_looks,
        "rows_per_expert": {
            "mean": round(float(by_expert.mean()), 2),
            "max": int(by_expert.max()),
            "min": int(by_expert.min()),
        },
        "max_over_mean": _max_over_mean(by_expert),
        "popularity_max_over_mean": _max_over_mean(by_expert.mean(axis=0)),
        "rank_max_over_mean": _max_over_mean(by_rank),
    }


def _max_over_mean(rows: npt.NDArray[np.float64]) -> float:
    """The mean over layers and looks of what the busiest has, over what the mean one has."""
    means = np.maximum(rows.mean(axis=-1), 1e-9)
    return round(float((rows.max(axis=-1) / means).mean()), 4)


def _bytes_per_step(works: dict[str, Work | None], shape: Shape) -> dict[str, int]:
    """Of all GPUs and lanes in one step: read from memory by a stage, or sent."""
    values = {}
    for name, work in works.items():
        if work is not None:
            gpus = shape.num_ffn if name in ("ffn", "f2a") else shape.num_attention
            layers = 1 if name == "head" else shape.config.num_layers
            values[name] = round(work.num_bytes * shape.num_lanes * gpus * layers)
    return values
