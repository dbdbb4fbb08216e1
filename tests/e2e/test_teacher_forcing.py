"""The served device pipeline against the CPU's references, position by position.

A position's tokens before it are given, so that one other choice does not change all that follow.
The reference of the same arithmetic is the one-GPU decoder on the CPU: the same FP8 roundings, sums
in float64. Beside it, for the record, the model in bfloat16, which quantises nothing but weights.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import pytest
import torch

from step3rt import Client, LocalCluster
from step3rt.model.monolithic import MonolithicModel
from step3rt.results import RequestOutput
from tests.e2e.device_clusters import ON_CPU, TOPOLOGIES, Topology, device_cluster
from tests.fixtures.device_reference import forced_logits, reference_decoder
from tests.fixtures.figures import record
from tests.fixtures.teacher_forcing import NUM_TOP, Scores, agreement
from tests.kernels.decoder_inputs import NANO, NUM_WINDOWS, windows

pytestmark = pytest.mark.usefixtures("one_thread")

SAME_ARITHMETIC = "same arithmetic"
MIN_SAME_SHARE = 0.99
MAX_MODEL_LEN = 512
DECODED_PROMPT_TOKENS = 32

# Held-out windows, and tokens of each: enough for a share of a per cent, or for CI.
Extent = tuple[int, int]
WHOLE: Extent = (NUM_WINDOWS, MAX_MODEL_LEN - 1)
SHORT: Extent = (2, 130)


def extent(topology: Topology) -> Extent:
    """How much is compared: the CPU's own pipeline is slow, and exact."""
    return SHORT if topology == ON_CPU else WHOLE


@cache
def logits_of(reference: str, token_ids: tuple[int, ...]) -> torch.Tensor:
    """f32[T, V] of a reference of that name: row t is the distribution of token t + 1."""
    if reference == SAME_ARITHMETIC:
        return forced_logits(reference_decoder(max_model_len=MAX_MODEL_LEN), token_ids)
    model = MonolithicModel.load(NANO, torch.bfloat16)
    return model.logits(token_ids, chunk_tokens=64).float()


def assert_agrees(what: str, texts: list[list[int]], scores: Scores) -> None:
    """Reports the agreement with both references, and asserts it with that of the same arithmetic.

    Args:
        what: is compared.
        texts: token ids; `scores` are of the last ones of each, equally many of all.
        scores: of one text after the other.
    """
    each = len(scores.logprobs) // len(texts)
    following = [token for text in texts for token in text[-each:]]
    found = {}
    for reference in (SAME_ARITHMETIC, "bfloat16"):
        rows = [logits_of(reference, tuple(text[:-1]))[-each:] for text in texts]
        found[reference] = agreement(scores, torch.cat(rows), following)
        record(what, {"reference": reference, **found[reference].figures()})
    assert found[SAME_ARITHMETIC].same_share >= MIN_SAME_SHARE


def run_all(
    cluster: LocalCluster, prompts: list[list[int]], max_tokens: int
) -> list[RequestOutput]:
    """All prompts at once, greedily, with every score that the API gives."""
    with Client(cluster.address) as client, ThreadPoolExecutor(len(prompts)) as pool:
        streams = [
            client.generate(
                prompt, temperature=0, max_tokens=max_tokens, ignore_eos=True,
                prompt_logprobs=NUM_TOP, logprobs=NUM_TOP,
            )
            for prompt in prompts
        ]  # fmt: skip
        return list(pool.map(lambda stream: stream.result(), streams))


@pytest.fixture(scope="module", params=TOPOLOGIES)
def topology(request: pytest.FixtureRequest) -> Topology:
    found: Topology = request.param
    return found


@pytest.fixture(scope="module")
def cluster(topology: Topology) -> Iterator[LocalCluster]:
    with device_cluster(
        topology.attention,
        topology.ffn,
        topology.devices,
        topology.placement,
        max_model_len=MAX_MODEL_LEN,
    ) as running:
        yield running


def test_held_out_text_is_predicted_as_by_the_reference(
    cluster: LocalCluster, topology: Topology
) -> None:
    num_windows, num_tokens = extent(topology)
    texts = [window[:num_tokens] for window in windows()[:num_windows]]
    outputs = run_all(cluster, texts, max_tokens=1)
    scores = [Scores.of_api(output.prompt_logprobs) for output in outputs]
    assert_agrees(f"held-out text, {topology}", texts, Scores.concatenate(scores))


def test_decoded_tokens_are_the_references_at_every_position(
    cluster: LocalCluster, topology: Topology
) -> None:
    num_windows, num_tokens = extent(topology)
    prompts = [window[-DECODED_PROMPT_TOKENS:] for window in windows()[:num_windows]]
    outputs = run_all(cluster, prompts, max_tokens=num_tokens - DECODED_PROMPT_TOKENS)
    generated = [output.outputs[0] for output in outputs]
    scores = Scores.concatenate([Scores.of_api(one.logprobs) for one in generated])
    texts = [[*prompt, *one.token_ids] for prompt, one in zip(prompts, generated, strict=True)]
    chosen = [token for one in generated for token in one.token_ids]
    assert scores.top_ids[:, 0].tolist() == chosen, "greedy is the most likely token"
    assert_agrees(f"decoded tokens, {topology}", texts, scores)


@pytest.mark.gpu
def test_the_decoder_on_one_gpu_agrees_with_the_reference() -> None:
    num_windows, num_tokens = WHOLE
    texts = [window[:num_tokens] for window in windows()[:num_windows]]
    model = reference_decoder("cuda", max_model_len=MAX_MODEL_LEN)
    scores = [Scores.of_logits(forced_logits(model, text[:-1]), text[1:]) for text in texts]
    assert_agrees("held-out text, decoder on one GPU", texts, Scores.concatenate(scores))
