from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from step3rt.model.batch import Batch, Chunk
from step3rt.model.monolithic import MonolithicModel, compute_ffn, run_locally
from step3rt.model.step3 import compute_logits, forward
from tests.fixtures.checkpoint import Checkpoint, CheckpointSpec, write_checkpoint
from tests.oracle.step3_numpy import Step3Oracle


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def relative_error(logits: torch.Tensor, expected: np.ndarray[Any, Any]) -> float:
    """Largest difference, as a share of the largest logit."""
    return float(np.abs(logits.numpy() - expected).max() / np.abs(expected).max())


@st.composite
def specs(draw: st.DrawFn) -> CheckpointSpec:
    num_layers = draw(st.integers(1, 5))
    moe_layers = tuple(layer for layer in range(num_layers) if draw(st.booleans()))
    num_experts = draw(st.integers(1, 9))
    return CheckpointSpec(
        seed=draw(st.integers(0, 1000)),
        vocab_size=draw(st.sampled_from([97, 256])),
        hidden_size=draw(st.sampled_from([48, 128, 200])),
        num_layers=num_layers,
        num_heads=draw(st.integers(1, 5)),
        head_dim=draw(st.sampled_from([2, 16, 48])),
        query_rank=draw(st.sampled_from([24, 64])),
        intermediate_size=draw(st.sampled_from([40, 192])),
        moe_layers=moe_layers,
        num_experts=num_experts,
        top_k=draw(st.integers(1, num_experts)),
        moe_intermediate_size=draw(st.sampled_from([24, 64])),
        share_expert_dim=draw(st.sampled_from([32, 96])),
        norm_expert_weight=draw(st.booleans()),
        rope_theta=draw(st.sampled_from([1e4, 5e5])),
        rms_norm_eps=draw(st.sampled_from([None, 1e-3])),
        dtype=draw(st.sampled_from(["float32", "bfloat16", "fp8"])),
        block_size=draw(st.sampled_from([(32, 32), (48, 40), (128, 128)])),
        scale_dtype=draw(st.sampled_from(["float32", "bfloat16"])),
        num_shards=draw(st.integers(1, 3)),
        config_layout=draw(st.sampled_from(["nested", "flat"])),
        moe_layers_format=draw(st.sampled_from(["string", "list"])),
    )


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(spec=specs(), num_tokens=st.integers(1, 150), seed=st.integers(0, 1000))
def test_forward_agrees_with_the_float64_oracle_for_any_sizes(
    tmp_path_factory: pytest.TempPathFactory, spec: CheckpointSpec, num_tokens: int, seed: int
) -> None:
    directory = write_checkpoint(tmp_path_factory.mktemp("any"), spec).directory
    token_ids = np.random.default_rng(seed).integers(0, spec.vocab_size, num_tokens).tolist()
    expected = Step3Oracle.load(directory).forward(token_ids)

    # In float64 nothing hides behind rounding.
    assert (
        relative_error(
            MonolithicModel.load(directory, torch.float64).logits(token_ids), expected.logits
        )
        < 1e-12
    )
    # In float32 a router that is all but undecided may choose another expert.
    assume(expected.router_gap.min() > 1e-5)
    float32 = MonolithicModel.load(directory).logits(token_ids)
    assert relative_error(float32, expected.logits) < 1e-6


@pytest.mark.parametrize(
    "fixture",
    [
        "tiny_checkpoint",
        "tiny_bf16_checkpoint",
        "tiny_fp8_checkpoint",
        "ragged_fp8_checkpoint",
        "tiny_sharded_checkpoint",
    ],
)
def test_every_layout_of_a_checkpoint_gives_the_oracle_logits(
    fixture: str, request: pytest.FixtureRequest
) -> None:
    checkpoint: Checkpoint = request.getfixturevalue(fixture)
    token_ids = np.random.default_rng(1).integers(0, 256, 300).tolist()
    expected = Step3Oracle.load(checkpoint.directory).logits(token_ids)
    model = MonolithicModel.load(checkpoint.directory, torch.float64)
    assert relative_error(model.logits(token_ids), expected) < 1e-12


@pytest.fixture(scope="module")
def tiny_model(tiny_checkpoint: Checkpoint) -> MonolithicModel:
    return MonolithicModel.load(tiny_checkpoint.directory, torch.float64)


@pytest.mark.parametrize("chunk_tokens", [1, 7, 64, 65, 128])
def test_chunked_prefill_equals_whole_prefill(
    tiny_model: MonolithicModel, chunk_tokens: int
) -> None:
    token_ids = np.random.default_rng(2).integers(0, 256, 131).tolist()
    whole = tiny_model.logits(token_ids)
    assert relative_error(tiny_model.logits(token_ids, chunk_tokens), whole.numpy()) < 1e-12


def test_greedy_decode_equals_the_oracle(
    tiny_checkpoint: Checkpoint, tiny_oracle: Step3Oracle
) -> None:
    expected = tiny_oracle.generate_greedy([5, 6, 7], 12)
    model = MonolithicModel.load(tiny_checkpoint.directory)
    token_ids, logits = model.generate_greedy([5, 6, 7], 12)
    assert token_ids == expected.token_ids
    logprobs = torch.log_softmax(logits, dim=-1).numpy()
    assert np.abs(logprobs - np.stack(expected.logprobs)).max() < 1e-4


def test_greedy_decode_ends_with_a_stop_token(tiny_model: MonolithicModel) -> None:
    token_ids, _ = tiny_model.generate_greedy([5, 6, 7], 12)
    stopped, _ = tiny_model.generate_greedy([5, 6, 7], 12, [token_ids[4]])
    assert stopped == token_ids[: token_ids.index(token_ids[4]) + 1]


def test_batch_of_shuffled_blocks_equals_each_sequence_alone(tiny_model: MonolithicModel) -> None:
    """Prefill chunks and decode tokens of several sequences in one batch, in a dirty pool."""
    generator = np.random.default_rng(3)
    lengths = [1, 5, 63, 64, 65, 129, 200, 5]
    new_tokens = [1, 5, 1, 1, 2, 129, 1, 1]
    sequences = [generator.integers(0, 256, length).tolist() for length in lengths]
    kv = tiny_model.new_cache(64 * 40)
    kv.blocks.fill_(torch.nan)  # what earlier sequences left must not matter
    free_blocks = generator.permutation(40).tolist()
    tables = [[free_blocks.pop() for _ in range(-(-length // 64))] for length in lengths]

    def run(chunks: list[Chunk]) -> torch.Tensor:
        batch = Batch.build(chunks, tiny_model.config, 64, tiny_model.dtype)
        steps = forward(batch, tiny_model.config, tiny_model.attention, kv)
        final_hidden = run_locally(steps, tiny_model.config, tiny_model.ffn)
        return compute_logits(final_hidden, tiny_model.attention)

    with torch.inference_mode():
        run(
            [
                Chunk(tokens[:-new], 0, table, [])
                for tokens, new, table in zip(sequences, new_tokens, tables, strict=True)
                if len(tokens) > new
            ]
        )
        logits = run(
            [
                Chunk(tokens[-new:], len(tokens) - new, table, [new - 1])
                for tokens, new, table in zip(sequences, new_tokens, tables, strict=True)
            ]
        )
    for row, tokens in zip(logits, sequences, strict=True):
        expected = tiny_model.logits(tokens)[-1]
        assert relative_error(row, expected.numpy()) < 1e-12


def test_forward_may_be_closed_at_any_layer_and_run_again(tiny_model: MonolithicModel) -> None:
    kv = tiny_model.new_cache(10)
    token_ids = list(range(10))
    batch = Batch.build(
        [Chunk(token_ids, 0, [0], range(10))], tiny_model.config, 64, tiny_model.dtype
    )
    with torch.inference_mode():
        for num_layers in range(1, 4):
            steps = forward(batch, tiny_model.config, tiny_model.attention, kv)
            request = next(steps)
            for _ in range(num_layers - 1):
                request = steps.send(compute_ffn(request, tiny_model.config, tiny_model.ffn))
            steps.close()
        steps = forward(batch, tiny_model.config, tiny_model.attention, kv)
        final_hidden = run_locally(steps, tiny_model.config, tiny_model.ffn)
        logits = compute_logits(final_hidden, tiny_model.attention)
    assert torch.equal(logits, tiny_model.logits(token_ids))


@pytest.mark.parametrize(
    ("kv_dtype", "tolerance"), [(torch.bfloat16, 0.05), (torch.float8_e4m3fn, 0.3)]
)
def test_narrow_kv_cache_changes_logits_by_its_rounding_only(
    tmp_path: Path, kv_dtype: torch.dtype, tolerance: float
) -> None:
    # Dense layers only: a router would turn the rounding into another choice of experts.
    directory = write_checkpoint(tmp_path, CheckpointSpec(moe_layers=(), num_layers=3)).directory
    token_ids = np.random.default_rng(4).integers(0, 256, 100).tolist()
    exact = MonolithicModel.load(directory).logits(token_ids)
    narrow = MonolithicModel.load(directory, kv_dtype=kv_dtype).logits(token_ids)
    error = relative_error(narrow, exact.numpy())
    assert 1e-5 < error < tolerance


def test_bfloat16_stays_near_the_oracle(tmp_path: Path) -> None:
    # Dense layers only: a router would turn the rounding into another choice of experts.
    spec = CheckpointSpec(moe_layers=(), num_layers=3, dtype="bfloat16")
    directory = write_checkpoint(tmp_path, spec).directory
    token_ids = np.random.default_rng(4).integers(0, 256, 100).tolist()
    expected = Step3Oracle.load(directory).logits(token_ids)
    model = MonolithicModel.load(directory, torch.bfloat16)
    assert model.attention.layers[0].wq.dtype == torch.bfloat16
    assert 1e-4 < relative_error(model.logits(token_ids), expected) < 0.05


def test_greedy_tokens_do_not_depend_on_batch_mates(tiny_checkpoint: Checkpoint) -> None:
    model = MonolithicModel.load(tiny_checkpoint.directory)
    generator = np.random.default_rng(5)
    sequences = [generator.integers(0, 256, length).tolist() for length in (1, 9, 40, 63, 30)]

    def last_logits(members: list[list[int]]) -> torch.Tensor:
        kv = model.new_cache(64 * len(members))
        chunks = [
            Chunk(tokens, 0, [index], [len(tokens) - 1]) for index, tokens in enumerate(members)
        ]
        with torch.inference_mode():
            batch = Batch.build(chunks, model.config, 64, model.dtype)
            layers = forward(batch, model.config, model.attention, kv)
            final_hidden = run_locally(layers, model.config, model.ffn)
            return compute_logits(final_hidden, model.attention)

    together = last_logits(sequences)
    for row, tokens in zip(together, sequences, strict=True):
        alone = last_logits([tokens])[0]
        assert int(row.argmax()) == int(alone.argmax())
        assert (row - alone).abs().max() < 1e-6 * alone.abs().max()
