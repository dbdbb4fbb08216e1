import os
from collections.abc import Iterator

import pytest

# As instances have it, before anything starts the driver: lanes that wait hold up no other stream.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")


@pytest.fixture(autouse=True, scope="session")
def bounded_waits() -> None:
    """With STEP3RT_TEST_WAIT_LIMIT_NS, kernels trap instead of waiting for ever."""
    limit_ns = os.environ.get("STEP3RT_TEST_WAIT_LIMIT_NS")
    if limit_ns is not None:
        from step3rt.ops import compile as compiler

        compiler.FIXED_OPTIONS += (f"-DSTEP3RT_WAIT_LIMIT_NS={limit_ns}ull",)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Operations on tests' small tensors cost less than threads that meet on a busy machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
