"""The asyncio client: the same calls as `client.Client`, on `grpc.aio`.

Owns the channel and asyncio's ways of cancelling; field mappings are `codec`'s.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self, TypeAlias, Unpack, cast

import grpc
import grpc.aio

from step3rt import codec
from step3rt.channel import CHANNEL_OPTIONS, check_address, credentials
from step3rt.client import DEFAULT_ADDRESS, backoff_s
from step3rt.errors import Internal, Step3Error
from step3rt.results import GenerationEvent, RequestOutput, ResultBuilder
from step3rt.sampling import SamplingOverrides, SamplingParams
from step3rt.v1 import inference_service_pb2
from step3rt.v1.inference_service_pb2_grpc import InferenceServiceStub

_Call: TypeAlias = (
    "grpc.aio.UnaryStreamCall["
    "inference_service_pb2.GenerateRequest, inference_service_pb2.GenerateResponse]"
)


def _is_task_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


class AsyncGenerationStream:
    """The events of one request, as they come. Iterable once.

    Leaving the `async with` block, `close()`, or cancelling the task that reads cancels the
    request at the server. Reading on after `close()` raises `Cancelled`.
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
        self._responses = self._call.__aiter__()
        self._has_events = False
        self._num_retries = 0

    def _start(self) -> _Call:
        timeout = None if self._deadline is None else self._deadline - time.monotonic()
        with codec.call_errors(self._request.request_id):
            return cast(_Call, self._stub.Generate(self._request, timeout=timeout))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
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

    def __aiter__(self) -> AsyncIterator[GenerationEvent]:
        return self

    async def __anext__(self) -> GenerationEvent:
        while True:
            try:
                response = await anext(self._responses)
            except asyncio.CancelledError:
                if _is_task_cancelled():
                    raise
                # grpc.aio says it this way, too, when only the call was cancelled.
                raise codec.cancelled_here(self._request.request_id) from None
            except StopAsyncIteration:
                if not self._builder.output.finished:
                    raise Internal(codec.EARLY_END, request_id=self._request.request_id) from None
                raise
            except grpc.RpcError as error:
                await self._retry_or_raise(codec.to_error(error, self._request.request_id))
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

    async def _retry_or_raise(self, error: Step3Error) -> None:
        """Starts again if nothing was received yet and the reason allows it."""
        wait_s = None if self._has_events else backoff_s(self._num_retries, error)
        if wait_s is None or (
            self._deadline is not None and time.monotonic() + wait_s >= self._deadline
        ):
            raise error
        self._num_retries += 1
        await asyncio.sleep(wait_s)
        self._call = self._start()
        # Another task may have closed the stream meanwhile, and cancelled only the call before.
        if self._is_closed:
            self._call.cancel()
        self._responses = self._call.__aiter__()

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

    async def result(self) -> RequestOutput:
        """Reads to the end and returns everything."""
        async for _ in self:
            pass
        return self._builder.output


class AsyncClient:
    """A connection to a coordinator for one event loop; close it or use `async with`.

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
            grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
            if trust is None
            else grpc.aio.secure_channel(address, trust, options=CHANNEL_OPTIONS)
        )
        self._stub = InferenceServiceStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the channel; running streams of this client end with `Cancelled`."""
        await self._channel.close()

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
    ) -> AsyncGenerationStream:
        """Starts a generation and returns its stream; see `Client.generate`."""
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
        return AsyncGenerationStream(self._stub, request, builder, timeout_s)

    def chat(
        self,
        messages: Sequence[Mapping[str, object]],
        params: SamplingParams | None = None,
        *,
        timeout_s: float | None = None,
        **overrides: Unpack[SamplingOverrides],
    ) -> AsyncGenerationStream:
        """Starts the model's next turn of a conversation; see `Client.chat`."""
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
        return AsyncGenerationStream(self._stub, request, builder, timeout_s)

    async def abort(self, *request_ids: str) -> list[str]:
        """Ends requests by id and returns those that were live; unknown ids are no error."""
        request = inference_service_pb2.AbortRequest(request_ids=request_ids)
        with codec.call_errors():
            return list((await self._stub.Abort(request)).aborted_request_ids)

    async def model_info(
        self, *, timeout_s: float = 10.0
    ) -> inference_service_pb2.GetModelInfoResponse:
        """What the server serves and its limits."""
        request = inference_service_pb2.GetModelInfoRequest()
        timeout = codec.timeout_s_of(timeout_s)
        with codec.call_errors():
            info = await self._stub.GetModelInfo(request, timeout=timeout)
            return cast(inference_service_pb2.GetModelInfoResponse, info)

    async def tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text` by the served model's tokenizer."""
        request = inference_service_pb2.TokenizeRequest(
            text=text, add_special_tokens=add_special_tokens
        )
        codec.check_size(request)
        with codec.call_errors():
            return list((await self._stub.Tokenize(request)).token_ids)

    async def detokenize(
        self, token_ids: Sequence[int], *, skip_special_tokens: bool = True
    ) -> str:
        """Text of `token_ids` by the served model's tokenizer."""
        request = inference_service_pb2.DetokenizeRequest(
            token_ids=token_ids, skip_special_tokens=skip_special_tokens
        )
        with codec.call_errors():
            return str((await self._stub.Detokenize(request)).text)
