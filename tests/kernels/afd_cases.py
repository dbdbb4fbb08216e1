"""Where the tests of AFD links run, and the shape of most of them.

On a machine with one GPU all processes share it, with more they spread over two.
"""

import itertools

import pytest
import torch

from step3rt.ops.afd_slots import AfdShape

SHAPE = AfdShape(num_lanes=2, num_sources=2, num_ranks=2, max_tokens=9, hidden_size=256, top_k=3)
CPU = torch.device("cpu")
HAS_GPU = torch.cuda.is_available()
ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")]
DEVICES = ["cpu", pytest.param("cuda", marks=ON_GPU)]
EPOCHS = itertools.count(1)


def device_of(kind: str, place: int = 0) -> torch.device:
    """The `place`-th process' device, of a machine's first two GPUs at most."""
    if kind == "cpu":
        return CPU
    return torch.device("cuda", place % min(torch.cuda.device_count(), 2))
