"""Holds what every test may ask for: hypothesis profiles and checkpoints written once a session.

The imports inside the fixtures keep torch, which takes seconds to import, out of runs that need
no checkpoint. Tests must not change these checkpoints: `damaged_copy` makes one that they may.
"""

import os
import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from tests.fixtures.checkpoint import Checkpoint
    from tests.oracle.step3_numpy import Step3Oracle

# Torch and BLAS read it when they are imported, here and in processes that tests start. Threads
# meet at every operation, late where others compute: `make test-python` runs two halves at a time.
os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // 2, 1)))

# Deadlines measure the machine, not the code: other work on it would fail tests at random.
settings.register_profile("ci", derandomize=True, max_examples=50, deadline=None)
settings.register_profile("dev", max_examples=20, deadline=None)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


@pytest.fixture(scope="session", autouse=True)
def signals_reach_what_tests_start() -> None:
    """A suite that a script runs in the background, or `nohup`, inherits ignored signals, as would
    the commands that tests send them to; handlers are not inherited."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda _number, _frame: None)


@pytest.fixture(scope="session", autouse=True)
def no_settings_of_the_user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests find no profile that somebody has kept, and keep theirs elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("config")))
        yield


def _write(tmp_path_factory: pytest.TempPathFactory, name: str, **fields: Any) -> "Checkpoint":
    from tests.fixtures.checkpoint import CheckpointSpec, write_checkpoint

    return write_checkpoint(tmp_path_factory.mktemp(name), CheckpointSpec(**fields))


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> "Checkpoint":
    """Four layers, dense first and last, float32, one file, config nested as published."""
    return _write(tmp_path_factory, "tiny")


@pytest.fixture(scope="session")
def tiny_bf16_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> "Checkpoint":
    """The tiny model in bfloat16, with tensors of a vision tower that text loaders pass over."""
    return _write(tmp_path_factory, "tiny-bf16", dtype="bfloat16", has_vision_tensors=True)


@pytest.fixture(scope="session")
def tiny_fp8_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> "Checkpoint":
    """The tiny model in FP8 blocks of 32 by 32 with float32 scales, one file."""
    return _write(tmp_path_factory, "tiny-fp8", dtype="fp8")


@pytest.fixture(scope="session")
def ragged_fp8_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> "Checkpoint":
    """The tiny model in FP8 blocks that divide no size, over three shards, every other choice of
    the layout made differently from `tiny_fp8_checkpoint`."""
    return _write(
        tmp_path_factory,
        "ragged-fp8",
        dtype="fp8",
        block_size=(48, 40),
        scale_dtype="bfloat16",
        unquantised=("model.layers.0.self_attn.k_proj", "model.layers.1.moe.down_proj"),
        num_shards=3,
        config_layout="flat",
        moe_layers_format="list",
        rms_norm_eps=1e-5,
    )


@pytest.fixture(scope="session")
def tiny_sharded_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> "Checkpoint":
    """The tiny model in float32 over three shards."""
    return _write(tmp_path_factory, "tiny-sharded", num_shards=3)


@pytest.fixture(scope="session")
def chat_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> "Checkpoint":
    """The tiny model with a byte-level tokenizer and a chat template."""
    return _write(tmp_path_factory, "chat", vocab_size=320, has_tokenizer=True)


@pytest.fixture(scope="session")
def tiny_oracle(tiny_checkpoint: "Checkpoint") -> "Step3Oracle":
    """The float64 model of `tiny_checkpoint`."""
    from tests.oracle.step3_numpy import Step3Oracle

    return Step3Oracle.load(tiny_checkpoint.directory)
