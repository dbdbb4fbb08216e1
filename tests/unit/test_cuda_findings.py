"""What `step3rt doctor` says of GPUs, with a driver library that is compiled here."""

import subprocess
from pathlib import Path

import pytest

from step3rt.cli.cuda_findings import cuda_findings
from step3rt.cli.finding import Finding

_LIBRARY = """
#include <stdio.h>
int cuInit(unsigned flags) { return INIT_STATUS; }
int cuGetErrorString(int status, const char **text) { *text = "made by a test"; return 0; }
int cuDriverGetVersion(int *version) { *version = 12080; return 0; }
int cuDeviceGetCount(int *count) { *count = NUM_DEVICES; return 0; }
int cuDeviceGet(int *device, int index) { *device = index; return 0; }
int cuDeviceGetName(char *name, int len, int device) {
  return snprintf(name, len, "Test GPU %d", device) < 0;
}
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  *value = attribute == 75 ? (device < NUM_HOPPERS ? 9 : 8) : attribute == 76 ? 0 : -1;
  return 0;
}
int cuDeviceCanAccessPeer(int *can, int device, int peer) {
  *can = device / ISLAND == peer / ISLAND; return 0;
}
"""


class Host:
    """A directory that looks like /proc and /dev of a host with GPUs."""

    def __init__(self, directory: Path) -> None:
        self.proc, self.dev = directory / "proc", directory / "dev"
        self.dev.mkdir()
        self._directory = directory

    def add_driver(self) -> None:
        self.proc.mkdir()

    def add_device(self) -> None:
        (self.dev / "nvidia0").touch()

    def driver(
        self, num_devices: int = 1, island: int = 8, init_status: int = 0, num_hoppers: int = 8
    ) -> str:
        source, library = self._directory / "cuda.c", self._directory / "libcuda.so"
        source.write_text(_LIBRARY, encoding="utf-8")
        macros = [f"-DNUM_DEVICES={num_devices}", f"-DISLAND={island}"]
        macros += [f"-DINIT_STATUS={init_status}", f"-DNUM_HOPPERS={num_hoppers}"]
        command = ["cc", "-shared", "-fPIC", *macros, "-o", str(library), str(source)]
        subprocess.run(command, check=True)
        return str(library)

    def findings(self, library: str = "libno-such-cuda.so") -> dict[str, Finding]:
        found = list(cuda_findings(self.proc, self.dev, library))
        return {item.subject: item for item in reversed(found)}


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def test_a_host_without_a_driver_computes_on_the_cpu(host: Host) -> None:
    [finding] = host.findings().values()
    assert (finding.level, finding.subject) == ("note", "gpu")
    assert finding.found.startswith("no NVIDIA driver; the reference backend computes on the CPU")


def test_a_container_without_the_devices_is_told_how_to_get_them(host: Host) -> None:
    host.add_driver()
    [finding] = host.findings().values()
    assert "sees no device" in finding.found
    assert "--gpus all" in finding.fix


def test_devices_without_the_drivers_library_are_no_use(host: Host) -> None:
    host.add_device()
    [finding] = host.findings().values()
    assert "libno-such-cuda.so cannot be loaded" in finding.found
    assert "NVIDIA_DRIVER_CAPABILITIES" in finding.fix


def test_a_driver_that_does_not_start_is_quoted(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.add_device()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    [finding] = host.findings(host.driver(init_status=803)).values()
    assert "cuInit: made by a test (803), CUDA_VISIBLE_DEVICES is '7'" in finding.found
    assert "nvidia-smi" in finding.fix


def test_no_visible_device_is_no_device(host: Host) -> None:
    host.add_device()
    [finding] = host.findings(host.driver(num_devices=0)).values()
    assert "no device is visible" in finding.found


def test_devices_that_reach_each_other_can_be_linked_by_cuda_ipc(host: Host) -> None:
    host.add_device()
    findings = host.findings(host.driver(num_devices=4))
    gpu, peers = findings["gpu"], findings["cuda_ipc"]
    assert (gpu.level, peers.level) == ("ok", "ok")
    assert gpu.found.startswith("0 Test GPU 0, 1 Test GPU 1, ")
    assert gpu.found.endswith("; CUDA 12.8")
    assert peers.found == "each of 4 devices reaches the others' memory"


def test_devices_that_do_not_are_named_with_where_to_look(host: Host) -> None:
    host.add_device()
    peers = host.findings(host.driver(num_devices=4, island=3))["cuda_ipc"]
    assert peers.level == "note"
    assert "0 and 3, 1 and 3, 2 and 3;" in peers.found
    assert "nvidia-smi topo -p2p" in peers.fix


def test_one_device_is_shared(host: Host) -> None:
    host.add_device()
    assert host.findings(host.driver())["cuda_ipc"].level == "ok"


def test_hoppers_are_what_the_kernels_are_built_for(host: Host) -> None:
    host.add_device()
    assert "kernels" not in host.findings(host.driver(num_devices=4))


def test_devices_of_another_architecture_are_named(host: Host) -> None:
    host.add_device()
    kernels = host.findings(host.driver(num_devices=4, num_hoppers=2))["kernels"]
    assert kernels.level == "note"
    assert kernels.found.endswith("9.0; not for 2 (8.0), 3 (8.0)")
