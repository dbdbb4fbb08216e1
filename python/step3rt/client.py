"""The blocking client: one gRPC channel, streams that cancel when they are left.

Owns channel and retries; field mappings are `codec`'s.
"""

import json
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self, Unpack, cast

import grpc

from step3rt import codec
from step3rt.channel import CHANNEL_OPTIONS, check_address, credentials
from step3rt.errors import Internal, Step3Error
from step3rt.results import GenerationEvent, RequestOutput, ResultBuilder
from step3rt.sampling import SamplingOverrides, SamplingParams
from step3rt.v1 import inference_service_pb2
from step3rt.v1.inference_service_pb2_grpc import InferenceServiceStub

DEFAULT_ADDRESS = "127.0.0.1:50051"

_MAX_RETRIES = 2
_FIRST_BACKOFF_S = 0.5
_MAX_BACKOFF_S = 8.0


def backoff_s(attempt: int, error: Step3Error) -> float | None:
    """Seconds to wait before retry `attempt` (from 0), or `None` if it must not be retried.

    The server's hint, or else full jitter over an exponential range.
    """
    if not error.is_retryable or attempt >= _MAX_RETRIES:
        return None
    if error.retry_after_s is not None:
        return error.retry_after_s
    return random.uniform(0, min(_MAX_BACKOFF_S, _FIRST_BACKOFF_S * 2**attempt))


class _Call(Protocol):
    """A running server stream, as grpcio returns it."""

    def __next__(self) -> inference_service_pb2.GenerateResponse: ...

    def cancel(self) -> bool: ...


class GenerationStream:
    """The events of one request, as they come. Iterable once.

    Leaving the `with` block, `close()`, or dropping the object cancels the request at the
    server. `text`, `token_ids` and `result()` describe what has been read so far.
    """

    def __init__(
        self,
        stub: InferenceServiceStub,
        request: inference_service_pb2.GenerateRequest,
        builder: ResultBuilder,
        timeout_s: float | None,
    ) -> None:
        self._stub = stub
        self._request = request
        self._builder = builder
        timeout_s = codec.timeout_s_of(timeout_s)
        self._deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._is_closed = False
        self._call = self._start()
        self._has_events = False
        self._num_retries = 0

    def _start(self) -> _Call:
        timeout = None if self._deadline is None else self._deadline - time.monotonic()
        with codec.call_errors(self._request.request_id):
            return cast(_Call, self._stub.Generate(self._request, timeout=timeout))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # __init__ may have failed before the call existed.
        if hasattr(self, "_call"):
            self.close()

    def close(self) -> None:
        """Cancels the request if it still runs; idempotent."""
        self._is_closed = True
        self._call.cancel()

    def __iter__(self) -> Iterator[GenerationEvent]:
        return self

    def __next__(self) -> GenerationEvent:
        while True:
            try:
                response = next(self._call)
            except StopIteration:
                if not self._builder.output.finished:
                    raise Internal(codec.EARLY_END, request_id=self._request.request_id) from None
                raise
            except grpc.RpcError as error:
                self._retry_or_raise(codec.to_error(error, self._request.request_id))
                continue
            self._has_events = True
            if response.HasField("started"):
                started = response.started
                self._builder.started(
                    started.request_id, started.prompt_tokens, started.cached_tokens
                )
                continue
            event = codec.to_event(response)
            if event is None:
                raise Internal(codec.UNKNOWN_EVENT, request_id=self._request.request_id)
            self._builder.add(event)
            return event

    def _retry_or_raise(self, error: Step3Error) -> None:
        """Starts again if nothing was received yet and the reason allows it."""
        wait_s = None if self._has_events else backoff_s(self._num_retries, error)
        if wait_s is None or (
            self._deadline is not None and time.monotonic() + wait_s >= self._deadline
        ):
            raise error
        self._num_retries += 1
        time.sleep(wait_s)
        self._call = self._start()
        # Another thread may have closed the stream meanwhile, and cancelled only the call before.
        if self._is_closed:
            self._call.cancel()

    @property
    def request_id(self) -> str:
        """The id under which the server knows the request."""
        return self._request.request_id

    @property
    def text(self) -> str:
        """The first continuation's text so far."""
        return self._builder.output.outputs[0].text

    @property
    def token_ids(self) -> list[int]:
        """The first continuation's tokens so far."""
        return self._builder.output.outputs[0].token_ids

    def result(self) -> RequestOutput:
        """Reads to the end and returns everything."""
        for _ in self:
            pass
        return self._builder.output


class Client:
    """A connection to a coordinator. Usable from several threads; close it or use `with`.

    Args:
        address: "host:port" or "unix:/path".
        model: refuse to talk to a server that serves another model; empty accepts any.
        tenant: whose requests these are, at most 64 characters of [A-Za-z0-9._-]; empty is the
            default tenant. Tenants get equal shares of the cluster and share no cached prompts.
        ca: PEM file of the CA that issued the server's certificate, for a server that speaks TLS;
            default: the environment's STEP3RT_CA. Empty is clear text.

    Raises:
        ConfigError: `address` cannot be one, or `ca` cannot be read.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        model: str = "",
        tenant: str = "",
        ca: str | Path | None = None,
    ) -> None:
        self._model = model
        self._tenant = tenant
        check_address(address)
        trust = credentials(ca)
        self._channel = (
            grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
            if trust is None
            else grpc.secure_channel(address, trust, options=CHANNEL_OPTIONS)
        )
        self._stub = InferenceServiceStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the channel; running streams of this client end with `Cancelled`."""
        self._channel.close()

    def generate(
        self,
        prompt: codec.Prompt,
        params: SamplingParams | None = None,
        *,
        timeout_s: float | None = None,
        request_id: str | None = None,
        priority: int = 0,
        tenant: str | None = None,
        **overrides: Unpack[SamplingOverrides],
    ) -> GenerationStream:
        """Starts a generation and returns its stream.

        Args:
            prompt: text, or token ids.
            params: sampling and stopping; `overrides` replace single fields of it.
            timeout_s: the whole request's deadline, in seconds; it also bounds retries.
            request_id: at most 128 characters of [A-Za-z0-9_.:-]; minted if absent.
            priority: lower runs first.
            tenant: whose request it is, if not the client's.

        Raises:
            Step3Error: from the stream's first `next`, one of its subclasses.
        """
        params = codec.sampling_of(params, overrides)
        request_id = request_id or codec.new_request_id()
        request = codec.to_request(
            prompt,
            params,
            request_id=request_id,
            model=self._model,
            priority=priority,
            tenant=self._tenant if tenant is None else tenant,
        )
        builder = ResultBuilder(request_id, prompt, params.n)
        return GenerationStream(self._stub, request, builder, timeout_s)

    def chat(
        self,
        messages: Sequence[Mapping[str, object]],
        params: SamplingParams | None = None,
        *,
        timeout_s: float | None = None,
        **overrides: Unpack[SamplingOverrides],
    ) -> GenerationStream:
        """Starts the model's next turn of a conversation in OpenAI's message format.

        The server renders `messages` with the checkpoint's own chat template.
        """
        params = codec.sampling_of(params, overrides)
        request_id = codec.new_request_id()
        request = codec.to_request(
            "",
            params,
            request_id=request_id,
            model=self._model,
            priority=0,
            tenant=self._tenant,
            messages_json=json.dumps(list(messages)),
        )
        builder = ResultBuilder(request_id, "", params.n)
        return GenerationStream(self._stub, request, builder, timeout_s)

    def abort(self, *request_ids: str) -> list[str]:
        """Ends requests by id and returns those that were live; unknown ids are no error."""
        request = inference_service_pb2.AbortRequest(request_ids=request_ids)
        with codec.call_errors():
            return list(self._stub.Abort(request).aborted_request_ids)

    def model_info(self, *, timeout_s: float = 10.0) -> inference_service_pb2.GetModelInfoResponse:
        """What the server serves and its limits."""
        request = inference_service_pb2.GetModelInfoRequest()
        timeout = codec.timeout_s_of(timeout_s)
        with codec.call_errors():
            info = self._stub.GetModelInfo(request, timeout=timeout)
            return cast(inference_service_pb2.GetModelInfoResponse, info)

    def tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text` by the served model's tokenizer."""
        request = inference_service_pb2.TokenizeRequest(
            text=text, add_special_tokens=add_special_tokens
        )
        codec.check_size(request)
        with codec.call_errors():
            return list(self._stub.Tokenize(request).token_ids)

    def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `token_ids` by the served model's tokenizer."""
        request = inference_service_pb2.DetokenizeRequest(
            token_ids=token_ids, skip_special_tokens=skip_special_tokens
        )
        with codec.call_errors():
            return str(self._stub.Detokenize(request).text)
