"""Flags that several commands of `step3rt plan` share, and what they stand for.

Never predicts; says nothing but which profile it took when none was named.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from step3rt.errors import InvalidArgument

if TYPE_CHECKING:
    from step3rt.plan.architecture import Model
    from step3rt.plan.cost import Precision
    from step3rt.plan.deployment import Deployment
    from step3rt.plan.hardware import Hardware
    from step3rt.plan.profile import Profile


def add_common(parser: argparse.ArgumentParser, *, has_context: bool = True) -> None:
    """The model, the context, cards and JSON."""
    parser.add_argument(
        "--model",
        default="step3",
        metavar="NAME_OR_PATH",
        help="a model that ships, a checkpoint directory or a config.json (default: step3)",
    )
    if has_context:
        parser.add_argument(
            "--context", type=int, default=8192, metavar="TOKENS", help="(default: 8192)"
        )
    parser.add_argument("--hardware-file", type=Path, metavar="TOML", help="more cards or prices")
    parser.add_argument("--json", action="store_true", help="print JSON")


def add_profile(parser: argparse.ArgumentParser, *, takes_fitted: bool = False) -> None:
    """How well kernels run; `takes_fitted`: by default, as `profile_of` finds it."""
    kept = "what `plan compare --save` kept, else " if takes_fitted else ""
    parser.add_argument(
        "--profile",
        default=None if takes_fitted else "paper-h800",
        metavar="NAME_OR_FILE",
        help="kernel efficiencies: paper-h800, peers-h200, step3rt-h200, or a fitted file "
        f"(default: {kept}paper-h800)",
    )


def profile_of(arguments: argparse.Namespace) -> "Profile":
    """The profile that is named; else the one that was kept, which it says; else the paper's.

    Raises:
        ConfigError: see `load_profile`.
    """
    from step3rt.plan.profile import STATED, fitted_profile_path, load_profile

    if arguments.profile is not None:
        return load_profile(arguments.profile)
    kept = fitted_profile_path()
    if kept is None or not kept.is_file():
        return load_profile(STATED)
    print(f"profile: {kept}, from `plan compare --save`; or name one: --profile", file=sys.stderr)
    return load_profile(str(kept))


def add_kv_dtype(parser: argparse.ArgumentParser) -> None:
    """Bytes of the KV cache."""
    parser.add_argument(
        "--kv-dtype", choices=("fp8", "bfloat16"), help="default: as the paper quantises the model"
    )


def add_model_of_time(parser: argparse.ArgumentParser) -> None:
    """What every prediction of time depends on."""
    add_profile(parser, takes_fitted=True)
    add_kv_dtype(parser)
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="(default: 0)")


def add_deployment(parser: argparse.ArgumentParser) -> None:
    """One deployment: cards of each side, lanes, batch, and the slice of a model."""
    parser.add_argument("--attention-gpus", type=int, metavar="N", help="of a disaggregated unit")
    parser.add_argument("--ffn-gpus", type=int, metavar="N", help="of a disaggregated unit")
    parser.add_argument("--colocated-gpus", type=int, metavar="N", help="both roles on every GPU")
    parser.add_argument("--hardware", default="h800", metavar="CARD", help="(default: h800)")
    parser.add_argument("--ffn-hardware", metavar="CARD", help="default: --hardware")
    parser.add_argument("--lanes", type=int, default=3, metavar="N", help="(default: 3)")
    parser.add_argument("--ffn-parallelism", choices=("ep", "tp_ep"), default="ep")
    parser.add_argument("--batch", type=int, required=True, metavar="N", help="sequences in flight")
    parser.add_argument("--experts", type=int, metavar="N", help="routed experts, for a slice")


def cards_of(arguments: argparse.Namespace) -> "dict[str, Hardware]":
    """Known cards, with the user's own."""
    from step3rt.plan.hardware import load_hardware

    return load_hardware(arguments.hardware_file)


def model_of(arguments: argparse.Namespace) -> "Model":
    """`--model`, or Step-3."""
    from step3rt.plan.hf_config import load_model

    return load_model(arguments.model or "step3")


def sliced_model_of(arguments: argparse.Namespace) -> "Model":
    """`--model`, with `--experts` routed experts if they are given.

    Raises:
        InvalidArgument: see `Model.with_num_experts`.
    """
    model = model_of(arguments)
    return model if arguments.experts is None else model.with_num_experts(arguments.experts)


def check_context(context: int) -> None:
    """Refuses a context of nothing, and one that nothing holds.

    Raises:
        InvalidArgument: it is out of range.
    """
    from step3rt.plan.deployment import MAX_CONTEXT_TOKENS

    if not 1 <= context <= MAX_CONTEXT_TOKENS:
        raise InvalidArgument(
            f"--context is {context}. A token has from 1 to {MAX_CONTEXT_TOKENS} behind it. "
            "Correct it"
        )


def precision_of(arguments: argparse.Namespace, model: "Model") -> "Precision":
    """As the paper quantises the model, unless `--kv-dtype` says else."""
    from step3rt.plan.cost import paper_precision

    return paper_precision(model, arguments.kv_dtype)


def deployment_of(arguments: argparse.Namespace) -> "Deployment":
    """The deployment that the flags of `add_deployment` describe.

    Raises:
        InvalidArgument: the placement is incomplete or given twice, or a card is not known.
    """
    from step3rt.plan.deployment import Deployment
    from step3rt.plan.hardware import pick_hardware

    cards = cards_of(arguments)
    colocated, attention = arguments.colocated_gpus, arguments.attention_gpus
    ffn = arguments.ffn_gpus
    is_colocated = colocated is not None
    if is_colocated == (attention is not None) or (attention is None) != (ffn is None):
        raise InvalidArgument(
            "The placement is incomplete or given twice. A unit is disaggregated or colocated. "
            "Give --attention-gpus and --ffn-gpus, or --colocated-gpus alone"
        )
    card = pick_hardware(arguments.hardware, cards)
    ffn_card = pick_hardware(arguments.ffn_hardware or arguments.hardware, cards)
    values: dict[str, Any] = {
        "placement": "colocated" if is_colocated else "disaggregated",
        "attention_card": card,
        "ffn_card": card if is_colocated else ffn_card,
        "num_attention_gpus": colocated if is_colocated else attention,
        "num_ffn_gpus": 0 if is_colocated else ffn,
        "lanes": arguments.lanes,
        "ffn_parallelism": arguments.ffn_parallelism,
    }
    return Deployment(**values)
