"""The clients against a real gRPC server that misbehaves, over a socket."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from step3rt.aio import AsyncClient
from step3rt.cli import main
from step3rt.client import Client
from step3rt.errors import Cancelled, Internal, Step3Error
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
        server = grpc.server(ThreadPoolExecutor(2))
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
