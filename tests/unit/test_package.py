"""The package imports fast and light, on a laptop without torch, CuPy or a GPU."""

import json
import subprocess
import sys

HEAVY = ("torch", "cupy", "safetensors", "grpc", "google.protobuf", "numpy", "matplotlib", "tqdm")


def in_new_process(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import json, sys, step3rt; print(json.dumps(sorted(sys.modules)))"
    loaded = set(json.loads(in_new_process(code)))
    assert loaded.isdisjoint(HEAVY)


def test_importing_the_package_takes_well_under_300_ms() -> None:
    code = "import time; t = time.perf_counter(); import step3rt; print(time.perf_counter() - t)"
    # The best of three: other work on the machine only ever adds.
    assert min(float(in_new_process(code)) for _ in range(3)) < 0.15


def test_the_client_needs_no_worker_package() -> None:
    code = """
import sys
for name in ("torch", "cupy", "safetensors"):
    sys.modules[name] = None  # importing it now raises ImportError
import step3rt
step3rt.Client, step3rt.AsyncClient, step3rt.LLM, step3rt.LocalCluster, step3rt.SamplingParams
import step3rt.cli
print("ok")
"""
    assert in_new_process(code).strip() == "ok"


def test_every_public_name_exists() -> None:
    import step3rt

    for name in step3rt.__all__:
        assert getattr(step3rt, name) is not None


def test_unknown_name_is_an_attribute_error() -> None:
    code = """
import step3rt
try:
    step3rt.Clinet
except AttributeError as error:
    print(error)
"""
    assert "has no attribute 'Clinet'" in in_new_process(code)
