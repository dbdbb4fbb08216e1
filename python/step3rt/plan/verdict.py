"""What to run, what limits it, what would move the limit, and whether to disaggregate at all.

Owns the advice: winners of `search` are simulated at the asked percentile, their batch lowered
until it holds, and every resource is improved in turn to see what it brings.
"""

from dataclasses import dataclass, replace

import numpy as np

from step3rt.plan.architecture import Model
from step3rt.plan.batches import evaluate, most_sequences
from step3rt.plan.cost import Precision, min_moe_sparsity
from step3rt.plan.deployment import Deployment, max_batch_by_memory
from step3rt.plan.hardware import Hardware
from step3rt.plan.profile import Profile
from step3rt.plan.search import Candidate, SearchResult, search, with_batch
from step3rt.plan.search_space import Inventory, Target
from step3rt.plan.simulate import Result, simulate
from step3rt.plan.stages import Floats
from step3rt.plan.tiles import whole_tiles
from step3rt.plan.workload import Workload

# How far the model is from whole systems that were measured: -6 % for the paper's 3A2F, +11 % for
# DeepSeek-V3's published decode profile. Closer than this, the model does not choose.
MODEL_ERROR = 0.12

_IMPROVEMENT = 1.25
_MAX_LOWERINGS = 12
_STRIDE = 0.8
_FINE_SHARE = 0.02  # a batch is found as closely as this
_MAX_CONFIRMED = 12  # one for each placement and pair of cards: enough for three kinds of cards
# As many as `plan simulate` takes, so that it confirms what the search found; fewer of many GPUs.
_SIMULATED_STEPS = 1000
_SIMULATED_GPU_STEPS = 2**15


@dataclass(frozen=True, slots=True)
class Limit:
    """What a better resource would bring.

    Attributes:
        name: "KV capacity", "attention bandwidth", "FFN compute", "FFN bandwidth", "network" or
            "imbalance".
        change: what is changed, in words.
        gain: tokens per second with the change over those without, less 1.
    """

    name: str
    change: str
    gain: float


@dataclass(frozen=True, slots=True)
class Choice:
    """A candidate that the simulator confirmed.

    Attributes:
        candidate: the deployment, its batch and rates as simulated.
        result: the simulation.
        limits: what would raise throughput, most first.
    """

    candidate: Candidate
    result: Result
    limits: tuple[Limit, ...]


@dataclass(frozen=True, slots=True)
class Verdict:
    """The answer.

    Attributes:
        choices: confirmed candidates, most tokens per second first; empty if none meets the target.
        advice: "disaggregate", "colocate", "either" or "none".
        text: the advice and its reason in one or two sentences.
        warnings: what the operator should know besides.
        found: what was searched.
    """

    choices: tuple[Choice, ...]
    advice: str
    text: str
    warnings: tuple[str, ...]
    found: SearchResult

    def of(self, placement: str) -> Choice | None:
        """The best choice of that placement."""
        return next(
            (item for item in self.choices if item.candidate.deployment.placement == placement),
            None,
        )


def decide(
    model: Model,
    inventory: Inventory,
    target: Target,
    profile: Profile,
    precision: Precision,
    *,
    seed: int = 0,
) -> Verdict:
    """Searches, simulates the winners, and says what to run."""
    found = search(model, inventory, target, profile, precision)
    choices = []
    for candidate in found.best[:_MAX_CONFIRMED]:
        confirmed = _confirm(model, candidate, target, profile, precision, seed)
        if confirmed is not None:
            choices.append(confirmed)
    choices.sort(key=lambda item: -item.candidate.tokens_per_s)
    advice, text = _advise(choices, target)
    warnings = _sparsity_warnings(model, choices)
    return Verdict(tuple(choices), advice, text, tuple(warnings), found)


def _confirm(
    model: Model,
    candidate: Candidate,
    target: Target,
    profile: Profile,
    precision: Precision,
    seed: int,
) -> Choice | None:
    """The candidate with its batch lowered until the simulated percentile meets the target."""
    deployment = candidate.deployment
    places = deployment.lanes * deployment.num_attention_gpus
    steps = min(_SIMULATED_STEPS, max(8, _SIMULATED_GPU_STEPS // deployment.num_gpus))
    size = candidate.batch // places
    meets, misses = 0, size + 1
    found: Result | None = None
    for attempt in range(_MAX_LOWERINGS):
        workload = Workload(
            batch=size * places, context_tokens=target.context_tokens, lengths="spread"
        )
        result = simulate(model, deployment, profile, workload, precision, steps=steps, seed=seed)
        tpot_ms = result.tpot_ms[target.percentile]
        if tpot_ms <= target.tpot_ms:
            meets, found = size, result
        else:
            misses = size
        if misses - meets <= max(1, int(_FINE_SHARE * misses)):
            break
        if found is None:
            # TPOT falls no faster than in proportion to the batch, and where jitter is most of it,
            # hardly at all: go on in longer strides, and back from where it is met.
            stride = _STRIDE ** max(attempt - 1, 0)
            size = max(1, min(misses - 1, int(misses * stride * target.tpot_ms / tpot_ms)))
        else:
            size = (meets + misses) // 2
    if found is None:
        return None
    confirmed = with_batch(candidate, meets * places, found.tpot_ms["mean"])
    return Choice(confirmed, found, _limits(model, confirmed, target, profile, precision))


def _limits(
    model: Model, candidate: Candidate, target: Target, profile: Profile, precision: Precision
) -> tuple[Limit, ...]:
    """Gains of improving one resource at a time, at the batch that is best with it."""
    deployment = candidate.deployment
    base = _rate(model, deployment, target, profile, precision)
    if not base:
        return ()
    attention, ffn = deployment.attention_card, deployment.ffn_card

    def bigger(card: Hardware) -> Hardware:
        return replace(card, memory_bytes=_IMPROVEMENT * card.memory_bytes)

    roomy = replace(
        deployment,
        attention_card=bigger(attention),
        ffn_card=bigger(ffn) if deployment.is_colocated else ffn,
    )
    percent = round(100 * (_IMPROVEMENT - 1))
    faster = _IMPROVEMENT
    trials: list[tuple[str, str, Deployment, Profile]] = [
        ("KV capacity", f"{percent} % more memory on attention GPUs", roomy, profile),
        (
            "attention bandwidth",
            f"{percent} % more memory bandwidth in attention (or FP8 KV, or more attention GPUs)",
            deployment,
            replace(
                profile,
                attention_bytes_bf16=faster * profile.attention_bytes_bf16,
                attention_bytes_fp8=faster * profile.attention_bytes_fp8,
                linear_bytes=faster * profile.linear_bytes,
                head_bytes=faster * profile.head_bytes,
            ),
        ),
        (
            "attention compute",
            f"{percent} % more FLOP/s in attention",
            deployment,
            replace(
                profile,
                attention_flops=faster * profile.attention_flops,
                linear_flops=faster * profile.linear_flops,
                head_flops=faster * profile.head_flops,
            ),
        ),
        (
            "FFN compute",
            f"{percent} % more FLOP/s in the FFN (or more FFN GPUs)",
            deployment,
            replace(profile, moe_flops=faster * profile.moe_flops),
        ),
        (
            "FFN bandwidth",
            f"{percent} % more memory bandwidth in the FFN (or more FFN GPUs)",
            deployment,
            replace(profile, moe_bytes=faster * profile.moe_bytes),
        ),
        (
            "network",
            f"{percent} % more network bandwidth and less latency",
            deployment,
            replace(
                profile,
                nic_share=faster * profile.nic_share,
                nvlink_share=faster * profile.nvlink_share,
                nic_latency_us=profile.nic_latency_us / faster,
                nvlink_latency_us=profile.nvlink_latency_us / faster,
            ),
        ),
        (
            "imbalance",
            "equally popular experts and no jitter",
            deployment,
            replace(profile, expert_skew=0.0, jitter_us=0.0),
        ),
    ]
    limits = [
        Limit(name, change, _rate(model, changed, target, better, precision) / base - 1)
        for name, change, changed, better in trials
    ]
    return tuple(sorted(limits, key=lambda limit: -limit.gain))


def _rate(
    model: Model, deployment: Deployment, target: Target, profile: Profile, precision: Precision
) -> float:
    """Expected tokens per second at the best batch, fractions of a sequence allowed; 0 if none."""
    size = float(most_sequences(model, deployment, target, profile, precision))
    if not size:
        return 0.0
    places = deployment.lanes * deployment.num_attention_gpus
    limit = max_batch_by_memory(model, deployment, target.context_tokens, precision) / places
    # Whole sequences would hide gains below one in `size`: go on to where the target is met.
    more: Floats = size + np.arange(20) / 20
    sizes = np.append(whole_tiles(more[:1], profile.linear_tile_rows), more)
    tpot_ms = evaluate(model, deployment, target, profile, precision, sizes)
    allowed = (tpot_ms <= target.tpot_ms) & (sizes <= max(size, limit))
    return float(np.max(np.where(allowed, sizes * places / tpot_ms * 1e3, 0.0)))


def _advise(choices: list[Choice], target: Target) -> tuple[str, str]:
    if not choices:
        return "none", (
            f"No deployment of these cards reaches {target.tpot_ms:g} ms TPOT ({target.percentile})"
            f" at {target.context_tokens} tokens of context, or none has room for the weights and "
            "a sequence. "
            "Allow a longer TPOT, add cards, or take cards with more memory."
        )
    afd = _combined_rate(choices, "disaggregated")
    colocated = _combined_rate(choices, "colocated")
    compared = f"{afd:,.0f} tokens/s/GPU disaggregated against {colocated:,.0f} colocated"
    if len({item.candidate.deployment.ffn_card.key for item in choices}) > 1:
        compared += " (each kind of card by itself where that is better)"
    if target.placement is not None:
        advice = "disaggregate" if afd else "colocate"
        return advice, f"Only {target.placement} deployments were looked at."
    if not colocated:
        return "disaggregate", f"Use AFD: no colocated deployment meets the target ({compared})."
    if not afd:
        return "colocate", (
            f"Do not use AFD here: no disaggregated deployment meets the target ({compared})."
        )
    if afd > (1 + MODEL_ERROR) * colocated:
        return "disaggregate", f"Use AFD: {compared}."
    if colocated > (1 + MODEL_ERROR) * afd:
        limits = next(
            item.limits
            for item in choices
            if item.candidate.deployment.placement == "disaggregated"
        )
        cause = f" AFD is limited by {limits[0].name}." if limits and limits[0].gain > 0.01 else ""
        return "colocate", f"Do not use AFD here: {compared}.{cause}"
    return "either", (
        f"Too close to call: {compared}, within the model's {MODEL_ERROR:.0%}. AFD keeps the FFN's "
        "batch when context grows and takes other cards for attention; colocating needs no "
        "balance. Measure both."
    )


def _combined_rate(choices: list[Choice], placement: str) -> float:
    """Tokens/s/GPU of the cards' best use with one placement.

    Either one deployment over two kinds of cards, or each kind by itself, side by side.
    """
    alone: dict[str, float] = {}
    together = 0.0
    for item in choices:
        deployment, rate = item.candidate.deployment, item.candidate.tokens_per_s_per_gpu
        if deployment.placement != placement:
            continue
        if deployment.attention_card.key == deployment.ffn_card.key:
            alone[deployment.ffn_card.key] = max(alone.get(deployment.ffn_card.key, 0.0), rate)
        else:
            together = max(together, rate)
    return max(together, sum(alone.values()))


def _sparsity_warnings(model: Model, choices: list[Choice]) -> list[str]:
    sparsity = model.sparsity
    afd = next((item for item in choices if not item.candidate.deployment.is_colocated), None)
    if sparsity is None or afd is None:
        return []
    deployment = afd.candidate.deployment
    card = deployment.ffn_card
    link = card.host_bytes_per_s if deployment.is_one_host else card.nic_bytes_per_s
    minimum = min_moe_sparsity(
        model.hidden_size, model.num_layers, replace(card, nic_bytes_per_s=link)
    )
    if sparsity >= minimum:
        return []
    return [
        f"The MoE is too sparse for {card.name}: {sparsity:.3f} of the experts are active, and "
        f"{minimum:.3f} is the least at which the network hides behind full-rate matrix products "
        "(Step-3 paper section 5.4). Expect the FFN to wait for memory or the network."
    ]
