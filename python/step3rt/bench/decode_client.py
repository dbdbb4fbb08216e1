"""The client of a decode measurement: all streams of one process, with the times of their tokens.

Owns the requests and what a client sees. It reads responses as they are: a result for each of ten
thousand streams would measure itself.
"""

import asyncio
import random
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

import grpc
import grpc.aio

from step3rt import codec
from step3rt.bench.progress import ProgressLine
from step3rt.channel import CHANNEL_OPTIONS
from step3rt.sampling import SamplingParams
from step3rt.v1.inference_service_pb2_grpc import InferenceServiceStub


@dataclass(slots=True)
class TokenTimes:
    """One stream.

    Attributes:
        at_ns: when each token was there, by this host's monotonic clock; tokens of one message
            have the same time.
        decode_ns: from its first token to its last, by the coordinator.
    """

    at_ns: "array[int]" = field(default_factory=lambda: array("q"))
    decode_ns: int = 0


async def decode_all(
    address: str,
    prompt_lengths: Sequence[int],
    num_tokens: int,
    vocab_size: int,
    seed: int,
    progress: ProgressLine,
) -> list[TokenTimes]:
    """Decodes `num_tokens` tokens of each prompt at a time; prompts are random.

    Raises:
        Step3Error: what the server says of a request that it does not serve.
    """
    draw = random.Random(seed)
    params = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
    streams = [TokenTimes() for _ in prompt_lengths]
    async with grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
        stub = InferenceServiceStub(channel)

        async def read(times: TokenTimes, prompt_length: int) -> None:
            prompt = draw.choices(range(vocab_size), k=prompt_length)
            request_id = codec.new_request_id()
            request = codec.to_request(prompt, params, request_id=request_id, model="", priority=0)
            try:
                async for response in stub.Generate(request):
                    now_ns = time.perf_counter_ns()
                    count = len(response.delta.token_ids)
                    times.at_ns.extend((now_ns,) * count)
                    if times is streams[-1]:
                        progress.add(count)
                    if response.HasField("finished"):
                        times.decode_ns = response.finished.timing.decode.ToNanoseconds()
            except grpc.RpcError as error:
                raise codec.to_error(error, request_id) from error

        try:
            async with asyncio.TaskGroup() as group:
                for times, prompt_length in zip(streams, prompt_lengths, strict=True):
                    group.create_task(read(times, prompt_length))
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from None  # one for all: the others were cancelled or alike
    return streams
