"""Measures a link between two processes of this host, and what it is built on, in the same run.

Run by `step3rt bench link --fabric shm|tcp|rdma [--tls]`; the rounds are in Rust
(rust/step3rt-fabric/src/measure.rs). It measures and reports; it decides nothing.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from step3rt import _core
from step3rt.config import TlsPaths
from step3rt.errors import Unavailable

NUM_ROUNDS = 2_000
NUM_TURNS = 4
"""The baseline and the link take turns, so that what else the host does meets both."""

# Of a fabric: what the report calls its baseline, and what the extension does.
_BASELINES = {
    "shm": ("memcpy", "memcpy"),
    "tcp": ("plain socket", "socket"),
    "rdma": ("plain socket", "socket"),
}


def measure(
    fabric: str, num_bytes: int, num_rounds: int = NUM_ROUNDS, *, has_tls: bool = False
) -> dict[str, Any]:
    """Returns one-way times of frames of `num_bytes`, the baseline's, and the link's CPU time.

    A one-way time is half of one there and back. Over shm both ends copy the payload into a slot
    and out of it, as the baseline does; over tcp and rdma it lies in its slot. With `has_tls`, an
    encrypted link over tcp takes its turn as well.

    Raises:
        InvalidArgument: no bytes, no rounds, or more bytes than a slot can have.
        Unavailable: this host has no such link, or the other process died.
    """
    if fabric == "rdma":
        _require_rdma()
    with ExitStack() as stack:
        tls = stack.enter_context(_certificate()) if has_tls else None
        return _measure(fabric, num_bytes, num_rounds, tls)


def _measure(fabric: str, num_bytes: int, num_rounds: int, tls: TlsPaths | None) -> dict[str, Any]:
    name, carrier = _BASELINES[fabric]
    baseline_us: list[float] = []
    one_way_us: list[float] = []
    encrypted_us: list[float] = []
    cpu_us = encrypted_cpu_us = 0.0
    for turn in range(min(NUM_TURNS, max(num_rounds, 1))):
        num_in_turn = len(range(turn, num_rounds, NUM_TURNS))
        baseline_us += _run(carrier, num_bytes, num_in_turn)[0]
        times_us, cpu_us_per_round = _run(fabric, num_bytes, num_in_turn)
        one_way_us += times_us
        cpu_us += cpu_us_per_round * num_in_turn
        if tls is not None:
            times_us, cpu_us_per_round = _run(fabric, num_bytes, num_in_turn, tls)
            encrypted_us += times_us
            encrypted_cpu_us += cpu_us_per_round * num_in_turn
    p50 = np.percentile(one_way_us, 50)
    baseline_p50 = np.percentile(baseline_us, 50)
    report = {
        "fabric": fabric,
        "bytes": num_bytes,
        "peers": 2,
        "one_way_us": _quantiles(one_way_us),
        "gb_per_s": round(num_bytes / p50 / 1e3, 2),
        "rounds": num_rounds,
        "cpu": {"us_per_round": round(cpu_us / num_rounds, 2)},
        "baseline": {
            "name": name,
            "one_way_us": {"p50": round(baseline_p50, 2)},
            "gb_per_s": round(num_bytes / baseline_p50 / 1e3, 2),
        },
        "machine": _machine(),
    }
    if tls is not None:
        encrypted_p50 = np.percentile(encrypted_us, 50)
        report["tls"] = {
            "one_way_us": _quantiles(encrypted_us),
            "gb_per_s": round(num_bytes / encrypted_p50 / 1e3, 2),
            "cpu": {"us_per_round": round(encrypted_cpu_us / num_rounds, 2)},
            "times_plain_p50": round(encrypted_p50 / p50, 2),
        }
    return report


def _quantiles(times_us: list[float]) -> dict[str, float]:
    p50, p99 = np.percentile(times_us, (50, 99))
    return {"p50": round(p50, 2), "p99": round(p99, 2), "max": round(max(times_us), 2)}


def _run(
    carrier: str, num_bytes: int, num_rounds: int, tls: TlsPaths | None = None
) -> tuple[list[float], float]:
    """Returns the rounds' one-way times, and CPU time per round of both processes."""
    if carrier == "memcpy":
        return _core.measure_link(carrier, num_bytes, num_rounds, "")
    with _peer(carrier, num_bytes, num_rounds, tls) as lines:
        times_us, own_cpu_us = _core.measure_link(carrier, num_bytes, num_rounds, next(lines), tls)
        return times_us, own_cpu_us + float(next(lines))


@contextmanager
def _peer(
    carrier: str, num_bytes: int, num_rounds: int, tls: TlsPaths | None
) -> Iterator[Iterator[str]]:
    """Runs the other process; gives the lines that it writes."""
    arguments = (carrier, str(num_bytes), str(num_rounds), *(tls or ()))
    process = subprocess.Popen(
        [sys.executable, "-m", "step3rt.bench.link", *arguments], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    output = process.stdout

    def lines() -> Iterator[str]:
        while line := output.readline():
            yield line.strip()
        raise Unavailable("The other process of the measurement has died. Its output says why")

    try:
        yield lines()
    finally:
        process.kill()
        process.wait()
        output.close()


@contextmanager
def _certificate() -> Iterator[TlsPaths]:
    """A certificate for loopback that vouches for itself, until the measurement ends."""
    with tempfile.TemporaryDirectory(prefix="step3rt-") as directory:
        cert, key = f"{directory}/cert.pem", f"{directory}/key.pem"
        command = (
            "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -noenc -days 1 "
            "-subj /CN=bench -addext basicConstraints=critical,CA:FALSE "
            f"-addext subjectAltName=IP:127.0.0.1 -keyout {key} -out {cert}"
        )
        try:
            subprocess.run(command.split(), check=True, capture_output=True, text=True)
        except FileNotFoundError as error:
            raise Unavailable(
                "The command openssl is not installed. An encrypted link needs a certificate, and "
                "this measurement makes its own with it. Install openssl, or leave --tls out"
            ) from error
        except subprocess.CalledProcessError as error:
            raise Unavailable(
                f"openssl made no certificate: {error.stderr.strip()}. An encrypted link needs "
                "one. Use openssl 3, or leave --tls out"
            ) from error
        yield cert, key, cert


def _require_rdma() -> None:
    for is_good, found, fix in _core.rdma_findings():
        if not is_good:
            raise Unavailable(
                f"RDMA cannot be measured here: {found}. As `step3rt doctor` says: {fix}"
            )


def _machine() -> str:
    text = Path("/proc/cpuinfo").read_text(errors="replace")
    found = [line for line in text.splitlines() if line.startswith("model name")]
    name = found[0].partition(": ")[2] if found else "unknown processor"
    return f"{len(os.sched_getaffinity(0))} cores of {name}"


if __name__ == "__main__":
    cert, key, ca = sys.argv[4:] or (None, None, None)
    paths = None if cert is None or key is None or ca is None else (cert, key, ca)
    _core.echo_link(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), paths)
