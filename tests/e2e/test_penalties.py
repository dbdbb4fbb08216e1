"""Penalties and logit bias, through gRPC and real processes, judged by the float64 oracle."""

import json
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from step3rt import Client, LocalCluster
from step3rt.config import resolve_model
from step3rt.v1 import common_pb2, inference_service_pb2
from step3rt.v1.inference_service_pb2_grpc import InferenceServiceStub
from tests.e2e.clusters import running_cluster
from tests.e2e.commands import run
from tests.e2e.reference import TOLERANCE, expected
from tests.oracle.logit_adjust import adjusted_logits
from tests.oracle.step3_numpy import Step3Oracle

PROMPT = [*range(40, 60), 41, 43, 41]
NUM_TOKENS = 40
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": NUM_TOKENS, "ignore_eos": True}
# As the SDK and as the oracle name them.
PENALTIES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"frequency_penalty": 0.25}, {"frequency": 0.25}),
    ({"presence_penalty": 0.75}, {"presence": 0.75}),
    ({"repetition_penalty": 1.75}, {"repetition": 1.75}),
    ({"repetition_penalty": 0.5, "frequency_penalty": 2}, {"repetition": 0.5, "frequency": 2.0}),
    (
        {"presence_penalty": -0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.25,
         "logit_bias": {7: 1.5, 300: -2.0, 45: 0.25}},
        {"presence": -0.5, "frequency": 0.5, "repetition": 1.25,
         "bias": {7: 1.5, 300: -2.0, 45: 0.25}},
    ),
]  # fmt: skip
ALL_ASKED, _ = PENALTIES[-1]


def tokens_of(client: Client, prompt: list[int] | str = PROMPT, **params: Any) -> list[int]:
    return client.generate(prompt, **{**GREEDY, **params}).result().outputs[0].token_ids


@pytest.fixture(scope="module")
def nano() -> Iterator[Client]:
    """A client of 1A1F that serves nano."""
    with (
        running_cluster(resolve_model(Path("nano"))) as cluster,
        Client(cluster.address) as connected,
    ):
        yield connected


@pytest.mark.parametrize(("asked", "formula"), PENALTIES)
def test_every_greedy_token_is_the_best_one_after_penalties(
    client: Client, chat_oracle: Step3Oracle, asked: dict[str, Any], formula: dict[str, Any]
) -> None:
    output = client.generate(PROMPT, **GREEDY, **asked, logprobs=0).result()
    tokens = output.outputs[0].token_ids
    assert len(tokens) == NUM_TOKENS
    assert tokens != tokens_of(client), "this penalty changes nothing here, and proves nothing"
    logits = chat_oracle.forward([*PROMPT, *tokens]).logits
    scale = max(formula.get("repetition", 1.0), 1 / formula.get("repetition", 1.0))
    for position, token in enumerate(tokens):
        adjusted = adjusted_logits(
            logits[len(PROMPT) - 1 + position], PROMPT, tokens[:position], **formula
        )
        assert adjusted[token] > adjusted.max() - TOLERANCE * scale, position
    # Logprobs are the model's own.
    rows = expected(chat_oracle, PROMPT, tokens).rows
    for position, item in enumerate(output.outputs[0].logprobs):
        assert abs(item.logprob - rows[len(PROMPT) - 1 + position][item.token_id]) < TOLERANCE


def test_neutral_values_change_nothing(client: Client) -> None:
    neutral = tokens_of(
        client, presence_penalty=0.0, frequency_penalty=0, repetition_penalty=1, logit_bias={5: 0}
    )
    assert neutral == tokens_of(client)


def test_a_bias_forces_or_bans_a_token_greedy_or_not(client: Client) -> None:
    assert tokens_of(client, logit_bias={77: 100}) == [77] * NUM_TOKENS
    assert tokens_of(client, logit_bias={77: 100}, temperature=1.0, seed=1) == [77] * NUM_TOKENS
    usual = Counter(tokens_of(client)).most_common(1)[0][0]
    assert usual not in tokens_of(client, logit_bias={usual: -100})
    assert usual not in tokens_of(client, logit_bias={usual: -100}, temperature=1.0, seed=1)


def test_min_tokens_is_stronger_than_a_bias_for_the_stop_id(client: Client) -> None:
    tokens = tokens_of(client, logit_bias={77: 100}, stop_token_ids=[77], min_tokens=5)
    assert len(tokens) == 6
    assert tokens[5] == 77
    assert 77 not in tokens[:5]


def test_continuations_of_one_request_count_each_for_itself(client: Client) -> None:
    # Greedy continuations are the same; they would not be if they shared their counts.
    [alone] = [tokens_of(client, **ALL_ASKED)]
    output = client.generate(PROMPT, **GREEDY, **ALL_ASKED, n=4).result()
    assert [item.token_ids for item in output.outputs] == [alone] * 4


def test_batch_mates_with_and_without_penalties_do_not_influence_each_other(
    client: Client,
) -> None:
    wanted: list[dict[str, Any]] = [
        {}, *(asked for asked, _ in PENALTIES),
        *({"temperature": 1.5, "seed": 9, **params} for params in (
            {}, {"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.05}, {"logprobs": 3},
            {"min_tokens": 20, "ignore_eos": False}, ALL_ASKED,
        )),
    ]  # fmt: skip
    alone = [tokens_of(client, **params) for params in wanted]
    with ThreadPoolExecutor(len(wanted)) as pool:
        together = list(pool.map(lambda params: tokens_of(client, **params), wanted))
    assert together == alone


@pytest.mark.parametrize("num_resumed", [5, 17, NUM_TOKENS - 1])
def test_a_resumed_stream_counts_what_was_generated_before(
    chat_cluster: LocalCluster, client: Client, num_resumed: int
) -> None:
    params = {"presence_penalty": 0.5, "frequency_penalty": 0.5}
    tokens = tokens_of(client, **params)
    request = inference_service_pb2.GenerateRequest(
        token_ids=common_pb2.TokenIds(ids=PROMPT),
        sampling=common_pb2.SamplingParams(temperature=0, **params),
        stopping=common_pb2.StoppingCriteria(max_tokens=NUM_TOKENS, ignore_eos=True),
        resume_token_ids=common_pb2.TokenIds(ids=tokens[:num_resumed]),
    )
    with grpc.insecure_channel(chat_cluster.address) as channel:
        events = list(InferenceServiceStub(channel).Generate(request))
    deltas = [event.delta for event in events if event.HasField("delta")]
    assert [token for delta in deltas for token in delta.token_ids] == tokens[num_resumed:]


def test_penalties_make_nano_repeat_itself_less(nano: Client) -> None:
    prompt = "The king said, the king said, the king said, the king said,"
    plain = tokens_of(nano, prompt)
    times = Counter(plain)
    for params in (
        {"frequency_penalty": 2.0}, {"presence_penalty": 2.0}, {"repetition_penalty": 2.0}
    ):  # fmt: skip
        penalised = Counter(tokens_of(nano, prompt, **params))
        assert len(penalised) > len(times), params
        assert max(penalised.values()) < max(times.values()), params
    # A bonus in place of a penalty does the opposite.
    assert len(set(tokens_of(nano, prompt, frequency_penalty=-2.0))) < len(times)


def test_the_command_line_passes_every_parameter_on(
    chat_cluster: LocalCluster, client: Client
) -> None:
    ended = run(
        "generate", f"--address={chat_cluster.address}", "--temperature=0", "--ignore-eos",
        f"--max-tokens={NUM_TOKENS}", f"--prompt-token-ids={','.join(map(str, PROMPT))}",
        "--presence-penalty=-0.5", "--frequency-penalty=0.5", "--repetition-penalty=1.25",
        "--logit-bias=7=1.5", "--logit-bias=300=-2", "--logit-bias", "45=0.25", "--output=json",
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    [result] = json.loads(ended.stdout)["results"]
    assert result["token_ids"] == tokens_of(client, **ALL_ASKED)


def test_the_command_line_gives_n_continuations_and_stops_at_an_id(
    chat_cluster: LocalCluster, client: Client
) -> None:
    stop_id = tokens_of(client)[4]
    ended = run(
        "generate", f"--address={chat_cluster.address}", "--n=2", "--temperature=0",
        f"--prompt-token-ids={','.join(map(str, PROMPT))}", f"--stop-token-id={stop_id}",
        "--ignore-eos", "--output=json",
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    results = json.loads(ended.stdout)["results"]
    assert [item["index"] for item in results] == [0, 1]
    assert [item["stop_reason"] for item in results] == [stop_id] * 2


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--logit-bias=7", "'7' is not a token id and its bias"),
        ("--logit-bias=a=1", "'a=1' is not a token id and its bias"),
        ("--logit-bias=7=101", "101 for id 7 is not between -100 and 100"),
        ("--logit-bias=45=1", "twice for token 45"),
        ("--presence-penalty=3", "3 is not between -2 and 2"),
    ],
)
def test_a_wrong_flag_is_exit_code_2(chat_cluster: LocalCluster, flag: str, words: str) -> None:
    ended = run(
        "generate", f"--address={chat_cluster.address}", "--prompt-token-ids=1", flag,
        *(["--logit-bias=45=2"] if "45" in flag else []),
    )  # fmt: skip
    assert ended.returncode == 2
    assert words in ended.stderr
    assert "Traceback" not in ended.stderr
