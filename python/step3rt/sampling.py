"""How a request is sampled and stopped, as callers of the SDK say it.

Owns names and defaults; the server alone validates.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypedDict


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Sampling and stopping of one request. The names are those of vLLM where it has them.

    `None` leaves the choice to the model's generation_config.json, then to the server.

    Attributes:
        n: continuations of the prompt.
        temperature: 0 is greedy.
        top_p: smallest set of tokens whose probability reaches this; 1 is off.
        top_k: most likely tokens kept; 0 is off.
        min_p: drops tokens below this share of the most likely one's probability; 0 is off.
        presence_penalty: -2 to 2, taken off the logit of every token generated so far; 0 is off.
        frequency_penalty: -2 to 2, taken off once for each time that a token was generated; 0 is
            off.
        repetition_penalty: above 0, at most 100; divides the logits of tokens of prompt and output
            where they are positive and multiplies them where they are negative; 1 is off.
        logit_bias: -100 to 100 by token id, added to the logits before all penalties; -100 bans a
            token, 100 forces it. At most 1,024 entries.
        seed: makes the result reproducible, whatever else the server does at the time.
        max_tokens: most tokens to generate; `None` is the rest of the context, or what the KV pool
            holds of it. The command line's default is another, 128.
        min_tokens: tokens before which no stop id can be sampled.
        stop: strings that end the text; they are not part of it unless `include_stop`.
        stop_token_ids: ids that end the text besides the model's own.
        include_stop: whether the matched stop string stays in the text.
        ignore_eos: whether the model's end-of-text id is sampled like any other.
        logprobs: `None` for none, 0 for the sampled token's, k for the k most likely besides; of
            the model's own distribution, before bias, penalties, temperature and filters.
        prompt_logprobs: the same for the prompt's tokens, the first one excluded.
        skip_special_tokens: whether special tokens are left out of the text.
    """

    n: int = 1
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int | None = None
    stop: str | tuple[str, ...] | list[str] = ()
    stop_token_ids: tuple[int, ...] | list[int] = ()
    include_stop: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True


class SamplingOverrides(TypedDict, total=False):
    """The fields of `SamplingParams` as keywords of `generate`."""

    n: int
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    repetition_penalty: float | None
    logit_bias: Mapping[int, float] | None
    seed: int | None
    max_tokens: int | None
    min_tokens: int | None
    stop: str | tuple[str, ...] | list[str]
    stop_token_ids: tuple[int, ...] | list[int]
    include_stop: bool
    ignore_eos: bool
    logprobs: int | None
    prompt_logprobs: int | None
    skip_special_tokens: bool
