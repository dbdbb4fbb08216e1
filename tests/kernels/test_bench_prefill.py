"""The benchmarks of prefill, on the CPU: what they compute and how they name it, not the times."""

from collections.abc import Sequence

import pytest
import torch

from step3rt.bench import engine, mfa_prefill
from step3rt.bench.engine import EngineLoad, measure_weights
from step3rt.bench.graph_timing import Launch
from step3rt.bench.mfa_prefill import SHAPES, prefill_rows
from step3rt.model.checkpoint import Checkpoint
from step3rt.model.gpu_weights import load_gpu_weights
from tests.kernels.decoder_inputs import NANO

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
SMALL = ((5, 0), (6, 70))


@pytest.fixture(autouse=True)
def launched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure_us(launches: Sequence[Launch]) -> float:
        launches[0]()
        return 2.0

    monkeypatch.setattr(mfa_prefill, "measure_us", measure_us)


@pytest.mark.parametrize("kv_format", ["bf16", "fp8"])
def test_rows_are_named_by_chunk_and_context_and_checked(kv_format: str) -> None:
    rows = list(prefill_rows(kv_format, has_peers=False, shapes=SMALL, device=CPU))
    assert [row.kernel for row in rows] == [f"mfa_prefill_{kv_format}"] * 2
    assert [row.shape for row in rows] == ["1x5", "1x6+70"]
    assert rows[1].tflops == pytest.approx(4 * 64 * 256 * sum(range(71, 77)) / 2e6)
    assert [row.peers for row in rows] == [{"mfa_decode_rows": 2.0}] * 2


def test_all_wanted_chunks_are_measured() -> None:
    wanted = {(tokens, before) for tokens in (512, 1024, 2048, 4096) for before in (0, 8192)}
    assert wanted <= set(SHAPES)


def test_long_chunks_take_several_launches_of_the_decode_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mfa_prefill, "MAX_SEQUENCES", 2)
    [row] = prefill_rows("bf16", has_peers=False, shapes=((5, 0),), device=CPU)
    assert row.peers == {"mfa_decode_rows": 6.0}


def test_peers_that_do_not_run_here_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    [whole, late] = prefill_rows("bf16", has_peers=True, shapes=SMALL, device=CPU)
    assert "sdpa_cudnn_contiguous" not in whole.peers
    assert set(late.peers) == {"mfa_decode_rows"}
    errors = capsys.readouterr().err
    for name in ("sdpa_cudnn_contiguous", "sdpa_cudnn_two_calls", "sdpa_flash_contiguous"):
        assert f"{name} did not run" in errors or name in whole.peers


def test_peers_that_compute_something_else_are_not_timed() -> None:
    peers = mfa_prefill._Peers(6, 70, CPU)
    plain = torch.nn.functional.scaled_dot_product_attention
    mask = torch.ones(6, 76, dtype=torch.bool).tril(70)
    keys, values = (kv.expand(-1, 64, -1, -1) for kv in (peers.keys, peers.values))
    peers._check("right", plain(peers.q, keys, values, attn_mask=mask))
    with pytest.raises(RuntimeError, match="computes something else"):
        peers._check("upper left", plain(peers.q, keys, values, is_causal=True))


def test_a_wrong_kernel_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mfa_prefill, "mfa_prefill_bf16", lambda *_: None)
    with pytest.raises(RuntimeError, match="mfa_prefill_bf16 is wrong"):
        list(prefill_rows("bf16", has_peers=False, shapes=SMALL, device=CPU))


def test_the_engine_reports_prefill_and_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NUM_REPEATS", "NUM_PREFILL_REPEATS"):
        monkeypatch.setattr(engine, name, 1)
    weights = load_gpu_weights(Checkpoint.open(NANO), CPU)
    load = EngineLoad(num_sequences=2, num_context_tokens=20, prefill_tokens=32, num_steps=2)
    report = measure_weights(weights, load)
    assert (report["prefill_prompts"], report["prefill_step_tokens"]) == (2, 32)
    # Both figures are rounded.
    assert report["prefill_tokens_per_s"] == pytest.approx(
        40e3 / report["prefill_ms"], rel=1e-3, abs=1
    )
    assert report["tokens_per_s"] == pytest.approx(2e3 / report["step_ms"], rel=1e-3, abs=1)
