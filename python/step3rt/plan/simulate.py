"""The pipeline, event by event: attention, transfer and FFN stages of every lane and GPU.

Owns the order of events and the random delays; stage times come from `stages`. Events are not
kept in a queue: lanes take turns in a fixed order, so each stage's end is the larger of two earlier
ends plus its own time (a max-plus recurrence). A run is cut into windows of consecutive steps that
advance together, as rows of the same arrays; each starts with a few steps that are not counted,
after which a pipeline has forgotten how it began.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from step3rt.errors import InvalidArgument
from step3rt.plan.architecture import LayerGroup, Model
from step3rt.plan.cost import Precision
from step3rt.plan.deployment import Deployment, expert_places
from step3rt.plan.profile import Profile
from step3rt.plan.stages import (
    Floats,
    attention_core_us,
    ffn_sides,
    has_store_kernels,
    imbalance_deviation,
    sharing_us,
    stage_times,
)
from step3rt.plan.tiles import linear_rows
from step3rt.plan.workload import Load, Workload, draw_load

_WARM_UP_STEPS = 3
_MAX_WINDOWS = 128  # more rows amortise no more interpreter time, and add warm-up steps
MAX_STEPS = 1_000_000


@dataclass(frozen=True, slots=True)
class Result:
    """What a simulated deployment does.

    Attributes:
        tokens_per_s: of the whole deployment.
        tokens_per_s_per_gpu: over all GPUs.
        tpot_ms: p50, p99, mean and max over all steps and lanes.
        stage_us: mean time of one layer and micro-batch by stage: attention, a2f, ffn, f2a.
        busy: share of the time that the mean attention GPU, FFN GPU and the two wires work.
        num_steps: steps that were counted.
        waiting: requests that waited for room at the last step.
    """

    tokens_per_s: float
    tokens_per_s_per_gpu: float
    tpot_ms: dict[str, float]
    stage_us: dict[str, float]
    busy: dict[str, float]
    num_steps: int
    waiting: int


def simulate(
    model: Model,
    deployment: Deployment,
    profile: Profile,
    workload: Workload,
    precision: Precision,
    *,
    steps: int = 1000,
    seed: int = 0,
) -> Result:
    """Runs the pipeline for `steps` steps; the same arguments give the same result.

    Raises:
        InvalidArgument: `steps` or `seed` is out of range, or the batch has less than one sequence
            for each lane and attention GPU.
    """
    places = deployment.lanes * deployment.num_attention_gpus
    if not 1 <= steps <= MAX_STEPS:
        raise InvalidArgument(
            f"The simulation has {steps} steps. It takes from 1 to {MAX_STEPS}. Correct the number"
        )
    if workload.batch < places:
        raise InvalidArgument(
            f"The batch of {workload.batch} is too small: {deployment.lanes} lanes on "
            f"{deployment.num_attention_gpus} attention GPUs take at least one sequence each. "
            f"Give at least {places}, or fewer lanes or GPUs"
        )
    rng = _generator(seed)
    load = draw_load(workload, deployment.lanes, deployment.num_attention_gpus, steps, rng)
    windows = max(1, min(_MAX_WINDOWS, steps // 8))
    length = -(-steps // windows)
    pipeline = _Pipeline(model, deployment, profile, workload, precision, windows, rng)
    first = np.arange(windows) * length
    begins = []
    # One step more than is counted: a step ends when the next begins.
    for offset in range(-_WARM_UP_STEPS, length + 1):
        if offset == 0:
            pipeline.forget_statistics()
        rows = np.clip(first + offset, 0, steps - 1)
        begins.append(pipeline.step(load, rows))
    began = np.stack(begins[_WARM_UP_STEPS:])  # [length + 1, windows, lanes]
    # Rows past the last step repeat it; they complete the rectangle and are not counted.
    is_real = (np.arange(length)[:, None] + first) < steps
    tpot_us = np.diff(began, axis=0)[is_real]
    return _summary(deployment, load, tpot_us, pipeline, steps)


def _generator(seed: int) -> np.random.Generator:
    if seed < 0:
        raise InvalidArgument(f"The seed is {seed}. Seeds count from 0. Correct it")
    return np.random.default_rng(seed)


@dataclass(frozen=True, slots=True)
class Span:
    """One piece of work of one lane: stage, lane, begin and end in microseconds."""

    stage: str
    lane: int
    begin_us: float
    end_us: float


def timeline(
    model: Model,
    deployment: Deployment,
    profile: Profile,
    workload: Workload,
    precision: Precision,
    *,
    seed: int = 0,
) -> tuple[Span, ...]:
    """All stages of one step in steady state: of the last GPU of each side to finish."""
    rng = _generator(seed)
    steps = _WARM_UP_STEPS + 1
    load = draw_load(workload, deployment.lanes, deployment.num_attention_gpus, steps, rng)
    pipeline = _Pipeline(model, deployment, profile, workload, precision, 1, rng)
    for step in range(steps):
        if step == _WARM_UP_STEPS:
            pipeline.spans = []
        pipeline.step(load, np.array([step]))
    return tuple(pipeline.spans or ())


class _Pipeline:
    """All windows' state: when each resource is free, in microseconds of its window."""

    def __init__(
        self,
        model: Model,
        deployment: Deployment,
        profile: Profile,
        workload: Workload,
        precision: Precision,
        windows: int,
        rng: np.random.Generator,
    ) -> None:
        self.deployment, self.profile, self.rng = deployment, profile, rng
        self.lanes = deployment.lanes
        self.nominal = workload.batch / (self.lanes * deployment.num_attention_gpus)
        self.layers = [
            (_LayerTimes(model, group, deployment, profile, workload, precision, rng), group.count)
            for group in model.groups
        ]
        times = stage_times(
            model,
            deployment,
            profile,
            np.array([self.nominal]),
            workload.context_tokens,
            precision,
        )
        self.head_us = float(times.head[0])
        self.a2f_us, self.f2a_us = times.a2f[:, 0], times.f2a[:, 0]
        self.a2f_stores_us, self.f2a_stores_us = times.a2f_stores[:, 0], times.f2a_stores[:, 0]
        self.latency_us = times.latency / 2
        self.has_store_kernels = has_store_kernels(deployment)
        # What lanes lose to each other, on the side that has more to do.
        idle_us = sharing_us(times, deployment, np.array([float(self.lanes)]))[:, 0]
        attention_us = times.attention[:, 0] + self.a2f_stores_us
        is_attention = attention_us >= times.ffn[:, 0] + self.f2a_stores_us
        self.idle_us = np.where(is_attention, idle_us, 0.0), np.where(is_attention, 0.0, idle_us)
        gpus = deployment.num_attention_gpus
        self.attention_free: Floats = np.zeros((windows, gpus))
        self.ffn_free: Floats = np.zeros((windows, self.layers[0][0].places))
        self.a2f_free: Floats = np.zeros((windows, 1))
        self.f2a_free: Floats = np.zeros((windows, 1))
        self.back: list[Floats] = [np.zeros((windows, 1)) for _ in range(self.lanes)]
        self.spans: list[Span] | None = None
        self.forget_statistics()

    def forget_statistics(self) -> None:
        """Starts counting busy time anew."""
        self.busy_us = dict.fromkeys(("attention", "a2f", "ffn", "f2a", "head"), 0.0)
        self.num_events = 0

    def step(self, load: Load, rows: NDArray[np.intp]) -> Floats:
        """One step of every lane; returns when each lane began it, [windows, lanes].

        A step begins with the LM head and sampler on what the layers of the last one left, so
        that a lane starts its next step while the others are in flight.
        """
        began = np.empty((self.attention_free.shape[0], self.lanes))
        sequences, tokens = load.sequences[rows], load.tokens[rows]
        total = sequences.sum(axis=2)
        for index, (layer, count) in enumerate(self.layers):
            attention_us = layer.attention_us(sequences, tokens)
            scale = total / (self.nominal * self.deployment.num_attention_gpus)
            for repeat in range(count):
                is_first = index == repeat == 0
                if self.deployment.is_colocated:
                    # All lanes' attention, then all lanes' FFN: each hides the other's transfers.
                    groups = [range(self.lanes)]
                else:
                    groups = [range(lane, lane + 1) for lane in range(self.lanes)]
                for lanes in groups:
                    arrived = []
                    for lane in lanes:
                        if is_first:
                            began[:, lane] = self._head(lane)
                        own_us = attention_us[:, lane]
                        arrived.append(self._attention(lane, own_us, index, scale[:, lane]))
                    for lane, here in zip(lanes, arrived, strict=True):
                        self._ffn(lane, here, layer, repeat, index, total, scale)
        return began

    def _record(self, stage: str, lane: int, end: Floats, took: Floats | float) -> None:
        if self.spans is not None:
            last = int(end.argmax())
            length_us = float(np.broadcast_to(took, end.shape).flat[last])
            end_us = float(end.flat[last])
            self.spans.append(Span(stage, lane, end_us - length_us, end_us))

    def _jitter(self, shape: tuple[int, ...], gpus: float = 1.0) -> Floats | float:
        """Exponential delays; of `gpus` GPUs that must all be done, the longest."""
        if not self.profile.jitter_us:
            return 0.0
        if gpus <= 1:
            return self.profile.jitter_us * self.rng.standard_exponential(shape)
        longest: Floats = np.log1p(-(self.rng.random(shape) ** (1 / gpus)))
        return -self.profile.jitter_us * longest

    def _attention(self, lane: int, own_us: Floats, index: int, scale: Floats) -> Floats:
        """Attention of one lane and its transfer; returns its arrival, [windows, 1]."""
        start = np.maximum(self.attention_free, self.back[lane])
        took = own_us + self._jitter(start.shape)
        done = start + took
        self.attention_free = done + self.idle_us[0][index]
        wire_us = (self.a2f_us[index] * scale)[:, None]
        sent = np.maximum(self.a2f_free, done.max(axis=1, keepdims=True)) + wire_us
        self.a2f_free = sent
        stores_us = (self.a2f_stores_us[index] * scale)[:, None]
        self.attention_free = self.attention_free + stores_us
        self.busy_us["attention"] += float(took.mean())
        own_us = stores_us if self.has_store_kernels else wire_us
        self.busy_us["a2f"] += float(own_us.mean())
        self.num_events += 1
        self._record("attention", lane, done, took)
        self._record("a2f", lane, sent, wire_us)
        arrived: Floats = sent + self.latency_us[index]
        return arrived

    def _ffn(
        self,
        lane: int,
        arrived: Floats,
        layer: "_LayerTimes",
        repeat: int,
        index: int,
        total: Floats,
        scale: Floats,
    ) -> None:
        """FFN of one lane, all sources having arrived, and its transfer back."""
        took = layer.ffn_us(repeat, total[:, lane], self.rng)
        took = took + self._jitter(took.shape, layer.gpus_of_place)
        free = self.attention_free if self.deployment.is_colocated else self.ffn_free
        done = np.maximum(free, arrived) + took
        wire_us = (self.f2a_us[index] * scale[:, lane])[:, None]
        stores_us = (self.f2a_stores_us[index] * scale[:, lane])[:, None]
        until = done + self.idle_us[1][index] + stores_us
        if self.deployment.is_colocated:
            self.attention_free = until
        else:
            self.ffn_free = until
        returned = np.maximum(self.f2a_free, done.max(axis=1, keepdims=True)) + wire_us
        self.f2a_free = returned
        self.back[lane] = returned + self.latency_us[index]
        self.busy_us["ffn"] += float(took.mean())
        own_us = stores_us if self.has_store_kernels else wire_us
        self.busy_us["f2a"] += float(own_us.mean())
        self._record("ffn", lane, done, took)
        self._record("f2a", lane, returned, wire_us)

    def _head(self, lane: int) -> Floats:
        """LM head and sampler of one lane; returns when its last GPU was done, [windows]."""
        self.attention_free = np.maximum(self.attention_free, self.back[lane]) + self.head_us
        self.back[lane] = self.attention_free
        self.busy_us["head"] += self.head_us
        self._record("head", lane, self.attention_free, self.head_us)
        done: Floats = self.attention_free.max(axis=1)
        return done


class _LayerTimes:
    """Stage times of the layers of one group, for the load that the moment has."""

    def __init__(
        self,
        model: Model,
        group: LayerGroup,
        deployment: Deployment,
        profile: Profile,
        workload: Workload,
        precision: Precision,
        rng: np.random.Generator,
    ) -> None:
        self.group, self.deployment, self.profile = group, deployment, profile
        core_us = attention_core_us(group, deployment, profile, workload.context_tokens, precision)
        is_growing = group.attention.window_tokens is None and group.attention.kv_elements > 0
        self.token_us = core_us / workload.context_tokens if is_growing else 0.0
        self.sequence_us = 0.0 if is_growing else core_us
        card = deployment.attention_card
        params = group.attention.linear_params + group.ffn.router_params
        self.linear_bytes_us = 1e6 * params / (card.bytes_per_s * profile.linear_bytes)
        self.linear_flops_us = 2e6 * params / (card.peak_flops * profile.linear_flops)
        # Dense layers run on the same places as the model's MoE layers.
        moe = next((g.ffn for g in model.groups if g.ffn.num_experts), None)
        self.places, self.gpus_of_place = deployment.num_ffn_gpus or deployment.num_gpus, 1.0
        if moe is not None:
            self.places, self.gpus_of_place = expert_places(deployment)
        num_experts = group.ffn.num_experts
        # As instances have them: ranges whose sizes differ by one at most.
        self.experts = np.diff(num_experts * np.arange(self.places + 1) // self.places)
        # Each layer has experts of its own popularity, which stays as it is; a gamma variate has
        # the mean and deviation that the profile states and is never negative.
        self.popularity = np.ones((group.count, self.places))
        variance = profile.expert_skew**2 / max(num_experts / self.places, 1.0)
        if num_experts and variance:
            self.popularity = rng.gamma(1 / variance, variance, self.popularity.shape)
        if num_experts:
            self.popularity = self.popularity * self.experts
            self.popularity /= self.popularity.mean(axis=1, keepdims=True)

    def attention_us(self, sequences: Floats, tokens: Floats) -> Floats:
        """Attention stage of each lane and GPU: [windows, lanes, gpus]."""
        padded = linear_rows(sequences, self.profile.linear_tile_rows)
        linear = np.hypot(self.linear_bytes_us, self.linear_flops_us * padded)
        core = self.token_us * tokens + self.sequence_us * sequences
        time: Floats = self.profile.attention_fixed_us + linear + core
        return time

    def ffn_us(self, repeat: int, tokens: Floats, rng: np.random.Generator) -> Floats:
        """FFN stage of each place for `tokens` [windows] of the micro-batch: [windows, places]."""
        ffn = self.group.ffn
        tokens = tokens[:, None]
        relative = self.popularity[repeat]
        if ffn.num_experts:
            rows = tokens * ffn.top_k / self.places
            chance = imbalance_deviation(np.inf, rows, self.profile)
            noise = rng.standard_normal((tokens.shape[0], self.places), np.float32)
            relative = np.maximum(relative + chance * np.sqrt(relative) * noise, 0.0)
        bytes_us, flops_us = ffn_sides(
            ffn, self.deployment, self.profile, tokens, relative, self.experts
        )
        time: Floats = np.hypot(bytes_us, flops_us) + self.profile.ffn_fixed_us
        return np.broadcast_to(time, (tokens.shape[0], self.places))


def _summary(
    deployment: Deployment, load: Load, tpot_us: Floats, pipeline: _Pipeline, steps: int
) -> Result:
    running = float(load.sequences.sum(axis=(1, 2)).mean())
    mean_us = float(tpot_us.mean())
    p50, p99 = np.percentile(tpot_us, [50, 99])
    tokens_per_s = running / mean_us * 1e6
    events = pipeline.num_events
    steps_seen = events / (pipeline.lanes * sum(count for _, count in pipeline.layers))
    elapsed_us = mean_us * steps_seen
    busy_us = pipeline.busy_us
    attention_us = busy_us["attention"] + busy_us["head"]
    if deployment.is_colocated:
        attention_us += busy_us["ffn"]
    return Result(
        tokens_per_s=tokens_per_s,
        tokens_per_s_per_gpu=tokens_per_s / deployment.num_gpus,
        tpot_ms={
            "p50": float(p50) / 1e3,
            "p99": float(p99) / 1e3,
            "mean": mean_us / 1e3,
            "max": float(tpot_us.max()) / 1e3,
        },
        stage_us={name: busy_us[name] / events for name in ("attention", "a2f", "ffn", "f2a")},
        busy={
            "attention": attention_us / elapsed_us,
            "ffn": attention_us / elapsed_us
            if deployment.is_colocated
            else busy_us["ffn"] / elapsed_us,
            "a2f": busy_us["a2f"] / elapsed_us,
            "f2a": busy_us["f2a"] / elapsed_us,
        },
        num_steps=steps,
        waiting=int(load.waiting[-1]),
    )
