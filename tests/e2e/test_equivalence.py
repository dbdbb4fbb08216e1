"""The cluster computes what the model computes, whatever its shape and whatever else it does."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from step3rt import Client, LocalCluster
from tests.e2e.clusters import assert_all_blocks_return, running_cluster
from tests.e2e.reference import TOLERANCE, assert_greedy, expected

if TYPE_CHECKING:
    from step3rt.model.monolithic import MonolithicModel
    from tests.fixtures.checkpoint import Checkpoint
    from tests.oracle.step3_numpy import Step3Oracle


@dataclass(frozen=True, slots=True)
class Shape:
    """What must not matter. A prompt of 300 tokens is computed in chunks below 300 per step."""

    attention: int
    ffn: int
    lanes: int
    fabric: str
    max_tokens_per_micro_batch: int
    max_steps_in_flight: int = 2

    def __str__(self) -> str:
        """A test's name."""
        return (
            f"{self.attention}A{self.ffn}F-{self.lanes}lanes-{self.fabric}-"
            f"{self.max_tokens_per_micro_batch}-{self.max_steps_in_flight}steps"
        )


# Every topology, every number of lanes, both fabrics, whole and chunked prefill, one and more steps
# in flight, each of them with different others; the remaining combinations are slow.
SHAPES = (
    Shape(1, 1, 1, "tcp", 512, 2),
    Shape(2, 2, 3, "shm", 48, 2),
    Shape(1, 3, 2, "shm", 512, 1),
    Shape(3, 1, 3, "tcp", 64, 4),
)
SLOW_SHAPES = tuple(
    shape
    for attention, ffn in ((1, 1), (2, 2), (1, 3), (3, 1))
    for lanes in (1, 2, 3)
    for fabric in ("shm", "tcp")
    for micro_batch in (48, 512)
    for steps in ((1, 2) if fabric == "shm" and micro_batch == 48 else (2,))
    if (shape := Shape(attention, ffn, lanes, fabric, micro_batch, steps)) not in SHAPES
)


@dataclass(frozen=True, slots=True)
class Ask:
    """One request. The prompt's tokens come from `seed`, so that hypothesis shrinks lengths."""

    num_prompt_tokens: int
    seed: int
    max_tokens: int
    wants_prompt_logprobs: bool

    def prompt(self, vocab_size: int) -> list[int]:
        """Token ids, any but those below 5, which are special."""
        generator = np.random.default_rng(self.seed)
        return [int(token) for token in generator.integers(5, vocab_size, self.num_prompt_tokens)]


def asks(max_prompt_tokens: int) -> st.SearchStrategy[Ask]:
    """Requests with prompts of up to `max_prompt_tokens`."""
    return st.builds(
        Ask,
        num_prompt_tokens=st.integers(1, max_prompt_tokens),
        seed=st.integers(0, 2**32 - 1),
        max_tokens=st.integers(1, 12),
        wants_prompt_logprobs=st.booleans(),
    )


@pytest.fixture(
    scope="module",
    params=[*SHAPES, *(pytest.param(shape, marks=pytest.mark.slow) for shape in SLOW_SHAPES)],
    ids=str,
)
def cluster(
    request: pytest.FixtureRequest, tiny_checkpoint: "Checkpoint"
) -> Iterator[LocalCluster]:
    shape: Shape = request.param
    with running_cluster(
        tiny_checkpoint.directory,
        attention=shape.attention,
        ffn=shape.ffn,
        lanes=shape.lanes,
        fabric=shape.fabric,
        max_tokens_per_micro_batch=shape.max_tokens_per_micro_batch,
        max_steps_in_flight=shape.max_steps_in_flight,
    ) as running:
        links = [link for item in running.instances() for link in item["links"]]
        assert [link["fabric"] for link in links] == [shape.fabric] * shape.attention * shape.ffn
        yield running


# The time is hypothesis's for a failing example: it shrinks for up to five minutes.
@pytest.mark.timeout(900)
# A cluster that answers everything does so whatever it was asked before: it may be shared.
@settings(
    max_examples=25,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(subject=asks(300), mates=st.lists(asks(80), max_size=4))
def test_greedy_tokens_and_logprobs_are_those_of_the_model(
    cluster: LocalCluster, tiny_oracle: "Step3Oracle", subject: Ask, mates: list[Ask]
) -> None:
    batch = [subject, *mates]
    vocab_size = tiny_oracle.config.vocab_size
    prompts = [ask.prompt(vocab_size) for ask in batch]
    with Client(cluster.address) as client, ThreadPoolExecutor(len(batch)) as pool:
        streams = [
            client.generate(
                prompt,
                temperature=0,
                max_tokens=ask.max_tokens,
                ignore_eos=True,
                logprobs=2,
                prompt_logprobs=1 if ask.wants_prompt_logprobs else None,
            )
            for prompt, ask in zip(prompts, batch, strict=True)
        ]
        outputs = list(pool.map(lambda stream: stream.result(), streams))

    for prompt, ask, output in zip(prompts, batch, outputs, strict=True):
        [completion] = output.outputs
        assert len(completion.token_ids) == ask.max_tokens
        assert completion.finish_reason == "length"
        num_prompt_logprobs = len(prompt) - 1 if ask.wants_prompt_logprobs else 0
        assert len(output.prompt_logprobs) == num_prompt_logprobs
        expect = expected(tiny_oracle, prompt, completion.token_ids)
        assume(expect.is_decided)
        assert_greedy(expect, prompt, output, num_top=2)


@pytest.fixture(scope="module")
def monolithic(tiny_checkpoint: "Checkpoint") -> "MonolithicModel":
    """The same operations in one process, one sequence at a time."""
    from step3rt.model.monolithic import MonolithicModel

    torch.set_num_threads(1)
    return MonolithicModel.load(tiny_checkpoint.directory)


@pytest.mark.parametrize("num_prompt_tokens", [1, 64, 300])
def test_a_long_greedy_continuation_is_that_of_one_process(
    cluster: LocalCluster, monolithic: "MonolithicModel", num_prompt_tokens: int
) -> None:
    prompt = Ask(num_prompt_tokens, 1, 64, False).prompt(monolithic.config.vocab_size)
    expected_ids, logits = monolithic.generate_greedy(prompt, 64)
    with Client(cluster.address) as client:
        stream = client.generate(prompt, temperature=0, max_tokens=64, ignore_eos=True, logprobs=0)
        [completion] = stream.result().outputs
    assert completion.token_ids == expected_ids
    logprobs = torch.log_softmax(logits, -1)
    for row, item in zip(logprobs, completion.logprobs, strict=True):
        assert abs(item.logprob - float(row[item.token_id])) < TOLERANCE


def test_no_block_is_left_used(cluster: LocalCluster) -> None:
    assert_all_blocks_return(cluster)
