"""One colocated process has a GPU at a time."""

import os
import subprocess
import sys

import pytest
import torch

from step3rt.errors import Unavailable
from step3rt.instance.device_claim import claim, claim_name

HOLD = """
import sys
from step3rt.instance.device_claim import claim_name
held = claim_name(sys.argv[1])
print("held", flush=True)
sys.stdin.read()
"""


def test_a_claim_keeps_other_processes_off_until_its_own_is_dead() -> None:
    name = f"a test's {os.getpid()}"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(Unavailable, match="Another colocated process has a test's"):
            claim_name(name)
        claim_name(name + " neighbour").close()
        other.kill()
        other.wait()
        with claim_name(name), pytest.raises(Unavailable):
            claim_name(name)
        claim_name(name).close()


def test_a_cpu_is_shared() -> None:
    cpu = torch.device("cpu")
    with claim(cpu), claim(cpu):
        pass
