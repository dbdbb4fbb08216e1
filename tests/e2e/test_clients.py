"""Many clients at once, and clients that vanish: streams are right and blocks come back."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import numpy as np
import pytest

from step3rt import AsyncClient, Client, LocalCluster
from step3rt.errors import Cancelled
from tests.e2e.clusters import (
    assert_all_blocks_return,
    num_used_blocks,
    running_cluster,
    wait_until,
)
from tests.fixtures.checkpoint import Checkpoint

NUM_STREAMS = 200
# A prompt of 300 tokens holds 5 blocks. Its stream would go on for 700 steps.
PROMPT = [9] * 300
MAX_TOKENS = 700
# The steps in flight when the coordinator learns of it, two at most, are the last. Until then 1 to
# 3 tokens of the witness were seen to arrive (15 trials), news and looking included; 700 were left.
MAX_STEPS_TO_NOTICE = 8


@pytest.fixture(scope="module")
def cluster(tiny_checkpoint: Checkpoint) -> Iterator[LocalCluster]:
    """2A2F with fewer KV blocks than 200 streams want at once, so that some wait."""
    with running_cluster(
        tiny_checkpoint.directory, attention=2, ffn=2, lanes=3, kv_blocks=80
    ) as running:
        yield running


def test_two_hundred_concurrent_streams_are_complete_and_correct(cluster: LocalCluster) -> None:
    generator = np.random.default_rng(0)
    # Ten prompts, twenty streams each: every stream has mates of other lengths, and its twin that
    # runs alone afterwards says what is right.
    prompts = [
        [int(token) for token in generator.integers(5, 256, length)]
        for length in (1, 2, 7, 31, 63, 64, 65, 100, 128, 150)
    ]

    async def run_all() -> list[list[int]]:
        async with AsyncClient(cluster.address) as client:

            async def run(number: int) -> list[int]:
                tokens: list[int] = []
                stream = client.generate(
                    prompts[number % 10], temperature=0, max_tokens=16, ignore_eos=True
                )
                async for event in stream:
                    assert event.position == len(tokens)
                    tokens += event.token_ids
                assert event.finish_reason == "length"
                return tokens

            return await asyncio.gather(*(run(number) for number in range(NUM_STREAMS)))

    results = asyncio.run(run_all())
    with Client(cluster.address) as client:
        alone = [
            client.generate(prompt, temperature=0, max_tokens=16, ignore_eos=True)
            .result()
            .outputs[0]
            .token_ids
            for prompt in prompts
        ]
    for number, tokens in enumerate(results):
        assert tokens == alone[number % 10]
    assert_all_blocks_return(cluster)


class Witness:
    """A stream that goes on, whose tokens count the steps that pass."""

    def __init__(self, address: str) -> None:
        self.num_tokens = 0
        self._client = Client(address)
        self._stream = self._client.generate([7], temperature=0, max_tokens=1000, ignore_eos=True)
        self._thread = threading.Thread(target=self._read)

    def __enter__(self) -> "Witness":
        self._thread.start()
        wait_until(lambda: self.num_tokens > 0, "the witness's first token")
        return self

    def __exit__(self, *_exception: object) -> None:
        self._stream.close()
        self._thread.join()
        self._client.close()

    def _read(self) -> None:
        with suppress(Cancelled):
            for event in self._stream:
                self.num_tokens += len(event.token_ids)


def leave_the_block(cluster: LocalCluster) -> Callable[[], None]:
    client = Client(cluster.address)
    stream = client.generate(PROMPT, temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True)

    def leave() -> None:
        with stream:
            next(stream)
        client.close()

    return leave


def drop_the_stream(cluster: LocalCluster) -> Callable[[], None]:
    client = Client(cluster.address)
    streams = [client.generate(PROMPT, temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True)]
    next(streams[0])
    return streams.clear


def abort_by_id(cluster: LocalCluster) -> Callable[[], None]:
    client = Client(cluster.address)
    stream = client.generate(
        PROMPT, temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True, request_id="to-abort"
    )
    next(stream)

    def abort() -> None:
        assert client.abort("to-abort", "unknown") == ["to-abort"]
        assert stream.result().outputs[0].finish_reason == "cancelled"

    return abort


def cancel_the_task(cluster: LocalCluster) -> Callable[[], None]:
    async def read(is_reading: asyncio.Event) -> None:
        async with AsyncClient(cluster.address) as client:
            stream = client.generate(PROMPT, temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True)
            async for _event in stream:
                is_reading.set()

    async def cancel() -> None:
        is_reading = asyncio.Event()
        task = asyncio.create_task(read(is_reading))
        await is_reading.wait()
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    return lambda: asyncio.run(cancel())


def kill_the_process(cluster: LocalCluster) -> Callable[[], None]:
    program = (
        "import sys\n"
        "from step3rt import Client\n"
        f"stream = Client({cluster.address!r}).generate(\n"
        f"    [9] * 300, temperature=0, max_tokens={MAX_TOKENS}, ignore_eos=True)\n"
        "for event in stream: print(event.position, flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"0\n"

    def kill() -> None:
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()

    return kill


@pytest.mark.parametrize(
    "vanish", [leave_the_block, drop_the_stream, abort_by_id, cancel_the_task, kill_the_process]
)
def test_a_client_that_vanishes_frees_its_blocks_at_once(
    cluster: LocalCluster, vanish: Callable[[LocalCluster], Callable[[], None]]
) -> None:
    assert_all_blocks_return(cluster)
    with Witness(cluster.address) as witness:
        go = vanish(cluster)
        go()
        before = witness.num_tokens
        # The witness grows by a block each 64 tokens; the other had 5.
        give_up_s = time.monotonic() + 30
        while num_used_blocks(cluster) >= 5:  # without a pause, which would count as steps
            assert time.monotonic() < give_up_s, "the blocks did not return"
        assert witness.num_tokens - before < MAX_STEPS_TO_NOTICE
        time.sleep(0.05)
        assert num_used_blocks(cluster) < 5
    assert_all_blocks_return(cluster)
