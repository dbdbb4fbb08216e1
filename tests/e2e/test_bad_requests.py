"""A request that cannot be served gets one clear error, and harms nobody else."""

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from step3rt import AsyncClient, Client, LocalCluster
from step3rt.errors import (
    AlreadyExists,
    Cancelled,
    DeadlineExceeded,
    InvalidArgument,
    NotFound,
    Step3Error,
)
from step3rt.v1 import common_pb2, inference_service_pb2
from step3rt.v1.inference_service_pb2_grpc import InferenceServiceStub
from tests.e2e.clusters import assert_all_blocks_return

PROMPT = [10, 20, 30, 40]
GREEDY = {"temperature": 0.0, "max_tokens": 4, "ignore_eos": True}


@dataclass(frozen=True, slots=True)
class Refusal:
    """What a bad request gets: exception, reason, the field at fault, and words of the message."""

    error: type[Step3Error]
    reason: str
    field: str | None
    words: tuple[str, ...]


Send = Callable[[Client], object]


def invalid(field: str, *words: str) -> Refusal:
    """The usual refusal."""
    return Refusal(InvalidArgument, "INVALID_PARAMETER", field, words)


# What the SDK can be made to send, and what comes back.
BAD_REQUESTS: dict[str, tuple[Send, Refusal]] = {
    "empty prompt": (lambda client: client.generate([]).result(), invalid("prompt")),
    "empty text": (lambda client: client.generate("").result(), invalid("prompt")),
    "token id that the vocabulary lacks": (
        lambda client: client.generate([1, 320]).result(),
        invalid("token_ids", "320"),
    ),
    "prompt as long as the context": (
        lambda client: client.generate([9] * 1024).result(),
        Refusal(InvalidArgument, "PROMPT_TOO_LONG", "token_ids", ("1024",)),
    ),
    "text longer than the context": (
        lambda client: client.generate("a " * 600).result(),
        Refusal(InvalidArgument, "PROMPT_TOO_LONG", "prompt", ("1024",)),
    ),
    "more tokens than the context has room for": (
        lambda client: client.generate(PROMPT, max_tokens=1021).result(),
        invalid("stopping.max_tokens", "1021"),
    ),
    "temperature that is not a number": (
        lambda client: client.generate(PROMPT, temperature=float("nan")).result(),
        invalid("sampling.temperature", "NaN"),
    ),
    "negative temperature": (
        lambda client: client.generate(PROMPT, temperature=-0.5).result(),
        invalid("sampling.temperature", "-0.5"),
    ),
    "top_p above one": (
        lambda client: client.generate(PROMPT, top_p=1.5).result(),
        invalid("sampling.top_p", "1.5"),
    ),
    "presence penalty above two": (
        lambda client: client.generate(PROMPT, presence_penalty=2.5).result(),
        invalid("sampling.presence_penalty", "2.5", "-2 and 2"),
    ),
    "frequency penalty that is not a number": (
        lambda client: client.generate(PROMPT, frequency_penalty=float("nan")).result(),
        invalid("sampling.frequency_penalty", "NaN"),
    ),
    "repetition penalty of zero": (
        lambda client: client.generate(PROMPT, repetition_penalty=0).result(),
        invalid("sampling.repetition_penalty", "0", "100"),
    ),
    "infinite repetition penalty": (
        lambda client: client.generate(PROMPT, repetition_penalty=float("inf")).result(),
        invalid("sampling.repetition_penalty", "inf"),
    ),
    "logit bias above a hundred": (
        lambda client: client.generate(PROMPT, logit_bias={3: 100.5}).result(),
        invalid("sampling.logit_bias", "100.5", "id 3"),
    ),
    "logit bias of a token that the vocabulary lacks": (
        lambda client: client.generate(PROMPT, logit_bias={320: 1.0}).result(),
        invalid("sampling.logit_bias", "320"),
    ),
    "a flood of logit biases": (
        lambda client: client.generate(PROMPT, logit_bias=dict.fromkeys(range(2000), 1)).result(),
        invalid("sampling.logit_bias", "2000", "1024"),
    ),
    "a million continuations": (
        lambda client: client.generate(PROMPT, n=1_000_000).result(),
        invalid("sampling.n", "1000000", "128"),
    ),
    "stop string of a megabyte": (
        lambda client: client.generate(PROMPT, stop="x" * (1 << 20)).result(),
        invalid("stopping.stop", "1048576"),
    ),
    "a thousand stop strings": (
        lambda client: client.generate(PROMPT, stop=["x"] * 1000).result(),
        invalid("stopping.stop", "1000", "16"),
    ),
    "fewer tokens at most than at least": (
        lambda client: client.generate(PROMPT, max_tokens=2, min_tokens=3).result(),
        invalid("stopping.min_tokens", "3", "2"),
    ),
    "logprobs of a thousand rivals": (
        lambda client: client.generate(PROMPT, logprobs=1000).result(),
        invalid("output.top_logprobs", "1000", "20"),
    ),
    "request id with a space": (
        lambda client: client.generate(PROMPT, request_id="a b").result(),
        invalid("request_id"),
    ),
    "request id of 129 characters": (
        lambda client: client.generate(PROMPT, request_id="a" * 129).result(),
        invalid("request_id", "129", "128"),
    ),
    "chat that is not a list of messages": (
        lambda client: client.chat([{"role": "user"}]).result(),
        invalid("chat"),
    ),
}

# What only another client can send.
BAD_MESSAGES: dict[str, tuple[inference_service_pb2.GenerateRequest, grpc.StatusCode, str]] = {
    "no prompt": (
        inference_service_pb2.GenerateRequest(),
        grpc.StatusCode.INVALID_ARGUMENT,
        "INVALID_PARAMETER",
    ),
    "negative max_tokens": (
        inference_service_pb2.GenerateRequest(
            token_ids=common_pb2.TokenIds(ids=PROMPT),
            # -1 as another language's client may send it
            stopping=common_pb2.StoppingCriteria(max_tokens=2**32 - 1),
        ),
        grpc.StatusCode.INVALID_ARGUMENT,
        "INVALID_PARAMETER",
    ),
    "images": (
        inference_service_pb2.GenerateRequest(
            token_ids=common_pb2.TokenIds(ids=PROMPT),
            media=[inference_service_pb2.Media(inline=b"png", mime_type="image/png")],
        ),
        grpc.StatusCode.INVALID_ARGUMENT,
        "UNSUPPORTED_FEATURE",
    ),
    "a JSON schema": (
        inference_service_pb2.GenerateRequest(
            token_ids=common_pb2.TokenIds(ids=PROMPT),
            sampling=common_pb2.SamplingParams(json_schema="{}"),
        ),
        grpc.StatusCode.INVALID_ARGUMENT,
        "UNSUPPORTED_FEATURE",
    ),
    "infinite temperature": (
        inference_service_pb2.GenerateRequest(
            token_ids=common_pb2.TokenIds(ids=PROMPT),
            sampling=common_pb2.SamplingParams(temperature=float("inf")),
        ),
        grpc.StatusCode.INVALID_ARGUMENT,
        "INVALID_PARAMETER",
    ),
}


@pytest.fixture(scope="module")
def undisturbed(chat_cluster: LocalCluster) -> list[int]:
    """What the prompt gives when nothing is wrong."""
    with Client(chat_cluster.address) as client:
        return client.generate(PROMPT, **GREEDY).result().outputs[0].token_ids


def assert_says_what_why_and_fix(message: str) -> None:
    """At least three clauses, the last of which tells what to do."""
    clauses = [part for part in message.replace(": ", ". ").replace("; ", ". ").split(". ") if part]
    assert len(clauses) >= 2, message
    verbs = ("Send", "Use", "Lower", "Shorten", "Leave", "Name", "Give", "Raise", "Write", "Set",
             "Correct", "Remove", "Choose", "Ask", "Take", "Make", "Tokenise")  # fmt: skip
    assert clauses[-1].startswith(verbs), message


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_a_bad_request_gets_one_clear_error_and_the_next_one_is_served(
    client: Client, undisturbed: list[int], name: str
) -> None:
    send, refusal = BAD_REQUESTS[name]
    with pytest.raises(Step3Error) as caught:
        send(client)
    error = caught.value
    assert type(error) is refusal.error
    assert error.reason == refusal.reason
    assert not error.is_retryable
    assert error.details.get("field") == refusal.field
    for word in refusal.words:
        assert word in str(error)
    assert_says_what_why_and_fix(str(error))
    assert client.generate(PROMPT, **GREEDY).result().outputs[0].token_ids == undisturbed


@pytest.mark.parametrize("name", BAD_MESSAGES)
def test_a_bad_message_of_another_client_is_refused_and_the_next_one_is_served(
    chat_cluster: LocalCluster, client: Client, undisturbed: list[int], name: str
) -> None:
    message, code, reason = BAD_MESSAGES[name]
    with grpc.insecure_channel(chat_cluster.address) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            list(InferenceServiceStub(channel).Generate(message))
        assert caught.value.code() is code
        status = rpc_status.from_call(caught.value)
        info = error_details_pb2.ErrorInfo()
        assert any(detail.Unpack(info) for detail in status.details)
        assert (info.reason, info.domain) == (reason, "step3rt.dev")
        assert_says_what_why_and_fix(caught.value.details())
    assert client.generate(PROMPT, **GREEDY).result().outputs[0].token_ids == undisturbed


@pytest.mark.parametrize("max_tokens", [-1, 2**32, "ten"])
def test_a_count_that_the_protocol_cannot_carry_is_refused_before_it_is_sent(
    client: Client, max_tokens: int
) -> None:
    with pytest.raises(InvalidArgument, match=f"max_tokens is {max_tokens!r}") as caught:
        client.generate(PROMPT, max_tokens=max_tokens)
    assert caught.value.details == {"field": "max_tokens"}
    assert not caught.value.is_retryable


def test_another_model_is_not_found(chat_cluster: LocalCluster, undisturbed: list[int]) -> None:
    with (
        Client(chat_cluster.address, model="gpt") as client,
        pytest.raises(NotFound, match=r"gpt.*chat") as caught,
    ):
        client.generate(PROMPT).result()
    assert caught.value.reason == "MODEL_NOT_FOUND"
    with Client(chat_cluster.address, model="chat") as client:
        assert client.generate(PROMPT, **GREEDY).result().outputs[0].token_ids == undisturbed


def test_a_request_id_is_taken_while_its_request_lives(
    client: Client, undisturbed: list[int]
) -> None:
    with client.generate(PROMPT, request_id="mine", max_tokens=900, ignore_eos=True) as first:
        next(first)
        with pytest.raises(AlreadyExists, match="mine") as caught:
            client.generate(PROMPT, request_id="mine").result()
        assert caught.value.reason == "DUPLICATE_REQUEST_ID"
        assert next(first).token_ids
        assert client.abort("mine") == ["mine"]
        assert first.result().outputs[0].finish_reason == "cancelled"
    again = client.generate(PROMPT, request_id="mine", **GREEDY).result()
    assert again.outputs[0].token_ids == undisturbed


def test_a_deadline_ends_a_stream_and_frees_its_blocks(
    chat_cluster: LocalCluster, client: Client, undisturbed: list[int]
) -> None:
    with pytest.raises(DeadlineExceeded) as caught:
        client.generate(PROMPT, max_tokens=1000, ignore_eos=True, timeout_s=0.4).result()
    assert caught.value.reason == "DEADLINE_EXCEEDED"
    assert_all_blocks_return(chat_cluster)
    assert client.generate(PROMPT, **GREEDY).result().outputs[0].token_ids == undisturbed


def test_closing_a_client_ends_its_streams_as_cancelled(
    chat_cluster: LocalCluster, client: Client
) -> None:
    leaving = Client(chat_cluster.address)
    stream = leaving.generate(PROMPT, max_tokens=1000, ignore_eos=True)
    next(stream)
    closer = threading.Timer(0.2, leaving.close)
    closer.start()
    with pytest.raises(Cancelled):
        stream.result()
    closer.join()
    assert_all_blocks_return(chat_cluster)


def test_reading_on_after_close_is_cancelled_in_asyncio_too_and_no_cancelled_task(
    chat_cluster: LocalCluster,
) -> None:
    async def read_after_close() -> None:
        async with AsyncClient(chat_cluster.address) as client:
            stream = client.generate(PROMPT, max_tokens=1000, ignore_eos=True)
            await anext(stream)
            stream.close()
            await stream.result()

    with pytest.raises(Cancelled, match="on this side"):
        asyncio.run(read_after_close())
    assert_all_blocks_return(chat_cluster)


def test_a_cancelled_task_is_cancelled_and_no_error_of_ours(chat_cluster: LocalCluster) -> None:
    async def cancel() -> None:
        async with AsyncClient(chat_cluster.address) as client:
            stream = client.generate(PROMPT, max_tokens=1000, ignore_eos=True)
            await anext(stream)
            task = asyncio.create_task(stream.result())
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(cancel())
    assert_all_blocks_return(chat_cluster)
