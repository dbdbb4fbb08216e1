"""A KV pool that is too small for what is asked delays streams, and changes none of them."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from step3rt import Client, LocalCluster
from step3rt.errors import InvalidArgument
from tests.e2e.clusters import assert_all_blocks_return, running_cluster
from tests.fixtures.checkpoint import Checkpoint

NUM_BLOCKS = 6


@pytest.fixture(scope="module")
def cluster(tiny_checkpoint: Checkpoint) -> Iterator[LocalCluster]:
    """1A1F whose pool holds 384 tokens."""
    with running_cluster(tiny_checkpoint.directory, kv_blocks=NUM_BLOCKS) as running:
        yield running


def continuation(
    cluster: LocalCluster, prompt: list[int], max_tokens: int | None, **params: Any
) -> list[int]:
    with Client(cluster.address) as client:
        stream = client.generate(
            prompt, temperature=1.0, seed=3, max_tokens=max_tokens, ignore_eos=True, **params
        )
        return stream.result().outputs[0].token_ids


def test_a_request_that_the_pool_can_never_hold_is_refused_and_the_next_one_served(
    cluster: LocalCluster,
) -> None:
    with pytest.raises(InvalidArgument) as caught:
        continuation(cluster, [9] * 380, 8)
    assert not caught.value.is_retryable
    assert str(NUM_BLOCKS) in str(caught.value)
    assert len(continuation(cluster, [9] * 380, 4)) == 4


def test_without_max_tokens_a_stream_is_as_long_as_the_pool_has_room(
    cluster: LocalCluster,
) -> None:
    # Its last token needs no place.
    assert len(continuation(cluster, [9] * 370, None)) == 64 * NUM_BLOCKS - 370 + 1
    assert len(continuation(cluster, [9] * 384, None)) == 1
    with pytest.raises(InvalidArgument) as caught:
        continuation(cluster, [9] * 385, None)
    assert caught.value.reason == "PROMPT_TOO_LONG"


@pytest.mark.parametrize("params", [{}, {"frequency_penalty": 0.5, "repetition_penalty": 1.2}])
def test_streams_that_outgrow_the_pool_together_have_the_tokens_that_they_have_alone(
    cluster: LocalCluster, params: dict[str, float]
) -> None:
    # Each begins in one block and ends in three: two of them fit to their end, eight begin.
    prompts = [[10 + number] * 50 for number in range(8)]
    alone = [continuation(cluster, prompt, 110, **params) for prompt in prompts]
    with ThreadPoolExecutor(len(prompts)) as pool:
        together = list(
            pool.map(lambda prompt: continuation(cluster, prompt, 110, **params), prompts)
        )
    assert together == alone
    assert_all_blocks_return(cluster)
