"""Turns the flags of `generate` and `chat` into `SamplingParams`.

Owns their names, help and the default of --max-tokens; the server alone validates values.
"""

import argparse

from step3rt.errors import InvalidArgument
from step3rt.sampling import SamplingParams

# A terminal wants a paragraph; scripts of the SDK get `SamplingParams.max_tokens`, vLLM's default.
MAX_TOKENS = 128
_MAX_TOKENS_HELP = (
    f"most tokens to generate (default: {MAX_TOKENS} here, {SamplingParams().max_tokens} in the "
    "SDK)"
)


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `SamplingParams` that make sense for one continuation of text."""
    group = parser.add_argument_group("sampling (default: as the model's generation_config.json)")
    for flag, kind, text in (
        ("--max-tokens", int, _MAX_TOKENS_HELP),
        ("--min-tokens", int, "tokens before which no stop id can be sampled"),
        ("--temperature", float, "0 is greedy"),
        ("--top-p", float, "smallest set of tokens whose probability reaches this; 1 is off"),
        ("--top-k", int, "most likely tokens kept; 0 is off"),
        ("--min-p", float, "share of the best token's probability that a token needs; 0 is off"),
        ("--presence-penalty", float, "taken off the logit of tokens generated before; 0 is off"),
        ("--frequency-penalty", float, "the same for each time that one was; 0 is off"),
        ("--repetition-penalty", float, "makes tokens of prompt and output less likely; 1 is off"),
        ("--seed", int, "makes the result reproducible"),
    ):
        group.add_argument(flag, type=kind, metavar=kind.__name__.upper(), help=text)
    parser.set_defaults(max_tokens=MAX_TOKENS)
    group.add_argument(
        "--logit-bias",
        action="append",
        type=_bias,
        default=[],
        metavar="ID=VALUE",
        help="add this to a token's logit; -100 bans and 100 forces it; may be repeated",
    )
    group.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end there; may be repeated"
    )
    group.add_argument(
        "--stop-token-id",
        action="append",
        type=int,
        default=[],
        metavar="ID",
        help="end after this token; may be repeated",
    )
    group.add_argument(
        "--include-stop", action="store_true", help="the text that ended it is part of the text"
    )
    group.add_argument("--ignore-eos", action="store_true", help="go on after the end of the text")


def sampling_from(arguments: argparse.Namespace) -> SamplingParams:
    """The parameters that the flags of `add_sampling_flags` give.

    Raises:
        InvalidArgument: a token has two biases.
    """
    return SamplingParams(
        max_tokens=arguments.max_tokens,
        min_tokens=arguments.min_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
        min_p=arguments.min_p,
        presence_penalty=arguments.presence_penalty,
        frequency_penalty=arguments.frequency_penalty,
        repetition_penalty=arguments.repetition_penalty,
        logit_bias=_biases(arguments.logit_bias),
        seed=arguments.seed,
        stop=arguments.stop,
        stop_token_ids=arguments.stop_token_id,
        include_stop=arguments.include_stop,
        ignore_eos=arguments.ignore_eos,
    )


def _bias(text: str) -> tuple[int, float]:
    token_id, separator, value = text.partition("=")
    try:
        if not separator:
            raise ValueError("it has no '='")
        return int(token_id), float(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a token id and its bias: {error}. Write ID=VALUE, like 15=-100"
        ) from error


def _biases(pairs: list[tuple[int, float]]) -> dict[int, float]:
    biases = dict(pairs)
    if len(biases) < len(pairs):
        token_ids = [token_id for token_id, _ in pairs]
        twice = next(token_id for token_id in token_ids if token_ids.count(token_id) > 1)
        raise InvalidArgument(
            f"--logit-bias was given twice for token {twice}. A token has one bias. Leave one out"
        )
    return biases
