"""Writes a plan as the cluster file that `step3rt serve --config` takes.

Owns the translation from a deployment to `ServeConfig` and a placement; never decides (`verdict`
does).
"""

import json
from pathlib import Path

from step3rt.config import COLOCATED, ServeConfig, build
from step3rt.errors import ConfigError, InvalidArgument
from step3rt.plan.architecture import Model
from step3rt.plan.cost import Precision
from step3rt.plan.deployment import Deployment
from step3rt.plan.search_space import Target
from step3rt.plan.verdict import Choice

_MIN_MICRO_BATCH_TOKENS = 512  # room for prefill beside a small decode batch
_BLOCK_SIZE_TOKENS = 64
_MAX_TARGET_MS = 60_000  # of `serve`


def check_served(model: Model) -> None:
    """Refuses a model that instances do not run.

    Raises:
        InvalidArgument: its attention is of another kind than Step-3's.
    """
    if {group.attention.kind for group in model.groups} != {"mfa"}:
        raise InvalidArgument(
            f"The model {model.name!r} cannot be written into a cluster file. Instances run models "
            "with Step-3's attention alone. Leave out --emit, or plan for such a model"
        )


def cluster_toml(
    choice: Choice, precision: Precision, target: Target, *, model: str, command: str
) -> str:
    """The settings of the coordinator of one deployment unit, with predictions as comments.

    Args:
        choice: what to run.
        precision: the KV type that was planned with.
        target: the context and TPOT that were planned for.
        model: the checkpoint that `serve` shall load.
        command: what made the plan, for the comment.

    Raises:
        InvalidArgument: the instances cannot run this deployment.
    """
    candidate, result = choice.candidate, choice.result
    deployment = candidate.deployment
    if deployment.ffn_parallelism != "ep":
        raise InvalidArgument(
            f"The deployment {deployment.label!r} cannot be written as a cluster file. "
            "FFN instances have whole experts. Plan with --ffn-parallelism ep"
        )
    places = deployment.lanes * deployment.num_attention_gpus
    sequences = -(-candidate.batch // places)
    num_ffn = deployment.num_attention_gpus if deployment.is_colocated else deployment.num_ffn_gpus
    settings: dict[str, str | int] = {
        "model": model,
        "attention": deployment.num_attention_gpus,
        "ffn": num_ffn,
        "lanes": deployment.lanes,
        "dtype": "bfloat16",
        "precision": "production",
        "kv_dtype": "fp8" if precision.kv_bytes == 1 else "bfloat16",
        "max_sequences_per_lane": sequences,
        "max_tokens_per_micro_batch": max(_MIN_MICRO_BATCH_TOKENS, sequences),
        "target_tpot_ms": min(max(int(target.tpot_ms), 1), _MAX_TARGET_MS),
    }
    # What is written is what `serve` checks: a plan that it would refuse fails here.
    build(ServeConfig, settings, "plan")
    if deployment.is_colocated:
        settings["placement"] = COLOCATED
    limit = choice.limits[0] if choice.limits else None
    comments = [
        f"Made by `{command}`. For `step3rt serve --config`.",
        f"One unit: {deployment.label}; {candidate.num_units} such units fit the inventory.",
        _instances(deployment),
        f"Predicted at {target.context_tokens} tokens of context and {candidate.batch} sequences:",
        f"  {result.tokens_per_s:,.0f} tokens/s, {result.tokens_per_s_per_gpu:,.0f} per GPU; TPOT "
        f"p50 {result.tpot_ms['p50']:.1f} ms, p99 {result.tpot_ms['p99']:.1f} ms",
        "  per layer and micro-batch: "
        + ", ".join(f"{name} {us:.0f} us" for name, us in result.stage_us.items()),
    ]
    if limit is not None:
        comments.append(f"Limited by {limit.name}: {limit.change} would bring {limit.gain:+.0%}.")
    # The last block of a sequence is not full, and it grows.
    blocks_each = -(-target.context_tokens // _BLOCK_SIZE_TOKENS) + 1
    comments += _memory(deployment, deployment.lanes * sequences * blocks_each)
    # A command may hold any character; a comment ends with its line.
    lines = [f"# {' '.join(comment.split())}" for comment in comments]
    # A JSON string is a TOML basic string.
    lines += [f"{name} = {json.dumps(value)}" for name, value in settings.items()]
    return "\n".join(lines) + "\n"


def _instances(deployment: Deployment) -> str:
    if deployment.is_colocated:
        return (
            f"Every {deployment.attention_card.name} runs an attention and an FFN instance, by "
            "`step3rt node colocated --device cuda:N`."
        )
    return (
        f"Attention instances run on {deployment.attention_card.name}, one a GPU; FFN instances "
        f"on {deployment.ffn_card.name}."
    )


def _memory(deployment: Deployment, kv_blocks: int) -> list[str]:
    """What instances need to be told, as they have no settings in the file by themselves."""
    lines = [
        f"This batch takes {kv_blocks} KV blocks of each attention instance, which by default has "
        f"1 GiB of them: give it --kv-blocks {kv_blocks}."
    ]
    if not deployment.is_one_host:
        return [
            *lines,
            "These GPUs are of several hosts. This version links instances on GPUs within one "
            "host only: plan with --gpus of one host for what runs today.",
        ]
    devices = ", ".join(f'"cuda:{index}"' for index in range(deployment.num_gpus))
    return [
        *lines,
        "For instances that `serve` starts itself, on its own host, these two lines:",
        f"devices = [{devices}]",
        f"kv_blocks = {kv_blocks}",
    ]


def write_text(path: Path, text: str) -> None:
    """Writes a file.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"The file {str(path)!r} cannot be written: {error.strerror}. Nothing was saved. "
            "Give another path"
        ) from error
