"""How long each pipeline stage of one layer and micro-batch takes, from a soft roofline.

Owns the formulas; efficiencies are the profile's, peaks the card's. All functions take arrays of
micro-batch sizes, so that a search evaluates a whole sweep at once. Randomness (jitter, lengths,
which expert) is `simulate`'s; only the expected imbalance of experts is here.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from step3rt.plan.architecture import FfnLayer, LayerGroup, Model
from step3rt.plan.cost import Precision, layer_core_flops, layer_kv_bytes
from step3rt.plan.deployment import Deployment, expert_places, most_experts
from step3rt.plan.profile import Profile
from step3rt.plan.tiles import expert_rows, linear_rows

Floats: TypeAlias = NDArray[np.floating[Any]]

_US = 1e6
_FP8_GROUP = 128  # activations have one f32 scale for each group of so many
_A2F_METADATA_BYTES = 24  # expert ids and weights of a token, and its share of the header
_BF16_BYTES = 2


_OF_GROUPS = ("counts", "attention", "a2f", "f2a", "a2f_stores", "f2a_stores", "ffn", "latency")


@dataclass(frozen=True, slots=True)
class StageTimes:
    """Microseconds of one layer and micro-batch: arrays [groups, sizes], heads [sizes].

    Attributes:
        counts: [groups] layers of each group.
        attention: the whole attention stage of the mean GPU.
        a2f, f2a: transfer time of the busiest GPU, latency aside: the slower of the network and
            the collective within an FFN host, which forwards pieces as they arrive.
        a2f_stores, f2a_stores: time of each sender's GPU, whose kernels store the rows within one
            host: less than the transfer where several send to one. 0 where NICs fetch the rows.
        ffn: the whole FFN stage of the busiest GPU.
        latency: [groups] both directions' latencies together.
        head: LM head, sampling and scheduling; once a step.
        is_sharing: whether lanes share a GPU that both want, rather than take turns.
    """

    counts: Floats
    attention: Floats
    a2f: Floats
    f2a: Floats
    a2f_stores: Floats
    f2a_stores: Floats
    ffn: Floats
    latency: Floats
    head: Floats
    is_sharing: NDArray[np.bool_]

    def chain(self) -> Floats:
        """Time of one micro-batch through one layer if it met no other: [groups, sizes]."""
        return self.attention + self.a2f + self.ffn + self.f2a + self.latency[:, None]


def soft_roofline(bytes_us: Floats, flops_us: Floats) -> Floats:
    """The 2-norm of both sides.

    Kernels near the ridge reach neither side's peak: DeepGEMM with 6 experts and 128 rows each
    takes 259 us on H200, where the sides are 174 and 170 us. The norm gives 243.
    """
    return np.hypot(bytes_us, flops_us)


def attention_core_us(
    group: LayerGroup,
    deployment: Deployment,
    profile: Profile,
    context_tokens: float,
    precision: Precision,
) -> float:
    """Scores and values of one sequence in one layer: the larger of memory and compute."""
    card, layer = deployment.attention_card, group.attention
    element = precision.window_kv_bytes if layer.kind == "window" else precision.kv_bytes
    peak = card.peak_flops if element == 1 else card.bf16_flops
    kv_bytes = layer_kv_bytes(layer, context_tokens, precision)
    bytes_us = _US * kv_bytes / (card.bytes_per_s * profile.attention_bytes(element))
    flops = layer_core_flops(layer, context_tokens)
    return max(bytes_us, _US * flops / (peak * profile.attention_flops))


def stage_times(
    model: Model,
    deployment: Deployment,
    profile: Profile,
    sequences_per_gpu: Floats,
    context_tokens: float,
    precision: Precision,
    *,
    cautious: bool = True,
) -> StageTimes:
    """Stage times for micro-batches of so many sequences on each attention GPU.

    Args:
        model: what runs.
        deployment: where.
        profile: how well.
        sequences_per_gpu: f64[sizes], of one lane on one attention GPU; fractions are fine.
        context_tokens: mean context.
        precision: bytes per KV element.
        cautious: whether the busiest FFN GPU has as many rows as the bound of chance says, for a
            plan that has to hold, or as many as are expected, for the mean of a run.
    """
    size = np.asarray(sequences_per_gpu, dtype=np.float64)
    tokens = size * deployment.num_attention_gpus
    padded = linear_rows(size, profile.linear_tile_rows)
    card = deployment.attention_card
    rows: dict[str, list[Any]] = {name: [] for name in _OF_GROUPS}
    for group in model.groups:
        params = group.attention.linear_params + group.ffn.router_params
        core = size * attention_core_us(group, deployment, profile, context_tokens, precision)
        linear = soft_roofline(
            np.full_like(size, _US * params / (card.bytes_per_s * profile.linear_bytes)),
            _US * 2 * padded * params / (card.peak_flops * profile.linear_flops),
        )
        busiest = expected_busiest(group.ffn, deployment, profile, tokens, cautious=cautious)
        most = most_experts(group.ffn.num_experts, expert_places(deployment)[0])
        sides = ffn_sides(group.ffn, deployment, profile, tokens, busiest, most)
        transfer = _transfers(model, group.ffn, deployment, profile, size)
        values = {
            "counts": float(group.count),
            "attention": core + linear + profile.attention_fixed_us,
            "ffn": soft_roofline(*sides) + profile.ffn_fixed_us,
            **transfer,
        }
        for name, value in values.items():
            rows[name].append(value)
    arrays = {name: np.asarray(value, dtype=np.float64) for name, value in rows.items()}
    return StageTimes(
        head=_head_us(model, deployment, profile, size),
        is_sharing=size <= profile.sharing_rows,
        **arrays,
    )


def _head_us(model: Model, deployment: Deployment, profile: Profile, size: Floats) -> Floats:
    card, params = deployment.attention_card, model.embedding_params
    bytes_us = _US * _BF16_BYTES * params / (card.bytes_per_s * profile.head_bytes)
    flops_us = _US * 2 * size * params / (card.bf16_flops * profile.head_flops)
    # One large product, which overlaps both sides: 413, 458 to 506 and 666 us were measured for 48,
    # 192 and 256 rows on H200, where bytes take 385 us and FLOPs 90, 359 and 478 at the peaks.
    head: Floats = np.maximum(bytes_us, flops_us) + profile.step_fixed_us
    return head


def imbalance_deviation(experts: float, rows: Floats, profile: Profile) -> Floats:
    """Standard deviation over mean of a place's rows: unequal experts, and chance."""
    return np.sqrt(profile.expert_skew**2 / experts + 1 / np.maximum(rows, 1e-9))


def expected_busiest(
    ffn: FfnLayer, deployment: Deployment, profile: Profile, tokens: Floats, *, cautious: bool
) -> Floats:
    """Routed rows of the busiest place over the mean place's; `cautious` as in `stage_times`.

    That is one of those with the most experts, as where 48 are in 32 places, of 1 or 2.
    """
    if not ffn.num_experts:
        return np.ones_like(tokens)
    places, _ = expert_places(deployment)
    experts = most_experts(ffn.num_experts, places)
    share = experts / ffn.num_experts
    # The expected maximum of n normal deviates stays below sqrt(2 ln n) of them; no place has more
    # than all rows.
    deviations = math.sqrt(2 * math.log(places)) if cautious else expected_maximum(places)
    deviation = imbalance_deviation(experts, tokens * ffn.top_k * share, profile)
    busiest: Floats = places * np.minimum(share * (1 + deviations * deviation), 1.0)
    return busiest


def expected_maximum(count: int) -> float:
    """Of so many standard normal deviates, by Blom's formula: 0.59, 1.05, 1.77 for 2, 4, 16."""
    if count < 2:
        return 0.0
    return float(NormalDist().inv_cdf((count - 0.375) / (count + 0.25)))


def ffn_sides(
    ffn: FfnLayer,
    deployment: Deployment,
    profile: Profile,
    tokens: Floats,
    relative: Floats,
    experts: Floats | float | None = None,
) -> tuple[Floats, Floats]:
    """Memory and compute time of one FFN GPU for `tokens` of a micro-batch.

    Args:
        ffn: the layer.
        deployment: where it runs.
        profile: how well.
        tokens: of the whole micro-batch.
        relative: routed rows of this GPU's place over the mean place's.
        experts: of this GPU's place; None is the mean place's.
    """
    card = deployment.ffn_card
    byte_us = _US / (card.bytes_per_s * profile.moe_bytes)
    flop_us = _US / (card.peak_flops * profile.moe_flops)
    if not ffn.num_experts:
        # A copy for each GPU's own tokens, or a part for all tokens: the FLOPs are the same.
        gpus = deployment.num_ffn_gpus or deployment.num_attention_gpus
        parts = 1 if deployment.is_colocated and deployment.ffn_parallelism == "ep" else gpus
        weight_bytes = np.full_like(tokens, ffn.dense_params / parts)
        own = expert_rows(tokens / gpus, 0 * tokens, profile.moe_tile_rows)
        return weight_bytes * byte_us, 2 * own * ffn.dense_params * flop_us
    places, gpus_of_place = expert_places(deployment)
    own_experts = np.asarray(ffn.num_experts / places if experts is None else experts)
    idle_share = (1 - ffn.top_k / ffn.num_experts) ** tokens
    weights = own_experts * (1 - idle_share) * ffn.expert_params + ffn.dense_params
    # A place without experts has no rows of them either.
    rows = tokens * ffn.top_k / places * relative / np.where(own_experts, own_experts, 1.0)
    # Where a token takes all experts, no expert has more rows than another.
    is_even = ffn.top_k == ffn.num_experts
    deviation = 0 * rows if is_even else rows * imbalance_deviation(1.0, rows, profile)
    tile = profile.moe_tile_rows
    own = expert_rows(tokens / places, 0 * tokens, tile)
    flops = 2 * (
        own_experts * expert_rows(rows, deviation, tile) * ffn.expert_params
        + own * ffn.dense_params
    )
    return weights / gpus_of_place * byte_us, flops / gpus_of_place * flop_us


def _copies_to_owners(ffn: FfnLayer, places: int) -> float:
    """Expected copies of a token: to its home, and to every other place with one of its experts."""
    least, fuller = divmod(ffn.num_experts, places)
    owners = 0.0
    for experts, count in ((least, places - fuller), (least + 1, fuller)):
        elsewhere = ffn.num_experts - experts
        missed = 1.0
        for drawn in range(ffn.top_k):
            missed *= max(elsewhere - drawn, 0) / (ffn.num_experts - drawn)
        owners += count * (1 - missed)
    return 1 + (places - 1) / places * owners


def _distinct(places: float, top_k: int) -> float:
    """Expected number of distinct places among those of a token's experts."""
    return places * (1 - (1 - 1 / places) ** top_k) if places > 1 else 1.0


def _transfers(
    model: Model, ffn: FfnLayer, deployment: Deployment, profile: Profile, size: Floats
) -> dict[str, Any]:
    """Transfer times by name, for `size` tokens of each attention GPU."""
    hidden = model.hidden_size
    a2f_bytes = hidden + 4 * hidden / _FP8_GROUP + _A2F_METADATA_BYTES
    f2a_bytes = float(_BF16_BYTES * hidden)
    tokens = size * deployment.num_attention_gpus
    ffn_gpus = deployment.num_ffn_gpus
    is_split = not ffn.num_experts or deployment.ffn_parallelism == "tp_ep"
    host_us = _US / (deployment.ffn_card.host_bytes_per_s * profile.nvlink_share)
    stores = has_store_kernels(deployment)
    fixed = (profile.a2f_fixed_us, profile.f2a_fixed_us) if stores else (0.0, 0.0)
    if deployment.is_colocated:
        is_copied = not ffn.num_experts and deployment.ffn_parallelism == "ep"
        if is_copied or deployment.num_attention_gpus == 1:
            names = ("a2f", "f2a", "a2f_stores", "f2a_stores", "latency")
            return {name: 0 * size if name != "latency" else 0.0 for name in names}
        byte_us, latency = _colocated_us(ffn, deployment, profile)
        busiest_us = size * byte_us
        sent_us = received_us = busiest_us
    elif deployment.is_one_host:
        copies = float(ffn_gpus) if is_split else _copies_to_owners(ffn, ffn_gpus)
        sent_us, received_us = copies * size * host_us, copies * tokens / ffn_gpus * host_us
        busiest_us = np.maximum(sent_us, received_us)
        latency = profile.nvlink_latency_us
    else:
        hosts = deployment.num_ffn_hosts
        copies = float(hosts) if is_split else _distinct(hosts, ffn.top_k)
        attention_us = _US / (deployment.attention_card.nic_bytes_per_s * profile.nic_share)
        ffn_us = _US / (deployment.ffn_card.nic_bytes_per_s * profile.nic_share)
        network_us = copies * np.maximum(size * attention_us, tokens / ffn_gpus * ffn_us)
        # Within a host, all tokens go to all GPUs if experts are split, else to owners alone.
        in_host = ffn_gpus / hosts
        passed = tokens if is_split else tokens * _distinct(ffn_gpus, ffn.top_k) / ffn_gpus
        busiest_us = np.maximum(network_us, passed * (in_host - 1) / in_host * host_us)
        sent_us = received_us = 0 * size
        latency = profile.nic_latency_us + (profile.nvlink_latency_us if in_host > 1 else 0.0)
    # What an FFN GPU receives, it sends back.
    return {
        "a2f": busiest_us * a2f_bytes + fixed[0],
        "f2a": busiest_us * f2a_bytes + fixed[1],
        "a2f_stores": stores * (sent_us * a2f_bytes + fixed[0]),
        "f2a_stores": stores * (received_us * f2a_bytes + fixed[1]),
        "latency": 2 * latency,
    }


def _colocated_us(ffn: FfnLayer, deployment: Deployment, profile: Profile) -> tuple[float, float]:
    """(microseconds per byte of a token, latency one way) of an all-to-all between all GPUs."""
    card, gpus = deployment.attention_card, deployment.num_attention_gpus
    hosts = deployment.num_ffn_hosts
    is_split = not ffn.num_experts
    host_us = _US / (card.host_bytes_per_s * profile.nvlink_share)
    if hosts == 1:
        copies = float(gpus) if is_split else _copies_to_owners(ffn, gpus)
        return copies * (gpus - 1) / gpus * host_us, profile.nvlink_latency_us
    copies = float(gpus) if is_split else _distinct(gpus, ffn.top_k)
    # A token crosses to each host once and is handed on there over NVLink, both at a time.
    host_copies = float(hosts) if is_split else _distinct(hosts, ffn.top_k)
    nic_us = _US / (card.nic_bytes_per_s * profile.nic_share)
    between = host_copies * (hosts - 1) / hosts * nic_us
    return max(between, copies * host_us), profile.nic_latency_us + profile.nvlink_latency_us


def has_store_kernels(deployment: Deployment) -> bool:
    """Whether kernels of the sender store the rows, rather than a NIC that reads them."""
    return deployment.is_one_host and deployment.num_gpus > 1


def sharing_us(times: StageTimes, deployment: Deployment, lanes: Floats) -> Floats:
    """Expected idle time of the busier GPU in one layer and lane, as lanes share it: as `chain`.

    Two lanes that share a GPU half and half neither catch up with nor fall behind each other: one
    leaves it when the other has some part r of its layer left, and as the LM head moves lanes
    against each other, r is anything from 0 to all of it. Where r is shorter than the lane is away,
    the GPU idles for the rest of that: away^2 / (2 busy) on average. More lanes leave no such gap.
    """
    if deployment.is_colocated:
        return np.zeros_like(times.attention)
    busy = np.maximum(times.attention + times.a2f_stores, times.ffn + times.f2a_stores)
    away = np.minimum(times.chain() - busy, busy)
    idle: Floats = np.where(times.is_sharing & (lanes == 2), away**2 / (2 * busy), 0.0)
    return idle


def step_us(times: StageTimes, deployment: Deployment, lanes: Floats | None = None) -> Floats:
    """Mean microseconds of one step without jitter: [sizes].

    Takes the deployment's lanes, or `lanes` [sizes] if given.

    Each layer takes as long as its slowest resource needs for all lanes, or as one lane's way
    through all stages, whichever is longer: the maximum cycle mean of the pipeline. The LM head is
    one more piece of attention work in front of one layer, for each lane in turn.
    """
    if lanes is None:
        lanes = np.full(times.head.shape, float(deployment.lanes))
    idle = sharing_us(times, deployment, lanes)

    def period(head_us: Floats | float) -> Floats:
        own = times.attention + head_us + times.a2f_stores
        served = times.ffn + times.f2a_stores
        if deployment.is_colocated:
            compute = lanes * (own + served)
        else:
            compute = lanes * (np.maximum(own, served) + idle)
        wire = lanes * np.maximum(times.a2f, times.f2a)
        longest: Floats = np.maximum.reduce((compute, wire, times.chain() + head_us))
        return longest

    plain = period(0.0)
    result: Floats = times.counts @ plain + (period(times.head) - plain)[0]
    return result
