"""What a request asks for, it gets: logprobs, seeds, continuations, and every way to stop."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest

from step3rt import AsyncClient, Client, LocalCluster, SamplingParams
from step3rt.v1 import common_pb2, inference_service_pb2
from step3rt.v1.inference_service_pb2_grpc import InferenceServiceStub
from tests.e2e.clusters import assert_all_blocks_return
from tests.e2e.reference import assert_greedy, expected
from tests.fixtures.tokenizer import EOS_TOKEN_ID
from tests.oracle.step3_numpy import Step3Oracle

PROMPT = list(range(40, 80))
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


def tokens_of(client: Client, prompt: list[int], params: SamplingParams) -> list[int]:
    return client.generate(prompt, params).result().outputs[0].token_ids


@pytest.fixture(scope="module")
def greedy(chat_cluster: LocalCluster) -> tuple[list[int], str]:
    """Tokens and text of the prompt's greedy continuation."""
    with Client(chat_cluster.address) as client:
        completion = client.generate(PROMPT, GREEDY).result().outputs[0]
    return completion.token_ids, completion.text


def test_logprobs_of_prompt_tokens_and_rivals_are_those_of_the_model(
    client: Client, chat_oracle: Step3Oracle
) -> None:
    output = client.generate(PROMPT, GREEDY, logprobs=5, prompt_logprobs=3).result()
    assert len(output.prompt_logprobs) == len(PROMPT) - 1
    assert all(len(item.top) == 3 for item in output.prompt_logprobs)
    expect = expected(chat_oracle, PROMPT, output.outputs[0].token_ids)
    assert_greedy(expect, PROMPT, output, num_top=5)


def test_prompt_logprobs_of_a_long_prompt_come_in_order_and_once(
    client: Client, chat_oracle: Step3Oracle
) -> None:
    prompt = [int(token) for token in np.random.default_rng(7).integers(5, 320, 900)]
    output = client.generate(
        prompt, temperature=0, max_tokens=1, prompt_logprobs=0, logprobs=0
    ).result()
    assert len(output.prompt_logprobs) == 899
    assert_greedy(expected(chat_oracle, prompt, output.outputs[0].token_ids), prompt, output)


def test_a_sampled_token_has_the_logprob_that_the_model_gives_it(
    client: Client, chat_oracle: Step3Oracle
) -> None:
    output = client.generate(
        PROMPT, temperature=1.5, seed=3, max_tokens=12, ignore_eos=True, logprobs=0
    ).result()
    [completion] = output.outputs
    rows = expected(chat_oracle, PROMPT, completion.token_ids).rows
    for position, item in enumerate(completion.logprobs):
        assert abs(item.logprob - rows[len(PROMPT) - 1 + position][item.token_id]) < 1e-4


def test_the_same_seed_gives_the_same_tokens_whatever_the_batch_mates(client: Client) -> None:
    params = SamplingParams(temperature=1.0, seed=11, max_tokens=16, ignore_eos=True)
    alone = tokens_of(client, PROMPT, params)
    with ThreadPoolExecutor(6) as pool:
        crowd = [
            pool.submit(
                tokens_of,
                client,
                PROMPT if seed == 11 else PROMPT[:seed],
                SamplingParams(temperature=1.0, seed=seed, max_tokens=20, ignore_eos=True),
            )
            for seed in (5, 11, 17, 23, 29)
        ]
        among_others = pool.submit(tokens_of, client, PROMPT, params).result()
    assert among_others == alone
    assert crowd[1].result()[:16] == alone


def test_different_seeds_and_no_seed_give_different_tokens(client: Client) -> None:
    params = SamplingParams(temperature=2.0, max_tokens=16, ignore_eos=True)
    seeded = {tuple(client.generate(PROMPT, params, seed=seed).result().outputs[0].token_ids)
              for seed in (1, 2, 3)}  # fmt: skip
    assert len(seeded) == 3
    assert tokens_of(client, PROMPT, params) != tokens_of(client, PROMPT, params)


def test_top_k_of_one_and_a_tiny_top_p_are_greedy(
    client: Client, greedy: tuple[list[int], str]
) -> None:
    for limits in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        output = client.generate(
            PROMPT, temperature=2.0, max_tokens=24, ignore_eos=True, **limits
        ).result()
        assert output.outputs[0].token_ids == greedy[0], limits


def test_n_continuations_are_each_complete_and_differ(client: Client) -> None:
    params = SamplingParams(n=3, temperature=2.0, seed=5, max_tokens=12, ignore_eos=True)
    output = client.generate(PROMPT, params).result()
    assert output.finished
    assert [item.index for item in output.outputs] == [0, 1, 2]
    assert all(len(item.token_ids) == 12 for item in output.outputs)
    assert all(item.finish_reason == "length" for item in output.outputs)
    assert len({tuple(item.token_ids) for item in output.outputs}) == 3
    again = client.generate(PROMPT, params).result()
    assert [item.token_ids for item in again.outputs] == [item.token_ids for item in output.outputs]


def test_positions_of_a_stream_have_no_gap_and_no_duplicate(
    client: Client, greedy: tuple[list[int], str]
) -> None:
    tokens: list[int] = []
    text = ""
    for event in client.generate(PROMPT, GREEDY):
        assert event.position == len(tokens)
        tokens += event.token_ids
        text += event.text
    assert (tokens, text) == greedy
    assert event.finish_reason == "length"
    assert event.usage is not None
    assert event.usage.prompt_tokens == len(PROMPT)
    assert event.usage.completion_tokens == len(tokens)


def test_text_is_whole_characters_and_equals_the_text_of_all_tokens(client: Client) -> None:
    # Random bytes: most characters are broken, and some complete over several tokens.
    params = SamplingParams(temperature=2.0, seed=2, max_tokens=200, ignore_eos=True)
    stream = client.generate(PROMPT, params)
    parts = [event.text for event in stream]
    assert "".join(parts) == client.detokenize(stream.token_ids)


def test_a_stop_string_across_tokens_ends_the_text_before_it(
    client: Client, greedy: tuple[list[int], str]
) -> None:
    tokens, text = greedy
    # Three characters from the middle: every one is a token of its own or more.
    stop = next(
        text[start : start + 3] for start in range(4, len(text) - 3) if "\ufffd" not in
        text[start : start + 3]
    )  # fmt: skip
    output = client.generate(PROMPT, GREEDY, stop=[stop, "never to be seen"]).result()
    [completion] = output.outputs
    assert completion.finish_reason == "stop"
    assert completion.stop_reason == stop
    assert completion.text == text[: text.index(stop)]
    assert completion.token_ids == tokens[: len(completion.token_ids)]
    assert len(completion.token_ids) < len(tokens)
    assert stop in client.detokenize(completion.token_ids)

    kept = client.generate(PROMPT, GREEDY, stop=stop, include_stop=True).result().outputs[0]
    assert kept.text == text[: text.index(stop) + len(stop)]


def test_a_stop_string_of_bytes_that_only_together_are_a_character_is_found(
    client: Client,
) -> None:
    # The prompt makes no difference to what is forced: seeds are searched for a character of
    # several bytes, hence of several tokens in this tokenizer.
    for seed in range(200):
        params = SamplingParams(temperature=2.0, seed=seed, max_tokens=100, ignore_eos=True)
        text = client.generate(PROMPT, params).result().outputs[0].text
        wide = [char for char in text if ord(char) > 0x7F and char != "\ufffd"]
        if wide:
            break
    stopped = client.generate(PROMPT, params, stop=wide[0]).result().outputs[0]
    assert stopped.finish_reason == "stop"
    assert stopped.stop_reason == wide[0]
    assert stopped.text == text[: text.index(wide[0])]


def test_a_stop_id_is_the_last_token_but_not_before_min_tokens(
    client: Client, greedy: tuple[list[int], str]
) -> None:
    tokens, _text = greedy
    stop_id = tokens[3]
    stopped = client.generate(PROMPT, GREEDY, stop_token_ids=[stop_id]).result().outputs[0]
    assert stopped.token_ids == tokens[: tokens.index(stop_id) + 1]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", stop_id)

    late = client.generate(PROMPT, GREEDY, stop_token_ids=[stop_id], min_tokens=10).result()
    assert len(late.outputs[0].token_ids) >= 10
    assert stop_id not in late.outputs[0].token_ids[:9]


def test_the_end_of_text_token_ends_a_stream_unless_it_is_ignored(
    client: Client, chat_oracle: Step3Oracle
) -> None:
    # Sampling at a high temperature meets the end of text soon, for some seed.
    for seed in range(100):
        params = SamplingParams(temperature=50.0, seed=seed, max_tokens=60)
        completion = client.generate(PROMPT, params).result().outputs[0]
        if completion.finish_reason == "stop":
            break
    assert completion.token_ids[-1] == EOS_TOKEN_ID
    assert EOS_TOKEN_ID not in completion.token_ids[:-1]
    ignoring = client.generate(PROMPT, params, ignore_eos=True).result().outputs[0]
    assert ignoring.finish_reason == "length"
    assert ignoring.token_ids[: len(completion.token_ids)] == completion.token_ids


def test_max_tokens_of_none_fills_the_context(client: Client) -> None:
    output = client.generate([9] * 1000, temperature=0, max_tokens=None, ignore_eos=True).result()
    assert len(output.outputs[0].token_ids) == 24
    assert output.outputs[0].finish_reason == "length"


def test_a_resumed_stream_goes_on_where_the_first_ended(
    chat_cluster: LocalCluster, greedy: tuple[list[int], str]
) -> None:
    tokens, text = greedy
    request = inference_service_pb2.GenerateRequest(
        token_ids=common_pb2.TokenIds(ids=PROMPT),
        sampling=common_pb2.SamplingParams(temperature=0),
        stopping=common_pb2.StoppingCriteria(max_tokens=24, ignore_eos=True),
        resume_token_ids=common_pb2.TokenIds(ids=tokens[:10]),
    )
    with grpc.insecure_channel(chat_cluster.address) as channel:
        events = list(InferenceServiceStub(channel).Generate(request))
    deltas = [event.delta for event in events if event.HasField("delta")]
    assert deltas[0].sequence == 10
    resumed = [token for delta in deltas for token in delta.token_ids]
    assert tokens[:10] + resumed == tokens
    assert text.endswith("".join(delta.text for delta in deltas))


def test_text_and_chat_prompts_are_tokenised_by_the_checkpoint(
    client: Client, chat_oracle: Step3Oracle
) -> None:
    ids = client.tokenize("the thing")
    assert client.detokenize(ids) == "the thing"
    by_text = client.generate("the thing", GREEDY).result()
    assert by_text.num_prompt_tokens == len(ids)
    assert by_text.outputs[0].token_ids == tokens_of(client, ids, GREEDY)

    answer = client.chat([{"role": "user", "content": "hi"}], GREEDY).result()
    assert answer.num_prompt_tokens > len(client.tokenize("hi"))
    assert len(answer.outputs[0].token_ids) == 24


def test_the_asyncio_client_tokenises_as_the_blocking_one(
    chat_cluster: LocalCluster, client: Client
) -> None:
    async def there_and_back() -> tuple[list[int], str, str]:
        async with AsyncClient(chat_cluster.address) as other:
            ids = await other.tokenize("the thing")
            bare = await other.tokenize("the thing", add_special_tokens=False)
            whole = await other.detokenize(ids, skip_special_tokens=False)
            return bare, await other.detokenize(ids), whole

    bare, text, whole = asyncio.run(there_and_back())
    assert bare == client.tokenize("the thing", add_special_tokens=False)
    assert text == "the thing"
    assert whole == client.detokenize(client.tokenize("the thing"), skip_special_tokens=False)


def test_a_prompt_that_was_seen_before_is_not_computed_again_but_gives_the_same(
    client: Client,
) -> None:
    prompt = [int(token) for token in np.random.default_rng(1).integers(5, 320, 300)]
    first = client.generate(prompt, GREEDY, logprobs=0).result()
    again = client.generate(prompt, GREEDY, logprobs=0).result()
    assert again.outputs[0].token_ids == first.outputs[0].token_ids
    for one, other in zip(first.outputs[0].logprobs, again.outputs[0].logprobs, strict=True):
        assert abs(one.logprob - other.logprob) < 1e-4


def test_no_block_is_left_used(chat_cluster: LocalCluster) -> None:
    assert_all_blocks_return(chat_cluster)
