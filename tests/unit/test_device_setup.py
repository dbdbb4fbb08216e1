"""What the device pipeline refuses before it loads anything, each time with what to do."""

import importlib.util
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from step3rt.cli.exit_codes import end_process
from step3rt.config import NodeConfig
from step3rt.errors import ConfigError
from step3rt.instance import run_instance
from step3rt.instance.device_setup import check_settings, device_of, link_shape
from step3rt.model.config import Step3Config
from step3rt.model.random_weights import MadeUpModel
from tests.kernels.decoder_inputs import NANO


def settings(**changes: Any) -> Any:
    """As `_core.Settings`."""
    good = {
        "num_lanes": 2, "num_attention": 2, "ep_size": 2, "max_tokens_per_micro_batch": 512,
        "block_size_tokens": 64, "compute_dtype": "bfloat16", "a2f_dtype": "fp8",
        "f2a_dtype": "bfloat16", "kv_dtype": "fp8", "fabric": "auto",
    }  # fmt: skip
    return SimpleNamespace(**{**good, **changes})


def test_production_precision_is_served() -> None:
    check_settings(settings())
    check_settings(settings(kv_dtype="bfloat16", fabric="cuda_ipc"))
    shape = link_shape(settings(), Step3Config.from_directory(NANO))
    assert (shape.num_rows, shape.num_columns) == (1024, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compute_dtype": "float32"}, r"compute_dtype is float32.*--precision production"),
        ({"a2f_dtype": "bfloat16"}, "a2f_dtype is bfloat16"),
        ({"kv_dtype": "float32"}, r"kv_dtype is float32.*fp8 or bfloat16"),
        ({"fabric": "shm"}, r"fabric is shm.*auto or cuda_ipc"),
        ({"block_size_tokens": 32}, "blocks have 32 tokens"),
    ],
)
def test_settings_of_another_pipeline_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_settings(settings(**changes))


def test_more_rows_than_an_ffn_instance_takes_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"at most 2048 tokens.*max_tokens_per_micro_batch"):
        link_shape(settings(num_attention=5), Step3Config.from_directory(NANO))


def test_a_device_that_is_not_there_is_refused() -> None:
    assert device_of("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match=r"'tpu'.*reference, cpu, cuda"):
        device_of("tpu")
    with pytest.raises(ConfigError, match=r"has [0-9]+ CUDA devices"):
        device_of("cuda:63")


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Hopper, an older GPU and a newer one."""
    capabilities = [(9, 0), (8, 0), (10, 0)]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"Test GPU {index}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.__getitem__)


@pytest.mark.usefixtures("gpus")
def test_a_gpu_that_the_kernels_do_not_run_on_is_refused_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert device_of("cuda") == torch.device("cuda:0")
    with pytest.raises(ConfigError, match=r"'cuda:1', a Test GPU 1 of compute capability 8\.0"):
        device_of("cuda:1")
    with pytest.raises(ConfigError, match=r"capability 10\.0\..*or cpu"):
        device_of("cuda:2")


@pytest.mark.usefixtures("gpus")
def test_a_host_without_what_loads_kernels_is_told_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"CuPy is not installed.*'step3rt\[cuda1[23]\]'"):
        device_of("cuda:0")


def test_made_up_weights_need_sizes_alone_and_a_device(tmp_path: Path) -> None:
    shutil.copy(NANO / "config.json", tmp_path)
    model = MadeUpModel.open(tmp_path)
    assert (
        model.config.hidden_size
        == json.loads((NANO / "config.json").read_text())["text_config"]["hidden_size"]
    )
    assert model.fingerprint() == MadeUpModel.open(tmp_path).fingerprint()
    with pytest.raises(ConfigError, match=r"random_weights.*--device cpu"):
        run_instance(NodeConfig(role="ffn", model=tmp_path, random_weights=True), end_process)
