"""How many sequences a deployment takes: the TPOT of a batch, and the best batch within a target.

Owns the mean times of batches, jitter included; never which deployment (`search`) and never
randomness (`simulate`).
"""

import numpy as np

from step3rt.plan.architecture import Model
from step3rt.plan.cost import Precision
from step3rt.plan.deployment import Deployment, max_batch_by_memory
from step3rt.plan.profile import Profile
from step3rt.plan.search_space import Target
from step3rt.plan.stages import Floats, stage_times, step_us
from step3rt.plan.tiles import whole_tiles

_EULER_GAMMA = 0.5772


def jitter_us(model: Model, deployment: Deployment, profile: Profile) -> float:
    """Expected delay of a step by jitter: per layer, the slowest GPU of each side.

    The maximum of n exponential delays is the n-th harmonic number of their mean.
    """
    if deployment.is_colocated:
        sides = [deployment.num_attention_gpus] * 2
    else:
        sides = [deployment.num_attention_gpus, deployment.num_ffn_gpus]
    slowest = sum(np.log(side) + _EULER_GAMMA + 1 / (2 * side) for side in sides)
    return float(profile.jitter_us * slowest * model.num_layers)


def evaluate(
    model: Model,
    deployment: Deployment,
    target: Target,
    profile: Profile,
    precision: Precision,
    sizes: Floats,
    lanes: Floats | None = None,
) -> Floats:
    """Expected TPOT in ms for so many sequences of each lane and attention GPU: f64[sizes].

    Takes the deployment's lanes, or `lanes` [sizes] if given.
    """
    times = stage_times(model, deployment, profile, sizes, target.context_tokens, precision)
    mean_us = step_us(times, deployment, lanes)
    tpot_ms: Floats = (mean_us + jitter_us(model, deployment, profile)) / 1e3
    return tpot_ms


def most_sequences(
    model: Model,
    deployment: Deployment,
    target: Target,
    profile: Profile,
    precision: Precision,
) -> int:
    """The most sequences of each lane and GPU within target and memory; 0 if none.

    TPOT grows with the batch. So do tokens per second, but where the last tile is hardly filled:
    then `whole_tiles` of the most may be better.
    """
    places = deployment.lanes * deployment.num_attention_gpus
    limit = max_batch_by_memory(model, deployment, target.context_tokens, precision) / places
    low, high = 0, int(limit)
    while low < high:
        # A few sizes at a time: evaluating an array costs little more than a number.
        sizes = np.unique(np.linspace(low + 1, high, 16).astype(np.int64))
        tpot_ms = evaluate(model, deployment, target, profile, precision, sizes.astype(float))
        within = sizes[tpot_ms <= target.tpot_ms]
        above = sizes[tpot_ms > target.tpot_ms]
        low = int(within[-1]) if within.size else low
        high = int(above[0]) - 1 if above.size else low
    return low


def best_size(
    model: Model,
    deployment: Deployment,
    target: Target,
    profile: Profile,
    precision: Precision,
) -> int:
    """The sequences of each lane and GPU with the most tokens per second; 0 if none."""
    most = most_sequences(model, deployment, target, profile, precision)
    if not most:
        return 0
    full = whole_tiles(np.array([float(most)]), profile.linear_tile_rows)
    sizes = np.append(full, float(most))
    tpot_ms = evaluate(model, deployment, target, profile, precision, sizes)
    rates = np.where(tpot_ms <= target.tpot_ms, sizes / tpot_ms, 0.0)
    return int(sizes[np.argmax(rates)])
