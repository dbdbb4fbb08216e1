"""Translates between the SDK's types and the protocol's messages.

Owns every field mapping of the client side, errors included; opens no channel.
"""

import math
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from numbers import Integral, Real
from typing import cast

import grpc
import grpc.aio
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from step3rt.channel import MAX_REQUEST_BYTES
from step3rt.errors import (
    AlreadyExists,
    Cancelled,
    ConfigError,
    DeadlineExceeded,
    Internal,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Step3Error,
    Unavailable,
)
from step3rt.results import GenerationEvent, TokenLogprob, Usage
from step3rt.sampling import SamplingOverrides, SamplingParams
from step3rt.v1 import common_pb2, inference_service_pb2

_ERROR_BY_CODE: dict[grpc.StatusCode, type[Step3Error]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgument,
    grpc.StatusCode.OUT_OF_RANGE: InvalidArgument,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExists,
    grpc.StatusCode.FAILED_PRECONDITION: ConfigError,
    grpc.StatusCode.UNIMPLEMENTED: ConfigError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhausted,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.CANCELLED: Cancelled,
}

_FINISH_REASON = {
    common_pb2.FINISH_REASON_STOP: "stop",
    common_pb2.FINISH_REASON_LENGTH: "length",
    common_pb2.FINISH_REASON_TOOL_CALLS: "tool_calls",
    common_pb2.FINISH_REASON_CANCELLED: "cancelled",
}

UNKNOWN_EVENT = (
    "The server sent an event that this client does not know. Client and server speak different "
    "versions of the protocol. Update the older one"
)

# What grpcio says when no server answered, in a sentence that says what to do.
_TRANSPORT_FAILURE = {
    grpc.StatusCode.UNAVAILABLE: (
        "The connection to the coordinator failed: {}. Nothing answers there, or it has ended. "
        "Check the address, that `step3rt serve` runs, and the CA if it speaks TLS"
    ),
    grpc.StatusCode.DEADLINE_EXCEEDED: (
        "The call's deadline passed before it was complete: {}. The request is cancelled. "
        "Allow more time, or ask for fewer tokens"
    ),
    grpc.StatusCode.UNIMPLEMENTED: (
        "The server at that address does not know the call: {}. It may be the port at which the "
        "coordinator awaits instances, or another version. Give the address of its --listen"
    ),
}
EARLY_END = (
    "The server's stream ended without a finish reason. What was read of it is not the whole "
    "result. See the coordinator's log, then ask again"
)

# The fields of `SamplingParams` that are unsigned 32-bit integers in the protocol.
_COUNTS = ("n", "top_k", "max_tokens", "min_tokens", "logprobs", "prompt_logprobs")

# Longer ones are no deadline; no request lives for a year.
_LONGEST_TIMEOUT_S = 366 * 86_400.0

# Text, or token ids.
Prompt = str | Sequence[int]


def new_request_id() -> str:
    """A fresh id; minted by the client so that a lost answer can still be aborted."""
    return f"req-{uuid.uuid4().hex}"


def check_prompt(prompt: object) -> None:
    """Refuses what would pass for token ids or texts and is neither.

    Raises:
        InvalidArgument: the prompt is of bytes, or a mapping.
    """
    if isinstance(prompt, bytes | bytearray | memoryview | Mapping):
        raise InvalidArgument(
            f"The prompt is of type {type(prompt).__name__}. A prompt is one text or one list of "
            "token ids. Decode bytes to text; of a mapping, give the text or the ids that it holds",
            details={"field": "prompt"},
        )


def timeout_s_of(timeout_s: object) -> float | None:
    """A caller's timeout in seconds as grpcio takes it; `None` for none.

    Raises:
        InvalidArgument: it is not a number.
    """
    if timeout_s is None:
        return None
    seconds = float(timeout_s) if isinstance(timeout_s, Real) else math.nan
    if math.isnan(seconds):
        raise InvalidArgument(
            f"timeout_s is {timeout_s!r}. It is a number of seconds, or None for no deadline. "
            "Correct it",
            details={"field": "timeout_s"},
        )
    # grpcio takes an infinite one for one that has passed.
    return None if seconds > _LONGEST_TIMEOUT_S else seconds


def sampling_of(params: SamplingParams | None, overrides: SamplingOverrides) -> SamplingParams:
    """`params`, or the defaults, with single fields replaced.

    Raises:
        InvalidArgument: `params` is something else.
    """
    if params is not None and not isinstance(params, SamplingParams):
        raise InvalidArgument(
            f"params is of type {type(params).__name__}. One SamplingParams says how a request is "
            "sampled. Give one, or its fields as keywords",
            details={"field": "params"},
        )
    return replace(params or SamplingParams(), **overrides)


def to_request(
    prompt: Prompt,
    params: SamplingParams,
    *,
    request_id: str,
    model: str,
    priority: int,
    tenant: str = "",
    messages_json: str | None = None,
) -> inference_service_pb2.GenerateRequest:
    """Builds the request message.

    Raises:
        InvalidArgument: a value does not fit its field, e.g. a negative count.
    """
    check_prompt(prompt)
    for name in _COUNTS:
        _check_count(name, getattr(params, name), request_id)
    try:
        request = inference_service_pb2.GenerateRequest(
            request_id=request_id,
            model=model,
            priority=priority,
            tenant=tenant or None,
            sampling=common_pb2.SamplingParams(
                n=params.n,
                temperature=params.temperature,
                top_p=params.top_p,
                top_k=params.top_k,
                min_p=params.min_p,
                presence_penalty=params.presence_penalty,
                frequency_penalty=params.frequency_penalty,
                repetition_penalty=params.repetition_penalty,
                logit_bias=params.logit_bias,
                seed=params.seed,
            ),
            stopping=common_pb2.StoppingCriteria(
                max_tokens=params.max_tokens,
                min_tokens=params.min_tokens,
                stop=[params.stop] if isinstance(params.stop, str) else params.stop,
                stop_token_ids=params.stop_token_ids,
                include_stop=params.include_stop,
                ignore_eos=params.ignore_eos,
            ),
            output=common_pb2.OutputOptions(
                top_logprobs=params.logprobs,
                prompt_logprobs=params.prompt_logprobs,
                skip_special_tokens=params.skip_special_tokens,
            ),
        )
        if messages_json is not None:
            request.chat.messages_json = messages_json
        elif isinstance(prompt, str):
            request.text = prompt
        else:
            request.token_ids.ids.extend(prompt)
            request.token_ids.SetInParent()
    except (ValueError, TypeError) as error:
        raise InvalidArgument(
            f"The request cannot be encoded: {error}. A prompt is one text or one list of token "
            "ids, which are integers from 0 to 2^32 - 1; sampling values are numbers, logit_bias "
            "maps token ids to numbers, stop strings are text. Correct the value",
            request_id=request_id,
        ) from error
    check_size(request)
    return request


def check_size(request: Message) -> None:
    """Refuses a request that no server takes.

    Raises:
        InvalidArgument: it is larger than `MAX_REQUEST_BYTES`.
    """
    if request.ByteSize() > MAX_REQUEST_BYTES:
        raise InvalidArgument(
            f"The request takes {request.ByteSize()} bytes. A coordinator takes "
            f"{MAX_REQUEST_BYTES}, more than the text of any context. Shorten the prompt",
            reason="PROMPT_TOO_LONG",
        )


def _check_count(name: str, value: object, request_id: str) -> None:
    """Refuses what the protocol cannot carry, by name; whether it makes sense, the server says."""
    if value is None or (isinstance(value, Integral) and 0 <= int(value) < 2**32):
        return
    raise InvalidArgument(
        f"{name} is {value!r}. It is a count: an integer from 0 to {2**32 - 1}. Correct it",
        request_id=request_id,
        details={"field": name},
    )


def _to_logprob(message: common_pb2.TokenLogprob) -> TokenLogprob:
    top = tuple((item.token_id, item.logprob) for item in message.top)
    return TokenLogprob(message.token_id, message.logprob, top)


def to_event(response: inference_service_pb2.GenerateResponse) -> GenerationEvent | None:
    """The SDK's event for a response; `None` for `Started`."""
    match response.WhichOneof("event"):
        case "delta":
            delta = response.delta
            return GenerationEvent(
                index=delta.index,
                position=delta.sequence,
                token_ids=tuple(delta.token_ids),
                text=delta.text,
                logprobs=tuple(map(_to_logprob, delta.logprobs)),
                prompt_logprobs=tuple(map(_to_logprob, delta.prompt_logprobs)),
            )
        case "finished":
            finished = response.finished
            matched = finished.WhichOneof("matched")
            return GenerationEvent(
                index=finished.index,
                position=finished.usage.completion_tokens,
                finish_reason=_FINISH_REASON.get(finished.reason, "unknown"),
                stop_reason=None if matched is None else getattr(finished, matched),
                usage=Usage(
                    prompt_tokens=finished.usage.prompt_tokens,
                    completion_tokens=finished.usage.completion_tokens,
                    cached_tokens=finished.usage.cached_tokens,
                ),
            )
        case _:
            return None


def cancelled_here(request_id: str | None) -> Cancelled:
    """What reading a stream that this client has closed raises."""
    return Cancelled(
        "The request was cancelled on this side: its stream, or the client, is closed. Nothing "
        "more comes of it. Read a stream before it is closed, or ask anew of an open client",
        request_id=request_id,
    )


@contextmanager
def call_errors(request_id: str | None = None) -> Iterator[None]:
    """Has a call that fails in the block, or cannot start, raise a `Step3Error`."""
    try:
        yield
    except grpc.RpcError as error:
        raise to_error(error, request_id) from error
    except (ValueError, grpc.aio.UsageError) as error:  # grpcio's words for a closed channel
        raise cancelled_here(request_id) from error


def to_error(error: grpc.RpcError, request_id: str | None = None) -> Step3Error:
    """The typed exception for a failed call, with the server's reason and retry hint."""
    # Every error that grpcio raises from a call is that call, hence knows its status.
    call = cast(grpc.Call, error)
    code = call.code()
    message = call.details() or code.name
    reason: str | None = None
    retry_after_s: float | None = None
    details: dict[str, str] = {}
    status = rpc_status.from_call(call)
    for detail in status.details if status is not None else ():
        info = error_details_pb2.ErrorInfo()
        retry = error_details_pb2.RetryInfo()
        bad_request = error_details_pb2.BadRequest()
        if detail.Unpack(info):
            reason = info.reason
            details.update(info.metadata)
        elif detail.Unpack(retry):
            retry_after_s = retry.retry_delay.ToNanoseconds() / 1e9
        elif detail.Unpack(bad_request):
            for violation in bad_request.field_violations:
                details["field"] = violation.field
    kind = _ERROR_BY_CODE.get(code, Internal)
    # Transport failures carry no ErrorInfo: no server decided anything, so a retry may help.
    if reason is None and code is grpc.StatusCode.CANCELLED:
        return cancelled_here(request_id)
    if reason is None:
        message = _TRANSPORT_FAILURE.get(code, "{}").format(message)
    return kind(
        message,
        reason=reason,
        retry_after_s=retry_after_s,
        request_id=request_id,
        details=details,
        is_retryable=False if reason == "SLOW_CONSUMER" else None,
    )
