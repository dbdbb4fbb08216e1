"""One-way times of UCX between two processes, by its own `ucx_perftest`, where that is installed.

It is found on PATH, or in a wheel of UCX (`pip install libucx-cu12`). It never decides whether UCX
is needed: whoever measures goes on without it.
"""

import os
import shutil
import socket
import subprocess
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

# Of a fabric: what UCX is told to use, and nothing else.
_ENVIRONMENTS = {
    "shm": {"UCX_TLS": "posix"},
    "tcp": {"UCX_TLS": "tcp", "UCX_NET_DEVICES": "lo"},
}

_TEST = "ucp_am_lat"
"""Active messages, there and back: a message is announced by its arrival, as a frame is."""

_LIMIT_S = 20.0
_START_LIMIT_S = 10.0


class UcxError(Exception):
    """It is there, and did not measure."""


@dataclass(frozen=True, slots=True)
class Perftest:
    """An installed `ucx_perftest`."""

    program: Path
    libraries: tuple[Path, ...]
    """Where its shared libraries are; none for one that finds them itself."""

    def name(self, fabric: str) -> str:
        """What the report calls it."""
        return f"ucx_perftest, {_TEST}, UCX_TLS={_ENVIRONMENTS[fabric]['UCX_TLS']}"

    def one_way_us(
        self, fabric: str, num_bytes: int, num_rounds: int, cores: list[int | None]
    ) -> float:
        """Returns the median one-way time of `num_rounds`, both processes on cores of their own.

        Raises:
            UcxError: it did not run to its end.
        """
        if os.sched_getscheduler(0) in (os.SCHED_FIFO, os.SCHED_RR):
            # It polls without a pause: with that priority it starves the kernel's own threads,
            # which move its bytes, and whoever would end it.
            raise UcxError("it cannot be measured with real-time priority. Leave chrt out")
        environment = {**os.environ, **_ENVIRONMENTS[fabric]}
        if self.libraries:
            path = [*map(str, self.libraries), os.environ.get("LD_LIBRARY_PATH", "")]
            environment["LD_LIBRARY_PATH"] = ":".join(filter(None, path))
        ports = ["-p", str(_free_port())]
        places = [[] if core is None else ["-c", str(core)] for core in cores]
        server = subprocess.Popen(
            [str(self.program), *ports, *places[0]],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        rounds = ["-s", str(num_bytes), "-n", str(num_rounds), "-w", "50", "-f", "-v"]
        client = [str(self.program), "127.0.0.1", *ports, *places[1], "-t", _TEST, *rounds]
        deadline = time.monotonic() + _START_LIMIT_S
        try:
            while True:
                done = subprocess.run(
                    client,
                    env=environment,
                    capture_output=True,
                    text=True,
                    timeout=_LIMIT_S,
                    check=False,
                )
                if done.returncode == 0:
                    return _p50(done.stdout)
                if server.poll() is not None or time.monotonic() > deadline:
                    raise UcxError((done.stderr or done.stdout).strip()[-300:])
                time.sleep(0.05)  # the server does not listen yet
        except subprocess.TimeoutExpired:
            raise UcxError(f"it took more than {_LIMIT_S:.0f} s") from None
        finally:
            server.kill()
            server.wait()


def find(fabric: str) -> Perftest | None:
    """Returns the `ucx_perftest` that can be measured beside `fabric`, if there is one."""
    if fabric not in _ENVIRONMENTS:
        return None
    if program := shutil.which("ucx_perftest"):
        return Perftest(Path(program), ())
    spec = find_spec("libucx")
    for folder in spec.submodule_search_locations or () if spec is not None else ():
        program_in_wheel = Path(folder) / "bin" / "ucx_perftest"
        if program_in_wheel.exists():
            bundled = sorted(Path(folder).parent.glob("libucx_cu*.libs"))
            return Perftest(program_in_wheel, (Path(folder) / "lib", *bundled))
    return None


def _p50(output: str) -> float:
    """The median of CSV output, a header and one line: the second column."""
    try:
        return float(output.strip().splitlines()[-1].split(",")[1])
    except (IndexError, ValueError):
        raise UcxError(f"it printed no times: {output.strip()[-300:]!r}") from None


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
