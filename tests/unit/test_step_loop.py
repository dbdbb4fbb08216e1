"""Instances as processes over the real fabric, driven by plans that the test writes."""

import signal
from dataclasses import replace

import pytest
import torch

from step3rt.model.batch import Batch, Chunk
from step3rt.model.monolithic import MonolithicModel, compute_ffn
from step3rt.model.step3 import compute_logits, forward
from step3rt.ops.quantize import dequantize_groups, quantize_groups
from tests.fixtures.plan_server import FFN
from tests.fixtures.planned_cluster import ClusterMaker, Driver, check, prompt_of


@pytest.mark.parametrize(("ffn", "fabric"), [(1, "tcp"), (3, "shm")])
def test_lanes_in_flight_together_decode_as_one_process_does(
    make_cluster: ClusterMaker, ffn: int, fabric: str
) -> None:
    cluster = make_cluster(ffn, fabric=fabric, num_lanes=3)
    drivers = [
        Driver(cluster, 0, {1: prompt_of(70, 1), 2: prompt_of(3, 2)}, 0),
        Driver(cluster, 1, {3: prompt_of(1, 3)}, 10),
        Driver(cluster, 2, {4: prompt_of(21, 4), 5: prompt_of(64, 5), 6: prompt_of(9, 6)}, 15),
    ]
    for driver in drivers:
        driver.send()
    while not all(driver.is_done(8) for driver in drivers):
        output = cluster.attention.next_event()
        drivers[output.lane].accept(output)
        drivers[output.lane].send()
        timing = output.timing
        assert 0 < timing.compute_ns <= timing.total_ns
        assert timing.wait_ns <= timing.total_ns
    check(drivers, cluster.model, 8)
    links = cluster.attention.links_ready.links
    assert {link.fabric for link in links} == {fabric}


def test_drained_instances_leave_with_code_0(make_cluster: ClusterMaker) -> None:
    cluster = make_cluster(1)
    driver = Driver(cluster, 0, {1: prompt_of(60, 1)}, 0)
    driver.send(60)
    cluster.server.send(cluster.attention, drain={})
    driver.accept(cluster.attention.next_event())  # what is in flight is finished
    attention, ffn = cluster.processes
    assert attention.wait(10) == 0
    ffn.send_signal(signal.SIGTERM)
    assert ffn.wait(10) == 0


def test_lost_session_is_replaced_and_sequences_are_forgotten(make_cluster: ClusterMaker) -> None:
    cluster = make_cluster(1)
    driver = Driver(cluster, 0, {1: prompt_of(10, 1)}, 0)
    driver.send()
    driver.accept(cluster.attention.next_event())
    first_sessions = [cluster.attention, cluster.server.live(FFN)[0]]
    for session in first_sessions:
        session.commands.put(None)
    cluster.server.wait_for(lambda: all(session.is_over for session in first_sessions))
    cluster.server.wait_ready(1, 1)
    assert cluster.attention not in first_sessions
    assert cluster.attention.pid == first_sessions[0].pid

    again = Driver(cluster, 0, {1: prompt_of(10, 1)}, 7)
    while not again.is_done(3):
        again.send()
        again.accept(cluster.attention.next_event())
    check([again], cluster.model, 3)


def test_production_precision_rounds_what_travels_and_nothing_else(
    make_cluster: ClusterMaker,
) -> None:
    """FP8 to the FFN instance, BF16 back, FP8 K and V: equal to the same roundings in place."""
    cluster = make_cluster(1, a2f_dtype="fp8", f2a_dtype="bfloat16", kv_dtype="fp8")
    driver = Driver(cluster, 0, {1: prompt_of(40, 1)}, 0)
    while not driver.is_done(4):
        driver.send(64)
        driver.accept(cluster.attention.next_event())

    model = MonolithicModel.load(cluster.model, kv_dtype=torch.float8_e4m3fn)
    kv = model.new_cache(64)
    new_tokens, position = prompt_of(40, 1), 0
    for token, logprob in zip(driver.tokens[1], driver.logprobs[1], strict=True):
        rows = range(len(new_tokens))
        batch = Batch.build(
            [Chunk(new_tokens, position, [0], rows[-1:])], model.config, 64, torch.float32
        )
        with torch.inference_mode():
            layers = forward(batch, model.config, model.attention, kv)
            try:
                request = next(layers)
                while True:
                    hidden = dequantize_groups(*quantize_groups(request.hidden), torch.float32)
                    output = compute_ffn(replace(request, hidden=hidden), model.config, model.ffn)
                    request = layers.send(output.bfloat16())
            except StopIteration as end:
                logprobs = torch.log_softmax(compute_logits(end.value, model.attention)[0], dim=0)
        assert int(logprobs.argmax()) == token
        assert float(logprobs[token]) == pytest.approx(logprob, abs=1e-5)
        position += len(new_tokens)
        new_tokens = [token]
