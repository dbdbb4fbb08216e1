"""The planner's answers as JSON values, as text for a terminal, and as a Markdown report.

Owns the keys and the layout; computes nothing. JSON keys are an interface: they are only added.
"""

from collections.abc import Sequence
from dataclasses import asdict
from math import isnan
from typing import Any

from step3rt.plan.architecture import Model
from step3rt.plan.compare import Row, median_error
from step3rt.plan.cost import TokenCost, afd_cost, min_moe_sparsity
from step3rt.plan.cross_validation import CrossValidation
from step3rt.plan.deployment import Deployment
from step3rt.plan.hardware import Hardware
from step3rt.plan.measurement import STAGES
from step3rt.plan.paper import DISAGREEMENTS
from step3rt.plan.search import Candidate
from step3rt.plan.search_space import Target
from step3rt.plan.simulate import Result
from step3rt.plan.verdict import Choice, Verdict

_MAX_LIMITS = 3
_QUANTITIES = {"tokens_per_s_per_gpu": "tokens/s/GPU", "tpot_ms": "TPOT", "stages": "stages"}


def cost_values(
    model: Model, context_tokens: int, cost: TokenCost, cards: Sequence[Hardware]
) -> dict[str, Any]:
    """What `step3rt plan cost --json` prints."""
    best = afd_cost(cost, cards)
    return {
        "model": model.name,
        "context": context_tokens,
        "kv_bytes": cost.kv_bytes,
        "attn_flops": cost.attn_flops,
        "linear_flops": cost.linear_flops,
        "ffn_flops": cost.ffn_flops,
        "arithmetic_intensity": cost.arithmetic_intensity,
        "usd_per_1m_tokens": {
            card.key: {"attention": cost.attention_usd(card), "ffn": cost.ffn_usd(card)}
            for card in cards
        },
        "afd_usd_per_1m_tokens": {
            "attention_hardware": best.attention_card,
            "ffn_hardware": best.ffn_card,
            "total": best.usd,
        },
        "effective_rank": model.effective_rank,
        "total_params": model.total_params,
        "active_params": model.active_params,
        "moe_sparsity": model.sparsity,
        "min_moe_sparsity": {
            card.key: min_moe_sparsity(model.hidden_size, model.num_layers, card) for card in cards
        },
        "notes": [f"{d.where}: {d.text}" for d in DISAGREEMENTS if model.name in d.models],
    }


def cost_text(values: dict[str, Any]) -> str:
    """What `step3rt plan cost` prints."""
    sparsity = values["moe_sparsity"]
    lines = [
        f"{values['model']} at {values['context']} tokens of context: "
        f"{values['total_params'] / 1e9:.0f}B parameters, {values['active_params'] / 1e9:.0f}B "
        f"active, effective rank {values['effective_rank']}"
        + (f", MoE sparsity {sparsity:.3f}" if sparsity is not None else ""),
        f"  per token: KV {values['kv_bytes']:.2e} bytes, attention {values['attn_flops']:.2e} "
        f"FLOPs ({values['arithmetic_intensity']:.0f} a byte), projections "
        f"{values['linear_flops']:.2e}, FFN {values['ffn_flops']:.2e}",
        "  USD per 1M tokens   attention     FFN   total   least sparsity",
    ]
    for key, usd in values["usd_per_1m_tokens"].items():
        least = values["min_moe_sparsity"][key]
        mark = " (too sparse for it)" if sparsity is not None and sparsity < least else ""
        lines.append(
            f"    {key:<16}  {usd['attention']:>9.3f}  {usd['ffn']:>6.3f}  "
            f"{usd['attention'] + usd['ffn']:>6.3f}   {least:.3f}{mark}"
        )
    best = values["afd_usd_per_1m_tokens"]
    lines.append(
        f"    AFD: {best['total']:.3f} with attention on {best['attention_hardware']} and FFN on "
        f"{best['ffn_hardware']}"
    )
    lines += [f"  note, {note}" for note in values["notes"]]
    return "\n".join(lines)


def deployment_values(deployment: Deployment) -> dict[str, Any]:
    """A deployment unit."""
    return {
        "placement": deployment.placement,
        "attention_gpus": deployment.num_attention_gpus,
        "ffn_gpus": deployment.num_ffn_gpus,
        "attention_hardware": deployment.attention_card.key,
        "ffn_hardware": deployment.ffn_card.key,
        "lanes": deployment.lanes,
        "ffn_parallelism": deployment.ffn_parallelism,
    }


def result_values(
    deployment: Deployment, batch: int, max_batch: int, result: Result
) -> dict[str, Any]:
    """What `step3rt plan simulate --json` prints."""
    sizes = {"batch": batch, "max_batch": max_batch}
    return deployment_values(deployment) | sizes | asdict(result)


def result_text(deployment: Deployment, batch: int, max_batch: int, result: Result) -> str:
    """What `step3rt plan simulate` prints."""
    stages = "  ".join(f"{name} {us:.0f} us" for name, us in result.stage_us.items())
    busy = "  ".join(f"{name} {share:.0%}" for name, share in result.busy.items())
    tpot = "  ".join(f"{name} {ms:.2f}" for name, ms in result.tpot_ms.items())
    lines = [
        deployment.label,
        f"  {result.tokens_per_s:,.0f} tokens/s, {result.tokens_per_s_per_gpu:,.0f} per GPU",
        f"  TPOT ms: {tpot}  ({result.num_steps} steps)",
        f"  stages, per layer and micro-batch: {stages}",
        f"  busy: {busy}",
    ]
    if batch > max_batch:
        lines.append(
            f"  warning: {max_batch} sequences fit in memory, {batch} were simulated; take more "
            "or larger attention GPUs, or a smaller batch"
        )
    if result.waiting:
        lines.append(f"  {result.waiting} requests wait for room")
    return "\n".join(lines)


def candidate_values(candidate: Candidate) -> dict[str, Any]:
    """A point of the Pareto front."""
    return deployment_values(candidate.deployment) | {
        "units": candidate.num_units,
        "batch": candidate.batch,
        "max_batch": candidate.max_batch,
        "tpot_ms": candidate.tpot_ms,
        "tokens_per_s": candidate.tokens_per_s,
        "tokens_per_s_per_gpu": candidate.tokens_per_s_per_gpu,
        "usd_per_1m_tokens": candidate.usd_per_1m_tokens,
    }


def verdict_values(verdict: Verdict, target: Target, model: Model) -> dict[str, Any]:
    """What `step3rt plan search --json` prints."""
    return {
        "model": model.name,
        "context": target.context_tokens,
        "target_tpot_ms": target.tpot_ms,
        "percentile": target.percentile,
        "advice": verdict.advice,
        "verdict": verdict.text,
        "warnings": list(verdict.warnings),
        "choices": [
            candidate_values(choice.candidate)
            | {
                "tpot_ms": choice.result.tpot_ms,
                "stage_us": choice.result.stage_us,
                "busy": choice.result.busy,
                "limits": [asdict(limit) for limit in choice.limits],
            }
            for choice in verdict.choices
        ],
        "front": [candidate_values(candidate) for candidate in verdict.found.front],
        "evaluated": verdict.found.num_evaluated,
    }


def _limits_text(choice: Choice) -> str:
    shown = [limit for limit in choice.limits[:_MAX_LIMITS] if limit.gain > 0.01]
    if not shown:
        return "no single resource"
    return "; ".join(f"{limit.name} ({limit.change}: {limit.gain:+.0%})" for limit in shown)


def verdict_text(verdict: Verdict, target: Target) -> str:
    """What `step3rt plan search` prints."""
    lines = [verdict.text]
    lines += [f"warning: {warning}" for warning in verdict.warnings]
    for choice in verdict.choices:
        candidate, result = choice.candidate, choice.result
        lines += [
            f"{candidate.num_units} x {candidate.deployment.label}, {candidate.batch} sequences a "
            f"unit ({candidate.max_batch} fit in memory)",
            f"  {candidate.tokens_per_s_per_gpu:,.0f} tokens/s/GPU over all cards, "
            f"{candidate.usd_per_1m_tokens:.3f} USD per 1M tokens of those in use, TPOT p50 "
            f"{result.tpot_ms['p50']:.1f} p99 {result.tpot_ms['p99']:.1f} ms",
            f"  limited by {_limits_text(choice)}",
        ]
    if verdict.choices:
        cheapest = min(verdict.choices, key=lambda choice: choice.candidate.usd_per_1m_tokens)
        if cheapest is not verdict.choices[0]:
            lines.append(
                f"cheapest per token, if idle cards are given back: "
                f"{cheapest.candidate.deployment.label}, "
                f"{cheapest.candidate.usd_per_1m_tokens:.3f} USD per 1M tokens"
            )
    lines.append(
        f"{verdict.found.num_evaluated} deployments evaluated, the best simulated; target "
        f"{target.percentile} TPOT {target.tpot_ms:g} ms at {target.context_tokens} tokens"
    )
    return "\n".join(lines)


def verdict_markdown(
    verdict: Verdict,
    target: Target,
    model: Model,
    *,
    command: str,
    profile_source: str,
    plot: str | None = None,
) -> str:
    """A short report of a search, with every number's conditions; `plot` is shown if given."""
    lines = [
        f"# {model.name}: {target.percentile} TPOT {target.tpot_ms:g} ms at "
        f"{target.context_tokens} tokens",
        "",
        f"**{verdict.text}**",
        "",
        *[f"> {warning}\n" for warning in verdict.warnings],
        "| units | deployment | batch | tokens/s/GPU | USD/1M | p50 ms | p99 ms | limited by |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for choice in verdict.choices:
        candidate, tpot = choice.candidate, choice.result.tpot_ms
        lines.append(
            f"| {candidate.num_units} | {candidate.deployment.label} | {candidate.batch} | "
            f"{candidate.tokens_per_s_per_gpu:,.0f} | {candidate.usd_per_1m_tokens:.3f} | "
            f"{tpot['p50']:.1f} | {tpot['p99']:.1f} | {_limits_text(choice)} |"
        )
    if plot is not None:
        lines += ["", f"![TPOT against throughput and price](<{plot}>)"]
    lines += ["", "Pareto front:", "", "| TPOT ms | tokens/s/GPU | USD/1M | deployment | batch |"]
    lines.append("|---|---|---|---|---|")
    lines += [
        f"| {point.tpot_ms:.1f} | {point.tokens_per_s_per_gpu:,.0f} | "
        f"{point.usd_per_1m_tokens:.3f} | {point.num_units} x {point.deployment.label} | "
        f"{point.batch} |"
        for point in verdict.found.front
    ]
    lines += [
        "",
        f"Predicted, not measured: `{command}`; efficiencies: {profile_source}; "
        f"{verdict.found.num_evaluated} deployments evaluated. Rates count all cards of the "
        "inventory, idle ones too.",
        "",
    ]
    return "\n".join(lines)


def comparison_values(rows: Sequence[Row]) -> dict[str, Any]:
    """What `step3rt plan compare --json` prints for one profile."""
    return {
        "median_error": median_error(rows),
        "median_errors": _errors(rows),
        "rows": [asdict(row) | {"error": row.error} for row in rows],
    }


def comparison_text(rows: Sequence[Row]) -> str:
    """Predicted beside measured, one line a reading."""
    lines = [f"{'run':<40} {'quantity':<22} {'predicted':>10} {'measured':>10} {'error':>7}"]
    lines += [
        f"{row.run:<40} {row.quantity:<22} {row.predicted:>10.1f} {row.measured:>10.1f} "
        f"{row.error:>+7.1%}"
        for row in rows
    ]
    lines.append(_errors_text(_errors(rows)))
    return "\n".join(lines)


def holdout_values(
    fitted_to: Sequence[str], stated: Sequence[Row], fitted: Sequence[Row]
) -> dict[str, Any]:
    """What a profile that was fitted to some runs is worth on others, which the rows are of."""
    return {
        "fitted_to": list(fitted_to),
        "tested_on": list(dict.fromkeys(row.run for row in fitted)),
        "median_errors": {"stated": _errors(stated), "fitted": _errors(fitted)},
    }


def holdout_text(values: dict[str, Any]) -> str:
    """One sentence for people."""
    errors = values["median_errors"]
    return (
        f"fitted to {len(values['fitted_to'])} runs and tested on the other "
        f"{len(values['tested_on'])}: {_errors_text(errors['fitted'])}; before the fit "
        f"{_errors_text(errors['stated'])}"
    )


def cross_validation_values(found: CrossValidation) -> dict[str, Any]:
    """What fits are worth over many ways to draw the halves."""
    return {
        "splits": len(found.rows),
        "median_errors": {name: found.median(name) for name in _QUANTITIES},
        "worst_errors": {name: found.worst(name) for name in _QUANTITIES},
    }


def cross_validation_text(values: dict[str, Any]) -> str:
    """One sentence for people."""
    return (
        f"over {values['splits']} ways to draw the halves: {_errors_text(values['median_errors'])};"
        f" the worst {_errors_text(values['worst_errors'])}"
    )


def prediction_text(deployment: Deployment, batch: int, values: dict[str, float]) -> str:
    """What `step3rt plan predict` prints: means of one deployment."""
    stages = "  ".join(f"{name} {values[name]:.1f}" for name in STAGES)
    return (
        f"{deployment.label}, {batch} sequences\n"
        f"  {values['tokens_per_s_per_gpu'] * deployment.num_gpus:,.0f} tokens/s, "
        f"{values['tokens_per_s_per_gpu']:,.0f} per GPU, TPOT {values['tpot_ms']:.2f} ms\n"
        f"  us of a layer and micro-batch: {stages}\n"
        f"  GPUs at work {values['busy_share']:.0%}"
    )


def _errors(rows: Sequence[Row]) -> dict[str, float | None]:
    """Median errors by quantity; None where no run has a reading."""
    errors = {quantity: median_error(rows, quantity) for quantity in _QUANTITIES}
    return {quantity: None if isnan(error) else error for quantity, error in errors.items()}


def _errors_text(errors: dict[str, float | None]) -> str:
    parts = [
        f"{name} {error:.1%}"
        for (quantity, name) in _QUANTITIES.items()
        if (error := errors[quantity]) is not None
    ]
    return f"median errors {', '.join(parts)}"
