"""Errors of the CUDA driver have their names in messages, with a library that is compiled here."""

import ctypes
import subprocess
from pathlib import Path

import pytest
import torch

from step3rt.ops import launch, tensor_map
from step3rt.ops.tensor_map import TileView, encode_tensor_map

_LIBRARY = """
int cuGetErrorName(int status, const char **name) {
  if (status != 1) return 1;
  *name = "CUDA_ERROR_INVALID_VALUE";
  return 0;
}
int cuTensorMapEncodeTiled(void) { return 1; }
"""


@pytest.fixture(autouse=True)
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, library = tmp_path / "cuda.c", tmp_path / "libcuda.so"
    source.write_text(_LIBRARY)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    loaded = ctypes.CDLL(str(library))
    for module in (launch, tensor_map):
        monkeypatch.setattr(module, "driver", lambda: loaded)


def test_a_status_is_said_with_its_name() -> None:
    assert launch.error_name(1) == "1 (CUDA_ERROR_INVALID_VALUE)"
    assert launch.error_name(12345) == "12345 (unknown)"


def test_a_map_that_the_driver_rejects_is_said_with_the_reason() -> None:
    view = TileView(sizes=(64, 2), strides_bytes=(128,), box=(64, 2), swizzle_bytes=128)
    with pytest.raises(RuntimeError, match=r"returned 1 \(CUDA_ERROR_INVALID_VALUE\) for a"):
        encode_tensor_map(torch.zeros(2, 64, dtype=torch.bfloat16), view)
