"""What a collector reads of a cluster, by Prometheus's own parser, against what clients saw."""

import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from step3rt import Client
from step3rt.errors import InvalidArgument
from tests.e2e.clusters import snapshot, wait_until
from tests.e2e.commands import Commands
from tests.fixtures.checkpoint import Checkpoint

NUM_STREAMS, NUM_TOKENS = 6, 12


def scrape(address: str | None) -> dict[str, float]:
    """Samples by name and label values, as `requests_total FINISHED`."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=30) as answer:
        assert answer.headers["content-type"].startswith("application/openmetrics-text")
        text = answer.read().decode()
    return {
        " ".join([sample.name.removeprefix("step3rt_"), *sample.labels.values()]): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics_agree_with_what_clients_saw(
    tiny_checkpoint: Checkpoint, commands: Commands
) -> None:
    model = tiny_checkpoint.directory
    coordinator = commands.serve(model, "--metrics-listen=127.0.0.1:0")
    before = scrape(coordinator.metrics_address)
    assert before["serving"] == before["generated_tokens_total"] == 0
    for role in ("ffn", "attention"):
        commands.node(role, model, coordinator)
    wait_until(lambda: snapshot(coordinator.control_address)["is_serving"], "serving")

    with Client(coordinator.address) as client, ThreadPoolExecutor() as threads:
        streams = [
            client.generate([10 + i, 11, 12], temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
            for i in range(NUM_STREAMS)
        ]
        outputs = list(threads.map(lambda stream: stream.result(), streams))
        with client.generate([9], temperature=0, max_tokens=400, ignore_eos=True) as left:
            num_read = len([next(left), next(left)])
        with pytest.raises(InvalidArgument):
            client.generate([9], temperature=-1).result()

    num_tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    assert num_tokens == NUM_STREAMS * NUM_TOKENS
    wait_until(
        lambda: scrape(coordinator.metrics_address).get("requests_total CLIENT_LEFT") == 1,
        "the end of the stream that was left",
    )
    wait_until(lambda: scrape(coordinator.metrics_address)["sequences_running"] == 0, "rest")
    after = scrape(coordinator.metrics_address)
    expected = {
        "serving": 1,
        "requests_total FINISHED": NUM_STREAMS,
        "requests_total INVALID_PARAMETER": 1,
        "outputs_total LENGTH": NUM_STREAMS,
        "prompt_tokens_total": 3 * NUM_STREAMS + 1,
        "time_to_first_token_seconds_count": NUM_STREAMS,
        "time_per_output_token_seconds_bucket +Inf": NUM_STREAMS,
        "requests_waiting": 0,
        "instances attention ready": 1,
        "instances ffn ready": 1,
    }
    assert {name: after.get(name) for name in expected} == expected
    assert after["generated_tokens_total"] >= num_tokens + num_read
    (num_blocks,) = (value for name, value in after.items() if name.startswith("kv_blocks"))
    (num_free,) = (value for name, value in after.items() if name.startswith("free_kv_blocks"))
    assert num_blocks == num_free == 64
    seconds = after["time_per_output_token_seconds_sum"] / NUM_STREAMS
    assert 0 < seconds < after["output_time_seconds_sum"]
