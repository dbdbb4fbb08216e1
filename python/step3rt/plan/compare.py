"""Predicted beside measured, stage by stage, and the profile that explains the measurements best.

Owns the error measure and the fit; reads no files (`measurement` does). The fit moves efficiencies
as little as the measurements demand: what no run depends on stays what the profile said.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from step3rt.errors import InvalidArgument
from step3rt.plan.architecture import Model
from step3rt.plan.batches import jitter_us
from step3rt.plan.cost import Precision
from step3rt.plan.deployment import Deployment
from step3rt.plan.measurement import STAGES, Measurement
from step3rt.plan.profile import SHARES, Profile
from step3rt.plan.stages import Floats, ffn_sides, has_store_kernels, stage_times, step_us

WHOLE = ("tokens_per_s_per_gpu", "tpot_ms")
"""What is of a whole run; all else is of its stages."""

# What a fit may change. Skew shows in imbalance, not in means; jitter is also what steps take
# beyond what their stages explain.
_FITTED = (
    "attention_bytes_bf16",
    "attention_bytes_fp8",
    "attention_flops",
    "linear_bytes",
    "linear_flops",
    "head_bytes",
    "head_flops",
    "attention_fixed_us",
    "moe_bytes",
    "moe_flops",
    "ffn_fixed_us",
    "nic_share",
    "nvlink_share",
    "nic_latency_us",
    "nvlink_latency_us",
    "a2f_fixed_us",
    "f2a_fixed_us",
    "step_fixed_us",
    "jitter_us",
)
# How much an error counts, in a fit. Throughput is what a plan is for; stores to a peer are mostly
# hidden by other stages.
_WEIGHTS = {
    "tokens_per_s_per_gpu": 2.0,
    "tpot_ms": 2.0,
    "head": 0.5,
    "a2f": 0.5,
    "f2a": 0.5,
    "transfer": 0.5,
    # It follows from the others.
    "busy_share": 0.0,
}
_ITERATIONS = 30
_NUDGE = 1e-4
# Weight of leaving a parameter alone, against one of a reading: changing it by a factor of e costs
# as much as an error of 10 % in one reading. Readings that are 3 % off then hardly move what they
# say little of: in a slice that always reads the same weights, bandwidth against fixed times.
_PRIOR = 0.1


@dataclass(frozen=True, slots=True)
class Row:
    """One reading of one run: what was predicted and what measured.

    Attributes:
        run: the run's name.
        quantity: "tpot_ms", "tokens_per_s_per_gpu", "busy_share" or a stage's time in us.
        predicted: by the model.
        measured: by the benchmark.
    """

    run: str
    quantity: str
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """Predicted over measured, less 1."""
        return self.predicted / self.measured - 1


def predict(model: Model, measurement: Measurement, profile: Profile) -> dict[str, float]:
    """The model's mean for everything that a result file may have.

    `model` is for files that do not have the sizes of their own.

    Raises:
        InvalidArgument: the run had another number of layers than `model`, or too few experts.
    """
    model = measurement.model or model
    if measurement.num_layers not in (None, model.num_layers):
        raise InvalidArgument(
            f"The run {measurement.name!r} had {measurement.num_layers} layers, the model "
            f"{model.name!r} has {model.num_layers}. Their times cannot be compared. Give the "
            "model that ran with --model"
        )
    if measurement.num_experts is not None:
        try:
            model = model.with_num_experts(measurement.num_experts)
        except InvalidArgument as error:
            raise InvalidArgument(
                f"The run {measurement.name!r} cannot be predicted. {error}"
            ) from error
    if measurement.expert_skew is not None:
        # What routing gave the experts is the run's, as its context is.
        profile = replace(profile, expert_skew=measurement.expert_skew)
    what = (model, measurement.deployment, profile, measurement.batch, measurement.precision)
    whole = predict_run(*what, measurement.context_tokens)
    stages = predict_run(*what, measurement.stage_context_tokens)
    return stages | {name: whole[name] for name in WHOLE}


def predict_run(
    model: Model,
    deployment: Deployment,
    profile: Profile,
    batch: int,
    precision: Precision,
    context_tokens: float,
) -> dict[str, float]:
    """Means of a deployment that decodes `batch` sequences, by the names of a result file.

    Stages are the GPU's own time: of one layer and micro-batch, `head` of one step and micro-batch.
    `transfer` is both ways with their latencies. `busy_share` is the share of all GPUs' time in
    which they work: what lanes, stages and layers own of a step.
    """
    size = np.array([batch / (deployment.lanes * deployment.num_attention_gpus)])
    times = stage_times(model, deployment, profile, size, context_tokens, precision, cautious=False)
    weights = times.counts / times.counts.sum()
    # A stage's mean is over GPUs; only the step waits for the busiest.
    ffn_us = []
    for group in model.groups:
        tokens = size * deployment.num_attention_gpus
        sides = ffn_sides(group.ffn, deployment, profile, tokens, np.ones(1))
        ffn_us.append(float(np.hypot(*sides)[0]) + profile.ffn_fixed_us)
    tpot_us = float(step_us(times, deployment)[0]) + jitter_us(model, deployment, profile)
    # Of kernels that store, the time of their own GPU; the others' bytes are in `transfer` alone.
    has_stores = has_store_kernels(deployment)
    there, back = times.a2f, times.f2a
    sent, returned = (times.a2f_stores, times.f2a_stores) if has_stores else (there, back)
    a2f, f2a = float(weights @ sent[:, 0]), float(weights @ returned[:, 0])
    transfer = float(weights @ (there[:, 0] + back[:, 0] + times.latency))
    attention = float(weights @ times.attention[:, 0]) + profile.jitter_us
    ffn = float(weights @ np.array(ffn_us)) + profile.jitter_us
    head = float(times.head[0])
    stores = float(has_stores)
    ffn_gpus = deployment.num_ffn_gpus or deployment.num_gpus
    layer_us = deployment.num_attention_gpus * (attention + stores * a2f)
    layer_us += ffn_gpus * (ffn + stores * f2a)
    step_work_us = model.num_layers * layer_us + deployment.num_attention_gpus * head
    return {
        "attention": attention,
        "head": head,
        "a2f": a2f,
        "ffn": ffn,
        "f2a": f2a,
        "transfer": transfer,
        "busy_share": min(1.0, deployment.lanes * step_work_us / deployment.num_gpus / tpot_us),
        "tpot_ms": tpot_us / 1e3,
        "tokens_per_s_per_gpu": batch / tpot_us * 1e6 / deployment.num_gpus,
    }


def compare(model: Model, measurements: Sequence[Measurement], profile: Profile) -> tuple[Row, ...]:
    """Predicted beside measured for every reading of every run."""
    rows = []
    for measurement in measurements:
        predicted = predict(model, measurement, profile)
        readings = {
            "tokens_per_s_per_gpu": measurement.tokens_per_s_per_gpu,
            "tpot_ms": measurement.tpot_ms,
            **measurement.stage_us,
        }
        if measurement.busy_share is not None:
            readings["busy_share"] = measurement.busy_share
        rows += [
            Row(measurement.name, quantity, predicted[quantity], measured)
            for quantity, measured in readings.items()
            # One GPU sends nothing: what its stores took is no reading of a link.
            if predicted[quantity] > 0
        ]
    return tuple(rows)


def median_error(rows: Sequence[Row], quantity: str = "tokens_per_s_per_gpu") -> float:
    """Median of the absolute errors in one quantity, or in all of "stages"."""
    errors = [
        abs(row.error)
        for row in rows
        if row.quantity == quantity or (quantity == "stages" and row.quantity in STAGES)
    ]
    return float(np.median(errors)) if errors else float("nan")


def split(
    measurements: Sequence[Measurement], seed: int = 0
) -> tuple[list[Measurement], list[Measurement]]:
    """Two halves: to fit to, and to test on; the same for the same runs and seed.

    Runs of one deployment are drawn by chance and dealt in turn, so that both halves have some of
    each where there are two or more.
    """
    draw = random.Random(seed)
    groups: dict[str, list[Measurement]] = {}
    for each in sorted(measurements, key=lambda each: each.name):
        groups.setdefault(each.deployment.label, []).append(each)
    # In any order: else a deployment with one run would be in the same half for every seed.
    order = [group for _, group in sorted(groups.items())]
    draw.shuffle(order)
    dealt = []
    for group in order:
        draw.shuffle(group)
        dealt += group
    return dealt[::2], dealt[1::2]


def fit(model: Model, measurements: Sequence[Measurement], profile: Profile) -> Profile:
    """The profile, changed as little as it takes to explain the measurements.

    Gauss-Newton on the logarithms of predicted over measured, in the logarithms of the
    efficiencies and times, with a small cost for leaving where they were.

    Raises:
        InvalidArgument: there is nothing to fit to.
    """
    if not measurements:
        raise InvalidArgument(
            "There is no measurement to fit to. A profile is fitted to runs. Give result files"
        )
    start = np.log([max(getattr(profile, name), _NUDGE) for name in _FITTED])
    high = np.log([1.0 if name in SHARES else 1e6 for name in _FITTED])

    def at(theta: Floats) -> Profile:
        values = np.exp(np.minimum(theta, high))
        return replace(profile, **dict(zip(_FITTED, values.tolist(), strict=True)))

    def residuals(theta: Floats) -> Floats:
        rows = compare(model, measurements, at(theta))
        errors = [
            _WEIGHTS.get(row.quantity, 1.0) * np.log(row.predicted / row.measured) for row in rows
        ]
        return np.concatenate((np.array(errors), _PRIOR * (theta - start)))

    theta = start.copy()
    now = residuals(theta)
    for _ in range(_ITERATIONS):
        slopes = np.stack(
            [(residuals(theta + step) - now) / _NUDGE for step in _NUDGE * np.eye(theta.size)],
            axis=1,
        )
        step = np.linalg.lstsq(slopes, -now, rcond=None)[0]
        # A stage that is not the bottleneck has no slope until it becomes one: halve the step
        # until it helps.
        for _ in range(12):
            trial = np.minimum(theta + step, high)
            after = residuals(trial)
            if after @ after < now @ now:
                break
            step = step / 2
        else:
            break
        gained = now @ now - after @ after
        theta, now = trial, after
        if gained < 1e-9:
            break
    runs = ", ".join(measurement.name for measurement in measurements)
    return replace(at(theta), source=f"{profile.source}; fitted to {runs}")
