"""What a generation gives: events while it runs, one result when it is over.

Owns the types and the bookkeeping from events to result; knows nothing of gRPC.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's natural log-probability under the model, and its most likely rivals."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one continuation."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationEvent:
    """New tokens of one continuation, or its end.

    Attributes:
        index: which of the `n` continuations.
        position: position of `token_ids[0]` in the continuation, from 0, without gaps.
        token_ids: new tokens; may be empty at the end.
        text: new text, complete UTF-8; may lag behind `token_ids`.
        logprobs: one per token when asked for.
        prompt_logprobs: of prompt tokens 1, 2, …; arrives before the first token, in parts.
        finish_reason: `None` until the end: then "stop", "length" or "cancelled".
        stop_reason: the stop string or stop token id that matched.
        usage: present at the end.
    """

    index: int = 0
    position: int = 0
    token_ids: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    usage: Usage | None = None


@dataclass(slots=True)
class CompletionOutput:
    """One continuation, so far or complete."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None

    @property
    def cumulative_logprob(self) -> float | None:
        """The sum of the tokens' logprobs, when they were asked for."""
        return sum(item.logprob for item in self.logprobs) if self.logprobs else None


@dataclass(slots=True)
class RequestOutput:
    """The result of one request.

    `prompt` is the text, if the prompt was text; `prompt_token_ids` the ids, if it was ids.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int] | None
    outputs: list[CompletionOutput]
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    finished: bool = False


class ResultBuilder:
    """Accumulates the events of one request into its `RequestOutput`."""

    def __init__(self, request_id: str, prompt: str | Sequence[int], n: int) -> None:
        is_text = isinstance(prompt, str)
        self.output = RequestOutput(
            request_id=request_id,
            prompt=prompt if isinstance(prompt, str) else None,
            prompt_token_ids=None if is_text else [int(token) for token in prompt],
            outputs=[CompletionOutput(0)],
        )
        self._num_open = n

    def started(self, request_id: str, num_prompt_tokens: int, num_cached_tokens: int) -> None:
        """Notes what the server said first, which accepts `n`: before, it may be any number."""
        self.output.outputs = [CompletionOutput(index) for index in range(self._num_open)]
        self.output.request_id = request_id
        self.output.num_prompt_tokens = num_prompt_tokens
        self.output.num_cached_tokens = num_cached_tokens

    def add(self, event: GenerationEvent) -> None:
        """Applies one event."""
        completion = self.output.outputs[event.index]
        completion.text += event.text
        completion.token_ids.extend(event.token_ids)
        completion.logprobs.extend(event.logprobs)
        self.output.prompt_logprobs.extend(event.prompt_logprobs)
        if event.finish_reason is not None:
            completion.finish_reason = event.finish_reason
            completion.stop_reason = event.stop_reason
            self._num_open -= 1
            self.output.finished = self._num_open == 0
