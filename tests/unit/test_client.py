"""The clients against a real gRPC server that misbehaves, over a socket."""

import asyncio
import inspect
import math
import signal
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import grpc
import numpy as np
import pytest

from step3rt.aio import AsyncClient
from step3rt.cli import main
from step3rt.client import Client
from step3rt.errors import Cancelled, ConfigError, Internal, InvalidArgument, Step3Error
from step3rt.sampling import SamplingParams
from step3rt.v1 import common_pb2, inference_service_pb2
from step3rt.v1.inference_service_pb2_grpc import (
    InferenceServiceServicer,
    add_InferenceServiceServicer_to_server,
)

Responses = Iterator[inference_service_pb2.GenerateResponse]
Serve = Callable[[Callable[[grpc.ServicerContext], Responses]], str]


class _Server(InferenceServiceServicer):
    def __init__(self, generate: Callable[[grpc.ServicerContext], Responses]) -> None:
        self._generate = generate

    def Generate(  # noqa: N802  (the protocol's name)
        self, _request: inference_service_pb2.GenerateRequest, context: grpc.ServicerContext
    ) -> Responses:
        return self._generate(context)


@pytest.fixture
def serve() -> Iterator[Serve]:
    servers = []

    def start(generate: Callable[[grpc.ServicerContext], Responses]) -> str:
        server = grpc.server(ThreadPoolExecutor(4))
        add_InferenceServiceServicer_to_server(_Server(generate), server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        servers.append(server)
        return f"127.0.0.1:{port}"

    yield start
    for server in servers:
        server.stop(None).wait()


def _half_a_stream(_context: grpc.ServicerContext) -> Responses:
    started = inference_service_pb2.Started(request_id="a", prompt_tokens=1)
    yield inference_service_pb2.GenerateResponse(started=started)
    delta = inference_service_pb2.Delta(token_ids=[5])
    yield inference_service_pb2.GenerateResponse(delta=delta)


def _one_token() -> Responses:
    started = inference_service_pb2.Started(request_id="a", prompt_tokens=1)
    yield inference_service_pb2.GenerateResponse(started=started)
    finished = inference_service_pb2.Finished(reason=common_pb2.FINISH_REASON_LENGTH)
    yield inference_service_pb2.GenerateResponse(finished=finished)


def test_a_stream_that_ends_without_a_finish_reason_is_an_error(serve: Serve) -> None:
    address = serve(_half_a_stream)
    with Client(address) as client, client.generate([1], max_tokens=2) as stream:
        assert next(stream).token_ids == (5,)
        with pytest.raises(Internal, match="without a finish reason"):
            next(stream)

    async def read() -> None:
        async with AsyncClient(address) as client:
            await client.generate([1], max_tokens=2).result()

    with pytest.raises(Internal, match="without a finish reason"):
        asyncio.run(read())


def test_a_stream_that_is_closed_while_it_waits_to_retry_stays_closed(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_waiting = threading.Event()

    def wait_half_a_second(attempt: int, error: Step3Error) -> float | None:
        if attempt > 0 or isinstance(error, Cancelled):
            return None
        is_waiting.set()
        return 0.5

    monkeypatch.setattr("step3rt.client.backoff_s", wait_half_a_second)
    has_refused, is_closed = threading.Event(), threading.Event()

    def generate(context: grpc.ServicerContext) -> Responses:
        if not has_refused.is_set():
            has_refused.set()
            context.abort(grpc.StatusCode.UNAVAILABLE, "not yet")
        is_closed.wait(30)
        finished = inference_service_pb2.Finished(reason=common_pb2.FINISH_REASON_LENGTH)
        yield inference_service_pb2.GenerateResponse(finished=finished)

    with Client(serve(generate)) as client:
        stream = client.generate([1], max_tokens=2)
        with ThreadPoolExecutor(1) as pool:
            result = pool.submit(stream.result)
            assert is_waiting.wait(30)
            stream.close()
            try:
                with pytest.raises(Cancelled):
                    result.result(30)
            finally:
                is_closed.set()


def test_a_client_that_is_closed_while_a_stream_waits_to_retry_cancels_it(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_waiting = threading.Event()

    def wait(_attempt: int, error: Step3Error) -> float | None:
        is_waiting.set()
        return None if isinstance(error, Cancelled) else 0.5

    for module in ("client", "aio"):
        monkeypatch.setattr(f"step3rt.{module}.backoff_s", wait)

    def refuse(context: grpc.ServicerContext) -> Responses:
        context.abort(grpc.StatusCode.UNAVAILABLE, "not yet")
        yield from ()

    address = serve(refuse)
    client = Client(address)
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(client.generate([1]).result)
        assert is_waiting.wait(30)
        client.close()
        with pytest.raises(Cancelled, match="the client, is closed"):
            result.result(30)

    async def close_meanwhile() -> None:
        is_waiting.clear()
        client = AsyncClient(address)
        result = asyncio.create_task(client.generate([1]).result())
        assert await asyncio.to_thread(is_waiting.wait, 30)
        await client.close()
        await result

    with pytest.raises(Cancelled, match="the client, is closed"):
        asyncio.run(close_meanwhile())


def test_both_clients_take_the_same_calls() -> None:
    def calls(kind: type) -> dict[str, list[str]]:
        return {
            name: list(inspect.signature(call).parameters)
            for name, call in vars(kind).items()
            if inspect.isfunction(call) and not name.startswith("__")
        }

    assert calls(AsyncClient) == calls(Client)


def test_a_closed_client_says_so_whatever_it_is_asked() -> None:
    client = Client("127.0.0.1:1")
    client.close()
    calls: list[Callable[[], object]] = [
        lambda: client.generate("text"),
        lambda: client.chat([]),
        lambda: client.abort("id"),
        lambda: client.tokenize("text"),
        lambda: client.detokenize([1]),
        client.model_info,
    ]
    for call in calls:
        with pytest.raises(Cancelled, match="the client, is closed"):
            call()

    async def ask(call: Callable[[AsyncClient], Awaitable[object]]) -> None:
        client = AsyncClient("127.0.0.1:1")
        await client.close()
        await call(client)

    asynchronous: list[Callable[[AsyncClient], Awaitable[object]]] = [
        lambda client: client.generate("text").result(),
        lambda client: client.abort("id"),
        lambda client: client.tokenize("text"),
        lambda client: client.detokenize([1]),
        lambda client: client.model_info(),
    ]
    for start in asynchronous:
        with pytest.raises(Cancelled, match="the client, is closed"):
            asyncio.run(ask(start))


@pytest.mark.parametrize("timeout_s", [math.inf, 1e12, 3, np.float32(30)])
def test_a_timeout_of_any_size_is_none_that_has_passed(serve: Serve, timeout_s: float) -> None:
    remaining: list[float] = []

    def generate(context: grpc.ServicerContext) -> Responses:
        remaining.append(context.time_remaining())
        yield from _one_token()

    address = serve(generate)
    with Client(address) as client:
        assert client.generate([1], timeout_s=timeout_s).result().finished

    async def ask() -> None:
        async with AsyncClient(address) as client:
            assert (await client.generate([1], timeout_s=timeout_s).result()).finished

    asyncio.run(ask())
    # Where there is no deadline, this server says that centuries remain.
    assert [seconds > 1e9 for seconds in remaining] == [timeout_s > 1e9] * 2


@pytest.mark.parametrize("timeout_s", ["3", math.nan])
def test_a_timeout_that_is_no_number_is_refused(timeout_s: Any) -> None:
    with Client("127.0.0.1:1") as client:
        for call in (partial(client.generate, [1]), client.model_info):
            with pytest.raises(InvalidArgument, match="timeout_s is"):
                call(timeout_s=timeout_s)


@pytest.mark.parametrize("address", ["", "127.0.0.1", "http://127.0.0.1:50051", 50051, None])
def test_an_address_without_host_or_port_is_refused(address: Any) -> None:
    with pytest.raises(ConfigError, match="Write host:port"):
        Client(address)

    async def connect() -> None:
        AsyncClient(address)

    with pytest.raises(ConfigError, match="Write host:port"):
        asyncio.run(connect())


def test_a_request_that_no_server_takes_is_refused_at_once() -> None:
    with Client("127.0.0.1:1") as client:
        for call in (client.generate, client.tokenize):
            with pytest.raises(InvalidArgument, match="Shorten") as caught:
                call("x" * (33 << 20))
            assert caught.value.reason == "PROMPT_TOO_LONG"
            assert not caught.value.is_retryable


def test_a_server_that_knows_no_such_call_is_the_wrong_one() -> None:
    server = grpc.server(ThreadPoolExecutor(1))
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        with Client(address) as client:
            with pytest.raises(ConfigError, match="--listen"):
                client.generate([1]).result()
            with pytest.raises(ConfigError, match="--listen"):
                client.model_info()
    finally:
        server.stop(None).wait()


@pytest.mark.parametrize("params", [{"max_tokens": 3}, 3, [SamplingParams()]])
def test_params_of_another_type_are_refused(params: Any) -> None:
    with Client("127.0.0.1:1") as client:
        for call in (partial(client.generate, [1]), partial(client.chat, [])):
            with pytest.raises(InvalidArgument, match="Give one, or its fields as keywords"):
                call(params)


@pytest.mark.parametrize("prompt", [b"text", bytearray(b"text"), {"prompt": "text"}])
def test_bytes_and_mappings_are_no_prompts(prompt: Any) -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(InvalidArgument, match="Decode bytes"):
        client.generate(prompt)


def test_integers_of_numpy_are_counts_and_token_ids(serve: Serve) -> None:
    with Client(serve(lambda _context: _one_token())) as client:
        counts = {"n": np.int64(1), "max_tokens": np.int32(4)}
        assert client.generate(np.array([1, 2]), **counts).result().finished


def test_ctrl_c_and_a_refused_prompt_end_the_streams_of_all_prompts(serve: Serve) -> None:
    """However long those would go on."""
    num_begun, is_over, refuses = threading.Semaphore(0), threading.Event(), threading.Event()

    def generate(context: grpc.ServicerContext) -> Responses:
        num_begun.release()
        if refuses.is_set():
            refuses.clear()
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "not this one")
        is_over.wait(100)
        yield from _one_token()

    address = serve(generate)
    command = [
        *(sys.executable, "-m", "step3rt", "generate", f"--address={address}"),
        *("--prompt-token-ids=1", "--prompt-token-ids=2"),
    ]
    try:
        interrupted = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        for _ in range(2):
            assert num_begun.acquire(timeout=100)
        interrupted.send_signal(signal.SIGINT)
        _, errors = interrupted.communicate(timeout=50)
        assert (interrupted.returncode, errors) == (130, "")
        refuses.set()
        refused = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
        assert (refused.returncode, refused.stderr) == (2, "error: not this one\n")
    finally:
        is_over.set()


class _Recorder(InferenceServiceServicer):
    def __init__(self) -> None:
        self.tenants: list[str | None] = []

    def Generate(  # noqa: N802  (the protocol's name)
        self, request: inference_service_pb2.GenerateRequest, _context: grpc.ServicerContext
    ) -> Responses:
        self.tenants.append(request.tenant if request.HasField("tenant") else None)
        yield inference_service_pb2.GenerateResponse(
            started=inference_service_pb2.Started(request_id="a", prompt_tokens=1)
        )
        finished = inference_service_pb2.Finished(reason=common_pb2.FINISH_REASON_LENGTH)
        yield inference_service_pb2.GenerateResponse(finished=finished)


def test_requests_name_the_clients_tenant_or_their_own() -> None:
    recorder, server = _Recorder(), grpc.server(ThreadPoolExecutor(2))
    add_InferenceServiceServicer_to_server(recorder, server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()

    async def ask() -> None:
        async with AsyncClient(address, tenant="team-b") as client:
            await client.generate([1]).result()
            await client.generate([1], tenant="team-c").result()
            await client.chat([]).result()

    try:
        with Client(address) as client:
            client.generate([1]).result()
            client.generate([1], tenant="team-a").result()
        with Client(address, tenant="team-a") as client:
            client.chat([]).result()
            client.generate([1], tenant="").result()
        asyncio.run(ask())
        flags = ["--address", address, "--tenant", "team-d", "--prompt-token-ids", "1"]
        assert main(["generate", *flags, "--output", "json"]) == 0
    finally:
        server.stop(None).wait()
    assert recorder.tenants == [
        *(None, "team-a", "team-a", None),
        *("team-b", "team-c", "team-b"),
        "team-d",
    ]
