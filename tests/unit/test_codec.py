"""What callers say reaches the wire as they said it, and server errors come back typed."""

from typing import Any

import grpc
import pytest
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

from step3rt import codec
from step3rt.errors import DeadlineExceeded, InvalidArgument, ResourceExhausted, Unavailable
from step3rt.sampling import SamplingParams
from step3rt.v1 import inference_service_pb2


def request(prompt: codec.Prompt, params: SamplingParams) -> inference_service_pb2.GenerateRequest:
    return codec.to_request(prompt, params, request_id="r", model="", priority=0)


def test_a_tenant_is_sent_by_name_and_the_default_one_is_not() -> None:
    named = codec.to_request(
        "x", SamplingParams(), request_id="r", model="", priority=0, tenant="team-a"
    )
    assert named.tenant == "team-a"
    assert not request("x", SamplingParams()).HasField("tenant")


def test_zero_is_sent_and_absent_is_not() -> None:
    message = request("x", SamplingParams(temperature=0.0, top_k=None, max_tokens=0))
    assert message.sampling.HasField("temperature")
    assert not message.sampling.HasField("top_k")
    assert message.stopping.HasField("max_tokens")
    assert not request("x", SamplingParams(max_tokens=None)).stopping.HasField("max_tokens")


def test_penalties_and_bias_are_sent_where_given() -> None:
    silent = request("x", SamplingParams()).sampling
    assert not silent.HasField("repetition_penalty")
    assert not silent.logit_bias
    message = request(
        "x",
        SamplingParams(
            presence_penalty=0.0, frequency_penalty=-1.5, repetition_penalty=1.25,
            logit_bias={7: -100, 0: 0.5},
        ),
    ).sampling  # fmt: skip
    assert message.HasField("presence_penalty")
    assert (message.frequency_penalty, message.repetition_penalty) == (-1.5, 1.25)
    assert dict(message.logit_bias) == {7: -100.0, 0: 0.5}


@pytest.mark.parametrize("bias", [{-1: 1.0}, {2**32: 1.0}, {"a": 1.0}, {1: "much"}, [1, 2]])
def test_a_bias_that_no_field_holds_is_refused_before_the_wire(bias: Any) -> None:
    with pytest.raises(InvalidArgument, match="logit_bias maps token ids to numbers"):
        request("x", SamplingParams(logit_bias=bias))


def test_one_stop_string_is_not_taken_for_its_letters() -> None:
    assert list(request("x", SamplingParams(stop="END")).stopping.stop) == ["END"]
    assert list(request("x", SamplingParams(stop=["a", "b"])).stopping.stop) == ["a", "b"]


def test_empty_token_prompt_is_still_a_token_prompt() -> None:
    assert request([], SamplingParams()).WhichOneof("prompt") == "token_ids"


@pytest.mark.parametrize(
    "params",
    [SamplingParams(max_tokens=-1), SamplingParams(top_k=2**40), SamplingParams(logprobs=-3)],
)
def test_numbers_that_no_field_holds_are_refused_before_the_wire(params: SamplingParams) -> None:
    with pytest.raises(InvalidArgument, match="is a count"):
        request("x", params)


def test_negative_token_id_is_refused_before_the_wire() -> None:
    with pytest.raises(InvalidArgument, match="cannot be encoded"):
        request([1, -2], SamplingParams())


class FailedCall(grpc.RpcError, grpc.Call):
    """A finished call with a status, as grpcio raises it."""

    def __init__(self, code: grpc.StatusCode, *details: object) -> None:
        self._code = code
        status = status_pb2.Status(code=code.value[0], message="what, why, fix")
        for detail in details:
            packed = any_pb2.Any()
            packed.Pack(detail)
            status.details.append(packed)
        self._metadata = (("grpc-status-details-bin", status.SerializeToString()),)

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return "what, why, fix"

    def trailing_metadata(self) -> tuple[tuple[str, bytes], ...]:
        return self._metadata

    def initial_metadata(self) -> tuple[()]:
        return ()

    def is_active(self) -> bool:
        return False

    def time_remaining(self) -> None:
        return None

    def cancel(self) -> bool:
        return False

    def add_callback(self, callback: object) -> bool:
        return False


def test_error_carries_reason_retry_hint_and_field() -> None:
    error = codec.to_error(
        FailedCall(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            error_details_pb2.ErrorInfo(reason="QUEUE_FULL", domain="step3rt.dev"),
            error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(nanos=250_000_000)),
        ),
        "req-1",
    )
    assert isinstance(error, ResourceExhausted)
    assert (error.reason, error.is_retryable, error.retry_after_s) == ("QUEUE_FULL", True, 0.25)
    assert (str(error), error.request_id) == ("what, why, fix", "req-1")


def test_invalid_argument_names_the_field() -> None:
    violation = error_details_pb2.BadRequest.FieldViolation(field="sampling.temperature")
    error = codec.to_error(
        FailedCall(
            grpc.StatusCode.INVALID_ARGUMENT,
            error_details_pb2.BadRequest(field_violations=[violation]),
        )
    )
    assert isinstance(error, InvalidArgument)
    assert error.details == {"field": "sampling.temperature"}
    assert not error.is_retryable


def test_failure_without_a_server_is_retryable_and_says_what_to_do() -> None:
    error = codec.to_error(FailedCall(grpc.StatusCode.UNAVAILABLE))
    assert isinstance(error, Unavailable)
    assert error.is_retryable
    assert "step3rt serve" in str(error)


def test_a_deadline_that_the_client_noticed_says_what_to_do() -> None:
    error = codec.to_error(FailedCall(grpc.StatusCode.DEADLINE_EXCEEDED))
    assert isinstance(error, DeadlineExceeded)
    assert not error.is_retryable
    assert "Allow more time" in str(error)


def test_a_batch_given_as_one_prompt_is_told_what_a_prompt_is() -> None:
    with pytest.raises(InvalidArgument, match="one text or one list of token ids"):
        request(["one", "two"], SamplingParams())
