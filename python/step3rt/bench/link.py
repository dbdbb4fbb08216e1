"""Measures links between processes of this host, and what they are built on, in the same run.

Run by `step3rt bench link --fabric shm|tcp|rdma [--tls]`; the rounds are in Rust
(rust/step3rt-fabric/src/measure.rs). It measures and reports; it decides nothing.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from step3rt import _core
from step3rt.bench import ucx
from step3rt.config import TlsPaths
from step3rt.errors import InvalidArgument, Unavailable

NUM_ROUNDS = 2_000
NUM_TURNS = 8
"""The baseline and the link take turns, so that what else the host does meets both."""

# In a process, above what any fabric has: slots both ways, what is sent, what is received.
_PAYLOADS_PER_PEER = 8

# Of a fabric: what the report calls its baseline, and what the extension does.
_BASELINES = {
    "shm": ("memcpy and a flag", "flag"),
    "tcp": ("plain socket", "socket"),
    "rdma": ("plain socket", "socket"),
}


@dataclass(frozen=True, slots=True)
class Load:
    """What is measured: `num_peers` processes, two by two, each pair with rounds of its own."""

    num_bytes: int
    num_peers: int = 2
    num_rounds: int = NUM_ROUNDS


@dataclass(slots=True)
class _Times:
    """One-way times of all rounds of all pairs, and CPU time of one round; microseconds."""

    one_way_us: list[float]
    cpu_us_per_round: float

    def quantiles(self) -> dict[str, float]:
        p50, p99 = np.percentile(self.one_way_us, (50, 99))
        return {
            "p50": round(p50, 3),
            "p99": round(p99, 3),
            "max": round(max(self.one_way_us), 3),
        }


def measure(fabric: str, load: Load, *, has_tls: bool = False) -> dict[str, Any]:
    """Returns one-way times of frames, the baseline's, and the link's CPU time.

    With `has_tls`, an encrypted link over tcp takes its turn as well.

    A one-way time is half of one there and back. Over shm both ends copy the payload into a slot
    and out of it, as the baseline does; over tcp and rdma it lies in its slot. Each process has a
    core for itself where there are as many, for the link and the baseline alike. Their ratio is
    taken turn by turn, `baseline_over_link`: a turn that the host disturbs is one of eight.

    Raises:
        InvalidArgument: the peers cannot be paired.
        Unavailable: this host has no such link, or another process died.
    """
    _check_memory(load)
    if load.num_peers < 2 or load.num_peers % 2:
        raise InvalidArgument(
            f"--peers {load.num_peers} cannot be measured. A link has two ends. Use an even number"
        )
    if fabric == "rdma":
        _require_rdma()
    with ExitStack() as stack:
        tls = stack.enter_context(_certificate()) if has_tls else None
        return _measure(fabric, load, tls)


def _check_memory(load: Load) -> None:
    """Refuses what the host cannot hold: shared memory is no process's that the kernel could end.

    Raises:
        InvalidArgument: the load takes more memory than there is.
    """
    needed = load.num_bytes * load.num_peers * _PAYLOADS_PER_PEER
    has = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > has:
        raise InvalidArgument(
            f"--bytes {load.num_bytes} with --peers {load.num_peers} cannot be measured. Slots and "
            f"copies take up to {needed / 2**30:.1f} GiB, and this host has {has / 2**30:.1f}. Use "
            "fewer bytes"
        )


def _measure(fabric: str, load: Load, tls: TlsPaths | None) -> dict[str, Any]:
    name, carrier = _BASELINES[fabric]
    baseline, link, encrypted = _Times([], 0.0), _Times([], 0.0), _Times([], 0.0)
    turns: list[tuple[str, TlsPaths | None, _Times]] = [
        (carrier, None, baseline),
        (fabric, None, link),
    ]
    if tls is not None:
        turns.append((fabric, tls, encrypted))
    ratios = []
    others = _Ucx(fabric, load)
    for turn in range(min(NUM_TURNS, max(load.num_rounds, 1))):
        num_in_turn = len(range(turn, load.num_rounds, NUM_TURNS))
        p50s = []
        for what, certificate, total in turns:
            measured = _run(what, load, num_in_turn, certificate)
            for times in measured:
                total.one_way_us += times.one_way_us
                total.cpu_us_per_round += times.cpu_us_per_round * len(times.one_way_us)
            p50s.append(np.median([us for times in measured for us in times.one_way_us]))
        ratios.append(p50s[0] / p50s[1])
        others.take_turn(num_in_turn)
    one_way_us, baseline_us = link.quantiles(), baseline.quantiles()
    report = {
        "fabric": fabric,
        "bytes": load.num_bytes,
        "peers": load.num_peers,
        "one_way_us": one_way_us,
        "gb_per_s": round(load.num_bytes / one_way_us["p50"] / 1e3, 2),
        "rounds": load.num_rounds,
        "cpu": {"us_per_round": round(link.cpu_us_per_round / len(link.one_way_us), 2)},
        "baseline": {
            "name": name,
            "one_way_us": baseline_us,
            "gb_per_s": round(load.num_bytes / baseline_us["p50"] / 1e3, 2),
        },
        "above_baseline_us": {"p50": round(one_way_us["p50"] - baseline_us["p50"], 3)},
        "baseline_over_link": {
            "turns": [round(ratio, 3) for ratio in ratios],
            "p50": round(float(np.median(ratios)), 3),
        },
        "placement": "a core each" if _cores(load.num_peers)[0] is not None else "shared cores",
        "machine": _machine(),
    }
    report |= others.report()
    if tls is not None:
        encrypted_us = encrypted.quantiles()
        cpu_us = encrypted.cpu_us_per_round / len(encrypted.one_way_us)
        report["tls"] = {
            "one_way_us": encrypted_us,
            "gb_per_s": round(load.num_bytes / encrypted_us["p50"] / 1e3, 2),
            "cpu": {"us_per_round": round(cpu_us, 2)},
            "times_plain_p50": round(encrypted_us["p50"] / one_way_us["p50"], 2),
        }
    return report


class _Ucx:
    """What UCX takes for the same bytes, where it is installed: turns of its own measurement."""

    def __init__(self, fabric: str, load: Load) -> None:
        self._fabric, self._load = fabric, load
        self._perftest = ucx.find(fabric) if load.num_peers == 2 else None
        self._p50s_us: list[float] = []
        self._error = ""

    def take_turn(self, num_rounds: int) -> None:
        if self._perftest is None or self._error:
            return
        cores = _cores(self._load.num_peers)
        num_bytes = self._load.num_bytes
        try:
            p50_us = self._perftest.one_way_us(self._fabric, num_bytes, num_rounds, cores)
        except ucx.UcxError as error:
            self._error = str(error)
        else:
            self._p50s_us.append(p50_us)

    def report(self) -> dict[str, Any]:
        if self._perftest is None:
            return {}
        name = self._perftest.name(self._fabric)
        if self._error:
            return {"ucx": {"name": name, "error": self._error}}
        p50_us = float(np.median(self._p50s_us))
        gb_per_s = round(self._load.num_bytes / p50_us / 1e3, 2)
        return {"ucx": {"name": name, "one_way_us": {"p50": p50_us}, "gb_per_s": gb_per_s}}


def _run(carrier: str, load: Load, num_rounds: int, tls: TlsPaths | None) -> list[_Times]:
    """Returns what each pair measured while the others did, too."""
    cores = _cores(load.num_peers)
    arguments = (json.dumps(tls), carrier, str(load.num_bytes), str(num_rounds))
    with ExitStack() as processes:
        pairs = []
        for at in range(0, load.num_peers, 2):
            echo, _ = processes.enter_context(_process(cores[at], "echo", *arguments))
            address = next(echo)
            measuring = _process(cores[at + 1], "measure", *arguments, address)
            pairs.append((echo, *processes.enter_context(measuring)))
        for _, ready, _ in pairs:
            next(ready)
        # Nobody starts before all can, so that they meet.
        for _, _, start in pairs:
            start.write("\n")
            start.flush()
        return [_outcome(next(measured), next(echo)) for echo, measured, _ in pairs]


def _outcome(measured: str, echo_cpu_us: str) -> _Times:
    one_way_us, cpu_us_per_round = json.loads(measured)
    return _Times(one_way_us, cpu_us_per_round + float(echo_cpu_us))


@contextmanager
def _process(core: int | None, *arguments: str) -> Iterator[tuple[Iterator[str], IO[str]]]:
    """Runs one end in a process; gives the lines that it writes, and its input."""
    place = "any" if core is None else str(core)
    process = subprocess.Popen(
        [sys.executable, "-m", "step3rt.bench.link", place, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    output = process.stdout

    def lines() -> Iterator[str]:
        while line := output.readline():
            yield line.strip()
        raise Unavailable("A process of the measurement has died. Its output says why")

    try:
        yield lines(), process.stdin
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
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


def _cores(num_peers: int) -> list[int | None]:
    """One for each process; none where there are fewer."""
    cores = sorted(os.sched_getaffinity(0))
    # Left to itself, the scheduler may run both ends of a link on one core for as long as they take
    # turns: never at once, they look like one.
    return [*cores[:num_peers]] if num_peers <= len(cores) else [None] * num_peers


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


def _main(core: str, end: str, files: str, carrier: str, num_bytes: int, num_rounds: int) -> None:
    if core != "any":
        os.sched_setaffinity(0, {int(core)})
    paths = json.loads(files)
    tls = None if paths is None else tuple(paths)
    if end == "echo":
        _core.echo_link(carrier, num_bytes, num_rounds, tls)
        return
    print("ready", flush=True)  # noqa: T201 read by the process that started this one
    sys.stdin.readline()
    measured = _core.measure_link(carrier, num_bytes, num_rounds, sys.argv[7], tls)
    print(json.dumps(measured))  # noqa: T201


if __name__ == "__main__":
    core, end, files, carrier, num_bytes, num_rounds = sys.argv[1:7]
    _main(core, end, files, carrier, int(num_bytes), int(num_rounds))
